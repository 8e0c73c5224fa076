"""Opening, tensors, factors, embedding where torch and panel are not installed.

Run in an environment made of the package's base dependencies alone.
"""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

import vitxr
from vitxr.errors import DependencyError
from vitxr.store.layout import Array, create
from vitxr.store.location import Location
from vitxr.store.plans import Cut

HEAVY = ("torch", "transformers", "holoviews", "panel", "matplotlib", "distributed")


def test_this_is_the_base_environment():
    assert [name for name in HEAVY if importlib.util.find_spec(name)] == []


@pytest.fixture
def store(tmp_path):
    """A finished store, as an extraction on another machine left it."""
    rng = np.random.default_rng(0)
    dims = ("image", "shift_y", "shift_x", "layer", "feature_map", "patch_row", "patch_col")
    shape = (4, 3, 3, 2, 8, 4, 4)
    coords = xr.Dataset(
        coords={
            **{d: np.arange(n) for d, n in zip(dims[1:], shape[1:], strict=True)},
            "image": np.array(list("abcd"), dtype=object),
            "label": ("image", np.array(list("xxyy"), dtype=object)),
            "offset_y": ("shift_y", [0, 4, 8]),
            "offset_x": ("shift_x", [0, 4, 8]),
        },
    )
    shard = (1, 3, 3, 1, 8, 4, 4)
    array = Array(dims, shape, "float32", shard, shard)
    location = Location(tmp_path / "run.zarr")
    book = create(location, coords, {"activation": array}, Cut(4, 3, 1, 3), {})
    for unit in range(4):
        data = rng.normal(size=(1, *shape[1:])).astype("float32")
        book.write(unit, {"activation": data})
    book.finish()
    return tmp_path / "run.zarr"


def test_store_to_embedding(store, tmp_path):
    ds = vitxr.open(store)
    t = ds.vit.neuron_tensor(layer=1, feature_maps=5)
    assert dict(t.sizes) == {"neuron": 80, "image": 4, "shift": 9}
    m = ds.vit.neuron_matrix(layer=1, feature_maps=5)
    np.testing.assert_allclose(m, t.mean("shift"), rtol=1e-5)
    assert ds.vit.activity().sizes["feature_map"] == 8
    f = t.vit.factorize(3)
    assert f["neuron_factor"].sizes["component"] == 3
    tree = m.vit.fit_ensemble([1, 2], replicates=2, progress=False)
    assert dict(tree["objective"].sizes) == {"rank": 2, "replicate": 2}
    assert f.vit.embed(n_components=2)["score"].dims == ("neuron", "pc")
    assert vitxr.read_mat(t.vit.to_mat(tmp_path / "t.mat")).dims == t.dims
    xr.testing.assert_identical(vitxr.open(vitxr.save(f, tmp_path / "f.nc")).compute(), f)


def test_images_and_shifts():
    assert vitxr.datasets.digits(per_class=1).sizes["image"] == 10
    assert vitxr.ShiftGrid(3).lattice(32, 32).sizes["shift_y"] == 11


def test_what_is_missing_is_named():
    with pytest.raises(DependencyError, match=r"pip install 'vitxr\[models\]'"):
        vitxr.load_model("digits")


def test_command_line(store):
    done = subprocess.run(
        [sys.executable, "-m", "vitxr.cli", "info", str(store)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "activation (image: 4" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "vitxr.cli", "info", "digits"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "vitxr[models]" in done.stderr


def test_the_activations_that_come_with_vitxr():
    t = vitxr.catalog.open("activations.digits").vit.neuron_tensor(layer=5, feature_maps=3)
    assert dict(t.sizes) == {"neuron": 192, "image": 10, "shift": 4}
    assert float(t.max()) > 0
