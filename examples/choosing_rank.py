# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Choosing the rank
#
# How many components does a neuron tensor hold? Every criterion, beside what it is on shuffled
# data, then the model of the rank that the curves speak for.
#
# On images and a model of your own:
#
# ```sh
# python examples/choosing_rank.py --images photos/ --model google/vit-base-patch16-224 --layer 11 \
#     --step 16 --ranks 5 10 15 20 25 30
# ```

# %%
import argparse
import builtins
from pathlib import Path

import holoviews as hv

import vitxr

parser = argparse.ArgumentParser(description="Choose the rank of nonnegative factors.")
parser.add_argument("--images", help="folder with one subfolder for each class")
parser.add_argument("--model", default="digits", help="name or folder of a model")
parser.add_argument("--layer", type=int, default=5)
parser.add_argument("--step", type=int, default=8, help="pixels between shifts")
parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
parser.add_argument("--output", type=Path, default=Path("choosing_rank"))
# A kernel has arguments of its own.
args = parser.parse_args([] if hasattr(builtins, "__IPYTHON__") else None)
args.output.mkdir(parents=True, exist_ok=True)

hv.extension("matplotlib", logo=False)

# %%
stim = vitxr.open_images(args.images) if args.images else vitxr.datasets.digits(per_class=3)
ds = vitxr.extract(
    stim, vitxr.load_model(args.model), layers=args.layer, shifts=vitxr.ShiftGrid(args.step),
    store=args.output / "activations.zarr", progress=False,
)  # fmt: skip
t = ds.vit.neuron_tensor(layer=args.layer, feature_maps=20).compute()
t

# %% [markdown]
# Each rank is fitted several times: from several starts, to halves of the neurons, with entries
# held out, and to shuffled data.

# %%
found = t.vit.choose_rank(args.ranks, progress=False)
picture = vitxr.plot.rank_choice(found)
picture

# %% [markdown]
# The objective always falls. The error of the entries held out stops falling where components begin
# to describe single entries; agreement between halves of the neurons says whether the components
# are properties of images and shifts, or of the neurons that were looked at.

# %%
table = found[["objective", "test_error", "split_half_score", "similarity"]]
table = table.mean([dim for dim in ("replicate", "split") if dim in table.dims]).to_dataframe()
table.round(3)

# %% [markdown]
# One rule of several: the smallest rank whose held-out error is within one standard error of the
# least. Look at the curves before you believe it.

# %%
held_out = found.test_error.stack(fit=("replicate", "split"))
mean, error = held_out.mean("fit"), held_out.std("fit") / held_out.sizes["fit"] ** 0.5
least = mean.idxmin("rank")
rank = int(mean["rank"][mean <= (mean + error).sel(rank=least)].min())
rank

# %% [markdown]
# The fit of that rank is made again from its seed, to the same factors.

# %%
best = found.sel(rank=rank, replicate=int(found.best_replicate.sel(rank=rank)))
f = t.vit.factorize(rank, random_state=int(best.seed), progress=False)
vitxr.plot.factors(f)

# %%
vitxr.save(found, args.output / "criteria.nc")
vitxr.save(f, args.output / "factors.nc")
vitxr.plot.save(picture, args.output / "criteria.pdf")
print(f"rank {rank}: objective {float(f.objective):.4f}, as found {float(best.objective):.4f}")
