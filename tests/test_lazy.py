"""Of a lazy extraction: nothing is computed before it is asked for, and labels stay in memory."""

import dask
import pytest
import xarray as xr

pytest.importorskip("torch")

import vitxr

TENSOR = {"feature_maps": None, "normalize": False}


@pytest.fixture(scope="module")
def lazy():
    return vitxr.extract(
        vitxr.datasets.digits(per_class=1).isel(image=[0, 3, 7]),
        vitxr.load_model("digits"),
        shifts=vitxr.ShiftGrid(16),
        variables=("activation", "attention", "logits"),
    )


def refuse(*_args, **_kwargs):
    raise AssertionError("a lazy function computed")


@pytest.mark.parametrize(
    "function",
    [
        lambda ds: ds.vit.neuron_tensor(5, **TENSOR),
        lambda ds: ds.vit.neuron_matrix(5, **TENSOR),
        lambda ds: ds.vit.neuron_tensor(5, **TENSOR).vit.smooth(mode="reflect"),
        lambda ds: ds.vit.activity(),
        lambda ds: ds.vit.top_classes(3),
        lambda ds: ds.vit.unshift(),
        lambda ds: ds.vit.equivariance(),
        lambda ds: ds.vit.class_activity(),
        lambda ds: ds.vit.population_sparseness(),
        lambda ds: ds.vit.attention_map(),
        lambda ds: ds.vit.attention_rollout(),
        lambda ds: ds.vit.attention_rollout(query=None),
        lambda ds: ds.vit.attention_distance(),
        lambda ds: ds.vit.attention_entropy(),
        lambda ds: ds.vit.attention_map().vit.mass_mask(0.5),
    ],
)
def test_only_data_are_lazy(lazy, function):
    with dask.config.set(scheduler=refuse):
        result = function(lazy)
    data = result.data_vars.values() if isinstance(result, xr.Dataset) else [result]
    assert any(array.chunks for array in data)
    assert not [name for name, array in result.coords.items() if array.chunks]
