"""Shift-aligned nonnegative CP: planted rolls, a literal version, invariance, monotony."""

import json

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import rfft2
from test_smooth import tensor

import vitxr
from vitxr.errors import ArgumentError, DataError
from vitxr.factor import (
    blocks,
    checks,
    explained,
    factorize,
    factorize_aligned,
    reconstruct,
    roll,
    rolling,
    transform,
)
from vitxr.factor.rolling import Rolled, best_rolls, places, rolled
from vitxr.names import validate

SIZES = (4, 6)


def planted(neurons=14, images=8, rank=2, noise=0.0, seed=0, dtype="float64", plain=False):
    """Components with shift profiles of their own, every response rolled at random."""
    rng = np.random.default_rng(seed)
    t = tensor(neurons=neurons, images=images).astype(dtype)
    a, b = (rng.gamma(0.7, size=(n, rank)) for n in (neurons, images))
    c = rng.gamma(0.3, size=(rank, *SIZES))
    for r in range(rank):  # the largest entry first: as the fit settles its rolls
        y, x = divmod(int(c[r].argmax()), SIZES[1])
        c[r] = np.roll(c[r], (-y, -x), (0, 1))
    data = np.einsum("ir,jr,rs->ijs", a, b, c.reshape(rank, -1))
    data += noise * data.std() * rng.random(data.shape)
    steps = rng.integers(0, np.reshape(SIZES, (2, 1, 1)), (2, neurons, images)) * (not plain)
    for i, j in np.ndindex(neurons, images):
        grid = np.roll(data[i, j].reshape(SIZES), -steps[:, i, j], (0, 1))
        data[i, j] = grid.ravel()
    return t.copy(data=data.astype(dtype)), steps


def shorter(steps):
    size = np.reshape(SIZES, (2, 1, 1))
    return (steps + size // 2) % size - size // 2


def rolls_of(f):
    return np.stack([f.roll_y.values, f.roll_x.values])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_planted_rolls_of_one_component(dtype):
    t, steps = planted(rank=1, dtype=dtype)
    f = factorize_aligned(t, 1)
    np.testing.assert_array_equal(rolls_of(f), shorter(steps))
    assert float(f.objective) < 1e-5
    assert bool(f.converged)
    validate(f)


def test_planted_rolls_at_known_noise():
    """Rolls and factors of three components are found; plain CP finds neither."""
    t, steps = planted(neurons=40, images=12, rank=3, noise=0.2)
    fits = [factorize_aligned(t, 3, random_state=seed) for seed in range(3)]
    f = min(fits, key=lambda fit: float(fit.objective))
    energy = (t**2).sum("shift").values
    strong = energy > np.quantile(energy, 0.2)
    # Two rolls may both differ from the planted ones by the same: profiles settle it up to that.
    difference = (rolls_of(f) - steps)[:, strong] % np.reshape(SIZES, (2, 1))
    _, counts = np.unique(difference, axis=1, return_counts=True)
    assert counts.max() / strong.sum() > 0.95
    plain = min(float(factorize(t, 3, random_state=seed).objective) for seed in range(4))
    assert float(f.objective) < 0.1 < 0.5 < plain


def test_nothing_is_gained_where_nothing_is_rolled():
    t, _ = planted(rank=2, plain=True)
    fits = [factorize_aligned(t, 2, tol=1e-7, random_state=seed) for seed in range(3)]
    f = min(fits, key=lambda fit: float(fit.objective))
    assert float(f.objective) < 1e-4
    assert (rolls_of(f) == rolls_of(f)[:, :1, :1]).mean() > 0.9


def literal(x, rank, seed, iterations, sizes):
    """The same iteration: every roll tried, HALS row by row, on the rolled tensor."""
    fit = Rolled(x, sizes, np.linalg.norm(x), blocks.Pool(1, None))
    fit.start(rank, seed)
    a, b, c = (f.T.copy() for f in fit.factors)
    rolls = fit.rolls.copy()
    history = []
    every = [(y, s) for y in range(sizes[0]) for s in range(sizes[1])]
    for iteration in range(iterations):
        moved = np.empty_like(x)
        for i, j in np.ndindex(x.shape[:2]):
            grid, model = x[i, j].reshape(sizes), np.einsum("r,r,sr->s", a[i], b[j], c)
            turned = [np.roll(grid, d, (0, 1)).ravel() for d in every]
            if iteration < rolling.EVERY or iteration % rolling.EVERY == 0:
                errors = [np.linalg.norm(v - model) for v in turned]
                if errors[rolls[i, j]] > min(errors) + 1e-9:
                    rolls[i, j] = int(np.argmin(errors))
            moved[i, j] = turned[rolls[i, j]]
        factors = [a, b, c]
        for mode in range(3):
            p, q = (factors[m] for m in range(3) if m != mode)
            m = np.moveaxis(moved, mode, 0).reshape(x.shape[mode], -1)
            m = m @ np.einsum("ir,jr->ijr", p, q).reshape(-1, rank)
            g = (p.T @ p) * (q.T @ q)
            for _ in range(3):
                for r in range(rank):
                    rest = factors[mode] @ g[:, r] - factors[mode][:, r] * g[r, r]
                    factors[mode][:, r] = np.maximum((m[:, r] - rest) / max(g[r, r], 1e-6), 0)
        left = moved - np.einsum("ir,jr,sr->ijs", a, b, c)
        history.append(np.linalg.norm(left) / np.linalg.norm(x))
    return history, rolls


@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_literal_iteration(rank):
    t, _ = planted(neurons=7, images=4, rank=2, noise=0.5, seed=3)
    fit = Rolled(t.values, SIZES, np.linalg.norm(t.values), blocks.Pool(1, None))
    fit.start(rank, 5)
    found, _ = fit.iterate(-1, 11)  # the last one, at the limit, looks for rolls as in the schedule
    history, rolls = literal(t.values, rank, 5, 11, SIZES)
    np.testing.assert_allclose(found, history, rtol=1e-8)
    np.testing.assert_array_equal(fit.rolls, rolls)


@settings(max_examples=40)
@given(
    ny=st.integers(1, 5),
    nx=st.integers(1, 5),
    n=st.integers(1, 6),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 10**6),
)
def test_best_rolls_are_best(ny, nx, n, dtype, seed):
    rng = np.random.default_rng(seed)
    x, model = (rng.random((n, ny * nx)).astype(dtype) for _ in range(2))
    table = places((ny, nx))
    for d, (y, s) in enumerate(np.ndindex(ny, nx)):
        expected = np.roll(x.reshape(n, ny, nx), (y, s), (1, 2)).reshape(n, -1)
        np.testing.assert_array_equal(rolled(x, np.full(n, d), table), expected)
    spectra = rfft2(model.reshape(n, ny, nx)).reshape(n, -1)
    current = rng.integers(0, ny * nx, n)
    found = best_rolls(x, spectra, current, (ny, nx))
    errors = [
        np.linalg.norm(rolled(x, np.full(n, d), table) - model, axis=1) for d in range(ny * nx)
    ]
    tight = 1e-4 if dtype == "float32" else 1e-8
    chosen = np.array(errors)[found, np.arange(n)]
    np.testing.assert_allclose(chosen, np.min(errors, axis=0), rtol=tight, atol=tight)
    again = best_rolls(x, spectra, found, (ny, nx))
    np.testing.assert_array_equal(again, found)
    np.testing.assert_array_equal(best_rolls(x, spectra * 0, current, (ny, nx)), current)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_objective_never_rises_and_is_exact(dtype, rank):
    t = tensor(neurons=20, images=6).astype(dtype) ** 3
    f = factorize_aligned(t, rank, max_iter=80)
    slack = 1e-6 if dtype == "float32" else 1e-12
    assert (np.diff(f.objective_history) <= slack).all()
    x, m = roll(t, f).values.astype(float), reconstruct(f).values.astype(float)
    residual = np.linalg.norm(x - m) / np.linalg.norm(x)
    assert float(f.objective) == pytest.approx(residual, rel=1e-6)
    assert float(f.objective) == pytest.approx(float(f.objective_history[-1]), rel=1e-5)
    assert float(explained(f, roll(t, f)).r2) == pytest.approx(1 - residual**2, rel=1e-5)


def test_rolling_the_data_rolls_the_rolls():
    t, _ = planted(rank=2, noise=0.3, seed=1)
    steps = np.random.default_rng(9).integers(0, np.reshape(SIZES, (2, 1, 1)), (2, *t.shape[:2]))
    moved = t.copy(deep=True)
    for i, j in np.ndindex(t.shape[:2]):
        grid = t.values[i, j].reshape(SIZES)
        moved[i, j] = np.roll(grid, steps[:, i, j], (0, 1)).ravel()
    f, g = (factorize_aligned(x, 2, max_iter=40) for x in (t, moved))
    np.testing.assert_array_equal(rolls_of(g), shorter(rolls_of(f) - steps))
    for name in ("neuron_factor", "image_factor", "shift_factor", "weight", "objective"):
        np.testing.assert_allclose(g[name], f[name], rtol=1e-6, atol=1e-9)


def test_labels_offsets_and_how_rolls_are_settled():
    t, _ = planted(rank=2, dtype="float32")
    t.attrs |= {"smoothing": "{}"}
    f = factorize_aligned(t.transpose("shift", "image", "neuron"), 2)
    assert f.roll_y.dims == ("image", "neuron")
    np.testing.assert_array_equal(f.roll_offset_y, f.roll_y * 8)
    np.testing.assert_array_equal(f.roll_offset_x, f.roll_x * 8)
    assert f.roll_x.min() >= -3
    assert f.roll_x.max() <= 2
    profile = (f.weight * f.shift_factor).sum("component")
    assert int(profile.values.argmax()) == 0
    assert f.shift_factor.indexes["shift"].equals(t.indexes["shift"])
    assert f.neuron_factor.dtype == "float32"
    assert f.attrs["method"] == "ncp_aligned"
    assert f.attrs["smoothing"] == "{}"
    assert set(json.loads(f.attrs["versions"])) == {"vitxr", "numpy", "scipy"}
    again = factorize_aligned(t.transpose("shift", "image", "neuron"), 2)
    assert again.drop_vars("seconds").identical(f.drop_vars("seconds"))


def test_silent_responses_are_not_rolled():
    t, _ = planted(rank=1)
    t[3] = 0
    t[:, 2] = 0
    f = factorize_aligned(t, 1)
    assert (rolls_of(f)[:, 3] == 0).all()
    assert (rolls_of(f)[:, :, 2] == 0).all()
    assert (rolls_of(f) != 0).any()
    assert (f.neuron_factor[3] == 0).all()


@settings(max_examples=8)
@given(data=st.data())
def test_blocks_chunks_and_threads_do_not_matter(data):
    t, _ = planted(neurons=6, images=3, rank=2, noise=0.3, seed=2)
    chunks = [data.draw(st.integers(max(1, n // 3), n)) for n in t.shape]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rolling, "BLOCK_BYTES", data.draw(st.sampled_from([1, 4000, 10**7])))
        patch.setattr(checks, "IN_MEMORY_BYTES", data.draw(st.sampled_from([0, 10**9])))
        lazy = t.copy(data=da.from_array(t.values, chunks))
        f = factorize_aligned(lazy, 2, max_iter=3, tol=0)
    g = factorize_aligned(t, 2, max_iter=3, tol=0)
    np.testing.assert_allclose(f.objective_history, g.objective_history, rtol=1e-9)
    np.testing.assert_array_equal(rolls_of(f), rolls_of(g))
    with blocks.own_threads(3) as pool:
        fit = Rolled(t.values, SIZES, np.linalg.norm(t.values), pool)
        fit.start(2, 0)
        history, _ = fit.iterate(0, 3)
    np.testing.assert_allclose(history, g.objective_history, rtol=1e-9)


def test_roll_and_back():
    t, _ = planted(dtype="float32")
    f = factorize_aligned(t, 2, max_iter=5)
    there = roll(t, f)
    for i, j in np.ndindex(t.shape[:2]):
        grid = np.roll(t.values[i, j].reshape(SIZES), rolls_of(f)[:, i, j], (0, 1))
        np.testing.assert_array_equal(there.values[i, j], grid.ravel())
    assert there.coords["roll_y"].dims == ("neuron", "image")
    assert roll(there, f, back=True).identical(t)
    lazy = roll(t.chunk(neuron=3, image=2, shift=5), f)
    assert lazy.chunks is not None
    xr.testing.assert_identical(lazy.compute(), there)
    assert roll(t.transpose("shift", "neuron", "image"), f).dims == ("shift", "neuron", "image")
    model = roll(reconstruct(f), f, back=True)
    assert model.chunks is not None
    residual = np.linalg.norm(t - model) / np.linalg.norm(t)
    assert float(f.objective) == pytest.approx(residual, rel=1e-5)
    with pytest.raises(ArgumentError, match="has been rolled already: give it as it is with back="):
        roll(there, f)
    with pytest.raises(ArgumentError, match="has not been rolled"):
        roll(t, f, back=True)
    with pytest.raises(DataError, match="differ in the labels of image"):
        roll(t.isel(image=slice(3)), f)
    with pytest.raises(DataError, match="no roll_y and roll_x"):
        roll(t, f.drop_vars("roll_x"))
    with pytest.raises(DataError, match=r"has dims \(neuron, shift\); the rolls are of neuron"):
        roll(t.isel(image=0), f)


def test_the_unrolled_tensor_is_not_mistaken_for_the_rolled_one(tmp_path):
    t, _ = planted()
    f = factorize_aligned(t, 2, max_iter=5)
    for wrong in (t, roll(t, f).assign_coords(roll_y=f.roll_y + 1)):
        with pytest.raises(DataError, match=r"give vitxr.factor.roll\(t, f\)"):
            explained(f, wrong)
    with pytest.raises(ArgumentError, match="the model is of rolled responses"):
        transform(f, roll(t, f), dim="image")
    vitxr.save(f, tmp_path / "f.nc")
    opened = vitxr.open(tmp_path / "f.nc").compute()
    np.testing.assert_array_equal(roll(t, opened), roll(t, f))
    assert f.vit.embed(2).score.shape == (14, 2)


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (tensor(224, 224, 11), DataError, r"shift_y does not close .*its 21 steps of 11 px do not"),
        (tensor(32, 44), DataError, r"shift_x does not close after one period: its 6 steps of 8"),
        (tensor(scheme="raster"), DataError, "shift_x does not close.*scheme 'grid'"),
        (tensor(32, 32, 32), DataError, "has one shift"),
        (tensor(stack=False), DataError, r"expected three, one of them the stacked shift"),
        (tensor().mean("image"), DataError, r"has dims \(neuron, shift\); expected three"),
        (tensor() - 0.5, DataError, "negative value"),
        (tensor() * 0, DataError, "zero everywhere"),
        (tensor().values, ArgumentError, "expected a DataArray with labels"),
    ],
)
def test_refusals(t, error, message):
    with pytest.raises(error, match=message):
        factorize_aligned(t, 2)


def test_what_is_rolled_is_refused_before_the_fit(monkeypatch):
    t, _ = planted()
    there = roll(t, factorize_aligned(t, 1, max_iter=2))
    monkeypatch.setattr(Rolled, "start", None)
    with pytest.raises(ArgumentError, match=r"have been rolled already.*back=True"):
        factorize_aligned(there, 2)


def test_arguments_are_those_of_factorize():
    for arguments in ({"rank": 0}, {"tol": -1}, {"max_iter": 0}, {"random_state": -1}):
        with pytest.raises(ArgumentError, match=next(iter(arguments))):
            factorize_aligned(tensor(), **{"rank": 2, **arguments})


def test_accessor():
    t, _ = planted(rank=1)
    f = t.vit.factorize_aligned(1, max_iter=3)
    assert f.drop_vars("seconds").identical(
        factorize_aligned(t, 1, max_iter=3).drop_vars("seconds")
    )


def test_rolled_coordinates_stay_in_memory():
    t, _ = planted(rank=1)
    lazy = t.copy(data=t.chunk(image=1).data)
    aligned = roll(lazy, factorize_aligned(t, 1, max_iter=2))
    assert aligned.chunks is not None
    assert all(coord.chunks is None for coord in aligned.coords.values())
