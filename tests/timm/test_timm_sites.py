"""What is inside timm's blocks, against their own layers called by hand and unfused attention."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_timm import MODELS, timm  # noqa: E402

import vitxr  # noqa: E402
from vitxr.errors import ModelError  # noqa: E402
from vitxr.models.capture import capture  # noqa: E402
from vitxr.models.sites import SITES, find_sites  # noqa: E402

MORE = {
    "vit_small_patch14_reg4_dinov2 swiglu": {"img_size": 56, "swiglu": True},
    "vit_tiny_patch16_224 qk_norm": {"img_size": 64, "qk_norm": True},
}


def made(name):
    title = name.partition(" ")[0]
    options = {"depth": 2, **(MODELS[name][0] if name in MODELS else MORE[name])}
    if options.pop("swiglu", False):
        options |= {"mlp_layer": timm.layers.SwiGLU, "mlp_ratio": 2}
    torch.manual_seed(0)
    module = timm.create_model(title, pretrained=False, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # layer scales start at a constant
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return module


@pytest.fixture(scope="module", params=[*MODELS, *MORE])
def captured(request):
    module = made(request.param)
    model = vitxr.load_model(module)
    batch = torch.rand((2, 3, *model.input_size))
    entered, weights = {}, {}
    with torch.inference_mode():
        hooks = [
            block.register_forward_pre_hook(lambda _m, a, i=i: entered.update({i: a[0].numpy()}))
            for i, block in enumerate(model.blocks)
        ]
        patterns = {"down": "blocks.{layer}.mlp.fc2"}
        sites = find_sites(model, [0, 1], SITES, patterns)
        names = ["activation", *SITES, *patterns]
        got = capture(model, batch, [0, 1], names, sites=sites)
        # Unfused, the weights pass through a module of their own.
        hooks += [
            block.attn.attn_drop.register_forward_hook(
                lambda _m, _a, out, i=i: weights.update({i: out.numpy()})
            )
            for i, block in enumerate(model.blocks)
        ]
        for block in model.blocks:
            block.attn.fused_attn = False
        module(batch)
    for hook in hooks:
        hook.remove()
    return model, {i: torch.as_tensor(x) for i, x in entered.items()}, weights, got


def patches(model, tokens):
    tokens = tokens.detach()[:, len(model.prefix) :].transpose(1, 2)
    return tokens.unflatten(2, model.grid).numpy()


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_attention_is_timms_own(captured):
    _, _, weights, got = captured
    for layer in range(2):
        close(got["attention"][:, layer], weights[layer])
    close(got["attention"].sum(-1), 1)


def test_queries_and_keys(captured):
    """By the fused projection and the norms after it; rotated ones are as long as before."""
    model, entered, _, got = captured
    for layer, block in enumerate(model.blocks):
        attn = block.attn
        fused = attn.qkv(block.norm1(entered[layer])).detach().chunk(3, dim=2)
        bias = getattr(attn, "q_bias", None)  # BEiT adds its biases by hand
        for what, value in zip(("query", "key"), fused[:2], strict=True):
            value = value + (bias.detach() if bias is not None and what == "query" else 0)
            value = value.unflatten(2, (model.heads, -1))
            value = getattr(attn, f"{what[0]}_norm", torch.nn.Identity())(value).detach()
            own = patches(model, value.flatten(2)).reshape(2, model.heads, -1, *model.grid)
            ours = got[f"attention_{what}"][:, layer]
            if getattr(model.module, "rope", None) is not None:
                close((ours**2).sum(2), (own**2).sum(2))
                assert abs(ours - own).max() > 1e-3
            else:
                close(ours, own)


def test_modules(captured):
    model, _, _, got = captured
    for layer, block in enumerate(model.blocks):
        hidden = torch.as_tensor(got["mlp_hidden"][:, layer]).movedim(1, -1)
        close(got["down"][:, layer], block.mlp.fc2(hidden).movedim(-1, 1).detach())


def test_values_and_output(captured):
    """Values by the fused projection; the output, theirs by the weights through `proj`."""
    model, entered, weights, got = captured
    for layer, block in enumerate(model.blocks):
        qkv = block.attn.qkv(block.norm1(entered[layer])).detach()
        bias = getattr(block.attn, "v_bias", None)  # BEiT adds its biases by hand
        value = qkv.chunk(3, dim=2)[2] + (0 if bias is None else bias.detach())
        value = value.unflatten(2, (model.heads, -1))
        by_hand = patches(model, value.flatten(2)).reshape(2, model.heads, -1, *model.grid)
        close(got["attention_value"][:, layer], by_hand)
        summed = torch.einsum("fhqk,fkhc->fqhc", torch.as_tensor(weights[layer]), value).flatten(2)
        close(got["attention_output"][:, layer], patches(model, block.attn.proj(summed)))


def test_the_residual_adds_up(captured):
    model, entered, _, got = captured

    def scaled(block, number, value):
        scale = getattr(block, f"gamma_{number}", None)
        scale = getattr(getattr(block, f"ls{number}", None), "gamma", scale)
        return value if scale is None else value * scale.detach().numpy()[:, None, None]

    for layer, block in enumerate(model.blocks):
        hidden = torch.as_tensor(got["mlp_hidden"][:, layer])
        made = block.mlp.fc2(hidden.movedim(1, -1)).movedim(-1, 1).detach().numpy()
        total = (
            patches(model, entered[layer])
            + scaled(block, 1, got["attention_output"][:, layer])
            + scaled(block, 2, made)
        )
        close(got["activation"][:, layer], total)


def test_unfused_attention():
    """Of queries that timm divides before the product, the scale is not known."""
    model = vitxr.load_model(made("vit_tiny_patch16_224"))
    batch = torch.rand((2, 3, *model.input_size))
    fused = capture(model, batch, [0, 1], list(SITES))
    for block in model.blocks:
        block.attn.fused_attn = False
    names = [name for name in SITES if name not in ("attention_query", "attention_key")]
    got = capture(model, batch, [0, 1], names)
    for name in names:
        close(got[name], fused[name])
    with pytest.raises(ModelError, match="their scale is not known"):
        capture(model, batch, [0], ["attention_key"])
