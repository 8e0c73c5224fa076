"""What is captured of modules through an adapter, against the same layers called by hand.

scripts/families.py makes rows of the table in docs/models.md from the tests here that pass, by
their names.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_adapter import Own  # noqa: E402

import vitxr  # noqa: E402
from vitxr.models import Adapter, Preprocess  # noqa: E402
from vitxr.models.capture import capture  # noqa: E402
from vitxr.models.sites import find_sites  # noqa: E402

nn = torch.nn
#: Height and width, so that rows and columns of patches differ.
SIZE = (16, 48)
CLASSES = ("cat", "dog", "owl")


class Attention(nn.Module):
    """In a part of its own, so that it is known where it ends."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return self.out(
            nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(24), nn.LayerNorm(24), Attention()
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Parts(Own):
    def __init__(self, **options):
        super().__init__(**options)
        self.stack = nn.ModuleList(Block() for _ in range(4))


class Encoder(Own):
    """The same with torch's own layers, whose attention is nn.MultiheadAttention."""

    def __init__(self, **options):
        super().__init__(**options)
        self.stack = nn.ModuleList(
            nn.TransformerEncoderLayer(24, 3, 48, 0.0, batch_first=True, norm_first=True)
            for _ in range(4)
        )


def of_own(block):
    return (
        block.norm1, block.attn.qkv.weight, block.attn.qkv.bias, block.attn.out, block.norm2,
        block.mlp[:2], block.mlp[2],
    )  # fmt: skip


def of_torchs(block):
    attn = block.self_attn
    return (
        block.norm1, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj, block.norm2,
        nn.Sequential(block.linear1, nn.ReLU()), block.linear2,
    )  # fmt: skip


ROWS = {
    "any module, by an adapter": (Parts, of_own, "stack.{layer}.mlp.2"),
    "nn.TransformerEncoderLayer, by an adapter": (Encoder, of_torchs, "stack.{layer}.linear2"),
}


class Case:
    def __init__(self, name):
        kind, parts, self.pattern = ROWS[name]
        self.module = kind(size=SIZE).eval()
        adapter = Adapter("stack", ("class",), (4, 8), SIZE, 3, CLASSES)
        self.images = Preprocess(resize=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
        self.model = vitxr.load_model(self.module, adapter=adapter, preprocess=self.images)
        self.batch = torch.rand((3, 3, *SIZE), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            cells = self.module.cut(self.batch).flatten(2).mT
            x = torch.cat([self.module.cls_token.expand(3, 1, 24), cells], 1) + self.module.place
            self.embedding, self.own = x, []
            for block in self.module.stack:
                norm1, weight, bias, out, norm2, up, down = parts(block)
                fused = nn.functional.linear(norm1(x), weight, bias).unflatten(2, (3, 3, 8))
                q, k, v = fused.permute(2, 0, 3, 1, 4)
                rows = (q @ k.mT / 8**0.5).softmax(-1)
                attended = out((rows @ v).transpose(1, 2).flatten(2))
                hidden = up(norm2(x + attended))
                x = x + attended + down(hidden)
                heads = {
                    f"attention_{n}": t
                    for n, t in zip(("query", "key", "value"), (q, k, v), strict=True)
                }
                self.own.append({
                    "attention": rows, "attention_output": attended, "mlp_hidden": hidden,
                    "down": down(hidden), "activation": x, "prefix": x, **heads,
                })  # fmt: skip

    def captured(self, *names):
        wanted = {"down": self.pattern} if "down" in names else {}
        sites = find_sites(self.model, range(4), names, wanted) if names != ("logits",) else None
        return capture(self.model, self.batch, range(4), names, sites=sites)


@pytest.fixture(scope="module", params=ROWS)
def case(request):
    return Case(request.param)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def on_grid(tokens):
    """Patch (r, c) is token 1 + 6 r + c; (frame, token, width) or (frame, head, token, width)."""
    tokens = np.moveaxis(np.asarray(tokens), -1, -2)
    return np.stack([tokens[..., 1 + 6 * r : 7 + 6 * r] for r in range(4)], -2)


def check(case, *names):
    got = case.captured(*names)
    for layer in range(4):
        for name in names:
            close(got[name][:, layer], on_grid(case.own[layer][name]))


def test_structure(case):
    assert case.model.grid == (4, 6)


def test_block_output(case):
    check(case, "activation")


def test_embedding(case):
    close(case.captured("embedding")["embedding"], on_grid(case.embedding))


def test_prefix_tokens(case):
    got = case.captured("prefix")["prefix"]
    for layer in range(4):
        close(got[:, layer], case.own[layer]["prefix"][:, :1])


def test_attention(case):
    got = case.captured("attention")["attention"]
    for layer in range(4):
        close(got[:, layer], case.own[layer]["attention"])


def test_queries_keys_values(case):
    check(case, "attention_query", "attention_key", "attention_value")


def test_attention_output(case):
    check(case, "attention_output")


def test_mlp_hidden(case):
    check(case, "mlp_hidden")


def test_modules(case):
    check(case, "down")


def test_classes(case):
    with torch.inference_mode():
        close(case.captured("logits")["logits"], case.module(case.batch))
    assert case.model.classes == CLASSES


def test_own_preprocessing(case):
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    small = np.asarray(Image.fromarray(image).resize(SIZE[::-1], Image.BICUBIC)) / 255
    own = (small - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]
    np.testing.assert_allclose(case.model.preprocess(image).transpose(1, 2, 0), own, atol=1e-5)


def test_sides_that_differ(case):
    """The images above are of 4 x 6 patches; another module's may be of others."""
    kind = type(case.module)
    adapter = Adapter("stack", ("class",), (4, 8), (24, 16), 3)
    assert vitxr.load_model(kind(size=(24, 16)), adapter=adapter).grid == (6, 2)
