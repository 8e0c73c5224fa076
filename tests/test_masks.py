"""Masks, missing values, speckles: against a slow EM algorithm, identities, planted factors."""

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_factor import neuron_tensor, reconstruct
from test_hals import khatri_rao, planted, slow_ncp_hals
from test_rules import penalty_of

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import best, blocks, checks, choose_rank, factorize, fit_ensemble, hals
from vitxr.factor.masks import Masked, Speckle, masked_errors, survey
from vitxr.factor.rules import Rules

RANKS = (3, 1, 4, 3)


def whole(factors):
    shape = [len(f) for f in factors]
    return (factors[0] @ khatri_rao(factors[1:]).T).reshape(shape)


def slow_em(x, kept, start, tol, max_iter):
    """Fill in what is hidden with the model, iterate HALS once on the full tensor, and again.

    The longest mode comes first in an iteration, the others follow in cyclic order.
    """
    mode = int(np.argmax(x.shape))
    order = [(mode + i) % x.ndim for i in range(x.ndim)]
    turned, seen = x.transpose(order), kept.transpose(order)
    factors = [start[m].copy() for m in order]
    norm, history = np.linalg.norm(turned[seen]), []
    while len(history) < max_iter:
        filled = np.where(seen, turned, whole(factors))
        factors, _ = slow_ncp_hals(filled, factors, tol=1.0, max_iter=1)
        history.append(np.linalg.norm((turned - whole(factors))[seen]) / norm)
        if len(history) > 1 and history[-2] - history[-1] < tol:
            break
    return [factors[order.index(m)] for m in range(x.ndim)], np.array(history)


def random_mask(shape, share=0.7, seed=5):
    kept = np.random.default_rng(seed).random(shape) < share
    for mode in range(len(shape)):  # something of every slice
        np.moveaxis(kept, mode, 0).reshape(shape[mode], -1)[:, 0] = True
        kept[(0,) * mode + (slice(None),) + (0,) * (len(shape) - mode - 1)] = True
    return kept


def fit(x, mask, ranks=RANKS, threads=1, **given):
    starts = [hals.random_start(x.shape, r, 5.0, s) for s, r in enumerate(ranks)]
    given = {"tol": 1e-4, "max_iter": 40, "norm": None, **given}
    with blocks.own_threads(threads) as pool:
        return hals.fit_models(x, starts, mask=mask, pool=pool, **given), starts


@pytest.mark.parametrize("shape", [(80, 9), (70, 5, 6), (4, 75, 5), (4, 3, 70), (5, 3, 40, 2)])
@pytest.mark.parametrize(("rows", "threads"), [(7, 1), (64, 2), (None, 2)])
def test_equals_the_slow_em_algorithm(shape, rows, threads):
    _, x = planted(shape, 4, noise=0.3)
    kept = random_mask(shape)
    fits, starts = fit(np.where(kept, x, np.nan), kept, threads=threads, rows=rows)
    lengths = set()
    for one, start in zip(fits, starts, strict=True):
        factors, history = slow_em(x, kept, start, tol=1e-4, max_iter=40)
        lengths.add(len(history))
        assert len(one.history) == len(history)
        np.testing.assert_allclose(one.history, history, rtol=1e-8)
        assert one.converged == (len(history) < 40 or history[-2] - history[-1] < 1e-4)
        for ours, theirs in zip(one.factors, factors, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)
    assert len(lengths) > 1  # models end at different times


@pytest.mark.parametrize("chunks", [(7, 9, 8), (23, 2, 8), (23, 9, 3), (5, 4, 3)])
def test_chunks_of_tensor_and_mask_do_not_matter(chunks, monkeypatch):
    _, x = planted((23, 9, 8), 3, noise=0.2)
    kept = random_mask(x.shape)
    lazy, mask = da.from_array(x, chunks=chunks), da.from_array(kept, chunks=(6, 3, 8))
    speckle, lazy_speckle = Speckle(0.2, 9, kept), Speckle(0.2, 9, mask)
    mode = blocks.blocked_mode(lazy)  # the mode walked over comes first in an iteration
    monkeypatch.setattr(hals, "blocked_mode", lambda _: mode)
    for eager, chunked in ((kept, mask), (kept, kept), (speckle, lazy_speckle)):
        expected, _ = fit(x, eager, max_iter=5, tol=-1)
        found, _ = fit(lazy, chunked, max_iter=5, tol=-1, threads=2)
        again, _ = fit(x, chunked, max_iter=5, tol=-1, rows=3, threads=2)
        for a, b, c in zip(found, expected, again, strict=True):
            np.testing.assert_allclose(a.history, b.history, rtol=1e-9)
            np.testing.assert_allclose(c.history, b.history, rtol=1e-9)
        survey_of = [
            survey(Masked(blocks.rotate(t, m), k, m), blocks.Pool(1, None))
            for t, m, k in ((x, 0, eager), (lazy, mode, chunked))
        ]
        assert survey_of[0].norm == pytest.approx(survey_of[1].norm, rel=1e-12)
        assert survey_of[0].held_norm == pytest.approx(survey_of[1].held_norm, rel=1e-12)
        for one, other in zip(survey_of[0].counts, survey_of[1].counts, strict=True):
            np.testing.assert_array_equal(one, other)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    rank=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 8),
    share=st.sampled_from([0.2, 0.6, 0.9]),
    sparse=st.sampled_from([0.0, 0.05]),
    fixed=st.integers(0, 4),
)
def test_objective_never_rises_and_is_that_of_the_kept_entries(
    shape, rank, seed, rows, share, sparse, fixed
):
    rng = np.random.default_rng(seed)
    x, kept = rng.random(shape), random_mask(shape, share, seed)
    n = len(shape)
    sparsity = (0.0 if fixed == 0 else sparse, *(0.0,) * (n - 1))
    rules = Rules((True,) * n, tuple(m == fixed for m in range(n)), sparsity)
    (one,), _ = fit(
        np.where(kept, x, np.nan), kept, (rank,), rows=rows, rules=rules, tol=-1, max_iter=15
    )
    counts = one.penalized if any(sparsity) else one.history
    assert len(counts) == 15
    assert (np.diff(counts) <= 1e-12).all()
    norm = np.linalg.norm(x[kept])
    direct = np.linalg.norm((x - whole(one.factors))[kept]) / norm
    assert one.history[-1] == pytest.approx(direct, abs=1e-12)
    if any(sparsity):
        both = direct**2 + 2 * penalty_of(one.factors, sparsity) / norm
        assert one.penalized[-1] ** 2 == pytest.approx(both, abs=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_hidden_has_no_part(dtype):
    _, x = planted((60, 7, 8), 3, noise=0.3)
    x, kept = x.astype(dtype), random_mask(x.shape)
    fits = [fit(np.where(kept, x, other), kept)[0] for other in (np.nan, np.inf, -1e30, 0)]
    for other in fits[1:]:
        for a, b in zip(fits[0], other, strict=True):
            np.testing.assert_array_equal(a.history, b.history)
            for f, g in zip(a.factors, b.factors, strict=True):
                np.testing.assert_array_equal(f, g)


def test_a_mask_that_hides_nothing_is_plain_hals():
    _, x = planted((60, 7, 8), 3, noise=0.3)
    fits, _ = fit(x, np.ones(x.shape, bool))
    plain, _ = fit(x, None)
    for a, b in zip(fits, plain, strict=True):
        np.testing.assert_allclose(a.history, b.history, rtol=1e-9)


def test_planted_factors_are_recovered_with_a_third_missing():
    true, x = planted((60, 20, 25), 3, seed=5)
    kept = random_mask(x.shape, 0.7)
    x = x + 0.02 * np.random.default_rng(1).standard_normal(x.shape) * x.mean()
    t = xr.DataArray(np.where(kept, abs(x), np.nan), dims=("neuron", "image", "shift"))
    fits = [
        factorize(t, 3, random_state=s, tol=1e-8, max_iter=2000, mask=t.notnull()) for s in range(3)
    ]
    f = min(fits, key=lambda f: float(f.objective))
    for dim, factor in zip(t.dims, true, strict=True):
        cosines = f[f"{dim}_factor"].values.T @ (factor / np.linalg.norm(factor, axis=0))
        np.testing.assert_allclose(cosines.max(axis=0), 1, atol=2e-3)
    # The hidden entries are those of the model.
    model = reconstruct(f, t)
    assert np.linalg.norm((model - x)[~kept]) < 0.02 * np.linalg.norm(x[~kept])


def splitmix(state, n):
    """Words of SplitMix64, as its authors write it down."""
    out, mask = [], (1 << 64) - 1
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_speckles_are_words_of_a_known_generator():
    # The first words for the seed 1234567 that implementations are checked with.
    assert splitmix(1234567, 2) == [6457827717110365317, 3203168211198807973]
    for seed in (0, 7, 2**64 - 1):
        # The state begins at the mixed seed: that of the generator one step earlier.
        state = splitmix((seed - 0x9E3779B97F4A7C15) % (1 << 64), 1)[0]
        words = np.array(splitmix(state, 60), np.uint64)
        held = Speckle(0.3, seed).held((3, 4, 5))
        # The last shift of the generator is left out: it leaves the upper half as it is.
        np.testing.assert_array_equal(held.ravel(), words < np.uint64(int(0.3 * 2**64)))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    data=st.data(),
    seed=st.integers(0, 2**64 - 1),
)
def test_speckles_are_the_same_however_they_are_walked_over(shape, data, seed):
    mode = data.draw(st.integers(0, len(shape) - 1))
    rows = data.draw(st.integers(1, 7))
    x = np.arange(np.prod(shape), dtype=float).reshape(shape)
    speckle = Speckle(0.4, seed)
    held = speckle.held(shape)
    seen = set()
    for _, block, kept, out in Masked(blocks.rotate(x, mode), speckle, mode).walk(rows):
        np.testing.assert_array_equal(kept, ~out)
        seen |= set(block[out].tolist())
    assert seen == set(x[held].tolist())


def test_speckles_look_like_independent_draws():
    shape = (400, 30, 20)
    one, other = Speckle(0.3, 1).held(shape), Speckle(0.3, 2).held(shape)
    noise = np.sqrt(0.21 / one.size)
    assert abs(one.mean() - 0.3) < 4 * noise
    for a, b in ((one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one, one[::-1])):
        assert abs((a & b).mean() - 0.09) < 6 * noise
    for mode, size in enumerate(shape):  # slices scatter as a binomial does
        share = np.moveaxis(one, mode, 0).reshape(size, -1).mean(axis=1)
        assert 0.5 < share.var() / (0.21 * size / one.size) < 1.6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("chunks", [None, (7, 9, 8), (23, 9, 3)])
def test_errors_of_kept_and_held_entries(dtype, chunks):
    _, x = planted((23, 9, 8), 3, noise=0.2)
    x, observed = x.astype(dtype), random_mask((23, 9, 8), 0.9)
    x[~observed] = np.nan
    data, mask = (x, observed) if chunks is None else (da.from_array(x, chunks=chunks), observed)
    speckle = Speckle(0.2, 3, mask)
    held = speckle.held(x.shape) & observed
    kept = observed & ~held
    fits, _ = fit(data, speckle, threads=2)
    errors = masked_errors(data, [f.factors for f in fits], speckle)
    for one, train, test in zip(fits, *errors, strict=True):
        model = whole([f.astype(float) for f in one.factors])
        for entries, value in ((kept, train), (held, test)):
            norm = np.linalg.norm(x[entries].astype(float))
            assert value == pytest.approx(np.linalg.norm((x - model)[entries]) / norm, rel=1e-9)
        rel = 1e-9 if dtype == "float64" else 1e-5
        assert one.history[-1] == pytest.approx(train, rel=rel)
    alone = masked_errors(data, [f.factors for f in fits], mask)
    assert np.isnan(alone[1]).all()


def test_a_model_of_the_right_rank_predicts_what_is_held_out():
    _, x = planted((60, 12, 15), 3, seed=8)
    x = x + 0.5 * x.mean() * np.random.default_rng(0).standard_normal(x.shape)
    speckle = Speckle(0.1, 0)
    ranks = (1, 3, 15)
    fits, _ = fit(x, speckle, ranks, max_iter=300, tol=1e-6)
    train, test = masked_errors(x, [f.factors for f in fits], speckle)
    assert (np.diff(train) < 0).all()
    assert test[1] == test.min()


def test_labelled():
    t = neuron_tensor(noise=0.4)
    kept = random_mask(t.shape, 0.8)
    mask = t.copy(data=kept)
    holes = t.where(mask)
    f = factorize(holes, 3, mask=holes.notnull(), tol=1e-6)
    direct = np.linalg.norm((t - reconstruct(f, t)).values[kept]) / np.linalg.norm(t.values[kept])
    assert float(f.objective) == pytest.approx(direct, rel=1e-6)
    assert float(f.objective_history[-1]) == pytest.approx(direct, rel=1e-5)
    assert int(f.compressed_iterations) == 0
    # Dims of the mask in any order; what is the same for all neurons need not be said for each.
    other = factorize(holes, 3, mask=mask.transpose("shift", "neuron", "image"), tol=1e-6)
    assert other.drop_vars("seconds").equals(f.drop_vars("seconds"))
    frames = xr.DataArray(random_mask((5, 6), 0.6), dims=("image", "shift"))
    small = factorize(t, 2, mask=frames)
    full = factorize(t, 2, mask=frames.broadcast_like(t))
    np.testing.assert_array_equal(small.neuron_factor, full.neuron_factor)
    assert factorize(t, 2, mask=t.notnull()).neuron_factor.equals(factorize(t, 2).neuron_factor)
    tree = fit_ensemble(holes, [3], 2, mask=holes.notnull(), progress=False, tol=1e-6)
    alone = factorize(holes, 3, mask=mask, random_state=int(best(tree, 3).seed), tol=1e-6)
    assert float(tree.objective.min()) == pytest.approx(float(alone.objective), rel=1e-4)


def test_lazy_tensor_and_mask_are_read_together(monkeypatch):
    monkeypatch.setattr(checks, "IN_MEMORY_BYTES", 0)
    t = neuron_tensor(noise=0.4)
    holes = t.where(random_mask(t.shape, 0.8))
    eager = factorize(holes, 2, mask=holes.notnull(), max_iter=5)
    reads = []

    def read(block, block_info=None):
        reads.append(block_info[0]["array-location"][0])
        return block

    chunked = holes.chunk(neuron=4)
    chunked = chunked.copy(data=chunked.data.map_blocks(read, dtype=t.dtype, meta=np.empty(())))
    reads.clear()
    with dask.config.set(scheduler="synchronous"):
        lazy = factorize(chunked, 2, mask=chunked.notnull(), max_iter=5)
    np.testing.assert_allclose(lazy.neuron_factor, eager.neuron_factor, rtol=1e-4, atol=1e-6)
    passes = 1 + int(lazy.iterations) + 1 + 1  # checks, iterations, the last objective, label's
    assert len(reads) == 3 * passes


def test_an_ensemble_is_resumed_with_the_same_mask_only():
    given = {"replicates": 2, "progress": False, "max_iter": 10}
    tree = fit_ensemble(T, [2], mask=KEPT, **given)
    more = fit_ensemble(T, [1, 2], mask=KEPT.copy(deep=True), resume=tree, **given)
    np.testing.assert_array_equal(
        more.objective.sel(rank=2).values, tree.objective.sel(rank=2).values
    )
    other = KEPT.copy(data=random_mask(T.shape, 0.8, seed=1))
    with pytest.raises(
        ArgumentError, match=r"fitted with mask .*, 293 of 360 True, not .*, 300 of"
    ):
        fit_ensemble(T, [1, 2], mask=other, resume=tree, **given)


def test_a_small_lazy_tensor_and_its_mask_are_read_once():
    t = neuron_tensor().where(random_mask((12, 5, 6), 0.8))
    reads = []

    def read(block):
        reads.append(block.shape)
        return block

    lazy = t.chunk(neuron=6)
    lazy = lazy.copy(data=lazy.data.map_blocks(read, dtype=t.dtype, meta=np.empty(())))
    with dask.config.set(scheduler="synchronous"):
        f = factorize(lazy, 2, mask=lazy.notnull(), max_iter=5)
    assert len(reads) == 2
    eager = factorize(t, 2, mask=t.notnull(), max_iter=5)
    np.testing.assert_array_equal(f.neuron_factor, eager.neuron_factor)


def test_what_had_ended_before_an_interrupt_is_whole():
    _, x = planted((60, 7, 8), 3, noise=0.3)
    kept, seen = random_mask(x.shape), []

    def stop(number, iteration, objective, done):
        seen.extend([number] * done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    fits, _ = fit(x, kept, callback=stop, max_iter=500)
    full, _ = fit(x, kept, max_iter=500)
    assert [i for i, f in enumerate(fits) if not f.interrupted] == sorted(seen)
    for i in seen:
        np.testing.assert_array_equal(fits[i].history, full[i].history)
        for ours, theirs in zip(fits[i].factors, full[i].factors, strict=True):
            np.testing.assert_array_equal(ours, theirs)


T = neuron_tensor()
KEPT = T.copy(data=random_mask(T.shape, 0.8))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (KEPT.values, ArgumentError, "mask is a ndarray.*t.notnull()"),
        (KEPT.astype(int), ArgumentError, "mask has dtype int64; expected bool"),
        (KEPT.expand_dims(time=2), ArgumentError, "mask has the dimension time"),
        (KEPT.isel(image=slice(3)), DataError, "other labels of image"),
        (KEPT.isel(shift=[0, 2, 1, 3, 4, 5]), DataError, "other labels of shift.*reindex_like"),
        (
            KEPT & (KEPT.image != "im3"),
            DataError,
            r"hides all of image im3, .*leave it out of the tensor, t.drop_isel\(image=...\)",
        ),
        (
            KEPT & (KEPT.feature_map != 40),
            DataError,
            r"hides all of neuron \(feature_map 40, patch_row 0, patch_col 0\), .* and 1 more",
        ),
        (KEPT & False, DataError, "hides all of neuron"),
        (
            KEPT & (KEPT.shift_x != 1),
            DataError,
            r"hides all of shift \(shift_y 0, shift_x 1\), shift \(shift_y 1, shift_x 1\)",
        ),
    ],
)
def test_masks_refused(mask, error, message):
    with pytest.raises(error, match=message):
        factorize(T, 2, mask=mask)


def test_values_refused():
    bad = T.copy(deep=True)
    bad[1, 2, 3] = np.nan
    with pytest.raises(DataError, match=r"non-finite value, nan.*image im2.*mask=t.notnull\(\)"):
        factorize(bad, 2)
    hidden = KEPT.copy(deep=True)
    hidden[1, 2, 3] = True
    with pytest.raises(DataError, match=r"non-finite value, nan.*image im2"):
        factorize(bad, 2, mask=hidden)
    bad[1, 2, 3] = -1
    with pytest.raises(DataError, match=r"negative value, -1.0, at .*image im2"):
        factorize(bad, 2, mask=hidden)
    hidden[1, 2, 3] = False
    assert np.isfinite(factorize(bad, 2, mask=hidden, max_iter=3).objective)
    with pytest.raises(ArgumentError, match=r"compress is True.*mask"):
        factorize(T, 2, mask=KEPT, compress=True)
    with pytest.raises(ArgumentError, match="floors are True and there is a mask"):
        fit_ensemble(T, [2], 2, mask=KEPT, floors=True)
    with pytest.raises(ArgumentError, match="choose_rank takes no mask"):
        choose_rank(T, [2], mask=KEPT)
    with pytest.raises(ArgumentError, match="mask cannot be passed to parafac"):
        factorize(T, 2, "parafac", mask=KEPT)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, np.nan, True, "0.1"])
def test_speckles_refused(fraction):
    with pytest.raises(ArgumentError, match="fraction of a Speckle is"):
        Speckle(fraction, 0)
    with pytest.raises(ArgumentError, match="seed of a Speckle is"):
        Speckle(0.1, -1)
    x = np.ones((40, 2))
    with pytest.raises(DataError, match=r"leaves nothing of slice .* of mode 0"):
        fit(x, Speckle(0.9, 0), (1,))
    with pytest.raises(TypeError, match=r"bool mask of shape \(40, 2\), not"):
        fit(x, np.ones((2, 40), bool), (1,))
