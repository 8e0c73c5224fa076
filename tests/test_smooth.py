"""The shift lattice, and smoothing over it: scipy row by row, chunked, lazy, periodic or not."""

import json

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

import vitxr
from vitxr.errors import ArgumentError, DataError
from vitxr.factor import factorize, smooth
from vitxr.factor.lattice import lattice


def tensor(height=32, width=48, step=8, scheme="grid", neurons=5, images=3, seed=0, stack=True):
    """Random responses on a real lattice of shifts."""
    grid = vitxr.ShiftGrid(step, scheme).lattice(height, width)
    shape = (neurons, images, *grid.sizes.values())
    data = np.random.default_rng(seed).random(shape).astype(np.float32)
    dims = ("neuron", "image", "shift_y", "shift_x")
    coords = {**grid.coords, "image": [f"im{i}" for i in range(images)]}
    t = xr.DataArray(data, dims=dims, coords=coords, name="activation", attrs={"layer": 2})
    return t.stack(shift=("shift_y", "shift_x")) if stack else t


def literal(t, sigma, mode, sizes):
    """The notebook's loop over neurons and images."""
    out = np.empty(t.shape, t.dtype)
    for i in range(t.shape[0]):
        for j in range(t.shape[1]):
            grid = gaussian_filter(t.values[i, j].reshape(sizes), sigma=sigma, mode=mode)
            out[i, j] = grid.reshape(-1)
    return out


@pytest.mark.parametrize(
    ("height", "width", "step", "scheme", "steps", "why"),
    [
        (32, 48, 8, "grid", (8, 8), ("", "")),
        (32, 48, 16, "grid", (16, 16), ("", "")),
        (224, 224, 11, "grid", (0, 0), ("its 21 steps of 11 px do not make the period, 224",) * 2),
        (32, 44, 8, "grid", (8, 0), ("", "its 6 steps of 8 px do not make the period, 44 px")),
        (32, 44, 8, "raster", (8, 0), ("", "offset_x is another for each shift_y")),
        (32, 48, 8, "raster", (8, 0), ("", "its 7 steps of 8 px do not make the period, 48 px")),
        (32, 32, 32, "grid", (0, 0), ("", "")),
    ],
)
@pytest.mark.parametrize("stack", [True, False])
def test_which_axes_close(height, width, step, scheme, steps, why, stack):
    t = tensor(height, width, step, scheme, stack=stack)
    for axis, size, reason in zip(lattice(t), steps, why, strict=True):
        assert axis.step == size
        assert axis.open.startswith(reason)
        assert bool(axis.open) is bool(reason)
        if not axis.open and axis.size > 1:
            # What closing means: rolling the axis shifts every offset by a step.
            offset = t[axis.dim.replace("shift", "offset")]
            values = np.unique(offset.values)
            assert set((values + size) % offset.attrs["period"]) == set(values)


def test_a_closing_axis_is_a_shift_of_the_image(vit, stim):
    """A real model: the response to an image shifted by a step is the rolled response."""
    model = vitxr.load_model(vit)
    run = {"shifts": vitxr.ShiftGrid(8), "preprocess": "raw", "progress": False, "layers": [0]}
    t = vitxr.extract(stim, model, **run).vit.neuron_tensor(layer=0, feature_maps=4, stack=False)
    assert [axis.open for axis in lattice(t)] == ["", ""]
    pixels = np.roll(stim.pixels.values, (8, 16), (1, 2))
    moved = vitxr.open_images({"noise": pixels[:2], "other": pixels[2:]})
    u = vitxr.extract(moved, model, **run).vit.neuron_tensor(
        layer=0, feature_maps=t.feature_map.values, stack=False
    )
    rolled = np.roll(t.values, (-1, -2), [t.dims.index(d) for d in ("shift_y", "shift_x")])
    np.testing.assert_allclose(u.values, rolled, atol=1e-5)


def test_selections_of_a_lattice():
    t = tensor(stack=False)
    half = t.isel(shift_y=slice(None, None, 2))
    assert lattice(half)[0].step == 16
    assert "do not make the period" in lattice(t.isel(shift_y=slice(3)))[0].open
    assert "not evenly spaced" in lattice(t.isel(shift_y=[0, 2, 3]))[0].open
    assert lattice(t.roll(shift_y=1, roll_coords=True))[0].step == 8
    one = t.isel(shift_y=[2])
    assert lattice(one)[0].open == ""
    bare = t.drop_vars(["offset_y"])
    assert "does not say its offset_y with the attribute `period`" in lattice(bare)[0].open
    stacked = tensor()
    for bad in (stacked.isel(shift=slice(8)), stacked.isel(shift=[1, 0, *range(2, 24)])):
        with pytest.raises(DataError, match="not a full lattice, row by row"):
            lattice(bad)
    with pytest.raises(DataError, match=r"`shift` has no labels"):
        lattice(stacked.drop_vars(["shift", "shift_y", "shift_x"]))
    with pytest.raises(DataError, match=r"has dims \(neuron, image, shift_x\); expected shift"):
        smooth(t.isel(shift_y=0))


@pytest.mark.parametrize(
    ("make", "mode", "expected"),
    [
        ({"step": 8}, None, ["wrap", "wrap"]),
        ({"height": 44, "width": 44, "step": 11}, "reflect", ["reflect", "reflect"]),
        ({"height": 40, "width": 40, "step": 11}, None, ["reflect", "reflect"]),
        ({"height": 32, "width": 44, "step": 8}, None, ["wrap", "reflect"]),
        ({"step": 8, "scheme": "raster"}, None, ["wrap", "reflect"]),
    ],
)
@pytest.mark.parametrize("sigma", [1, (0.5, 2.0), (0, 3)])
def test_smooth_is_scipy_for_every_response(make, mode, expected, sigma):
    t = tensor(**make)
    s = smooth(t, sigma, mode)
    sizes = [axis.size for axis in lattice(t)]
    np.testing.assert_array_equal(s.values, literal(t, sigma, expected, sizes))
    pair = [float(v) for v in (sigma if isinstance(sigma, tuple) else (sigma, sigma))]
    assert json.loads(s.attrs["smoothing"]) == {"sigma": pair, "mode": expected}
    assert s.attrs["layer"] == 2
    assert s.dtype == t.dtype
    assert s.dims == t.dims
    assert s.coords.identical(t.coords)
    if expected == ["wrap", "wrap"]:
        # It commutes with the roll of the lattice, and keeps the mean.
        grid = t.unstack("shift").roll(shift_y=1, shift_x=2)
        rolled = smooth(grid.stack(shift=("shift_y", "shift_x")), sigma)
        np.testing.assert_allclose(
            rolled.unstack("shift"), s.unstack("shift").roll(shift_y=1, shift_x=2), rtol=1e-5
        )
        np.testing.assert_allclose(s.mean("shift"), t.mean("shift"), rtol=1e-5)


def test_the_notebooks_filter():
    """sigma=1 and scipy's default mode, on the whole square lattice."""
    t = tensor(height=44, width=44, step=11)
    theirs = np.empty(t.shape, np.float32)
    for i, j in np.ndindex(t.shape[:2]):
        theirs[i, j] = gaussian_filter(t.values[i, j].reshape(4, 4), sigma=1).reshape(16)
    np.testing.assert_array_equal(smooth(t, mode="reflect"), theirs)


@settings(max_examples=25)
@given(data=st.data(), dtype=st.sampled_from(["uint8", "float16", "float32", "float64", "int64"]))
def test_chunked_equals_eager(data, dtype):
    stack = data.draw(st.booleans())
    t = (tensor(stack=stack) * 9).astype(dtype)
    t = t.transpose(*data.draw(st.permutations(t.dims)))
    chunks = [data.draw(st.integers(1, n)) for n in t.shape]
    lazy = t.copy(data=da.from_array(t.values, chunks))
    with dask.config.set(scheduler=refuse):
        s = smooth(lazy, 0.8)
    assert s.chunks is not None
    assert s.dtype == ("float64" if dtype in ("float64", "int64") else "float32")
    eager = smooth(t, 0.8)
    assert s.dtype == eager.dtype
    xr.testing.assert_identical(s.compute(), eager)
    assert eager.dims == t.dims


def refuse(*_, **__):
    raise AssertionError("computed")


def test_factors_say_that_they_are_of_a_smoothed_tensor():
    s = tensor().vit.smooth(0.7)
    f = factorize(s, 2, max_iter=3)
    assert f.attrs["smoothing"] == s.attrs["smoothing"]
    assert f.vit.reconstruct().attrs["smoothing"] == s.attrs["smoothing"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sigma": -1}, ArgumentError, "sigma is -1; expected a finite number of lattice steps"),
        ({"sigma": np.nan}, ArgumentError, "sigma is nan"),
        ({"sigma": True}, ArgumentError, "sigma is True"),
        ({"sigma": "1"}, ArgumentError, "sigma is '1'"),
        ({"sigma": (1, 1, 1)}, ArgumentError, "or two of them"),
        ({"mode": "nearest"}, ArgumentError, "mode='nearest'; expected 'wrap', 'reflect' or None"),
        ({"t": tensor(44, 44), "mode": "wrap"}, ArgumentError, "shift_y does not close.*6 steps"),
        ({"t": tensor().values}, ArgumentError, "expected a DataArray with labels, not ndarray"),
        ({"t": tensor() > 0}, DataError, "dtype bool"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        smooth(**{"t": tensor(), **arguments})


def test_coordinates_stay_in_memory_and_are_saved_without_a_warning(tmp_path):
    t = tensor().assign_coords(image=np.array(["a", "b", "c"], object))
    for form in (t, t.unstack("shift")):
        s = smooth(form.copy(data=form.chunk(image=1).data), 0.7)
        assert s.chunks is not None
        assert all(coord.chunks is None for coord in s.coords.values())
        assert s.coords.to_dataset().identical(form.coords.to_dataset())
    vitxr.save(s.stack(shift=("shift_y", "shift_x")), tmp_path / "s.zarr")
