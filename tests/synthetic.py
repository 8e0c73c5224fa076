"""Data with the shapes of a real run, made from scikit-learn's digits: no model needed.

The activations come from random filters on the patches of the shifted images, so
that they depend on image, shift and place; depth mixes neighbouring patches. The
factors come from a few multiplicative updates, which is all that a picture needs.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr


def stimuli(per_class=5, classes=(0, 1, 2, 3), size=32):
    from sklearn.datasets import load_digits

    digits = load_digits()
    picked = [np.flatnonzero(digits.target == c)[:per_class] for c in classes]
    index = np.concatenate(picked)
    grey = np.rint(digits.images[index] / 16 * 255).astype(np.uint8)
    grey = grey.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    labels = digits.target[index].astype(str)
    names = [f"{label}-{i}" for label, i in zip(labels, index, strict=True)]
    n = len(index)
    return xr.Dataset(
        {"pixels": (("image", "row", "col", "channel"), pixels)},
        coords={
            "image": names,
            "label": ("image", labels.astype(object)),
            "source": ("image", np.array(["scikit-learn digits"] * n, dtype=object)),
            "height": ("image", np.full(n, size)),
            "width": ("image", np.full(n, size)),
            "sha256": ("image", np.array([f"{i:064x}" for i in index], dtype=object)),
        },
    )


def extraction(stim, *, step=3, layers=(0, 5), channels=48, patch=4, heads=0, seed=0):
    """An extraction Dataset; ``step=None`` gives no shifts, ``heads`` > 0 adds attention."""
    rng = np.random.default_rng(seed)
    pixels = stim["pixels"].values[..., 0].astype(np.float32) / 255
    n, height, width = pixels.shape
    dy = np.arange(0, height, step) if step else np.zeros(1, int)
    dx = np.arange(0, width, step) if step else np.zeros(1, int)
    frames = np.stack(
        [np.stack([np.roll(pixels, (y, x), (1, 2)) for x in dx], 1) for y in dy], 1
    )  # image, shift_y, shift_x, row, col
    gh, gw = height // patch, width // patch
    cut = frames.reshape(n, len(dy), len(dx), gh, patch, gw, patch).swapaxes(4, 5)
    state = cut.reshape(n, len(dy), len(dx), gh, gw, patch * patch)
    place = rng.normal(0, 0.4, (gh, gw, channels)).cumsum(0).cumsum(1) / 6
    state = state @ rng.normal(0, 0.5, (patch * patch, channels)) + place
    embedding = state
    kept, weights = [], []
    for layer in range(max(layers) + 1):
        if heads:
            flat = state.reshape(*state.shape[:3], gh * gw, channels)
            cls = flat.mean(-2, keepdims=True)
            tokens = np.concatenate([cls, flat], -2)
            q = np.stack(
                np.split(tokens @ rng.normal(0, 0.15, (channels, 8 * heads)), heads, -1), 3
            )
            k = np.stack(
                np.split(tokens @ rng.normal(0, 0.15, (channels, 8 * heads)), heads, -1), 3
            )
            score = q @ k.swapaxes(-1, -2)
            score = np.exp(score - score.max(-1, keepdims=True))
            weights.append(score / score.sum(-1, keepdims=True))
        around = sum(np.roll(state, s, a) for a in (3, 4) for s in (-1, 1)) / 4
        mixed = (state + 0.6 * layer / 5 * around) @ rng.normal(
            0, 1 / np.sqrt(channels), (channels,) * 2
        )
        state = state + np.maximum(mixed, 0) - 0.2
        if layer in layers:
            kept.append(state)
    ds = xr.Dataset(coords=stim.drop_vars("pixels").coords)
    ds = ds.assign_coords(
        shift_y=np.arange(len(dy)),
        shift_x=np.arange(len(dx)),
        layer=list(layers),
        feature_map=np.arange(channels),
        patch_row=np.arange(gh),
        patch_col=np.arange(gw),
        offset_y=("shift_y", dy, {"units": "px"}),
        offset_x=("shift_x", dx, {"units": "px"}),
    )
    lattice = ("image", "shift_y", "shift_x")
    activation = np.moveaxis(np.stack(kept, 3), -1, 4).astype(np.float32)
    ds["activation"] = ((*lattice, "layer", "feature_map", "patch_row", "patch_col"), activation)
    pooled = state.mean((3, 4))
    labels = pd.unique(stim["label"].values)
    centre = np.stack([pooled[stim["label"].values == c].mean((0, 1, 2)) for c in labels])
    logits = -((pooled[..., None, :] - centre) ** 2).sum(-1).astype(np.float32)
    ds["logits"] = ((*lattice, "class"), logits)
    ds = ds.assign_coords({"class": labels.astype(object)})
    if heads:
        index = [i for i in range(max(layers) + 1) if i in layers]
        ds["attention"] = (
            (*lattice, "layer", "head", "query", "key"),
            np.stack([weights[i] for i in index], 3).astype(np.float32),
        )
        ds = ds.assign_coords(head=np.arange(heads))
        ds["embedding"] = (
            (*lattice, "feature_map", "patch_row", "patch_col"),
            np.moveaxis(embedding, -1, 3).astype(np.float32),
        )
    ds.attrs = {
        "model": "synthetic filters",
        "fingerprint": "0123456789abcdef" * 4,
        "patch_height": patch,
        "patch_width": patch,
        "input_height": height,
        "input_width": width,
        "preprocess": "raw",
        "prefix_tokens": 1,
    }
    return ds


def neuron_tensor(ds, layer, maps=20):
    act = np.maximum(ds["activation"].sel(layer=layer).values, 0)
    first = act[0, 0, 0].mean((1, 2))
    keep = np.argsort(-first, kind="stable")[:maps]
    act = act[:, :, :, keep]
    peak = act.max((4, 5), keepdims=True)
    act = np.divide(act, peak, out=np.zeros_like(act), where=peak > 0)
    n, ny, nx, f, gh, gw = act.shape
    values = act.reshape(n, ny * nx, f * gh * gw).transpose(2, 0, 1)
    neuron = pd.MultiIndex.from_product(
        [keep, range(gh), range(gw)], names=["feature_map", "patch_row", "patch_col"]
    )
    shift = pd.MultiIndex.from_product([range(ny), range(nx)], names=["shift_y", "shift_x"])
    t = xr.DataArray(
        np.ascontiguousarray(values),
        dims=("neuron", "image", "shift"),
        name="activation",
        coords={"image": ds["image"], "label": ds["label"]},
    )
    t = t.assign_coords(xr.Coordinates.from_pandas_multiindex(neuron, "neuron"))
    t = t.assign_coords(xr.Coordinates.from_pandas_multiindex(shift, "shift"))
    return t.assign_coords(
        offset_y=("shift", np.repeat(ds["offset_y"].values, nx)),
        offset_x=("shift", np.tile(ds["offset_x"].values, ny)),
    )


def factorize(t, rank, seed=0, iterations=12):
    """Nonnegative CP by multiplicative updates."""
    rng = np.random.default_rng(seed)
    x = t.values.astype(np.float64)
    letters = "abc"[: x.ndim]
    factors = [rng.random((size, rank)) + 0.1 for size in x.shape]
    history = []
    for _ in range(iterations):
        for mode in range(x.ndim):
            others = [m for m in range(x.ndim) if m != mode]
            terms = ",".join([letters] + [letters[m] + "r" for m in others])
            top = np.einsum(
                f"{terms}->{letters[mode]}r", x, *[factors[m] for m in others], optimize=True
            )
            gram = np.prod([factors[m].T @ factors[m] for m in others], axis=0)
            factors[mode] *= top / (factors[mode] @ gram + 1e-12)
        model = (factors[-1] * top).sum()
        cross = np.prod([f.T @ f for f in factors], axis=0).sum()
        norm = (x**2).sum()
        history.append(np.sqrt(max(norm - 2 * model + cross, 0) / norm))
    norms = [np.linalg.norm(f, axis=0) for f in factors]
    weight = np.prod(norms, axis=0)
    by_weight = np.argsort(-weight)
    f = xr.Dataset(coords=t.coords)
    for dim, factor, norm in zip(t.dims, factors, norms, strict=True):
        f[f"{dim}_factor"] = ((dim, "component"), (factor / norm)[:, by_weight].astype(np.float32))
    f["weight"] = ("component", weight[by_weight].astype(np.float32))
    f["objective"] = history[-1]
    f["objective_history"] = ("iteration", history)
    f["converged"] = False
    f["iterations"] = iterations
    f["seconds"] = 0.1
    f["seed"] = seed
    f.attrs = {"method": "multiplicative updates", "tol": 0.0, "max_iter": iterations}
    return f.assign_coords(component=np.arange(rank))


def ensemble(t, ranks=(2, 4), replicates=3, iterations=8):
    fits = {r: [factorize(t, r, 10 * r + i, iterations) for i in range(replicates)] for r in ranks}
    objective = np.array([[float(f["objective"]) for f in fits[r]] for r in ranks])
    best = objective.argmin(1)
    similarity = np.empty_like(objective)
    for i, r in enumerate(ranks):
        a = fits[r][best[i]]["neuron_factor"].values
        for j in range(replicates):
            b = fits[r][j]["neuron_factor"].values
            similarity[i, j] = 1.0 if j == best[i] else (a.T @ b).max(1).mean()
    root = xr.Dataset(
        {
            "objective": (("rank", "replicate"), objective),
            "similarity": (("rank", "replicate"), similarity),
            "seed": (("rank", "replicate"), [[int(f["seed"]) for f in fits[r]] for r in ranks]),
        },
        coords={"rank": list(ranks), "replicate": np.arange(replicates)},
    )
    return xr.DataTree.from_dict({"/": root}), {
        r: fits[r][b] for r, b in zip(ranks, best, strict=True)
    }


def embed(f, pcs=10, dim="neuron"):
    x = f[f"{dim}_factor"].values.astype(np.float64)
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    pcs = min(pcs, len(s))
    variance = s**2 / (len(x) - 1)
    coords = f[f"{dim}_factor"].coords
    e = xr.Dataset(coords={n: c for n, c in coords.items() if c.dims == (dim,)})
    e["score"] = ((dim, "pc"), (u * s)[:, :pcs])
    e["explained_variance"] = ("pc", variance[:pcs])
    e["explained_variance_ratio"] = ("pc", (variance / variance.sum())[:pcs])
    return e.assign_coords(pc=np.arange(1, pcs + 1))
