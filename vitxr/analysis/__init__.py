"""What factors and activations show: manifolds, attention, equivariance, classes."""

from __future__ import annotations

from vitxr.analysis.activity import class_activity, map_table, population_sparseness
from vitxr.analysis.attention import (
    attention_distance,
    attention_entropy,
    attention_map,
    mass_mask,
)
from vitxr.analysis.cka import cka
from vitxr.analysis.classes import top_classes
from vitxr.analysis.cluster import cluster
from vitxr.analysis.dimension import local_dimension
from vitxr.analysis.embed import embed
from vitxr.analysis.equivariance import equivariance, unshift
from vitxr.analysis.order import spatial_order
from vitxr.analysis.project import project
from vitxr.analysis.relevance import relevance
from vitxr.analysis.rollout import attention_rollout
from vitxr.analysis.rsa import rdm, rsa
from vitxr.analysis.sampling import sample_neurons
from vitxr.analysis.weights import patch_filters, position_similarity

__all__ = [
    "attention_distance",
    "attention_entropy",
    "attention_map",
    "attention_rollout",
    "cka",
    "class_activity",
    "cluster",
    "embed",
    "equivariance",
    "local_dimension",
    "map_table",
    "mass_mask",
    "patch_filters",
    "population_sparseness",
    "position_similarity",
    "project",
    "rdm",
    "relevance",
    "rsa",
    "sample_neurons",
    "spatial_order",
    "top_classes",
    "unshift",
]
