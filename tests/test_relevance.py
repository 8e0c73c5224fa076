"""Relevance, against a literal transcription on transformers' weights and finite differences."""

import copy
import types

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import make_vit
from torch.overrides import TorchFunctionMode

import vitxr
from vitxr.analysis import relevance
from vitxr.errors import ArgumentError, ModelError
from vitxr.models.gradients import attention_gradients, attention_relevance
from vitxr.names import validate


def sharpen(module):
    """Make attention differ between heads and tokens, and logits between classes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "query", "key")):
                parameter *= 20
            elif name.endswith("weight") and parameter.ndim == 2:
                parameter *= 4
    return module


@pytest.fixture(scope="module")
def module():
    return sharpen(make_vit(patch_size=(8, 16)))


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).normal(size=(3, 3, 32, 48)).astype("float32")


def theirs(module, frame, target):
    """Attentions, their gradients and logits of one frame, by transformers and autograd alone."""
    eager = copy.deepcopy(module)
    eager.set_attn_implementation("eager")
    out = eager(torch.tensor(frame[None]), output_attentions=True)
    for attention in out.attentions:
        attention.retain_grad()
    target = int(out.logits[0].argmax()) if target is None else target
    out.logits[0, target].backward()
    weights = np.stack([a[0].detach().numpy() for a in out.attentions]).astype(float)
    gradients = np.stack([a.grad[0].numpy() for a in out.attentions]).astype(float)
    return weights, gradients, out.logits[0].detach().numpy()


def chefer(weights, gradients):
    """Equations 5 and 6, with loops over layers and heads; the whole matrix R."""
    tokens = weights.shape[-1]
    R = np.eye(tokens)
    for layer in range(len(weights)):
        total = np.zeros((tokens, tokens))
        for head in range(weights.shape[1]):
            total += np.maximum(gradients[layer, head] * weights[layer, head], 0)
        R = R + (total / weights.shape[1]) @ R
    return R


def test_gradients_are_transformers(module, frames):
    model = vitxr.load_model(module)
    weights, gradients, logits = attention_gradients(model, frames, [3, 0, 3])
    for i, target in enumerate([3, 0, 3]):
        w, g, y = theirs(module, frames[i], target)
        np.testing.assert_allclose(weights[i], w, atol=1e-5)  # float32, and large weights
        np.testing.assert_allclose(logits[i], y, atol=1e-5)
        np.testing.assert_allclose(gradients[i], g, atol=1e-4 * abs(g).max())
        assert abs(g).max() > 1e-4


def test_gradients_are_finite_differences():
    module = sharpen(make_vit(image_size=(16, 24), layers=2)).double()
    model = vitxr.load_model(module)
    frame = np.random.default_rng(1).normal(size=(1, 3, 16, 24))
    _, gradients, _ = attention_gradients(model, frame, [2])

    class Nudge(TorchFunctionMode):
        """Adds to one weight of one layer, in attention written out anew."""

        def __init__(self, layer, place, by):
            super().__init__()
            self.left, self.place, self.by = layer, place, by

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is not torch.nn.functional.scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            q, k, v = args
            a = torch.softmax(torch.einsum("bhqc,bhkc->bhqk", q, k) / q.shape[-1] ** 0.5, -1)
            if self.left == 0:
                a[(0, *self.place)] += self.by
            self.left -= 1
            return torch.einsum("bhqk,bhkc->bhqc", a, v)

    step = 1e-5
    rng = np.random.default_rng(0)
    for layer in (0, 1):
        for _ in range(6):
            place = (rng.integers(4), rng.integers(7) if layer == 0 else 0, rng.integers(7))
            with torch.no_grad():
                y = []
                for by in (step, -step):
                    with Nudge(layer, place, by):
                        y.append(module(torch.tensor(frame)).logits[0, 2].item())
            slope = (y[0] - y[1]) / (2 * step)
            assert gradients[(0, layer, *place)] == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_relevance_is_the_published_rule(module, frames):
    model = vitxr.load_model(module)
    values, best, read = attention_relevance(model, frames, [0, 3])
    own, _, _ = attention_relevance(model, frames, None)
    assert read == ("class",)
    assert values.shape == (3, 2, *model.grid)
    for i in range(3):
        for j, target in enumerate([0, 3]):
            expected = chefer(*theirs(module, frames[i], target)[:2])[0, 1:].reshape(model.grid)
            np.testing.assert_allclose(
                values[i, j], expected, rtol=1e-3, atol=1e-5 * expected.max()
            )
        weights, gradients, logits = theirs(module, frames[i], None)
        assert best[i] == logits.argmax()
        expected = chefer(weights, gradients)[0, 1:].reshape(model.grid)
        np.testing.assert_allclose(own[i, 0], expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_heads_that_read_other_tokens():
    """DeiT's two tokens, and a head on the mean of the patches."""
    import transformers

    options = {
        "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 5,
    }  # fmt: skip
    frame = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype("float32")
    deit = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**options))
    beit = transformers.BeitForImageClassification(transformers.BeitConfig(**options))
    for module, prefix, read in ((deit, 2, ("class", "distillation")), (beit, 1, ())):
        sharpen(module.eval())
        values, _, found = attention_relevance(vitxr.load_model(module), frame, [1])
        R = chefer(*theirs(module, frame[0], 1)[:2]) - np.eye(prefix + 16)
        rows = R[:prefix] if read else R[prefix:]
        assert found == read
        expected = rows.mean(0)[prefix:].reshape(4, 4)
        np.testing.assert_allclose(values[0, 0], expected, rtol=1e-3, atol=1e-5 * expected.max())


@pytest.mark.parametrize("scheme", ["raster", "grid"])
def test_labels_shifts_and_batches(module, scheme):
    model = vitxr.load_model(module)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    stim = vitxr.open_images({"noise": images})
    grid = vitxr.ShiftGrid(16, scheme)
    r = relevance(stim, model, grid, ["LABEL_4", "LABEL_0"], preprocess="raw", batch_size=5)
    validate(r, require=["relevance", "predicted", "offset_x"])
    assert r.relevance.dims == (
        "image", "shift_y", "shift_x", "patch_row", "patch_col", "class",
    )  # fmt: skip
    assert r.attrs["read"] == "class"
    y, x = (int(offset[1, 2]) for offset in xr.broadcast(r.offset_y, r.offset_x))
    frame = np.roll(images[1], (y, x), (0, 1)).transpose(2, 0, 1)[None].astype("float32")
    values, best, _ = attention_relevance(model, frame, [4, 0])
    at = r.isel(image=1, shift_y=1, shift_x=2)
    np.testing.assert_allclose(
        at.relevance.transpose("class", ...), values[0], rtol=1e-3, atol=1e-6
    )
    assert at.predicted.item() == model.classes[best[0]]
    assert r["class"].values.tolist() == ["LABEL_4", "LABEL_0"]
    ds = vitxr.extract(stim, model, 0, grid, ["logits"], preprocess="raw").compute()
    np.testing.assert_array_equal(r.predicted, ds.logits.idxmax("class"))
    own = relevance(stim, model, grid, preprocess="raw")
    assert validate(own).relevance.dims == ("image", "shift_y", "shift_x", "patch_row", "patch_col")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_model_is_left_as_it_was(frames, implementation):
    module = make_vit(patch_size=(8, 16))
    module.set_attn_implementation(implementation)
    module.train()
    module.vit.layers[1].eval()
    frozen = module.vit.layers[0].mlp.fc1.weight
    frozen.requires_grad = False
    training = [m.training for m in module.modules()]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    model = vitxr.load_model(module)
    attention_relevance(model, frames, None)
    with pytest.raises(RuntimeError, match="index 99"):
        attention_relevance(model, frames, [99])
    assert [m.training for m in module.modules()] == training
    assert all(p.grad is None for p in module.parameters())
    assert next(p for p in module.parameters() if not p.requires_grad) is frozen
    assert sum(not p.requires_grad for p in module.parameters()) == 1
    assert module.config._attn_implementation == implementation
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    with torch.inference_mode():  # of the caller's
        attention_relevance(model, frames, None)


def test_attention_that_is_not_torchs_is_refused(frames):
    module = make_vit(patch_size=(8, 16))
    model = vitxr.load_model(module)
    attention = module.vit.layers[2].attention
    attention.forward = types.MethodType(lambda self, x, *_, **__: (x, None), attention)
    with pytest.raises(ModelError, match=r"\[1, 1, 0\] times; expected once each"):
        attention_relevance(model, frames, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"classes": ["nothing"]},
            r"no class 'nothing'; of its 5 classes the first are: 'LABEL_0', .*, 'LABEL_4'\.$",
        ),
        ({"classes": ["LABEL-3"]}, r"of its 5 classes the nearest are: 'LABEL_3', "),
        ({"classes": "LABEL_1"}, "expected a sequence of names"),
        ({"classes": []}, "expected a sequence of names"),
        ({"classes": ["LABEL_1", "LABEL_1"]}, "named twice"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shifts": 11}, "shifts=11"),
        ({"preprocess": "none"}, "preprocess='none'"),
    ],
)
def test_refused(stim, model, options, message):
    with pytest.raises(ArgumentError, match=message):
        relevance(stim, model, **{"preprocess": "raw", **options})


def test_a_model_without_classes_is_refused(stim, vit):
    with pytest.raises(ModelError, match="no classification head"):
        relevance(stim, vitxr.load_model(vit.vit), preprocess="raw")
    with pytest.raises(ArgumentError, match="is a ViTForImageClassification; expected what"):
        relevance(stim, vit)
    assert isinstance(stim, xr.Dataset)
