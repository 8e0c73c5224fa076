"""The browser's page on odd stores: what is kept, what fails, what an address may say."""

import threading
import time
from urllib.parse import quote

import numpy as np
import pytest
import synthetic

import vitxr
from vitxr.errors import ArgumentError, DataError

pytest.importorskip("panel")

from vitxr.app import serve as serving
from vitxr.app import source as sources
from vitxr.app.address import follow, read, written
from vitxr.app.means import Means
from vitxr.app.page import ADDRESS, App
from vitxr.app.selection import select
from vitxr.app.source import Source
from vitxr.app.state import State


@pytest.fixture(scope="module")
def stim():
    return synthetic.stimuli(per_class=2, classes=(0, 1))


@pytest.fixture(scope="module")
def ds(stim):
    return synthetic.extraction(stim, step=8, layers=(0, 1), channels=12, heads=2)


@pytest.fixture(scope="module")
def factors(ds):
    return ds.vit.neuron_tensor(layer=1, feature_maps=4).vit.factorize(3, progress=False)


@pytest.fixture(scope="module")
def tree(ds):
    t = ds.vit.neuron_tensor(layer=1, feature_maps=4)
    return t.vit.fit_ensemble([2, 3], replicates=2, progress=False)


def rest():
    """Wait for what runs beside the page."""
    for thread in threading.enumerate():
        if thread.name.startswith("vitxr-beside-"):
            thread.join(60)


def test_what_two_ask_for_at_once_is_made_once(ds):
    source, made, got = Source(ds), [], []

    def make():
        made.append(1)
        time.sleep(0.05)
        return object()

    ask = [threading.Thread(target=lambda: got.append(source.keep("k", make))) for _ in range(4)]
    for one in ask:
        one.start()
    for one in ask:
        one.join()
    assert len(made) == 1
    assert len(set(map(id, got))) == 1
    assert source._making == {}

    def fail():
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        source.keep("x", fail)
    assert source.keep("x", lambda: 5) == 5


def test_frames_are_dropped_by_their_size_and_means_stay(ds, monkeypatch):
    source = Source(ds)
    means = source.means(0, None)
    frame = source.frame(0, source.images[0], 0, 0)
    monkeypatch.setattr(sources, "_BYTES", 3 * frame.nbytes)
    for image in source.images:
        for shift in range(4):
            source.frame(0, image, shift, 1)
    frames = [k for k in source._kept if k[0] == "frame"]
    assert len(frames) == 3
    assert frames[-1] == ("frame", 0, source.images[-1], 3, 1)
    assert source.known_means(0, None) is means
    assert source.known_means(1, None) is None
    # What is larger than all of it is kept as long as it is the newest.
    monkeypatch.setattr(sources, "_BYTES", 1)
    source.frame(1, source.images[0], 0, 0)
    assert [k for k in source._kept if k[0] == "frame"] == [("frame", 1, source.images[0], 0, 0)]


def test_means_that_do_not_fit_leave_the_views_as_they_are(ds, factors, stim, monkeypatch):
    app = App(Source(ds, factors, stim))
    app.start()
    asked = []
    monkeypatch.setattr("vitxr.app.means.available", lambda: asked.append(1) or 1000)
    app.state.tab = "embedding"
    rest()
    assert list(app.main) == [app.views["embedding"].layout]
    assert "0.0 GB may be used" in app.notice.object
    assert 'role="alert"' in app.notice.object
    assert app.header.busy == ""
    # A lasso finds its points, and nothing is tried again.
    app.join(select(app.state.neurons(), {"rows": [0, 1]}))
    rest()
    assert len(asked) == 1
    app.state.tab = "stimuli"
    assert list(app.main) == [app.views["stimuli"].layout]


def test_failed_work_does_not_take_the_place_of_another_view(ds, stim):
    app = App(Source(ds, stimuli=stim))
    app.start()
    rest()
    go = threading.Event()

    def work(_):
        go.wait(20)
        raise OSError("<b>gone</b>")

    app.beside("work", work, "reading", lambda: None)
    app.state.tab = "store"
    go.set()
    rest()
    assert list(app.main) == [app.views["store"].layout]
    assert "While reading: &lt;b&gt;gone" in app.notice.object
    assert app.header.busy == ""


def test_what_is_told_too_late_is_not_said(ds, stim, monkeypatch):
    app = App(Source(ds, stimuli=stim))
    app.start()
    rest()
    waiting, done = [], []
    monkeypatch.setattr(app, "_later", waiting.append)
    app.beside(
        "work", lambda tell: [tell(k, 3) for k in (1, 2, 3)], "reading", lambda: done.append(1)
    )
    rest()
    assert app.header.busy == "reading"
    waiting.pop(0)()
    assert app.header.busy == "reading: 1 of 3 images"
    for one in waiting[::-1]:
        one()
    assert (done, app.header.busy) == ([1], "")


def test_a_view_that_cannot_be_shown_leaves_no_sign_of_work(ds, stim, monkeypatch):
    app = App(Source(ds, stimuli=stim))
    app.start()
    rest()

    def fail(*_):
        raise DataError("neither")

    monkeypatch.setattr(app.controls, "show", fail)
    app.state.tab = "responses"
    assert app.header.busy == ""
    assert "neither" in app.main[0].object


def test_names_in_a_store_are_no_html(ds, factors):
    evil = "/no/<img src=x onerror=alert(1)>.png"
    other = ds.assign_coords(source=("image", [evil] * ds.sizes["image"]))
    app = App(Source(other, factors.assign_attrs(method="<img src=x>")))
    app.start()
    note = app.views["stimuli"].note
    assert note.visible
    assert "&lt;img src=x onerror" in note.object
    assert "<img" not in note.object
    app.state.tab = "factors"
    assert "&lt;img src=x&gt;" in app.views["factors"].about.object


def test_what_is_missing_is_blank_in_the_mosaic(ds, stim):
    holed = ds.copy()
    values = ds["activation"].values.copy()
    values[:, :, :, :, 2, 0, :] = np.nan
    values[:, :, :, :, 3] = np.nan
    holed["activation"] = (ds["activation"].dims, values)
    app = App(Source(holed, stimuli=stim))
    app.start()
    app.state.tab = "maps"
    mosaic = app.views["maps"].mosaic
    rgba = np.frombuffer(mosaic.pixels, np.uint8).reshape(*mosaic.shape, 4)
    across = mosaic.cols

    def tile(k):
        i, j = divmod(k, across)
        return rgba[i * 9 : i * 9 + 8, j * 9 : j * 9 + 8]

    assert (tile(2)[0, :, 3] == 0).all()
    assert (tile(2)[1:, :, 3] == 255).all()
    assert len(np.unique(tile(2)[1:].reshape(-1, 4), axis=0)) > 5
    assert (tile(3)[..., 3] == 0).all()
    assert (tile(4)[..., 3] == 255).all()


def test_factors_of_other_images_or_another_grid_are_refused(ds, factors, tree):
    names = [f"other-{k}" for k in range(factors.sizes["image"])]
    with pytest.raises(DataError, match="does not hold: 'other-0' and 3 more"):
        Source(ds, factors.assign_coords(image=names))
    with pytest.raises(DataError, match="does not hold"):
        Source(ds.isel(image=[0]), tree)
    with pytest.raises(
        DataError, match="neurons at `patch_row` 7, and the store's patch grid is 4 x"
    ):
        Source(ds.isel(patch_row=slice(4)), factors)
    few = ds.isel(image=[1, 2]).vit.neuron_tensor(layer=1, feature_maps=2)
    Source(ds, few.vit.factorize(1, progress=False))


def test_the_movie_shows_what_the_block_keeps(ds, stim):
    channels = np.array([np.arange(12), np.arange(12) + 100])
    kept = ds.assign_coords(channel=(("layer", "feature_map"), channels))
    t = kept.vit.neuron_tensor(layer=1, feature_maps=4)
    assert int(t["feature_map"].min()) >= 100
    app = App(Source(kept, t.vit.factorize(2, progress=False), stim))
    app.start()
    app.state.tab = "movie"
    assert list(app.main) == [app.views["movie"].layout]
    (made,) = [v for k, v in app.source._kept.items() if k[0] == "movie"]
    assert made.frames["feature_map"].values.tolist() == [0]
    app.state.layer = 1
    made = [v for k, v in app.source._kept.items() if k[0] == "movie"][-1]
    expected = {100, *t["feature_map"].values.tolist()}
    assert set(made.frames["feature_map"].values.tolist()) == expected


def test_rows_of_the_lattice_are_pixels_only_where_they_have_one(ds):
    names = Source(ds).lattice_names
    assert names["row_labels"] == ["0 px", "8 px", "16 px", "24 px"] == names["col_labels"]
    places = np.arange(16).reshape(4, 4)
    raster = ds.assign_coords(
        dict.fromkeys(("offset_y", "offset_x"), (("shift_y", "shift_x"), places))
    )
    assert Source(raster).lattice_names == {"row_name": "shift row", "col_name": "column"}


def test_a_lasso_that_makes_no_sense_is_said(ds, factors, stim):
    app = App(Source(ds, factors, stim))
    app.start()
    app.state.tab = "embedding"
    view, corners = app.view, [[-9, -9], [9, -9], [9, 9], [-9, 9]]
    view.points.lassoed({"polygon": corners, "camera": [[0, 1], [0, 1]]})
    assert app.notice.visible
    assert "camera" in app.notice.object
    assert app.state.selection is None
    # Drawn over two axes, and come when three are shown.
    app.state.axes = 3
    view.points.lassoed({"polygon": corners, "camera": [[0, 1, 0], [0, 0, 1]]})
    assert app.state.selection.mask.all()
    assert app.state.selection.how["pcs"] == [1, 2]


def test_paths_in_a_script_hold_in_any_folder(ds, factors, tmp_path, monkeypatch):
    vitxr.save(ds, tmp_path / "run.zarr")
    vitxr.save(factors, tmp_path / "factors.nc")
    monkeypatch.chdir(tmp_path)
    app = App(sources.open_source("run.zarr", "factors.nc"))
    assert str(tmp_path / "factors.nc") in app.opening()
    assert sources._anywhere("s3://bucket/run.zarr") == "s3://bucket/run.zarr"


def test_what_is_not_selected_is_not_called_so(ds, factors, stim):
    app = App(Source(ds, factors, stim))
    app.start()
    app.state.tab = "responses"
    app.means()
    rest()
    view = app.view
    assert "all neurons" in view.strength.about
    assert "selected" not in view.table.object
    app.state.choose(select(app.state.neurons(), {"rows": [0, 1]}))
    assert "the selected neurons" in view.strength.about
    assert "Neurons selected" in view.table.object


def test_an_address_is_read_as_the_parameters_have_it(ds):
    names = {"7", "1e5", "true", "[1]"}
    state = State(Source(ds.assign_coords(image=sorted(names))), ["stimuli", "maps"])
    for name in names:
        assert read(state, ADDRESS, f"?image={name}&name={name}") == {}
        assert (state.image, state.name_of_selection) == (name, name)
        assert f"image={quote(name)}&" in written(state, ADDRESS)
    wrong = read(state, ADDRESS, "?tab=maps&layer=9&shift_y=x&head=1&theme=red&select=[&what=1")
    assert wrong == {"layer": "9", "shift_y": "x", "theme": "red", "how": "["}
    assert (state.tab, state.head, state.layer) == ("maps", 1, 0)
    assert read(state, ADDRESS, '?select={"rows":["<b>",1]}') == {}
    assert state.selection is None
    assert "expected finite numbers" in state.problem


def test_what_an_address_says_is_no_html(ds, stim):
    from panel.io.location import Location

    mark = "<img src=x onerror=alert(1)>"
    search = f'?tab=responses&image={mark}&select={{"rows":["{mark}",1]}}'
    app = App(Source(ds, stimuli=stim))
    follow(app, ADDRESS, Location(search=search))
    app.start()
    texts = [part.object for part in (app.notice, app.controls.count)]
    assert all("&lt;img" in text and "<img" not in text for text in texts)


def test_a_selection_that_no_address_holds_is_said(ds, factors):
    from panel.io.location import Location

    app, location = App(Source(ds, factors)), Location(search="")
    follow(app, ADDRESS, location)
    app.start()
    how = {"polygon": [[k / 7, (k % 5) / 3] for k in range(160)], "pcs": [1, 2]}
    how["camera"] = [[0.123456789, 1, 0], [0, 0, 1]]
    before = location.search
    app.state.choose(select(app.state.neurons(), {"or": [how] * 12}))
    assert location.search == before
    assert "more than an address can hold" in app.notice.object


def test_a_neuron_without_a_response_is_left_out_with_its_selection():
    values = np.float32([[1, 3], [5, 7], [9, 11], [np.nan, np.nan]])
    mask = np.array([True, True, True, False])
    for got in Means(values, values, values.mean(1)).of(mask):
        np.testing.assert_array_equal(got, [5, 7])
    assert np.isnan(Means(values, values, values.mean(1)).of(~mask)[0]).all()


def test_an_address_restores_a_lasso_of_any_rank(ds, tree):
    how = {
        "polygon": [[-9, -9], [9, -9], [0.0, 9]],
        "camera": [[0, 1, 0], [0, 0, 1]],
        "pcs": [1, 2],
    }
    state = State(Source(ds, tree), ["embedding"])
    state.rank = 3
    state.choose(select(state.neurons(), how, "three"))
    search = written(state, ADDRESS)
    again = State(Source(ds, tree), ["embedding"])
    assert read(again, ADDRESS, search) == {}
    assert (again.selection.mask == state.selection.mask).all()
    assert again.selection.count > 0
    assert again.problem == ""
    # Another rank has other points.
    again.rank = 2
    assert again.selection is None
    assert "draw it again" in again.problem


def test_the_address_and_the_page_follow_each_other(ds, stim):
    from panel.io.location import Location

    location = Location(search="?layer=1&other=x&shift_x=99")
    app = App(Source(ds, stimuli=stim))
    follow(app, ADDRESS, location)
    assert app.state.layer == 1
    assert "shift_x=99" in app.notice.object
    assert "layer" not in app.notice.object
    assert "other=x" in location.search
    assert "shift_x=0" in location.search
    app.state.shift_x = 2
    assert "shift_x=2" in location.search
    location.search = location.search.replace("shift_x=2", "shift_x=3")
    assert app.state.shift_x == 3


def test_selections_that_are_joined_again_and_again_can_be_read(ds, factors):
    e = Source(ds, factors).neurons(1)
    whole = select(e, {"rows": [0, 7]})
    for k in range(40):
        part = select(e, {"cols": [k % 8, k % 8]})
        whole = ~~(whole & ~part) if k % 2 else whole | part
    again = select(e, whole.to_json())
    assert (again.mask == whole.mask).all()
    ands = select(e, {"rows": [0, 3]})
    for k in range(70):
        ands = ands & select(e, {"cols": [0, 7 - k % 2]})
    assert (select(e, ands.to_json()).mask == ands.mask).all()


@pytest.mark.parametrize(
    "how",
    [
        {"rows": [0.5, 2]},
        {"rows": [0, 1e300]},
        {"cols": [0, 2**40]},
        {"feature_maps": [1.5]},
        {"polygon": [[0, 0], [1, 0], [0, 1]], "camera": [[0, 1, 0], [0, 0, 1]], "pcs": [1.5, 2]},
    ],
)
def test_a_selection_is_of_whole_numbers(ds, factors, how):
    with pytest.raises(ArgumentError, match="expected whole numbers"):
        select(Source(ds, factors).neurons(1), how)
    for bad in (["0", "1"], [True, False], [0, 10**30], [[0], [1, 2]]):
        with pytest.raises(ArgumentError, match="expected finite numbers"):
            select(Source(ds, factors).neurons(1), {"rows": bad})


def test_a_machine_that_does_not_know_its_name_is_served(monkeypatch):
    def unknown(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    assert "127.0.0.1:5" in serving.origins("0.0.0.0", 5)


def test_hosts_are_written_as_browsers_write_them(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "MacBook")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    monkeypatch.setattr("socket.getfqdn", lambda: "MacBook.local")
    assert serving.origins("0.0.0.0", 5)[:2] == ["macbook:5", "macbook.local:5"]
    assert serving.origins("FE80::1", 5) == ["[fe80::1]:5"]
