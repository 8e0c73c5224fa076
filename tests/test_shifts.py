"""Shift lattices: offsets, labels, refusals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vitxr
from vitxr.errors import ArgumentError

sizes = st.integers(1, 60)


@given(sizes, sizes, st.data())
def test_grid_is_every_multiple_below_the_size(height, width, data):
    step = data.draw(st.integers(1, min(height, width)))
    lattice = vitxr.ShiftGrid(step).lattice(height, width)
    np.testing.assert_array_equal(lattice.offset_y, np.arange(0, height, step))
    np.testing.assert_array_equal(lattice.offset_x, np.arange(0, width, step))
    assert lattice.offset_y.dims == ("shift_y",)
    assert lattice.offset_x.dims == ("shift_x",)


@given(sizes, sizes, st.data())
def test_raster_is_the_running_rolls(height, width, data):
    step = data.draw(st.integers(1, min(height, width)))
    lattice = vitxr.ShiftGrid(step, "raster").lattice(height, width)
    rows, columns = math.ceil(height / step), math.ceil(width / step)
    assert dict(lattice.sizes) == {"shift_y": rows, "shift_x": columns + 1}
    dy = dx = 0
    for y in range(rows):
        dy = (dy + step) % height
        for x in range(columns + 1):
            dx = (dx + step * (x > 0)) % width
            assert lattice.offset_y[y, x] == dy
            assert lattice.offset_x[y, x] == dx


@pytest.mark.parametrize("step", [0, -1, 2.5, True, "3"])
def test_step_must_be_a_positive_integer(step):
    with pytest.raises(ArgumentError, match="expected a whole number of pixels, 1 or more"):
        vitxr.ShiftGrid(step)


def test_unknown_scheme():
    with pytest.raises(ArgumentError, match=r"scheme='spiral': expected 'grid' .* or 'raster'"):
        vitxr.ShiftGrid(3, "spiral")


@pytest.mark.parametrize(("height", "width"), [(10, 20), (20, 10)])
def test_step_larger_than_the_image(height, width):
    with pytest.raises(ArgumentError, match=r"step=11 px is larger than the image.*at most 10"):
        vitxr.ShiftGrid(11).lattice(height, width)
