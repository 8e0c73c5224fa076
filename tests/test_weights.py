"""Filters and position embeddings, against the parameters and against what the model does."""

import numpy as np
import pytest
import torch
import transformers
from conftest import make_vit
from scipy.spatial.distance import cdist

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
    assert f.channel.values.tolist() == list("RGB")
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


def test_positions_are_interpolated_as_the_model_does():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL))
    added = position_embeddings(vitxr.load_model(module, input_size=(48, 40)))
    with torch.no_grad():
        expected = module.embeddings.interpolate_pos_encoding(torch.zeros(1, 31, 48), 48, 40)
    np.testing.assert_allclose(added.reshape(48, 30).T, expected[0, 1:], atol=1e-6)


def test_similarity_is_the_cosine():
    module = make_vit(patch_size=(8, 16))
    with torch.no_grad():
        module.vit.embeddings.position_embeddings[0, 1 + 3 + 2] = 0
    model = vitxr.load_model(module)
    s = position_similarity(model)
    validate(s.to_dataset())
    assert s.dtype == float
    for name in ("name", "revision", "fingerprint"):
        key = "model" if name == "name" else f"model_{name}"
        assert s.attrs[key] == getattr(model, name)
    p = module.vit.embeddings.position_embeddings[0, 1:].detach().numpy()
    cosine = 1 - cdist(p, p, "cosine").reshape(4, 3, 4, 3)
    assert np.isnan(cosine).sum() == 23  # of the patch to which zeros are added
    np.testing.assert_allclose(s, cosine, atol=1e-5)


def test_no_absolute_positions_are_refused():
    beit = transformers.BeitModel(transformers.BeitConfig(**SMALL))
    with pytest.raises(ModelError, match="no absolute position embedding"):
        position_similarity(vitxr.load_model(beit))
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL))
    positions = FAMILIES["CLIP"][2]
    with torch.no_grad():  # what its norm before the first block changes differs between images
        positions(clip.embeddings).zero_()
    with pytest.raises(ModelError, match="no absolute position embedding"):
        position_similarity(vitxr.load_model(clip))
    with pytest.raises(ArgumentError, match="is a BeitModel; expected"):
        position_similarity(beit)


def test_two_projections_are_refused():
    module = make_vit()
    module.other = torch.nn.Conv2d(3, 5, 8, 8)
    with pytest.raises(ModelError, match=r"one patch \(8 x 8 px\), found \['vit.*'other'\]"):
        patch_filters(vitxr.load_model(module))
    module = make_vit()
    module.vit.embeddings.patch_embeddings.projection = torch.nn.Conv2d(3, 48, 4, 8)
    with pytest.raises(ModelError, match="found none; its patch embedding has no filters"):
        patch_filters(vitxr.load_model(module))
