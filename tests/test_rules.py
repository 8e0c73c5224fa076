"""Warm starts, fixed factors, nonnegativity, sparsity: against a slow transcription."""

import json

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_factor import neuron_tensor
from test_hals import khatri_rao, planted, unfold

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import best, blocks, factorize, fit_ensemble, hals, transform
from vitxr.factor.rules import Rules
from vitxr.names import validate


def length(a):
    return np.linalg.norm(a, axis=0)


def penalty_of(factors, sparsity):
    """The L1 norm of each unit column times the weight of its component, from the definition."""
    weight = np.prod([length(f) for f in factors], axis=0)
    alive = weight > 0
    return sum(
        s * (weight * abs(f).sum(axis=0))[alive] @ (1 / length(f)[alive])
        for s, f in zip(sparsity, factors, strict=True)
    )


def slow(x, start, rules, iterations):
    """Mode by mode and component by component; the penalty's terms are written out for each."""
    factors, norm = [f.copy() for f in start], np.linalg.norm(x)
    rank, history, penalized = factors[0].shape[1], [], []
    for _ in range(iterations):
        for mode in range(x.ndim):
            if rules.fixed[mode]:
                continue
            others = [f for m, f in enumerate(factors) if m != mode]
            gram = np.ones((rank, rank))
            for f in others:
                gram = gram * (f.T @ f)
            product = unfold(x, mode) @ khatri_rao(others)
            linear, ridge = np.zeros(rank), np.zeros(rank)
            for r in range(rank):
                for m, weight in enumerate(rules.sparsity):
                    rest = 1.0
                    for k, f in enumerate(factors):
                        if k not in (m, mode):
                            rest *= np.linalg.norm(f[:, r])
                    if m == mode:
                        linear[r] += norm * weight * rest
                    else:
                        ridge[r] += norm * weight * factors[m][:, r].sum() * rest
                ridge[r] /= np.linalg.norm(factors[mode][:, r])
            factor = factors[mode]
            for _ in range(3 if rank > 1 else 1):
                for p in range(rank):
                    rest = factor @ gram[:, p] - factor[:, p] * gram[p, p]
                    factor[:, p] = (product[:, p] - linear[p] - rest) / (gram[p, p] + ridge[p])
                    if rules.nonnegative[mode]:
                        factor[:, p] = np.maximum(factor[:, p], 0)
        model = (factors[0] @ khatri_rao(factors[1:]).T).reshape(x.shape)
        history.append(np.linalg.norm(x - model) / norm)
        penalized.append(np.sqrt(history[-1] ** 2 + 2 * penalty_of(factors, rules.sparsity) / norm))
    return factors, np.array(history), np.array(penalized)


def fit(x, start, rules, iterations=10, tol=-1.0, rows=5):
    with blocks.own_threads(2) as pool:
        return hals.fit_models(
            x,
            [start],
            norm=float(np.linalg.norm(x)),
            tol=tol,
            max_iter=iterations,
            pool=pool,
            rules=rules,
            rows=rows,
        )[0]


def signed(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


RULES = {
    "free": ((False,) * 3, (False,) * 3, (0.0,) * 3),
    "one nonnegative": ((False, True, False), (False,) * 3, (0.0,) * 3),
    "first fixed": ((True,) * 3, (True, False, False), (0.0,) * 3),
    "last fixed": ((True,) * 3, (False, False, True), (0.0,) * 3),
    "two fixed": ((True,) * 3, (False, True, True), (0.0,) * 3),
    "fixed and free": ((True, False, True), (True, False, False), (0.0,) * 3),
    "sparse": ((True,) * 3, (False,) * 3, (0.005, 0.0, 0.0)),
    "sparse in two": ((True,) * 3, (False,) * 3, (0.004, 0.0, 0.002)),
    "sparse in all": ((True,) * 3, (False,) * 3, (0.004, 0.003, 0.002)),
    "all at a time": ((True, True, False), (False, True, False), (0.01, 0.0, 0.0)),
}


@pytest.mark.parametrize("shape", [(19, 5, 6), (5, 19, 6), (5, 6, 19)])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_equals_the_slow_transcription(name, rank, shape):
    rules = Rules(*RULES[name])
    _, x = planted(shape, 4, noise=0.3)
    if not all(rules.nonnegative):
        x = x + 0.3 * signed(shape)
    start = hals.random_start(shape, rank, np.linalg.norm(x), 1)
    factors, history, penalized = slow(x, start, rules, 10)
    found = fit(x, start, rules)
    np.testing.assert_allclose(found.history, history, rtol=1e-7)
    for ours, theirs in zip(found.factors, factors, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    if any(rules.sparsity):
        np.testing.assert_allclose(found.penalized, penalized, rtol=1e-7)
    else:
        assert not len(found.penalized)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    rank=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_what_is_minimised_never_rises_and_rules_hold(shape, rank, seed, data):
    n = len(shape)
    nonnegative = tuple(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    fixed = [False] * n
    fixed[data.draw(st.integers(0, n - 1))] = data.draw(st.booleans())
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.01, 0.3, 5.0]), min_size=n, max_size=n))
    sparsity = tuple(
        w * (sign and not kept) for w, sign, kept in zip(weights, nonnegative, fixed, strict=True)
    )
    rules = Rules(nonnegative, tuple(fixed), sparsity)
    x = signed(shape, seed)
    if all(nonnegative):
        x = abs(x)
    start = hals.random_start(shape, rank, np.linalg.norm(x), seed)
    found = fit(x, start, rules, iterations=20)
    counts = found.penalized if any(sparsity) else found.history
    assert len(counts) == 20
    assert (np.diff(counts) <= 1e-7).all()
    model = found.factors[0] @ khatri_rao(found.factors[1:]).T
    direct = np.linalg.norm(unfold(x, 0) - model) / np.linalg.norm(x)
    assert found.history[-1] == pytest.approx(direct, abs=1e-7)
    if any(sparsity):
        whole = direct**2 + 2 * penalty_of(found.factors, sparsity) / np.linalg.norm(x)
        assert found.penalized[-1] ** 2 == pytest.approx(whole, abs=1e-7)
    for factor, first, kept, sign in zip(
        found.factors, start, rules.fixed, nonnegative, strict=True
    ):
        if kept:
            np.testing.assert_array_equal(factor, first)
        if sign:
            assert (factor >= 0).all()


def test_sparse_factors_meet_the_conditions_of_a_minimum():
    """Of |X - M|^2 / 2 + |X| P: no slope where a factor is positive, none downhill at zeros."""
    _, x = planted((30, 8, 9), 3, seed=1, noise=0.5)
    norm = np.linalg.norm(x)
    start = hals.random_start(x.shape, 3, norm, 0)
    for sparsity in ((0.02, 0.0, 0.0), (0.01, 0.0, 0.02)):
        found = fit(x, start, Rules((True,) * 3, (False,) * 3, sparsity), 4000, tol=1e-16)
        factors = [np.array(f) for f in found.factors]
        sizes = np.array([length(f) for f in factors])
        totals = np.array([f.sum(axis=0) for f in factors])
        zeros = 0
        for mode, factor in enumerate(factors):
            others = khatri_rao([f for m, f in enumerate(factors) if m != mode])
            slope = factor @ (others.T @ others) - unfold(x, mode) @ others
            for m, weight in enumerate(sparsity):
                rest = np.prod([sizes[k] for k in range(3) if k not in (m, mode)], axis=0)
                change = 1.0 if m == mode else totals[m] * factor / sizes[mode]
                slope += norm * weight * rest * change
            scale = abs(unfold(x, mode) @ others).max()
            assert abs(slope[factor > 1e-9 * factor.max()]).max() < 1e-4 * scale
            assert slope.min() > -1e-4 * scale
            zeros += (factor == 0).sum()
        plain = fit(x, start, Rules.plain(3), 300)
        assert zeros > sum((f == 0).sum() for f in plain.factors)
        assert found.history[-1] > plain.history[-1]


def test_the_penalty_has_no_unit():
    t = neuron_tensor(dtype="float64")
    one = factorize(t, 2, sparsity={"neuron": 0.05})
    other = factorize(1e3 * t, 2, sparsity={"neuron": 0.05})
    np.testing.assert_allclose(one.neuron_factor, other.neuron_factor, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        one.penalized_objective_history, other.penalized_objective_history, rtol=1e-6
    )
    validate(one, require=["penalized_objective_history"])
    # From what the user sees: weights, unit columns, the objective.
    norm = float(np.linalg.norm(t))
    penalty = 0.05 * float((one.weight * one.neuron_factor.sum("neuron")).sum()) / norm
    whole = np.sqrt(float(one.objective) ** 2 + 2 * penalty)
    assert float(one.penalized_objective_history[-1]) == pytest.approx(whole, rel=1e-9)
    assert (one.neuron_factor == 0).sum() > (factorize(t, 2).neuron_factor == 0).sum()
    with pytest.warns(RuntimeWarning, match="no component left"):
        dead = factorize(t, 2, sparsity={"neuron": 100})
    assert (dead.weight == 0).all()
    assert float(dead.objective) == 1


def test_negative_data_and_signed_factors():
    from tensorly.decomposition import parafac

    rng = np.random.default_rng(4)
    true = [rng.standard_normal((n, 2)) for n in (20, 7, 8)]
    x = np.einsum("ir,jr,kr->ijk", *true)
    t = xr.DataArray(x, dims=("neuron", "image", "shift"))
    f = factorize(t, 2, nonnegative=(), tol=1e-12, max_iter=3000)
    assert float(f.objective) < 1e-5
    (_, theirs), _ = parafac(x, 2, init="random", random_state=0, tol=1e-12, return_errors=True)
    for dim, factor in zip(t.dims, theirs, strict=True):
        cosine = abs(f[f"{dim}_factor"].values.T @ (factor / length(factor)))
        np.testing.assert_allclose(cosine.max(axis=0), 1, atol=1e-4)
    # Images alone are nonnegative: every other dimension may have signs, and takes that of weights.
    for order in (t.dims, ("image", "shift", "neuron")):
        half = factorize(t.transpose(*order), 2, nonnegative="image", tol=1e-9)
        assert (half.image_factor >= 0).all()
        assert (half.neuron_factor < 0).any()
        model = np.einsum("r,ir,jr,kr->ijk", half.weight, *(half[f"{d}_factor"] for d in t.dims))
        assert float(half.objective) == pytest.approx(
            np.linalg.norm(x - model) / np.linalg.norm(x), rel=1e-6
        )
        assert float(half.objective) == pytest.approx(float(half.objective_history[-1]), rel=1e-6)
    with pytest.raises(DataError, match=r"negative value.*nonnegative=\(\)"):
        factorize(t, 2)
    with pytest.raises(DataError, match=r"negative value"):
        factorize(t, 2, nonnegative=("neuron", "image", "shift"))


def test_a_warm_start_goes_on_where_it_ended():
    t = neuron_tensor(dtype="float64", noise=0.5)
    whole = factorize(t, 3, max_iter=40, tol=0)
    half = factorize(t, 3, max_iter=20, tol=0)
    rest = factorize(t, 3, max_iter=20, tol=0, start=half)
    # The scale between modes and the order of components do not change the iterates of HALS...
    # but for the order of its sweeps, so that the rest goes the same way, not the same steps.
    assert float(rest.objective) <= float(half.objective)
    assert float(rest.objective_history[0]) <= float(half.objective)
    assert float(rest.objective) == pytest.approx(float(whole.objective), rel=1e-3)
    done = factorize(t, 3, tol=1e-9, max_iter=5000)
    again = factorize(t, 3, tol=1e-9, start=done.isel(component=[2, 0, 1]))
    assert int(again.iterations) < 20
    np.testing.assert_allclose(again.neuron_factor, done.neuron_factor, atol=1e-3)
    assert json.loads(again.attrs["options"])["start"].startswith("Dataset (")
    assert int(factorize(t, 3, start=done).compressed_iterations) == 0


def test_fixed_factors_stay_up_to_the_order_of_components():
    t = neuron_tensor(noise=0.5)
    first = factorize(t, 3)
    roll = t.roll(neuron=3)
    f = factorize(roll, 3, start=first, fixed=("image", "shift"), tol=1e-9, max_iter=2000)
    place = abs(f.image_factor.values.T @ first.image_factor.values).argmax(axis=1)
    assert sorted(place) == [0, 1, 2]
    for dim in ("image", "shift"):
        np.testing.assert_allclose(
            f[f"{dim}_factor"], first[f"{dim}_factor"].values[:, place], atol=1e-6
        )
    # With two of three fixed the third is a nonnegative least squares problem.
    from scipy.optimize import nnls

    right = khatri_rao([f.image_factor.values, f.shift_factor.values]).astype(float)
    for i in (0, 5, 11):
        exact, _ = nnls(right, roll.values[i].ravel().astype(float))
        np.testing.assert_allclose(f.neuron_factor[i] * f.weight, exact, atol=1e-3)


T = neuron_tensor()
F = factorize(T, 2, max_iter=5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nonnegative": "neurons"}, ArgumentError, "nonnegative names 'neurons'.*neuron, image"),
        ({"nonnegative": 3}, ArgumentError, "nonnegative names 3"),
        (
            {"nonnegative": {"image": False}},
            ArgumentError,
            "nonnegative is {'image': False}; expected the names of the dimensions it is for",
        ),
        ({"fixed": "image"}, ArgumentError, "fixed is image, and there is no start"),
        ({"fixed": T.dims, "start": F}, ArgumentError, "fixed names all of neuron, image, shift"),
        ({"sparsity": 0.1}, ArgumentError, "expected weights by dimension"),
        ({"sparsity": {"time": 0.1}}, ArgumentError, "sparsity names 'time'"),
        ({"sparsity": {"neuron": -1}}, ArgumentError, "sparsity of neuron is -1"),
        ({"sparsity": {"neuron": np.nan}}, ArgumentError, "sparsity of neuron is nan"),
        (
            {"sparsity": {"neuron": 1}, "nonnegative": "image"},
            ArgumentError,
            "neuron, which is not kept nonnegative",
        ),
        (
            {"sparsity": {"neuron": 1}, "fixed": "neuron", "start": F},
            ArgumentError,
            "neuron, which is fixed",
        ),
        ({"compress": True, "nonnegative": ()}, ArgumentError, "compress is True"),
        ({"start": F.neuron_factor}, ArgumentError, "start is a DataArray"),
        ({"start": F.drop_vars("weight")}, ArgumentError, "start has no `weight`"),
        (
            {"start": F.expand_dims(replicate=2)},
            ArgumentError,
            "has `.*` with dims .*Choose one replicate",
        ),
        ({"start": F.isel(component=[0])}, ArgumentError, "start has 1 components and rank is 2"),
        ({"start": F.isel(image=slice(2))}, DataError, "other labels of image"),
        ({"start": F.assign_coords(image=list("vwxyz"))}, DataError, "other labels of image"),
        ({"start": F * np.nan}, DataError, "start holds NaN"),
        ({"start": F * -1}, ArgumentError, "start is negative in neuron_factor"),
    ],
)
def test_refusals_before_the_tensor_is_read(options, error, message):
    def never(block):
        raise AssertionError("read")

    lazy = T.chunk()
    lazy = lazy.copy(data=lazy.data.map_blocks(never, dtype=T.dtype, meta=np.empty((0, 0, 0))))
    with pytest.raises(error, match=message):
        factorize(lazy, 2, **options)


def test_ensembles_take_rules_and_refuse_a_start():
    tree = fit_ensemble(T, [2], 2, sparsity={"neuron": 0.05}, progress=False, max_iter=20)
    f = best(tree, 2)
    alone = factorize(T, 2, sparsity={"neuron": 0.05}, random_state=int(f.seed), max_iter=20)
    np.testing.assert_allclose(f.neuron_factor, alone.neuron_factor, atol=1e-4)
    assert tree["rank_2"].penalized_objective_history.dims == ("replicate", "iteration")
    more = fit_ensemble(
        T, [1, 2], 2, sparsity={"neuron": 0.05}, progress=False, max_iter=20, resume=tree
    )
    xr.testing.assert_equal(
        more["rank_2"].penalized_objective_history, tree["rank_2"].penalized_objective_history
    )
    assert np.isfinite(more["rank_1"].penalized_objective_history[:, 0]).all()
    with pytest.raises(ArgumentError, match="start is one model, from which all fits"):
        fit_ensemble(T, [2], 2, start=F, progress=False)


def test_a_penalty_that_leaves_nothing_is_warned_of():
    given = {"sparsity": {"neuron": 50.0}, "max_iter": 20}
    with pytest.warns(
        RuntimeWarning, match=r"1 of 1 fits have no component left: all weights are 0"
    ):
        f = factorize(T, 2, **given)
    assert (f.weight == 0).all()
    assert float(f.objective) == pytest.approx(1)
    with pytest.warns(
        RuntimeWarning, match=r"sparsity \(neuron: 50\) costs more .*smaller numbers"
    ):
        tree = fit_ensemble(T, [1, 2], 2, progress=False, **given)
    assert tree.degenerate.all()
    assert (tree.dead_components == tree["rank"]).all()


@pytest.mark.parametrize("value", [np.array([True, False]), np.array(True), 1, "yes"])
def test_compress_is_a_bool(value):
    with pytest.raises(ArgumentError, match=r"compress is .*; expected True, False, or None"):
        factorize(T, 2, compress=value)
    assert factorize(T, 2, compress=np.bool_(False), max_iter=2).attrs["options"]


@pytest.mark.parametrize("names", [{"image", "shift"}, np.array(["shift", "image"]), "iterator"])
def test_names_of_dimensions_in_any_collection(names):
    """They are recorded in one form: transform reads them, and resume compares them."""
    given = iter(["image", "shift"]) if isinstance(names, str) else names
    f = factorize(T, 2, nonnegative=given, max_iter=9)
    assert json.loads(f.attrs["options"]) == {"nonnegative": ["image", "shift"]}
    other = factorize(T, 2, nonnegative=("shift", "image"), max_iter=9)
    assert f.drop_vars("seconds").identical(other.drop_vars("seconds"))
    assert (transform(f, T - T.mean(), dim="image").image_factor >= 0).all()
    assert (transform(f, T - T.mean(), dim="neuron").neuron_factor < 0).any()


def test_options_that_mean_the_same_are_resumed():
    given = {"ranks": 2, "replicates": 2, "progress": False, "max_iter": 5}
    tree = fit_ensemble(T, **given, nonnegative="image", sparsity={"image": np.float32(0.5)})
    same = {"nonnegative": ["image"], "sparsity": {"image": 0.5}, "compress": None}
    again = fit_ensemble(T, **given, **same, resume=tree)
    np.testing.assert_array_equal(again.seconds, tree.seconds)  # kept, not fitted again
