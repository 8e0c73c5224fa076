"""Ensembles: seeds, alignment against brute force, the tree and its children."""

import importlib
import itertools
import json
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from vitxr.analysis import embed
from vitxr.errors import ArgumentError, DataError
from vitxr.factor import (
    align,
    factor_match_score,
    factorize,
    fit_ensemble,
    fits,
    methods,
    similarity,
)
from vitxr.factor.interrupts import held
from vitxr.names import validate

DIMS = ("neuron", "image", "shift")


def model(seed, rank=3, shape=(9, 6, 5), signed=False):
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal if signed else rng.random
    f = xr.Dataset(coords={"component": np.arange(rank), "image": list("uvwxyz")})
    for dim, n in zip(DIMS, shape, strict=True):
        columns = draw((n, rank))
        f[f"{dim}_factor"] = ((dim, "component"), columns / np.linalg.norm(columns, axis=0))
    f["weight"] = ("component", np.sort(rng.random(rank))[::-1])
    return f


def full(f):
    arrays = [xr.DataArray(f[f"{d}_factor"].values, dims=(d, "component")) for d in DIMS]
    return xr.dot(xr.DataArray(f.weight.values, dims="component"), *arrays, dim="component").values


def brute_force(f, g):
    """Best mean over pairs of the mean over modes of |cosine|, over all one-to-one matchings."""
    a, b = (f, g) if f.sizes["component"] <= g.sizes["component"] else (g, f)
    n, m = a.sizes["component"], b.sizes["component"]
    best = 0.0
    for choice in itertools.permutations(range(m), n):
        total = 0.0
        for dim in DIMS:
            x, y = a[f"{dim}_factor"].values, b[f"{dim}_factor"].values
            for p, q in enumerate(choice):
                lengths = np.linalg.norm(x[:, p]) * np.linalg.norm(y[:, q])
                total += abs(x[:, p] @ y[:, q]) / lengths
        best = max(best, total / (n * len(DIMS)))
    return best


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999), one=st.integers(1, 4), other=st.integers(1, 4), signed=st.booleans()
)
def test_similarity_is_the_best_matching(seed, one, other, signed):
    f, g = model(seed, one, signed=signed), model(seed + 1000, other, signed=signed)
    assert similarity(f, g) == pytest.approx(brute_force(f, g))
    assert similarity(g, f) == pytest.approx(similarity(f, g))
    assert similarity(f, f) == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), order=st.permutations(range(4)), flips=st.integers(0, 255))
def test_align_undoes_permutations_and_even_sign_changes(seed, order, flips):
    f = model(seed, 4, signed=True)
    g = f.isel(component=list(order)).assign_coords(component=np.arange(4))
    signs = np.where((flips >> np.arange(8).reshape(2, 4)) & 1, -1, 1)
    g["image_factor"] = g.image_factor * xr.DataArray(signs[0], dims="component")
    g["shift_factor"] = g.shift_factor * xr.DataArray(signs[1], dims="component")
    g["neuron_factor"] = g.neuron_factor * xr.DataArray(signs.prod(axis=0), dims="component")
    np.testing.assert_allclose(full(g), full(f))
    xr.testing.assert_allclose(align(g, f), f)
    assert similarity(g, f) == pytest.approx(1)


def test_align_never_changes_the_model():
    f, g = model(1, signed=True), model(2, signed=True)
    np.testing.assert_allclose(full(align(f, g)), full(f))
    assert list(align(f, g).component.values) == [0, 1, 2]


def test_dead_components_are_left_out():
    f = model(3)
    g = f.isel(component=[2, 0, 1]).assign_coords(component=np.arange(3))
    g["image_factor"] = g.image_factor * xr.DataArray([1.0, 0.0, 1.0], dims="component")
    assert similarity(f, g) == pytest.approx(1)
    aligned = align(g, f)
    np.testing.assert_allclose(aligned.image_factor[:, 1:], f.image_factor[:, 1:])
    np.testing.assert_array_equal(aligned.image_factor[:, 0], 0)
    nothing = f.copy()
    nothing["image_factor"] = f.image_factor * 0
    assert similarity(f, nothing) == 0


@pytest.fixture(scope="module")
def tensor():
    rng = np.random.default_rng(0)
    data = np.einsum("ir,jr,kr->ijk", *(rng.gamma(0.6, size=(n, 3)) for n in (15, 6, 5)))
    data += 0.1 * rng.random(data.shape)
    return xr.DataArray(
        data.astype("float32"),
        dims=DIMS,
        coords={"image": list("uvwxyz"), "label": ("image", list("aabbcc")), "layer": 4},
    )


@pytest.fixture(scope="module")
def tree(tensor):
    return fit_ensemble(tensor, [2, 3], replicates=3, random_state=8, progress=False)


def test_root(tree):
    root = validate(tree.to_dataset(), require=["objective", "similarity", "best_replicate"])
    assert set(root.coords) == {"rank", "replicate"}
    assert root.objective.dims == ("rank", "replicate")
    assert root.objective.shape == (2, 3)
    assert root["rank"].values.tolist() == [2, 3]
    for rank in (2, 3):
        row = root.sel(rank=rank)
        best = int(row.best_replicate)
        assert float(row.objective.min()) == float(row.objective[best])
        assert float(row.similarity[best]) == 1
        assert (row.similarity <= 1).all()
    assert (root.objective.sel(rank=3).min() < root.objective.sel(rank=2).min()).item()
    assert len(set(root.seed.values.ravel().tolist())) == 6
    assert root.seed.dtype == np.int64
    assert json.loads(json.dumps(root.attrs)) == root.attrs
    assert root.attrs["random_state"] == 8


def test_children_are_factor_datasets(tree, tensor):
    for rank in (2, 3):
        child = tree[f"rank_{rank}"].to_dataset()
        validate(child, require=["neuron_factor", "weight", "objective", "objective_history"])
        assert child.neuron_factor.dims == ("replicate", "neuron", "component")
        assert child.image.values.tolist() == list("uvwxyz")
        assert child.label.dims == ("image",)
        assert int(child.layer) == 4
        best = int(tree.best_replicate.sel(rank=rank))
        reference = child.sel(replicate=best)
        assert (np.diff(reference.weight) <= 0).all()
        for replicate in range(3):
            f = child.sel(replicate=replicate)
            fit = factorize(tensor, rank, random_state=int(f.seed))
            assert float(fit.objective) == float(f.objective)
            assert float(f.similarity) == pytest.approx(similarity(fit, reference), abs=1e-6)
            xr.testing.assert_equal(
                align(fit, reference).neuron_factor.drop_vars("replicate", errors="ignore"),
                f.neuron_factor.drop_vars(["replicate", "rank"], errors="ignore"),
            )
            history = f.objective_history.values
            length = int(f.iterations)
            np.testing.assert_array_equal(history[:length], fit.objective_history)
            assert np.isnan(history[length:]).all()
            np.testing.assert_allclose(full(f), full(fit), rtol=1e-5)
            assert embed(f).score.sizes["neuron"] == 15
        assert child.attrs["rank"] == rank


def test_fits_do_not_depend_on_what_else_is_asked_for(tree, tensor):
    other = fit_ensemble(tensor, 3, replicates=2, random_state=8, progress=False)
    seeds = tree.seed.sel(rank=3, replicate=[0, 1]).values
    assert other.seed.values.ravel().tolist() == seeds.tolist()
    again = fit_ensemble(tensor, 3, replicates=2, random_state=9, progress=False)
    assert not set(again.seed.values.ravel()) & set(seeds)


def test_lists_of_ranks_keep_their_order_and_options_pass(tensor):
    tree = fit_ensemble(
        tensor, (3, 1), 1, "non_negative_parafac", max_iter=3, progress=False, init="svd"
    )
    assert list(tree.children) == ["rank_3", "rank_1"]
    assert tree["rank"].values.tolist() == [3, 1]
    assert not tree.converged.any()
    assert (tree.similarity == 1).all()


def test_a_lazy_tensor_is_read_once(tensor):
    reads = []

    def count(block):
        reads.append(1)
        return block

    lazy = tensor.chunk(neuron=5)
    lazy = lazy.copy(data=lazy.data.map_blocks(count, dtype=tensor.dtype, meta=np.empty((0, 0, 0))))
    reads.clear()
    fit_ensemble(lazy, [1, 2], replicates=2, max_iter=3, progress=False)
    assert len(reads) == 3


def test_progress_counts_fits(tensor, capsys):
    fit_ensemble(tensor, [1, 2], replicates=2, max_iter=3)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "rank=2" in shown
    assert "fit/s" in shown or "s/fit" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": []}, "expected one or more ranks"),
        ({"ranks": [2, 2]}, r"ranks is \[2, 2\]; expected .* each once"),
        ({"ranks": [2, 0]}, "rank is 0"),
        ({"ranks": [2, 31]}, "rank 31 exceeds 30"),
        ({"replicates": 0}, "replicates is 0"),
        ({"replicates": True}, "replicates is True"),
        ({"method": "tucker"}, "rotation.*Use one of: ncp_hals"),
        ({"method": "hals"}, "unknown method"),
        ({"random_state": None}, "random_state is None"),
    ],
)
def test_refused_before_anything_is_fitted(tensor, arguments, message, monkeypatch):
    monkeypatch.setattr("vitxr.factor.fits.fit", None)
    with pytest.raises(ArgumentError, match=message):
        fit_ensemble(tensor, **{"ranks": 2, "progress": False, **arguments})


def test_bad_data_are_refused(tensor):
    with pytest.raises(DataError, match="negative value"):
        fit_ensemble(tensor - 100, 2, progress=False)


def test_models_that_cannot_be_compared():
    f = model(0)
    with pytest.raises(ArgumentError, match="3 components, the reference 2"):
        align(f, model(0, rank=2))
    with pytest.raises(ArgumentError, match="replicate dimension: select one"):
        similarity(f.expand_dims(replicate=2), f)
    with pytest.raises(DataError, match="other dimensions: neuron, image, shift and neuron, image"):
        similarity(f, f.drop_vars("shift_factor"))
    with pytest.raises(DataError, match="differ in the labels of image"):
        similarity(f, f.isel(image=slice(None, None, -1)))
    with pytest.raises(DataError, match="differ in the labels of neuron"):
        similarity(f, f.isel(neuron=slice(3)))
    with pytest.raises(DataError, match="expected the factors of a CP model"):
        similarity(f[["weight"]], f)


def test_best_is_the_replicate_of_least_objective():
    t = xr.DataArray(np.random.default_rng(3).random((8, 5, 6)), dims=("neuron", "image", "shift"))
    tree = fit_ensemble(t, [2, 3], replicates=3, max_iter=5, progress=False)
    for rank in (2, 3):
        best = tree.vit.best(rank)
        assert float(best["objective"]) == float(tree["objective"].sel(rank=rank).min())
        assert best["neuron_factor"].dims == ("neuron", "component")
    with pytest.raises(ArgumentError, match=r"rank=\[2\] is not in the ensemble, which has 2, 3"):
        tree.vit.best([2])
    with pytest.raises(ArgumentError, match="rank=7 is not in the ensemble, which has 2, 3"):
        tree.vit.best(7)
    with pytest.raises(DataError, match="no `best_replicate`"):
        tree["rank_2"].vit.best(2)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999), one=st.integers(1, 4), other=st.integers(1, 4), signed=st.booleans()
)
def test_factor_match_score_is_the_best_matching(seed, one, other, signed):
    f, g = model(seed, one, signed=signed), model(seed + 1000, other, signed=signed)
    a, b = (f, g) if one <= other else (g, f)
    best = 0.0
    for choice in itertools.permutations(range(max(one, other)), min(one, other)):
        total = 0.0
        for p, q in enumerate(choice):
            w, v = float(a.weight[p]), float(b.weight[q])
            score = 1 - abs(w - v) / max(w, v)
            for dim in DIMS:
                score *= abs(a[f"{dim}_factor"].values[:, p] @ b[f"{dim}_factor"].values[:, q])
            total += score
        best = max(best, total / len(choice))
    assert factor_match_score(f, g) == pytest.approx(best)
    assert factor_match_score(f, f) == pytest.approx(1)


def test_what_has_died_matches_nothing_not_even_itself():
    """As in tlviz without weights: a column of zeros adds 0 to a mean over all components."""
    f = model(4)
    f["weight"][1] = 0
    f["image_factor"][:, 1] = 0
    assert factor_match_score(f, f) == pytest.approx(2 / 3)
    product = np.prod([f[f"{d}_factor"].values.T @ f[f"{d}_factor"].values for d in DIMS], axis=0)
    rows, columns = linear_sum_assignment(-product)
    assert factor_match_score(f, f) == pytest.approx(product[rows, columns].mean())
    assert similarity(f, f) == pytest.approx(1)


def test_replicates_are_compared_and_the_dead_counted(tree, tensor):
    for rank in (2, 3):
        row = tree.to_dataset().sel(rank=rank)
        reference = best_of(tree, rank)
        for replicate in range(3):
            f = factorize(tensor, rank, random_state=int(row.seed[replicate]))
            expected = factor_match_score(f, reference)
            assert float(row.factor_match_score[replicate]) == pytest.approx(expected, abs=1e-6)
    assert not tree.failed.any()
    for rank in (2, 3):
        weight = tree[f"rank_{rank}"].to_dataset().weight.values
        dead = tree.dead_components.sel(rank=rank).values
        assert dead.tolist() == (weight == 0).sum(axis=1).tolist()
    data = np.zeros((4, 4))
    data[0, 0] = 2.0
    dead = fit_ensemble(xr.DataArray(data, dims=("a", "b")), 3, 2, tol=1e-9, progress=False)
    assert (dead.dead_components >= 1).all()


def best_of(tree, rank):
    return tree[f"rank_{rank}"].to_dataset().sel(replicate=int(tree.best_replicate.sel(rank=rank)))


def test_interrupted_keeps_what_has_converged(tensor, monkeypatch):
    real, done = methods.hals.fit_models, []

    def interrupted(*args, **given):
        def stop(number, iteration, objective, last):
            done.extend([number] * last)
            if len(done) == 2:
                raise KeyboardInterrupt

        return real(*args, **{**given, "callback": stop})

    whole = fit_ensemble(tensor, [2, 3], replicates=2, progress=False)
    monkeypatch.setattr(methods.hals, "fit_models", interrupted)
    with pytest.warns(RuntimeWarning, match="2 of 4 fits have no model.*interrupted"):
        tree = fit_ensemble(tensor, [2, 3], replicates=2, progress=False)
    validate(tree.to_dataset(), require=["failed", "factor_match_score"])
    kept = ~tree.failed.values.ravel()
    assert np.flatnonzero(kept).tolist() == sorted(done)
    assert (np.isfinite(tree.objective.values.ravel()) == kept).all()
    np.testing.assert_allclose(
        tree.objective.values.ravel()[kept], whole.objective.values.ravel()[kept], rtol=1e-6
    )

    def at_once(*args, **given):
        def stop(*_):
            raise KeyboardInterrupt

        return real(*args, **{**given, "callback": stop})

    monkeypatch.setattr(methods.hals, "fit_models", at_once)
    with pytest.raises(KeyboardInterrupt):
        fit_ensemble(tensor, 2, replicates=2, progress=False)
    with pytest.raises(KeyboardInterrupt):
        factorize(tensor, 2)


def signalling(monkeypatch, where, number=signal.SIGINT):
    """Send this process a signal when a function of the ensemble is called."""
    module, name = where.rsplit(".", 1)
    real = getattr(importlib.import_module(module), name)

    def call(*args, **given):
        signal.raise_signal(number)
        return real(*args, **given)

    monkeypatch.setattr(where, call)


@pytest.mark.parametrize("where", ["ensemble.assemble", "fits.label", "fits._stack"])
def test_ctrl_c_after_the_fits_loses_none(tensor, tree, where, monkeypatch):
    signalling(monkeypatch, f"vitxr.factor.{where}")
    with pytest.warns(RuntimeWarning, match="when all fits were finished: the ensemble is whole"):
        again = fit_ensemble(tensor, [2, 3], replicates=3, random_state=8, progress=False)
    assert again.attrs["interrupted"] == 0
    for name in ("objective", "similarity", "best_replicate"):
        np.testing.assert_array_equal(again[name], tree[name])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("where", ["ensemble.shuffle", "fits.similarity"])
def test_ctrl_c_among_the_floors_keeps_the_fits(tensor, tree, where, monkeypatch):
    calls, real = [], fits.fit_shuffled

    def fit_shuffled(*args):
        calls.append(1)
        with monkeypatch.context() as patch:
            if where == "fits.similarity":  # of the floors, not of the assembly
                signalling(patch, f"vitxr.factor.{where}")
            return real(*args)

    monkeypatch.setattr("vitxr.factor.ensemble.fit_shuffled", fit_shuffled)
    if where == "ensemble.shuffle":
        signalling(monkeypatch, f"vitxr.factor.{where}")
    with pytest.warns(RuntimeWarning, match="the floors are left out: they were interrupted"):
        again = fit_ensemble(
            tensor, [2, 3], replicates=3, random_state=8, progress=False, floors=True
        )
    assert "shuffled_objective" not in again
    np.testing.assert_array_equal(again.objective, tree.objective)


def raise_error_after(number):
    signal.raise_signal(number)
    raise DataError("of its own")


def test_signals_are_held_and_handed_on(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with held() as came:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert seen == []
        assert came == [signal.SIGTERM, signal.SIGINT, signal.SIGINT]
        assert seen == [signal.SIGTERM]
        with pytest.raises(DataError), held():
            raise_error_after(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with held() as came:
            signal.raise_signal(signal.SIGINT)
        assert came == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_only_the_main_thread_holds_signals(tensor):
    with ThreadPoolExecutor(1) as pool:
        given = {"replicates": 2, "max_iter": 5, "progress": False}
        tree = pool.submit(fit_ensemble, tensor, 2, **given).result()
    assert tree.objective.shape == (1, 2)


def test_fits_that_break_down_are_marked(tensor, monkeypatch):
    real = methods._fit_tensorly

    def breaks(data, rank, method, seed, *rest):
        if rank == (2,) or seed == broken:
            raise DataError("met a singular system")
        return real(data, rank, method, seed, *rest)

    whole = fit_ensemble(tensor, 3, 2, "parafac", max_iter=5, progress=False)
    broken = int(whole.seed[0, 0])
    monkeypatch.setattr(methods, "_fit_tensorly", breaks)
    with pytest.warns(RuntimeWarning, match="3 of 4 fits .* `failed`.*singular"):
        tree = fit_ensemble(tensor, [2, 3], 2, "parafac", max_iter=5, progress=False)
    assert tree.failed.values.tolist() == [[True, True], [True, False]]
    assert tree.best_replicate.values.tolist() == [-1, 1]
    assert np.isnan(tree.similarity.values[tree.failed.values]).all()
    np.testing.assert_allclose(tree.vit.best(3).objective, whole.objective[0, 1])
    with pytest.raises(DataError, match="no fit of rank 2 has a model"):
        tree.vit.best(2)
    with pytest.raises(DataError, match="singular"):
        fit_ensemble(tensor, 2, 2, "parafac", progress=False)
