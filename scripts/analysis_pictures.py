"""Draw the pictures of docs/analysis-equivariance.md, docs/similarity.md and docs/activity.md.

All are of the bundled digits model and scikit-learn's digits; two minutes.

    python scripts/analysis_pictures.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import xarray as xr

import vitxr

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def save(figure: plt.Figure, name: str) -> None:
    """Write a small PNG."""
    figure.savefig(IMAGES / f"{name}.png", dpi=80)
    plt.close(figure)


def draw_unshift(ds: xr.Dataset) -> None:
    """Draw one map of a few frames, as it is and rolled back."""
    error = ds.vit.equivariance().equivariance_error.sel(layer=0).compute()
    best = error.idxmin("feature_map")
    part = ds.sel(layer=0, feature_map=best).isel(image=3, shift_x=[0])
    shifts = [0, 4, 6, 8, 16, 28]
    sides = {"as it is": part.activation, "rolled back": part.vit.unshift()}
    figure, axes = plt.subplots(2, len(shifts), figsize=(9, 3.6), layout="constrained")
    for axis, shift in zip(axes[0], shifts, strict=True):
        axis.set_title(f"{shift} px down")
    for row, (name, x) in zip(axes, sides.items(), strict=True):
        for axis, shift in zip(row, shifts, strict=True):
            frame = x.isel(shift_y=shift, drop=True).squeeze()
            axis.imshow(frame, vmin=float(x.min()), vmax=float(x.max()))
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    save(figure, "unshift")


def draw_equivariance(ds: xr.Dataset) -> None:
    """Draw the curve over layers, the map of errors and the tuning to the phase."""
    e = ds.vit.equivariance().compute()
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for name, x in {
        "rolled back, whole patches": e.phase_error.sel(phase_y=0, phase_x=0),
        "rolled back, all shifts": e.equivariance_error,
        "not rolled": e.still_error,
    }.items():
        median = x.median("feature_map")
        axes[0].plot(e.layer, median, marker="o", label=name)
        axes[0].fill_between(
            e.layer, x.quantile(0.25, "feature_map"), x.quantile(0.75, "feature_map"), alpha=0.15
        )
    axes[0].set(xlabel="layer", ylabel="error / chance (median of maps)", ylim=(0, 1.1))
    axes[0].legend(fontsize=8)
    e.invariance.median("feature_map").plot(ax=axes[1], marker="o")
    axes[1].set(title="", ylabel="invariance (median of maps)", ylim=(0, 1))
    e.error_map.sel(layer=5).median("feature_map").plot(
        ax=axes[2], yincrease=False, cbar_kwargs={"label": "error / chance"}
    )
    axes[2].set(title="where, layer 5", aspect="equal")
    e.phase_error.sel(layer=0).median("feature_map").plot(
        ax=axes[3], yincrease=False, cbar_kwargs={"label": "error / chance"}
    )
    axes[3].set(title="phase, layer 0", aspect="equal")
    save(figure, "equivariance")


def draw_similarity(ds: xr.Dataset) -> None:
    """Draw CKA and RSA between layers with their floors, and CKA between shifts."""
    c, r = ds.vit.cka(batch_size=50), ds.vit.rsa()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.4), layout="constrained")
    for axis, x, name in ((axes[0], c.cka, "CKA"), (axes[1], r.rsa, "RSA")):
        x.plot(ax=axis, vmin=0, vmax=1, extend="neither", cbar_kwargs={"label": name})
        for (i, j), value in zip(
            ((i, j) for i in range(6) for j in range(6)), x.values.ravel(), strict=True
        ):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axis.set(title=name, aspect="equal")
    s = ds.vit.cka(across="shift", batch_size=50).isel(other_shift_y=0, other_shift_x=0)
    for layer in s.layer.values:
        line = s.cka.isel(shift_x=0).sel(layer=layer)
        axes[2].plot(line.offset_y, line, marker="o", label=f"layer {layer}")
    floor = s.cka_floor_quantile.isel(shift_x=0).max("layer")
    axes[2].plot(floor.offset_y, floor, "k--", label="shuffled, 95 %")
    axes[2].set(xlabel="shift down, px", ylabel="CKA with the image unshifted", ylim=(-0.1, 1.05))
    axes[2].legend(fontsize=7)
    save(figure, "similarity")


def draw_rdm(ds: xr.Dataset) -> None:
    """Draw dissimilarities between images, sorted by class."""
    d = ds.isel(shift_y=[0], shift_x=[0]).vit.rdm().squeeze(("shift_y", "shift_x"))
    order = d.label.argsort().values
    d = d.isel(image=order, other_image=order)
    labels = d.label.values
    starts = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    for axis, layer in zip(axes, (0, 3, 5), strict=True):
        drawn = axis.imshow(d.sel(layer=layer))
        axis.set_xticks(starts, labels[starts])
        axis.set_yticks(starts, labels[starts])
        axis.set_title(f"layer {layer}")
        figure.colorbar(drawn, ax=axis, label="1 - correlation")
    save(figure, "rdm")


def draw_activity(ds: xr.Dataset) -> None:
    """Draw what maps care about, classes and sparseness."""
    t, by_class = ds.vit.map_table(), ds.vit.class_activity().compute()
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.5), layout="constrained")
    drawn = axes[0].scatter(
        t.shift_share.sel(layer=5), t.image_share.sel(layer=5), c=t.label_share.sel(layer=5), s=18
    )
    figure.colorbar(drawn, ax=axes[0], label="label share")
    axes[0].set(xlabel="shift share", ylabel="image share", title="maps of layer 5")
    axes[1].scatter(t.d_prime_floor.sel(layer=5), t.d_prime.sel(layer=5), s=18)
    high = float(t.d_prime.sel(layer=5).max())
    axes[1].plot([0, high], [0, high], "k--")
    axes[1].set(xlabel="d', shuffled labels, 95 %", ylabel="d'", title="maps of layer 5")
    last = by_class.sel(layer=5)
    last = (last / last.max("label")).sortby(last.argmax("label"))
    axes[2].imshow(last, aspect="auto", interpolation="nearest")
    axes[2].set(title="layer 5, activity by class", xlabel="class", ylabel="map, by its class")
    axes[2].set_xticks(range(last.sizes["label"]), last.label.values)
    sparse = ds.vit.population_sparseness().compute().mean(("image", "shift_y", "shift_x"))
    axes[3].plot(sparse.layer, sparse, marker="o", label="population")
    lifetime = t.lifetime_sparseness.median("feature_map")
    axes[3].plot(lifetime.layer, lifetime, marker="o", label="lifetime (median)")
    axes[3].set(xlabel="layer", ylabel="sparseness", ylim=(0, 1))
    axes[3].legend()
    save(figure, "activity")


if __name__ == "__main__":
    model = vitxr.load_model("digits")
    with tempfile.TemporaryDirectory() as folder:
        every_pixel = vitxr.extract(
            vitxr.datasets.digits(per_class=1), model, shifts=vitxr.ShiftGrid(1),
            store=Path(folder) / "one.zarr",
        )  # fmt: skip
        draw_unshift(every_pixel)
        draw_equivariance(every_pixel)
        many = vitxr.extract(
            vitxr.datasets.digits(per_class=5), model, shifts=vitxr.ShiftGrid(4),
            store=Path(folder) / "many.zarr",
        ).isel(shift_x=slice(None, None, 2))  # fmt: skip
        draw_similarity(many)
        draw_rdm(many)
        draw_activity(many)
