# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Equivariance, layer by layer
#
# Does a feature map move with the image? The patch embedding does, exactly, where a shift is a
# number of whole patches. What follows adds positions and mixes patches: how much is left, block by
# block, and where on the grid does it fail?
#
# On images and models of your own; several models are compared:
#
# ```sh
# python examples/equivariance_of_layers.py --images photos/ --step 8 \
#     --models google/vit-base-patch16-224 facebook/dinov2-base
# ```

# %%
import argparse
import builtins
from pathlib import Path

import holoviews as hv

import vitxr

parser = argparse.ArgumentParser(description="Equivariance of a model's layers to image shifts.")
parser.add_argument("--images", help="folder with one subfolder for each class")
parser.add_argument("--models", nargs="+", default=["digits"], help="names or folders of models")
parser.add_argument("--step", type=int, default=2, help="pixels between shifts")
parser.add_argument("--output", type=Path, default=Path("equivariance"))
# A kernel has arguments of its own.
args = parser.parse_args([] if hasattr(builtins, "__IPYTHON__") else None)
args.output.mkdir(parents=True, exist_ok=True)

hv.extension("matplotlib", logo=False)

# %%
stim = vitxr.open_images(args.images) if args.images else vitxr.datasets.digits(per_class=1)
stores = {}
for name in args.models:
    store = args.output / f"{Path(name).name}.zarr"
    stores[name] = vitxr.extract(
        stim, vitxr.load_model(name), layers="all", shifts=vitxr.ShiftGrid(args.step),
        variables=["activation", "embedding"], store=store, progress=False,
    )  # fmt: skip
found = {name: ds.vit.equivariance().compute() for name, ds in stores.items()}
first, *_ = found
found[first]

# %% [markdown]
# The error is the mean squared difference between a map and the map of the shifted image, rolled
# back, over twice the map's variance: 0 moves exactly, 1 is chance. `still_error` is the same
# without rolling back. Shifts are of all phases within a patch, which no patch embedding can undo;
# those of whole patches have a curve of their own.

# %%
if len(found) == 1:
    curves = vitxr.plot.equivariance(found[first])
else:
    curves = vitxr.plot.equivariance(found, "whole_patches")
curves

# %% [markdown]
# The embedding output, before the first block: it has positions added. Of the patch embedding alone
# the error would be zero at phase (0, 0); what positions add is what is left of it here.

# %%
embedded = stores[first].vit.equivariance("embedding").compute()
float(embedded.phase_error.sel(phase_y=0, phase_x=0).median())

# %% [markdown]
# Where on the grid it fails, in the last block: the median over feature maps.

# %%
vitxr.plot.error_map(found[first].isel(layer=-1))

# %% [markdown]
# How it depends on the phase of the shift within a patch.

# %%
vitxr.plot.phase_tuning(found[first])

# %%
for name, one in found.items():
    vitxr.save(one, args.output / f"{Path(name).name}.nc")
    middle = one.phase_error.sel(phase_y=0, phase_x=0).median("feature_map")
    print(name, "whole patches, median of maps:", middle.values.round(2).tolist())
vitxr.plot.save(curves, args.output / "equivariance.pdf")
