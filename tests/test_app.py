"""What the browser of a store shows and serves, without a browser."""

import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import synthetic
import xarray as xr

import vitxr
from vitxr.errors import ArgumentError, DataError, StoreError

pytest.importorskip("panel")

from vitxr.app import serve as serving
from vitxr.app.means import means
from vitxr.app.page import App, problem_page
from vitxr.app.pixels import at_offset, pixels
from vitxr.app.selection import select
from vitxr.app.source import Source, open_source
from vitxr.app.state import State
from vitxr.plot.screen import point_colors, scale_bytes, screen_png, shades


@pytest.fixture(scope="module")
def stim():
    return synthetic.stimuli(per_class=2, classes=(0, 1))


@pytest.fixture(scope="module")
def ds(stim):
    return synthetic.extraction(stim, step=8, layers=(0, 1), channels=12, heads=2)


@pytest.fixture(scope="module")
def factors(ds):
    t = ds.vit.neuron_tensor(layer=1, feature_maps=4)
    return t.vit.factorize(3, progress=False)


@pytest.fixture
def source(ds, factors, stim):
    return Source(ds, factors, stim)


@pytest.mark.parametrize("chunks", [None, {"image": 1, "feature_map": 5}])
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"rectify": False, "drop_edge": 1}])
def test_means_are_those_of_the_neuron_tensor(ds, chunks, options):
    t = ds.vit.neuron_tensor(layer=1, feature_maps=[7, 2, 9], **options)
    lazy = ds if chunks is None else ds.chunk(chunks)
    told = []
    got = means(lazy, 1, t.to_dataset(name="t").assign_attrs(t.attrs), lambda *k: told.append(k))
    np.testing.assert_allclose(got.by_image, t.mean("shift").values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.by_shift, t.mean("image").values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.overall, t.mean(("shift", "image")).values, rtol=1e-5, atol=1e-6)
    assert told == [(k, 4) for k in (1, 2, 3, 4)]
    third = np.arange(t.sizes["neuron"]) % 3 == 0
    for mask in (third, ~third):
        for mean, dim in zip(got.of(mask), ("shift", "image"), strict=True):
            expected = t.isel(neuron=mask).mean(("neuron", dim)).values
            np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(got.of(mask & False)[0]).all()


def wait(until, seconds=60):
    """Wait for what runs beside the page."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_means_of_other_neurons_or_of_too_many_are_refused(ds, monkeypatch):
    t = ds.vit.neuron_tensor(layer=1, feature_maps=[7, 2]).to_dataset(name="t")
    with pytest.raises(DataError, match="rows were left out or reordered"):
        means(ds, 1, t.isel(neuron=slice(1, None)))
    monkeypatch.setattr("vitxr.app.means.available", lambda: 1000)
    with pytest.raises(DataError, match=r"need 0\.0 GB, and 0\.0 GB may be used"):
        means(ds, 1, t)


def test_nothing_is_read_on_the_path_of_a_brush(ds, factors, stim):
    import dask

    def refuse(*_, **__):
        raise AssertionError("Dask was called")

    app = App(Source(ds.chunk({"image": 1}), factors, stim))
    app.start()
    app.source.means(1, None)
    app.state.tab = "embedding"
    with dask.config.set(scheduler=refuse):
        app.join(select(app.state.neurons(), {"rows": [0, 2]}))
        app.state.tab = "responses"
        app.join(select(app.state.neurons(), {"cols": [0, 2]}))


def test_pixels_come_from_where_the_images_are(stim, tmp_path):
    from PIL import Image

    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    files = vitxr.open_images(tmp_path / "a.png")
    stored = files.drop_vars("pixels").assign_attrs(input_height=32, input_width=32)
    name = str(files["image"].values[0])
    assert (pixels(stored, name) == rgb).all()
    assert pixels(stored.assign_attrs(input_height=16), name).shape == (16, 32, 3)
    digits = vitxr.datasets.digits(per_class=1)
    one = str(digits["image"].values[3])
    assert (pixels(digits.drop_vars("pixels"), one) == digits["pixels"].values[3]).all()
    given = stim["image"].values[1]
    assert (pixels(stim.drop_vars("pixels"), given, stim) == stim["pixels"].values[1]).all()
    with pytest.raises(DataError, match="keeps activations, not pixels"):
        pixels(stim.drop_vars("pixels"), given)
    Image.fromarray(255 - rgb).save(tmp_path / "a.png")
    with pytest.raises(vitxr.errors.ImageError, match="changed since it was extracted"):
        pixels(stored, name)
    assert (at_offset(rgb, (3, 5))[(7 + 3) % 32, (30 + 5) % 32] == rgb[7, 30]).all()


def test_what_is_given_must_fit(ds, factors):
    with pytest.raises(DataError, match=r"expected a Dataset of vitxr\.extract"):
        Source(ds.drop_vars("activation"))
    with pytest.raises(DataError, match="expected factors or an ensemble"):
        Source(ds, ds)
    with pytest.raises(DataError, match="factors are of block 7"):
        Source(ds, factors.assign_attrs(layer=7))
    with pytest.raises(DataError, match="of another model"):
        Source(
            ds.assign_attrs(model_fingerprint="a" * 64),
            factors.assign_attrs(model_fingerprint="b" * 64),
        )
    tucker = factors.rename({"component": "neuron_component"})
    with pytest.raises(DataError, match="those of a Tucker model"):
        Source(ds, tucker)
    other = factors.copy()
    del other.attrs["layer"]
    with pytest.raises(DataError, match="do not say of which block"):
        Source(ds, other)


def test_tabs_are_those_that_have_something_to_show(ds, factors, source):
    def tabs(s):
        return [key for key, _ in App(s).header.tabs]

    assert tabs(source) == [
        *("stimuli", "attention", "maps", "movie", "factors"),
        *("embedding", "responses", "store"),
    ]
    assert tabs(Source(ds.drop_vars("attention"))) == [
        *("stimuli", "maps", "movie", "responses", "store")
    ]
    t = ds.vit.neuron_tensor(layer=1, feature_maps=4)
    tree = t.vit.fit_ensemble([1, 2], replicates=2, progress=False)
    assert "rank" in tabs(Source(ds, tree))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_is_drawn(source, theme):
    app = App(source)
    app.start()
    app.state.theme = theme
    for key, _ in app.header.tabs:
        app.state.tab = key
        assert list(app.main) == [app.views[key].layout], key


def test_an_ensemble_is_walked_by_rank(ds, stim):
    t = ds.vit.neuron_tensor(layer=1, feature_maps=4)
    tree = t.vit.fit_ensemble([2, 3], replicates=2, progress=False)
    app = App(Source(ds, tree, stim))
    app.start()
    app.state.tab = "embedding"
    assert app.state.neurons().sizes["pc"] == 2
    app.state.choose(select(app.state.neurons(), {"rows": [0, 1]}))
    app.state.rank = 3
    expected = tree.vit.best(3).vit.embed(n_components=3)
    np.testing.assert_array_equal(app.state.neurons()["score"], expected["score"])
    assert app.state.selection.count == 4 * 8 * 2
    polygon = {"polygon": [[-9, -9], [9, -9], [0, 9]], "pcs": [1, 2]}
    camera = {"camera": [[0, 1, 0], [0, 0, 1]]}
    app.state.choose(select(app.state.neurons(), polygon | camera))
    app.state.rank = 2
    assert app.state.selection is None
    assert "another embedding" in app.state.problem


def test_the_state_is_made_from_an_address(source):
    state = State(source, ["stimuli"], how={"rows": [0, 1]}, layer=1, query_row=3)
    assert state.selection.count == 4 * 2 * 8
    assert (state.layer, state.query_row, state.query_col) == (1, 3, 4)
    state.how = {"rows": [0]}
    assert state.selection is None
    assert "the first and the last" in state.problem
    with pytest.raises(ValueError, match="layer"):
        state.layer = 9
    with pytest.raises(ValueError, match="shift_y"):
        state.shift_y = 4


def test_selections_join_as_the_widget_says(source):
    app = App(source)
    app.start()
    app.state.tab = "responses"
    e = app.state.neurons()
    a, b = select(e, {"rows": [0, 3]}), select(e, {"cols": [0, 3]})
    for how, expected in {
        "new": b.mask,
        "and": a.mask & b.mask,
        "or": a.mask | b.mask,
        "without": a.mask & ~b.mask,
    }.items():
        app.state.choose(a)
        app.controls.join.value = how
        app.join(b)
        assert (app.state.selection.mask == expected).all()


def test_a_script_of_the_page_makes_the_same_selection(ds, factors, stim, tmp_path):
    vitxr.save(factors, tmp_path / "f.nc")
    app = App(Source(ds, factors, stim, where=("run.zarr", str(tmp_path / "f.nc"))))
    app.start()
    app.state.tab = "embedding"
    middle = float(np.median(app.state.neurons()["score"].sel(pc=1)))
    camera = {"camera": [[0.1, 1, 0], [0, 0.3, 1]], "pcs": [1, 2]}
    polygon = {"polygon": [[middle + 0.1, -1], [3, -1], [3, 1], [middle + 0.1, 1]]}
    app.join(~select(app.state.neurons(), polygon | camera))
    app.state.name_of_selection = "left"
    ran = {}
    exec(app.controls.text.value, ran)
    assert (ran["selected"].values == app.state.selection.mask).all()
    assert 0 < app.state.selection.count < app.state.selection.mask.size
    (tmp_path / "s.nc").write_bytes(app.controls._netcdf().getvalue())
    assert (vitxr.open(tmp_path / "s.nc").values == app.state.selection.mask).all()


def test_colours_are_those_of_the_pictures(source):
    import matplotlib as mpl

    values = np.array([[0.0, 0.25], [1.0, np.nan]])
    colors, limits = shades(values)
    expected = mpl.colormaps["viridis"](np.array([0, 64, 255]), bytes=True)
    assert limits == (0.0, 1.0)
    assert (colors[[0, 0, 1], [0, 1, 0], :3] == expected[:, :3]).all()
    assert colors[1, 1, 3] == 0
    assert shades([-1.0, 3.0], scale="signed")[1] == (-3.0, 3.0)
    with pytest.raises(ArgumentError, match="scale='x'"):
        scale_bytes("x")


def drawn_colors(e, by):
    """Colour of each neuron in the picture of Matplotlib, as bytes."""
    drawn = vitxr.plot.figure(vitxr.plot.embedding(e, by)).axes[0]
    parts = drawn.collections
    order = np.arange(e.sizes["neuron"])
    if len(parts) > 1:  # a part a class
        values = e[by].values
        names = np.unique(values) if by == "cluster" else list(dict.fromkeys(values.tolist()))
        order = np.concatenate([np.flatnonzero(values == n) for n in names])
    out = np.zeros((len(order), 3), np.uint8)
    faces = []
    for part in parts:
        part.update_scalarmappable()
        hues = part.get_facecolors()
        faces.append(np.broadcast_to(hues, (len(part.get_offsets()), 4)))
    out[order] = np.rint(np.concatenate(faces)[:, :3] * 255)
    return out


@pytest.mark.parametrize(
    ("by", "kind"),
    [
        ("feature_map", "class"),
        ("patch_row", "number"),
        ("patch_col", "number"),
        ("both", "place"),
        ("cluster", "class"),
        ("loading", "number"),
        ("signed", "number"),
    ],
)
def test_points_have_the_colours_of_the_picture(source, by, kind):
    e = source.clustered(None, 5)
    assert set(np.unique(e["cluster"])) == set(range(5))
    loading = source.factors()["neuron_factor"].isel(component=2)
    color = {"loading": loading, "signed": loading - 0.1}.get(by, by)
    rgb, key = point_colors(e, color)
    np.testing.assert_array_equal(rgb, drawn_colors(e, color))
    assert key["kind"] == kind
    shown = {tuple(c) for c in rgb.tolist()}
    if kind == "class":
        assert shown == {tuple(bytes.fromhex(c[1:])) for _, c in key["classes"]}
    elif kind == "place":
        assert key["grid"].shape == (8, 8, 3)
        place = key["grid"][e["patch_row"].values, e["patch_col"].values]
        np.testing.assert_array_equal(rgb, place)
    else:
        ends = {tuple(bytes.fromhex(key["colors"][k][1:])) for k in (0, -1)}
        assert len(shown & ends) == (1 if by == "signed" else 2)
        assert ("component 2" in key["label"]) == (by in ("loading", "signed"))


def test_clusters_and_loadings_colour_the_embedding(source):
    app = App(source)
    app.start()
    app.source.means(1, None)
    app.state.param.update(tab="embedding", color="cluster", clusters=4)
    view = app.views["embedding"]

    def painted(e, by):
        return view.points.colors == point_colors(e, by)[0].tobytes()

    wait(lambda: app.source.known_clusters(None, 4) is not None and not app._working)
    expected = app.source.neurons(1).vit.cluster(4)
    assert painted(expected, "cluster")
    assert [f"&#9679;</span> {k}</span>" in view.legend.object for k in range(5)] == [True] * 4 + [
        False
    ]
    assert (app.controls.clusters.visible, app.controls.component.visible) == (True, False)
    app.state.param.update(color="loading", component=1)
    assert painted(expected, app.source.factors()["neuron_factor"].sel(component=1))
    assert "of component 1" in view.legend.object
    assert (app.controls.clusters.visible, app.controls.component.visible) == (False, True)
    assert app.controls.component.options == [0, 1, 2]
    for name, wrong in (("component", 3), ("clusters", 1), ("clusters", 25)):
        with pytest.raises(ValueError, match=name):
            setattr(app.state, name, wrong)


def test_a_rank_has_as_many_components(ds, stim):
    t = ds.vit.neuron_tensor(layer=1, feature_maps=4)
    tree = t.vit.fit_ensemble([2, 3], replicates=1, progress=False)
    app = App(Source(ds, tree, stim))
    app.start()
    app.state.param.update(rank=3, tab="embedding", color="loading", component=2)
    assert app.controls.component.options == [0, 1, 2]
    app.state.rank = 2
    assert app.state.component == 1
    loading = tree.vit.best(2)["neuron_factor"].sel(component=1)
    colors = point_colors(app.state.neurons(), loading)[0]
    assert app.views["embedding"].points.colors == colors.tobytes()


def test_more_clusters_than_there_are_neurons_are_refused(ds, stim):
    t = ds.vit.neuron_tensor(layer=1, feature_maps=[0, 1]).isel(image=[0, 1])
    f = t.vit.factorize(2, progress=False)
    rows = np.array([[0, 0], [1, 0], [0, 2]], np.float32)
    f["neuron_factor"] = (("neuron", "component"), rows[np.arange(f.sizes["neuron"]) % 3])
    app = App(Source(ds, f, stim))
    app.start()
    app.source.means(1, None)
    app.state.param.update(tab="embedding", color="cluster", clusters=4)
    said = "While finding 4 clusters: n_clusters is 4; 3 rows of"
    wait(lambda: said in app.notice.object and not app._working)
    view = app.views["embedding"]
    assert set(view.points.colors) == {0x8C}
    app.state.clusters = 3
    expected = point_colors(app.state.neurons().vit.cluster(3), "cluster")[0].tobytes()
    wait(lambda: view.points.colors == expected)
    assert list(app.main) == [view.layout]


def test_a_dark_picture_has_a_dark_ground_and_light_letters():
    from io import BytesIO

    from PIL import Image

    e = xr.Dataset({"explained_variance_ratio": ("pc", [0.6, 0.3])})
    picture = vitxr.plot.explained_variance(e)
    means = {}
    for dark in (False, True):
        image = np.asarray(Image.open(BytesIO(screen_png(picture, dark=dark))).convert("L"))
        means[dark] = np.percentile(image, [50, 0, 100])
    assert means[False][0] > 240
    assert means[False][1] < 90
    assert means[True][0] < 60
    assert means[True][2] > 180


def test_only_those_hosts_may_open_a_websocket(monkeypatch):
    assert serving.origins("127.0.0.1", 5) == ["127.0.0.1:5", "localhost:5"]
    assert serving.origins("::1", 5) == ["[::1]:5", "localhost:5"]
    assert serving.origins("192.168.7.9", 5) == ["192.168.7.9:5"]
    every = serving.origins("0.0.0.0", 5)
    assert "127.0.0.1:5" in every
    assert not any("*" in one for one in every)
    monkeypatch.setenv("BOKEH_ALLOW_WS_ORIGIN", "*")
    serving._forbid_other_origins()
    from bokeh.settings import settings

    assert settings.allowed_ws_origin() == []


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.7.9", "::", "myhost"])
def test_another_address_needs_a_password(address, monkeypatch, tmp_path):
    monkeypatch.delenv(serving.PASSWORD, raising=False)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ArgumentError, match="there is no password"):
        serving.serve(tmp_path / "a.zarr", address=address, show=False)


def test_the_command_refuses_another_address_without_a_password(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != serving.PASSWORD}
    done = subprocess.run(
        [sys.executable, "-m", "vitxr.cli", "browse", "a.zarr", "--address", "0.0.0.0"],
        capture_output=True,
        text=True,
        env=env,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    assert "there is no password" in done.stderr


def test_paths_without_a_store_are_said_before_serving(tmp_path):
    store = vitxr.catalog.entries().loc["activations.digits", "url"]
    for paths in [(tmp_path / "no.zarr",), (store, tmp_path / "no.zarr")]:
        with pytest.raises(StoreError, match=r"there is no store at .*no\.zarr"):
            serving.serve(*paths, show=False)


def test_a_port_that_cannot_be_listened_on(tmp_path):
    (tmp_path / "not-a-store").mkdir()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for taken in (port, 70_000):
            with pytest.raises(ArgumentError, match=rf"port {taken} .*0 for any that is free"):
                serving.serve(tmp_path / "not-a-store", port=taken, show=False)


def test_a_store_that_cannot_be_opened_gets_a_page(tmp_path):
    with pytest.raises(StoreError) as error:
        open_source(tmp_path / "no.zarr")
    page = problem_page(error.value, "no.zarr")
    assert "there is no store at" in page[1].object


def test_it_is_shown_in_a_notebook(ds, factors, stim):
    app = vitxr.browse(ds, factors, stim)
    assert app.state.tab == "stimuli"
    assert app.servable() is not None
    app.state.tab = "factors"
    app.state.tab = "responses"
    for thread in threading.enumerate():
        if thread.name == "vitxr-beside-means":
            thread.join(60)
    assert app.source.known_means(1, None) is not None
