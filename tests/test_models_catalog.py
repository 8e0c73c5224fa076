"""The catalog's rows against the models that transformers makes of them, without their weights."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

import families  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402

import vitxr  # noqa: E402
from vitxr.models.catalog import known_models  # noqa: E402
from vitxr.models.structure import find, tower  # noqa: E402

#: Model class and config class of a family, and what its config says beside the row's numbers.
FAMILIES = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {"num_labels": 1000}),
    "DeiT": (
        "DeiTForImageClassificationWithTeacher", "DeiTConfig", {"num_labels": 1000},
    ),
    "BEiT": (
        "BeitForImageClassification", "BeitConfig",
        {"num_labels": 1000, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    ),
    "ViT-MAE": ("ViTMAEForPreTraining", "ViTMAEConfig", {}),
    "MSN": ("ViTMSNModel", "ViTMSNConfig", {}),
    "I-JEPA": ("IJepaModel", "IJepaConfig", {}),
    "DINOv2": ("Dinov2Model", "Dinov2Config", {"image_size": 518}),
    "DINOv2 with registers": (
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"image_size": 518},
    ),
    "DINOv3 ViT": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}),
    "CLIP": ("CLIPModel", "CLIPConfig", {}),
    "SigLIP": ("SiglipModel", "SiglipConfig", {}),
    "SigLIP2 NaFlex": ("Siglip2Model", "Siglip2Config", {}),
    "Data2Vec vision": (
        "Data2VecVisionModel", "Data2VecVisionConfig",
        {"use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    ),
}  # fmt: skip
#: Of models of images and texts, the text's side as their config.json has it.
TEXT = {
    "openai/clip-vit-large-patch14": {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    },
    "google/siglip-so400m-patch14-384": {
        "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
        "intermediate_size": 4304,
    },
    "google/siglip2-base-patch16-224": {"vocab_size": 256000},
    "google/siglip2-base-patch16-naflex": {"vocab_size": 256000},
}  # fmt: skip
#: Size of model.safetensors as the model's page lists it, 10^6 bytes.
SIZES = {
    "google/vit-base-patch16-224": 346,
    "google/vit-base-patch16-384": 347,
    "google/vit-large-patch16-224": 1220,
    "facebook/deit-base-distilled-patch16-224": 349,
    "facebook/deit-base-distilled-patch16-384": 351,
    "microsoft/beit-base-patch16-224": 350 - 12 * 197**2 * 8 / 1e6,  # less its indices, int64
    "facebook/vit-mae-base": 448,
    "facebook/vit-mae-large": 1320,
    "facebook/vit-msn-small": 86.7,
    "facebook/ijepa_vith14_1k": 2520,
    "facebook/dinov2-small": 88.2,
    "facebook/dinov2-large": 1217.5,
    "openai/clip-vit-base-patch32": 605,
    "openai/clip-vit-large-patch14": 1710,
    "facebook/data2vec-vision-base": 343,
}
#: Rows whose numbers are the defaults of transformers' configuration, which names them.
DEFAULTS = {
    "google/vit-base-patch16-224": "ViTConfig",
    "facebook/deit-base-distilled-patch16-224": "DeiTConfig",
    "microsoft/beit-base-patch16-224": "BeitConfig",
    "facebook/vit-mae-base": "ViTMAEConfig",
    "facebook/vit-msn-base": "ViTMSNConfig",
    "facebook/dinov3-vits16-pretrain-lvd1689m": "DINOv3ViTConfig",
    "openai/clip-vit-base-patch32": "CLIPVisionConfig",
    "google/siglip-base-patch16-224": "SiglipVisionConfig",
    "facebook/data2vec-vision-base": "Data2VecVisionConfig",
}
ROWS = [row for row in known_models().values() if row["family"] != "timm"]


def made(row):
    """The row's model on the meta device: shapes, no numbers."""
    title, config, more = FAMILIES[row["family"]]
    if row["id"] == "google/vit-base-patch16-224-in21k":
        title, more = "ViTModel", {}
    size = {"num_patches": 256} if "NaFlex" in row["family"] else {"image_size": row["input"]}
    given = {
        "hidden_size": row["channels"], "num_hidden_layers": row["layers"],
        "num_attention_heads": row["heads"], "patch_size": row["patch"], **size,
        "intermediate_size": 4304 if "so400m" in row["id"] else 4 * row["channels"], **more,
    }  # fmt: skip
    if row["family"] == "CLIP" or "SigLIP" in row["family"]:
        wide = 768 if "large" in row["id"] else 512
        extra = {"projection_dim": wide} if row["family"] == "CLIP" else {}
        options = {"text_config": TEXT.get(row["id"], {}), "vision_config": given, **extra}
    else:
        options = given
    with torch.device("meta"), no_init_weights():
        return getattr(tf, title)(getattr(tf, config)(**options))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_a_row_is_what_transformers_makes_of_it(row):
    module = made(row)
    held = sum(p.numel() for p in module.parameters())
    image = tower(module)
    layout = find(image, None, (row["input"],) * 2)
    assert len(layout.blocks) == row["layers"]
    assert layout.heads == row["heads"]
    assert layout.patch == (row["patch"],) * 2
    assert layout.input_size == (row["input"],) * 2
    # Tokens before the patches have a parameter, or a part of one, each.
    ends = ("cls_token", "class_embedding", "distillation_token")
    names = dict(image.named_parameters())
    before = sum(name.endswith(ends) and not name.startswith("decoder") for name in names)
    before += sum(p.shape[1] for name, p in names.items() if name.endswith("register_tokens"))
    assert before == len(row["prefix"])
    assert bool(layout.classes) == ("1000 ImageNet classes" in row["expect"])
    if row["id"] in SIZES:
        assert 4 * held / 1e6 == pytest.approx(SIZES[row["id"]], rel=0.006)


@pytest.mark.parametrize("name", [n for n in DEFAULTS if n in known_models()])
def test_a_row_is_what_transformers_defaults_say(name):
    row, config = known_models()[name], getattr(tf, DEFAULTS[name])()
    found = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    assert found == (row["layers"], row["channels"], row["heads"])
    assert (config.patch_size, config.image_size) == (row["patch"], row["input"])


def test_real_ids_of_the_pages_are_in_the_catalog():
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("examples/*.py")]
    named = {
        found
        for page in pages
        for found in re.findall(
            r"\b(?:google|facebook|openai|microsoft)/[a-z0-9_-]*\d[a-z0-9_-]*",
            page.read_text("utf-8"),
        )
    }
    assert named
    assert named <= set(known_models())


def test_a_rows_revision_is_loaded_where_none_is_given(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    families.save(next(f for f in families.FAMILIES if f.name == "ViT"), tmp_path)
    asked = []

    def info(self, name, revision=None, **_):
        asked.append((name, revision))
        return type("Info", (), {"sha": "0" * 40})

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    name = "google/vit-large-patch16-224"
    vitxr.load_model(name)
    vitxr.load_model(name, revision="main")
    vitxr.load_model("someone/else")
    pinned = known_models()[name]["revision"]
    assert asked == [(name, pinned), (name, "main"), ("someone/else", None)]


#: preprocessor_config.json as published with models of these families, before 2023.
PUBLISHED = {
    "ViT": {"size": 32},
    "DeiT": {
        "feature_extractor_type": "DeiTFeatureExtractor", "size": 36, "crop_size": 32,
        "do_center_crop": True, "resample": 3,
    },
    "BEiT": {
        "feature_extractor_type": "BeitFeatureExtractor", "size": 32, "crop_size": 32,
        "do_center_crop": False, "resample": 2,
    },
    "ViT-MAE": {"size": 32, "resample": 2},
    "MSN": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2},
    "CLIP": {
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32,
        "do_center_crop": True, "resample": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_preprocessing_as_it_was_published(name, tmp_path):
    """Sizes as one number, a class that is gone or none: against Pillow by hand."""
    from PIL import Image

    family = next(f for f in families.FAMILIES if f.name == name)
    families.save(family, tmp_path, size=(32, 32))
    given = {
        "do_normalize": True, "do_resize": True, "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.3], **PUBLISHED[name],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    model = vitxr.load_model(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    filter_ = Image.Resampling(given.get("resample", 2))
    small = np.asarray(Image.fromarray(image).resize((given["size"],) * 2, filter_)) / 255
    cut = (given["size"] - 32) // 2
    small = small[cut : cut + 32, cut : cut + 32]
    expected = (small - given["image_mean"]) / given["image_std"]
    np.testing.assert_allclose(model.preprocess(image).transpose(1, 2, 0), expected, atol=1e-6)
