"""Rows on a torch device: the same fits as by NumPy. Torch's CPU device stands for all."""

import json
import sys
import warnings

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_factor import neuron_tensor
from test_fused import fit
from test_hals import planted

from vitxr.errors import ArgumentError, DataError, DependencyError
from vitxr.factor import blocks, choose_rank, device, factorize, fit_ensemble, hals
from vitxr.factor.kernels import khatri_rao
from vitxr.factor.rows import LocalRows, Pass
from vitxr.factor.rules import Rules

torch = pytest.importorskip("torch")

CPU = {"device": "cpu"}


def same(found, here, rtol=1e-9, factors=1e-8):
    for a, b in zip(found, here, strict=True):
        assert (a.converged, len(a.history)) == (b.converged, len(b.history))
        np.testing.assert_allclose(a.history, b.history, rtol=rtol)
        for ours, theirs in zip(a.factors, b.factors, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=factors, atol=factors * theirs.max())


def one_pass(holder, factor, task):
    holder.take(factor.copy())
    sums = holder.run(task)
    return [holder.give(slice(None)), sums.y, *sums.squares, sums.inner, sums.totals]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    single=st.booleans(),
    nonnegative=st.booleans(),
    penalty=st.booleans(),
    update=st.booleans(),
    streams=st.booleans(),
    rows=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_pass_is_that_of_numpy(
    shape, ranks, single, nonnegative, penalty, update, streams, rows, seed
):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(np.float32 if single else np.float64)
    x = rng.random(shape).astype(dtype)
    sides = [[rng.random((r, n)) for n in shape[1:]] for r in sorted(ranks)]
    columns = sum(ranks)
    task = Pass(
        np.concatenate([khatri_rao(s) for s in sides]).astype(dtype),
        [np.prod([f @ f.T for f in s], axis=0) for s in sides],
        1e-6 if update else None,
        nonnegative,
        rng.random((columns, 1)).astype(dtype) if penalty else None,
    )
    factor = rng.random((columns, shape[0])).astype(dtype)
    expected = one_pass(LocalRows(x, 64, blocks.Pool(1, None)), factor, task)
    given = da.from_array(x, chunks=tuple(max(1, n // 2) for n in shape)) if streams else x
    holder = device.DeviceRows(given, "cpu", columns, rows)
    holder.stays = not streams
    holder.load()
    for ours, theirs in zip(one_pass(holder, factor, task), expected, strict=True):
        assert ours.dtype == theirs.dtype
        scale = np.abs(theirs).max(initial=1)
        # Sweeps of dependent columns amplify rounding.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=(2e-4 if single else 1e-11) * scale)
    mine = holder.give(slice(0, 1))
    mine += 1
    assert not np.array_equal(mine, holder.give(slice(0, 1)))  # a copy


@pytest.mark.parametrize("shape", [(140, 9), (140, 5, 6), (4, 150, 5), (5, 3, 80, 2)])
@pytest.mark.parametrize("rows", [None, 33])
def test_fits_are_those_of_numpy(shape, rows):
    """Models of several ranks, which leave at different times, along the first mode or not."""
    _, x = planted(shape, 4, noise=0.3)
    given = {"ranks": (3, 1, 4, 3), "tol": 3e-3, "rows": rows}
    here, _ = fit(x, **given)
    assert len({len(f.history) for f in here}) > 1
    same(fit(x, **CPU, **given)[0], here)


def test_float32_to_rounding():
    _, x = planted((3000, 7, 6), 4, noise=0.3)  # more rows than are summed in float32
    x = x.astype(np.float32)
    given = {"ranks": (3, 4, 3), "max_iter": 12, "tol": 0.0}
    here, _ = fit(x, **given)
    found, _ = fit(x, **given, **CPU)
    same(found, here, rtol=5e-5, factors=2e-3)  # 1e-7 / residual^2, several times over
    exact, _ = fit(x.astype(float), **given)
    for ours, numpy_s, best in zip(found, here, exact, strict=True):
        off, usual = (abs(f.history - best.history).max() for f in (ours, numpy_s))
        assert off < 3 * usual + 1e-6


@pytest.mark.parametrize(
    "rules",
    [
        Rules((True, False, False), (False,) * 3, (0.01, 0, 0)),
        Rules((True,) * 3, (False,) * 3, (0.02, 0.01, 0)),
        Rules((False,) * 3, (True, False, False), (0.0,) * 3),
        Rules((False, True, True), (False, True, False), (0.0,) * 3),
    ],
)
def test_rules(rules):
    _, x = planted((60, 5, 6), 4, noise=0.3)
    given = {"rules": rules, "max_iter": 6, "ranks": (3, 2, 2)}
    here, _ = fit(x - 0.1, **given)
    found, _ = fit(x - 0.1, **given, **CPU)
    same(found, here)
    for a, b in zip(found, here, strict=True):
        np.testing.assert_allclose(a.penalized, b.penalized, rtol=1e-9)


@pytest.mark.parametrize("chunks", [(17, 9, 8), (90, 3, 8), (13, 4, 3)])
@pytest.mark.parametrize("fits", [True, False])
def test_chunks_go_over_once_if_they_fit_and_in_every_pass_if_not(chunks, fits, monkeypatch):
    _, x = planted((90, 9, 8), 3, noise=0.2)
    read = []

    def count(block, block_info=None):
        read.append(block_info[0]["chunk-location"])
        return block

    lazy = da.from_array(x, chunks=chunks).map_blocks(count, dtype=x.dtype, meta=x[:0])
    given = {"max_iter": 5, "tol": 0.0}
    here, _ = fit(da.from_array(x, chunks=chunks), **given)
    norm = float(np.linalg.norm(x))
    starts = [hals.random_start(x.shape, r, norm, s) for s, r in enumerate((3, 1, 4, 3))]
    if not fits:
        monkeypatch.setattr(device, "MEMORY_BYTES", x.nbytes - 1)
    with blocks.own_threads(1) as pool:
        found = hals.fit_models(lazy, starts, norm=norm, pool=pool, **given, **CPU)
    same(found, here)
    early = blocks.blocked_mode(lazy) > 0  # one pass more
    assert len(read) == lazy.npartitions * (1 if fits else 5 + early)


def test_the_memory_of_a_device(monkeypatch):
    """What fits stays, what does not comes over in every pass; less than a block is refused."""
    _, x = planted((9000, 8, 7), 3)
    lazy = da.from_array(x, chunks=(1000, 8, 7))
    stays = {}
    for free in (1 << 40, x.nbytes, 1000):
        monkeypatch.setattr(device, "_free", lambda _, free=free: free)
        try:
            stays[free] = device.DeviceRows(lazy, "cpu", 4).stays
        except DataError as error:
            stays[free] = str(error)
    assert stays[1 << 40] is True
    assert stays[x.nbytes] is False
    assert "4 components of all models side by side, with one block" in stays[1000]
    t = xr.DataArray(x, dims=("neuron", "image", "shift"))
    with pytest.raises(DataError, match="free memory there, or leave device out"):
        factorize(t, 2, **CPU)


def test_full_memory_during_a_pass_says_what_to_do(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(device._Group, "update", full)
    _, x = planted((20, 5, 4), 2)
    with pytest.raises(DataError, match=r"the memory of cpu is full.*fit fewer models"):
        fit(x, **CPU)


@pytest.mark.parametrize("set_to", ["highest", "high", "medium", "new"])
def test_products_in_full_and_settings_as_they_were(set_to, monkeypatch):
    def settings():
        newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
        mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
        return newer, getattr(mkldnn, "fp32_precision", None)

    seen = []
    update = device._Group.update

    def look(self, tile, mttkrp, target, nonnegative):
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        seen.append((torch.backends.cuda.matmul.allow_tf32, mttkrp.dtype))
        update(self, tile, mttkrp, target, nonnegative)

    monkeypatch.setattr(device._Group, "update", look)
    _, x = planted((40, 5, 4), 3, noise=0.2)
    x = x.astype(np.float32)
    here, _ = fit(x, max_iter=3)
    try:
        if set_to != "new":
            torch.set_float32_matmul_precision(set_to)
        elif settings()[0] is None:
            pytest.skip("torch before 2.9 has one setting")
        else:  # mixed with the older one, which raises when it is read
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        before = settings()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            found, _ = fit(x, max_iter=3, **CPU)
        assert settings() == before
        if set_to != "new":
            assert torch.get_float32_matmul_precision() == set_to
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("highest", False), (False, torch.float32)}
    same(found, here, rtol=3e-5, factors=1e-3)  # float32, summed in another order


def test_interrupted_models_are_told_from_finished_ones():
    _, x = planted((120, 8, 9), 3, noise=0.3)
    seen = []

    def stop(number, iteration, objective, done):
        seen.extend([number] * done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    given = {"max_iter": 500, "tol": 1e-3, **CPU}
    fits, _ = fit(x, callback=stop, **given)
    whole, _ = fit(x, **given)
    assert [i for i, f in enumerate(fits) if not f.interrupted] == sorted(seen)
    for i in seen:
        assert fits[i].converged
        np.testing.assert_array_equal(fits[i].history, whole[i].history)
        np.testing.assert_array_equal(fits[i].factors[0], whole[i].factors[0])


def test_models_that_do_not_fit_side_by_side_are_fitted_in_turn(monkeypatch):
    _, x = planted((40, 6, 5), 3, noise=0.2)
    here, _ = fit(x)
    monkeypatch.setattr(hals, "FUSED_BYTES", 1000)
    same(fit(x, **CPU)[0], here)


def test_files_and_read_only_arrays_without_a_warning(tmp_path):
    _, x = planted((30, 6, 5), 3, noise=0.2)
    np.save(tmp_path / "x.npy", x)
    here, _ = fit(x)
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (np.load(tmp_path / "x.npy", mmap_mode="r"), x):
            same(fit(other, **CPU)[0], here)


def test_labelled_fits_and_ensembles():
    t = neuron_tensor(noise=0.3).astype("float64")
    for data in (t, t.chunk(neuron=3)):
        found = data.vit.factorize(2, device="cpu", max_iter=8)
        here = factorize(t, 2, max_iter=8, compress=False)
        for name in ("objective_history", "objective", "weight", "neuron_factor", "image_factor"):
            np.testing.assert_allclose(found[name], here[name], rtol=1e-9, atol=1e-12)
    assert "device" not in json.loads(found.attrs["options"])  # resumed anywhere
    given = {"progress": False, "max_iter": 8}
    tree = fit_ensemble(t, [1, 2], 2, device="auto", floors=True, **given)
    here = fit_ensemble(t, [1, 2], 2, floors=True, **given)
    for name in ("objective", "similarity", "shuffled_objective"):
        np.testing.assert_allclose(tree[name], here[name], rtol=1e-8)
    again = fit_ensemble(t, [1, 2, 3], 2, resume=tree, **given)
    np.testing.assert_array_equal(again.objective.sel(rank=[1, 2]), tree.objective)


def test_refused_before_work(monkeypatch):
    t = neuron_tensor()
    with pytest.raises(ArgumentError, match=r"device='cuda:99' cannot be used: .*Pass 'auto'"):
        factorize(t, 2, device="cuda:99")
    with pytest.raises(ArgumentError, match="device='gpu' cannot be used"):
        fit_ensemble(t, [2], device="gpu", progress=False)
    with pytest.raises(ArgumentError, match="device is 0; expected 'auto'"):
        factorize(t, 2, device=0)
    with pytest.raises(ArgumentError, match="device='meta' cannot be used: it holds no numbers"):
        factorize(t, 2, device="meta")
    with pytest.raises(ArgumentError, match="device is 'cpu' and client is given"):
        factorize(t, 2, client=object(), **CPU)
    with pytest.raises(ArgumentError, match="device is 'cpu' and a mask is given"):
        factorize(t, 2, mask=t.notnull(), **CPU)
    with pytest.raises(ArgumentError, match="choose_rank takes no device"):
        choose_rank(t, [2], **CPU)
    with pytest.raises(ArgumentError, match=r"compress is True.*device"):
        factorize(t, 2, compress=True, **CPU)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DependencyError, match=r"device='cuda' needs torch.*vitxr\[models\]"):
        factorize(t, 2, device="cuda")
