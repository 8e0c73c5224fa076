"""Loading models and capturing what is inside, against transformers itself."""

import json
import pickle
import re
import shutil
import threading

import numpy as np
import pytest
from conftest import make_vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import vitxr  # noqa: E402
from vitxr.errors import ArgumentError, ModelError  # noqa: E402
from vitxr.models.capture import capture  # noqa: E402


@pytest.fixture(scope="module")
def batch():
    return torch.rand((4, 3, 32, 48), generator=torch.Generator().manual_seed(0)) * 255


@pytest.fixture(scope="module")
def reference(vit, batch):
    """What transformers returns itself."""
    eager = make_vit(attn_implementation="eager")
    with torch.inference_mode():
        return eager(batch, output_hidden_states=True, output_attentions=True)


@pytest.fixture
def saved(tmp_path, vit):
    """A model saved with its processor, as a user would have it."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    vit.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 48}).save_pretrained(tmp_path)
    return tmp_path


ALL = ("activation", "prefix", "embedding", "attention", "logits")


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_structure(model):
    assert model.grid == (4, 6)
    assert model.prefix == ("class",)
    assert (model.channels, model.heads, len(model.blocks)) == (48, 4, 3)
    assert model.input_size == (32, 48)
    assert model.classes == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")


def test_captured_equals_transformers_own(model, batch, reference):
    got = capture(model, batch, [0, 1, 2], ALL)
    for layer in range(3):
        hidden = reference.hidden_states[layer + 1].numpy()
        close(got["prefix"][:, layer], hidden[:, :1])
        # patch (r, c) is token 1 + 6 r + c
        for r, c in [(0, 0), (1, 3), (3, 5)]:
            close(got["activation"][:, layer, :, r, c], hidden[:, 1 + 6 * r + c])
        close(got["attention"][:, layer], reference.attentions[layer].numpy())
    close(got["attention"].sum(-1), 1)
    embedded = reference.hidden_states[0].numpy()[:, 1:].transpose(0, 2, 1)
    close(got["embedding"].reshape(4, 48, 24), embedded)
    close(got["logits"], reference.logits.numpy())


def test_early_exit_runs_no_deeper_block(model, batch):
    ran = []
    hooks = [
        b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.blocks)
    ]
    try:
        capture(model, batch, [1], ["activation"])
        assert ran == [0, 1]  # these hooks were there first
        ran.clear()
        capture(model, batch, [1], ["activation", "logits"])
        assert ran == [0, 1, 2]
    finally:
        for hook in hooks:
            hook.remove()


def hooks_on(module):
    return sum(len(m._forward_hooks) for m in module.modules())


def test_nothing_is_left_behind(batch):
    vit = make_vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = vitxr.load_model(vit)
    before = hooks_on(vit), vit.config._attn_implementation
    assert before[1] != "eager"
    vit.train()
    vit.vit.layers[1].eval()
    weights = {k: v.clone() for k, v in vit.state_dict().items()}
    got = capture(model, batch, [0], ALL)
    assert vit.training
    assert vit.vit.layers[0].training
    assert not vit.vit.layers[1].training
    # Dropout and autocast of the surroundings have no say.
    with torch.autocast("cpu", torch.bfloat16):
        again = capture(model, batch, [0], ALL)
    for name in ALL:
        np.testing.assert_array_equal(got[name], again[name])
    with pytest.raises(ValueError, match="channel dimension"):
        capture(model, batch[:, :1], [0], ALL)
    assert (hooks_on(vit), vit.config._attn_implementation) == before
    assert all(torch.equal(weights[k], v) for k, v in vit.state_dict().items())


def test_wrong_tokens_are_refused(model, batch):
    from dataclasses import replace

    wrong = replace(model, prefix=())
    with pytest.raises(ModelError, match=r"expected \(frames, 24, 48\).*cannot label"):
        capture(wrong, batch, [0], ["activation"])
    with pytest.raises(ModelError, match="attention has queries"):
        capture(replace(model, heads=3), batch, [0], ["attention"])


def test_a_saved_model_loads_the_same(saved, model):
    loaded = vitxr.load_model(saved)
    assert loaded.fingerprint == model.fingerprint
    assert loaded.processor is not None
    assert loaded.preprocess(np.zeros((7, 9, 3), np.uint8)).shape == (3, 32, 48)
    with torch.no_grad():
        loaded.blocks[0].mlp.fc1.bias[0] += 1
    # What is in memory travels, not what is on disk.
    back = pickle.loads(pickle.dumps(loaded))
    assert back.fingerprint == loaded.fingerprint != model.fingerprint
    half = pickle.loads(pickle.dumps(loaded.cast("bfloat16")))
    assert next(half.module.parameters()).dtype == torch.bfloat16


def test_preprocessing_is_the_models_own(saved):
    from transformers import AutoImageProcessor

    image = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    expected = AutoImageProcessor.from_pretrained(saved, backend="pil")(image, return_tensors="np")[
        "pixel_values"
    ][0]
    np.testing.assert_array_equal(vitxr.load_model(saved).preprocess(image), expected)


def test_fingerprint_sees_one_changed_weight(vit, model):
    other = make_vit()
    assert vitxr.load_model(other).fingerprint == model.fingerprint
    with torch.no_grad():
        other.vit.layers[2].mlp.fc1.weight[3, 4] += 1e-6
    assert vitxr.load_model(other).fingerprint != model.fingerprint


def test_a_copy_of_a_model_transformers_left_hooks_on(batch):
    module = make_vit()
    states = module(batch, output_hidden_states=True).hidden_states
    half = vitxr.load_model(module).cast("bfloat16")
    again = pickle.loads(pickle.dumps(vitxr.load_model(module)))
    close(capture(again, batch, [1], ["prefix"])["prefix"][:, 0], states[2][:, :1].detach())
    assert again.module(batch, output_hidden_states=True).hidden_states is not None
    assert len(half.module(batch, output_hidden_states=True).hidden_states) == 4
    assert len(module(batch, output_hidden_states=True).hidden_states) == 4


def test_bfloat16_leaves_the_users_weights(vit, model):
    half = model.cast("bfloat16")
    assert next(half.module.parameters()).dtype == torch.bfloat16
    assert next(vit.parameters()).dtype == torch.float32
    assert model.cast("float32") is model


def test_the_bundled_model_goes_through_the_same_code():
    model = vitxr.load_model("digits")
    assert model.classes == tuple("0123456789")
    assert model.revision == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "no model named 'digit': expected 'digits'"),
        ("./nowhere", "no model folder at './nowhere'"),
        ("/nowhere/model", "no model folder at"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ModelError, match=message):
        vitxr.load_model(name)


def test_no_hub_says_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot reach the model hub.*hf download.*'digits'"):
        vitxr.load_model("google/vit-base-patch16-224-nowhere")


def test_a_cached_model_loads_without_a_hub(monkeypatch, tmp_path, saved, model):
    import huggingface_hub

    commit = "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3"
    repo = tmp_path / "cache" / "models--someone--small-vit"
    shutil.copytree(saved, repo / "snapshots" / commit, ignore=lambda *_: ["cache"])
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)

    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kw: _snapshot_download(name, cache_dir=str(tmp_path / "cache"), **kw),
    )
    loaded = vitxr.load_model("someone/small-vit")
    assert loaded.revision == commit
    assert loaded.fingerprint == model.fingerprint


def _snapshot_download(*args, **kwargs):
    from huggingface_hub._snapshot_download import snapshot_download

    return snapshot_download(*args, **kwargs)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def test_remote_code_is_never_run(saved):
    edit_config(saved, auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(ModelError, match="asks to run code that comes with it"):
        vitxr.load_model(saved)


def test_pickled_weights_are_not_loaded(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights"):
        vitxr.load_model(saved)


def test_corrupt_weights(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded from"):
        vitxr.load_model(saved)


def test_corrupt_config(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        vitxr.load_model(saved)


def test_missing_weights_are_not_made_up(saved):
    from safetensors.torch import load_file, save_file

    path = saved / "model.safetensors"
    weights = load_file(path)
    del weights["classifier.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing \['classifier.weight'\].*random weights"):
        vitxr.load_model(saved)


def test_unknown_architecture(saved):
    edit_config(saved, architectures=["ViTForMindReading"])
    with pytest.raises(ModelError, match="'ViTForMindReading', which transformers"):
        vitxr.load_model(saved)


def test_a_text_model_is_refused():
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=10,
    )
    with pytest.raises(ModelError, match="BertModel is a model of text"):
        vitxr.load_model(transformers.BertModel(config))


def test_a_worker_refuses_other_weights(saved):
    from vitxr.models.load import Reference

    loaded = vitxr.load_model(saved)
    sent = pickle.dumps(Reference(loaded, loaded.fingerprint))
    assert len(sent) < 2000
    assert pickle.loads(sent).model().fingerprint == loaded.fingerprint
    with torch.no_grad():
        loaded.blocks[0].mlp.fc1.bias[0] += 1
    changed = Reference(loaded, loaded.fingerprint)
    assert changed.model() is loaded
    with pytest.raises(ModelError, match="changed in memory or on disk"):
        pickle.loads(pickle.dumps(changed)).model()


def test_a_model_with_hooks_is_sent_whole(saved):
    from vitxr.models.load import Reference

    loaded = vitxr.load_model(saved)
    handle = loaded.blocks[0].register_forward_hook(zero)
    (hook,) = loaded.hooks()
    assert re.fullmatch(r"vit\.layers\.0: zero \([0-9a-f]{12}\)", hook)
    sent = pickle.loads(pickle.dumps(Reference(loaded, loaded.fingerprint))).model()
    assert sent.hooks() == loaded.hooks()
    handle.remove()


def zero(_module, _args, output):
    return output * 0


def test_images_three_pixels_high_are_not_channels_first(saved):
    model = vitxr.load_model(saved)
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
    tall = np.repeat(image, 2, axis=0)  # six pixels high: no doubt
    from PIL import Image

    expected = np.asarray(Image.fromarray(image).resize((48, 32), Image.BILINEAR)) / 127.5 - 1
    np.testing.assert_allclose(model.preprocess(image).transpose(1, 2, 0), expected, atol=1e-6)
    assert model.preprocess(tall).shape == (3, 32, 48)


def test_a_revision_goes_with_the_hub(saved):
    for given in ("digits", saved):
        with pytest.raises(ModelError, match="'main' goes with models of the hub"):
            vitxr.load_model(given, revision="main")
    with pytest.raises(ArgumentError, match=r"revision='main' goes with.*a module in memory"):
        vitxr.load_model(make_vit(), revision="main")
    with pytest.raises(ArgumentError, match=r"revision=5; expected .* as text"):
        vitxr.load_model("digits", revision=5)


def test_a_model_shows_itself_in_a_few_lines(model):
    assert "grid 4 x 6" in repr(model)
    assert repr(model).count("\n") < 15


def test_a_model_shows_its_preprocessing():
    import transformers

    from vitxr.models import Preprocess

    def line(**given):
        return vitxr.load_model(make_vit(), **given).summary()["preprocessing"]

    assert line() == "not known; preprocess='raw' only"
    digits = vitxr.load_model("digits")
    assert digits.summary()["preprocessing"] == "32 x 32 px (bicubic), mean 0.5, std 0.5"
    rgb = {"mean": (0.5, 0.4, 0.5), "std": (0.2, 0.25, 0.3)}
    told = "shorter side 40 px (lanczos), middle 32 x 48 px, mean 0.5 0.4 0.5, std 0.2 0.25 0.3"
    own = Preprocess(resize=40, crop=(32, 48), interpolation="lanczos", **rgb)
    theirs = transformers.ViTImageProcessorPil(
        size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 48},
        resample=1, image_mean=rgb["mean"], image_std=rgb["std"],
    )  # fmt: skip
    assert line(preprocess=own) == line(preprocess=theirs) == told
    assert line(preprocess=transformers.ViTImageProcessorPil(
        size={"height": 32, "width": 48}, do_rescale=False, do_normalize=False,
    )) == "32 x 48 px (bilinear), values times 1"  # fmt: skip


def test_greyscale_models_are_refused():
    with pytest.raises(ModelError, match="images of 1 channels; expected 3"):
        vitxr.load_model(make_vit(num_channels=1))


def test_without_a_processor(model):
    with pytest.raises(ModelError, match=r"load_model\(module, preprocess=.*preprocess='raw'"):
        model.preprocess(np.zeros((4, 4, 3), np.uint8))


def test_a_folder_without_a_processor(saved):
    (saved / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json\).*Save the processor beside"):
        vitxr.load_model(saved).preprocess(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta"])
def test_unusable_device(saved, device):
    for given in (saved, make_vit()):
        with pytest.raises(ModelError, match=rf"device='{device}' cannot be used: .*Pass 'auto'"):
            vitxr.load_model(given, device=device)
    with pytest.raises(ArgumentError, match=r"device=0: expected 'auto', 'cpu'"):
        vitxr.load_model(saved, device=0)


def test_weights_that_cannot_run():
    with torch.device("meta"):
        module = make_vit()
    with pytest.raises(ModelError, match="on torch's meta device"):
        vitxr.load_model(module)
    with pytest.raises(ModelError, match="its weights are none of floating point"):
        vitxr.load_model(torch.nn.ReLU())


def test_what_changes_numbers_is_in_the_fingerprint():
    def model(**options):
        return vitxr.load_model(make_vit(**options))

    same, other = model(), model(layer_norm_eps=0.5)
    assert same.fingerprint == model().fingerprint != other.fingerprint
    # A part that is exchanged in memory, of which the configuration says nothing.
    changed = model()
    (act,) = (n for n, m in changed.blocks[1].mlp.named_children() if "GELU" in type(m).__name__)
    setattr(changed.blocks[1].mlp, act, torch.nn.ReLU())
    assert changed.fingerprint != same.fingerprint
    # How attention is computed is rounding.
    same.module.set_attn_implementation("eager")
    assert same.fingerprint == model().fingerprint


def test_a_hook_hung_after_extract_is_refused():
    stim = vitxr.open_images({"one": np.zeros((1, 32, 32, 3), np.uint8)})
    model = vitxr.load_model("digits")
    ds = vitxr.extract(stim, model, layers=[2], shifts=None)
    before = ds.activation.values
    handle = model.blocks[1].register_forward_hook(zero)
    with pytest.raises(ModelError, match="weights or hooks were changed after extract"):
        ds.activation.compute()
    hooked = vitxr.extract(stim, model, layers=[2], shifts=None)
    assert not np.array_equal(hooked.activation.values, before)
    handle.remove()
    with pytest.raises(ModelError, match="weights or hooks were changed after extract"):
        hooked.activation.compute()
    np.testing.assert_array_equal(ds.activation.values, before)


def test_copies_beside_a_pass_are_without_its_hooks():
    """A pass in another thread has hooks on the module; a copy waits until they are gone."""
    model, other = vitxr.load_model("digits"), []
    beside = threading.Thread(
        target=lambda: other.append((model.hooks(), model.cast("bfloat16").hooks()))
    )

    def start(*_):
        if not other and not beside.ident:
            beside.start()
            beside.join(0.5)

    handle = model.blocks[1].register_forward_hook(start)
    own = model.hooks()
    capture(model, torch.zeros((1, 3, 32, 32)), [0, 3], ["activation", "embedding"])
    beside.join()
    handle.remove()
    assert [len(found) for found in other[0]] == [1, 1]
    assert other[0][0][0].split(" (")[0] == own[0].split(" (")[0]


def test_hooks_of_one_name_are_told_apart():
    def lesion(gain):
        return lambda _module, _args, output: output * gain

    names = []
    for gain in (1.0, 0.0, 1.0):
        loaded = vitxr.load_model(make_vit())
        loaded.blocks[0].register_forward_hook(lesion(gain))
        names.append(loaded.hooks())
    assert names[0] == names[2] != names[1]
