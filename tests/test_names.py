"""The vocabulary and what is checked against it."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from vitxr import errors, names
from vitxr.errors import DataError


@given(st.permutations(names.LATTICE))
def test_order_restores_the_lattice(dims):
    assert names.order(dims) == names.LATTICE


def test_every_dimension_of_every_variable_is_known():
    for name, variable in names.VARIABLES.items():
        for form in variable.dims:
            assert set(form) <= set(names.DIMS), name
            if not {"neuron", "component", "rank", "replicate"} & set(form):
                assert names.order(form) == form, name


def test_validate_names_what_is_missing():
    ds = xr.Dataset({"logits": (("image", "shift_y", "shift_x", "class"), np.zeros((1, 1, 1, 2)))})
    with pytest.raises(DataError, match=r"no `activation` \(block output.*it has: logits"):
        names.validate(ds, require=["activation"])


def test_validate_checks_dims_and_dtype():
    with pytest.raises(DataError, match=r"`pixels` has dims \(row, col\); expected \(image, row"):
        names.validate(xr.Dataset({"pixels": (("row", "col"), np.zeros((2, 2), np.uint8))}))
    with pytest.raises(DataError, match="`pixels` has dtype float64"):
        names.validate(
            xr.Dataset({"pixels": (("image", "row", "col", "channel"), np.zeros((1, 2, 2, 3)))})
        )


def test_unknown_variables_are_left_alone():
    ds = xr.Dataset({"mine": ("x", [1])})
    assert names.validate(ds) is ds


def test_every_error_is_a_vitxr_error_and_a_builtin():
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.VitxrError)
        if kind is not errors.VitxrError:
            assert len(kind.__bases__) == 2
