# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Exploring the manifold
#
# Neurons that respond alike lie close. Which neurons, how laid out, of how many dimensions, and
# does the position on the patch grid show?
#
# On images and a model of your own:
#
# ```sh
# python examples/exploring_the_manifold.py --images photos/ --model google/vit-base-patch16-224 \
#     --layer 11 --step 16 --maps 20 --rank 20
# ```

# %%
import argparse
import builtins
from pathlib import Path

import holoviews as hv

import vitxr

parser = argparse.ArgumentParser(description="The manifold that the neurons of a block form.")
parser.add_argument("--images", help="folder with one subfolder for each class")
parser.add_argument("--model", default="digits", help="name or folder of a model")
parser.add_argument("--layer", type=int, default=2)
parser.add_argument("--step", type=int, default=4, help="pixels between shifts")
parser.add_argument("--maps", type=int, default=8, help="feature maps, the most active")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--output", type=Path, default=Path("manifold"))
# A kernel has arguments of its own.
args = parser.parse_args([] if hasattr(builtins, "__IPYTHON__") else None)
args.output.mkdir(parents=True, exist_ok=True)

hv.extension("matplotlib", logo=False)

# %% [markdown]
# ## Neurons
#
# All neurons of the feature maps that are most active over all images and shifts.

# %%
stim = vitxr.open_images(args.images) if args.images else vitxr.datasets.digits(per_class=2)
ds = vitxr.extract(
    stim, vitxr.load_model(args.model), layers=args.layer, shifts=vitxr.ShiftGrid(args.step),
    store=args.output / "activations.zarr", progress=False,
)  # fmt: skip
t = ds.vit.neuron_tensor(args.layer, feature_maps=args.maps, ranking="mean").compute()
t

# %%
f = t.vit.factorize(args.rank, progress=False)
vitxr.plot.factors(f)

# %% [markdown]
# ## Laid out
#
# Principal components, and diffusion maps with a kernel that adapts to the density of neurons.

# %%
e = f.vit.embed(5)
vitxr.plot.embedding(e, color="feature_map")

# %%
d = f.vit.embed(3, "diffusion")
vitxr.plot.embedding(d, color="both")

# %%
vitxr.plot.embedding_3d(d, color="patch_row")

# %% [markdown]
# ## Of how many dimensions?

# %%
dimension = f.vit.local_dimension()
vitxr.plot.local_dimension(dimension)

# %% [markdown]
# ## Does the patch grid show?
#
# For each feature map the rank correlation of distances on the grid and on the manifold, beside
# what shuffled positions give.

# %%
order = d.vit.spatial_order(random_state=0)
vitxr.plot.spatial_order(order)

# %%
vitxr.plot.manifold_distance(order)

# %% [markdown]
# ## Groups of neurons

# %%
grouped = d.vit.cluster(6, random_state=0)
vitxr.plot.embedding(grouped, color="cluster")

# %%
vitxr.plot.cluster(grouped)

# %%
vitxr.save(grouped, args.output / "embedding.nc")
print("spatial order, median of maps:", round(float(order.spatial_order.median()), 2))
print("clusters:", grouped.cluster.to_series().value_counts().sort_index().to_list())
