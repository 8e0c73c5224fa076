"""The nonnegative CP kernel, against a plain transcription of the algorithm and identities."""

import threading

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitxr.factor import blocks, hals


def unfold(x, mode):
    return np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1)


def khatri_rao(matrices):
    rank = matrices[0].shape[1]
    out = np.ones((1, rank))
    for m in matrices:
        out = np.array([np.kron(out[:, r], m[:, r]) for r in range(rank)]).T
    return out


def slow_ncp_hals(x, start, tol, max_iter):
    """Mode by mode and component by component, as the notebook's algorithm is written down."""
    factors = [f.copy() for f in start]
    rank = factors[0].shape[1]
    history = []
    while len(history) < max_iter:
        for mode in range(x.ndim):
            others = [f for m, f in enumerate(factors) if m != mode]
            gram = np.ones((rank, rank))
            for f in others:
                gram = gram * (f.T @ f)
            product = unfold(x, mode) @ khatri_rao(others)
            factor = factors[mode]
            if rank == 1:
                factor[:] = np.maximum(0.0, product / gram[0, 0])
                continue
            for _ in range(3):
                for p in range(rank):
                    rest = np.zeros(len(factor))
                    for q in range(rank):
                        if q != p:
                            rest += factor[:, q] * gram[q, p]
                    factor[:, p] = np.maximum((product[:, p] - rest) / max(gram[p, p], 1e-6), 0)
        model = (factors[0] @ khatri_rao(factors[1:]).T).reshape(x.shape)
        history.append(np.linalg.norm(x - model) / np.linalg.norm(x))
        if len(history) > 1 and history[-2] - history[-1] < tol:
            break
    return factors, np.array(history)


def planted(shape, rank, seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    factors = [rng.gamma(0.5, size=(n, rank)) for n in shape]
    x = (factors[0] @ khatri_rao(factors[1:]).T).reshape(shape)
    return factors, x + noise * rng.random(shape)


@pytest.mark.parametrize("rows", [1, 4, 7, 100, None])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((13, 9), 3), ((13, 5, 6), 4), ((11, 4, 1), 3), ((6, 5, 4, 3), 3), ((9, 4, 5), 1)],
)
def test_equals_the_slow_transcription(shape, rank, rows):
    _, x = planted(shape, rank + 1, noise=0.3)
    start = hals.random_start(shape, rank, np.linalg.norm(x), seed=3)
    slow, history = slow_ncp_hals(x, start, tol=1e-5, max_iter=60)
    fit = hals.ncp_hals(x, rank, start=start, tol=1e-5, max_iter=60, rows=rows)
    assert len(fit.history) == len(history) > 3
    np.testing.assert_allclose(fit.history, history, rtol=1e-6)
    for ours, theirs in zip(fit.factors, slow, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_start_is_untouched_and_default_start_is_the_seeds():
    _, x = planted((7, 5, 4), 2, noise=0.1)
    start = hals.random_start(x.shape, 2, np.linalg.norm(x), seed=11)
    kept = [f.copy() for f in start]
    a = hals.ncp_hals(x, 2, start=start)
    b = hals.ncp_hals(x, 2, seed=11)
    for f, k in zip(start, kept, strict=True):
        np.testing.assert_array_equal(f, k)
    np.testing.assert_allclose(a.history, b.history, rtol=1e-12)
    assert hals.ncp_hals(x, 2, seed=12).history[0] != a.history[0]


@pytest.mark.parametrize("shape", [(20, 6), (20, 6, 5), (9, 5, 4, 3)])
def test_start_has_the_norm_of_the_data_shared_equally(shape):
    factors = hals.random_start(shape, 4, norm=7.5, seed=0)
    model = factors[0] @ khatri_rao(factors[1:]).T
    assert np.linalg.norm(model) == pytest.approx(7.5)
    lengths = [np.linalg.norm(f, axis=0) for f in factors]
    for length in lengths[1:]:
        np.testing.assert_allclose(length, lengths[0])


def test_planted_factors_are_recovered():
    true, x = planted((30, 12, 10), 3, seed=5)
    best = min(
        (hals.ncp_hals(x, 3, seed=s, tol=1e-9) for s in range(3)), key=lambda f: f.history[-1]
    )
    assert best.history[-1] < 1e-3
    for ours, theirs in zip(best.factors, true, strict=True):
        cosines = (ours / np.linalg.norm(ours, axis=0)).T @ (
            theirs / np.linalg.norm(theirs, axis=0)
        )
        np.testing.assert_allclose(cosines.max(axis=0), 1, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 8), min_size=2, max_size=4),
    rank=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    sparse=st.booleans(),
)
def test_objective_never_increases_and_is_the_residual(shape, rank, seed, rows, sparse):
    rng = np.random.default_rng(seed)
    x = rng.random(shape)
    if sparse:
        x *= rng.random(shape) < 0.3
    x.flat[0] = 1.0  # not all zero
    fit = hals.ncp_hals(x, rank, seed=seed, tol=0.0, max_iter=25, rows=rows)
    assert (np.diff(fit.history) <= 1e-7).all()  # the identity loses half of the digits near 0
    assert all((f >= 0).all() and np.isfinite(f).all() for f in fit.factors)
    assert [f.shape for f in fit.factors] == [(n, rank) for n in shape]
    left, right = fit.factors[0], khatri_rao(fit.factors[1:]).T
    norm = np.linalg.norm(x)
    direct = np.linalg.norm(unfold(x, 0) - left @ right) / norm
    (residual,) = blocks.relative_residuals(x, [(left, right)], norm, rows=rows)
    assert residual == pytest.approx(direct, abs=1e-14)
    assert fit.history[-1] == pytest.approx(direct, abs=1e-7)


def test_float32_products_follow_float64():
    _, x = planted((50, 9, 8), 3, noise=0.2)
    single = hals.ncp_hals(x.astype(np.float32), 3, seed=1, tol=1e-5)
    double = hals.ncp_hals(x, 3, seed=1, tol=1e-5)
    assert single.factors[0].dtype == np.float32
    assert single.history.dtype == np.float64
    np.testing.assert_allclose(single.history[:10], double.history[:10], rtol=1e-4)
    assert single.history[-1] == pytest.approx(double.history[-1], rel=1e-2)


def test_stops_on_signed_improvement_or_at_the_limit():
    _, x = planted((20, 8, 7), 4, noise=0.5)
    free = hals.ncp_hals(x, 4, tol=1e-4)
    falls = -np.diff(free.history)
    assert free.converged
    assert falls[-1] < 1e-4
    assert (falls[:-1] >= 1e-4).all()
    short = hals.ncp_hals(x, 4, tol=1e-4, max_iter=3)
    assert not short.converged
    np.testing.assert_array_equal(short.history, free.history[:3])


def test_components_that_die_stay_zero_and_finite():
    x = np.zeros((6, 5, 4))
    x[0, 0, 0] = 3.0
    start = [np.array(f) for f in hals.random_start(x.shape, 3, 3.0, seed=0)]
    start[1][:, 2] = 0.0
    fit = hals.ncp_hals(x, 3, start=start, max_iter=50)
    assert all(np.isfinite(f).all() for f in fit.factors)
    assert fit.history[-1] < 1e-6
    _, history = slow_ncp_hals(x, start, tol=1e-5, max_iter=50)
    np.testing.assert_allclose(fit.history, history, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-9, 1e-4])
def test_small_data_are_fitted_as_large_ones(scale):
    _, x = planted((15, 6, 5), 2, noise=0.2)
    x /= np.linalg.norm(x)
    one, other = hals.ncp_hals(x, 2, seed=4), hals.ncp_hals(scale * x, 2, seed=4)
    np.testing.assert_allclose(other.history, one.history, rtol=1e-6)


@pytest.mark.parametrize("chunks", [(5, 9, 8), (7, 3, 8), (23, 4, 3)])
def test_dask_equals_numpy(chunks):
    _, x = planted((23, 9, 8), 3, noise=0.2)
    lazy = hals.ncp_hals(da.from_array(x, chunks=chunks), 3, max_iter=20, rows=4)
    eager = hals.ncp_hals(x, 3, max_iter=20)
    np.testing.assert_allclose(lazy.history, eager.history, rtol=1e-9)
    assert blocks.squared_norm(da.from_array(x, chunks=chunks)) == pytest.approx((x**2).sum())


def test_dask_holds_one_chunk_and_the_next_at_a_time():
    began, chunks = [], ((4, 4, 2, 6), (3,))
    come = {low: threading.Event() for low in (0, 4, 8, 10)}

    def make(block_info=None):
        where = block_info[None]["array-location"]
        began.append(where[0])
        come[where[0][0]].set()
        return np.ones([b - a for a, b in where])

    x = da.map_blocks(make, chunks=chunks, dtype=float, meta=np.empty((0, 0)))
    began.clear()
    walk = blocks.row_blocks(x, rows=3)
    where, block = next(walk)
    assert (where, block.shape) == (slice(0, 3), (3, 3))
    assert come[4].wait(10)  # it is read while the first is worked on
    assert [next(walk)[0], began] == [slice(3, 4), [(0, 4), (4, 8)]]
    assert [next(walk)[0], come[8].wait(10)] == [slice(4, 7), True]
    assert began == [(0, 4), (4, 8), (8, 10)]  # and nothing beyond
    walk.close()
    assert began == [(0, 4), (4, 8), (8, 10)]
    began.clear()
    assert [w.stop for w, _ in blocks.row_blocks(x, 3)] == [3, 4, 7, 8, 10, 13, 16]
    assert began == [(0, 4), (4, 8), (8, 10), (10, 16)]


def test_errors_in_a_chunk_come_out():
    def make(block_info=None):
        if block_info[None]["array-location"][0][0] == 4:
            raise OSError("the disk is gone")
        return np.ones((2, 3))

    x = da.map_blocks(make, chunks=((2, 2, 2), (3,)), dtype=float, meta=np.empty((0, 0)))
    seen = []
    walk = blocks.row_blocks(x, rows=2)
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(where for where, _ in walk)
    assert seen == [slice(0, 2), slice(2, 4)]


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_chunks_are_read_whole_and_in_order(rows, columns, most, threads):
    x = np.random.default_rng(0).random((sum(rows), sum(columns), 2))
    lazy = blocks.ready(da.from_array(x, chunks=(tuple(rows), tuple(columns), 1)))
    for share in blocks.shares(lazy, most, threads):
        for where, block in blocks.row_blocks(lazy, most, share):
            np.testing.assert_array_equal(block, x[where].reshape(len(block), -1))
    pieces = [p for share in blocks.shares(lazy, most, threads) for p in share]
    assert [p.start for p in pieces[1:]] == [p.stop for p in pieces[:-1]]
    assert (pieces[0].start, pieces[-1].stop) == (0, len(x))
    assert {p.start for p in pieces} <= {0, *np.cumsum(rows)}
    # Joined chunks are no longer than a block.
    assert all(p.stop - p.start <= most or p.stop - p.start in rows for p in pieces)


def test_a_view_in_another_order_gives_the_same():
    _, x = planted((9, 6, 5), 2, noise=0.2)
    view = np.asfortranarray(x)
    np.testing.assert_allclose(
        hals.ncp_hals(view, 2).history, hals.ncp_hals(x, 2).history, rtol=1e-12
    )


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="float32 or float64, not int64"):
        hals.ncp_hals(np.ones((3, 3), np.int64), 1)


def test_residual_near_zero_is_exact():
    true, x = planted((20, 6, 5), 2)
    right = khatri_rao(true[1:]).T
    for dtype, limit in (np.float64, 1e-15), (np.float32, 1e-7):
        model = [(true[0], right)]
        (exact,) = blocks.relative_residuals(x.astype(dtype), model, np.linalg.norm(x))
        assert exact < limit


def test_agrees_with_tensorly():
    from tensorly.decomposition import non_negative_parafac_hals

    _, x = planted((40, 10, 9), 3, seed=2, noise=0.5)
    start = hals.random_start(x.shape, 3, np.linalg.norm(x), seed=0)
    ours = hals.ncp_hals(x, 3, start=start, tol=1e-8).history[-1]
    _, errors = non_negative_parafac_hals(
        x, 3, init=(None, start), tol=1e-8, n_iter_max=500, return_errors=True
    )
    assert ours == pytest.approx(float(errors[-1]), rel=5e-3)
