"""What is inside a block, against the block's own layers called by hand, family by family."""

import numpy as np
import pytest
from conftest import make_vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import vitxr  # noqa: E402
from vitxr.errors import ArgumentError, ModelError  # noqa: E402
from vitxr.models import Adapter  # noqa: E402
from vitxr.models.capture import capture  # noqa: E402
from vitxr.models.sites import SITES, find_sites  # noqa: E402

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
RATIO = {key: value for key, value in SIZES.items() if key != "intermediate_size"}

#: Family: model class, config class, options; attention's query, key, value and output
#: projections, and the MLP's layers, last the one down; the block's norms.
NEW = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
OPENAI = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
OLD = (*(f"attention.attention.{n}" for n in ("query", "key", "value")), "attention.output.dense")
FC = ("mlp.fc1", "mlp.fc2")
BEFORE, AROUND = ("layernorm_before", "layernorm_after"), ("layer_norm1", "layer_norm2")
FAMILIES = {
    "vit": ("ViTModel", "ViTConfig", SIZES, NEW, FC, BEFORE),
    "deit": ("DeiTModel", "DeiTConfig", SIZES, NEW, FC, BEFORE),
    "beit": (
        "BeitModel", "BeitConfig", {**SIZES, "use_relative_position_bias": True}, NEW, FC, BEFORE,
    ),
    "msn": ("ViTMSNModel", "ViTMSNConfig", SIZES, NEW, FC, BEFORE),
    "ijepa": ("IJepaModel", "IJepaConfig", SIZES, NEW, FC, BEFORE),
    "data2vec": (
        "Data2VecVisionModel", "Data2VecVisionConfig",
        {**SIZES, "use_relative_position_bias": True}, OLD,
        ("intermediate.dense", "output.dense"), BEFORE,
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", RATIO, NEW, FC, ("norm1", "norm2")),
    "dinov2 swiglu": (
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
        {**RATIO, "use_swiglu_ffn": True, "num_register_tokens": 2}, NEW,
        ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), ("norm1", "norm2"),
    ),
    "dinov3": (
        "DINOv3ViTModel", "DINOv3ViTConfig", {**SIZES, "num_register_tokens": 2}, NEW,
        ("mlp.up_proj", "mlp.down_proj"), ("norm1", "norm2"),
    ),
    "dinov3 gated": (
        "DINOv3ViTModel", "DINOv3ViTConfig", {**SIZES, "use_gated_mlp": True}, NEW,
        ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), ("norm1", "norm2"),
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", SIZES, OPENAI, FC, AROUND),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SIZES, OPENAI, FC, AROUND),
}  # fmt: skip


def made(name):
    """A small model of a family, no parameter of which is still at a constant."""
    kind, config, options = FAMILIES[name][:3]
    torch.manual_seed(0)
    module = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A model, a batch, what enters each block, what is captured, and the layers' names."""
    model = vitxr.load_model(made(request.param))
    batch = torch.rand((3, 3, *model.input_size))
    entered = {}
    hooks = [
        block.register_forward_pre_hook(lambda _m, args, i=i: entered.update({i: args[0].numpy()}))
        for i, block in enumerate(model.blocks)
    ]
    try:
        got = capture(model, batch, [0, 1], ["activation", *SITES])
    finally:
        for hook in hooks:
            hook.remove()
    entered = {i: torch.as_tensor(value) for i, value in entered.items()}
    return model, batch, entered, got, FAMILIES[request.param][3:]


def patches(model, tokens):
    """(frame, token, width) -> (frame, width, row, col)."""
    tokens = tokens.detach()[:, len(model.prefix) :].transpose(1, 2)
    return tokens.unflatten(2, model.grid).numpy()


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_projections_are_those_of_the_normed_input(family):
    model, _, entered, got, (attention, _, norms) = family
    for layer, block in enumerate(model.blocks):
        normed = block.get_submodule(norms[0])(entered[layer])
        for what, name in zip(("query", "key", "value"), attention, strict=False):
            by_hand = patches(model, block.get_submodule(name)(normed))
            by_hand = by_hand.reshape(3, model.heads, -1, *model.grid)
            captured = got[f"attention_{what}"][:, layer]
            if "DINOv3" in type(model.module).__name__ and what != "value":
                # After the rotation: of the same length, and not the same.
                close((captured**2).sum(2), (by_hand**2).sum(2))
                assert abs(captured - by_hand).max() > 1e-2
            else:
                close(captured, by_hand)


def test_attention_is_the_softmax_of_queries_and_keys(family):
    """Among patches, of which queries and keys are kept; the prefix takes its share first."""
    model, _, _, got, _ = family
    q, k = (
        got[f"attention_{what}"].reshape(3, 2, model.heads, 8, -1).astype(float)
        for what in ("query", "key")
    )
    scores = np.exp(np.einsum("flhcq,flhck->flhqk", q, k) / np.sqrt(8))
    expected = scores / scores.sum(-1, keepdims=True)
    prefix = len(model.prefix)
    among = got["attention"][..., prefix:, prefix:]
    among = among / among.sum(-1, keepdims=True)
    if any("relative_position_bias" in name for name, _ in model.module.named_parameters()):
        assert abs(among - expected).max() > 1e-4  # BEiT adds a bias to the scores
    else:
        close(among, expected)
    close(got["attention"].sum(-1), 1)


def test_attention_is_transformers_own(family):
    model, batch, _, got, _ = family
    eager = type(model.module)._from_config(model.module.config, attn_implementation="eager").eval()
    eager.load_state_dict(model.module.state_dict())
    with torch.inference_mode():
        weights = eager(batch, output_attentions=True).attentions
    for layer in range(2):
        close(got["attention"][:, layer], weights[layer].numpy())


def test_attention_output_is_the_projection_of_the_summed_values(family):
    """Of the values of all tokens, the prefix too, by the weights captured."""
    model, _, entered, got, (attention, _, norms) = family
    for layer, block in enumerate(model.blocks):
        normed = block.get_submodule(norms[0])(entered[layer])
        values = block.get_submodule(attention[2])(normed).unflatten(2, (model.heads, -1))
        weights = torch.as_tensor(got["attention"][:, layer])
        summed = torch.einsum("fhqk,fkhc->fqhc", weights, values).flatten(2)
        expected = patches(model, block.get_submodule(attention[3])(summed))
        close(got["attention_output"][:, layer], expected)


def scaled(block, number, value):
    """Apply a block's layer scale, where it has one."""
    layer_scale = getattr(block, f"layer_scale{number}", None)
    scale = getattr(block, f"lambda_{number}", None) if layer_scale is None else layer_scale.lambda1
    return value if scale is None else value * scale.detach().numpy()[:, None, None]


def test_the_residual_adds_up(family):
    """Block output = input + attention output + the MLP's down projection of its hidden units."""
    model, _, entered, got, (_, mlp, _) = family
    for layer, block in enumerate(model.blocks):
        down = block.get_submodule(mlp[-1])
        hidden = torch.as_tensor(got["mlp_hidden"][:, layer])
        projected = down(hidden.movedim(1, -1)).movedim(-1, 1).detach().numpy()
        total = (
            patches(model, entered[layer])
            + scaled(block, 1, got["attention_output"][:, layer])
            + scaled(block, 2, projected)
        )
        close(got["activation"][:, layer], total)


def test_hidden_units_are_after_the_nonlinearity(family):
    model, _, entered, got, (_, mlp, norms) = family
    for layer, block in enumerate(model.blocks):
        # The stream after the attention, for patches only: all that comes after is a patch's own.
        stream = patches(model, entered[layer]) + scaled(
            block, 1, got["attention_output"][:, layer]
        )
        normed = block.get_submodule(norms[1])(torch.as_tensor(stream).movedim(1, -1))
        ups = [block.get_submodule(name)(normed) for name in mlp[:-1]]
        (act,) = [m for n, m in block.named_modules() if n.endswith(("activation_fn", "act_fn"))]
        expected = act(ups[0]) * (ups[1] if len(ups) > 1 else 1)
        close(got["mlp_hidden"][:, layer], expected.movedim(-1, 1).detach().numpy())


# Models that are not of transformers


class Fused(torch.nn.Module):
    """A block as timm writes it: one projection for queries, keys and values; norms of heads."""

    def __init__(self, width=16, heads=2, seen=True, second=False, after=False, scale=1.0):
        super().__init__()
        nn = torch.nn
        self.heads, self.seen, self.second, self.scale = heads, seen, second, scale
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width)
        self.attn.q_norm = nn.LayerNorm(width // heads)
        self.attn.proj = nn.Linear(width, width)
        self.attn.after = nn.LayerNorm(width) if after else nn.Identity()
        self.attn.forward = self.attend
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        if second:
            self.adapter = nn.Linear(width, width)

    def attend(self, x):
        attn = self.attn
        q, k, v = attn.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = attn.q_norm(q)
        if self.seen:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.mT * q.shape[-1] ** -0.5).exp()
            out = out / out.sum(-1, keepdim=True) @ v  # nothing that is called a softmax
        return attn.after(attn.proj(out.transpose(1, 2).flatten(2))) * self.scale

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x + self.adapter(x) if self.second else x


class Plain(torch.nn.Module):
    """Patches, blocks and nothing else."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.patch = torch.nn.Conv2d(3, 16, 8, 8)
        self.tokens = torch.nn.Identity()
        self.blocks = torch.nn.ModuleList([Fused(**options) for _ in range(2)])
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 3)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, x):
        x = self.tokens(self.patch(x).flatten(2).mT)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def plain(**options):
    adapter = Adapter(
        blocks="blocks", prefix=(), patch=8, input_size=(16, 24), heads=2, classes=("a", "b", "c")
    )
    return vitxr.load_model(Plain(**options).eval(), adapter=adapter)


def test_a_fused_projection():
    model = plain()
    batch = torch.rand((3, 3, 16, 24))
    got = capture(model, batch, [1], [*SITES, "logits"])
    with torch.inference_mode():
        tokens = model.module.patch(batch).flatten(2).mT
        block = model.blocks[1]
        x = model.blocks[0](tokens)
        fused = block.attn.qkv(block.norm1(x)).numpy().reshape(3, 6, 3, 2, 8)
        q, k, v = (fused[:, :, i].transpose(0, 2, 3, 1).reshape(3, 2, 8, 2, 3) for i in range(3))
        normed = block.attn.q_norm(torch.as_tensor(q).movedim(2, -1)).movedim(-1, 2).numpy()
        hidden = block.mlp[:2](block.norm2(x + block.attn(block.norm1(x))))
    close(got["attention_query"][:, 0], normed)
    close(got["attention_key"][:, 0], k)
    close(got["attention_value"][:, 0], v)
    close(got["mlp_hidden"][:, 0], patches(model, hidden))
    close(got["logits"], model.module(batch).detach())


@pytest.mark.parametrize(
    ("options", "variable", "message"),
    [
        ({"seen": False}, "attention", "block 0: expected one dot product.*found 0"),
        ({"seen": False}, "mlp_hidden", "block 0: expected one dot product.*found 0"),
        ({"after": True}, "attention_output", r"runs attn.proj \(Linear 16 -> 16\), attn.after"),
        ({"scale": 0.5}, "attention_output", r"runs attn.proj \(Linear 16 -> 16\)\. Name"),
        ({"second": True}, "mlp_hidden", r"found mlp.0 .*mlp.2 .*adapter \(Linear 16 -> 16\)"),
        ({"heads": 4}, "attention_key", r"has queries of the shape \(3, 4, 6, 4\).*2 heads"),
    ],
)
def test_what_is_not_there_exactly_once_is_refused(options, variable, message):
    model = plain(**options)
    with pytest.raises(ModelError, match=message):
        find_sites(model, [0, 1], [variable])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_what_is_there_is_found_beside_what_is_not():
    model = plain(second=True, after=True)
    got = capture(model, torch.rand((1, 3, 16, 24)), [0], ["attention_value"])
    assert got["attention_value"].shape == (1, 1, 2, 8, 2, 3)


def test_modules_by_path():
    model = plain()
    batch = torch.rand((3, 3, 16, 24))
    patterns = {
        "gelu": "blocks.{layer}.mlp.1", "map": "patch", "class": "head", "last": "norm",
    }  # fmt: skip
    sites = find_sites(model, [0, 1], (), patterns)
    assert sites["gelu"].modules == ("blocks.0.mlp.1", "blocks.1.mlp.1")
    got = capture(model, batch, [0, 1], list(patterns), sites=sites)
    alone = capture(model, batch, [0, 1], ["mlp_hidden"])
    np.testing.assert_array_equal(got["gelu"], alone["mlp_hidden"])
    with torch.inference_mode():
        close(got["map"], model.module.patch(batch))
        close(got["class"], model.module(batch))
    assert got["last"].shape == (3, 16, 2, 3)  # after the last wanted block


REFUSED = {
    "nothing": ({"x": "blocks.{layer}.mlp.7"}, ArgumentError, r"fits no module.*blocks.0.mlp.1"),
    "several": ({"x": "mlp.1"}, ArgumentError, r"fits 2 modules: blocks.0.mlp.1, blocks.1.mlp.1"),
    "unused": ({"x": "unused"}, ModelError, "unused runs 0 times.*Name one that is called"),
    "list": (
        {"x": "blocks"},
        ArgumentError,
        r"blocks is a ModuleList, which only holds modules.*: blocks.0, blocks.1; .*\{layer\}",
    ),
    "form": ({"x": "blocks.{layer}.attn.q_norm"}, ModelError, r"gives \(3, 2, 6, 8\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_modules_that_cannot_be_labelled(case):
    patterns, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        find_sites(plain(), [0, 1], (), patterns)


def test_modules_of_other_widths_in_other_layers():
    model = plain()
    model.blocks[1].mlp = torch.nn.Sequential(
        torch.nn.Linear(16, 20), torch.nn.GELU(), torch.nn.Linear(20, 16)
    )
    with pytest.raises(ModelError, match=r"`mlp_hidden` has other shapes.*24, 2, 3.*20, 2, 3"):
        find_sites(model, [0, 1], ["mlp_hidden"])
    assert find_sites(model, [1], ["mlp_hidden"])["mlp_hidden"].shape == (20, 2, 3)


# Chosen heads and queries


@pytest.mark.parametrize("bias", [False, True])
def test_chosen_rows_are_those_of_all(bias):
    model = vitxr.load_model(made("beit" if bias else "vit"))
    batch = torch.rand((2, 3, *model.input_size))
    full = capture(model, batch, [0, 1], ["attention", "attention_key"])
    heads, queries = np.array([2, 0]), np.array([7, 0, 16])
    got = capture(
        model, batch, [0, 1], ["attention", "attention_key"], heads=heads, queries=queries
    )
    close(got["attention"], full["attention"][:, :, heads][:, :, :, queries])
    np.testing.assert_array_equal(got["attention_key"], full["attention_key"][:, :, heads])


def test_the_softmax_is_float32_in_bfloat16():
    model = vitxr.load_model(made("vit")).cast("bfloat16")
    batch = torch.rand((2, 3, *model.input_size)).to(torch.bfloat16)
    got = capture(model, batch, [0, 1], ["attention"])["attention"]
    assert abs(got.sum(-1, dtype=float) - 1).max() < 1e-6


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float"])
def test_weights_are_those_of_torch(kind):
    """By the identity as values, torch's own function gives its weights."""
    from vitxr.models.watch import watching

    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    some = (torch.rand(2, 1, 5, 5) > 0.3) | torch.eye(5, dtype=torch.bool)
    mask = {"bool": some, "float": torch.randn(1, 3, 5, 5)}.get(kind)
    seen = []
    with watching(seen.append):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, torch.eye(5).expand(2, 3, 5, 5), attn_mask=mask,
            is_causal=kind == "causal", scale=0.3,
        )  # fmt: skip
    close(seen[0].weights(), expected)
    some = seen[0].weights(torch.tensor([2, 1]), torch.tensor([4, 0]))
    close(some, expected[:, [2, 1]][:, :, [4, 0]])


# What is left behind


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_nothing_is_left_behind(implementation):
    vit = make_vit(attn_implementation=implementation, hidden_dropout_prob=0.5)
    model = vitxr.load_model(vit)
    batch = torch.rand((2, 3, 32, 48))
    vit.train()
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    variables = ["activation", *SITES]
    first = capture(model, batch, [0, 2], variables)
    with torch.autocast("cpu", torch.bfloat16):
        again = capture(model, batch, [0, 2], variables)
    for name in variables:
        np.testing.assert_array_equal(first[name], again[name])
    with pytest.raises(ValueError, match="channel dimension"):
        capture(model, batch[:, :1], [0], variables)
    assert vit.training
    assert vit.config._attn_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    assert not torch.overrides._get_current_function_mode_stack()
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())


def test_what_the_user_does_to_a_module_is_seen():
    """A lesion by a hook on the attention shows in what is captured of it."""
    model = vitxr.load_model(make_vit())
    batch = torch.rand((2, 3, 32, 48))
    handle = model.blocks[0].attention.register_forward_hook(
        lambda _m, _a, output: (output[0] * 0, *output[1:])
    )
    got = capture(model, batch, [0, 1], ["attention_output"])["attention_output"]
    handle.remove()
    assert (got[:, 0] == 0).all()
    assert (got[:, 1] != 0).any()


def test_a_pass_ends_when_all_is_kept(model):
    ran = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, part in model.blocks[1].named_children()
    ]
    sites = find_sites(model, [1], ["attention_key"])
    ran.clear()
    try:
        capture(model, torch.rand((1, 3, 32, 48)), [1], ["attention_key"], sites=sites)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == ["layernorm_before"]  # the attention was left at its dot product
