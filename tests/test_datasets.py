"""The images that come with scikit-learn and scikit-image."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from vitxr.errors import ArgumentError, DataError, DependencyError
from vitxr.stimuli import read_image
from vitxr.stimuli.datasets import digits, photos


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits(split):
    bunch = load_digits()
    ds = digits(per_class=None, split=split)
    numbers = np.array([int(name.split("/")[1]) for name in ds.image.values])
    expected = range(1347) if split == "train" else range(1347, 1797)
    assert sorted(numbers) == list(expected)
    np.testing.assert_array_equal(ds.label.values.astype(int), bunch.target[numbers])
    grey = np.rint(bunch.images[numbers] * 255 / 16)
    np.testing.assert_array_equal(ds.pixels, np.repeat(grey[..., None], 3, axis=3))
    assert ds.pixels.dtype == np.uint8
    assert ds.pixels.values.max() == 255
    assert ds.source.values[0] == f"scikit-learn digits[{numbers[0]}]"
    # by digit, then by sample
    keys = list(zip(ds.label.values, numbers, strict=True))
    assert keys == sorted(keys)


def test_digits_per_class():
    ds = digits()
    assert ds.label.values.tolist() == [str(d) for d in range(10) for _ in range(5)]
    every = digits(per_class=None)
    first = every.isel(image=every.label.values == "3").image.values[:5]
    assert ds.isel(image=slice(15, 20)).image.values.tolist() == first.tolist()
    np.testing.assert_array_equal(read_image(ds, 7), ds.pixels[7])
    with pytest.raises(DataError, match="per_class=100, but the class '0' has 43"):
        digits(per_class=100)
    with pytest.raises(DataError, match="open the images again and keep `pixels`"):
        read_image(ds.drop_vars("pixels"), 0)


@pytest.mark.parametrize("options", [{"per_class": 0}, {"per_class": 2.0}, {"split": "val"}])
def test_digits_arguments(options):
    with pytest.raises(ArgumentError, match="expected"):
        digits(**options)


def test_photos():
    pytest.importorskip("skimage")
    ds = photos()
    assert "pixels" not in ds
    assert ds.image.values.tolist()[:3] == ["china.jpg", "flower.jpg", "astronaut.png"]
    assert len(set(ds.label.values)) == ds.sizes["image"] == 7
    assert len({*zip(ds.height.values, ds.width.values, strict=True)}) > 2
    np.testing.assert_array_equal(read_image(ds, "china.jpg"), load_sample_image("china.jpg"))
    cat = read_image(ds, "chelsea.png")
    np.testing.assert_array_equal(
        cat, np.array(Image.open(ds.sel(image="chelsea.png").source.item()))
    )
    for i in range(7):  # photographs in colour
        rgb = read_image(ds, i)
        assert len(np.unique(rgb)) > 200
        assert (rgb[..., 0] != rgb[..., 2]).mean() > 0.5


def test_photos_of_one_size():
    pytest.importorskip("skimage")
    ds = photos(size=(64, 48))
    assert ds.pixels.shape == (7, 64, 48, 3)
    np.testing.assert_array_equal(read_image(ds, "coffee.png"), ds.pixels.sel(image="coffee.png"))


def test_photos_without_scikit_image(monkeypatch, tmp_path):
    def spec(name, *args):
        return None if name == "skimage" else pytest.fail(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", spec)
        with pytest.raises(DependencyError, match=r'pip install "vitxr\[photos\]"'):
            photos()
    empty = importlib.util.spec_from_loader("skimage", None, is_package=True)
    empty.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: empty)
    with pytest.raises(DependencyError, match=r"did not find .*astronaut\.png"):
        photos()
