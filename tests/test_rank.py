"""Choosing the rank: each criterion against its definition, planted ranks found, null data flat."""

import json

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import (
    checks,
    choose_rank,
    core_consistency,
    factor_match_score,
    factorize,
    fit_ensemble,
    methods,
)
from vitxr.factor.halves import halves
from vitxr.factor.held_out import HELD_OUT
from vitxr.factor.masks import Speckle
from vitxr.factor.shuffle import shuffle
from vitxr.names import validate

DIMS = ("neuron", "image", "shift")


def planted(rank=3, shape=(60, 8, 10), noise=0.3, seed=0):
    """Nonnegative factors, and noise of a known standard deviation, clipped at 0 as by a ReLU."""
    rng = np.random.default_rng(seed)
    data = np.einsum("ir,jr,kr->ijk", *(rng.gamma(1.0, size=(n, rank)) for n in shape))
    data += noise * data.std() * rng.standard_normal(shape)
    names = np.array([f"n{i}" for i in range(shape[0])], object)
    return xr.DataArray(
        np.maximum(data, 0).astype("float32"), dims=DIMS, coords={"neuron": names, "layer": 2}
    )


@pytest.fixture(scope="module")
def tensor():
    return planted()


@pytest.fixture(scope="module")
def found(tensor):
    return choose_rank(
        tensor, [1, 2, 3, 4, 9], 2, splits=2, random_state=4, max_iter=60, progress=False
    )


@pytest.fixture(scope="module")
def whole(tensor):
    return choose_rank(tensor, **GIVEN)


def test_one_labelled_dataset(found, tensor):
    validate(found, require=["core_consistency", "split_half_score", "shuffled_split_half_score"])
    assert dict(found.sizes) == {"rank": 5, "replicate": 2, "split": 2}
    assert set(found.coords) == {"rank", "replicate", "split"}
    assert found["rank"].values.tolist() == [1, 2, 3, 4, 9]
    assert json.loads(json.dumps(found.attrs)) == found.attrs
    assert found.attrs["random_state"] == 4
    assert len({*found.split_seed.values.tolist(), found.attrs["shuffle_seed"]}) == 3
    tree = fit_ensemble(
        tensor, [1, 2, 3, 4, 9], 2, random_state=4, max_iter=60, progress=False, floors=True
    )
    for name, values in tree.to_dataset().data_vars.items():
        if name != "seconds":
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(found.seed, tree.seed)


def test_core_consistency_is_that_of_each_fit(found, tensor):
    for rank in (2, 3):
        for replicate in range(2):
            seed = int(found.seed.sel(rank=rank)[replicate])
            f = factorize(tensor, rank, random_state=seed, max_iter=60)
            expected = core_consistency(tensor, f)
            value = float(found.core_consistency.sel(rank=rank)[replicate])
            assert value == pytest.approx(expected, abs=0.05)
    assert np.isnan(found.core_consistency.sel(rank=9)).all()
    assert np.isfinite(found.core_consistency.sel(rank=[1, 2, 3, 4])).all()
    why = found.core_consistency.attrs["undefined"]
    assert why == "rank 9 exceeds the size of image (8): the core is not determined"


def test_halves_are_compared_as_defined(found, tensor):
    null = shuffle(tensor, found.attrs["shuffle_seed"])
    for t, name in ((tensor, "split_half_score"), (null, "shuffled_split_half_score")):
        best = []
        for half in halves(t, int(found.split_seed[1])):
            assert half.sizes["neuron"] == 30
            fits = [
                factorize(half, 3, random_state=int(s), max_iter=60) for s in found.seed.sel(rank=3)
            ]
            best.append(min(fits, key=lambda f: float(f.objective)))
        cosines = [
            abs(best[0][f"{d}_factor"].values.T @ best[1][f"{d}_factor"].values)
            for d in ("image", "shift")
        ]
        product = cosines[0] * cosines[1]
        orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
        expected = max(product[[0, 1, 2], list(order)].mean() for order in orders)
        assert float(found[name].sel(rank=3)[1]) == pytest.approx(expected, abs=1e-3)


def test_errors_are_those_of_a_stored_mask(found, tensor):
    for split in (0, 1):
        held = Speckle(HELD_OUT, int(found.split_seed[split])).held(tensor.shape)
        assert 0.08 < held.mean() < 0.12
        at = found.sel(rank=3).isel(replicate=1, split=split)
        kept = xr.DataArray(~held, dims=DIMS)
        f = factorize(tensor, 3, random_state=int(at.seed), max_iter=60, mask=kept)
        arrays = [f[f"{d}_factor"].values.astype(float) for d in DIMS]
        model = np.einsum("r,ir,jr,kr->ijk", f.weight.values, *arrays)
        x = tensor.values.astype(float)
        for name, chosen in (("train_error", ~held), ("test_error", held)):
            expected = np.linalg.norm((x - model)[chosen]) / np.linalg.norm(x[chosen])
            assert float(at[name]) == pytest.approx(expected, rel=1e-4)


def test_halves_are_a_division():
    t = planted(shape=(7, 3, 3))
    one, other = halves(t, seed=3)
    assert (one.sizes["neuron"], other.sizes["neuron"]) == (3, 4)
    assert sorted([*one.neuron.values, *other.neuron.values]) == sorted(t.neuron.values)
    assert set(one.neuron.values) != {t.neuron.values[i] for i in range(3)}
    assert {tuple(next(halves(t, seed)).neuron.values) for seed in range(9)} != {
        tuple(one.neuron.values)
    }


def test_curves_point_to_the_planted_rank(found):
    best = found.objective.min("replicate")
    gain = -best.diff("rank").sel(rank=[2, 3, 4])
    assert float(gain.sel(rank=3)) > 10 * float(gain.sel(rank=4))
    test = found.test_error.min("replicate").mean("split")
    assert int(test.idxmin()) == 3
    assert float(test.sel(rank=9)) > 1.02 * float(test.sel(rank=3))
    train = found.train_error.min("replicate").mean("split")
    assert (train.diff("rank") < 0).all()
    right = found.sel(rank=3)
    assert (right.similarity > 0.99).all()
    assert (right.core_consistency > 95).all()
    assert (found.core_consistency.sel(rank=4) < 80).all()
    assert float(right.split_half_score.min()) > 0.95
    assert float(right.split_half_score.min()) > float(right.shuffled_split_half_score.max()) + 0.2
    assert float(right.factor_match_score.min()) > float(right.shuffled_factor_match_score.max())
    assert float(right.objective.max()) < 0.5 * float(right.shuffled_objective.min())


def test_data_without_structure_stay_on_their_floors():
    rng = np.random.default_rng(1)
    t = xr.DataArray(rng.gamma(1.0, size=(60, 8, 10)).astype("float32"), dims=DIMS)
    null = choose_rank(t, [2, 3, 4], 2, splits=2, max_iter=60, progress=False)
    low, high = null.shuffled_objective.min("replicate"), null.shuffled_objective.max("replicate")
    assert (abs(null.objective / low - 1) < 0.02).all()
    assert (abs(null.objective / high - 1) < 0.02).all()
    score, floor = (null[f"{p}split_half_score"].mean() for p in ("", "shuffled_"))
    assert abs(float(score - floor)) < 0.15
    test = null.test_error.mean(["replicate", "split"])
    assert int(test.idxmin()) == 2  # the fewest: nothing is predicted by more
    gain = -null.objective.min("replicate").diff("rank")
    assert float(gain.max()) < 2 * float(gain.min())


def test_larger_than_memory(tensor, monkeypatch):
    eager = choose_rank(tensor, [2, 3], 1, splits=1, max_iter=5, progress=False)
    monkeypatch.setattr(checks, "IN_MEMORY_BYTES", 0)
    largest = [0]

    def seen(block):
        largest[0] = max(largest[0], block.size)
        return block

    blocks = da.from_array(tensor.values, chunks=(13, 8, 10)).map_blocks(
        seen, dtype=tensor.dtype, meta=np.empty((0, 0, 0), tensor.dtype)
    )
    lazy = choose_rank(tensor.copy(data=blocks), [2, 3], 1, splits=1, max_iter=5, progress=False)
    assert largest[0] == 13 * 8 * 10
    for name, values in eager.data_vars.items():
        if name != "seconds":
            np.testing.assert_allclose(lazy[name], values, rtol=2e-3, atol=2e-3, err_msg=name)


def test_one_bar_counts_all_fits(tensor, capsys):
    choose_rank(tensor, [1, 2], 2, splits=1, max_iter=3)
    assert "28/28" in capsys.readouterr().err


def test_a_matrix(tensor):
    found = choose_rank(tensor[..., 0], [1, 2], 2, splits=1, max_iter=9, progress=False)
    assert np.isnan(found.core_consistency).all()
    assert "has 2 dimensions, and it takes three" in found.core_consistency.attrs["undefined"]
    assert np.isfinite(found.split_half_score).all()
    assert np.isfinite(found.test_error).all()


def test_methods_without_masks_have_no_errors(tensor):
    found = choose_rank(
        tensor[:20], [1, 2], 1, 1, "non_negative_parafac", max_iter=3, progress=False
    )
    assert np.isnan(found.test_error).all()
    assert found.test_error.attrs["undefined"].startswith("non_negative_parafac takes no masks")
    assert np.isfinite(found.split_half_score).all()


@pytest.mark.parametrize(
    ("change", "given", "error", "message"),
    [
        ({}, {"splits": 0}, ArgumentError, "splits is 0; expected an integer of 1 or more"),
        ({}, {"splits": True}, ArgumentError, "splits is True"),
        ({}, {"mask": xr.DataArray(True)}, ArgumentError, "choose_rank takes no mask"),
        ({}, {"ranks": [2, 2]}, ArgumentError, "each once"),
        ({}, {"method": "tucker"}, ArgumentError, "Use one of: ncp_hals"),
        ({"neuron": slice(3)}, {}, DataError, "has 3 of neuron, .* expected 4 or more"),
        ({"neuron": slice(10), "image": 0}, {"ranks": [6]}, ArgumentError, "of half of neuron: r"),
    ],
)
def test_refused_before_anything_is_fitted(tensor, change, given, error, message, monkeypatch):
    monkeypatch.setattr("vitxr.factor.fits.fit", None)
    t = tensor.isel(change)
    with pytest.raises(error, match=message):
        choose_rank(t, **{"ranks": [1, 2], "progress": False, **given})


def test_a_dimension_named_split_is_refused(tensor):
    with pytest.raises(ArgumentError, match="named split, as the result will have"):
        choose_rank(tensor.rename(shift="split"), 2)


GIVEN = {"ranks": [1, 2], "replicates": 2, "splits": 1, "max_iter": 9, "progress": False}


def interrupt(patch, call, when=1):
    """Stop one of the calls that fit several models, at its so manieth callback."""
    real, calls = methods.hals.fit_models, []

    def fit_models(*args, **given):
        calls.append(1)
        if len(calls) == call:
            told = []

            def stop(*_):
                told.append(1)
                if len(told) == when:
                    raise KeyboardInterrupt

            given["callback"] = stop
        return real(*args, **given)

    patch.setattr(methods.hals, "fit_models", fit_models)
    return calls


@pytest.mark.parametrize(
    ("call", "left", "missing"),
    [
        (2, 24, ["shuffled_objective", "split_half_score", "test_error"]),
        (4, 20, ["split_half_score", "shuffled_split_half_score", "train_error"]),
        (7, 4, ["train_error", "test_error"]),
    ],
)
def test_interrupted_keeps_what_is_done(tensor, whole, call, left, missing, monkeypatch):
    calls = interrupt(monkeypatch, call)
    with pytest.warns(RuntimeWarning, match=rf"interrupted: {left} of 28 fits .* {missing[0]}"):
        found = choose_rank(tensor, **GIVEN)
    assert len(calls) == call
    assert found.attrs["interrupted"] == left
    validate(found)
    gone = [name for name, values in found.data_vars.items() if np.isnan(values).all()]
    assert set(missing) <= set(gone)
    for name, values in whole.data_vars.items():
        assert (found[name].attrs.get("undefined") == "it was interrupted") == (name in gone), name
        if name not in gone and name != "seconds":
            np.testing.assert_array_equal(found[name], values)


def test_interrupted_between_fits(tensor, whole, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitxr.factor.rank.core_consistencies", stop)
    with pytest.warns(RuntimeWarning, match=r"24 of 28 fits .* core_consistency, shuffled_obj"):
        found = choose_rank(tensor, **GIVEN)
    np.testing.assert_array_equal(found.objective, whole.objective)


def test_interrupted_among_the_first_fits(tensor, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            choose_rank(tensor, **GIVEN)
    given = {**GIVEN, "max_iter": 60}
    ends = fit_ensemble(tensor, [1, 2], 2, max_iter=60, progress=False).iterations
    assert len(np.unique(ends)) > 1
    interrupt(monkeypatch, 1, when=int(4 * ends.min() + 2))
    with pytest.warns(RuntimeWarning, match="fits are left out"):
        found = choose_rank(tensor, **given)
    failed = int(found.failed.sum())
    assert 0 < failed < 4
    assert found.attrs["interrupted"] == 24 + failed
    assert np.isnan(found.core_consistency).all()


def test_a_half_of_silent_neurons(tensor, capsys):
    """The only neuron that answers is in one of the halves."""
    silent = tensor.copy(data=np.where(np.arange(60)[:, None, None] == 7, tensor, 0))
    with pytest.warns(RuntimeWarning, match="NaN for 2 of 2 divisions: split 0: of one half of ne"):
        found = choose_rank(silent, [1], 2, splits=2, max_iter=9)
    for name in ("split_half_score", "shuffled_split_half_score"):
        assert np.isnan(found[name]).all()
        assert "split 1: of one half of neuron, the tensor is zero" in found[name].undefined
    for name in ("objective", "shuffled_objective", "core_consistency", "test_error"):
        assert np.isfinite(found[name]).all()
        assert "undefined" not in found[name].attrs
    assert found.attrs["interrupted"] == 0
    assert "24/24" in capsys.readouterr().err


def test_skipping_a_dimension():
    f = factorize(planted(), 2, max_iter=9)
    g = f.isel(neuron=slice(20), component=[1, 0])
    assert factor_match_score(f, g, skip="neuron") == pytest.approx(1)
    with pytest.raises(DataError, match="labels of neuron"):
        factor_match_score(f, g)
    with pytest.raises(ArgumentError, match="skip is 'frame'; the models have factors of neuron, "):
        factor_match_score(f, g, skip="frame")


def test_options_of_fits_without_a_mask_are_not_those_of_fits_with_one(tensor):
    given = {"ranks": [2], "replicates": 1, "splits": 1, "max_iter": 5, "progress": False}
    found = choose_rank(tensor, **given, compress=True)
    other = choose_rank(tensor, **given, compress=False)
    np.testing.assert_array_equal(found.test_error, other.test_error)


def test_a_split_that_leaves_nothing_of_a_neuron_has_no_errors(capsys):
    rng = np.random.default_rng(0)
    t = xr.DataArray(rng.random((200, 2)), dims=("neuron", "image"))  # of 200 neurons two
    found = choose_rank(t, [1, 2], 2, splits=2, max_iter=3)
    assert np.isnan(found.test_error).all()
    assert np.isnan(found.train_error).all()
    assert found.test_error.attrs["undefined"].startswith("split 0: one entry in ten held out lea")
    assert np.isfinite(found.split_half_score).all()
    assert "48/48" in capsys.readouterr().err
