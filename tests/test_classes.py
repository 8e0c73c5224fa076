"""The classes of largest logit, against a loop and scipy's softmax."""

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax

import vitxr
from vitxr.errors import ArgumentError, DataError
from vitxr.names import validate

DIMS = ("image", "shift_y", "shift_x", "class")


def dataset(values, names=None):
    names = [f"c{i}" for i in range(values.shape[-1])] if names is None else names
    return xr.Dataset({"logits": (DIMS, values)}, coords={"class": np.array(names, dtype=object)})


@given(
    arrays(np.float32, (2, 1, 3, 5), elements=st.integers(-3, 3).map(float)),
    st.integers(1, 5),
    st.booleans(),
)
def test_against_a_loop(values, k, lazy):
    # Few values: ties in most frames. Names that occur twice.
    names = ["crane", "cat", "crane", "dog", "maillot"]
    ds = dataset(values, names)
    top = (ds.chunk({"image": 1, "class": 2}) if lazy else ds).vit.top_classes(k)
    assert dask.is_dask_collection(top["top_class"]) == lazy
    top = validate(top.compute())
    assert top["top_class"].dims == (*DIMS[:3], "place")
    assert top["place"].values.tolist() == list(range(1, k + 1))
    for frame in np.ndindex(values.shape[:3]):
        z = values[frame].tolist()
        expected = sorted(range(5), key=lambda c: (-z[c], c))[:k]
        assert top["class_number"].values[frame].tolist() == expected
        assert top["top_class"].values[frame].tolist() == [names[c] for c in expected]
        assert top["top_logit"].values[frame].tolist() == [z[c] for c in expected]
        np.testing.assert_allclose(
            top["probability"].values[frame], softmax(values[frame].astype(float))[expected],
            rtol=1e-6,
        )  # fmt: skip


def test_of_many_equal_logits_the_first_come_first():
    values = np.zeros((1, 1, 1, 300), np.float32)
    values[..., 200:] = 1
    top = dataset(values).vit.top_classes(150)
    expected = [*range(200, 300), *range(50)]
    assert top["class_number"].values.ravel().tolist() == expected


def test_large_logits_and_what_is_not_a_number():
    values = np.zeros((2, 1, 1, 3), np.float32)
    values[0] = [1e30, 1e30, -np.inf]
    values[1, ..., 2] = np.nan
    top = dataset(values).vit.top_classes(2)
    assert top["probability"].values[0, 0, 0].tolist() == [0.5, 0.5]
    assert top["class_number"].values[1, 0, 0].tolist() == [-1, -1]
    assert top["top_class"].values[1, 0, 0].tolist() == ["", ""]
    assert np.isnan(top["top_logit"].values[1]).all()
    assert np.isnan(top["probability"].values[1]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_infinite_logits(dtype):
    """Places are right; a probability that is not defined is none."""
    inf = np.inf
    rows = [[1, inf, 0], [inf, 2, inf], [-inf] * 3, [-inf, 0, 0], [-inf, inf, 0]]
    top = dataset(np.array(rows, dtype).reshape(5, 1, 1, 3)).vit.top_classes(3).squeeze()
    assert top["class_number"].values.tolist() == [
        [1, 0, 2], [0, 2, 1], [0, 1, 2], [1, 2, 0], [1, 2, 0],
    ]  # fmt: skip
    assert top["top_logit"].values[[0, 3]].tolist() == [[inf, 1, 0], [0, 0, -inf]]
    assert np.isnan(top["probability"].values[[0, 1, 2, 4]]).all()
    assert top["probability"].values[3].tolist() == [0.5, 0.5, 0]


def test_float16_logits_are_what_they_are():
    values = np.random.default_rng(0).normal(size=(1, 1, 4, 9)).astype(np.float16)
    top = dataset(values).vit.top_classes(3)
    assert top["top_logit"].dtype == np.float16
    expected = np.sort(softmax(values.astype(float), axis=-1), axis=-1)[..., ::-1][..., :3]
    np.testing.assert_allclose(top["probability"], expected, rtol=1e-6)


def test_what_cannot_be_ranked():
    ds = dataset(np.zeros((1, 1, 1, 3), np.float32))
    for k in (0, 4, 1.5, True):
        with pytest.raises(ArgumentError, match="the model has 3 classes; expected 1 to 3"):
            ds.vit.top_classes(k)
    with pytest.raises(DataError, match="no `logits`"):
        ds.rename(logits="z").vit.top_classes()
    with pytest.raises(DataError, match="expected floating-point numbers with the dimension"):
        ds.isel({"class": 0}).vit.top_classes()


def test_of_a_model():
    pytest.importorskip("torch")
    stim = vitxr.datasets.digits(per_class=1)
    ds = vitxr.extract(
        stim, vitxr.load_model("digits"), shifts=None, variables=["logits"], progress=False
    )
    top = ds.vit.top_classes(1).compute()
    best = ds["logits"].compute().idxmax("class")
    assert (top["top_class"].isel(place=0).values == best.values).all()
    assert "label" in top.coords
    assert top.attrs["model"] == "digits"
