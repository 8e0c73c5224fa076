"""Make the pictures of docs/attention.md and docs/manifolds.md from the model "digits".

python scripts/attention_pictures.py [NAME ...]
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

import vitxr
from vitxr import analysis
from vitxr.models import Backbone

OUT = Path(__file__).parent.parent / "docs" / "images"
STILL = {"shift_y": 0, "shift_x": 0}


@functools.cache
def model() -> Backbone:
    """Load the bundled model."""
    return vitxr.load_model("digits")


@functools.cache
def stim() -> xr.Dataset:
    """Two images a class, in memory."""
    return vitxr.datasets.digits(per_class=2).load()


@functools.cache
def attention() -> xr.Dataset:
    """Attention of all layers, for no shift and shifts of half the image."""
    shifts = vitxr.ShiftGrid(16)
    return vitxr.extract(stim(), model(), shifts=shifts, variables=["attention"]).compute()


@functools.cache
def factors() -> tuple[xr.DataArray, xr.Dataset]:
    """Neuron tensor of the third block, eight maps, and eight components of it."""
    ds = vitxr.extract(stim(), model(), layers=2, shifts=vitxr.ShiftGrid(4))
    t = ds.vit.neuron_tensor(2, feature_maps=8).compute()
    return t, t.vit.factorize(rank=8)


def image(ax: plt.Axes, at: int) -> None:
    """Show a stimulus."""
    ax.imshow(stim().pixels[at].values)
    ax.set_title(f"image, {stim().label.values[at]}", fontsize=8)


def show(ax: plt.Axes, values: np.ndarray, title: str, **options: object) -> None:
    """Show a map on the patch grid."""
    ax.imshow(values, **{"cmap": "viridis", "vmin": 0, **options})
    ax.set_title(title, fontsize=8)


def panels(
    rows: int, cols: int, size: float = 1.25, head: float = 0.2
) -> tuple[plt.Figure, np.ndarray]:
    """Make small panels without ticks."""
    fig, axes = plt.subplots(rows, cols, figsize=(size * cols, (size + head) * rows), squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    return fig, axes


def attention_map() -> plt.Figure:
    """Attention of the class token and of one patch, by head."""
    fig, axes = panels(2, 5)
    for row, query in zip(axes, ("class", (2, 4)), strict=True):
        m = attention().vit.attention_map(query).isel(image=6, layer=4, **STILL)
        image(row[0], 6)
        for head in range(4):
            show(row[head + 1], m.isel(head=head), f"head {head}", vmax=float(m.max()))
        row[0].set_ylabel("class token" if query == "class" else "patch (2, 4)", fontsize=8)
        if query != "class":
            row[0].add_patch(plt.Rectangle((3.5, 1.5), 1, 1, fill=False, color="red"))
            for ax in row[1:]:
                ax.add_patch(plt.Rectangle((3.5, 1.5), 1, 1, fill=False, color="red"))
    return fig


def rollout() -> plt.Figure:
    """Rollout of the class token by each fusion of heads, and of a shifted image.

    The images have 8 pixels a side, the model's input 32: a shift of 16 is one of 4.
    """
    fig, axes = panels(1, 6)
    image(axes[0, 0], 6)
    for ax, fusion in zip(axes[0, 1:], ("mean", "max", "min"), strict=False):
        r = attention().vit.attention_rollout(fusion=fusion).isel(image=6)
        show(ax, r.isel(**STILL), fusion)
    axes[0, 4].imshow(np.roll(stim().pixels[6].values, (4, 4), (0, 1)))
    axes[0, 4].set_title("shifted (16, 16)", fontsize=8)
    r = attention().vit.attention_rollout().isel(image=6, shift_y=1, shift_x=1)
    show(axes[0, 5], r, "mean")
    return fig


def distance_and_entropy() -> plt.Figure:
    """Mean attention distance and entropy of each head against the layer."""
    fig, axes = plt.subplots(1, 2, figsize=(6.6, 2.4), layout="constrained")
    d = attention().vit.attention_distance().mean(("image", "shift_y", "shift_x"))
    h = attention().vit.attention_entropy().mean(("image", "shift_y", "shift_x"))
    for head in range(4):
        axes[0].plot(d.layer, d.isel(head=head), "o", ms=4, label=f"head {head}")
        axes[1].plot(h.layer, h.isel(head=head), "o", ms=4)
    patch = np.indices((8, 8)).reshape(2, -1).T * 4.0
    uniform = np.linalg.norm(patch[:, None] - patch[None], axis=-1).mean()
    for ax, line, name in (
        (axes[0], uniform, "attention distance (px)"),
        (axes[1], np.log(65), "entropy (nat)"),
    ):
        ax.axhline(line, color="0.6", lw=1, ls="--")
        ax.set(xlabel="layer", ylabel=name, ylim=(0, line * 1.1))
    axes[0].text(0, uniform * 1.02, "uniform", fontsize=7, color="0.4")
    axes[0].legend(fontsize=7, ncols=2, loc="lower right")
    return fig


def mass_mask() -> plt.Figure:
    """The fewest patches with 60 % of the class token's attention, by head."""
    fig, axes = panels(1, 5)
    image(axes[0, 0], 6)
    m = attention().vit.attention_map().isel(image=6, layer=4, **STILL)
    for head in range(4):
        kept = m.isel(head=head).vit.mass_mask(0.6)
        share = float(m.isel(head=head).where(kept).sum() / m.isel(head=head).sum())
        show(axes[0, head + 1], kept, f"head {head}\n{int(kept.sum())} patches, {share:.0%}")
    return fig


def relevance() -> plt.Figure:
    """Relevance of patches for three classes of three images."""
    labels = ["3", "8", "0"]
    some = [list(stim().label.values).index(name) for name in labels]
    r = analysis.relevance(stim().isel(image=some), model(), classes=labels)
    fig, axes = panels(3, 4)
    for i, row in enumerate(axes):
        image(row[0], some[i])
        for j, name in enumerate(labels):
            values = r.relevance.isel(image=i, **STILL).sel({"class": name})
            show(row[j + 1], values, f'for "{name}"')
        row[0].set_ylabel(f"predicted {r.predicted.values[i, 0, 0]}", fontsize=8)
    return fig


def patch_filters() -> plt.Figure:
    """Filters of the patch embedding, all on one scale."""
    f = analysis.patch_filters(model())
    fig, axes = panels(4, 12, 0.6, 0.0)
    high = float(abs(f).max())
    for ax, one in zip(axes.flat, f, strict=True):
        ax.imshow(0.5 + one.values / (2 * high))
    return fig


def position_similarity() -> plt.Figure:
    """Cosine of each patch's position embedding with all others."""
    s = analysis.position_similarity(model())
    fig, axes = panels(8, 8, 0.55, 0.0)
    for row in range(8):
        for col in range(8):
            picture = axes[row, col].imshow(s[row, col], vmin=-1, vmax=1, cmap="RdBu_r")
    fig.colorbar(picture, ax=axes, shrink=0.6, label="cosine")
    return fig


def embeddings() -> plt.Figure:
    """The neurons of one block by five methods, coloured by feature map."""
    _, f = factors()
    options: dict[str, dict] = {
        "pca": {}, "diffusion": {}, "isomap": {"n_neighbors": 12},
        "spectral": {"n_neighbors": 12}, "tsne": {},
    }  # fmt: skip
    fig, axes = panels(1, 5, 1.7)
    for ax, (method, given) in zip(axes[0], options.items(), strict=True):
        e = f.vit.embed(2, method, **given)
        ax.scatter(*e.score.values.T, c=e.feature_map.values % 20, s=3, cmap="tab20")
        ax.set_title(method, fontsize=8)
    return fig


def project() -> plt.Figure:
    """A diffusion map of three neurons in four, and the rest placed on it."""
    _, f = factors()
    new_ones = np.random.default_rng(0).random(f.sizes["neuron"]) < 0.25
    known, new = f.isel(neuron=~new_ones), f.isel(neuron=new_ones)
    whole = f.vit.embed(2, "diffusion")
    e = known.vit.embed(2, "diffusion")
    p = e.vit.project(new)
    fig, axes = panels(1, 2, 2.4)
    axes[0, 0].scatter(*e.score.values.T, s=4, color="0.7")
    axes[0, 0].scatter(*p.score.values.T, s=4, color="C3")
    axes[0, 0].set_title("grey: embedded, red: placed", fontsize=8)
    axes[0, 1].scatter(*whole.score.values[~new_ones].T, s=4, color="0.7")
    axes[0, 1].scatter(*whole.score.values[new_ones].T, s=4, color="C3")
    axes[0, 1].set_title("all embedded together", fontsize=8)
    return fig


def local_dimension() -> plt.Figure:
    """Local dimension of neurons on a diffusion map, and its histogram."""
    _, f = factors()
    d = f.vit.local_dimension()
    e = f.vit.embed(2, "diffusion")
    fig, axes = plt.subplots(1, 2, figsize=(6.6, 2.6), layout="constrained")
    points = axes[0].scatter(*e.score.values.T, c=d.local_dimension, s=4, vmax=8)
    axes[0].set_xticks([])
    axes[0].set_yticks([])
    fig.colorbar(points, ax=axes[0], label="local dimension")
    axes[1].hist(d.local_dimension, 30, color="0.7")
    for color, name, value in (("C0", "mle", d.dimension_mle), ("C3", "TwoNN", d.dimension_twonn)):
        axes[1].axvline(float(value), color=color, label=f"{name} {float(value):.1f}")
    axes[1].set(xlabel="local dimension", ylabel="neurons")
    axes[1].legend(fontsize=7)
    return fig


def sampling() -> plt.Figure:
    """Neurons drawn of each feature map against the map's activity."""
    ds = vitxr.extract(stim(), model(), layers=2, shifts=vitxr.ShiftGrid(8))
    t = ds.vit.neuron_tensor(2, feature_maps=None, normalize=False).compute()
    s = t.vit.sample_neurons(500)
    high = t.max(("image", "shift")).groupby("feature_map").mean()
    drawn = xr.ones_like(s.response_maximum).groupby("feature_map").sum()
    drawn = drawn.reindex(feature_map=high.feature_map, fill_value=0)
    fig, ax = plt.subplots(figsize=(3.4, 2.6))
    ax.plot(high, drawn, "o", ms=4)
    ax.plot([0, float(high.max())], [0, 500 * float(high.max() / high.sum())], color="0.6", lw=1)
    ax.set(xlabel="mean of the neurons' maxima", ylabel="neurons drawn of 500")
    return fig


def spatial_order() -> plt.Figure:
    """Spatial order of each map against its shuffles, and distances of the best and worst."""
    _, f = factors()
    s = f.vit.embed(5, "diffusion").vit.spatial_order(199)
    fig, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    names = [str(n) for n in s.feature_map.values]
    axes[0].boxplot(s.shuffled_spatial_order.values.T, tick_labels=names, showfliers=False)
    axes[0].plot(range(1, len(names) + 1), s.spatial_order, "o", color="C3")
    axes[0].set(xlabel="feature map", ylabel="spatial order")
    for i in (s.spatial_order.values.argmax(), s.spatial_order.values.argmin()):
        one = s.isel(feature_map=i)
        rho, p = float(one.spatial_order), float(one.spatial_order_p)
        label = f"map {names[i]}: {rho:.2f}, p = {p:.3f}"
        axes[1].plot(one.grid_distance, one.manifold_distance, ".-", lw=0.8, label=label)
    axes[1].set(xlabel="distance on the grid (patches)", ylabel="mean distance on the manifold")
    axes[1].legend(fontsize=7)
    return fig


def cluster() -> plt.Figure:
    """Six clusters on the embedding and on the patch grid of each map."""
    _, f = factors()
    e = f.vit.embed(5, "diffusion").vit.cluster(6)
    fig, axes = panels(1, 9, 1.05)
    colors = {"cmap": "tab10", "vmin": 0, "vmax": 9}
    axes[0, 0].scatter(*e.score.values[:, :2].T, c=e.cluster, s=2, **colors)
    for ax, (name, one) in zip(axes[0, 1:], e.cluster.groupby("feature_map"), strict=True):
        where = np.full((8, 8), np.nan)
        where[one.patch_row, one.patch_col] = np.where(one >= 0, one, np.nan)
        show(ax, where, f"map {name}", **colors)
    return fig


PICTURES: dict[str, Callable[[], plt.Figure]] = {
    f.__name__: f
    for f in (
        attention_map, rollout, distance_and_entropy, mass_mask, relevance, patch_filters,
        position_similarity, embeddings, project, local_dimension, sampling, spatial_order, cluster,
    )
}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        figure = PICTURES[name]()
        figure.savefig(OUT / f"{name}.png", dpi=110, bbox_inches="tight", pad_inches=0.05)
        plt.close(figure)
        print(name)
