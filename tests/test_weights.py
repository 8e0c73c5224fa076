"""Filters and position embeddings, against the parameters and against what the model does."""

import numpy as np
import pytest
import torch
import transformers
from conftest import make_vit

import vitxr
from vitxr.analysis import patch_filters, position_similarity
from vitxr.errors import ArgumentError, ModelError
from vitxr.models.embedding import position_embeddings
from vitxr.names import validate

SMALL = {
    "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip


def test_filters_make_the_patch_embedding():
    module = make_vit(patch_size=(8, 16))
    f = patch_filters(vitxr.load_model(module))
    validate(f.to_dataset())
    assert f.dims == ("feature_map", "row", "col", "channel")
    frame = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    conv = module.vit.embeddings.patch_embeddings.projection
    with torch.no_grad():
        token = conv(frame)[0, :, 2, 1].numpy()
    patch = frame[0, :, 16:24, 16:32].permute(1, 2, 0).numpy()
    made = (f.values * patch).sum((1, 2, 3)) + conv.bias.detach().numpy()
    np.testing.assert_allclose(made, token, atol=1e-6)


#: Class, configuration, and where its position embeddings of patches are.
FAMILIES = {
    "ViT": ("ViTModel", "ViTConfig", lambda e: e.position_embeddings[0, 1:]),
    "DeiT": ("DeiTModel", "DeiTConfig", lambda e: e.position_embeddings[0, 2:]),
    "DINOv2": ("Dinov2Model", "Dinov2Config", lambda e: e.position_embeddings[0, 1:]),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", lambda e: e.position_embedding.weight[1:]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_the_parameters(family):
    title, config, positions = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = getattr(transformers, title)(getattr(transformers, config)(**SMALL)).train()
        for name, parameter in module.named_parameters():
            if "position_embedding" in name:  # DeiT's start as zeros
                torch.nn.init.normal_(parameter)
    model = vitxr.load_model(module)
    added = position_embeddings(model)
    assert added.shape == (48, 4, 4)
    expected = positions(module.embeddings).detach().numpy()
    np.testing.assert_allclose(added.reshape(48, 16).T, expected, atol=1e-6)
    assert all(m.training for m in module.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_similarity_is_the_cosine():
    module = make_vit(patch_size=(8, 16))
    s = position_similarity(vitxr.load_model(module))
    validate(s.to_dataset())
    p = module.vit.embeddings.position_embeddings[0, 1:].detach().numpy().reshape(4, 3, 48)
    a, b = p[2, 1], p[0, 2]
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert s.sel(patch_row=2, patch_col=1, other_row=0, other_col=2) == pytest.approx(cosine, 1e-4)
    assert s.sel(patch_row=3, patch_col=0, other_row=3, other_col=0) == pytest.approx(1)


def test_no_absolute_positions_are_refused():
    beit = transformers.BeitModel(transformers.BeitConfig(**SMALL))
    with pytest.raises(ModelError, match="no absolute position embedding"):
        position_similarity(vitxr.load_model(beit))
    with pytest.raises(ArgumentError, match="is a BeitModel; expected"):
        position_similarity(beit)


def test_two_projections_are_refused():
    module = make_vit()
    module.other = torch.nn.Conv2d(3, 5, 8, 8)
    with pytest.raises(ModelError, match=r"one patch \(8 x 8 px\), found \['vit.*'other'\]"):
        patch_filters(vitxr.load_model(module))
