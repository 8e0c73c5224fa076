"""Many models, any blocks, threads and compression: what is fused is what is fitted alone."""

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from test_hals import planted, slow_ncp_hals

from vitxr.factor import blocks, compress, factorize, hals

RANKS = (3, 1, 4, 3)


def fit(x, ranks=RANKS, threads=1, seed=0, **given):
    norm = float(np.sqrt(blocks.squared_norm(x)))
    starts = [hals.random_start(x.shape, r, norm, seed + s) for s, r in enumerate(ranks)]
    given = {"tol": 1e-5, "max_iter": 60, **given}
    with blocks.own_threads(threads) as pool:
        return hals.fit_models(x, starts, norm=norm, pool=pool, **given), starts


@pytest.mark.parametrize("shape", [(140, 9), (140, 5, 6), (4, 150, 5), (4, 3, 130), (5, 3, 80, 2)])
@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (33, 2), (64, 3), (None, 2)])
def test_fused_models_equal_the_slow_transcription(shape, rows, threads):
    _, x = planted(shape, 4, noise=0.3)
    fits, starts = fit(x, threads=threads, rows=rows, max_iter=12)
    for one, start in zip(fits, starts, strict=True):
        factors, history = slow_ncp_hals(x, start, tol=1e-5, max_iter=12)
        assert len(one.history) == len(history)
        np.testing.assert_allclose(one.history, history, rtol=1e-6)
        for ours, theirs in zip(one.factors, factors, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunks", [(7, 9, 8), (23, 2, 8), (23, 9, 3), (5, 4, 3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_chunked_and_mapped_equal_memory(chunks, threads, tmp_path):
    _, x = planted((23, 9, 8), 3, noise=0.2)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected, _ = fit(x)
    for other in (da.from_array(x, chunks=chunks), mapped, np.asfortranarray(x)):
        found, _ = fit(other, threads=threads)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.history, b.history, rtol=1e-9)


@pytest.mark.parametrize("compressed", [False, True])
def test_bit_equal_from_run_to_run(compressed):
    _, x = planted((700, 12, 11), 4, noise=0.4)
    x = x.astype(np.float32)
    one, other = (fit(x, threads=2, compressed=compressed)[0] for _ in range(2))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.history, b.history)
        for f, g in zip(a.factors, b.factors, strict=True):
            np.testing.assert_array_equal(f, g)


def test_models_that_do_not_fit_side_by_side_are_fitted_in_turn(monkeypatch):
    _, x = planted((40, 6, 5), 3, noise=0.2)
    together, _ = fit(x)
    monkeypatch.setattr(hals, "FUSED_BYTES", 1000)
    apart, _ = fit(x)
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a.history, b.history, rtol=1e-9)


def test_compression_is_nearly_the_best_there_is():
    _, x = planted((500, 12, 200), 6, noise=0.3)
    with blocks.own_threads(2) as pool:
        small = compress.compress(x, 5, pool)
    bases = [small.rows, *small.sides]
    assert [b is None for b in bases] == [False, True, False]
    for basis in (bases[0], bases[2]):
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-10)
    core = small.core.reshape(len(bases[0].T), 12, len(bases[2].T))
    missing = np.linalg.norm(
        x - np.einsum("ajc,ia,kc->ijk", core, bases[0], bases[2], optimize=True)
    )
    # The best choice for each mode by itself would miss no more than both together.
    least = 0.0
    for mode, basis in ((0, bases[0]), (2, bases[2])):
        unfolded = np.moveaxis(x, mode, 0).reshape(len(basis), -1)
        tail = np.linalg.svd(unfolded, compute_uv=False)[basis.shape[1] :]
        least = np.hypot(least, np.linalg.norm(tail))
    assert missing < 1.1 * least


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_model_within_the_bases_is_fitted_as_without(mode):
    """A tensor of low rank is compressed without loss: only the tighter tolerance differs."""
    x = np.moveaxis(planted((420, 10, 170), 4)[1], 0, mode)
    plain, _ = fit(x, ranks=(3,), tol=0.0, max_iter=16)
    inside, _ = fit(x, ranks=(3,), tol=0.0, max_iter=16, compressed=True)
    assert inside[0].compressed_iterations == 16 - 2 - compress.FIRST
    # Where modes come before the long one, these are not updated again before the finish.
    same = 16 if mode == 0 else 14
    np.testing.assert_allclose(inside[0].history[:same], plain[0].history[:same], rtol=1e-6)


def test_the_first_iterations_are_those_on_the_tensor():
    _, x = planted((420, 10, 170), 4, noise=0.5)
    plain, _ = fit(x, tol=-np.inf, max_iter=30)
    inside, _ = fit(x, tol=-np.inf, max_iter=30, compressed=True)
    for a, b in zip(inside, plain, strict=True):
        first = a.history[: compress.FIRST]
        np.testing.assert_allclose(first, b.history[: compress.FIRST], rtol=1e-10)
        assert abs(a.history - b.history).max() > 1e-8
    # A fit that ends there is never compressed.
    loose, _ = fit(x, ranks=(1,), tol=0.3, max_iter=30, compressed=True)
    assert (loose[0].converged, loose[0].compressed_iterations, len(loose[0].history)) == (
        True,
        0,
        2,
    )


def residual(x, one, norm):
    model = np.einsum("ir,jr,kr->ijk", *one.factors, optimize=True)
    return np.linalg.norm(x - model) / norm


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_compressed_is_no_worse_than_plain_over_seeds(noise):
    _, x = planted((420, 8, 160), 4, seed=2, noise=noise)
    x = x.astype(np.float32)
    plain, _ = fit(x, ranks=(4,) * 30, max_iter=500)
    inside, _ = fit(x, ranks=(4,) * 30, max_iter=500, compressed=True)
    norm = np.linalg.norm(x.astype(float))
    final = np.array([[residual(x, f, norm) for f in fits] for fits in (plain, inside)])
    assert ((final[1] - final[0]) / final[0]).mean() < 1e-4
    # Reported objectives are those of the tensor (as exact as float32 products are), and so is
    # the stop.
    for one, direct in zip(inside, final[1], strict=True):
        assert one.history[-1] == pytest.approx(direct, abs=2e-7 / direct)
        assert one.converged
        assert one.history[-2] - one.history[-1] < 1e-5
        assert 2 <= len(one.history) - one.compressed_iterations < len(one.history)


def test_factorize_compresses_where_it_pays_or_as_told():
    _, x = planted((1500, 20, 320), 3, noise=0.3)
    t = xr.DataArray(x.astype(np.float32), dims=("neuron", "image", "shift"))
    default, off = factorize(t, 2), factorize(t, 2, compress=False)
    assert compress.pays(t.shape, 2)
    assert int(default.compressed_iterations) > 0
    assert int(off.compressed_iterations) == 0
    assert float(default.objective) == pytest.approx(float(off.objective), rel=1e-3)
    small = t.isel(neuron=slice(50))
    assert int(factorize(small, 2).compressed_iterations) == 0
    assert int(factorize(small, 2, compress=True, tol=1e-9).compressed_iterations) > 0
    few = factorize(t, 2, compress=True, max_iter=2)
    assert int(few.compressed_iterations) == 0
    assert int(few.iterations) == 2


@pytest.mark.parametrize("compressed", [False, True])
def test_interrupted_models_are_told_from_finished_ones(compressed):
    _, x = planted((420, 8, 160), 3, noise=0.3)
    seen = []

    def stop(number, iteration, objective, done):
        seen.extend([number] * done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    fits, _ = fit(x, threads=2, compressed=compressed, callback=stop, max_iter=500)
    whole, _ = fit(x, threads=2, compressed=compressed, max_iter=500)
    assert [i for i, f in enumerate(fits) if not f.interrupted] == sorted(seen)
    for i in seen:
        assert fits[i].converged
        np.testing.assert_array_equal(fits[i].history, whole[i].history)
        np.testing.assert_array_equal(fits[i].factors[0], whole[i].factors[0])


def test_errors_in_a_thread_come_out():
    def fails(share):
        if share == 1:
            raise ValueError("share 1")
        return share

    with blocks.own_threads(2) as pool, pytest.raises(ValueError, match="share 1"):
        pool.map(fails, [0, 1])


@pytest.mark.parametrize("mode", [0, 1])
def test_a_wide_model_beside_it_changes_nothing(mode):
    # 40 components want a wider compression than 4 do, and 2 none of these.
    x = np.moveaxis(planted((420, 8, 9), 4)[1], 0, mode)
    norm = np.linalg.norm(x)
    starts = [hals.random_start(x.shape, rank, norm, seed=rank) for rank in (4, 40, 2)]
    given = {"norm": norm, "tol": 1e-4, "max_iter": 40}
    with blocks.own_threads(1) as pool:
        together = hals.fit_models(x, starts, pool=pool, compressed=[True, True, False], **given)
        for start, flag, fit in zip(starts, [True, True, False], together, strict=True):
            (alone,) = hals.fit_models(x, [start], pool=pool, compressed=flag, **given)
            assert (alone.compressed_iterations > 0) == flag
            assert alone.compressed_iterations == fit.compressed_iterations
            np.testing.assert_allclose(fit.history, alone.history, rtol=1e-8)
            for a, b in zip(fit.factors, alone.factors, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
