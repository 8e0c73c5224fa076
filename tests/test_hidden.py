"""explained and transform where a mask says which entries count, against literal formulas."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from test_factor import neuron_tensor
from test_transform import design

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import explained, factorize, parts, reconstruct, transform
from vitxr.names import validate

T = neuron_tensor(dtype="float64", noise=0.3)
RUN = {"max_iter": 15, "tol": 1e-4}


def speckled(t, share=0.75, seed=5):
    return t.copy(data=np.random.default_rng(seed).random(t.shape) < share)


SEEN = speckled(T)
HOLED = T.where(SEEN)
F = factorize(HOLED, 3, mask=SEEN, **RUN)
MODELS = {
    "masked": F,
    "free": factorize(T, 3, "parafac", **RUN),
    "tucker": factorize(T, 2, "tucker", **RUN),
}


@pytest.mark.parametrize("name", MODELS)
def test_explained_by_its_formulas_over_what_is_observed(name):
    f = MODELS[name]
    e = explained(f, HOLED, mask=SEEN)
    w, x, m = SEEN.values, T.values * SEEN.values, reconstruct(f).values * SEEN.values
    whole = (x**2).sum()
    assert float(e.r2) == pytest.approx(1 - ((x - m) ** 2).sum() / whole, rel=1e-12)
    for axis, dim in enumerate(T.dims):
        others = tuple(i for i in range(3) if i != axis)
        residual, squares = ((x - m) ** 2).sum(others), (x**2).sum(others)
        np.testing.assert_allclose(e[f"{dim}_r2"], 1 - residual / squares, rtol=1e-10)
        np.testing.assert_allclose(e[f"{dim}_squares"], squares, rtol=1e-12)
    if "core" not in f:
        for r in range(3):
            one = reconstruct(f, components=r).values * w
            alone = 1 - ((x - one) ** 2).sum() / whole
            drop = float(e.r2) - (1 - ((x - m + one) ** 2).sum() / whole)
            assert float(e.component_alone[r]) == pytest.approx(alone, abs=1e-12)
            assert float(e.component_drop[r]) == pytest.approx(drop, abs=1e-12)
        assert float(e.component_share.sum()) == pytest.approx(float(e.r2), abs=1e-12)
    validate(e)


def test_the_objective_of_a_masked_fit_comes_back_and_its_complement_is_new():
    assert float(explained(F, HOLED, SEEN).objective) == pytest.approx(float(F.objective), rel=1e-9)
    held = explained(F, T, mask=~SEEN)
    x, m = T.values[~SEEN.values], reconstruct(F).values[~SEEN.values]
    left = np.linalg.norm(x - m) / np.linalg.norm(x)
    assert float(held.objective) == pytest.approx(left, rel=1e-9)
    assert F.vit.explained(T, SEEN).identical(explained(F, HOLED, SEEN))


@pytest.mark.parametrize("dim", T.dims)
@pytest.mark.parametrize("nonnegative", [True, False])
def test_rows_are_the_minimum_over_their_own_entries(dim, nonnegative):
    g = transform(F, HOLED, dim, nonnegative=nonnegative, mask=SEEN)
    z = design(F, dim, T)
    axis = T.dims.index(dim)
    each = zip(
        g[f"{dim}_factor"].values,
        np.moveaxis(T.values, axis, 0).reshape(T.sizes[dim], -1),
        np.moveaxis(SEEN.values, axis, 0).reshape(T.sizes[dim], -1),
        strict=True,
    )
    for row, x, w in each:
        best = nnls(z[w], x[w])[0] if nonnegative else np.linalg.lstsq(z[w], x[w])[0]
        np.testing.assert_allclose(row, best, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(g[f"{dim}_factor"].dims, (dim, "component"))


def test_a_mask_that_hides_nothing_changes_nothing():
    for name in ("masked", "free"):
        f, everything = MODELS[name], T.notnull()
        xr.testing.assert_allclose(explained(f, T, everything), explained(f, T), rtol=1e-10)
        for dim in T.dims:
            plain = transform(f, T, dim)
            xr.testing.assert_allclose(transform(f, T, dim, mask=everything), plain, rtol=1e-8)


def test_a_converged_masked_fit_is_reproduced():
    f = factorize(HOLED, 2, mask=SEEN, tol=0, max_iter=5000)
    g = transform(f, HOLED, "image", mask=SEEN)
    np.testing.assert_allclose(g.image_factor, f.image_factor, atol=1e-5)


@settings(max_examples=25)
@given(data=st.data(), block=st.sampled_from([64, 10**7]), lazily=st.booleans())
def test_chunked_equals_eager(data, block, lazily):
    lazy = HOLED.chunk({d: data.draw(st.integers(1, n)) for d, n in T.sizes.items()})
    lazy = lazy.transpose(*data.draw(st.permutations(T.dims)))
    seen = SEEN.chunk({d: data.draw(st.integers(1, n)) for d, n in T.sizes.items()})
    seen = seen.transpose(*data.draw(st.permutations(T.dims))) if lazily else SEEN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BLOCK_BYTES", block)
        e, g = explained(F, lazy, seen), transform(F, lazy, "image", mask=seen)
    xr.testing.assert_allclose(e, explained(F, HOLED, SEEN), rtol=1e-9)
    xr.testing.assert_allclose(g, transform(F, HOLED, "image", mask=SEEN), rtol=1e-8)


def test_masks_of_some_dimensions_and_labels_without_entries():
    seen = xr.DataArray(np.arange(6) != 2, dims="shift")
    e = explained(F, T, seen)
    assert np.isnan(e.shift_r2[2])
    assert e.shift_r2.isnull().sum() == 1
    part = T.isel(shift=[0, 1, 3, 4, 5])
    g = transform(F, T, "image", mask=seen)
    f = F.isel(shift=[0, 1, 3, 4, 5])
    np.testing.assert_allclose(g.image_factor, transform(f, part, "image").image_factor, rtol=1e-7)
    with pytest.raises(
        DataError, match=r"hides all of shift \(shift_y 0, shift_x 2\), .*drop_isel"
    ):
        transform(F, T, "shift", mask=seen)


def test_what_is_said_about_values_that_are_missing():
    for call in (explained, lambda f, t: transform(f, t, "image")):
        with pytest.raises(DataError, match=r"non-finite value, nan, .*or hide it with mask=t.not"):
            call(F, HOLED)
    with pytest.raises(DataError, match="non-finite value, nan"):
        explained(F, HOLED, mask=SEEN | True)
    with pytest.raises(ArgumentError, match="mask is a ndarray"):
        explained(F, HOLED, mask=SEEN.values)
    with pytest.raises(ArgumentError, match="a mask, and the model is a Tucker model"):
        transform(MODELS["tucker"], HOLED, "image", mask=SEEN)
    # These take no mask, and do not speak of one.
    for call in (HOLED.vit.core_consistency, lambda _: HOLED.vit.choose_rank([1])):
        with pytest.raises(DataError, match=r"non-finite value, nan, .*; drop or fill it\.$"):
            call(F)
