"""The vocabulary: every dimension, coordinate and variable, with its meaning.

One registry. :func:`validate` checks a Dataset against it, and the tables of
the documentation are made from it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import DataError

__all__ = [
    "DIMS",
    "LATTICE",
    "NEURON",
    "PROVENANCE",
    "SHIFT",
    "VARIABLES",
    "Variable",
    "is_name",
    "of_module",
    "order",
    "provenance",
    "unit_dims",
    "unwritten",
    "validate",
]

#: The order of dimensions wherever they occur together.
LATTICE = ("image", "shift_y", "shift_x", "layer", "feature_map", "patch_row", "patch_col")
#: What the stacked dimension ``neuron`` is made of, in the notebook's order.
NEURON = ("feature_map", "patch_row", "patch_col")
#: What the stacked dimension ``shift`` is made of.
SHIFT = ("shift_y", "shift_x")

#: Attributes that say where numbers come from: tensors, factors and embeddings keep them.
PROVENANCE = (
    "model",
    "model_revision",
    "model_fingerprint",
    "preprocess",
    "preprocess_settings",
    "precision",
    "layer",
    "ranking",
    "drop_edge",
    "rectify",
    "normalize",
    "smoothing",
    "variable",
    "head",
    "sampling",
)

#: Every dimension and what its index means.
DIMS: dict[str, str] = {
    "image": "stimulus image, by unique name",
    "shift_y": "row of the shift lattice (0-based)",
    "shift_x": "column of the shift lattice (0-based)",
    "layer": "transformer block, 0-based; its output is after the residual",
    "head": "attention head (0-based)",
    "query": "token that attends: prefix tokens, then patches row by row",
    "key": "token attended to: prefix tokens, then patches row by row",
    "token": "prefix token by name (class, distillation, registers)",
    "feature_map": "channel number in the model, or rank where `channel` is given",
    "head_channel": "channel of a head's queries, keys and values (0-based)",
    "hidden_unit": "hidden unit of the block's MLP (0-based)",
    "patch_row": "row on the patch grid, 0 at the top",
    "patch_col": "column on the patch grid, 0 at the left",
    "permutation": "random permutation (0-based)",
    "grid_distance": "distance on the patch grid, patches",
    "other_row": "row of the patch compared with",
    "other_col": "column of the patch compared with",
    "row": "pixel row, 0 at the top",
    "col": "pixel column, 0 at the left",
    "channel": "colour channel (R, G, B)",
    "class": "output class of the model, by name",
    "neuron": "stacked (feature_map, patch_row, patch_col)",
    "shift": "stacked (shift_y, shift_x)",
    "component": "component of a factorization, by descending weight",
    "neuron_component": "column of the neuron factor of a Tucker model",
    "image_component": "column of the image factor of a Tucker model",
    "shift_component": "column of the shift factor of a Tucker model",
    "rank": "number of components of a model",
    "replicate": "repetition of a fit from another random start",
    "split": "random division: of neurons into halves, of entries into kept and held out",
    "iteration": "iteration of a fit (0-based)",
    "pc": "coordinate of an embedding (1-based)",
    "place": "place among the classes by their logits (1-based)",
    "phase_y": "pixels that a shift down is more than whole patches",
    "phase_x": "pixels that a shift to the right is more than whole patches",
    "label": "class of images",
    "other_image": "the other image of a pair",
    "other_shift_y": "row of the shift lattice, of what is compared with",
    "other_shift_x": "column of the shift lattice, of what is compared with",
    "other_layer": "block of what is compared with",
}


@dataclass(frozen=True)
class Variable:
    """One name of the vocabulary.

    Attributes
    ----------
    dims
        The dimensions, in order. Several tuples are several legal forms.
    units
        Unit, ``"1"`` for pure numbers, ``""`` for names.
    meaning
        One line, used as ``long_name``.
    kind
        NumPy kind characters the dtype may have.
    """

    dims: tuple[tuple[str, ...], ...]
    units: str
    meaning: str
    kind: str

    @property
    def attrs(self) -> dict[str, str]:
        """Attributes for a DataArray of this name: ``long_name`` and ``units``."""
        out = {"long_name": self.meaning}
        if self.units:
            out["units"] = self.units
        return out


def _v(dims: str | tuple[str, ...], units: str, meaning: str, kind: str) -> Variable:
    forms = (dims,) if isinstance(dims, str) else dims
    return Variable(tuple(tuple(form.split()) for form in forms), units, meaning, kind)


def _factor(dim: str) -> Variable:
    forms = (
        f"{dim} component",
        f"replicate {dim} component",
        f"{dim} {dim}_component",
    )
    return _v(forms, "1", "loading", "f")


def _along(end: str, meaning: str) -> dict[str, Variable]:
    return {f"{dim}_{end}": _v(dim, "1", meaning, "f") for dim in ("neuron", "image", "shift")}


def _similarity(name: str, meaning: str) -> dict[str, Variable]:
    forms = ("layer other_layer", "shift_y shift_x layer other_shift_y other_shift_x")
    return {
        name: _v(forms, "1", meaning, "f"),
        f"{name}_floor_mean": _v(forms, "1", f"{meaning}, mean of shuffled images", "f"),
        f"{name}_floor_quantile": _v(forms, "1", f"{meaning}, quantile of shuffled images", "f"),
    }


def _of_maps(more: str = "", /, **meanings: str) -> dict[str, Variable]:
    forms = (f"layer feature_map{more}", f"feature_map{more}")
    return {name: _v(forms, "1", meaning, "f") for name, meaning in meanings.items()}


_FRAME = "image shift_y shift_x "

#: Every variable and coordinate with a fixed name.
VARIABLES: dict[str, Variable] = {
    # stimuli
    "pixels": _v("image row col channel", "0..255", "image, sRGB", "u"),
    "encoded": _v("image", "", "image file held in memory (PNG)", "OS"),
    "label": _v(("image", "label"), "", "class of the image", "UOT"),
    "source": _v("image", "", "file the image came from", "UOT"),
    "height": _v("image", "px", "image height", "iu"),
    "width": _v("image", "px", "image width", "iu"),
    "sha256": _v("image", "", "SHA-256 of the file, or of the pixels where there is none", "UOT"),
    # shifts
    "offset_y": _v(("shift_y", "shift_y shift_x", "shift", ""), "px", "circular shift, down", "iu"),
    "offset_x": _v(
        ("shift_x", "shift_y shift_x", "shift", ""), "px", "circular shift, to the right", "iu"
    ),
    # activations
    "activation": _v(
        _FRAME + "layer feature_map patch_row patch_col", "1", "block output, patch tokens", "f"
    ),
    "prefix": _v(_FRAME + "layer token feature_map", "1", "block output, prefix tokens", "f"),
    "embedding": _v(
        _FRAME + "feature_map patch_row patch_col", "1", "embedding output, patch tokens", "f"
    ),
    "attention": _v(_FRAME + "layer head query key", "1", "attention weight", "f"),
    "query_token": _v("query", "", "name of a prefix token, or (row, column) of a patch", "UOT"),
    "key_token": _v("key", "", "name of a prefix token, or (row, column) of a patch", "UOT"),
    "attention_query": _v(
        _FRAME + "layer head head_channel patch_row patch_col",
        "1",
        "query as it enters the dot product, patch tokens",
        "f",
    ),
    "attention_key": _v(
        _FRAME + "layer head head_channel patch_row patch_col",
        "1",
        "key as it enters the dot product, patch tokens",
        "f",
    ),
    "attention_value": _v(
        _FRAME + "layer head head_channel patch_row patch_col",
        "1",
        "value as the attention weights sum it, patch tokens",
        "f",
    ),
    "attention_output": _v(
        _FRAME + "layer feature_map patch_row patch_col",
        "1",
        "attention output after its projection, before layer scale and residual, patch tokens",
        "f",
    ),
    "mlp_hidden": _v(
        _FRAME + "layer hidden_unit patch_row patch_col",
        "1",
        "what enters the MLP's down projection, patch tokens",
        "f",
    ),
    "logits": _v(_FRAME + "class", "1", "logit of the class", "f"),
    "written": _v(
        ("image shift_y", "image shift", "image", "shift_y", "shift", ""),
        "",
        "whether the store holds it yet",
        "b",
    ),
    "top_class": _v(_FRAME + "place", "", "name of the class", "OUT"),
    "class_number": _v(_FRAME + "place", "", "number of the class in the model (0-based)", "iu"),
    "top_logit": _v(_FRAME + "place", "1", "logit of the class", "f"),
    "probability": _v(_FRAME + "place", "1", "softmax of the logits over all classes", "f"),
    "channel": _v("layer feature_map", "", "channel number in the model", "iu"),
    # tensors
    "edge_distance": _v(
        ("patch_row patch_col", "neuron"), "patch", "distance to the nearest border", "iu"
    ),
    "activity": _v(_FRAME + "layer feature_map", "1", "mean activation over patches", "f"),
    "selected": _v("neuron", "", "whether the neuron is selected", "b"),
    # factors
    "neuron_factor": _factor("neuron"),
    "image_factor": _factor("image"),
    "shift_factor": _factor("shift"),
    "core": _v(
        (
            "neuron_component image_component shift_component",
            "neuron_component image_component",
        ),
        "1",
        "core of a Tucker model",
        "f",
    ),
    "weight": _v(("component", "replicate component"), "1", "weight of the component", "f"),
    "objective": _v(
        ("", "replicate", "rank replicate"), "1", "relative residual |X - M| / |X|", "f"
    ),
    "objective_history": _v(
        ("iteration", "replicate iteration"), "1", "relative residual after each iteration", "f"
    ),
    "penalized_objective_history": _v(
        ("iteration", "replicate iteration"),
        "1",
        "sqrt(objective^2 + 2 penalty) after each iteration",
        "f",
    ),
    "converged": _v(("", "replicate", "rank replicate"), "", "stopped by the tolerance", "b"),
    "similarity": _v(("replicate", "rank replicate"), "1", "similarity to the best replicate", "f"),
    "iterations": _v(("", "replicate", "rank replicate"), "1", "iterations done", "iu"),
    "compressed_iterations": _v(
        ("", "replicate", "rank replicate"), "1", "iterations on a compressed tensor", "iu"
    ),
    "seconds": _v(("", "replicate", "rank replicate"), "s", "time the fit took", "f"),
    "seed": _v(("", "replicate", "rank replicate"), "", "seed of the random start", "iu"),
    "best_replicate": _v("rank", "", "replicate of least objective, -1 if all failed", "iu"),
    "factor_match_score": _v(
        ("replicate", "rank replicate"), "1", "factor match score with the best replicate", "f"
    ),
    "failed": _v(("replicate", "rank replicate"), "", "no model: broke down or interrupted", "b"),
    "dead_components": _v(("replicate", "rank replicate"), "1", "components of weight 0", "iu"),
    # what factors explain
    "reconstruction": _v(
        (
            "neuron image shift",
            "neuron image",
            "replicate neuron image shift",
            "replicate neuron image",
        ),
        "1",
        "model of the tensor",
        "f",
    ),
    "r2": _v("", "1", "explained share of the sum of squares, 1 - |X - M|^2 / |X|^2", "f"),
    **_along("r2", "explained share of the sum of squares"),
    **_along("squares", "sum of squares of the tensor"),
    **_along("residual_squares", "sum of squares of the residual"),
    "component_alone": _v("component", "1", "r2 of the component by itself", "f"),
    "component_share": _v("component", "1", "the component's part of r2", "f"),
    "component_drop": _v("component", "1", "fall of r2 without the component", "f"),
    "congruence": _v(
        ("replicate", "rank replicate"),
        "1",
        "product of cosines of the two components most alike",
        "f",
    ),
    "degenerate": _v(
        ("replicate", "rank replicate"), "", "components dead, or two as one or cancelling", "b"
    ),
    "shuffled_objective": _v("rank replicate", "1", "relative residual, shuffled data", "f"),
    "shuffled_similarity": _v(
        "rank replicate", "1", "similarity to the best replicate, shuffled data", "f"
    ),
    "shuffled_factor_match_score": _v(
        "rank replicate", "1", "factor match score with the best replicate, shuffled data", "f"
    ),
    "core_consistency": _v("rank replicate", "%", "core consistency", "f"),
    "split_half_score": _v(
        "rank split", "1", "factor match score between halves of the neurons", "f"
    ),
    "shuffled_split_half_score": _v(
        "rank split", "1", "factor match score between halves of the neurons, shuffled data", "f"
    ),
    "train_error": _v("rank replicate split", "1", "relative residual, entries kept", "f"),
    "test_error": _v("rank replicate split", "1", "relative residual, entries held out", "f"),
    "split_seed": _v("split", "", "seed of the division", "iu"),
    # rolls of aligned fits
    "roll_y": _v("neuron image", "1", "roll of the response, lattice steps down", "iu"),
    "roll_x": _v("neuron image", "1", "roll of the response, lattice steps to the right", "iu"),
    "roll_offset_y": _v("neuron image", "px", "roll of the response, down", "iu"),
    "roll_offset_x": _v("neuron image", "px", "roll of the response, to the right", "iu"),
    # embeddings
    "score": _v(("neuron pc", "image pc", "shift pc"), "1", "coordinate on the embedding", "f"),
    "explained_variance": _v("pc", "1", "variance along the axis", "f"),
    "explained_variance_ratio": _v("pc", "1", "share of the variance", "f"),
    "component_loading": _v("pc component", "1", "direction of the axis among components", "f"),
    "component_mean": _v("component", "1", "mean of the factor's column", "f"),
    # equivariance
    "phase_y": _v(
        ("shift_y", "shift_y shift_x", "phase_y", ""), "px", "shift down beyond whole patches", "iu"
    ),
    "phase_x": _v(
        ("shift_x", "shift_y shift_x", "phase_x", ""),
        "px",
        "shift to the right beyond whole patches",
        "iu",
    ),
    **_of_maps(
        equivariance_error="squared error of a map rolled back / chance",
        still_error="squared error of a map that is not rolled / chance",
        invariance="intraclass correlation of the mean over patches",
        variance="variance over images, shifts and patches",
    ),
    **_of_maps(" patch_row patch_col", error_map="squared error of a map rolled back / chance"),
    **_of_maps(
        " phase_y phase_x",
        phase_error="squared error of a map rolled back / chance",
        phase_activity="mean activation",
    ),
    "phase_frames": _v("phase_y phase_x", "1", "shifts of the phase, the first left out", "iu"),
    "eigenvalue": _v("pc", "1", "eigenvalue of the diffusion operator", "f"),
    "bandwidth": _v(
        ("neuron", "image", "shift"), "1", "local scale of the kernel: distance to a neighbour", "f"
    ),
    "kernel_density": _v(("neuron", "image", "shift"), "1", "row sum of the kernel", "f"),
    "cluster": _v(("neuron", "image", "shift"), "", "number of the cluster, -1 for none", "iu"),
    "local_dimension": _v(
        ("neuron", "image", "shift"), "1", "dimension of the manifold around the point", "f"
    ),
    "dimension_mle": _v("", "1", "dimension by maximum likelihood, of all points", "f"),
    "dimension_twonn": _v("", "1", "dimension from the two nearest neighbours, of all points", "f"),
    "response_maximum": _v("neuron", "1", "largest response to any image and shift", "f"),
    "spatial_order": _v(
        "feature_map", "1", "rank correlation of distances on patch grid and manifold", "f"
    ),
    "spatial_order_p": _v("feature_map", "1", "p-value of spatial_order, by permutation", "f"),
    "shuffled_spatial_order": _v(
        "feature_map permutation", "1", "spatial_order, neurons shuffled on the grid", "f"
    ),
    "manifold_distance": _v(
        "feature_map grid_distance", "1", "mean distance on the manifold of pairs of neurons", "f"
    ),
    "pairs": _v("feature_map grid_distance", "1", "pairs of neurons so far apart", "iu"),
    # what attention shows
    "attention_map": _v(
        _FRAME + "layer head patch_row patch_col", "1", "attention of one token to patches", "f"
    ),
    "rollout": _v(
        (_FRAME + "patch_row patch_col", _FRAME + "query key"), "1", "attention rollout", "f"
    ),
    "attention_distance": _v(_FRAME + "layer head", "px", "mean attention distance", "f"),
    "attention_entropy": _v(_FRAME + "layer head", "nat", "mean entropy of attention", "f"),
    "mass_mask": _v(
        (
            _FRAME + "patch_row patch_col",
            _FRAME + "patch_row patch_col class",
            _FRAME + "layer head patch_row patch_col",
        ),
        "",
        "among the fewest patches that hold the share of the mass",
        "b",
    ),
    "relevance": _v(
        (_FRAME + "patch_row patch_col", _FRAME + "patch_row patch_col class"),
        "1",
        "relevance of the patch for the class",
        "f",
    ),
    "predicted": _v(_FRAME, "", "class of the largest logit", "UOT"),
    "patch_filter": _v(
        "feature_map row col channel", "1", "filter of the patch embedding, R, G, B", "f"
    ),
    "position_similarity": _v(
        "patch_row patch_col other_row other_col", "1", "cosine of two position embeddings", "f"
    ),
    # similarity
    **_similarity("cka", "linear centred kernel alignment"),
    **_similarity("rsa", "rank correlation of dissimilarities between images"),
    "dissimilarity": _v(
        "image shift_y shift_x layer other_image", "1", "dissimilarity of two images", "f"
    ),
    # activity of feature maps
    **_of_maps(
        mean_activity="mean rectified activation",
        responsiveness="share of values above zero",
        lifetime_sparseness="sparseness over frames",
        image_share="share of the variance due to the image",
        shift_share="share of the variance due to the shift",
        interaction_share="share of the variance due to both together",
        label_share="share of the variance due to the class",
        class_selectivity="class selectivity index of the preferred class",
        class_selectivity_floor="class selectivity index, shuffled labels",
        d_prime="sensitivity index of the preferred class",
        d_prime_floor="sensitivity index, shuffled labels",
    ),
    **_of_maps(" label", class_activity="mean rectified activation for the class"),
    "preferred_label": _v("layer feature_map", "", "class of largest mean activity", "UOT"),
    "population_sparseness": _v(
        "image shift_y shift_x layer", "1", "sparseness over feature maps", "f"
    ),
}


def is_name(text: object) -> bool:
    """Whether a variable may be called so: a letter, then letters, digits and underscores.

    Examples
    --------
    >>> is_name("mlp_gate"), is_name("../gate"), is_name("_private")
    (True, False, False)
    """
    return isinstance(text, str) and bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text))


def of_module(name: str, path: str, layered: bool, grid: bool) -> Variable:
    """Make the row of a variable that the user has named: what a module of the model gives.

    Examples
    --------
    >>> of_module("gate", "layers.{layer}.mlp.fc1", layered=True, grid=True).dims
    (('image', 'shift_y', 'shift_x', 'layer', 'gate_unit', 'patch_row', 'patch_col'),)
    """
    dims = f"{_FRAME}{'layer ' * layered}{name}_unit{' patch_row patch_col' * grid}"
    return _v(dims, "1", f"output of {path}{', patch tokens' * grid}", "f")


def unit_dims(dims: Iterable[Hashable]) -> tuple[str, ...]:
    """Pick the dimensions that number the maps on the patch grid; none where there is no grid.

    Examples
    --------
    >>> unit_dims(VARIABLES["activation"].dims[0]), unit_dims(VARIABLES["attention_key"].dims[0])
    (('feature_map',), ('head', 'head_channel'))
    """
    names = [str(dim) for dim in dims]
    if "patch_row" not in names:
        return ()
    known = {"image", "shift_y", "shift_x", "layer", "patch_row", "patch_col"}
    return tuple(name for name in names if name not in known)


def provenance(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Keep the attributes that say where numbers come from."""
    return {key: attrs[key] for key in PROVENANCE if key in attrs}


def unwritten(x: xr.DataArray | xr.Dataset, name: str = "t") -> str:
    """Say what to do about NaN where data are of a store that is not whole, by ``written``.

    Returns
    -------
    str
        A remedy more, behind a semicolon; nothing where all is written, or nothing is known.

    Examples
    --------
    >>> t = xr.DataArray([1, 2], dims="image", coords={"written": ("image", [True, False])})
    >>> unwritten(t)
    '; the store is not whole: t.isel(image=t.written.values) has the images that are'
    """
    if "written" not in x.coords or bool(x["written"].all()):
        return ""
    written = x["written"]
    others = [str(d) for d in written.dims if d != "image"]
    if "image" not in written.dims or not bool(written.all(others).any()):
        return "; the store is not whole: run the same extract again to finish it"
    over = f'.all("{others[0]}")' if others else ""
    which = f"image={name}.written{over}.values"
    return f"; the store is not whole: {name}.isel({which}) has the images that are"


def order(dims: Iterable[Hashable]) -> tuple[Hashable, ...]:
    """Sort dimension names into the order of the vocabulary.

    Names that the vocabulary does not know come last, in the order given.

    Examples
    --------
    >>> order(["patch_row", "image", "shift_x"])
    ('image', 'shift_x', 'patch_row')
    """
    rank = {name: i for i, name in enumerate(DIMS)}
    return tuple(sorted(dims, key=lambda d: rank.get(str(d), len(rank))))


def validate(ds: xr.Dataset, require: Iterable[str] = ()) -> xr.Dataset:
    """Check names, dims and dtype kinds of a Dataset against the vocabulary.

    Parameters
    ----------
    ds
        Any Dataset. Variables the vocabulary does not know are left alone.
    require
        Names that must be present, as variables or coordinates.

    Returns
    -------
    xarray.Dataset
        ``ds``, unchanged.

    Raises
    ------
    DataError
        If a required name is missing, or a known name has other dims or another
        kind of dtype than the vocabulary says.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> validate(xr.Dataset({"logits": ("class", np.zeros(3))}))
    Traceback (most recent call last):
        ...
    vitxr.errors.DataError: `logits` has dims (class); expected (image, shift_y, shift_x, class).
    """
    for name in require:
        if name not in ds.variables:
            have = ", ".join(map(str, ds.data_vars)) or "no variables"
            hint = f" ({VARIABLES[name].meaning})" if name in VARIABLES else ""
            raise DataError(
                f"the Dataset has no `{name}`{hint}; it has: {have}. "
                f"Add it, or make the Dataset with the step that writes `{name}`."
            )
    for key, array in ds.variables.items():
        name = str(key)
        known = VARIABLES.get(name)
        if known is None:
            continue
        if name == "channel" and array.dims == ("channel",):
            continue  # the colour channel's own index
        forms = known.dims
        if array.dims not in forms:
            given = "(" + ", ".join(map(str, array.dims)) + ")"
            expected = " or ".join("(" + ", ".join(form) + ")" for form in forms)
            raise DataError(f"`{name}` has dims {given}; expected {expected}.")
        if np.dtype(array.dtype).kind not in known.kind:
            raise DataError(
                f"`{name}` has dtype {array.dtype}; expected one of kind {known.kind!r} "
                f"({known.meaning})."
            )
    return ds
