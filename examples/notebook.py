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
# On images and a model of your own, with the notebook's numbers:
#
# ```sh
# python examples/notebook.py --images photos/ --model google/vit-base-patch16-224 \
#     --step 11 --ranks 20 25 30 --check 1
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
parser.add_argument("--ranks", type=int, nargs="+", default=[6, 8, 10])
parser.add_argument("--check", type=int, help="images that the notebook's loop runs too (all)")
parser.add_argument("--output", type=Path, default=Path("notebook"))
# A kernel has arguments of its own.
args = parser.parse_args([] if hasattr(builtins, "__IPYTHON__") else None)
args.output.mkdir(parents=True, exist_ok=True)

hv.extension("matplotlib", logo=False)


def keep(name, picture):
    """Save a picture, and hand it on to be shown."""
    vitxr.plot.save(picture, args.output / f"{name}.png")
    return picture


# %% [markdown]
# ## 2 The model and its prediction

# %%
model = vitxr.load_model(args.model)
model

# %%
if args.images:
    stim = vitxr.open_images(args.images, per_class=5, size=model.input_size)
else:
    digits = vitxr.datasets.digits(per_class=5)
    stacks = {d: digits.pixels.values[digits.label == d] for d in "0347"}
    stim = vitxr.open_images(stacks, size=model.input_size)
one = vitxr.extract(
    stim.isel(image=[0]), model, "all", shifts=None,
    variables=["activation", "prefix", "embedding", "attention", "logits"],
).load()  # fmt: skip
one.vit.top_classes(3).to_dataframe()

# %% [markdown]
# ## 3 Attentions and hidden states
#
# Every head of every layer; what one patch attends to, on the patch grid; the embedding and two
# blocks, whole, and one of their channels.

# %%
keep("attention", vitxr.plot.attention_matrices(one))

# %%
last = len(model.blocks) - 1
row, col = model.grid
query = (8 * row // 14, col // 2)
keep("query", vitxr.plot.attention_query(one, query=query, layer=min(5, last)))

# %%
some = one.sel(layer=[0, last - 1])
keep("hidden", vitxr.plot.hidden_states(some))

# %%
keep("channel", vitxr.plot.feature_map_layers(some, feature_map=391 % some.sizes["feature_map"]))

# %% [markdown]
# ## 4 Images
#
# Five of each of four classes.

# %%
keep("images", vitxr.plot.stimuli(stim))

# %% [markdown]
# ## 5 The 3D neuron tensor
#
# Every image is rolled over the notebook's raster, every frame is run, the 20 most active feature
# maps are kept, and each is divided by its own maximum in each frame.

# %%
ds = vitxr.extract(
    stim, model, layers=[0, last], shifts=vitxr.ShiftGrid(args.step, "raster"),
    preprocess="raw", store=args.output / "activations.zarr", progress=False,
)  # fmt: skip
t = ds.vit.neuron_tensor(layer=0, feature_maps=20).compute()
t.vit.to_mat(args.output / "neuron_output_3D.mat")
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


def compare(ours, loop):
    """Fail if one of the values is another."""
    ours = ours.values[:, : loop.shape[1]]
    np.testing.assert_allclose(ours, loop, rtol=1e-5, atol=1e-5)
    print(f"{loop.size} values, largest difference {abs(ours - loop).max():.1e}")


compare(t, notebooks(0))

# %%
keep("activity", vitxr.plot.activity(ds.vit.activity().sel(layer=0)))

# %% [markdown]
# ## 6 The 2D neuron tensor
#
# The mean over shifts, of the last layer.

# %%
m = ds.vit.neuron_matrix(layer=last, feature_maps=20).compute()
m.vit.to_mat(args.output / "neuron_output_2D.mat")
compare(m, notebooks(last).mean(axis=2))

# %% [markdown]
# ## 7 Tensor factorization
#
# First the tensor itself: every frame of a map, for the first image. All maps are in `movie.html`.

# %%
vitxr.plot.save(vitxr.plot.movie(t), args.output / "movie.html")
maps = list(dict.fromkeys(t.feature_map.values))
keep("frames", vitxr.plot.filmstrip(t, int(maps[0])))

# %% [markdown]
# Nonnegative CP by HALS, tolerance 1e-5; from three starts, where the notebook has one.

# %%
tree = t.vit.fit_ensemble(args.ranks, replicates=3, tol=1e-5, progress=False)
keep("objective", vitxr.plot.objective_by_rank(tree))

# %%
keep("similarity", vitxr.plot.similarity_by_rank(tree))

# %%
f = tree.vit.best(args.ranks[1])
keep("factors", vitxr.plot.factors(f))

# %%
keep("neurons", vitxr.plot.factor_curves(f, "neuron"))

# %%
keep("shifts", vitxr.plot.factor_curves(f, "shift"))

# %% [markdown]
# The embedding of the neurons: the first ten principal components of the neuron factor, or as many
# as there are.

# %%
e = f.vit.embed(n_components=10)
keep("variance", vitxr.plot.explained_variance(e))

# %%
keep("embedding", vitxr.plot.embedding_3d(e, color="feature_map"))

# %% [markdown]
# The spatial order: one feature map's neurons, by row, then by column.

# %%
keep("rows", vitxr.plot.embedding_3d(e, color="patch_row", feature_map=int(maps[1])))

# %%
keep("columns", vitxr.plot.embedding_3d(e, color="patch_col", feature_map=int(maps[1])))

# %% [markdown]
# ### 7.1 2D
#
# The means over shifts, of the first layer and of the last, each fitted as a matrix.

# %%
first = ds.vit.neuron_matrix(layer=0, feature_maps=20).compute()
keep("first_matrix", vitxr.plot.neuron_matrix(first))

# %%
trees = [matrix.vit.fit_ensemble(range(1, 6), tol=1e-5, progress=False) for matrix in (first, m)]
g, h = (tree.vit.best(3) for tree in trees)
keep("first_factors", vitxr.plot.factors(g))

# %%
keep("first_rows", vitxr.plot.embedding_3d(g.vit.embed(), color="patch_row"))

# %%
keep("last_matrix", vitxr.plot.neuron_matrix(m))

# %%
keep("last_factors", vitxr.plot.factors(h))

# %%
keep("last_rows", vitxr.plot.embedding_3d(h.vit.embed(), color="patch_row"))
