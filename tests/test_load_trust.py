"""What a model that cannot be used is told: gated, missing, unreachable, corrupt, not a ViT."""

import json
import pickle

import numpy as np
import pytest
from conftest import make_vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

import vitxr  # noqa: E402
from vitxr.cli import main  # noqa: E402
from vitxr.errors import ArgumentError, ModelError  # noqa: E402
from vitxr.models.load import Reference  # noqa: E402

COMMIT = "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3"


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    make_vit(image_size=32).save_pretrained(folder)
    return folder


def error(kind, text="refused"):
    """An exception of the hub's, as its client raises it."""
    from types import SimpleNamespace

    response = SimpleNamespace(headers={}, request=None, status_code=403)
    try:
        return kind(text, response=response)
    except TypeError:
        return kind(text)


def hub(monkeypatch, folder=None, asked=None, downloaded=None):
    """A hub that answers as told; exceptions are raised."""
    calls = {}

    def info(self, name, revision=None, **_):
        calls["asked"] = (name, revision)
        if isinstance(asked, Exception):
            raise asked
        return type("Info", (), {"sha": COMMIT})

    def download(name, revision=None, allow_patterns=None, **_):
        calls.update(revision=revision, patterns=allow_patterns)
        if isinstance(downloaded, Exception):
            raise downloaded
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_the_commit_is_pinned_and_recorded(monkeypatch, saved):
    calls = hub(monkeypatch, saved)
    model = vitxr.load_model("someone/small-vit", revision="v1")
    assert calls["asked"] == ("someone/small-vit", "v1")
    assert calls["revision"] == COMMIT  # what was asked about is what is downloaded
    assert model.revision == COMMIT
    assert not any("bin" in p or "py" in p or p == "*" for p in calls["patterns"])
    image = np.zeros((1, 32, 32, 3), np.uint8)
    ds = vitxr.extract(
        vitxr.open_images({"a": image}), model, layers=0, shifts=None, preprocess="raw"
    )
    assert ds.attrs["model_revision"] == COMMIT
    assert ds.attrs["model_fingerprint"] == model.fingerprint
    assert len(model.fingerprint) == 64


@pytest.mark.parametrize(
    ("where", "kind", "message"),
    [
        ("asked", "GatedRepoError", "is gated: accept its terms.*hf auth login"),
        ("downloaded", "GatedRepoError", "is gated: accept its terms.*hf auth login"),
        ("asked", "RepositoryNotFoundError", r"has no model .*check the spelling.*hf auth login"),
        ("asked", "RevisionNotFoundError", r"has no model .* at revision 'v9'"),
        ("asked", "HFValidationError", "neither a folder nor a legal hub id"),
    ],
)
def test_refused_by_the_hub(monkeypatch, where, kind, message):
    hub(monkeypatch, **{where: error(getattr(huggingface_hub.errors, kind))})
    with pytest.raises(ModelError, match=message):
        vitxr.load_model("facebook/dinov3-vits16-pretrain", revision="v9")


def test_a_name_that_is_almost_known(monkeypatch):
    hub(monkeypatch, asked=error(huggingface_hub.errors.RepositoryNotFoundError))
    with pytest.raises(ModelError, match=r"nearest known: google/vit-base-patch16-224\b"):
        vitxr.load_model("google/vit-base-patch16-225")


def test_what_the_hub_has_without_safetensors(monkeypatch, saved):
    (saved / "model.safetensors").unlink()
    hub(monkeypatch, saved)
    with pytest.raises(ModelError, match="has no safetensors weights"):
        vitxr.load_model("someone/small-vit")


@pytest.mark.parametrize("offline", [True, False])
def test_no_network(monkeypatch, tmp_path, offline):
    """Told offline by the environment, or found to be."""
    if offline:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    else:
        nothing = huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        hub(monkeypatch, asked=ConnectionError("Name not known"), downloaded=nothing)
    with pytest.raises(ModelError, match=r"cannot reach the model hub.*hf download.*'digits'"):
        vitxr.load_model("someone/never-downloaded")


def test_pickled_weights_alone(saved):
    (saved / "model.safetensors").unlink()
    torch.save({}, saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no safetensors.*save_pretrained.*refs/pr/1"):
        vitxr.load_model(saved)


@pytest.mark.parametrize("damage", ["short", "flipped", "empty", "text"])
def test_corrupt_weights(saved, damage):
    path = saved / "model.safetensors"
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[:8] = b"\xff" * 8  # a header of 18 exabytes
    other = {"short": raw[: len(raw) // 2], "empty": b"", "text": b"{}" * 50}
    path.write_bytes(other.get(damage, raw))
    with pytest.raises(ModelError, match="cannot be loaded from"):
        vitxr.load_model(saved)


@pytest.mark.parametrize("text", ["", "[]", "{", '"a"', "\x00"])
def test_corrupt_config(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        vitxr.load_model(saved)


def test_corrupt_processor(saved):
    (saved / "preprocessor_config.json").write_text('{"image_processor_type": "MindReader"}')
    with pytest.raises(ModelError, match=r"image processor in .*cannot be used.*Correct"):
        vitxr.load_model(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "it holds no object"),
        ('{"image_processor_type": "DINOv3ViTImageProcessor"}', "KeyError: 'size'"),
        ('{"image_processor_type": "ViTImageProcessor", "size": "big"}', "cannot be used"),
        # What transformers would only find at the first image.
        ('{"image_processor_type": "ViTImageProcessor", "image_mean": [1, 2]}', "cannot be used"),
        ('{"image_processor_type": "ViTImageProcessor", "resample": 77}', "cannot be used"),
        (
            '{"image_processor_type": "BitImageProcessor", "crop_size": [-1, 8]}',
            "expected a number of pixels",
        ),
    ],
)
def test_a_processor_that_cannot_be_used(saved, text, message):
    (saved / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"{message}.*Correct preprocessor_config\.json"):
        vitxr.load_model(saved)


@pytest.mark.parametrize("given", [5, [5], [], None, "ViTModel", ["ViTConfig"], ["AutoModel"]])
def test_architectures_that_are_none(saved, given):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "architectures": given}))
    with pytest.raises(ModelError, match=r"`architectures` of its config|which transformers"):
        vitxr.load_model(saved)


def test_class_names_with_gaps(saved):
    config = json.loads((saved / "config.json").read_text())
    names = {0: "a", 1: "b", 2: "c", 3: "d", 9: "e"}
    (saved / "config.json").write_text(json.dumps({**config, "id2label": names}))
    module = make_vit()
    module.config.id2label = names
    for given in (saved, module):
        with pytest.raises(ModelError, match=r"`id2label`.*0, 1, 2, 3, 9.; expected.* 0 to 4"):
            vitxr.load_model(given)
    module.config.id2label = dict(enumerate("abc"))
    with pytest.raises(ModelError, match=r"3 classes.*shape \(1, 5\).*Correct `id2label`"):
        vitxr.load_model(module)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("patch_size", 0), ("patch_size", "16"), ("image_size", [1, 2, 3]),
        ("num_hidden_layers", -1), ("num_hidden_layers", 0), ("num_hidden_layers", 7),
        ("hidden_size", {}), ("num_attention_heads", 5), ("hidden_act", "none"),
        ("num_channels", None),
    ],
)  # fmt: skip
def test_configs_that_make_no_sense(saved, change, value):
    """Of hundreds that were tried by chance, those that fail in different places."""
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, change: value}))
    with pytest.raises((ModelError, ArgumentError)):
        vitxr.load_model(saved)


def test_a_wrong_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelError, match=r"holds no config\.json, so no model.*save_pretrained"):
        vitxr.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json and no weights.*model\.safetensors"):
        vitxr.load_model(tmp_path)
    with pytest.raises(ArgumentError, match="the model is ''"):
        vitxr.load_model("")
    with pytest.raises(ModelError, match="no model folder at"):
        vitxr.load_model(tmp_path / "notes.txt")


def test_a_config_of_another_size(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))
    with pytest.raises(ModelError, match=r"cannot be loaded|do not fit"):
        vitxr.load_model(saved)


def test_a_text_model(tmp_path):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=10,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertModel is a model of text"):
        vitxr.load_model(tmp_path)


def test_a_model_with_tokens_after_the_patches():
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=[32, 32], patch_size=8, num_detection_tokens=5,
        use_mid_position_embeddings=False,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"4 x 4 = 16 patches.*Expected prefix tokens, then one"):
        vitxr.load_model(transformers.YolosModel(config))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (33, r"input_size=\(33, 33\): expected multiples of the patch, 8 x 8 px"),
        ((0, 8), r"input_size=\(0, 8\): expected a number of pixels"),
        ("32", "input_size='32': expected a number of pixels"),
        ((8, 8, 8), "expected a number of pixels"),
    ],
)
def test_input_sizes(saved, size, message):
    with pytest.raises(ArgumentError, match=message):
        vitxr.load_model(saved, input_size=size)


def test_positions_of_another_grid_are_not_made_up():
    """4 x 9 patches would be taken for 6 x 6."""
    module = make_vit(image_size=(32, 72))
    assert vitxr.load_model(module).grid == (4, 9)
    with pytest.raises(ModelError, match=r"4 x 9 patches; .*square grids only"):
        vitxr.load_model(module, input_size=64)


def test_patches_that_are_not_square():
    model = vitxr.load_model(make_vit(image_size=(32, 48), patch_size=(8, 4)))
    assert (model.patch, model.grid) == ((8, 4), (4, 12))


def test_the_size_travels_with_the_model(saved):
    """To workers, copies, and into the record."""
    model = vitxr.load_model(saved, input_size=(48, 64))
    sent = pickle.loads(pickle.dumps(Reference(model, model.fingerprint))).model()
    assert sent.input_size == model.cast("bfloat16").input_size == (48, 64)
    assert sent.how == model.how != ()
    image = np.zeros((1, 48, 64, 3), np.uint8)
    ds = vitxr.extract(
        vitxr.open_images({"a": image}), model, layers=0, shifts=None, preprocess="raw"
    )
    assert (ds.attrs["input_height"], ds.attrs["input_width"]) == (48, 64)
    assert dict(ds["activation"].sizes)["patch_col"] == 8


def test_a_name_the_hub_forbids(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="neither a folder nor a legal hub id"):
        vitxr.load_model("some one/vit!")


def test_a_revision_on_the_command_line(monkeypatch, saved, capsys):
    calls = hub(monkeypatch, saved)
    assert main(["info", "someone/small-vit", "--revision", "v1"]) == 0
    assert calls["asked"] == ("someone/small-vit", "v1")
    assert COMMIT in capsys.readouterr().out


def test_on_the_command_line(capsys, tmp_path):
    assert main(["info", "dinov2-bas"]) == 1
    assert "facebook/dinov2-base" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_cannot_ask_for_code(saved, key):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "part": {key: "someone/kernel"}}))
    with pytest.raises(ModelError, match="asks for the attention 'someone/kernel'"):
        vitxr.load_model(saved)
    (saved / "config.json").write_text(json.dumps({**config, key: "eager"}))
    vitxr.load_model(saved)
