"""Every picture of vitxr.plot as a file and on the screen: its size, and that it is not blank."""

from io import BytesIO

import numpy as np
import pytest
import synthetic
import xarray as xr
from PIL import Image

from vitxr import analysis, plot

pytest.importorskip("holoviews")

#: Those that draw nothing by themselves; the movie is a page only.
NO_PICTURES = {"Movie", "figure", "movie", "patch_colors", "render", "save"}
#: With a colour bar or a key beside it.
BARS = {
    *("predictions", "attention_matrices", "attention_query", "attention_map"),
    *("attention_rollout", "relevance", "feature_map_layers", "neuron_matrix", "filmstrip"),
    *("activity", "class_activity", "map_table", "factors", "hidden_states", "error_map"),
    *("phase_tuning", "unshift", "rdm", "similarity_by_layer", "position_similarity"),
    *("sample_neurons", "embedding by row", "embedding by row and column", "embedding by loading"),
    *("embedding of shifts", "embedding by roll"),
}
#: Of three axes, of which Bokeh has none.
STILL = {"embedding_3d"}
PIXELS = 60


@pytest.fixture(scope="module")
def stim():
    return synthetic.stimuli(per_class=3, classes=(0, 1))


@pytest.fixture(scope="module")
def run(stim):
    ds = synthetic.extraction(stim, step=8, layers=(0, 1), channels=12, heads=3)
    for name in ("offset_y", "offset_x"):
        ds[name].attrs["period"] = 32
    ds.attrs["prefix_names"] = "class"
    return ds


@pytest.fixture(scope="module")
def one(run):
    return run.isel(shift_y=[0], shift_x=[0])


@pytest.fixture(scope="module")
def tensor(run):
    return synthetic.neuron_tensor(run, 1, maps=4)


@pytest.fixture(scope="module")
def factors(tensor):
    return synthetic.factorize(tensor, 3)


@pytest.fixture(scope="module")
def embedded(factors):
    return analysis.cluster(analysis.embed(factors, 3), 4)


@pytest.fixture(scope="module")
def fine(stim):
    ds = synthetic.extraction(stim.isel(image=[0, 4]), step=2, layers=(0, 1), channels=5)
    for name in ("offset_y", "offset_x"):
        ds[name].attrs["period"] = 32
    return ds


@pytest.fixture(scope="module")
def moved(fine):
    return analysis.equivariance(fine)


@pytest.fixture(scope="module")
def ordered(embedded):
    return analysis.spatial_order(embedded, n_permutations=9)


@pytest.fixture(scope="module")
def table(run):
    return analysis.map_table(run, shuffles=3)


@pytest.fixture(scope="module")
def ensemble(tensor):
    return synthetic.ensemble(tensor, ranks=(1, 2), replicates=2, iterations=3)[0]


@pytest.fixture(scope="module")
def ranks():
    """What choosing a rank finds."""
    rng = np.random.default_rng(0)
    both = ("rank", "replicate")
    names = ("objective", "similarity", "shuffled_objective", "shuffled_similarity")
    ds = xr.Dataset({name: (both, rng.random((3, 2))) for name in (*names, "core_consistency")})
    for name in ("split_half_score", "shuffled_split_half_score"):
        ds[name] = (("rank", "split"), rng.random((3, 2)))
    for name in ("train_error", "test_error"):
        ds[name] = (("rank", "replicate", "split"), rng.random((3, 2, 2)))
    return ds.assign_coords(rank=[2, 4, 16], replicate=[0, 1], split=[0, 1])


@pytest.fixture(scope="module")
def aligned(run):
    """An aligned fit, short: its rolls."""
    return run.vit.neuron_tensor(layer=1, feature_maps=2).vit.factorize_aligned(rank=2, max_iter=3)


def relevance(stim):
    values = np.random.default_rng(0).random((2, 2, 8, 8))
    return xr.Dataset(
        {"relevance": (("image", "class", "patch_row", "patch_col"), values)},
        coords={"image": stim["image"].values[:2], "class": ["0", "1"]},
    )


def weights(name):
    rng = np.random.default_rng(0)
    if name == "patch_filter":
        dims = ("feature_map", "row", "col", "channel")
        return xr.DataArray(rng.normal(size=(7, 4, 4, 3)), dims=dims, name=name)
    dims = ("patch_row", "patch_col", "other_row", "other_col")
    return xr.DataArray(rng.uniform(-1, 1, (4, 4, 4, 4)), dims=dims, name=name)


#: What makes each, of fixtures by name. What stands before a space is the function.
PICTURES = {
    "stimuli": lambda stim: plot.stimuli(stim),
    "shifts": lambda stim: plot.shifts(stim["pixels"].values[0], [0, 8], [0, 8, 16]),
    "predictions": lambda run: plot.predictions(run),
    "attention_matrices": lambda one: plot.attention_matrices(one),
    "attention_query": lambda one, stim: plot.attention_query(one, (0, 7), layer=1, pixels=stim),
    "attention_map": lambda one, stim: plot.attention_map(
        analysis.attention_map(one).isel(image=0, shift_y=0, shift_x=0), pixels=stim
    ),
    "attention_rollout": lambda run, stim: plot.attention_rollout(
        analysis.attention_rollout(run).isel(image=1, shift_x=0), pixels=stim
    ),
    "mass_mask": lambda one, stim: plot.mass_mask(
        analysis.mass_mask(
            analysis.attention_map(one).isel(image=0, shift_y=0, shift_x=0, layer=0), 0.6
        ),
        pixels=stim,
    ),
    "relevance": lambda stim: plot.relevance(relevance(stim), pixels=stim),
    "attention_distance": lambda one: plot.attention_distance(analysis.attention_distance(one)),
    "attention_entropy": lambda one: plot.attention_entropy(analysis.attention_entropy(one)),
    "by_layer": lambda moved: plot.by_layer(moved["variance"]),
    "hidden_states": lambda one: plot.hidden_states(one),
    "feature_map_layers": lambda one: plot.feature_map_layers(one, 0),
    "neuron_matrix": lambda tensor: plot.neuron_matrix(tensor.mean("shift")),
    "filmstrip": lambda tensor: plot.filmstrip(tensor, int(tensor["feature_map"].values[0])),
    "activity": lambda tensor: plot.activity(tensor),
    "class_activity": lambda run: plot.class_activity(analysis.class_activity(run)),
    "map_table": lambda table: plot.map_table(table.sel(layer=1), color="label_share"),
    "factors": lambda factors: plot.factors(factors),
    "factor_curves": lambda factors: plot.factor_curves(factors),
    "factor_curves in rows": lambda factors: plot.factor_curves(factors, "image"),
    "factor_curves of images": lambda factors: plot.factor_curves(factors, "image", overlay=True),
    "objective_by_rank": lambda ensemble: plot.objective_by_rank(ensemble),
    "similarity_by_rank": lambda ensemble: plot.similarity_by_rank(ensemble),
    "split_half_by_rank": lambda ranks: plot.split_half_by_rank(ranks),
    "core_consistency_by_rank": lambda ranks: plot.core_consistency_by_rank(ranks),
    "held_out_by_rank": lambda ranks: plot.held_out_by_rank(ranks),
    "rank_choice": lambda ranks: plot.rank_choice(ranks),
    "embedding": lambda embedded: plot.embedding(embedded),
    "embedding by row": lambda embedded: plot.embedding(embedded, "patch_row"),
    "embedding by row and column": lambda embedded: plot.embedding(embedded, "both"),
    "embedding by cluster": lambda embedded: plot.embedding(embedded, "cluster"),
    "embedding by loading": lambda embedded, factors: plot.embedding(
        embedded, factors["neuron_factor"].sel(component=1)
    ),
    "embedding of images": lambda factors: plot.embedding(analysis.embed(factors, 2, dim="image")),
    "embedding of shifts": lambda factors: plot.embedding(analysis.embed(factors, 2, dim="shift")),
    "embedding_3d": lambda embedded: plot.embedding_3d(embedded, "both"),
    "explained_variance": lambda embedded: plot.explained_variance(embedded),
    "equivariance": lambda moved: plot.equivariance(moved),
    "error_map": lambda moved: plot.error_map(moved),
    "phase_tuning": lambda moved: plot.phase_tuning(moved),
    "unshift": lambda fine: plot.unshift(fine, 3, layer=1, every=4),
    "rdm": lambda one: plot.rdm(analysis.rdm(one)),
    "similarity_by_layer": lambda one: plot.similarity_by_layer(analysis.cka(one, shuffles=2)),
    "similarity_by_shift": lambda run: plot.similarity_by_shift(
        analysis.cka(run.isel(shift_x=[0]), across="shift", shuffles=2)
    ),
    "patch_filters": lambda: plot.patch_filters(weights("patch_filter")),
    "position_similarity": lambda: plot.position_similarity(weights("position_similarity")),
    "cluster": lambda embedded: plot.cluster(embedded),
    "local_dimension": lambda factors: plot.local_dimension(analysis.local_dimension(factors, 10)),
    "manifold_distance": lambda ordered: plot.manifold_distance(ordered),
    "spatial_order": lambda ordered: plot.spatial_order(ordered),
    "project": lambda embedded: plot.project(embedded, embedded),
    "sample_neurons": lambda tensor: plot.sample_neurons(analysis.sample_neurons(tensor, 40)),
    "embedding by roll": lambda aligned: plot.embedding(
        analysis.embed(aligned, 2), aligned["roll_offset_x"].isel(image=0)
    ),
}


def test_none_is_left_out():
    assert {name.split(" ")[0] for name in PICTURES} == set(plot.__all__) - NO_PICTURES


@pytest.mark.parametrize("name", list(PICTURES))
def test_a_picture_is_a_file_and_stands_on_the_screen(name, request, monkeypatch):
    import holoviews as hv
    from bokeh.core.validation import check_integrity

    make = PICTURES[name]
    wanted = make.__code__.co_varnames[: make.__code__.co_argcount]
    picture = make(*(request.getfixturevalue(one) for one in wanted))
    drawn = plot.figure(picture)
    monkeypatch.setattr("vitxr.plot.output.figure", lambda _: drawn)
    png = Image.open(BytesIO(plot.render(picture, dpi=PIXELS)["png"]))
    pixels = np.asarray(png.convert("RGB")).astype(int)
    assert png.info["dpi"] == pytest.approx((PIXELS, PIXELS), abs=0.1)

    # As large as was asked for, cut at what is drawn, with a key beside it.
    (width, height), (wide, high) = drawn.get_size_inches(), np.array(png.size) / PIXELS
    assert 0.6 * width < wide < width + 2.4
    assert 0.6 * height < high < height + 1.5
    assert wide < 7.9

    # Something is there: on white ground, in many colours, in every corner of the picture.
    ground = (pixels == 255).all(-1)
    assert len(png.convert("RGB").getcolors(10**7)) > 10
    assert (~ground).mean() > 0.02
    for half in np.array_split(~ground, 2, 0) + np.array_split(~ground, 2, 1):
        assert half.mean() > 0.005
    # A bar or key is an inset of the axis: a hook that fails only warns.
    assert len(drawn.axes) == (5 if name == "rank_choice" else 1)
    insets = sum(len(a.child_axes) for a in drawn.axes)
    assert insets == (name in BARS) or name in STILL
    if name not in STILL:
        shown = hv.render(picture, backend="bokeh")
        assert [str(e) for e in check_integrity(shown.references()).error] == []
