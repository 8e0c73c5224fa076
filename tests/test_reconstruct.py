"""reconstruct and explained: against einsum, against their definitions, block by block."""

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_factor import neuron_tensor
from test_factor import reconstruct as by_xarray

import vitxr
from vitxr.errors import ArgumentError, DataError
from vitxr.factor import explained, factorize, fit_ensemble, parts, reconstruct
from vitxr.names import validate

RUN = {"max_iter": 15, "tol": 1e-4}
T = neuron_tensor()
CP = factorize(T, 3, **RUN)
TUCKER = factorize(T, [4, 2, 3], "non_negative_tucker", **RUN)
SIGNED = T - T.mean()
MATRIX = T.mean("shift")
CASES = {
    "cp": (CP, T),
    "tucker": (TUCKER, T),
    "signed": (factorize(SIGNED, 3, "parafac", **RUN), SIGNED),
    "matrix": (factorize(MATRIX, 2, **RUN), MATRIX),
}


@pytest.fixture(params=["cp", "tucker", "signed", "matrix"])
def case(request):
    return CASES[request.param]


def test_reconstruct_is_the_model_with_all_labels(case):
    f, t = case
    m = reconstruct(f)
    assert isinstance(m.data, da.Array)
    assert m.dims == t.dims
    assert m.dtype == t.dtype
    np.testing.assert_allclose(m.values, by_xarray(f, t), rtol=2e-6, atol=1e-7)
    assert set(m.coords) == set(t.coords)
    for name in t.coords:
        assert m[name].identical(t[name])
    validate(m.to_dataset())
    assert m.attrs["units"] == "1"
    assert ((m - t).compute() ** 2).sum().item() > 0  # labels align: nothing is dropped
    assert (m - t).shape == t.shape


def test_components_add_up_and_are_named_by_label():
    f = CP.isel(component=[2, 0, 1])  # labels, not positions
    one = reconstruct(f, components=2)
    expected = by_xarray(CP.isel(component=[2]), T)
    np.testing.assert_allclose(one.values, expected, rtol=2e-6)
    both = reconstruct(f, components=[0, 1])
    whole = one.values.astype(float) + both.values
    np.testing.assert_allclose(whole, reconstruct(CP).values, rtol=1e-5, atol=1e-7)


def test_an_ensemble_keeps_its_replicates():
    tree = fit_ensemble(T, [2, 3], replicates=2, progress=False, **RUN)
    child = tree["rank_3"].to_dataset()
    m = reconstruct(child)
    assert m.dims == ("replicate", *T.dims)
    assert m.indexes["replicate"].equals(child.indexes["replicate"])
    assert m.indexes["neuron"].equals(T.indexes["neuron"])
    assert "rank" not in m.coords
    for i in range(2):
        own = reconstruct(child.sel(replicate=i))
        np.testing.assert_array_equal(m.sel(replicate=i).values, own.values)
        assert own.coords["replicate"].item() == i


def test_reconstruct_is_lazy_and_its_chunks_are_small(tmp_path):
    with dask.config.set({"array.chunk-size": "400B"}):
        m = reconstruct(CP)
        assert m.data.npartitions > 8
        assert max(np.prod(m.data.blocks[i].shape) for i in np.ndindex(m.data.numblocks)) <= 50
    np.testing.assert_array_equal(m.values, reconstruct(CP).values)

    # A tensor that no machine holds: its model is there at once, and one entry can be had.
    n = 4000
    big = xr.Dataset(
        {f"{d}_factor": ((d, "component"), np.full((n, 1), 1e-3)) for d in ("a", "b", "c")}
        | {"weight": ("component", [2e9])}
    )
    assert reconstruct(big)[5, 6, 7].values == pytest.approx(2.0)

    path = tmp_path / "f.zarr"
    names = {name: CP[name].astype(object) for name in ("image", "label")}
    vitxr.save(CP.assign_coords(names), path)
    opened = vitxr.open(path)
    with dask.config.set(scheduler=refuse):
        m = reconstruct(opened)
    np.testing.assert_array_equal(m.values, reconstruct(CP).values)


def refuse(*_, **__):
    raise AssertionError("computed")


@pytest.mark.parametrize(
    ("components", "message"),
    [(7, "components=7: expected one or more of 0, 1, 2"), ([], "each once"), ([0, 0], "each once"),
     ([[0, 1]], "each once"), (True, "each once")],
)  # fmt: skip
def test_components_that_are_not_there(components, message):
    with pytest.raises(ArgumentError, match=message):
        reconstruct(CP, components)


def test_what_is_no_model_is_refused():
    with pytest.raises(ArgumentError, match="components are those of a CP model"):
        reconstruct(TUCKER, 0)
    with pytest.raises(DataError, match=r"expected the factors of a CP or Tucker.*no variables"):
        reconstruct(xr.Dataset())
    with pytest.raises(DataError, match=r"the Dataset has: neuron_factor\(neuron, component\)"):
        reconstruct(CP[["neuron_factor"]])
    with pytest.raises(ArgumentError, match="expected a Dataset of factors, not DataArray"):
        reconstruct(T)


def literal(f, t):
    """Every number of `explained` by its definition, in float64."""
    x, m = t.values.astype(float), by_xarray(f, t)
    out = {"r2": 1 - ((x - m) ** 2).sum() / (x**2).sum()}
    for k, dim in enumerate(t.dims):
        others = tuple(a for a in range(t.ndim) if a != k)
        out[f"{dim}_squares"] = (x**2).sum(others)
        out[f"{dim}_residual_squares"] = ((x - m) ** 2).sum(others)
        out[f"{dim}_r2"] = 1 - out[f"{dim}_residual_squares"] / out[f"{dim}_squares"]
    if "weight" in f:
        for name in ("alone", "drop"):
            out[f"component_{name}"] = []
        for r in range(f.sizes["component"]):
            one = by_xarray(f.isel(component=[r]), t)
            r2 = 1 - ((x - one) ** 2).sum() / (x**2).sum()
            without = 1 - ((x - (m - one)) ** 2).sum() / (x**2).sum()
            out["component_alone"].append(r2)
            out["component_drop"].append(out["r2"] - without)
    return out


def test_explained_is_its_definition(case):
    f, t = case
    e = explained(f, t)
    validate(e)
    for name, value in literal(f, t).items():
        np.testing.assert_allclose(e[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
        assert e[name].dtype == float
        assert "long_name" in e[name].attrs
    assert float(e.objective) == pytest.approx(float(f.objective), rel=1e-6)
    if "weight" in f:
        assert float(e.component_share.sum()) == pytest.approx(float(e.r2), rel=1e-12)
        assert e.component_share.indexes["component"].equals(f.indexes["component"])
    else:
        assert "component_share" not in e
    assert e.neuron_r2.indexes["neuron"].equals(t.indexes["neuron"])
    whole = float((e.image_squares - e.image_residual_squares).sum() / e.image_squares.sum())
    assert whole == pytest.approx(float(e.r2), rel=1e-12)


def test_explained_by_groups_of_neurons():
    e = explained(CP, T)
    left = e.neuron_residual_squares.groupby("feature_map").sum()
    r2 = 1 - left / e.neuron_squares.groupby("feature_map").sum()
    m = reconstruct(CP).compute()
    for channel in r2.feature_map.values:
        x, y = (a.sel(feature_map=channel).values.astype(float) for a in (T, m))
        assert float(r2.sel(feature_map=channel)) == pytest.approx(
            1 - ((x - y) ** 2).sum() / (x**2).sum(), rel=1e-5
        )


def test_a_converged_models_shares_are_projections():
    """At a stationary point <X - M, M_r> = 0, so shares are <M, M_r> / |X|^2."""
    f = factorize(T.astype(float), 2, tol=0, max_iter=4000)
    e = explained(f, T.astype(float))
    m = reconstruct(f).values
    for r in range(2):
        one = reconstruct(f, r).values
        share = (m * one).sum() / (T.values.astype(float) ** 2).sum()
        assert float(e.component_share[r]) == pytest.approx(share, rel=1e-5)


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    data=st.data(),
    dtype=st.sampled_from(["uint8", "float32", "float64"]),
    block=st.sampled_from([8, 100, 10**7]),
)
def test_chunked_equals_eager(shape, data, dtype, block):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    dims = ["p", "q", "r", "s"][: len(shape)]
    x = rng.integers(1, 9, size=shape).astype(dtype)
    t = xr.DataArray(x, dims=dims)
    f = xr.Dataset(
        {f"{d}_factor": ((d, "component"), rng.random((n, 2))) for d, n in t.sizes.items()}
        | {"weight": ("component", [2.0, 1.0])}
    )
    lazy = t.chunk({d: data.draw(st.integers(1, n)) for d, n in t.sizes.items()})
    turned = lazy.transpose(*data.draw(st.permutations(dims)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BLOCK_BYTES", block)
        e = explained(f, turned)
        eager = explained(f, t)
    for name, value in literal(f, t).items():
        np.testing.assert_allclose(e[name], value, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(eager[name], value, rtol=1e-9, atol=1e-12)


def test_dask_is_read_once_and_a_chunk_at_a_time():
    reads = []

    def count(block):
        reads.append(block.shape)
        return block

    lazy = T.chunk(neuron=5, image=2)
    meta = np.empty((0, 0, 0), T.dtype)
    lazy = lazy.copy(data=lazy.data.map_blocks(count, dtype=T.dtype, meta=meta))
    reads.clear()
    explained(CP, lazy)
    assert len(reads) == lazy.data.npartitions


def test_a_label_of_zeros_has_no_r2():
    t = T.copy(deep=True)
    t[3] = 0
    e = explained(CP, t)
    assert np.isnan(e.neuron_r2[3])
    assert e.neuron_r2.isnull().sum() == 1
    assert float(e.neuron_residual_squares[3]) > 0


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (T.isel(shift=0), r"has dims \(neuron, image\), the model \(neuron, image, shift\)"),
        (
            T.isel(image=[1, 0, 2, 3, 4]),
            "differ in the labels of image: at 0 of image the model has im0, .* im1; select",
        ),
        (T.isel(image=[0], shift=[1]), "differ in the labels of image, shift"),
        (T.assign_attrs(layer=3), "factors are of layer 0, the tensor of 3"),
        (T > 0, "dtype bool; expected real numbers"),
        (T.isel(image=slice(0)), "tensor is empty"),
        (T * 0, "zero everywhere"),
        (T.where(T.image != "im2"), r"non-finite value, nan, at neuron .*, image im2, shift"),
    ],
)
def test_another_tensor_is_refused(t, message):
    with pytest.raises(DataError, match=message):
        explained(CP.assign_attrs(layer=0), t)


def test_one_model_that_has_not_failed():
    tree = fit_ensemble(T, [2], replicates=2, progress=False, **RUN)
    with pytest.raises(ArgumentError, match=r"select one, f.sel\(replicate=0\)"):
        explained(tree["rank_2"].to_dataset(), T)
    with pytest.raises(DataError, match="hold NaN or infinite values: the fit has failed"):
        explained(CP * np.nan, T)
    with pytest.raises(ArgumentError, match="expected a DataArray with labels, not ndarray"):
        explained(CP, T.values)


def test_accessors():
    assert CP.vit.reconstruct(components=[1]).identical(reconstruct(CP, [1]))
    assert CP.vit.explained(T).identical(explained(CP, T))
