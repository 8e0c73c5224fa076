"""The model that ships inside the package, loaded as any other user of it would."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TRAIN = 1347  # samples[TRAIN:] were held out


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(str(files("vitxr") / "models" / "digits"))


@pytest.fixture(scope="module")
def model(folder):
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(folder, use_safetensors=True).eval()


@pytest.fixture(scope="module")
def processor(folder):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil.from_pretrained(folder)


@pytest.fixture(scope="module")
def held_out():
    """Held-out digits as 8 x 8 RGB uint8 images, and their classes."""
    digits = load_digits()
    grey = np.round(digits.images[TRAIN:] * (255 / 16)).astype(np.uint8)
    return list(np.repeat(grey[..., None], 3, axis=-1)), digits.target[TRAIN:]


def test_accuracy_on_the_held_out_digits(model, processor, held_out, folder):
    images, target = held_out
    assert len(images) == 450
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (450, 3, 32, 32)
    with torch.inference_mode():
        guess = model(pixels).logits.argmax(-1).numpy()
    names = [model.config.id2label[k] for k in guess]
    right = sum(name == str(k) for name, k in zip(names, target, strict=True))
    assert right / len(target) >= 0.97
    # the model card says what is true
    assert f"({right} of 450)" in (folder / "README.md").read_text(encoding="utf-8")


def test_weights_are_small_safetensors_only(folder):
    weights = folder / "model.safetensors"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert weights.stat().st_size < 1_000_000
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000


def test_weights_are_finite_float32(folder):
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype("float32")}
    assert all(np.isfinite(array).all() for array in tensors.values())


def test_configuration(folder, model):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["ViTForImageClassification"]
    assert config["id2label"] == {str(k): str(k) for k in range(10)}
    assert config["num_hidden_layers"] == len(model.vit.layers) == 6
    assert (config["image_size"], config["patch_size"], config["num_channels"]) == (32, 4, 3)


def test_nothing_is_missing_or_left_over(folder):
    from transformers import ViTForImageClassification

    _, info = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_preprocessing(processor):
    grey = np.full((8, 8, 3), 51, dtype=np.uint8)
    pixels = processor([grey], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels, np.full((1, 3, 32, 32), (51 / 255 - 0.5) / 0.5), rtol=1e-6)
