"""Vision Transformers of timm: block output, prefix tokens, preprocessing, loading."""

import copy
import ctypes
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vitxr  # noqa: E402
from vitxr.errors import ModelError  # noqa: E402
from vitxr.models.capture import capture  # noqa: E402
from vitxr.models.gradients import attention_relevance  # noqa: E402


def _name_torchvisions_operators():
    """Timm imports torchvision, whose wheels may expect a torch with CUDA.

    With another torch only the names of its own operators are missing, which no model here uses.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return None
    folder = Path(spec.origin).parent
    try:
        for library in folder.glob("_C*.so"):
            ctypes.CDLL(str(library))
        return None
    except OSError:
        names = [
            "nms",
            "qnms",
            "roi_align",
            "roi_pool",
            "ps_roi_align",
            "ps_roi_pool",
            "deform_conv2d",
        ]
        from torch import library

        operators = library.Library("torchvision", "DEF")
        for name in (*names, *(f"_{name}_backward" for name in names[2:])):
            operators.define(f"{name}(Tensor x) -> Tensor")
        return operators


_OPERATORS = _name_torchvisions_operators()
timm = pytest.importorskip("timm")

REGISTERS = ("class", *(f"register_{i}" for i in range(4)))
MODELS = {
    "vit_tiny_patch16_224": ({"img_size": 64}, ("class",)),
    "vit_tiny_patch16_224 32x48": ({"img_size": (32, 48)}, ("class",)),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 56}, REGISTERS),
    "deit_tiny_distilled_patch16_224": ({"img_size": 64}, ("class", "distillation")),
    "beit_base_patch16_224": ({"img_size": 64, "embed_dim": 48, "num_heads": 4}, ("class",)),
    "vit_base_patch16_clip_224": ({"img_size": 64, "embed_dim": 48, "num_heads": 4}, ("class",)),
    "vit_base_patch16_siglip_224": ({"img_size": 64, "embed_dim": 48, "num_heads": 4}, ()),
    "vit_small_patch16_dinov3": ({"img_size": 64}, REGISTERS),
    "deit3_small_patch16_224": ({"img_size": 64}, ("class",)),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    options, prefix = MODELS[request.param]
    options = {**options, "depth": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(request.param.partition(" ")[0], **options).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter += 0.1 * torch.rand(parameter.shape, generator=generator) - 0.05
    folder = tmp_path_factory.mktemp("timm")
    # A folder as timm's own push to the hub writes it; sizes as lists, as JSON has them.
    timm.models.save_for_hf(module, folder, safe_serialization=True, model_args=options)
    return request.param, module, prefix, folder


def models(*names):
    """Some of the models, and no other."""
    return pytest.mark.parametrize("made", names, indirect=True, scope="module")


WITH_PREFIX = [name for name, (_, prefix) in MODELS.items() if prefix]
WITH_CLASSES = [
    "vit_tiny_patch16_224", "vit_tiny_patch16_224 32x48", "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224", "vit_base_patch16_clip_224", "deit3_small_patch16_224",
]  # fmt: skip
SQUARE = [name for name, (options, _) in MODELS.items() if options["img_size"] != (32, 48)]


def pixels(model, frames=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand((frames, 3, *model.input_size), generator=generator) * 2 - 1


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_block_output(made):
    _, module, prefix, folder = made
    model = vitxr.load_model(folder)
    assert model.prefix == prefix
    assert len(model.prefix) == module.num_prefix_tokens
    assert model.grid == module.patch_embed.grid_size
    batch = pixels(model)
    with torch.inference_mode():
        _, own = module.forward_intermediates(
            batch, indices=[0, 1, 2], return_prefix_tokens=True, output_fmt="NCHW"
        )
    got = capture(model, batch, [0, 1, 2], ["activation"])
    for layer, output in enumerate(own):
        maps = output[0] if isinstance(output, tuple) else output
        close(got["activation"][:, layer], maps.numpy())


@models(*WITH_PREFIX)
def test_prefix_tokens(made):
    _, module, prefix, folder = made
    model = vitxr.load_model(folder)
    batch = pixels(model)
    with torch.inference_mode():
        _, own = module.forward_intermediates(batch, indices=[0, 2], return_prefix_tokens=True)
    got = capture(model, batch, [0, 2], ["prefix"])["prefix"]
    assert got.shape[2] == len(prefix)
    for layer, (_, tokens) in enumerate(own):
        close(got[:, layer], tokens.numpy())


def test_embedding(made):
    _, module, prefix, folder = made
    model = vitxr.load_model(folder)
    batch, entered = pixels(model), []

    def keep(_module, args):
        entered.append(args[0])

    hook = module.blocks[0].register_forward_pre_hook(keep)
    with torch.inference_mode():
        module(batch)
    hook.remove()
    got = capture(model, batch, [0], ["embedding"])["embedding"]
    own = entered[0][:, len(prefix) :].transpose(1, 2).unflatten(2, model.grid)
    close(got, own.numpy())


def test_a_module_in_memory_is_the_same(made):
    _, module, _, folder = made
    model = vitxr.load_model(module)
    assert model.fingerprint == vitxr.load_model(folder).fingerprint


@models(*WITH_CLASSES)
def test_classes(made):
    _, module, _, folder = made
    model = vitxr.load_model(folder)
    assert len(model.classes) == module.num_classes > 1
    batch = pixels(model)
    with torch.inference_mode():
        close(capture(model, batch, [2], ["logits"])["logits"], module(batch).numpy())


def test_the_others_have_no_classes(made):
    assert bool(vitxr.load_model(made[1]).classes) == (made[0] in WITH_CLASSES)


@pytest.mark.parametrize("shape", [(50, 41), (30, 90), (24, 25)])
def test_preprocessing(made, shape):
    from PIL import Image

    _, module, _, folder = made
    model = vitxr.load_model(folder)
    config = timm.data.resolve_data_config({"input_size": (3, *model.input_size)}, model=module)
    own = timm.data.create_transform(**config, is_training=False)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = own(Image.fromarray(image)).numpy()
    np.testing.assert_allclose(model.preprocess(image), expected, atol=1e-6)
    assert model.preprocessing()["interpolation"] == config["interpolation"]


# What timm does to BEiT's biases warns; the numbers are compared below.
RESIZED = pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")


@RESIZED
@models(*SQUARE)
def test_other_image_sizes(made):
    check_size(made, (6, 6))


@RESIZED
@models(*SQUARE)
def test_sides_that_differ(made):
    check_size(made, (4, 6))


def check_size(made, grid):
    name, _, _, folder = made
    step = 14 if "14" in name else 16
    size = (grid[0] * step, grid[1] * step)
    model = vitxr.load_model(folder, input_size=size)
    assert model.grid == grid
    weights = str(folder / "model.safetensors")
    options = {**MODELS[name][0], "depth": 3, "img_size": size}
    own = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": weights}, **options
    )
    batch = pixels(model)
    with torch.inference_mode():
        expected = own.eval().forward_intermediates(batch, indices=[2], intermediates_only=True)
    close(capture(model, batch, [2], ["activation"])["activation"][:, 0], expected[0].numpy())
    assert model.preprocess(np.zeros((90, 50, 3), np.uint8)).shape == (3, *size)


@models("vit_tiny_patch16_224 32x48")
def test_positions_of_another_grid_are_not_made_up(made):
    """Made for sides that differ: its own size works, as everywhere here, and no other."""
    assert vitxr.load_model(made[3]).grid == (2, 3)
    with pytest.raises(ModelError, match=r"made for images of 32 x 48 px.*square grids only"):
        vitxr.load_model(made[3], input_size=(64, 96))


def test_a_module_of_dynamic_size():
    """In memory, at a size that it takes by itself: images are preprocessed to that."""
    from PIL import Image

    module = timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=64, dynamic_img_size=True
    ).eval()
    model = vitxr.load_model(module, input_size=(96, 128))
    assert model.grid == (6, 8)
    config = timm.data.resolve_data_config({"input_size": (3, 96, 128)}, model=module)
    own = timm.data.create_transform(**config, is_training=False)
    image = np.random.default_rng(0).integers(0, 256, (150, 141, 3), dtype=np.uint8)
    np.testing.assert_allclose(model.preprocess(image), own(Image.fromarray(image)), atol=1e-6)
    stim = vitxr.open_images({"one": image[None]})
    ds = vitxr.extract(stim, model, layers=[1], shifts=None)
    with torch.inference_mode():
        expected = module.forward_intermediates(
            torch.as_tensor(model.preprocess(image))[None], indices=[1], intermediates_only=True
        )
    close(ds["activation"].values.reshape(expected[0].shape), expected[0].numpy())
    assert ds.attrs["input_width"] == 128
    # Its own size is what it has without.
    own, same = vitxr.load_model(module), vitxr.load_model(module, input_size=64)
    assert (own.fingerprint, own.processor) == (same.fingerprint, same.processor)
    fixed = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)
    with pytest.raises(ModelError, match=r"does not take images of 96 x 96 px"):
        vitxr.load_model(fixed, input_size=96)


def test_what_is_not_one_grid_is_refused():
    module = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1))
    with pytest.raises(ModelError, match="SwinTransformer has no `blocks` with attention on one"):
        vitxr.load_model(module)
    module = timm.create_model("samvit_base_patch16", embed_dim=24, depth=2, img_size=64)
    with pytest.raises(ModelError, match=r"block blocks\.0 is \(4, 4, 4, 24\)"):
        vitxr.load_model(module)


@pytest.mark.parametrize(
    "name", ["naflexvit_base_patch16_gap", "mixer_s32_224", "levit_128", "crossvit_tiny_240"]
)
def test_what_is_no_plain_vision_transformer_is_refused(name):
    with pytest.raises(ModelError, match=r"has no `blocks` with attention on one grid"):
        vitxr.load_model(timm.create_model(name))


def test_names(monkeypatch, made):
    import huggingface_hub

    _, _, _, folder = made
    asked = []

    def info(self, name, **_):
        asked.append(name)
        return type("Info", (), {"sha": "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3"})

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    model = vitxr.load_model("timm:vit_base_patch16_224")
    assert asked == ["timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"]
    assert model.name == "timm:vit_base_patch16_224"
    assert model.revision == "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3"
    assert set(model.versions()) == {"torch_version", "timm_version"}


def test_the_catalogs_files_are_those_that_timm_loads():
    rows = vitxr.catalog.entries(vitxr.catalog._file(None).with_name("models.yaml"))
    for name in rows.index[rows.index.str.startswith("timm:")]:
        hub = timm.get_pretrained_cfg(name.removeprefix("timm:")).hf_hub_id
        assert rows.loc[name, "url"] == f"hf://{hub}@main/config.json"


def test_unknown_names():
    with pytest.raises(ModelError, match=r"'vit_base_patch16_225'; the nearest: timm:vit_base_pat"):
        vitxr.load_model("timm:vit_base_patch16_225")


def test_only_safetensors(made, tmp_path):
    _, _, _, folder = made
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ModelError, match="no safetensors weights"):
        vitxr.load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match="cannot be loaded from"):
        vitxr.load_model(tmp_path)


def test_a_config_cannot_name_other_weights(made, tmp_path):
    _, module, _, folder = made
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    evil = tmp_path / "evil.pth"
    torch.save({k: torch.full_like(v, 0.1) for k, v in module.state_dict().items()}, evil)
    args = {**(config.get("model_args") or {}), "checkpoint_path": str(evil)}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_args": args}))
    with pytest.raises(ModelError, match=r"names checkpoint_path, which would load other weights"):
        vitxr.load_model(tmp_path)
    cfg = {**config["pretrained_cfg"], "source": "hf-hub", "hf_hub_id": "someone/else"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg}))
    loaded = vitxr.load_model(tmp_path).module.state_dict()
    for key, value in module.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)


def test_relevance_is_that_of_unfused_attention(made):
    """Equations 5 and 6 of Chefer et al. (2021), on weights that timm computes in the open."""
    _, module, prefix, _ = made
    model = vitxr.load_model(module)
    frame = pixels(model, 1)
    values, _, read = attention_relevance(model, frame.numpy(), [2])

    plain, maps = copy.deepcopy(module), []

    def keep(_module, _args, output):
        output.retain_grad()
        maps.append(output)

    for block in plain.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(keep)
    plain(frame)[0, 2].backward()
    tokens = len(prefix) + model.grid[0] * model.grid[1]
    R = np.eye(tokens)
    for weight in maps:
        R = R + (weight.grad * weight)[0].clamp(min=0).mean(0).detach().double().numpy() @ R
    rows = [prefix.index(name) for name in read] or range(len(prefix), tokens)
    expected = (R - np.eye(tokens))[list(rows)].mean(0)[len(prefix) :].reshape(model.grid)
    np.testing.assert_allclose(values[0, 0], expected, rtol=1e-3, atol=1e-4 * expected.max())
