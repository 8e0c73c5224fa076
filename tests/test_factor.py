"""factorize: one labelled form for every method, objectives recomputed, refusals."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import METHODS, blocks, checks, factorize, hals, methods
from vitxr.names import validate

RUN = {"max_iter": 30, "tol": 1e-4}


def neuron_tensor(maps=3, side=2, images=5, rank=3, noise=0.1, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    neuron = pd.MultiIndex.from_product(
        [[7, 40, 99][:maps], range(side), range(side)],
        names=["feature_map", "patch_row", "patch_col"],
    )
    shift = pd.MultiIndex.from_product([range(2), range(3)], names=["shift_y", "shift_x"])
    shape = (len(neuron), images, len(shift))
    data = np.einsum("ir,jr,kr->ijk", *(rng.gamma(0.6, size=(n, rank)) for n in shape))
    data = (data + noise * rng.random(shape)).astype(dtype)
    coords = xr.Coordinates.from_pandas_multiindex(neuron, "neuron")
    coords = coords.merge(xr.Coordinates.from_pandas_multiindex(shift, "shift"))
    t = xr.DataArray(
        data, dims=("neuron", "image", "shift"), coords=coords.coords, name="activation"
    )
    return t.assign_coords(
        image=[f"im{i}" for i in range(images)],
        label=("image", list("aabbc")[:images]),
        offset_y=("shift", np.repeat([0, 11], 3)),
        edge_distance=("neuron", np.zeros(len(neuron), int)),
        layer=0,
    )


def reconstruct(f, t):
    """The model as a labelled array, by xarray alone."""
    dims = [str(d) for d in t.dims]
    head, *factors = (
        xr.DataArray(f[name].values.astype(float), dims=f[name].dims)
        for name in ("core" if "core" in f else "weight", *(f"{d}_factor" for d in dims))
    )
    return xr.dot(head, *factors, dim=list(head.dims)).transpose(*dims).values


@pytest.mark.parametrize("method", METHODS)
def test_one_form_for_every_method(method):
    t = neuron_tensor()
    f = factorize(t, 3, method=method, random_state=5, **RUN)
    assert (
        factorize(t, 3, method=method, random_state=5, **RUN)
        .drop_vars("seconds")
        .identical(f.drop_vars("seconds"))
    )
    validate(f, require=["objective", "objective_history", "converged", "iterations", "seed"])
    residual = np.linalg.norm(t.values - reconstruct(f, t)) / np.linalg.norm(t.values.astype(float))
    assert float(f.objective) == pytest.approx(residual, rel=1e-5)
    assert float(f.objective) < 0.45
    for dim in t.dims:
        factor = f[f"{dim}_factor"]
        assert factor.dtype == t.dtype
        assert factor.attrs["units"] == "1"
        np.testing.assert_allclose(np.linalg.norm(factor, axis=0), 1, rtol=1e-5)
        assert factor.indexes[dim].equals(t.indexes[dim])
        if METHODS[method].nonnegative:
            assert (factor >= 0).all()
    for name in ("feature_map", "label", "offset_y", "edge_distance", "layer"):
        xr.testing.assert_identical(
            f[name].drop_vars(f[name].coords), t[name].drop_vars(t[name].coords)
        )
    if METHODS[method].form == "cp":
        assert (f.weight >= 0).all()
        assert (np.diff(f.weight) <= 0).all()
        assert f.neuron_factor.dims == ("neuron", "component")
    else:
        assert f.core.dims == ("neuron_component", "image_component", "shift_component")
        for mode in range(3):
            slices = np.moveaxis(f.core.values, mode, 0).reshape(3, -1)
            assert (np.diff(np.linalg.norm(slices, axis=1)) <= 1e-9).all()
    assert f.sizes["iteration"] == int(f.iterations) <= 30
    assert f.objective_history.values[-1] == pytest.approx(float(f.objective), rel=2e-3)
    assert int(f.seed) == 5
    assert json.loads(json.dumps(f.attrs)) == f.attrs
    assert set(json.loads(f.attrs["versions"])) == {"vitxr", "numpy", "tensorly"}


def test_ours_is_the_kernel():
    t = neuron_tensor(dtype="float64")
    fit = hals.ncp_hals(t.values, 3, seed=9, tol=1e-5)
    f = factorize(t, 3, random_state=9)
    np.testing.assert_array_equal(f.objective_history, fit.history)
    weight = np.prod([np.linalg.norm(a, axis=0) for a in fit.factors], axis=0)
    np.testing.assert_allclose(f.weight, np.sort(weight)[::-1])
    assert bool(f.converged) is fit.converged is True
    assert float(f.objective) == pytest.approx(fit.history[-1], abs=1e-12)


def test_tensorly_is_tensorly():
    from tensorly.decomposition import parafac

    t = neuron_tensor(dtype="float64")
    start = hals.random_start(t.shape, 2, np.linalg.norm(t.values), 1)
    (_, factors), errors = parafac(
        t.values, 2, init=(None, start), tol=1e-6, n_iter_max=50, return_errors=True
    )
    f = factorize(t, 2, "parafac", random_state=1, tol=1e-6, max_iter=50)
    np.testing.assert_allclose(f.objective_history, errors)
    theirs = factors[1] / np.linalg.norm(factors[1], axis=0)
    cosines = abs(f.image_factor.values.T @ theirs)
    np.testing.assert_allclose(cosines.max(axis=0), 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_and_the_limit_on_iterations(method):
    t = neuron_tensor().mean("shift")
    f = factorize(t, 2, method=method, max_iter=2, tol=1e-12)
    assert set(f.dims) >= {"neuron", "image"}
    assert "shift_factor" not in f
    assert int(f.iterations) == 2
    assert not bool(f.converged)
    residual = np.linalg.norm(t.values - reconstruct(f, t)) / np.linalg.norm(t.values.astype(float))
    assert float(f.objective) == pytest.approx(residual, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(2, 6), min_size=2, max_size=4),
    rank=st.integers(1, 2),
    dtype=st.sampled_from(["uint8", "int16", "int64", "float16", "float32", "float64", ">f4"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_dims_and_real_dtypes(shape, rank, dtype, seed):
    rng = np.random.default_rng(seed)
    dims = ["p", "q", "r", "s"][: len(shape)]
    t = xr.DataArray(rng.integers(1, 9, size=shape).astype(dtype), dims=dims)
    f = factorize(t, rank, random_state=seed, max_iter=5)
    expected = "float64" if dtype in ("int64", "float64") else "float32"
    for dim, n in zip(dims, shape, strict=True):
        assert f[f"{dim}_factor"].shape == (n, rank)
        assert f[f"{dim}_factor"].dtype == expected
    values = t.values.astype(float)
    residual = np.linalg.norm(values - reconstruct(f, t)) / np.linalg.norm(values)
    assert float(f.objective) == pytest.approx(residual, rel=1e-5)


def test_the_notebooks_matrix_with_a_third_mode_of_one():
    t = neuron_tensor().mean("shift").expand_dims(frame=1, axis=2)
    f = factorize(t, 2, max_iter=20)
    np.testing.assert_allclose(f.frame_factor, 1, rtol=1e-6)


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("chunks", [{"neuron": 5}, {"image": 2, "shift": 4}])
def test_dask_equals_numpy(monkeypatch, limit, chunks):
    monkeypatch.setattr(checks, "IN_MEMORY_BYTES", limit)
    t = neuron_tensor(dtype="float64")
    reads = []

    def count(block):
        reads.append(block.shape)
        return block

    lazy = t.chunk(chunks)
    lazy = lazy.copy(data=lazy.data.map_blocks(count, dtype=t.dtype, meta=np.empty((0, 0, 0))))
    reads.clear()
    a, b = factorize(lazy, 2, max_iter=4, tol=0), factorize(t, 2, max_iter=4, tol=0)
    drop = ["seconds"]
    xr.testing.assert_allclose(a.drop_vars(drop), b.drop_vars(drop), rtol=1e-9)
    once = int(np.prod([len(c) for c in lazy.chunks]))
    passes = 1 if limit else 1 + int(a.iterations) + 1  # the checks, the iterations, the residual
    if not limit and "neuron" not in chunks:
        passes += 1  # one before the first iteration, of which neurons have the first update
    assert len(reads) == passes * once


def test_signs_are_absorbed():
    rng = np.random.default_rng(3)
    t = xr.DataArray(rng.standard_normal((8, 6, 5)), dims=("a", "b", "c"))
    f = factorize(t, 3, "parafac", max_iter=40)
    assert (f.weight >= 0).all()
    for dim in ("b", "c"):
        factor = f[f"{dim}_factor"].values
        largest = factor[abs(factor).argmax(axis=0), np.arange(3)]
        assert (largest > 0).all()
    residual = np.linalg.norm(t.values - reconstruct(f, t)) / np.linalg.norm(t.values)
    assert float(f.objective) == pytest.approx(residual, rel=1e-9)


def test_dead_components_have_no_weight():
    data = np.zeros((4, 4))
    data[0, 0] = 2.0
    f = factorize(xr.DataArray(data, dims=("a", "b")), 3, tol=1e-9, max_iter=200)
    assert np.isfinite(f.to_dataarray().values.astype(float)).all()
    assert float(f.objective) < 1e-6
    assert float(f.weight.sum()) == pytest.approx(2.0, rel=1e-6)


def test_tucker_rank_per_dimension_and_options():
    t = neuron_tensor()
    f = factorize(t, [4, 2, 3], "tucker", init="svd", **RUN)
    assert f.core.shape == (4, 2, 3)
    assert f.attrs["rank"] == [4, 2, 3]
    assert json.loads(f.attrs["options"]) == {"init": "svd"}
    exact = factorize(t, t.shape, "tucker", **RUN)
    assert float(exact.objective) < 1e-5
    tight = factorize(t, 3, "constrained_parafac", l2_square_reg=0.01, **RUN)
    assert json.loads(tight.attrs["options"]) == {"l2_square_reg": 0.01}
    with pytest.raises(DataError, match=r"constrained_parafac met a singular system at rank 3"):
        factorize(t, 3, "constrained_parafac", l2_reg=0.5, **RUN)
    more = factorize(t, 2, "randomised_parafac", n_samples=60, **RUN)
    assert json.loads(more.attrs["options"]) == {"n_samples": 60}


def test_the_backend_is_numpy_and_restored():
    pytest.importorskip("torch")
    import tensorly

    t = neuron_tensor()
    expected = factorize(t, 2, "non_negative_parafac", **RUN)
    with tensorly.backend_context("pytorch"):
        f = factorize(t, 2, "non_negative_parafac", **RUN)
        assert tensorly.get_backend() == "pytorch"
    assert tensorly.get_backend() == "numpy"
    np.testing.assert_array_equal(f.weight, expected.weight)


def test_progress_shows_iterations(capsys, monkeypatch):
    monkeypatch.setattr(methods, "SHOWN_AFTER", 0)
    factorize(neuron_tensor(), 2, max_iter=5, tol=0)
    shown = capsys.readouterr().err
    assert "ncp_hals rank 2" in shown
    assert "objective=0." in shown
    factorize(neuron_tensor(), 2, max_iter=5, tol=0, progress=False)
    assert capsys.readouterr().err == ""


def test_importing_the_room_is_light():
    heavy = ("torch", "tensorly", "sklearn", "matplotlib", "panel", "holoviews", "tqdm")
    code = "import sys, vitxr.factor, vitxr.analysis; print([m for m in {!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code.format(heavy)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


T = neuron_tensor()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ncp_hal"}, r"unknown method 'ncp_hal'; did you mean 'ncp_hals'"),
        ({"method": "nmf"}, r"unknown method 'nmf'; did you mean 'ncp_hals'\? There are: ncp_hals"),
        ({"method": "CP"}, r"unknown method 'CP'; did you mean 'parafac' or 'ncp_hals'\?"),
        ({"method": "NCP_HALS"}, r"did you mean 'ncp_hals'"),
        ({"method": "hals"}, r"There are: ncp_hals, parafac"),
        ({"method": ["parafac"]}, "unknown method"),
        ({"rank": 0}, "rank is 0; ncp_hals expects one integer"),
        ({"rank": True}, "rank is True"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": "2"}, "rank is '2'"),
        ({"rank": [2]}, r"rank is \[2\]; ncp_hals expects one integer"),
        ({"rank": 31}, r"exceeds 30, the product of all dimensions of 12 neuron x 5 image x 6"),
        ({"rank": 6, "method": "tucker"}, r"rank 6 exceeds the size of image, 5"),
        ({"rank": [2, 2], "method": "tucker"}, r"has 2 numbers; the tensor has 3 dims"),
        ({"rank": [2, 2, 0], "method": "tucker"}, "integers of 1 or more, or one"),
        ({"random_state": None}, "random_state is None; expected an integer"),
        ({"random_state": -1}, "from 0 to"),
        ({"random_state": 2**32}, "from 0 to"),
        ({"random_state": True}, "random_state is True"),
        ({"tol": -1e-5}, "tol is -1e-05; expected a finite number, 0 or more"),
        ({"tol": np.nan}, "tol is nan"),
        ({"tol": "1e-5"}, "tol is '1e-5'"),
        ({"tol": 0, "method": "parafac"}, "more than 0"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"max_iter": 2.5}, "max_iter is 2.5"),
        ({"init": "svd"}, "ncp_hals has no option init"),
        ({"compress": "yes"}, "compress is 'yes'; expected True, False, or None"),
        ({"method": "parafac", "inti": "svd"}, "parafac has no option inti; it has: init"),
        ({"method": "parafac", "n_iter_max": 3}, "give max_iter"),
        ({"method": "parafac", "mask": 1}, "objective is that of the full tensor"),
    ],
)
def test_arguments_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        factorize(T, **{"rank": 2, **arguments})


def bad(value, at=(9, 1, 4)):
    t = T.copy(deep=True)
    t[at] = value
    return t


WHERE = (
    r"neuron \(feature_map 99, patch_row 0, patch_col 1\), image im1, "
    r"shift \(shift_y 1, shift_x 1\)"
)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.5, r"negative value, -0.5, at " + WHERE + ".*rectify"),
        (np.nan, "non-finite value, nan, at " + WHERE),
        (np.inf, "non-finite value, inf, at " + WHERE),
    ],
)
def test_bad_values_are_named_by_their_labels(value, message, lazy, monkeypatch):
    monkeypatch.setattr(checks, "IN_MEMORY_BYTES", 0)
    t = bad(value)
    with pytest.raises(DataError, match=message):
        factorize(t.chunk(neuron=5) if lazy else t, 2)


def test_bad_values_are_named_where_another_dimension_is_walked_over(monkeypatch):
    monkeypatch.setattr(checks, "IN_MEMORY_BYTES", 0)
    with pytest.raises(DataError, match="negative value, -0.5, at " + WHERE):
        factorize(bad(-0.5).chunk(image=2, shift=4), 2)


def test_chunks_that_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(checks, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(blocks, "MEMORY_BYTES", T.nbytes)
    with pytest.raises(DataError, match=r"one of neuron, .*rechunk it, t.chunk\(neuron=1\)"):
        factorize(T.chunk(), 2)
    factorize(T.chunk(neuron=2), 2, max_iter=2)


def test_negative_values_are_for_unconstrained_methods():
    t = bad(-0.5)
    assert float(factorize(t, 2, "parafac", **RUN).objective) < 0.6
    assert float(factorize(t, 2, "constrained_parafac", l2_reg=0.1, **RUN).objective) < 0.9
    with pytest.raises(DataError, match="constrained_parafac cannot fit it"):
        factorize(t, 2, "constrained_parafac")
    with pytest.raises(DataError, match="non_negative_tucker cannot fit it"):
        factorize(t, 2, "non_negative_tucker")


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (T.values, ArgumentError, "expected a DataArray with labels, not ndarray"),
        (T.isel(image=0, shift=0), DataError, r"has dims \(neuron\); a factorization needs two"),
        (T.astype(str), DataError, "dtype <U.*expected real numbers"),
        (T > 0, DataError, "dtype bool"),
        (T + 1j, DataError, "dtype complex"),
        (T.isel(image=slice(0)), DataError, "is empty .*image: 0"),
        (T * 0, DataError, "zero everywhere"),
        (T.rename(image="component"), ArgumentError, "named component.*rename"),
        (T.assign_coords(weight=1), ArgumentError, "named weight"),
        (xr.DataArray(np.ones((3, 2)), dims=("a", 0)), ArgumentError, r"dims \('a', 0\); expected"),
        (T * np.float32(1e-12), DataError, "root mean square of the tensor is .*float32 fits"),
        (T.astype(float) * 1e200, DataError, "root mean square of the tensor is inf"),
    ],
)
def test_tensors_refused(t, error, message):
    with pytest.raises(error, match=message):
        factorize(t, 2)


def test_labels_are_checked_before_a_lazy_tensor_is_read():
    def never(block):
        raise AssertionError("read")

    lazy = T.chunk()
    lazy = lazy.copy(data=lazy.data.map_blocks(never, dtype=T.dtype, meta=np.empty((0, 0, 0))))
    with pytest.raises(ArgumentError, match="exceeds 30"):
        factorize(lazy, 1000)
    with pytest.raises(AssertionError, match="read"):
        factorize(lazy, 2)


def test_written_and_read_back(tmp_path):
    import cf_xarray

    f = factorize(T, 3)
    flat = f
    for dim in ("neuron", "shift"):
        flat = cf_xarray.encode_multi_index_as_compress(flat, dim)
    flat.to_netcdf(tmp_path / "f.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "f.nc", engine="scipy") as back:
        back = back.load()
    back = cf_xarray.decode_compress_to_multi_index(back, ("neuron", "shift"))
    np.testing.assert_array_equal(back.neuron_factor, f.neuron_factor)
    np.testing.assert_array_equal(back.edge_distance, f.edge_distance)
    assert back.indexes["shift"].equals(f.indexes["shift"])
    assert back.indexes["neuron"].equals(f.indexes["neuron"])
    assert back.attrs["method"] == "ncp_hals"
    assert json.loads(back.attrs["versions"]) == json.loads(f.attrs["versions"])


def test_constraints_of_some_modes():
    """A dict of tensorly's: those modes are nonnegative, and stay so when signs are settled."""
    t = neuron_tensor(noise=0.3)
    t = t - 0.7 * t.mean()
    f = factorize(t, 3, "constrained_parafac", non_negative={0: True, 2: True}, **RUN)
    assert (f.neuron_factor >= 0).all()
    assert (f.shift_factor >= 0).all()
    assert (f.image_factor < 0).any()
    left = np.linalg.norm(t - f.vit.reconstruct()) / np.linalg.norm(t)
    assert float(f.objective) == pytest.approx(float(left), rel=1e-4)
    assert (f.vit.transform(t, "neuron").neuron_factor >= 0).all()
    assert (f.vit.transform(t, "image").image_factor < 0).any()
    free = factorize(t, 2, "constrained_parafac", non_negative=False, **RUN)
    assert (free.vit.transform(t, "image").image_factor < 0).any()
    with pytest.raises(DataError, match="constrained_parafac cannot fit it"):
        factorize(t, 2, "constrained_parafac", non_negative={0: True, 1: True, 2: True})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"neuron": True},
            r"modes it is for by their number, each True, .*=\{0: True\}: 0 is neuron",
        ),
        ({3: True}, "non_negative is {3: True}; expected the modes"),
        ({np.int64(0): True}, "by their number"),
        ({0: True, 1: False}, "each True"),
        ([True, False, True], "of a list tensorly takes all"),
    ],
)
def test_constraints_of_modes_that_are_not_there(given, message):
    with pytest.raises(ArgumentError, match=message):
        factorize(neuron_tensor(), 2, "constrained_parafac", non_negative=given)
