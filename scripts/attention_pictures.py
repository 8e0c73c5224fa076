"""Draw the pictures of docs/attention.md and docs/manifolds.md from the model "digits".

python scripts/attention_pictures.py [NAME ...]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import vitxr
from vitxr import analysis, plot
from vitxr.models import Backbone

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STILL = {"shift_y": 0, "shift_x": 0}
#: Place of a 3 among the stimuli.
THREE = 6


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
def activations() -> xr.Dataset:
    """Activations of the third block."""
    return vitxr.extract(stim(), model(), layers=2, shifts=vitxr.ShiftGrid(4)).compute()


@functools.cache
def factors() -> xr.Dataset:
    """Eight components of eight maps of the third block."""
    return activations().vit.neuron_tensor(2, feature_maps=8).vit.factorize(rank=8)


@functools.cache
def diffusion() -> xr.Dataset:
    """Diffusion map of the neurons, five axes, with clusters."""
    return factors().vit.embed(5, "diffusion").vit.cluster(6)


@functools.cache
def order() -> xr.Dataset:
    """Spatial order of each map."""
    return diffusion().vit.spatial_order(199)


def of_class_token() -> xr.DataArray:
    """Attention of the class token to one image in block 4."""
    return attention().vit.attention_map().isel(image=THREE, layer=4, **STILL)


def of_patch() -> Any:
    """Draw the attention of one patch."""
    m = attention().vit.attention_map((2, 4)).isel(image=THREE, layer=4, **STILL)
    return plot.attention_map(m, pixels=stim())


def fusions() -> Any:
    """Draw the rollout by each fusion of the heads."""
    each = [attention().vit.attention_rollout(fusion=n) for n in ("mean", "max", "min")]
    r = xr.concat(each, "fusion").assign_coords(fusion=["mean", "max", "min"])
    return plot.attention_rollout(r.isel(image=THREE, **STILL), pixels=stim())


def relevance() -> Any:
    """Draw the relevance for three classes of three images."""
    labels = ["3", "8", "0"]
    some = [list(stim().label.values).index(name) for name in labels]
    r = analysis.relevance(stim().isel(image=some), model(), classes=labels)
    return plot.relevance(r, pixels=stim())


def embedding(method: str, title: str, **options: Any) -> Callable[[], Any]:
    """Draw the neurons by one method, coloured by feature map."""
    return lambda: plot.embedding(factors().vit.embed(2, method, **options), title=title)


def project() -> Any:
    """Draw a quarter of the neurons placed on the map of the others."""
    new = np.random.default_rng(0).random(factors().sizes["neuron"]) < 0.25
    e = factors().isel(neuron=~new).vit.embed(2, "diffusion")
    return plot.project(e, e.vit.project(factors().isel(neuron=new)))


def sampling() -> Any:
    """Draw the neurons drawn by their activity."""
    t = activations().vit.neuron_tensor(2, feature_maps=None, normalize=False)
    return plot.sample_neurons(t.vit.sample_neurons(500))


PICTURES: dict[str, Callable[[], Any]] = {
    "attention_map": lambda: plot.attention_map(of_class_token(), pixels=stim()),
    "attention_of_patch": of_patch,
    "rollout": lambda: plot.attention_rollout(
        attention().vit.attention_rollout().isel(image=THREE), pixels=stim()
    ),
    "rollout_fusion": fusions,
    "attention_distance": lambda: plot.attention_distance(
        # uniform: the mean distance of all pairs of 8 x 8 patches of 4 px
        attention().vit.attention_distance(),
        uniform=_pairs(8, 4.0),
    ),
    "attention_entropy": lambda: plot.attention_entropy(
        attention().vit.attention_entropy(), uniform=float(np.log(65))
    ),
    "mass_mask": lambda: plot.mass_mask(of_class_token().vit.mass_mask(0.6), pixels=stim()),
    "relevance": relevance,
    "patch_filters": lambda: plot.patch_filters(analysis.patch_filters(model())),
    "position_similarity": lambda: plot.position_similarity(analysis.position_similarity(model())),
    "pca": embedding("pca", "PCA"),
    "diffusion": embedding("diffusion", "Diffusion map"),
    "isomap": embedding("isomap", "Isomap", n_neighbors=12),
    "spectral": embedding("spectral", "Spectral embedding", n_neighbors=12),
    "tsne": embedding("tsne", "t-SNE"),
    "project": project,
    "local_dimension": lambda: plot.local_dimension(factors().vit.local_dimension()),
    "embedding_by_dimension": lambda: plot.embedding(
        diffusion(), factors().vit.local_dimension().local_dimension
    ),
    "sampling": sampling,
    "spatial_order": lambda: plot.spatial_order(order()),
    "manifold_distance": lambda: plot.manifold_distance(order()),
    "cluster": lambda: plot.cluster(diffusion()),
    "embedding_by_cluster": lambda: plot.embedding(diffusion(), "cluster"),
}


def _pairs(side: int, patch: float) -> float:
    place = np.indices((side, side)).reshape(2, -1).T * patch
    return float(np.linalg.norm(place[:, None] - place[None], axis=-1).mean())


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        plot.save(PICTURES[name](), IMAGES / f"{name}.png", dpi=150)
        print(name)
