"""to_tensorly, from_tensorly: the same tensor, the same factors, what tlviz takes."""

import numpy as np
import pandas as pd
import pytest
import tensorly
import xarray as xr
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import non_negative_tucker, parafac
from tensorly.tucker_tensor import TuckerTensor
from test_factor import neuron_tensor

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import (
    METHODS,
    explained,
    factorize,
    fit_ensemble,
    from_tensorly,
    reconstruct,
    to_tensorly,
    transform,
)
from vitxr.names import validate

T = neuron_tensor(dtype="float64")
RUN = {"max_iter": 15, "tol": 1e-4}
FITTED = ("iterations", "seconds", "seed", "converged", "objective_history", "iteration")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip(method, dtype):
    t = T.astype(dtype)
    f = factorize(t, 3, method, **RUN)
    cp = to_tensorly(f)
    assert isinstance(cp, CPTensor if METHODS[method].form == "cp" else TuckerTensor)
    np.testing.assert_allclose(cp.to_tensor(), reconstruct(f), rtol=1e-4, atol=1e-5)
    back = from_tensorly(cp, like=t)
    validate(back)
    known = f.drop_vars([*FITTED, "compressed_iterations"], errors="ignore")
    assert set(back.variables) == set(known.variables)
    for name in known.variables:
        if known[name].dtype.kind == "f":
            # A small weight that changes sign or place would show here.
            np.testing.assert_allclose(back[name], known[name], rtol=1e-5, atol=1e-6)
            assert back[name].dtype == known[name].dtype
            assert back[name].attrs == known[name].attrs
        else:
            assert back[name].identical(known[name])
    assert to_tensorly(back).to_tensor() == pytest.approx(cp.to_tensor(), rel=1e-4, abs=1e-5)


def test_what_tensorly_finds_is_labelled():
    cp = parafac(T.values, 2, random_state=0, n_iter_max=30)
    f = from_tensorly(cp, T)
    error = tensorly.norm(T.values - cp.to_tensor()) / tensorly.norm(T.values)
    assert float(f.objective) == pytest.approx(error, rel=1e-9)
    assert f.neuron_factor.indexes["neuron"].equals(T.indexes["neuron"])
    np.testing.assert_allclose(np.linalg.norm(f.image_factor, axis=0), 1)
    assert (np.diff(f.weight) <= 0).all()
    assert f.attrs["method"] == "from_tensorly"
    with pytest.raises(ArgumentError, match="method of the model is 'from_tensorly'"):
        transform(f, T, dim="image")
    assert transform(f, T, dim="image", nonnegative=False).image_factor.shape == (5, 2)

    tucker = non_negative_tucker(T.values, [2, 3, 2], random_state=0, n_iter_max=30)
    f = from_tensorly(tucker, T)
    assert f.core.shape == (2, 3, 2)
    np.testing.assert_allclose(reconstruct(f), tucker.to_tensor(), rtol=1e-9)


def test_signs_scales_and_missing_weights():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 2)), rng.standard_normal((3, 2))
    t = xr.DataArray(a @ b.T, dims=("p", "q"))
    for weights in (None, np.array([-2.0, 7.0])):
        f = from_tensorly((weights, [a, b]), t)
        scaled = a if weights is None else a * weights
        np.testing.assert_allclose(reconstruct(f), scaled @ b.T, atol=1e-12)
        assert (f.weight > 0).all()
    assert float(from_tensorly((None, [a, b]), t).objective) < 1e-15
    torch = pytest.importorskip("torch")
    again = from_tensorly((None, [torch.tensor(a), torch.tensor(b)]), t)
    assert again.identical(from_tensorly((None, [a, b]), t))


def test_labelled_is_what_tlviz_takes():
    """tlviz asks for a pair (weights, factors), every factor a DataFrame with the dim's index."""
    f = factorize(T, 3, **RUN)
    weights, factors = to_tensorly(f, labelled=True)
    np.testing.assert_array_equal(weights, f.weight)
    for dim, frame in zip(T.dims, factors, strict=True):
        assert isinstance(frame, pd.DataFrame)
        assert frame.index.equals(T.indexes[dim])
        assert frame.index.names == T.indexes[dim].names
        assert frame.columns.tolist() == [0, 1, 2]
        np.testing.assert_array_equal(frame, f[f"{dim}_factor"])
    assert from_tensorly((weights, factors), T).identical(from_tensorly(to_tensorly(f), T))
    bare = to_tensorly(f.drop_vars(["image", "component"]), labelled=True)
    assert bare.factors[1].index.equals(pd.RangeIndex(5))
    # Its percentage_variation(method="data") by the formula of its documentation.
    ones = [tensorly.norm(to_tensorly(f.isel(component=[r])).to_tensor()) ** 2 for r in range(3)]
    total = explained(f, T).image_squares.sum()
    np.testing.assert_allclose(f.weight**2 / total, ones / tensorly.norm(T.values) ** 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "expected a CPTensor, a TuckerTensor, or a pair .*, not int"),
        ((None, []), "not tuple"),
        ((None, [["a"]]), "not tuple"),
        ((None, [np.ones((12, 2)), np.ones((5, 2))]), r"expected factors .* 12 neuron, 5 image, 6"),
        ((None, [np.ones((12, 2)), np.ones((6, 2)), np.ones((5, 2))]), "in this order"),
        ((np.ones(3), [np.ones((n, 2)) for n in (12, 5, 6)]), r"weights or a core of \(3,\)"),
        ((np.ones((2, 2)), [np.ones((n, 2)) for n in (12, 5, 6)]), r"core of \(2, 2\)"),
    ],
)
def test_other_things_are_refused(model, message):
    with pytest.raises(ArgumentError, match=message):
        from_tensorly(model, T)


def test_labels_values_and_replicates_are_checked():
    cp = to_tensorly(factorize(T, 2, **RUN), labelled=True)
    with pytest.raises(DataError, match="other labels than image of the tensor"):
        from_tensorly(cp, T.isel(image=[1, 0, 2, 3, 4]))
    cp.weights[0] = np.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        from_tensorly(cp, T)
    child = fit_ensemble(T, [2], replicates=2, progress=False, **RUN)["rank_2"].to_dataset()
    with pytest.raises(ArgumentError, match="have a replicate dimension"):
        to_tensorly(child)


def test_accessor():
    f = factorize(T, 2, **RUN)
    np.testing.assert_array_equal(f.vit.to_tensorly().to_tensor(), to_tensorly(f).to_tensor())
    assert isinstance(f.vit.to_tensorly(labelled=True).factors[0], pd.DataFrame)
