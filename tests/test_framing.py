"""What is drawn of an image is what the model took of it."""

import json

import numpy as np
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

import vitxr
from vitxr.errors import DataError
from vitxr.models import Preprocess
from vitxr.plot.images import seen
from vitxr.stimuli.framing import framed

SIDES = st.integers(9, 70)


def smooth(height, width):
    """An image of which one pixel more or less makes a small difference, and ten a large one."""
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [y * 255 / height, x * 255 / width, (x + y) * 255 / (height + width)], -1
    ).astype(np.uint8)


def _size(height, width):
    return {"height": height, "width": width}


@given(
    SIDES,
    SIDES,
    st.one_of(st.none(), SIDES, st.tuples(SIDES, SIDES)),
    st.one_of(st.none(), st.tuples(SIDES, SIDES)),
    st.booleans(),
    st.sampled_from(["bilinear", "bicubic", "nearest"]),
)
def test_as_our_own_preprocessing(height, width, resize, crop, cover, interpolation):
    own = Preprocess(
        resize, crop, interpolation, mean=(0, 0, 0), std=(1, 1, 1),
        cover=cover and isinstance(resize, tuple),
    )  # fmt: skip
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    took = np.rint(own(image).transpose(1, 2, 0) * 255)
    np.testing.assert_array_equal(framed(image, json.dumps(own.settings())), took)


@pytest.mark.parametrize("shape", [(60, 90), (91, 60), (64, 64), (37, 201)])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViTImageProcessor", {"size": _size(32, 48)}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 36}, "crop_size": _size(32, 32)}),
        ("BitImageProcessor", {"size": {"shortest_edge": 33}, "crop_size": _size(20, 28)}),
        ("DeiTImageProcessor", {"size": _size(36, 50), "crop_size": _size(32, 48)}),
        ("SiglipImageProcessor", {"size": _size(32, 32)}),
        ("CLIPImageProcessor", {"do_resize": False, "crop_size": _size(30, 33)}),
    ],
)
def test_as_the_image_processors_of_transformers(kind, settings, shape):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, kind)(**settings)
    image = smooth(*shape)
    out = np.asarray(
        processor(images=[image], return_tensors="np", input_data_format="channels_last")[
            "pixel_values"
        ]
    )[0]
    took = out.transpose(1, 2, 0) * np.array(processor.image_std) + np.array(processor.image_mean)
    mine = framed(image, processor.to_dict())
    assert mine.shape == took.shape
    step = 255 / (min(shape) / 36)  # of one pixel of a resized image, and rounding
    assert abs(mine - took * 255).max() < step / 36 * 1.5 + 6


def test_what_is_not_known_is_refused():
    with pytest.raises(DataError, match=r"expected those of vitxr\.models\.Preprocess"):
        framed(smooth(9, 9), {"size": {"longest_edge": 9}})
    image = smooth(9, 9)
    assert framed(image, "{}") is image


@pytest.mark.parametrize("how", ["map", "movie", "app"])
def test_a_cropped_image_is_drawn_cropped(how):
    """A bright square in the middle third is all that a model of it sees."""
    stim = synthetic.stimuli(per_class=1, classes=(0,))
    wide = np.zeros((1, 32, 96, 3), np.uint8)
    wide[:, :, 32:64] = 200
    images = vitxr.open_images({"wide": wide})
    ds = synthetic.extraction(stim, step=8, layers=(0,), channels=4, heads=2)
    ds = ds.assign_coords(image=images["image"].values.astype(object), source="none")
    settings = Preprocess(resize=32, crop=(32, 32)).settings()
    ds.attrs["preprocess_settings"] = json.dumps(settings)
    if how == "app":
        from vitxr.app.pixels import pixels

        drawn = pixels(ds, str(images["image"].values[0]), images)
    elif how == "map":
        drawn = seen(images, ds.vit.attention_map((1, 1)), 0)
    else:
        drawn = seen(images, ds.vit.neuron_tensor(layer=0, feature_maps=2), 0)
    assert drawn.shape[:2] == (32, 32)
    assert (drawn[..., :3] == 200).all()
    # As the model took it, if it is given as an array.
    assert seen(wide[0], ds, 0).shape == (32, 96, 4)
