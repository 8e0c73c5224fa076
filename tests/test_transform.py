"""transform: exact minima, checked by their conditions and by scipy row by row."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from test_factor import neuron_tensor

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import explained, factorize, fit_ensemble, parts, reconstruct, transform
from vitxr.factor.kernels import hals_update
from vitxr.factor.transform import least_squares
from vitxr.names import validate

ALL = neuron_tensor(dtype="float64", noise=0.3)
SOURCE = {"model": "tiny", "model_fingerprint": "ab", "preprocess": "raw", "layer": 0}
ALL.attrs = SOURCE
TRAIN, NEW = ALL.isel(image=[0, 1, 2]), ALL.isel(image=[3, 4])
RUN = {"max_iter": 15, "tol": 1e-4}
F = factorize(TRAIN, 3, **RUN)


def design(f, dim, t):
    """Columns of the literal regression: the model without one factor, unfolded."""
    others = [d for d in t.dims if d != dim]
    if "core" in f:
        z = f["core"].values
        for d in others:
            axis = list(f["core"].dims).index(f"{d}_component")
            z = np.moveaxis(np.tensordot(z, f[f"{d}_factor"].values, (axis, 1)), -1, axis)
        z = np.moveaxis(z, list(t.dims).index(dim), 0)
        return z.reshape(len(z), -1).T
    columns = []
    for r in range(f.sizes["component"]):
        column = np.array(float(f.weight[r]))
        for d in others:
            column = np.multiply.outer(column, f[f"{d}_factor"].values[:, r].astype(float))
        columns.append(column.ravel())
    return np.stack(columns, axis=1)


def unfolded(t, dim):
    return np.moveaxis(t.values, t.dims.index(dim), 0).reshape(t.sizes[dim], -1).astype(float)


@pytest.mark.parametrize(
    ("dim", "train", "new"),
    [
        ("image", {"image": [0, 1, 2]}, {"image": [3, 4]}),
        ("neuron", {"neuron": range(7)}, {"neuron": range(7, 12)}),
        ("shift", {"shift": range(4)}, {"shift": [4, 5]}),
    ],
)
@pytest.mark.parametrize("method", ["ncp_hals", "parafac", "non_negative_tucker", "tucker"])
def test_every_row_is_the_exact_minimum(dim, train, new, method):
    rank = 2 if "tucker" in method else 3
    f = factorize(ALL.isel(train), rank, method, **RUN)
    t = ALL.isel(new)
    g = transform(f, t)
    z = design(f, dim, t)
    for row, x in zip(g[f"{dim}_factor"].values, unfolded(t, dim), strict=True):
        if method in ("ncp_hals", "non_negative_tucker"):
            np.testing.assert_allclose(row, nnls(z, x)[0], rtol=1e-7, atol=1e-9)
        else:
            np.testing.assert_allclose(row, np.linalg.lstsq(z, x)[0], rtol=1e-7, atol=1e-9)
    validate(g)
    assert g.attrs["transformed"] == dim
    assert g[f"{dim}_factor"].indexes[dim].equals(t.indexes[dim])
    for name in ("label", "edge_distance", "offset_y"):
        assert g[name].drop_vars(g[name].coords).identical(t[name].drop_vars(t[name].coords))
    for name in ("weight", "core", *(f"{d}_factor" for d in t.dims if d != dim)):
        if name in f:
            assert g[name].identical(f[name].drop_vars(set(f[name].coords) - set(g[name].coords)))
    assert "objective" not in g
    m = reconstruct(g)
    assert m.dims == t.dims
    left = np.linalg.norm(t.values - m.values) / np.linalg.norm(t.values)
    assert float(explained(g, t).objective) == pytest.approx(left, rel=1e-9)
    assert left < 1  # never worse than zeros


def test_a_converged_fit_is_reproduced():
    f = factorize(ALL, 2, tol=0, max_iter=3000)
    for dim in ALL.dims:
        g = transform(f, ALL, dim=dim)
        np.testing.assert_allclose(g[f"{dim}_factor"], f[f"{dim}_factor"], atol=1e-6)


def test_planted_loadings_are_found():
    rng = np.random.default_rng(0)
    loads = np.where(rng.random((6, 3)) < 0.4, 0, rng.random((6, 3)))
    coords = {"image": [f"new{i}" for i in range(6)]}
    planted = xr.DataArray(loads, dims=("image", "component"), coords=coords)
    other = F.drop_dims("image")
    t = xr.dot(other.neuron_factor, planted, other.shift_factor, other.weight, dim="component")
    g = transform(F, t)
    np.testing.assert_allclose(g.image_factor, planted, atol=1e-10)
    assert float(explained(g, t).r2) == pytest.approx(1)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6), st.integers(0, 9))
def test_kkt_conditions(rank, rows, seed, spread):
    rng = np.random.default_rng(seed)
    z = rng.random((9, rank)) * 10.0 ** rng.uniform(-spread, spread, rank)
    h = rng.standard_normal((rows, 9)) @ z
    g = z.T @ z
    a = least_squares(g, h, nonnegative=True)
    size = np.sqrt(np.diagonal(g))
    gradient = (a @ g - h) / size  # in the units of unit columns
    scale = 1e-8 * (1 + abs(h / size).max())
    assert (a >= 0).all()
    assert (gradient >= -scale).all()
    assert (abs(gradient[a > 0]) <= scale).all()
    free = least_squares(g, h, nonnegative=False)
    assert (abs((free @ g - h) / size) <= scale).all()


def test_hals_from_there_does_not_move():
    rng = np.random.default_rng(3)
    z = rng.random((30, 5))
    h = (rng.random((40, 30)) - 0.2) @ z
    a = least_squares(z.T @ z, h, nonnegative=True)
    assert (a == 0).any()
    moved = np.ascontiguousarray(a.T)
    hals_update(moved, np.ascontiguousarray(h.T), z.T @ z, floor=1e-12)
    np.testing.assert_allclose(moved.T, a, atol=1e-9)


def test_dead_and_equal_components():
    f = F.copy(deep=True)
    f["weight"][2] = 0
    g = transform(f, NEW)
    assert (g.image_factor[:, 2] == 0).all()
    alone = transform(F.isel(component=[0, 1]), NEW)
    np.testing.assert_allclose(g.image_factor[:, :2], alone.image_factor, rtol=1e-9)

    twice = F.isel(component=[0, 1, 0])
    for nonnegative in (True, False):
        g = transform(twice, NEW, nonnegative=nonnegative)
        best = transform(F.isel(component=[0, 1]), NEW, nonnegative=nonnegative)
        r2 = float(explained(best, NEW).r2)
        assert float(explained(g, NEW).r2) == pytest.approx(r2, rel=1e-9)
    nothing = transform(F.assign(weight=F.weight * 0), NEW)
    assert (nothing.image_factor == 0).all()


@settings(max_examples=30)
@given(data=st.data(), block=st.sampled_from([64, 10**7]), dtype=st.sampled_from(["f4", "f8"]))
def test_chunked_equals_eager(data, block, dtype):
    t = NEW.astype(dtype)
    lazy = t.chunk({d: data.draw(st.integers(1, n)) for d, n in t.sizes.items()})
    lazy = lazy.transpose(*data.draw(st.permutations(t.dims)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BLOCK_BYTES", block)
        g = transform(F, lazy)
    xr.testing.assert_allclose(g, transform(F, t), rtol=1e-9)


def test_new_neurons_may_be_of_another_layer():
    t = ALL.isel(image=[0, 1, 2]).assign_attrs(layer=5, ranking="mean")
    with pytest.raises(DataError, match="factors are of layer 0, the tensor of 5"):
        transform(F, ALL.isel(image=[3]).assign_attrs(layer=5))
    g = transform(F, t, dim="neuron")
    assert g.attrs["layer"] == 5
    assert g.attrs["ranking"] == "mean"
    assert g.attrs["rank"] == 3


def test_whether_rows_are_nonnegative_follows_the_method():
    t = NEW - NEW.mean()
    assert (transform(F, t).image_factor >= 0).all()
    assert (transform(F, t, nonnegative=False).image_factor < 0).any()
    free = factorize(TRAIN, 2, "parafac", **RUN)
    assert (transform(free, t).image_factor < 0).any()
    assert (transform(free, t, nonnegative=True).image_factor >= 0).all()
    some = factorize(TRAIN, 2, nonnegative=["neuron", "shift"], **RUN)
    assert (transform(some, t).image_factor < 0).any()
    kept = factorize(TRAIN, 2, nonnegative=["image"], **RUN)
    assert (transform(kept, t).image_factor >= 0).all()
    constrained = factorize(TRAIN, 2, "constrained_parafac", **RUN)
    assert (transform(constrained, t).image_factor >= 0).all()
    other = factorize(TRAIN, 2, "constrained_parafac", l2_square_reg=0.01, **RUN)
    with pytest.raises(ArgumentError, match="fitted under l2_square_reg, which rows"):
        transform(other, t)
    assert transform(other, t, nonnegative=True).image_factor.shape == (2, 2)
    with pytest.raises(ArgumentError, match="method of the model is None"):
        transform(F.assign_attrs(method=None), t)


@pytest.mark.parametrize(
    ("t", "dim", "error", "message"),
    [
        (TRAIN, None, ArgumentError, "all labels of the tensor are the model's.*dim='neuron' or"),
        (NEW, "images", ArgumentError, "dim='images'; the model has neuron, image, shift"),
        (NEW, "shift", DataError, "differ in the labels of image"),
        (NEW.isel(shift=[0]), None, DataError, "differ in the labels of image, shift; one may"),
        (NEW.isel(image=0), None, DataError, r"has dims \(neuron, shift\).*expand_dims"),
        (NEW.values, None, ArgumentError, "expected a DataArray with labels, not ndarray"),
        (NEW.where(NEW.shift_x < 2), None, DataError, "non-finite value, nan, at neuron"),
    ],
)
def test_refusals(t, dim, error, message):
    with pytest.raises(error, match=message):
        transform(F, t, dim)


def test_one_model_at_a_time():
    child = fit_ensemble(TRAIN, [2], replicates=2, progress=False, **RUN)["rank_2"].to_dataset()
    with pytest.raises(ArgumentError, match="have a replicate dimension"):
        transform(child, NEW)
    g = transform(child.sel(replicate=1), NEW)
    assert g.replicate.item() == 1


def test_accessor():
    assert F.vit.transform(NEW).identical(transform(F, NEW))
