"""The transcription of the notebook is checked before anything is compared with it."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import literal  # noqa: E402  (needs torch)
from test_hals import slow_ncp_hals  # noqa: E402

STEP = 5
ROWS, COLS = 16, 24  # 4 x 6 patches: a grid that is not square
N_NEURONS = 24
N_MAPS = 6
N_FRAMES = math.ceil(ROWS / STEP) * (1 + math.ceil(COLS / STEP))


@pytest.fixture(scope="module")
def model():
    config = transformers.ViTConfig(
        image_size=(ROWS, COLS),
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(4142)
        return transformers.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def images():
    """Three images (3, 3, rows, cols), uint8."""
    return np.random.default_rng(0).integers(0, 256, (3, 3, ROWS, COLS), dtype=np.uint8)


def hidden_patches(model, frames, layer):
    """ReLU of hidden_states[layer + 1] without the class token: (frame, feature_map, neuron)."""
    with torch.no_grad():
        states = model(torch.as_tensor(frames, dtype=torch.float32), output_hidden_states=True)
    return states.hidden_states[layer + 1].clamp(min=0)[:, 1:].numpy().transpose(0, 2, 1)


def offsets():
    """The frames' accumulated (down, right) rolls, not yet modulo the image's size."""
    down, right = 0, 0
    for _ in range(math.ceil(ROWS / STEP)):
        down += STEP
        yield down, right
        for _ in range(math.ceil(COLS / STEP)):
            right += STEP
            yield down, right


# --- images --------------------------------------------------------------------------


def test_images_are_the_first_of_each_class_in_order():
    values = np.add.outer([0, 1, 2], [0.0, 10.0, 20.0, 30.0])  # of each class and image
    stacks = list(np.broadcast_to(values[..., None, None, None], (3, 4, 8, 8, 3)))
    out = literal.get_images_selected_classes(6, 3, stacks)
    assert out.shape == (6, 8, 8, 3)
    assert out.dtype == np.uint8
    assert out[:, 0, 0, 0].tolist() == [0, 10, 1, 11, 2, 12]
    assert literal.channels_first(out).shape == (6, 3, 8, 8)


def test_large_images_become_lanczos_thumbnails():
    stack = np.random.default_rng(1).integers(0, 256, (1, 40, 60, 3), dtype=np.uint8)
    out = literal.get_images_selected_classes(1, 1, [stack], MAX_SIZE=30)
    assert out.shape == (1, 20, 30, 3)
    want = np.asarray(Image.fromarray(stack[0]).resize((30, 20), Image.LANCZOS))
    np.testing.assert_array_equal(out[0], want)


# --- shifts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "cols", "step", "frames"),
    [(224, 224, 11, 462), (16, 24, 5, 24), (8, 8, 4, 6), (7, 9, 9, 2), (3, 2, 1, 9)],
)
def test_number_of_frames(rows, cols, step, frames):
    shifted, n_shifts = literal.apply_all_shifts(np.zeros((3, rows, cols), np.uint8), step)
    assert shifted.shape == (frames, 3, rows, cols)
    assert shifted.dtype == torch.float32
    assert n_shifts == math.ceil(rows / step) * math.ceil(cols / step)


def test_first_frame_is_shifted_down_and_not_right(images):
    shifted, _ = literal.apply_all_shifts(images[0], STEP)
    np.testing.assert_array_equal(shifted[0], np.roll(images[0], (STEP, 0), axis=(1, 2)))
    np.testing.assert_array_equal(shifted[1], np.roll(images[0], (STEP, STEP), axis=(1, 2)))


def test_horizontal_offsets_run_on_from_row_to_row(images):
    shifted, _ = literal.apply_all_shifts(images[0], STEP)
    lattice = list(offsets())
    assert len(lattice) == N_FRAMES == len(shifted)
    for frame, (down, right) in zip(shifted, lattice, strict=True):
        np.testing.assert_array_equal(frame, np.roll(images[0], (down, right), axis=(1, 2)))
    # the second row starts where the first one ended, which is not at column 0
    row = 1 + math.ceil(COLS / STEP)
    assert lattice[row] == (2 * STEP, 25)
    assert not np.array_equal(shifted[row], np.roll(images[0], 2 * STEP, axis=1))


# --- neurons -------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hook_sees_the_hidden_state_after_the_block(model, images, layer):
    hooks = [len(module._forward_hooks) for module in model.modules()]
    out, fm_avg, labels, kept, n_neurons = literal.compute_neuron_output(
        model, layer, images, n_max_feature_maps=N_MAPS
    )
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert n_neurons == N_NEURONS
    np.testing.assert_array_equal(labels, np.repeat(np.arange(N_MAPS), N_NEURONS))

    states = hidden_patches(model, images, layer)
    np.testing.assert_allclose(fm_avg, states.mean(axis=2), rtol=1e-5, atol=1e-6)
    mean = states[0].mean(axis=1)
    assert np.all(np.diff(mean[kept]) <= 0)
    assert mean[kept].min() >= np.delete(mean, kept).max()

    top = states[:, kept].astype(np.float64)
    peak = top.max(axis=2, keepdims=True)
    want = np.divide(top, peak, out=np.zeros_like(top), where=peak > 0)
    np.testing.assert_allclose(out.reshape(want.shape), want, rtol=1e-5, atol=1e-5)
    assert set(np.unique(out.reshape(want.shape).max(axis=2))) <= {0.0, 1.0}


def test_given_maps_are_kept_in_the_order_given(model, images):
    kept = np.array([3, 0, 7])
    out, _, _, returned, _ = literal.compute_neuron_output(model, 0, images, kept, 3)
    assert returned is kept
    one = literal.compute_neuron_output(model, 0, images, np.array([7]), 1)[0]
    np.testing.assert_array_equal(out[:, 2 * N_NEURONS :], one)


def test_all_zero_map_stays_zero(model, images):
    block = model.vit.layers[2]

    def silence(module, args, output):
        output = output.clone()
        output[:, :, 5] = -1.0
        return output

    # registered before the transcription's own hook, so that one sees the silenced channel
    handle = block.register_forward_hook(silence)
    try:
        out, fm_avg, _, _, _ = literal.compute_neuron_output(
            model, 2, images, np.array([5, 2]), n_max_feature_maps=2
        )
    finally:
        handle.remove()
    assert np.all(fm_avg[:, 5] == 0)
    assert np.all(out[:, :N_NEURONS] == 0)
    assert np.all(np.isfinite(out))
    assert out[:, N_NEURONS:].max() == 1


def test_plot_activity_returns_the_means_of_the_normalised_maps(model, images):
    out, fm_avg, _, kept, _ = literal.compute_neuron_output(
        model, 1, images, None, N_MAPS, plot_activity=True
    )
    plain = literal.compute_neuron_output(model, 1, images, None, N_MAPS)
    np.testing.assert_array_equal(out, plain[0])
    np.testing.assert_array_equal(kept, plain[3])
    assert fm_avg.shape == (3, N_MAPS)
    np.testing.assert_allclose(fm_avg, out.reshape(3, N_MAPS, N_NEURONS).mean(axis=2))


# --- tensors -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown_3D(model, images):
    return literal.show_stimuli_3D(
        model, 1, images, True, None, 2, shift_step=STEP, n_max_feature_maps=N_MAPS
    )


def test_3D_keeps_the_first_frames_maps_for_all_images(model, images, shown_3D, tmp_path):
    out, fm_avg, labels, kept = shown_3D
    assert out.shape == (2, N_FRAMES, N_MAPS * N_NEURONS)
    assert labels.shape == (N_MAPS * N_NEURONS,)
    frames = np.stack([np.roll(images[1], shift, axis=(1, 2)) for shift in offsets()])
    np.testing.assert_allclose(
        fm_avg, hidden_patches(model, frames, 1).mean(axis=2), rtol=1e-4, atol=1e-6
    )  # of the last image
    first = np.roll(images[0], STEP, axis=1)[None]
    np.testing.assert_array_equal(
        kept, literal.compute_neuron_output(model, 1, first, None, N_MAPS)[3]
    )
    # a frame in the middle of the second image, on its own
    one = literal.compute_neuron_output(model, 1, frames[[9]], kept, N_MAPS)[0]
    np.testing.assert_array_equal(out[1, 9], one[0])

    data = literal.neuron_output_3D(out, tmp_path / "a.mat")
    assert data.shape == (N_MAPS * N_NEURONS, 2, N_FRAMES)
    assert data[30, 1, 9] == out[1, 9, 30]
    np.testing.assert_array_equal(loadmat(tmp_path / "a.mat")["neuron_output_3D"], data)
    assert literal.tensor_to_factorize(data) is data


def test_3D_without_shifts_is_one_frame_an_image(model, images):
    out, fm_avg, _, kept = literal.show_stimuli_3D(
        model, 1, images, False, None, 3, n_max_feature_maps=N_MAPS
    )
    assert out.shape == (3, 1, N_MAPS * N_NEURONS)
    assert fm_avg.shape == (1, 16)
    want, _, _, first, _ = literal.compute_neuron_output(model, 1, images, None, N_MAPS)
    np.testing.assert_array_equal(kept, first)
    np.testing.assert_array_equal(out[:, 0], want)
    assert literal.neuron_output_3D(out).shape == (N_MAPS * N_NEURONS, 3, 1)


def test_2D_is_the_mean_of_3D_over_frames(model, images, shown_3D, tmp_path):
    out, fm_avg, labels, kept = literal.show_stimuli_2D(
        model, 1, images, True, None, 2, shift_step=STEP, n_max_feature_maps=N_MAPS
    )
    np.testing.assert_array_equal(kept, shown_3D[3])
    np.testing.assert_array_equal(labels, shown_3D[2])
    np.testing.assert_allclose(out, shown_3D[0].mean(axis=1), rtol=1e-12)
    assert fm_avg.shape == (2, 16)
    np.testing.assert_allclose(fm_avg[1], shown_3D[1].mean(axis=0), rtol=1e-5)

    data = literal.neuron_output_2D(out, tmp_path / "a.mat")
    np.testing.assert_array_equal(data, out.T)
    np.testing.assert_array_equal(loadmat(tmp_path / "a.mat")["neuron_output_2D"], data)
    cube = literal.tensor_to_factorize(data, dim=2)
    assert cube.shape == (N_MAPS * N_NEURONS, 2, 1)
    np.testing.assert_array_equal(cube[:, :, 0], data)


def test_2D_without_shifts_takes_images_for_frames(model, images):
    out, fm_avg, _, kept = literal.show_stimuli_2D(
        model, 2, images, False, None, 1, n_max_feature_maps=N_MAPS
    )
    want = literal.compute_neuron_output(model, 2, images, None, N_MAPS)
    assert out.shape == (3, N_MAPS * N_NEURONS)  # all images, whatever the count says
    for got, expected in zip((out, fm_avg, kept), (want[0], want[1], want[3]), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("shape", "rank"), [((7, 5, 6), 3), ((4, 6, 1), 2), ((5, 4, 3), 1)])
def test_ncp_hals_is_the_algorithm_written_out(shape, rank):
    rng = np.random.default_rng(0)
    x, start = rng.random(shape), [rng.random((n, rank)) for n in shape]
    factors, objectives = literal.ncp_hals(x, start, tol=1e-6, max_iter=40)
    expected, history = slow_ncp_hals(x, start, tol=1e-6, max_iter=40)
    np.testing.assert_allclose(objectives, history, rtol=1e-9)
    for got, want in zip(factors, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
