"""Shuffled data: what stays, what goes, and the floors of an ensemble."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import factor_match_score, factorize, fit_ensemble, similarity
from vitxr.factor.shuffle import shuffle
from vitxr.names import validate

DIMS = ("neuron", "image", "shift")


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    dtype=st.sampled_from(["float32", "float64", "uint8"]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_every_neuron_keeps_its_values_for_every_chunking(shape, dtype, seed, data):
    rng = np.random.default_rng(1)
    t = xr.DataArray((255 * rng.random(shape)).astype(dtype), dims=list("abcd"[: len(shape)]))
    s = shuffle(t, seed)
    assert s.dtype == t.dtype
    flat, mixed = (np.sort(x.values.reshape(shape[0], -1), axis=1) for x in (t, s))
    np.testing.assert_array_equal(mixed, flat)
    xr.testing.assert_identical(shuffle(t, seed), s)
    chunks = {d: data.draw(st.integers(1, n)) for d, n in t.sizes.items()}
    lazy = shuffle(t.chunk(chunks), seed)
    assert lazy.chunks is not None
    xr.testing.assert_identical(lazy.compute(), s)


def test_neurons_are_shuffled_independently():
    t = xr.DataArray(np.tile(np.arange(400.0), (30, 1)), dims=("neuron", "image"))
    s = shuffle(t, 3).values
    r = np.corrcoef(np.vstack([s, t.values[:1]]))
    off = r[np.triu_indices(31, 1)]
    assert abs(off).max() < 5 / np.sqrt(400)  # 465 correlations of independent rows
    assert abs(off.mean()) < 5 / np.sqrt(400 * len(off))
    assert not np.array_equal(s, shuffle(t, 4).values)


def test_a_shuffled_tensor_keeps_labels_and_needs_a_second_dimension():
    t = xr.DataArray(np.ones((2, 2)), dims=("a", "b"), coords={"b": ["x", "y"]}, name="n")
    assert shuffle(t).b.values.tolist() == ["x", "y"]
    assert shuffle(t).name == "n"
    with pytest.raises(DataError, match=r"dims \(a\); shuffling"):
        shuffle(t[:, 0])


@pytest.fixture(scope="module")
def planted():
    rng = np.random.default_rng(0)
    data = np.einsum("ir,jr,kr->ijk", *(rng.gamma(1.0, size=(n, 3)) for n in (60, 10, 12)))
    return xr.DataArray(data + 0.05 * data.mean() * rng.random(data.shape), dims=DIMS)


@pytest.fixture(scope="module")
def tree(planted):
    return fit_ensemble(
        planted, [2, 3], 3, random_state=5, max_iter=200, progress=False, floors=True
    )


def test_floors_are_those_of_the_same_fits_on_shuffled_data(tree, planted):
    root = validate(tree.to_dataset(), require=["shuffled_objective", "shuffled_similarity"])
    null = shuffle(planted, root.attrs["shuffle_seed"])
    for rank in (2, 3):
        row = root.sel(rank=rank)
        fits = [factorize(null, rank, random_state=int(s), max_iter=200) for s in row.seed]
        objectives = [float(f.objective) for f in fits]
        np.testing.assert_allclose(row.shuffled_objective, objectives, rtol=1e-6)
        best = int(np.argmin(objectives))
        for i, f in enumerate(fits):
            if i == best:
                assert np.isnan(row.shuffled_similarity[i])
                assert np.isnan(row.shuffled_factor_match_score[i])
                continue
            assert float(row.shuffled_similarity[i]) == pytest.approx(
                similarity(f, fits[best]), abs=1e-4
            )
            assert float(row.shuffled_factor_match_score[i]) == pytest.approx(
                factor_match_score(f, fits[best]), abs=1e-4
            )


def test_planted_factors_are_above_the_floors(tree):
    at = tree.to_dataset().sel(rank=3)
    assert (at.similarity > 0.99).all()
    assert float(at.factor_match_score.min()) > 0.95
    assert float(at.shuffled_similarity.max()) < 0.9
    assert float(at.shuffled_factor_match_score.max()) < 0.7
    assert float(at.shuffled_objective.min()) > 3 * float(at.objective.max())


def test_floors_are_switched_by_true_or_false(planted):
    with pytest.raises(ArgumentError, match="floors is 5; expected True or False"):
        fit_ensemble(planted, 2, floors=5)


def test_floors_that_were_interrupted_are_left_out(planted, monkeypatch):
    from vitxr.factor import methods

    real = methods.hals.fit_models
    calls = []

    def second(*args, **given):
        calls.append(1)
        if len(calls) == 2:

            def stop(*_):
                raise KeyboardInterrupt

            given["callback"] = stop
        return real(*args, **given)

    monkeypatch.setattr(methods.hals, "fit_models", second)
    with pytest.warns(RuntimeWarning, match="floors .* interrupted"):
        tree = fit_ensemble(planted, 2, 2, progress=False, floors=True)
    assert "shuffled_similarity" not in tree
    assert not tree.failed.any()
