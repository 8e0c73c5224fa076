"""Core consistency against the Kronecker form, and what it is not defined for."""

import dataclasses
from functools import reduce

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import blocks, checks, consistency, core_consistency, factorize


def literal(t, f):
    """Bro and Kiers' definition: least squares with the Kronecker product of all factors."""
    factors = [f[f"{d}_factor"].values.astype(float) for d in t.dims]
    factors[0] = factors[0] * f.weight.values
    rank = factors[0].shape[1]
    big = reduce(np.kron, factors)
    core = (np.linalg.pinv(big, rcond=1e-13) @ t.values.astype(float).ravel()).reshape(
        (rank,) * t.ndim
    )
    ideal = np.zeros_like(core)
    ideal[(np.arange(rank),) * t.ndim] = 1
    return 100 * (1 - ((core - ideal) ** 2).sum() / rank)


def model_of(t, rank, seed, dead=False):
    rng = np.random.default_rng(seed)
    f = xr.Dataset({"weight": ("component", np.sort(rng.random(rank) + 0.1)[::-1])})
    for dim, n in t.sizes.items():
        columns = rng.standard_normal((n, rank))
        f[f"{dim}_factor"] = ((dim, "component"), columns / np.linalg.norm(columns, axis=0))
    if dead:
        f["weight"][-1] = 0
        f[f"{t.dims[1]}_factor"][:, -1] = 0
    return f


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(3, 6), min_size=3, max_size=4),
    rank=st.integers(1, 3),
    seed=st.integers(0, 999),
    dead=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
    data=st.data(),
)
def test_as_defined_for_every_chunking(shape, rank, seed, dead, dtype, data):
    rng = np.random.default_rng(seed)
    t = xr.DataArray(rng.random(shape).astype(dtype), dims=list("abcd"[: len(shape)]))
    f = model_of(t, rank, seed, dead)
    expected = literal(t, f)
    assert core_consistency(t, f) == pytest.approx(expected, rel=1e-6)
    tensor = checks.prepare(t, "ncp_hals", {})
    chunks = {d: data.draw(st.integers(1, n)) for d, n in t.sizes.items()}
    lazy = dataclasses.replace(tensor, data=t.chunk(chunks).data)
    with blocks.own_threads(2) as pool:
        found = consistency.core_consistencies(lazy, [f, f], pool)
    assert found == pytest.approx([expected] * 2, rel=1e-6)


def test_models_that_do_not_fit_into_one_pass(monkeypatch):
    t = xr.DataArray(np.random.default_rng(0).random((9, 5, 4)), dims=("a", "b", "c"))
    fits = [model_of(t, rank, rank) for rank in (1, 4, 2)]
    tensor = checks.prepare(t, "ncp_hals", {})
    monkeypatch.setattr(consistency, "PASS_BYTES", 1)
    with blocks.own_threads(1) as pool:
        found = consistency.core_consistencies(tensor, fits, pool)
    assert found == pytest.approx([literal(t, f) for f in fits])


def test_a_hundred_at_the_right_rank_and_low_beyond():
    rng = np.random.default_rng(0)
    data = np.einsum("ir,jr,kr->ijk", *(rng.gamma(1.0, size=(n, 3)) for n in (30, 8, 9)))
    noisy = data + 0.02 * data.mean() * rng.random(data.shape)
    t = xr.DataArray(noisy, dims=("neuron", "image", "shift"))
    right = core_consistency(t, factorize(t, 3, tol=1e-8, max_iter=3000))
    over = core_consistency(t, factorize(t, 5, tol=1e-8, max_iter=3000))
    assert 98 < right <= 100
    assert over < 50


def test_refused_where_it_is_not_defined():
    t = xr.DataArray(np.random.default_rng(0).random((9, 3, 5)), dims=("neuron", "image", "shift"))
    with pytest.raises(ArgumentError, match=r"rank 4 exceeds the size of image \(3\): the core is"):
        core_consistency(t, model_of(t, 4, 0))
    matrix = t[..., 0]
    with pytest.raises(DataError, match="has 2 dimensions, and it takes three"):
        core_consistency(matrix, model_of(matrix, 2, 0))
    f = model_of(t, 2, 0)
    for wrong in (t, f.neuron_factor):
        with pytest.raises(ArgumentError, match=r"the factors are a DataArray; .* t\.vit\.fact"):
            core_consistency(t, wrong)
    with pytest.raises(ArgumentError, match=r"are a DataTree; .* tree\.vit\.best\(rank\)"):
        core_consistency(t, xr.DataTree())
    with pytest.raises(ArgumentError, match="replicate dimension: select one"):
        core_consistency(t, f.expand_dims(replicate=2))
    with pytest.raises(DataError, match=r"image_factor \(image: 3, component\); the Dataset has"):
        core_consistency(t, f.drop_vars("image_factor"))
    with pytest.raises(DataError, match=r"image: 2, component"):
        core_consistency(t[:, :2], f)
    assert core_consistency(t - 0.5, f) == pytest.approx(literal(t - 0.5, f))  # may be negative


def test_a_tensor_with_other_labels_or_rolls_is_refused():
    rng = np.random.default_rng(0)
    coords = {"image": list("uvw"), "shift": range(5)}
    t = xr.DataArray(rng.random((9, 3, 5)), dims=("neuron", "image", "shift"), coords=coords)
    f = model_of(t, 2, 0).assign_coords(coords)
    with pytest.raises(DataError, match="differ in the labels of image"):
        core_consistency(t.isel(image=[1, 0, 2]), f)
    rolls = {name: (("neuron", "image"), np.ones((9, 3), int)) for name in ("roll_y", "roll_x")}
    with pytest.raises(DataError, match="responses have been rolled, and these have not"):
        core_consistency(t, f.assign(rolls))
    # The weights are in the factor of the model's first dimension, whatever the tensor's is.
    turned = core_consistency(t.transpose("shift", "neuron", "image"), f)
    assert turned == pytest.approx(literal(t, f), rel=1e-9)
