"""Attention that is not transformers': torch's nn.MultiheadAttention, and softmax written out."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vitxr  # noqa: E402
from vitxr.analysis import attention_rollout  # noqa: E402
from vitxr.errors import ModelError  # noqa: E402
from vitxr.models import Adapter  # noqa: E402
from vitxr.models.capture import capture  # noqa: E402
from vitxr.models.gradients import attention_gradients, attention_relevance  # noqa: E402
from vitxr.models.sites import DOTS, SITES, find_sites  # noqa: E402

nn = torch.nn
WIDTH, HEADS, GRID = 16, 4, (2, 3)
TOKENS = 1 + GRID[0] * GRID[1]


class Clip(nn.Module):
    """A block as OpenCLIP and torchvision write it, frames or tokens first in its attention."""

    def __init__(self, first=True, need=False, masked=False, **options):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=first, **options)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.first, self.need = first, need
        self.mask = torch.randn(TOKENS, TOKENS) if masked else None

    def forward(self, x):
        y = self.ln_1(x)
        y = y if self.first else y.transpose(0, 1)
        y, _ = self.attn(y, y, y, need_weights=self.need, attn_mask=self.mask)
        x = x + (y if self.first else y.transpose(0, 1))
        return x + self.mlp(self.ln_2(x))


def encoder_layer(**options):
    options = {"dim_feedforward": 24, "batch_first": True} | options
    return nn.TransformerEncoderLayer(WIDTH, HEADS, **options)


class Attention(nn.Module):
    """Attention written out, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.heads = 1 if how == "single" else HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        self.mix = nn.Parameter(torch.randn(HEADS, HEADS))
        self.how = how

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = q.shape[-1] ** -0.5
        weights = getattr(self, f"_{self.how}")(q, k, v, scale)
        return self.proj(weights.transpose(1, 2).flatten(2))

    def _plain(self, q, k, v, scale):  # as in DINO
        return self.drop(((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)) @ v

    def _before(self, q, k, v, scale):  # as in timm
        return torch.matmul(torch.softmax((q * scale) @ k.mT, -1), v)

    def _summed(self, q, k, v, scale):
        weights = nn.functional.softmax(torch.einsum("bhid, bhjd -> bhij", q, k) * scale, dim=3)
        return torch.einsum("bhij,bhjd->bhid", [weights, v])

    def _moved(self, q, k, v, scale):
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * scale).float().softmax(-1).to(v)
        return torch.einsum("bhij,bhjd->bihd", weights, v).transpose(1, 2)

    def _single(self, q, k, v, scale):
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
        return (torch.bmm(q, k.mT) / q.shape[-1] ** 0.5).softmax(2).bmm(v)[:, None]

    def _mixed(self, q, k, v, scale):  # talking heads
        weights = ((q @ k.mT) * scale).softmax(-1)
        return torch.einsum("bhij,hg->bgij", weights, self.mix) @ v

    def _scaled(self, q, k, v, scale):
        return (((q @ k.mT) * scale).softmax(-1) * 2) @ v

    def _switched(self, q, k, v, scale):  # a head switched off, in place
        weights = ((q @ k.mT) * scale).softmax(-1)
        weights[:, 1] = 0
        return weights @ v

    def _doubled(self, q, k, v, scale):
        weights = ((q @ k.mT) * scale).softmax(-1)
        weights.mul_(2)
        return weights @ v

    def _over(self, q, k, v, scale):  # to save memory
        scores = (q @ k.mT) * scale
        torch.softmax(scores, -1, out=scores)
        return scores @ v

    def _wiped(self, q, k, v, scale):
        scores = (q @ k.mT) * scale
        weights = scores.softmax(-1)
        scores.zero_()
        return weights @ v

    def _fused(self, q, k, v, scale):
        return nn.functional.scaled_dot_product_attention(q * scale, k, v, scale=1.0)

    def _sharp(self, q, k, v, scale):
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7)

    def _columns(self, q, k, v, scale):
        return ((q @ k.mT) * scale).softmax(-2) @ v

    def _folded(self, q, k, v, scale):
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        return (torch.bmm(q, k.mT) * scale).softmax(-1).bmm(v).unflatten(0, (-1, HEADS))


class Written(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention(how)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Own(nn.Module):
    def __init__(self, block, first=True):
        super().__init__()
        self.first = first
        torch.manual_seed(0)
        self.cut = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.place = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList([block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            for parameter in self.blocks.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)

    def forward(self, x):
        x = self.cut(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.place
        x = x if self.first else x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head((x if self.first else x.transpose(0, 1))[:, 0])


def loaded(block, heads=HEADS, first=True):
    adapter = Adapter(
        blocks="blocks", prefix=("class",), patch=8, input_size=(16, 24), heads=heads,
        classes=("a", "b", "c"),
    )  # fmt: skip
    return vitxr.load_model(Own(block, first).eval(), adapter=adapter)


BLOCKS = {
    "encoder layer": encoder_layer,
    "norm first": lambda: encoder_layer(norm_first=True, activation="gelu"),
    "tokens first": lambda: Clip(first=False),
    "frames first": Clip,
    "needs weights": lambda: Clip(need=True),
    "tokens first, needs weights": lambda: Clip(first=False, need=True),
    "no bias": lambda: Clip(bias=False),
    "masked": lambda: Clip(masked=True),
    "three projections": lambda: Clip(kdim=WIDTH, vdim=WIDTH),
}
BLOCKS["three projections"] = lambda: _apart(Clip())


def _apart(block):
    """With weights of their own for queries, keys and values, as where their widths differ."""
    attn = block.attn
    attn._qkv_same_embed_dim = False
    for name in ("q", "k", "v"):
        setattr(attn, f"{name}_proj_weight", nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3))
    attn.in_proj_weight = None
    return block


def batch_of(dtype=torch.float32):
    return torch.rand((3, 3, 16, 24), generator=torch.Generator().manual_seed(1)).to(dtype)


def entering(model, batch):
    """What enters each block's attention, (frame, token, width)."""
    seen = {}
    hooks = []
    for i, block in enumerate(model.blocks):
        attn = block.self_attn if hasattr(block, "self_attn") else block.attn
        first = getattr(attn, "batch_first", True)

        def keep(_m, args, i=i, first=first):
            seen[i] = args[0] if first else args[0].transpose(0, 1)

        hooks.append(attn.register_forward_pre_hook(keep))
    with torch.no_grad():
        model.module(batch)
    for hook in hooks:
        hook.remove()
    return seen


def on_grid(tokens):
    return tokens[:, 1:].movedim(2, 1).unflatten(2, GRID).float().numpy()


def literal(attn, x, mask=None):
    """Queries, keys, values, weights and output in float64, head by head."""
    if attn.in_proj_weight is None:
        weight = torch.cat([getattr(attn, f"{n}_proj_weight") for n in "qkv"])
    else:
        weight = attn.in_proj_weight
    bias = torch.zeros(3 * WIDTH) if attn.in_proj_bias is None else attn.in_proj_bias
    weight, bias, x = (t.detach().double().numpy() for t in (weight, bias, x))
    per = WIDTH // HEADS
    parts = [x @ weight[i * WIDTH : (i + 1) * WIDTH].T + bias[i * WIDTH : (i + 1) * WIDTH]
             for i in range(3)]  # fmt: skip
    weights, heads = [], []
    for h in range(HEADS):
        q, k, v = (p[:, :, h * per : (h + 1) * per] for p in parts)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(per)
        scores = scores if mask is None else scores + mask.double().numpy()
        e = np.exp(scores - scores.max(-1, keepdims=True))
        weights.append(e / e.sum(-1, keepdims=True))
        heads.append(weights[-1] @ v)
    output = np.concatenate(heads, -1) @ attn.out_proj.weight.detach().double().numpy().T
    if attn.out_proj.bias is not None:
        output = output + attn.out_proj.bias.detach().double().numpy()
    return [*parts, np.stack(weights, 1), output]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_multihead_attention_is_captured(name, precision):
    """Against the module's own returned weights, and its formula by hand."""
    model = loaded(BLOCKS[name]).cast(precision)
    dtype = getattr(torch, precision)
    for block in model.blocks:
        if getattr(block, "mask", None) is not None:
            block.mask = block.mask.to(dtype)
    batch = batch_of(dtype)
    got = capture(model, batch, [0, 1], ["activation", "logits", *SITES])
    again = capture(model, batch, [0, 1], ["activation", "logits", *SITES])
    for variable in got:
        np.testing.assert_array_equal(got[variable], again[variable])
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == "float32" else {"rtol": 0.05, "atol": 0.05}
    np.testing.assert_allclose(got["attention"].sum(-1), 1, atol=1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(got["logits"], model.module(batch).float(), **close)
    for layer, x in entering(model, batch).items():
        block = model.blocks[layer]
        attn = block.self_attn if hasattr(block, "self_attn") else block.attn
        mask = getattr(block, "mask", None)
        y = x if attn.batch_first else x.transpose(0, 1)
        with torch.no_grad():
            output, weights = attn(
                y, y, y, need_weights=True, average_attn_weights=False, attn_mask=mask
            )
        output = output if attn.batch_first else output.transpose(0, 1)
        np.testing.assert_allclose(got["attention"][:, layer], weights.float(), **close)
        np.testing.assert_allclose(got["attention_output"][:, layer], on_grid(output), **close)
        q, k, v, weights, output = literal(attn, x, mask)
        np.testing.assert_allclose(got["attention"][:, layer], weights, **close)
        np.testing.assert_allclose(
            got["attention_output"][:, layer], on_grid(torch.tensor(output)), **close
        )
        for what, values in (("query", q), ("key", k), ("value", v)):
            by_hand = on_grid(torch.tensor(values)).reshape(3, HEADS, -1, *GRID)
            np.testing.assert_allclose(got[f"attention_{what}"][:, layer], by_hand, **close)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_blocks_that_have_tokens_first(precision):
    """As torch's layers do unless they are told otherwise: all is the same up to rounding."""
    made = [
        loaded(lambda first=first: encoder_layer(batch_first=first), first=first).cast(precision)
        for first in (True, False)
    ]
    for a, b in zip(*(m.module.parameters() for m in made), strict=True):
        assert torch.equal(a, b)
    assert (made[0].how, made[1].how) == ((), ("tokens first",))
    assert made[0].prefix == made[1].prefix == ("class",)
    assert len({m.fingerprint for m in made}) == 2
    names = ["activation", "prefix", "embedding", "logits", *SITES, "out", "up"]
    got = []
    for model in made:
        paths = {"out": "blocks.{layer}.self_attn", "up": "blocks.{layer}.linear1"}
        sites = find_sites(model, [0, 1], SITES, paths)
        got.append(capture(model, batch_of(getattr(torch, precision)), [0, 1], names, sites=sites))
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == "float32" else {"rtol": 0.05, "atol": 0.05}
    for name in names:
        np.testing.assert_allclose(got[1][name], got[0][name], **close)
    if precision == "float32":
        frames = batch_of().numpy()
        (a, _, read), (b, _, other) = (attention_relevance(m, frames, [0, 2]) for m in made)
        assert read == other == ("class",)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["tokens first", "frames first"])
def test_its_output_by_path_is_labelled_whatever_comes_first(name):
    model = loaded(BLOCKS[name])
    sites = find_sites(model, [0, 1], ["attention_output"], {"out": "blocks.{layer}.attn"})
    got = capture(model, batch_of(), [0, 1], ["attention_output", "out"], sites=sites)
    np.testing.assert_allclose(got["out"], got["attention_output"], rtol=1e-5, atol=1e-6)


def test_the_hidden_units_of_an_encoder_layer():
    model = loaded(encoder_layer)
    got = capture(model, batch_of(), [0], ["mlp_hidden"])["mlp_hidden"]
    x = entering(model, batch_of())[0]
    block = model.blocks[0]
    with torch.no_grad():
        stream = block.norm1(x + block.self_attn(x, x, x)[0])
        expected = block.linear1(stream).relu()
    np.testing.assert_allclose(got[:, 0], on_grid(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder layer", "tokens first, needs weights"])
def test_chosen_heads_and_rows(name):
    model = loaded(BLOCKS[name])
    full = capture(model, batch_of(), [1], ["attention", "attention_key"])
    heads, queries = np.array([2, 0]), np.array([4, 0])
    got = capture(
        model, batch_of(), [1], ["attention", "attention_key"], heads=heads, queries=queries
    )
    rows = full["attention"][:, :, heads][:, :, :, queries]
    np.testing.assert_allclose(got["attention"], rows, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got["attention_key"], full["attention_key"][:, :, heads])


def test_the_weights_that_a_module_asks_for_are_given():
    """Averaged over heads or not, of frames or of one frame."""
    from vitxr.models.watch import watching

    torch.manual_seed(0)
    attn = nn.MultiheadAttention(WIDTH, HEADS).eval()
    for x in (torch.randn(5, 2, WIDTH), torch.randn(5, WIDTH)):
        for average in (True, False):
            with torch.no_grad():
                own = attn(x, x, x, average_attn_weights=average)
                with watching(lambda _: None):
                    ours = attn(x, x, x, average_attn_weights=average)
                    none = attn(x, x, x, need_weights=False)
            for a, b in zip(own, ours, strict=True):
                torch.testing.assert_close(a, b)
            assert none[1] is None
            torch.testing.assert_close(none[0], own[0])


@pytest.mark.parametrize("name", ["encoder layer", "needs weights", "written"])
def test_nothing_of_it_is_left_behind(name):
    model = loaded(BLOCKS[name] if name in BLOCKS else lambda: Written("plain"))
    module = model.module.train()
    before = copy.deepcopy(module.state_dict())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        own = nn.functional.multi_head_attention_forward, nn.functional.softmax
        for fast in (True, False):
            torch.backends.mha.set_fastpath_enabled(fast)
            capture(model, batch_of(), [0, 1], list(SITES))
            with pytest.raises(RuntimeError, match="channels"):
                capture(model, batch_of()[:, :1], [0, 1], list(SITES))
            attention_gradients(model, batch_of().numpy(), [0, 1, 2])
            assert torch.backends.mha.get_fastpath_enabled() is fast
        assert own == (nn.functional.multi_head_attention_forward, nn.functional.softmax)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert not torch.overrides._get_current_function_mode_stack()
    assert all(m.training for m in module.modules())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    with torch.no_grad():  # and it is the module it was
        module.eval()
        fresh = Own(BLOCKS[name] if name in BLOCKS else lambda: Written("plain")).eval()
        assert torch.equal(module(batch_of()), fresh(batch_of()))


def test_hooks_of_the_user_are_not_called_with_blank_frames():
    model, seen = loaded(encoder_layer), []
    handle = model.blocks[0].self_attn.register_forward_hook(lambda _m, a, _o: seen.append(a[0]))
    find_sites(model, [0, 1], SITES, {"out": "blocks.{layer}.self_attn"})
    assert not seen
    capture(model, batch_of(), [0, 1], list(SITES))
    assert len(seen) == 1
    assert handle.id in model.blocks[0].self_attn._forward_hooks


# Relevance and rollout


def by_hand(model, frame, target):
    """Weights of every block and gradients of a logit, of attention written out with autograd."""
    module, weights = copy.deepcopy(model.module), []

    class Attend(nn.Module):
        def __init__(self, attn):
            super().__init__()
            self.attn, self.batch_first = attn, attn.batch_first

        def forward(self, x, *_, attn_mask=None, **__):
            x = x if self.batch_first else x.transpose(0, 1)
            attn = self.attn
            parts = nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias)
            q, k, v = parts.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            w = torch.softmax(torch.einsum("bhqc,bhkc->bhqk", q, k) / q.shape[-1] ** 0.5, -1)
            w.retain_grad()
            weights.append(w)
            y = attn.out_proj(torch.einsum("bhqk,bhkc->bqhc", w, v).flatten(2))
            return (y if self.batch_first else y.transpose(0, 1)), None

    for block in module.blocks:
        block.attn = Attend(block.attn)
    module(frame)[0, target].backward()
    return (np.stack([t[0].detach().numpy() for t in ts]) for ts in (
        weights, [w.grad for w in weights],
    ))  # fmt: skip


@pytest.mark.parametrize("name", ["frames first", "tokens first", "needs weights"])
def test_relevance_of_multihead_attention(name):
    model = loaded(BLOCKS[name])
    frames = batch_of().numpy()
    weights, gradients, _ = attention_gradients(model, frames, [2, 2, 2])
    values, _, read = attention_relevance(model, frames, [2])
    assert read == ("class",)
    for i in range(3):
        w, g = by_hand(model, batch_of()[i : i + 1], 2)
        np.testing.assert_allclose(weights[i], w, atol=1e-5)
        np.testing.assert_allclose(gradients[i], g, atol=1e-4 * abs(g).max())
        r = np.eye(TOKENS)
        for layer in range(2):
            r = r + np.maximum(w[layer] * g[layer], 0).mean(0) @ r
        expected = r[0, 1:].reshape(GRID)
        np.testing.assert_allclose(values[i, 0], expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_relevance_of_an_encoder_layer_and_of_written_attention():
    """Each against the same weights in a block of the other kind."""
    torch.manual_seed(3)
    fused, written = loaded(Clip), loaded(lambda: Written("plain"))
    own = written.module.state_dict()
    for key, value in fused.module.state_dict().items():
        key = key.replace("in_proj_", "qkv.").replace("out_proj", "proj")
        own[key].copy_(value)
    frames = batch_of().numpy()
    for a, b in zip(
        attention_gradients(fused, frames, [0, 1, 2]),
        attention_gradients(written, frames, [0, 1, 2]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    a, b = (attention_relevance(m, frames, None) for m in (fused, written))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("block", [encoder_layer, lambda: Written("before")])
def test_rollout(block):
    model = loaded(block)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    stim = vitxr.open_images({"noise": images})
    ds = vitxr.extract(stim, model, shifts=None, variables=["attention"], preprocess="raw")
    weights = ds.attention.values[:, 0, 0].astype(float).mean(2)
    expected = np.eye(TOKENS)
    for layer in range(2):
        step = 0.5 * weights[:, layer] + 0.5 * np.eye(TOKENS)
        expected = step / step.sum(-1, keepdims=True) @ expected
    rolled = attention_rollout(ds, query=None).values[:, 0, 0]
    np.testing.assert_allclose(rolled, expected, rtol=1e-4, atol=1e-6)


# Written out


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["plain", "before", "summed", "moved", "single"])
def test_written_attention_is_captured(how, precision):
    """Against torch's fused function, on what its own layers give."""
    heads = 1 if how == "single" else HEADS
    model = loaded(lambda: Written(how), heads).cast(precision)
    batch = batch_of(getattr(torch, precision))
    scaled = how == "before"
    names = [n for n in SITES if not (scaled and n in ("attention_query", "attention_key"))]
    got = capture(model, batch, [0, 1], names)
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == "float32" else {"rtol": 0.05, "atol": 0.05}
    for layer, x in entering(model, batch).items():
        attn = model.blocks[layer].attn
        with torch.no_grad():
            q, k, v = attn.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            eye = torch.eye(TOKENS, dtype=q.dtype).expand(*q.shape[:2], -1, -1)
            weights = nn.functional.scaled_dot_product_attention(q, k, eye)
            summed = nn.functional.scaled_dot_product_attention(q, k, v)
            output = attn.proj(summed.transpose(1, 2).flatten(2))
        np.testing.assert_allclose(got["attention"][:, layer], weights.float(), **close)
        np.testing.assert_allclose(got["attention"][:, layer].sum(-1), 1, atol=1e-6)
        np.testing.assert_allclose(got["attention_output"][:, layer], on_grid(output), **close)
        for what, values in (("query", q), ("key", k), ("value", v)):
            if f"attention_{what}" in got:
                by_hand = values[:, :, 1:].mT.unflatten(3, GRID).float()
                np.testing.assert_array_equal(got[f"attention_{what}"][:, layer], by_hand)
    if scaled:
        for name in ("attention_query", "attention_key"):
            with pytest.raises(ModelError, match=r"scale is not known.*`attention_value` can be"):
                find_sites(model, [0], [name])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mixed", r"found 0.*Looked for.*softmax over keys.*scaled_dot_product_attention\(q, k"),
        ("scaled", "found 0"),
        ("switched", "found 0"),
        ("doubled", "found 0"),
        ("over", "found 0"),
        ("wiped", "found 0"),
        ("columns", "found 0"),
        ("folded", r"scores of the shape \(8, 1, 7, 7\); expected \(2 frames, 4 heads, 7 tokens"),
    ],
)
def test_other_attention_is_refused(how, message):
    model = loaded(lambda: Written(how))
    for name in (*DOTS, "attention_output", "mlp_hidden"):
        with pytest.raises(ModelError, match=message):
            find_sites(model, [0], [name])
    counted = r"compute attention \[0, 0\] times.*Looked for"
    with pytest.raises(ModelError, match=counted if how != "folded" else "attention weights are"):
        attention_relevance(model, batch_of().numpy(), None)


@pytest.mark.parametrize("how", ["fused", "sharp"])
@pytest.mark.parametrize("inference", [False, True])
def test_another_scale_is_in_the_queries(how, inference):
    """So that the softmax of queries and keys over the root of their width is the attention."""
    model = loaded(lambda: Written(how))
    with torch.inference_mode(inference):
        got = capture(model, batch_of(), [0, 1], list(DOTS))
    q, k = (torch.as_tensor(got[f"attention_{w}"][:, 1]).flatten(3).mT for w in ("query", "key"))
    # Without prefix tokens: the softmax over patches of what is left.
    scores = torch.as_tensor(got["attention"][:, 1])[..., 1:, 1:].log()
    expected = (q @ k.mT) / q.shape[3] ** 0.5
    off = scores - expected
    torch.testing.assert_close(off, off[..., :1].expand_as(off), atol=2e-4, rtol=0)
    with torch.inference_mode(inference):
        weights = capture(loaded(lambda: Written("plain")), batch_of(), [0], ["attention"])
    assert weights["attention"].shape == got["attention"][:, :1].shape


class Scaled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return output * 0.5, weights


def test_what_comes_after_the_projection_is_refused():
    def block():
        made = Clip()
        made.attn = Scaled(WIDTH, HEADS, batch_first=True)
        return made

    model = loaded(block)
    capture(model, batch_of(), [0], list(DOTS))
    with pytest.raises(ModelError, match=r"end with one output projection.*no module with weights"):
        find_sites(model, [0], ["attention_output"])


def test_keys_beside_the_tokens_are_refused():
    with pytest.raises(ModelError, match=r"keys of the shape \(2, 4, 8, 4\); expected \(2 frames"):
        find_sites(loaded(lambda: Clip(add_zero_attn=True)), [0], ["attention"])


def test_the_operations_of_an_encoder_layer_are_counted():
    """By the formula, of a frame: no part of it is hidden in torch's fast path."""
    from vitxr.models.cost import operations

    torch.backends.mha.set_fastpath_enabled(True)
    n, c, h = TOKENS, WIDTH, 24
    block = 8 * n * c**2 + 4 * n**2 * c + 4 * n * c * h
    cut, head = 2 * (n - 1) * c * 3 * 64, 2 * c * 3
    assert operations(loaded(encoder_layer)) == 2 * block + cut + head
