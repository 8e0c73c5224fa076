"""Every family of transformers, made from its configuration, saved, loaded, and run.

Against transformers' own output of the same saved model. scripts/families.py makes the table
in docs/models.md from the tests here that pass, by their names.
"""

import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import families  # noqa: E402
from families import FAMILIES  # noqa: E402

import vitxr  # noqa: E402
from vitxr.errors import ArgumentError, ModelError  # noqa: E402
from vitxr.models import Preprocess  # noqa: E402
from vitxr.models.capture import capture  # noqa: E402
from vitxr.models.sites import find_sites  # noqa: E402

WITH_PREFIX = [f for f in FAMILIES if f.prefix]
#: Two have classes by their own class, not by its title alone.
WITH_CLASSES = [
    f for f in FAMILIES if f.name in ("ViT", "DeiT", "BEiT", "DINOv2", "Data2Vec vision")
]


def every(of=FAMILIES):
    return pytest.mark.parametrize("family", of, ids=lambda f: f.name)


class Case:
    """A family's saved model, vitxr's and transformers' reading of it."""

    def __init__(self, family, folder):
        self.family = family
        self.folder = families.save(family, folder)
        self.model = vitxr.load_model(folder)
        self.batch = pixels(family.size)
        self.layers = range(len(self.model.blocks))

    def reference(self, folder=None, batch=None, hooked=None, **options):
        """Transformers' own output, by its own loading and arguments."""
        batch = self.batch if batch is None else batch
        title = type(self.model.module).__name__
        own = getattr(transformers, title).from_pretrained(
            folder or self.folder, attn_implementation="eager"
        )
        options |= self.family.reference(own, batch)
        if hooked is not None:
            hooked(own)
        with torch.inference_mode():
            if self.family.name == "SigLIP2 NaFlex":
                batch, extra = packed(batch)
                options |= extra
            return own.eval()(batch, output_hidden_states=True, output_attentions=True, **options)


def pixels(size, frames=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand((frames, 3, *size), generator=generator) * 2 - 1


def packed(batch):
    """What SigLIP 2's own image processor makes of images."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    rows = torch.tensor(np.stack([convert_image_to_patches(image, 8) for image in batch.numpy()]))
    shapes = torch.tensor([[batch.shape[2] // 8, batch.shape[3] // 8]] * len(batch))
    return rows, {"pixel_attention_mask": torch.ones(rows.shape[:2]), "spatial_shapes": shapes}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(family):
        if family.name not in made:
            made[family.name] = Case(family, tmp_path_factory.mktemp("model"))
        return made[family.name]

    return case


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def on_grid(hidden, model):
    """Patch (r, c) is token prefix + columns * r + c, told without a transpose."""
    rows, columns = model.grid
    out = np.empty((len(hidden), hidden.shape[2], rows, columns), np.float32)
    for r in range(rows):
        for c in range(columns):
            out[:, :, r, c] = hidden[:, len(model.prefix) + columns * r + c]
    return out


@every()
def test_structure(cases, family):
    model = cases(family).model
    assert model.prefix == family.prefix
    assert model.grid == family.grid
    assert (model.channels, model.heads, len(model.blocks)) == (32, 4, 3)
    assert cases(family).batch.std() > 0.5


@every()
def test_block_output(cases, family):
    case = cases(family)
    got = capture(case.model, case.batch, case.layers, ["activation"])
    own = case.reference()
    for layer in case.layers:
        hidden = own.hidden_states[layer + 1].numpy()
        close(got["activation"][:, layer], on_grid(hidden, case.model))
    # Blocks differ, so that a shift by one would be seen.
    assert np.abs(np.diff(got["activation"], axis=1)).max() > 0.05


@every()
def test_embedding(cases, family):
    case = cases(family)
    got = capture(case.model, case.batch, case.layers, ["embedding"])["embedding"]
    close(got, on_grid(case.reference().hidden_states[0].numpy(), case.model))


@every(WITH_PREFIX)
def test_prefix_tokens(cases, family):
    case = cases(family)
    got = capture(case.model, case.batch, case.layers, ["prefix"])["prefix"]
    own = case.reference().hidden_states
    for layer in case.layers:
        close(got[:, layer], own[layer + 1].numpy()[:, : len(family.prefix)])


@every(WITH_PREFIX)
def test_prefix_tokens_are_named_by_their_weights(cases, family, tmp_path):
    """A huge value planted in a parameter comes out at the token of its name."""
    from safetensors.torch import load_file, save_file

    case = cases(family)
    path = case.folder / "model.safetensors"
    weights = load_file(path)
    for parameter in family.planted:
        (key,) = [
            k for k in weights if k.endswith(parameter) and "text" not in k and "decoder" not in k
        ]
        planted = dict(weights)
        spike = torch.linspace(0, 1e4, 32)
        planted[key] = weights[key] + spike
        for file in case.folder.iterdir():
            if file.suffix == ".json":
                (tmp_path / file.name).write_bytes(file.read_bytes())
        save_file(planted, tmp_path / path.name, metadata={"format": "pt"})
        model = vitxr.load_model(tmp_path)
        change = np.abs(_entering(model, case.batch) - _entering(case.model, case.batch)).max(
            (0, 2)
        )
        kind = {"cls_token": "class", "class_embedding": "class"}.get(
            parameter, parameter.partition("_")[0]
        )
        named = [i for i, name in enumerate(model.prefix) if name.startswith(kind)]
        assert np.flatnonzero(change).tolist() == named
        assert len(named) == max(1, weights[key].ndim > 1 and weights[key].shape[1])


def _entering(model, batch):
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    with torch.inference_mode():
        model.forward(batch)
    hook.remove()
    return seen[0].numpy()


@every()
def test_attention(cases, family):
    case = cases(family)
    got = capture(case.model, case.batch, case.layers, ["attention"])["attention"]
    own = case.reference().attentions
    for layer in case.layers:
        close(got[:, layer], own[layer].numpy())
    close(got.sum(-1), 1)


@pytest.fixture(scope="module")
def inside(cases):
    """What transformers' own layers take and give: {part: (inputs, outputs)}, one a block."""
    seen = {}

    def look(family):
        if family.name in seen:
            return seen[family.name]
        case, found = cases(family), {part: ([], []) for part in family.parts}

        def keep(kept):
            def hook(_module, args, output):
                kept[0].append(args[0])
                kept[1].append(output)

            return hook

        def hooked(own):
            for path in case.model.block_paths:
                for part, kept in found.items():
                    own.get_submodule(f"{path}.{part}").register_forward_hook(keep(kept))

        case.reference(hooked=hooked)
        return seen.setdefault(family.name, found)

    return look


def widths(tokens, model):
    """On the grid: (frame, width, row, col)."""
    return on_grid(tokens.numpy(), model)


@every()
def test_queries_keys_values(cases, inside, family):
    case, found = cases(family), inside(family)
    names = [f"attention_{what}" for what in ("query", "key", "value")]
    got = capture(case.model, case.batch, case.layers, names)
    for name, part in zip(names, family.parts, strict=False):
        for layer in case.layers:
            own = widths(found[part][1][layer], case.model)
            own = own.reshape(len(own), 4, 8, *own.shape[2:])
            ours = got[name][:, layer]
            if family.name == "DINOv3 ViT" and name != "attention_value":
                # They are rotated by their place: as long as before, and not the same.
                close((ours**2).sum(2), (own**2).sum(2))
                assert np.abs(ours - own).max() > 1e-2
            else:
                close(ours, own)


@every()
def test_attention_output(cases, inside, family):
    case, found = cases(family), inside(family)
    got = capture(case.model, case.batch, case.layers, ["attention_output"])["attention_output"]
    for layer in case.layers:
        close(got[:, layer], widths(found[family.parts[3]][1][layer], case.model))


@every()
def test_mlp_hidden(cases, inside, family):
    case, found = cases(family), inside(family)
    got = capture(case.model, case.batch, case.layers, ["mlp_hidden"])["mlp_hidden"]
    for layer in case.layers:
        close(got[:, layer], widths(found[family.parts[4]][0][layer], case.model))


@every()
def test_modules(cases, inside, family):
    case, found = cases(family), inside(family)
    first = case.model.block_paths[0]
    pattern = f"{first.removesuffix('0')}{{layer}}.{family.parts[4]}"
    sites = find_sites(case.model, list(case.layers), (), {"down": pattern})
    got = capture(case.model, case.batch, case.layers, ["down"], sites=sites)["down"]
    for layer in case.layers:
        close(got[:, layer], widths(found[family.parts[4]][1][layer], case.model))


@every(WITH_CLASSES)
def test_classes(cases, family):
    case = cases(family)
    got = capture(case.model, case.batch, [2], ["logits"])["logits"]
    close(got, case.reference().logits.numpy())
    assert case.model.classes == tuple(f"LABEL_{i}" for i in range(5))


@every()
def test_own_preprocessing(cases, family):
    case = cases(family)
    image = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    got = case.model.preprocess(image)
    assert got.shape == (3, *family.size)
    if family.name in ("SigLIP2 NaFlex", "DINOv3 ViT"):
        expected = _literal(image, family.size, floating=family.name == "DINOv3 ViT")
        np.testing.assert_allclose(got, expected, atol=2e-5)
        return
    own = transformers.AutoImageProcessor.from_pretrained(case.folder, backend="pil")
    expected = own(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(got, expected)


def _literal(image, size, floating):
    """Torch's resizing with an antialiased triangle; of 8 bits, Pillow's."""
    from PIL import Image

    if floating:
        channels = torch.tensor(image).permute(2, 0, 1)[None].float() / 255
        resized = torch.nn.functional.interpolate(
            channels, size=size, mode="bilinear", antialias=True
        )[0].numpy()
    else:
        small = Image.fromarray(image).resize(size[::-1], Image.BILINEAR)
        resized = np.asarray(small).transpose(2, 0, 1) / 255
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.3])
    return (resized - mean[:, None, None]) / std[:, None, None]


@every()
def test_preprocessing_given_with_a_module(cases, family):
    """An image processor in memory does what it does when it is saved beside the model."""
    case = cases(family)
    settings = json.loads((case.folder / "preprocessor_config.json").read_text())
    image = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    expected = case.model.preprocess(image)
    if family.name != "DINOv3 ViT":  # transformers has its own with torchvision only
        given = transformers.AutoImageProcessor.from_pretrained(case.folder, backend="pil")
        own = vitxr.load_model(case.model.module, preprocess=given)
        np.testing.assert_array_equal(own.preprocess(image), expected)
    module = copy.deepcopy(case.model.module)
    module.config.name_or_path = "someone/else"
    said = Preprocess(
        resize=family.size, interpolation="bilinear", mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]), floating=family.name == "DINOv3 ViT",
    )  # fmt: skip
    model = vitxr.load_model(module, preprocess=said)
    np.testing.assert_array_equal(model.preprocess(image), said(image))
    assert model.preprocessing() == said.settings()
    if "crop_size" not in settings:
        np.testing.assert_allclose(said(image), expected, atol=2e-5)


@every()
def test_other_image_sizes(cases, family, tmp_path):
    check_size(cases(family), tmp_path, (48, 48))


@every()
def test_sides_that_differ(cases, family, tmp_path):
    check_size(cases(family), tmp_path, (48, 64))


def check_size(case, folder, size):
    family = case.family
    # Interpolated positions are those of a square grid.
    square = families.save(family, folder, size=(32, 32))
    model = vitxr.load_model(square, input_size=size)
    assert model.grid == (size[0] // 8, size[1] // 8)
    assert model.prefix == family.prefix
    batch = pixels(size)
    got = capture(model, batch, case.layers, ["activation", "embedding"])
    options = {"interpolate_pos_encoding": True} if family.asks else {}
    own = case.reference(square, batch, **options).hidden_states
    close(got["embedding"], on_grid(own[0].numpy(), model))
    close(got["activation"][:, 2], on_grid(own[3].numpy(), model))
    assert model.fingerprint != vitxr.load_model(square).fingerprint or not family.asks
    image = np.zeros((50, 70, 3), np.uint8)
    assert model.preprocess(image).shape == (3, *size)


@every()
def test_its_own_size_changes_nothing(family, tmp_path):
    folder = families.save(family, tmp_path)
    own = vitxr.load_model(folder)
    model = vitxr.load_model(folder, input_size=np.array(own.input_size))
    assert (model.fingerprint, model.how) == (own.fingerprint, own.how)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    np.testing.assert_array_equal(model.preprocess(image), own.preprocess(image))
    assert model.preprocessing() == own.preprocessing()


def test_a_size_of_its_own_that_is_no_multiple_of_the_patch():
    """SigLIP so400m: 384 px in patches of 14."""
    import transformers

    config = transformers.SiglipVisionConfig(
        image_size=20, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    module = transformers.SiglipVisionModel(config)
    assert vitxr.load_model(module, input_size=20).grid == vitxr.load_model(module).grid == (2, 2)
    with pytest.raises(ArgumentError, match=r"input_size=\(28, 28\): expected multiples"):
        vitxr.load_model(module, input_size=28)


@every()
def test_twice_the_same(cases, family):
    case = cases(family)
    names = ["activation", "embedding"]
    got = [capture(case.model, case.batch, case.layers, names) for _ in range(2)]
    alone = capture(case.model, case.batch[1:2], case.layers, names)
    for name in names:
        np.testing.assert_array_equal(got[0][name], got[1][name])
        close(alone[name][0], got[0][name][1])


@every()
def test_the_model_is_left_as_it_was(cases, family):
    """Weights, configuration, training mode and hooks, also after an exception."""
    case = cases(family)
    module = case.model.module
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    config, text = module.config.to_dict(), repr(module)
    attributes = {id(m): set(vars(m)) for m in module.modules()}
    calls = []
    hook = case.model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    module.train()
    try:
        again = vitxr.load_model(module)
        assert not calls  # looking at the model does not call the user's hooks
        with torch.autocast("cpu", torch.bfloat16):
            trained = capture(again, case.batch, case.layers, ["activation"])
        with pytest.raises((RuntimeError, ValueError)):
            capture(again, case.batch[:, :2], case.layers, ["activation"])
        assert all(m.training for m in module.modules())
    finally:
        hook.remove()
        module.eval()
    calm = capture(case.model, case.batch, case.layers, ["activation"])
    np.testing.assert_array_equal(trained["activation"], calm["activation"])
    for m in module.modules():
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
        assert set(vars(m)) == attributes[id(m)]
    assert module.config.to_dict() == config
    assert repr(module) == text
    assert all(torch.equal(weights[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("title", ["Swin", "Hiera"])
def test_stages_are_refused(title, tmp_path):
    small = {
        "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "patch_size": 4,
    }  # fmt: skip
    if title == "Swin":
        config = transformers.SwinConfig(**small, window_size=4)
    else:
        small |= {"image_size": [64, 64], "patch_size": [7, 7], "masked_unit_size": [8, 8]}
        config = transformers.HieraConfig(
            **small, num_query_pool=1, masked_unit_attention=[True, False]
        )
    module = getattr(transformers, f"{title}Model")(config)
    module.save_pretrained(tmp_path)
    for given in (module, tmp_path):
        with pytest.raises(
            ModelError, match=rf"{title}Model works in stages of \[1, 1\] blocks.*one patch grid"
        ):
            vitxr.load_model(given)


@every()
def test_the_model_can_be_trained_afterwards(cases, family):
    case = cases(family)
    module, out = case.model.module, []
    capture(case.model, case.batch, case.layers, ["activation"])
    hook = case.model.blocks[-1].register_forward_hook(lambda _m, _a, o: out.append(o))
    module.train()
    try:
        case.model.forward(case.batch)
        last = out[0] if isinstance(out[0], torch.Tensor) else out[0][0]
        last.square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in module.parameters())
    finally:
        hook.remove()
        module.zero_grad()
        module.eval()


def test_a_masking_of_the_users_own_is_left(cases):
    (family,) = [family for family in FAMILIES if family.name == "ViT-MAE"]
    module = cases(family).model.module
    (embeddings,) = [m for m in module.modules() if hasattr(m, "random_masking")]

    def own(*_):
        raise AssertionError

    embeddings.random_masking = own
    try:
        vitxr.load_model(module)
        assert embeddings.random_masking is own
    finally:
        del embeddings.random_masking


def test_each_parts_attention_is_left():
    config = transformers.SiglipConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "intermediate_size": 64, "image_size": 32, "patch_size": 8},
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                     "intermediate_size": 64, "vocab_size": 30},
    )  # fmt: skip
    module = transformers.SiglipForImageClassification(config)
    module.set_attn_implementation("eager")
    parts = [module.config, module.config.vision_config, module.config.text_config]
    parts[2]._attn_implementation = "sdpa"
    before = [part._attn_implementation for part in parts]
    assert before == ["eager", "eager", "sdpa"]
    model = vitxr.load_model(module)
    capture(model, torch.zeros(2, 3, 32, 32), [0], ["attention"])
    assert [part._attn_implementation for part in parts] == before
