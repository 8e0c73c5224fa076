"""Embeddings, against scikit-learn and the singular value decomposition."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from vitxr.analysis import embed
from vitxr.errors import ArgumentError, DataError
from vitxr.factor import factorize
from vitxr.names import validate


def factors(n=12, rank=5, seed=0):
    rng = np.random.default_rng(seed)
    neuron = pd.MultiIndex.from_product(
        [range(n // 4), range(2), range(2)], names=["feature_map", "patch_row", "patch_col"]
    )
    f = xr.Dataset(
        {
            "neuron_factor": (("neuron", "component"), rng.random((n, rank)).astype("float32")),
            "image_factor": (("image", "component"), rng.random((6, rank))),
        },
        coords=xr.Coordinates.from_pandas_multiindex(neuron, "neuron"),
    )
    return f.assign_coords(
        component=np.arange(rank), edge_distance=("neuron", np.arange(n)), image=list("uvwxyz")
    )


def test_equals_scikit_learn():
    from sklearn.decomposition import PCA

    f = factors()
    e = validate(embed(f, 3), require=["score", "explained_variance"])
    pca = PCA(3, svd_solver="full")
    score = pca.fit_transform(f.neuron_factor.values.astype(float))
    np.testing.assert_allclose(e.score, score, atol=1e-12)
    np.testing.assert_allclose(e.explained_variance, pca.explained_variance_)
    np.testing.assert_allclose(e.explained_variance_ratio, pca.explained_variance_ratio_)
    np.testing.assert_allclose(e.component_loading, pca.components_)
    np.testing.assert_allclose(e.component_mean, pca.mean_)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 12), rank=st.integers(1, 6), seed=st.integers(0, 999), k=st.integers(1, 9))
def test_equals_the_svd(n, rank, seed, k):
    rows = np.random.default_rng(seed).random((n, rank))
    e = embed(xr.Dataset({"neuron_factor": (("neuron", "component"), rows)}), k)
    centred = rows - rows.mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    taken = min(k, n, rank)
    assert e.sizes["pc"] == taken
    assert e.pc.values.tolist() == list(range(1, taken + 1))
    np.testing.assert_allclose(e.explained_variance, s[:taken] ** 2 / (n - 1), atol=1e-12)
    alive = s[:taken] > 1e-6
    np.testing.assert_allclose(abs(e.score)[:, alive], abs(u * s)[:, :taken][:, alive], atol=1e-9)
    np.testing.assert_allclose(abs(e.component_loading)[alive], abs(vt)[:taken][alive], atol=1e-6)
    largest = np.take_along_axis(
        e.component_loading.values, abs(e.component_loading.values).argmax(1)[:, None], 1
    )
    assert (largest > 0).all()
    if k >= min(n, rank):
        back = e.score.values @ e.component_loading.values + e.component_mean.values
        np.testing.assert_allclose(back, rows, atol=1e-12)
        assert float(e.explained_variance_ratio.sum()) == pytest.approx(1)


def test_labels_are_kept():
    f = factors()
    e = embed(f)
    assert e.indexes["neuron"].equals(f.indexes["neuron"])
    np.testing.assert_array_equal(e.edge_distance, f.edge_distance)
    assert e.score.dims == ("neuron", "pc")
    assert "image" not in e.coords
    assert e.component_loading.component.values.tolist() == [0, 1, 2, 3, 4]
    assert e.score.unstack("neuron").sel(feature_map=1).shape == (5, 2, 2)
    assert json.loads(json.dumps(e.attrs)) == e.attrs


def test_other_dimensions_and_tucker():
    e = embed(factors(), 2, dim="image")
    assert e.score.dims == ("image", "pc")
    assert e.attrs["dim"] == "image"
    xr.testing.assert_allclose(e.vit.project(factors()).score, e.score)
    assert e.image.values.tolist() == list("uvwxyz")
    t = xr.DataArray(np.random.default_rng(0).random((8, 5)), dims=("neuron", "image"))
    tucker = embed(factorize(t, 3, "tucker", max_iter=5))
    assert tucker.component_loading.dims == ("pc", "neuron_component")


@pytest.mark.parametrize(
    ("f", "arguments", "error", "message"),
    [
        (factors(), {"method": "lda"}, ArgumentError, "unknown method 'lda'; there are: pca, diff"),
        (factors(), {"n_components": 0}, ArgumentError, "n_components is 0"),
        (factors(), {"n_components": True}, ArgumentError, "n_components is True"),
        (factors(), {"dim": "shift"}, DataError, "no shift_factor; it has: neuron_factor, image"),
        (xr.Dataset(), {}, DataError, "no neuron_factor; it has: no factors"),
        (
            factors().expand_dims(replicate=2),
            {},
            ArgumentError,
            r"replicate dimension.*f.sel\(replicate=0\)",
        ),
        (factors().isel(component=0), {}, DataError, r"has dims \(neuron\); expected"),
        (factors().isel(neuron=[0]), {}, DataError, "1 rows; an embedding needs two"),
        (factors() * 0, {}, DataError, "rows of neuron_factor are all the same"),
        (factors() * np.nan, {}, DataError, "NaN or infinite"),
    ],
)
def test_refused(f, arguments, error, message):
    with pytest.raises(error, match=message):
        embed(f, **arguments)


@pytest.mark.parametrize("new", ["neuron_factor", None])
def test_what_is_projected_is_a_dataset(new):
    rows = np.array([[2.0, 0.0], [0.0, 0.1], [-2.0, 0.0], [0.0, -0.1]])
    f = xr.Dataset({"neuron_factor": (("neuron", "component"), rows)})
    with pytest.raises(DataError, match=r"expected a Dataset with neuron_factor.*transform"):
        embed(f).vit.project(None if new is None else f[new])
