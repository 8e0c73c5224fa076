"""Pictures: labelled arrays in, HoloViews elements out; pure functions, no widgets.

Every function takes plain xarray objects and returns an element that carries
its looks for Matplotlib and for Bokeh. Importing this package loads neither
HoloViews nor Matplotlib; the first picture does. :func:`save` and :func:`render`
turn an element into a file.

Many small maps are drawn as one image (a mosaic), its coordinates being the
pixels of the mosaic with row 0 at the top.
"""

from __future__ import annotations

from vitxr.plot.attended import attention_map, attention_rollout, mass_mask, relevance
from vitxr.plot.attention import attention_matrices, attention_query
from vitxr.plot.classes import predictions
from vitxr.plot.components import factors
from vitxr.plot.curves import factor_curves
from vitxr.plot.fits import (
    core_consistency_by_rank,
    held_out_by_rank,
    objective_by_rank,
    rank_choice,
    similarity_by_rank,
    split_half_by_rank,
)
from vitxr.plot.hidden import hidden_states
from vitxr.plot.images import shifts, stimuli
from vitxr.plot.layers import attention_distance, attention_entropy, by_layer, equivariance
from vitxr.plot.likeness import rdm, similarity_by_layer, similarity_by_shift
from vitxr.plot.manifold import embedding, embedding_3d, explained_variance, patch_colors
from vitxr.plot.maps import feature_map_layers, neuron_matrix
from vitxr.plot.movie import Movie, movie
from vitxr.plot.neurons import (
    cluster,
    local_dimension,
    manifold_distance,
    project,
    sample_neurons,
    spatial_order,
)
from vitxr.plot.output import figure, render, save
from vitxr.plot.responses import activity, filmstrip
from vitxr.plot.rolled import error_map, phase_tuning, unshift
from vitxr.plot.selectivity import class_activity, map_table
from vitxr.plot.weights import patch_filters, position_similarity

__all__ = [
    "Movie",
    "activity",
    "attention_distance",
    "attention_entropy",
    "attention_map",
    "attention_matrices",
    "attention_query",
    "attention_rollout",
    "by_layer",
    "class_activity",
    "cluster",
    "core_consistency_by_rank",
    "embedding",
    "embedding_3d",
    "equivariance",
    "error_map",
    "explained_variance",
    "factor_curves",
    "factors",
    "feature_map_layers",
    "figure",
    "filmstrip",
    "held_out_by_rank",
    "hidden_states",
    "local_dimension",
    "manifold_distance",
    "map_table",
    "mass_mask",
    "movie",
    "neuron_matrix",
    "objective_by_rank",
    "patch_colors",
    "patch_filters",
    "phase_tuning",
    "position_similarity",
    "predictions",
    "project",
    "rank_choice",
    "rdm",
    "relevance",
    "render",
    "sample_neurons",
    "save",
    "shifts",
    "similarity_by_layer",
    "similarity_by_rank",
    "similarity_by_shift",
    "spatial_order",
    "split_half_by_rank",
    "stimuli",
    "unshift",
]
