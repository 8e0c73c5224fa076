# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # The original notebook again
#
# The analysis that vitxr grew out of, section by section in the notebook's order, with its own
# rules: the raster of shifts, pixel values as they are, maps ranked by the first frame. Both of its
# tensors are compared with the notebook's loop below, and with a literal transcription of the
# notebook by `tests/test_examples.py`.
#
# On images and a model of your own:
#
# ```sh
# python examples/notebook.py --images photos/ --model google/vit-base-patch16-224 \
#     --step 11 --check 1
# ```

# %%
import argparse
import builtins
from pathlib import Path

import holoviews as hv
import numpy as np
import torch

import vitxr

parser = argparse.ArgumentParser(description="The original notebook's analysis.")
parser.add_argument("--images", help="folder with one subfolder for each class; all of one size")
parser.add_argument("--model", default="digits", help="name or folder of a model")
parser.add_argument("--step", type=int, default=4, help="pixels between shifts")
parser.add_argument("--check", type=int, help="images that the notebook's loop runs too (all)")
parser.add_argument("--ranks", type=int, nargs="+", default=[6, 8, 10])
parser.add_argument("--output", type=Path, default=Path("notebook"))
# A kernel has arguments of its own.
args = parser.parse_args([] if hasattr(builtins, "__IPYTHON__") else None)
args.output.mkdir(parents=True, exist_ok=True)

hv.extension("matplotlib", logo=False)

# %% [markdown]
# ## 2 The model and its prediction

# %%
model = vitxr.load_model(args.model)
model

# %% [markdown]
# ## 4 Images
#
# Five of each of four classes. (The notebook looks at attention first, in one photograph.)

# %%
if args.images:
    stim = vitxr.open_images(args.images, per_class=5, size=model.input_size)
else:
    digits = vitxr.datasets.digits(per_class=5)
    stacks = {d: digits.pixels.values[digits.label == d] for d in "0347"}
    stim = vitxr.open_images(stacks, size=model.input_size)
vitxr.plot.stimuli(stim)

# %%
seen = vitxr.extract(
    stim, model, "all", shifts=None, variables=["activation", "attention", "logits"]
).load()
vitxr.plot.predictions(seen.logits)

# %% [markdown]
# ## 3 Attentions and hidden states
#
# Every head of every layer, for the first image; then what one patch attends to, on the patch grid.

# %%
first = seen.isel(image=[0])
vitxr.plot.attention_matrices(first)

# %%
middle = (model.grid[0] // 2, model.grid[1] // 2)
vitxr.plot.attention_query(first, query=middle, layer=len(model.blocks) // 2)

# %%
vitxr.plot.feature_map_layers(first, feature_map=17)

# %% [markdown]
# ## 5 The 3D neuron tensor
#
# Every image is rolled over the notebook's raster, every frame is run, the 20 most active feature
# maps are kept, and each is divided by its own maximum in each frame.

# %%
last = len(model.blocks) - 1
ds = vitxr.extract(
    stim, model, layers=[0, last], shifts=vitxr.ShiftGrid(args.step, "raster"),
    preprocess="raw", store=args.output / "activations.zarr", progress=False,
)  # fmt: skip
t = ds.vit.neuron_tensor(layer=0, feature_maps=20).compute()
t

# %% [markdown]
# The same by the notebook's loop: roll, run one frame, rectify, rank in the first frame, divide.

# %%
by_loop: dict[int, list] = {0: [], last: []}
hooks = [
    model.blocks[i].register_forward_hook(lambda *given, i=i: by_loop[i].append(given[-1]))
    for i in by_loop
]


def run(frame):
    """Run one frame; the hooks keep its activations."""
    with torch.no_grad():
        model.forward(torch.tensor(frame[None], dtype=torch.float32, device=model.device))


for image in range(stim.sizes["image"])[: args.check]:
    frame = vitxr.read_image(stim, image).transpose(2, 0, 1)
    for _ in range(0, frame.shape[1], args.step):
        frame = np.roll(frame, args.step, axis=1)
        run(frame)
        for _ in range(0, frame.shape[2], args.step):
            frame = np.roll(frame, args.step, axis=2)
            run(frame)
for hook in hooks:
    hook.remove()


def notebooks(layer):
    """Return the notebook's tensor: neurons, images, frames."""
    maps = torch.cat(by_loop[layer])[:, len(model.prefix) :].relu().cpu().numpy()
    maps = maps[..., np.argsort(-maps[0].mean(axis=0))[:20]].transpose(2, 1, 0)
    peak = maps.max(axis=1, keepdims=True)
    maps = np.divide(maps, peak, out=np.zeros_like(maps), where=peak > 0)
    return maps.reshape(t.sizes["neuron"], -1, t.sizes["shift"])


loop = notebooks(0)
ours = t.values[:, : loop.shape[1]]
np.testing.assert_allclose(ours, loop, rtol=1e-5, atol=1e-5)
print(f"{loop.size} values, largest difference {abs(ours - loop).max():.1e}")

# %%
vitxr.plot.activity(ds.vit.activity().sel(layer=0))

# %%
vitxr.plot.filmstrip(t, int(t.feature_map[0]))

# %% [markdown]
# ## 6 The 2D neuron tensor
#
# The mean over shifts, of the last layer.

# %%
m = ds.vit.neuron_matrix(layer=last, feature_maps=20).compute()
loop = notebooks(last).mean(axis=2)
ours = m.values[:, : loop.shape[1]]
np.testing.assert_allclose(ours, loop, rtol=1e-5, atol=1e-5)
print(f"{loop.size} values, largest difference {abs(ours - loop).max():.1e}")

# %%
vitxr.plot.neuron_matrix(m)

# %% [markdown]
# ## 7 Tensor factorization
#
# Nonnegative CP by HALS at three ranks, tolerance 1e-5.

# %%
tree = t.vit.fit_ensemble(args.ranks, replicates=3, tol=1e-5, progress=False)
vitxr.plot.objective_by_rank(tree)

# %%
vitxr.plot.similarity_by_rank(tree)

# %%
f = tree.vit.best(args.ranks[1])
vitxr.plot.factors(f)

# %%
vitxr.plot.factor_curves(f)

# %% [markdown]
# The embedding of the neurons: ten principal components of the neuron factor.

# %%
e = f.vit.embed(n_components=10)
vitxr.plot.explained_variance(e)

# %%
vitxr.plot.embedding(e, color="feature_map")

# %% [markdown]
# The spatial order: one feature map's neurons, by row and column at once.

# %%
one = e.isel(neuron=np.flatnonzero(e.feature_map == t.feature_map.values[-1]))
vitxr.plot.embedding(one, color="both")

# %% [markdown]
# ### 7.1 2D
#
# A matrix is a tensor of two modes.

# %%
g = m.vit.factorize(rank=3, tol=1e-5, progress=False)
vitxr.plot.factors(g)
