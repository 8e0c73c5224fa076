"""A Vision Transformer of the user's own, in plain torch, through an adapter."""

import copy
import json
import pickle
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import make_vit  # noqa: E402

import vitxr  # noqa: E402
from vitxr.errors import ArgumentError, ModelError  # noqa: E402
from vitxr.models import Adapter, Preprocess  # noqa: E402
from vitxr.models.capture import capture  # noqa: E402

nn = torch.nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.heads = heads

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return x + self.mlp(self.norm2(x))


class Own(nn.Module):
    """Two class-like tokens, patches of 4 x 8 px, an order of patches to choose."""

    def __init__(
        self, size=(16, 32), prefix=1, columns_first=False, after=0, twice=False, serpentine=False
    ):
        super().__init__()
        torch.manual_seed(0)
        rows, columns = size[0] // 4, size[1] // 8
        self.cut = nn.Conv2d(3, 24, (4, 8), stride=(4, 8))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 24))
        self.extra = nn.Parameter(torch.randn(1, prefix - 1 + after, 24))
        self.place = nn.Parameter(torch.randn(1, prefix + after + rows * columns, 24))
        self.stack = nn.ModuleList(Block(24, 3) for _ in range(4))
        self.head = nn.Linear(24, 3)
        self.prefix, self.columns_first, self.twice = prefix, columns_first, twice
        self.serpentine = serpentine

    def forward(self, images):
        cells = self.cut(images)
        cells = cells.transpose(2, 3) if self.columns_first else cells
        if self.serpentine:
            cells = torch.stack(
                [r.flip(-1) if i % 2 else r for i, r in enumerate(cells.unbind(2))], 2
            )
        cells = cells.flatten(2).transpose(1, 2)
        before, after = self.extra.split(
            [self.prefix - 1, self.extra.shape[1] - self.prefix + 1], 1
        )
        n = len(images)
        parts = [self.cls_token, before, cells, after]
        x = torch.cat([p.expand(n, -1, -1) for p in parts], 1) + self.place
        for block in self.stack:
            x = block(x)
            x = block(x) if self.twice else x
        return self.head(x[:, 0])


ADAPTER = Adapter(blocks="stack", prefix=("class",), patch=(4, 8), input_size=(16, 32), heads=3)


def states(module, images):
    """Every block's output, by running the parts one by one."""
    with torch.inference_mode():
        cells = module.cut(images).flatten(2).transpose(1, 2)
        x = torch.cat([module.cls_token.expand(len(images), 1, 24), cells], 1) + module.place
        out = [x]
        for block in module.stack:
            out.append(block(out[-1]))
    return [x.numpy() for x in out]


def test_it_is_captured():
    module = Own().eval()
    model = vitxr.load_model(module, adapter=ADAPTER)
    assert (model.grid, model.channels, model.prefix) == ((4, 4), 24, ("class",))
    batch = torch.rand((3, 3, 16, 32))
    got = capture(model, batch, [0, 3], ["activation", "prefix", "embedding"])
    own = states(module, batch)
    np.testing.assert_allclose(got["prefix"][:, 1], own[4][:, :1], rtol=1e-5, atol=1e-6)
    for r, c in [(0, 0), (1, 3), (3, 2)]:
        token = 1 + 4 * r + c
        np.testing.assert_allclose(got["embedding"][:, :, r, c], own[0][:, token], atol=1e-6)
        for i, layer in enumerate([0, 3]):
            np.testing.assert_allclose(
                got["activation"][:, i, :, r, c], own[layer + 1][:, token], rtol=1e-5, atol=1e-5
            )


def test_extraction_with_classes_and_preprocessing():
    adapter = Adapter(
        blocks=[f"stack.{i}" for i in range(4)], prefix=("class",), patch=(4, 8),
        input_size=(16, 32), heads=3, classes=("cat", "dog", "owl"),
    )  # fmt: skip
    module = Own().eval()
    own = Preprocess(resize=(16, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    model = vitxr.load_model(module, adapter=adapter, preprocess=own)
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 32, 3), dtype=np.uint8)
    stim = vitxr.open_images({"one": image})
    names = ["activation", "logits"]
    ds = vitxr.extract(stim, model, layers=[2], shifts=None, variables=names).compute()
    frame = torch.tensor(image).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        logits = module(frame).numpy()
    np.testing.assert_allclose(ds["logits"].values.reshape(1, 3), logits, rtol=1e-4, atol=1e-5)
    assert ds["class"].values.tolist() == ["cat", "dog", "owl"]
    tokens = states(module, frame)[3][0, 1:].T.reshape(24, 4, 4)
    np.testing.assert_allclose(
        ds["activation"].values.reshape(24, 4, 4), tokens, rtol=1e-4, atol=1e-5
    )
    assert ds.attrs["patch_width"] == 8


def test_copies_keep_what_was_told():
    model = vitxr.load_model(Own(), adapter=ADAPTER)
    back = pickle.loads(pickle.dumps(model))
    assert back.fingerprint == model.fingerprint
    assert (back.prefix, back.block_paths) == (model.prefix, model.block_paths)
    half = model.cast("bfloat16")
    assert half.blocks[1] is half.module.stack[1]
    other = vitxr.load_model(Own(), adapter=ADAPTER)
    assert other.fingerprint == model.fingerprint
    other.module.stack[0].norm1.eps = 0.1
    assert other.fingerprint != model.fingerprint


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        ({}, {"prefix": ()}, r"1 tokens stand before the patches|adapter says \(\)"),
        ({}, {"prefix": ("class", "register_0")}, r"put the tokens \('class',\).*says"),
        ({}, {"patch": 4}, r"patches of 4 x 4 px have 4 x 8 = 32 patches.*17 tokens"),
        ({}, {"patch": (8, 4)}, r"2 x 8 = 16 patches.*change the tokens"),
        ({}, {"input_size": (32, 32)}, r"does not take images of 32 x 32 px: RuntimeError"),
        ({}, {"input_size": (2, 32)}, "smaller than one patch"),
        ({}, {"blocks": "blocks"}, r"no module 'blocks'.*lists of modules: stack"),
        ({}, {"blocks": "cut"}, r"'cut', which.*is a Conv2d and holds none.*blocks=\['cut'\]"),
        ({}, {"heads": 5}, r"24 channels, and the adapter says heads=5; expected a divisor"),
        ({}, {"classes": ("cat", "dog")}, r"2 classes are named.*shape \(1, 3\); expected \(1, 2"),
        ({}, {"blocks": ["stack.1", "stack.0"]}, r"run in the order \[1, 0\]"),
        ({"twice": True}, {}, r"run in the order \[0, 0, 1, 1"),
        ({"columns_first": True, "size": (16, 64)}, {"input_size": (16, 64)}, "row by row"),
        ({"serpentine": True}, {}, "row by row"),
        ({"serpentine": True, "size": (12, 32)}, {"input_size": (12, 32)}, "row by row"),
        ({"after": 1}, {}, r"Expected prefix tokens, then one token a patch"),
        ({"prefix": 2}, {}, r"2 tokens stand before the patches; the adapter names 1"),
    ],
)  # fmt: skip
def test_what_is_told_wrong_is_refused(module, changes, message):
    adapter = Adapter(**{**vars(ADAPTER), **changes})
    with pytest.raises(ModelError, match=message):
        vitxr.load_model(Own(**module), adapter=adapter)


def test_a_token_without_a_known_weight_is_named_by_the_adapter():
    adapter = Adapter(**{**vars(ADAPTER), "prefix": ("class", "mood")})
    assert vitxr.load_model(Own(prefix=2), adapter=adapter).prefix == ("class", "mood")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 2.5}, "patch=2.5: expected a number of pixels"),
        ({"input_size": (1, 2, 3)}, r"input_size=\(1, 2, 3\): expected a number of pixels"),
        ({"patch": True}, "patch=True: expected a number of pixels"),
        ({"prefix": "class"}, "prefix='class': expected distinct names"),
        ({"prefix": None}, "prefix=None: expected distinct names"),
        ({"prefix": ("class", "class")}, "expected distinct names"),
        ({"prefix": (1,)}, "expected distinct names"),
        ({"blocks": 3}, "blocks=3: expected the path of the list of blocks"),
        ({"blocks": ()}, r"blocks=\(\): expected"),
        ({"blocks": ["stack.0", "stack.0"]}, "the path of each block, once"),
        ({"heads": 0}, "heads=0: expected the number of attention heads"),
        ({"heads": 1.5}, "heads=1.5: expected"),
        ({"heads": None}, "heads=None: expected"),
        ({"classes": "abc"}, "classes='abc': expected a sequence of distinct names"),
        ({"classes": None}, "classes=None: expected a sequence"),
        ({"classes": ("a", "b", "a")}, "'a' is there twice: number those"),
    ],
)
def test_arguments(changes, message):
    with pytest.raises(ArgumentError, match=message):
        Adapter(**{**vars(ADAPTER), **changes})


def test_numbers_of_numpys():
    adapter = Adapter("stack", ["class"], np.array([4, 8]), (np.int64(16), 32), np.int32(3))
    model = vitxr.load_model(Own(), adapter=adapter)
    assert (model.patch, model.input_size, model.heads) == ((4, 8), (16, 32), 3)
    assert model.fingerprint == vitxr.load_model(Own(), adapter=ADAPTER).fingerprint


def test_classes_of_a_module_that_returns_tokens():
    class Tokens(Own):
        def forward(self, images):
            super().forward(images)
            return {"tokens": images}

    adapter = Adapter(**{**vars(ADAPTER), "classes": ("cat", "dog", "owl")})
    with pytest.raises(ModelError, match=r"returns a dict without logits; expected \(1, 3\)"):
        vitxr.load_model(Tokens(), adapter=adapter)


def test_as_many_passes_as_before():
    """What is checked of classes and heads is read from a pass that is made anyway."""
    adapter, passes = Adapter(**{**vars(ADAPTER), "classes": ("cat", "dog", "owl")}), []

    class Counted(Own):
        def forward(self, images):
            passes.append(len(images))
            return super().forward(images)

    vitxr.load_model(Counted(), adapter=ADAPTER)
    before = list(passes)
    passes.clear()
    vitxr.load_model(Counted(), adapter=adapter)
    assert passes == before
    assert sum(passes) <= 8


def test_logits_without_names_say_what_to_do():
    image = np.zeros((1, 16, 32, 3), np.uint8)
    stim = vitxr.open_images({"one": image})
    model = vitxr.load_model(Own(), adapter=ADAPTER)
    with pytest.raises(ArgumentError, match=r"no `logits`.*Adapter\(\.\.\., classes=\.\.\.\)"):
        vitxr.extract(stim, model, variables=["logits"], preprocess="raw")


def test_where_an_adapter_does_not_go():
    with pytest.raises(ArgumentError, match="'digits' is a name"):
        vitxr.load_model("digits", adapter=ADAPTER)
    with pytest.raises(ArgumentError, match=r"'digits' is a name \(its own is preprocessor_config"):
        vitxr.load_model("digits", preprocess=Preprocess())
    with pytest.raises(ArgumentError, match=r"beside an adapter that says \(16, 32\)"):
        vitxr.load_model(Own(), adapter=ADAPTER, input_size=32)
    assert vitxr.load_model(Own(), adapter=ADAPTER, input_size=(16, 32)).grid == (4, 4)
    with pytest.raises(ArgumentError, match=r"expected a vitxr\.models\.Adapter"):
        vitxr.load_model(Own(), adapter="stack")
    with pytest.raises(ModelError, match=r"Own is not a Vision Transformer.*adapter="):
        vitxr.load_model(Own())


def test_models_of_equal_weights_are_told_apart():
    def fingerprint(blocks="layers", heads=4, **options):
        torch.manual_seed(0)
        options = {"dim_feedforward": 32, "batch_first": True, "dropout": 0.0} | options
        layer = nn.TransformerEncoderLayer(16, heads, **options)
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        encoder.cut = nn.Conv2d(3, 16, 8, stride=8)
        encode = encoder.forward
        encoder.forward = lambda images: encode(encoder.cut(images).flatten(2).transpose(1, 2))
        adapter = Adapter(blocks=blocks, prefix=(), patch=8, input_size=16, heads=heads)
        return vitxr.load_model(encoder, adapter=adapter).fingerprint

    assert fingerprint() == fingerprint()
    others = [
        fingerprint(heads=2),
        fingerprint(norm_first=True),
        fingerprint(activation="gelu"),
        fingerprint(blocks=["layers.0", "layers.1"]),
        fingerprint(blocks=["layers.0", "layers.2"]),
    ]
    assert len({fingerprint(), *others}) == 6


def test_functions_that_a_module_holds_are_told_apart():
    def fingerprint(act):
        module = Own()
        for block in module.stack:
            block.act = act
        return vitxr.load_model(module, adapter=ADAPTER).fingerprint

    def leaky(slope):
        return lambda x: nn.functional.leaky_relu(x, slope)

    gelu, tanh = (partial(nn.functional.gelu, approximate=how) for how in ("none", "tanh"))
    acts = [gelu, tanh, leaky(0.1), leaky(0.2), lambda x: x * 2, lambda x: x * 3, {"by": gelu}]
    found = [fingerprint(act) for act in acts]
    assert len(set(found)) == len(acts)
    assert [fingerprint(act) for act in (partial(gelu), leaky(0.1))] == [found[0], found[2]]


def test_what_a_pass_leaves_in_a_module_does_not_count():
    module = Own()
    model = vitxr.load_model(module, adapter=ADAPTER)
    before = model.fingerprint
    module.stack[0].map, module.stack[1].maps = torch.rand(3), [torch.rand(2)]
    assert model.fingerprint == before


def test_numpy_numbers_are_numbers():
    n = np.int64
    adapter = Adapter(
        blocks="stack", prefix=("class",), patch=np.array([4, 8]), input_size=(n(16), n(32)),
        heads=n(3),
    )  # fmt: skip
    given = Preprocess(
        resize=n(16), crop=(n(16), n(32)), mean=np.full(3, 0.5, np.float32), std=(n(1),) * 3
    )
    plain = Preprocess(resize=16, crop=(16, 32), mean=(0.5,) * 3, std=(1.0,) * 3)
    model = vitxr.load_model(Own(), adapter=adapter, preprocess=given)
    told = vitxr.load_model(Own(), adapter=ADAPTER)
    assert model.fingerprint == told.fingerprint
    assert json.dumps(model.preprocessing()) == json.dumps(plain.settings())
    image = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    np.testing.assert_array_equal(model.preprocess(image), plain(image))


def test_weights_of_several_dtypes():
    """A model that does not bring them together says so; one that does is cast as a whole."""
    module = Own().bfloat16()
    module.stack[0].norm1.float()  # torch brings this together
    model = vitxr.load_model(module, adapter=ADAPTER)
    stim = vitxr.open_images({"one": np.zeros((1, 16, 32, 3), np.uint8)})
    ds = vitxr.extract(stim, model, layers=[0], shifts=None, preprocess="raw")
    whole = vitxr.load_model(copy.deepcopy(module).float(), adapter=ADAPTER)
    other = vitxr.extract(stim, whole, layers=[0], shifts=None, preprocess="raw")
    np.testing.assert_array_equal(ds.activation, other.activation)
    assert module.stack[1].norm1.weight.dtype == torch.bfloat16
    module.stack[0].mlp.float()
    said = r"dtypes: bfloat16 \(cls_token, .*float32 \(stack.0.norm1.weight, .*module.float\(\)"
    with pytest.raises(ModelError, match=said):
        vitxr.load_model(module, adapter=ADAPTER)


def test_standardizing_by_nothing_is_refused():
    for what, size in (("crop", 64), ("crop", (1.5, 2)), ("resize", "big"), ("resize", (0, 3))):
        with pytest.raises(ArgumentError, match=rf"{what}=.*expected .*in pixels, or None"):
            Preprocess(**{what: size})
    for std in ((0.0, 1.0, 1.0), (0.5, 0.5), 0.5, ("a", "b", "c"), (float("nan"),) * 3):
        with pytest.raises(ArgumentError, match=r"std=.*expected three numbers"):
            Preprocess(std=std)
    with pytest.raises(ArgumentError, match=r"mean=.*expected three numbers"):
        Preprocess(mean=0.5)


@pytest.mark.parametrize("given", [3, None, {"weight": 1}])
def test_what_is_no_model(given):
    with pytest.raises(ArgumentError, match=r"the model is a .*expected a name, a folder or"):
        vitxr.load_model(given)


# How images become the input of a module in memory


@pytest.mark.parametrize("given", [3, "imagenet", lambda image: image])
def test_what_is_no_preprocessing(given):
    with pytest.raises(ArgumentError, match=r"preprocess=.*expected a vitxr\.models\.Preprocess"):
        vitxr.load_model(Own(), adapter=ADAPTER, preprocess=given)


def test_preprocessing_of_another_size():
    own = Preprocess(resize=(32, 32))
    with pytest.raises(
        ArgumentError, match=r"images of 32 x 32 px; 'Own' takes 16 x 32 px.*adapter"
    ):
        vitxr.load_model(Own(), adapter=ADAPTER, preprocess=own)
    with pytest.raises(ArgumentError, match=r"'ViTForIm.*' takes 32 x 48 px\. .*input_size="):
        vitxr.load_model(make_vit(), preprocess=own)
    kept = vitxr.load_model(make_vit(), preprocess=Preprocess(resize=64))
    with pytest.raises(ModelError, match=r"makes images of 64 x 64 px.*preprocess=\.\.\.\)"):
        kept.preprocess(np.zeros((9, 9, 3), np.uint8))
