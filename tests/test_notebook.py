"""The package against the literal transcription of the original notebook."""

import numpy as np
import pytest
from conftest import make_vit

pytest.importorskip("torch")

import literal  # needs torch

import vitxr

CASES = {
    # image size, patch, step, maps, channels that never become positive
    "multiple of the step": ((32, 32), 8, 8, 10, ()),
    "not a multiple": ((32, 32), 8, 11, 20, ()),
    "not square": ((32, 48), 8, 11, 20, ()),
    "tall, patch not square": ((48, 16), (8, 4), 7, 12, ()),
    "more maps than are active": ((32, 32), 8, 11, 40, tuple(range(5, 40))),
    "all maps": ((32, 32), 16, 16, 48, (3,)),
    "step of the whole image": ((32, 32), 8, 32, 5, ()),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda key: key.replace(" ", "-"))
def case(request):
    size, patch, step, maps, dead = CASES[request.param]
    module = make_vit(size, patch, dead)
    images = np.random.default_rng(1).integers(0, 256, (4, *size, 3), dtype=np.uint8)
    # An image that is one colour, and one that is black: many equal values.
    images[2] = 128
    images[3] = 0
    return module, images, step, maps


def extract(module, images, layer, shifts, **options):
    stim = vitxr.open_images(images)
    model = vitxr.load_model(module)
    return vitxr.extract(stim, model, layer, shifts, preprocess="raw", **options)


@pytest.mark.parametrize("layer", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("shifted", [True, False], ids=["shifts", "no-shifts"])
def test_tensors_equal_the_notebooks(case, layer, shifted):
    module, images, step, maps = case
    args = (module, layer, literal.channels_first(images), shifted, None, len(images), step, maps)
    frames, _, labels, channels_3d = literal.show_stimuli_3D(*args)
    means, _, _, channels_2d = literal.show_stimuli_2D(*args)

    shifts = vitxr.ShiftGrid(step, "raster") if shifted else None
    ds = extract(module, images, layer, shifts)
    tensor = ds.vit.neuron_tensor(layer=layer, feature_maps=maps)
    matrix = ds.vit.neuron_matrix(layer=layer, feature_maps=maps)

    expected = literal.neuron_output_3D(frames)
    assert tensor.shape == expected.shape
    np.testing.assert_allclose(tensor.values, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(matrix.values, literal.neuron_output_2D(means), rtol=1e-5, atol=1e-5)
    for t, channels in ((tensor, channels_3d), (matrix, channels_2d)):
        kept = t["feature_map"].values[:: labels.size // maps]
        np.testing.assert_array_equal(kept, channels)
        np.testing.assert_array_equal(t["feature_map"].values, channels[labels])


@pytest.mark.parametrize("layer", [0, 2])
def test_selecting_maps_while_extracting_gives_the_same(case, layer):
    module, images, step, maps = case
    shifts = vitxr.ShiftGrid(step, "raster")
    ds = extract(module, images, [0, layer] if layer else 0, shifts, feature_maps=maps)
    frames, *_, channels = literal.show_stimuli_3D(
        module, layer, literal.channels_first(images), True, None, len(images), step, maps
    )
    tensor = ds.vit.neuron_tensor(layer=layer, feature_maps=maps)
    expected = literal.neuron_output_3D(frames)
    np.testing.assert_allclose(tensor.values, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ds["channel"].sel(layer=layer), channels)


def test_activity_equals_fm_avg(case):
    module, images, step, maps = case
    shifts = vitxr.ShiftGrid(step, "raster")
    activity = extract(module, images, 0, shifts).vit.activity().sel(layer=0)
    chw = literal.channels_first(images)
    _, last, *_ = literal.show_stimuli_3D(module, 0, chw, True, None, len(images), step, maps)
    _, means, *_ = literal.show_stimuli_2D(module, 0, chw, True, None, len(images), step, maps)
    np.testing.assert_allclose(
        activity.isel(image=-1).values.reshape(last.shape), last, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        activity.mean(("shift_y", "shift_x")).values, means, rtol=1e-5, atol=1e-5
    )


def test_frames_equal_the_notebooks_rolls():
    image = np.arange(3 * 20 * 30).reshape(3, 20, 30)
    expected, _ = literal.apply_all_shifts(image, 7)
    lattice = vitxr.ShiftGrid(7, "raster").lattice(20, 30)
    for y in range(lattice.sizes["shift_y"]):
        for x in range(lattice.sizes["shift_x"]):
            at = lattice.isel(shift_y=y, shift_x=x)
            frame = np.roll(image, (int(at.offset_y), int(at.offset_x)), axis=(1, 2))
            np.testing.assert_array_equal(
                frame, np.asarray(expected[y * lattice.sizes["shift_x"] + x])
            )


def test_images_of_stacks_equal_the_notebooks(tmp_path):
    rng = np.random.default_rng(2)
    stacks = [rng.integers(0, 256, (3, 60, 90, 3)).astype(np.float64) for _ in range(2)]
    for name, stack in zip(("imgnet_husky", "imgnet_guitar"), stacks, strict=True):
        np.save(tmp_path / f"{name}.npy", stack)
    files = [tmp_path / "imgnet_husky.npy", tmp_path / "imgnet_guitar.npy"]
    stim = vitxr.open_images(files, per_class=2, size=32)
    # Classes are read in the order of their names; the notebook lists them by hand.
    order = [stacks[1], stacks[0]] if stim["label"][0] == "imgnet_guitar" else stacks
    expected = literal.get_images_selected_classes(4, 2, order, MAX_SIZE=32)
    np.testing.assert_array_equal(stim["pixels"].values, expected)
