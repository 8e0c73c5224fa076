"""Maps on the patch grid as facets, hidden states, the movie, and pages for a browser."""

import base64
import json
import re
import shutil
from io import BytesIO
from itertools import pairwise

import dask.array as da
import numpy as np
import pytest
import synthetic
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitxr import analysis, plot
from vitxr.errors import ArgumentError, DataError
from vitxr.plot._facets import facets
from vitxr.plot._mosaic import Tiles

pytest.importorskip("holoviews")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: sh scripts/chromium.sh"
)


@pytest.fixture(scope="module")
def stim():
    return synthetic.stimuli(per_class=2, classes=(0, 1))


@pytest.fixture(scope="module")
def run(stim):
    ds = synthetic.extraction(stim, step=16, layers=(0, 1, 2), channels=12, heads=3)
    for name in ("offset_y", "offset_x"):
        ds[name].attrs["period"] = 32
    ds.attrs["prefix_names"] = "class"
    return ds


@pytest.fixture(scope="module")
def tensor(stim):
    ds = synthetic.extraction(stim, step=8, layers=(1,), channels=12)
    return synthetic.neuron_tensor(ds, 1, maps=5)


def parts(picture, kind):
    return [e for e in picture.traverse(lambda x: x) if type(e).__name__ == kind]


def grid(element, vdim=2):
    return element.dimension_values(vdim, flat=False)


def rgb(element):
    return np.dstack([element.dimension_values(k, flat=False) for k in range(2, 6)])


def texts(picture):
    return [t for e in parts(picture, "Labels") for t in e.dimension_values("text")]


def title(picture):
    return picture.opts.get().kwargs["title"]


def guarded(array, allowed):
    """Lazy copy in which any block but those of ``allowed`` positions raises when computed."""

    def block(values, block_info=None):
        at = tuple(block_info[0]["chunk-location"])
        if not all(a is None or p in np.atleast_1d(a) for p, a in zip(at, allowed, strict=True)):
            raise AssertionError(f"block {at} was computed")
        return values

    chunks = [1 if a is not None else -1 for a in allowed]
    lazy = da.map_blocks(block, da.from_array(array.values, chunks=chunks), dtype=array.dtype)
    return array.copy(data=lazy)


def test_two_dims_are_rows_and_columns(run):
    m = analysis.attention_map(run, (2, 3)).isel(image=1, shift_y=0, shift_x=0)
    picture = plot.attention_map(m)
    (drawn,) = parts(picture, "Image")
    tiles = Tiles(3, 3, 8, 8, 1)
    for layer, head in np.ndindex(3, 3):
        np.testing.assert_array_equal(grid(drawn)[tiles.block(layer, head)], m[layer, head])
    assert texts(picture) == [f"head {k}" for k in range(3)] + [f"block {k}" for k in range(3)]
    boxes = parts(picture, "Rectangles")[0].array()
    assert len(boxes) == 9
    np.testing.assert_array_equal(boxes[0, :4], [2.5, 1.5, 3.5, 2.5])
    assert title(picture).startswith("Attention of patch (2, 3), ")
    with pytest.raises(ArgumentError, match=r"image: 4, layer: 3, head: 3; two dims can be rows"):
        plot.attention_map(analysis.attention_map(run).isel(shift_y=0, shift_x=0))


@given(count=st.integers(1, 30), height=st.integers(1, 4), width=st.integers(1, 4))
def test_one_dim_wraps_and_keeps_every_value(count, height, width):
    values = np.random.default_rng(0).random((count, height, width))
    array = xr.DataArray(values, dims=("head", "patch_row", "patch_col"))
    cut = facets(array)
    flat = cut.values.reshape(-1, height, width)
    np.testing.assert_array_equal(flat[:count], values)
    assert np.isnan(flat[count:]).all()
    assert cut.values.shape[1] <= 8
    if count > 1:
        assert cut.names == [f"head {k}" for k in range(count)]


def test_only_what_is_selected_is_computed(run):
    lazy = run.copy()
    lazy["attention"] = guarded(run["attention"], (2, 0, 0, 1, None, None, None))
    one = {"image": 2, "shift_y": 0, "shift_x": 0, "layer": 1}
    m = analysis.attention_map(lazy)
    assert m.chunks is not None
    (drawn,) = parts(plot.attention_map(m.isel(one)), "Image")
    assert np.isfinite(grid(drawn)).sum() == 3 * 64
    with pytest.raises(AssertionError, match="was computed"):
        plot.attention_map(m.isel(one | {"layer": 0}))
    lazy["activation"] = guarded(run["activation"], (2, 0, 0, None, None, None, None))
    lazy["embedding"] = guarded(run["embedding"], (2, 0, 0, None, None, None))
    plot.hidden_states(lazy, image_at=2)


def test_maps_lie_over_their_images_as_shifted(run, stim):
    r = analysis.attention_rollout(run).isel(image=1)
    picture = plot.attention_rollout(r, pixels=stim)
    below, drawn = parts(picture, "RGB")[0], parts(picture, "Image")[0]
    tiles = Tiles(2, 3, 8, 8, 1)
    each = rgb(below).shape[0] // tiles.shape[0]
    assert grid(drawn).shape == tiles.shape
    assert below.bounds.lbrt() == drawn.bounds.lbrt()
    grey = stim["pixels"].values[1, ..., 0]
    each_pixel = 8 * each // 32

    def at(row, col):
        block = tuple(slice(s.start * each, s.stop * each) for s in tiles.block(row, col))
        return rgb(below)[block][::each_pixel, ::each_pixel, 0].astype(float)

    for y, x in np.ndindex(2, 2):
        np.testing.assert_array_equal(grid(drawn)[tiles.block(y, x + 1)], r[y, x])
        moved = np.roll(grey, (16 * y, 16 * x), (0, 1))
        np.testing.assert_allclose(at(y, x + 1), 155 + moved / 2.55, atol=1)
    assert np.isnan(grid(drawn)[tiles.block(1, 0)]).all()
    np.testing.assert_array_equal(at(1, 0), np.roll(grey, 16, 0))
    assert texts(picture)[:3] == ["image", "dx 0 px", "dx 16 px"]
    unknown = r.copy()
    del unknown["offset_y"].attrs["period"]
    with pytest.raises(DataError, match=r"no attribute `period`.*leave pixels out"):
        plot.attention_rollout(unknown, pixels=stim)


def test_images_go_by_name(run, stim):
    r = analysis.attention_rollout(run).isel(image=[3, 0], shift_y=0, shift_x=0)
    picture = plot.attention_rollout(r, pixels=stim)
    below = rgb(parts(picture, "RGB")[0])
    tiles = Tiles(2, 2, 8, 8, 1)
    each = below.shape[0] // tiles.shape[0]
    for row, image in enumerate((3, 0)):
        block = tuple(slice(s.start * each, s.stop * each) for s in tiles.block(row, 0))
        shown = below[block][:: 8 * each // 32, :: 8 * each // 32, :3]
        np.testing.assert_array_equal(shown, stim["pixels"].values[image])


def test_relevance_panels_are_divided_by_their_largest():
    values = np.random.default_rng(0).random((2, 3, 4, 5))
    values[1, 2] = 0
    r = xr.DataArray(
        values, dims=("image", "class", "patch_row", "patch_col"), name="relevance",
        coords={"image": ["a", "b"], "class": ["cat", "dog", "eel"]},
    )  # fmt: skip
    picture = plot.relevance(r.to_dataset())
    (drawn,) = parts(picture, "Image")
    tiles = Tiles(2, 3, 4, 5, 1)
    for i, j in np.ndindex(2, 3):
        block = tiles.block(i, j)
        np.testing.assert_array_equal(grid(drawn, "value")[block], values[i, j])
        expected = values[i, j] / (values[i, j].max() or 1)
        np.testing.assert_allclose(grid(drawn)[block], expected)
    assert texts(picture) == ["for cat", "for dog", "for eel", "a", "b"]
    with pytest.raises(DataError, match=r"needs `relevance`; given: a Dataset with x"):
        plot.relevance(xr.Dataset({"x": 1}))
    with pytest.raises(DataError, match=r"\(\.\.\., patch_row, patch_col\); given: the DataArray"):
        plot.relevance(r.isel(patch_row=0))


def test_mass_mask_says_the_share(run):
    m = analysis.attention_map(run).isel(image=0, shift_y=0, shift_x=0, layer=0)
    picture = plot.mass_mask(analysis.mass_mask(m, 0.6))
    (drawn,) = parts(picture, "Image")
    mask = analysis.mass_mask(m, 0.6).values
    assert np.nansum(grid(drawn)) == mask.sum()
    assert title(picture).startswith("Fewest patches with 60% of the sum, ")


def test_hidden_states_hold_every_token_and_channel(run):
    prefix = np.random.default_rng(0).normal(size=(4, 2, 2, 3, 1, 12)).astype(np.float32)
    dims = ("image", "shift_y", "shift_x", "layer", "token", "feature_map")
    ds = run.assign(prefix=(dims, prefix))
    picture = plot.hidden_states(ds, image_at=2)
    (drawn,) = parts(picture, "Image")
    exact, relative = grid(drawn, "activation"), grid(drawn)
    assert np.isfinite(exact).sum() == 3 * 65 * 12 + 64 * 12
    assert [t for t in texts(picture) if t.startswith(("e", "b"))] == [
        "embedding", "block 0", "block 1", "block 2",
    ]  # fmt: skip
    cols = np.flatnonzero(np.isfinite(exact[1]))  # of the upper panels
    starts = [cols[0], *(b for a, b in pairwise(cols) if b > a + 1)]
    patches = ds["activation"].values[2, 0, 0].reshape(3, 12, 64).swapaxes(1, 2)
    block = exact[:65, starts[1] : starts[1] + 12]
    np.testing.assert_array_equal(block[0], prefix[2, 0, 0, 0, 0])
    np.testing.assert_array_equal(block[1:], patches[0])
    reach = np.quantile(np.abs(block), 0.99)
    np.testing.assert_allclose(relative[:65, starts[1] : starts[1] + 12], block / reach, rtol=1e-5)
    assert np.isnan(exact[0, starts[0] : starts[0] + 12]).all()
    assert "channel (0 to 11)" in texts(picture)
    kept = ds.isel(feature_map=[1, 5, 7])
    assert "channel (3 that were kept)" in texts(plot.hidden_states(kept))
    with pytest.raises(DataError, match="needs `activation` with dims"):
        plot.hidden_states(run["attention"])


def played(page):
    data = re.search(r'id="data">(.*?)</script>', page, re.S)
    return json.loads(data[1])


def test_movie_holds_every_frame(tensor, stim):
    maps = [int(v) for v in dict.fromkeys(tensor["feature_map"].values.tolist())]
    made = plot.movie(tensor, maps[3:1:-1], image_at=2, pixels=stim)
    expected = tensor.values.reshape(5, 8, 8, 4, 16)[[3, 2], :, :, 2]
    np.testing.assert_array_equal(made.frames.values, np.moveaxis(expected, -1, 0))
    np.testing.assert_array_equal(made.frames["offset_x"], tensor["offset_x"])
    facts = played(made.html)
    assert facts["shape"] == [16, 2, 8, 8]
    assert facts["maps"] == maps[3:1:-1]
    assert facts["periods"] == [32.0, 32.0]
    codes = np.frombuffer(base64.b64decode(facts["codes"]), np.uint8).reshape(16, 2, 8, 8)
    np.testing.assert_array_equal(codes, np.rint(made.frames / made.frames.max() * 254))
    png = base64.b64decode(facts["image"].split(",")[1])
    shown = np.asarray(Image.open(BytesIO(png)))[..., :3]
    np.testing.assert_array_equal(shown, stim["pixels"].values[2])
    assert facts["title"] == f"Response to {stim['image'].values[2]} over 16 shifts"


def test_movie_marks_gaps_and_says_what_it_leaves_out(tensor):
    holed = tensor.isel(neuron=slice(1, None))
    facts = played(plot.movie(holed, most=2).html)
    codes = np.frombuffer(base64.b64decode(facts["codes"]), np.uint8).reshape(facts["shape"])
    assert (codes[:, 0, 0, 0] == 255).all()
    assert (codes == 255).sum() == len(codes)
    assert facts["title"].endswith("over 16 shifts (2 of 5 feature maps)")
    lazy = guarded(tensor, (None, 1, None))
    plot.movie(lazy, image_at=1)
    script = plot.movie(tensor, title="</script><b>").html
    assert "</script><b>" not in script
    page = plot.movie(tensor, title="@DATA@").html
    assert "<title>@DATA@</title>" in page
    assert page.count('"codes":') == 1
    for wrong, message in (
        ({"feature_maps": 99}, "feature_maps=99: the tensor has the maps"),
        ({"rate": 0}, "rate=0: expected frames a second"),
        ({"image_at": "x"}, "there is no image 'x'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            plot.movie(tensor, **wrong)
    with pytest.raises(DataError, match=r"\(neuron, image, shift\)"):
        plot.movie(tensor.mean("shift"))


def test_movie_is_saved_as_a_page_only(tensor, tmp_path):
    made = plot.movie(tensor)
    path = plot.save(made, tmp_path / "a.html")
    assert path.read_text("utf-8") == made.html
    with pytest.raises(ArgumentError, match=r"movie cannot be written.*filmstrip"):
        plot.save(made, tmp_path / "a.png")
    assert "srcdoc=" in made._repr_html_()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, path, **options):
    """A page without a network, and what it said and asked for."""
    page = browser.new_page(viewport={"width": 900, "height": 700}, **options)
    page.context.set_offline(True)
    said, asked = [], []
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    return page, said, asked


def alone(asked, path):
    return [u for u in asked if not u.startswith(("data:", "blob:"))] == [path.as_uri()]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_movie_plays_offline(browser, tensor, stim, tmp_path, scheme):
    made = plot.movie(tensor, image_at=1, pixels=stim)
    path = plot.save(made, tmp_path / "movie.html")
    page, said, asked = opened(browser, path, color_scheme=scheme)
    page.wait_for_selector("#shown canvas")
    slider = page.locator("#at")
    slider.focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    assert page.get_attribute("body", "data-frame") == "6"
    assert slider.get_attribute("aria-valuetext") == "frame 7 of 16: down 8 px, right 16 px"
    # what stands on the canvas is the frame, and the image is rolled
    read = """i => { const c = document.querySelectorAll(i)[0];
        return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data] }"""
    import matplotlib

    drawn = np.array(page.evaluate(read, "#maps canvas")).reshape(8, 8, 4)
    share = made.frames.values[6, 0] / made.frames.values.max()
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 1, 255), bytes=True)
    np.testing.assert_array_equal(drawn, colors[np.rint(share * 254).astype(int)])
    image = np.array(page.evaluate(read, "#shown canvas")).reshape(32, 32, 4)[..., :3]
    np.testing.assert_array_equal(image, np.roll(stim["pixels"].values[1], (8, 16), (0, 1)))
    page.focus("#play")
    page.keyboard.press("Enter")
    page.wait_for_function("Number(document.body.dataset.drawn) > 12")
    assert page.inner_text("#play") == "Pause"
    assert said == []
    assert alone(asked, path)
    page.close()


@needs_browser
def test_pages_of_pictures_open_offline(browser, run, stim, tensor, tmp_path):
    e = synthetic.embed(synthetic.factorize(tensor, 3))
    m = analysis.attention_map(run).isel(image=1, shift_y=0, shift_x=0)
    for name, picture in {
        "maps": plot.attention_map(m.isel(layer=0), pixels=stim),
        "matrices": plot.attention_matrices(run),
        "points": plot.embedding(e, "patch_row"),
        "places": plot.embedding(e, "both"),
        "curves": plot.explained_variance(e),
    }.items():
        path = plot.save(picture, tmp_path / f"{name}.html")
        page, said, asked = opened(browser, path)
        page.wait_for_function("window.Bokeh && Bokeh.documents[0]?.is_idle")
        shot = Image.open(BytesIO(page.screenshot())).convert("RGB")
        assert len(shot.getcolors(10**7)) > 20, name
        assert said == [], name
        assert alone(asked, path), name
        if name == "places":  # the key stands beside the points, inside the picture
            key, frame = page.locator("img[alt^='Patch grid of 8 rows']"), page.locator("canvas")
            box, whole = key.bounding_box(), frame.first.bounding_box()
            assert whole["x"] + 380 < box["x"] < whole["x"] + whole["width"] - box["width"]
            assert whole["y"] < box["y"] < whole["y"] + whole["height"] - box["height"]
        page.close()
    path = plot.save(plot.embedding_3d(e), tmp_path / "still.html", dpi=60)
    page, said, asked = opened(browser, path)
    assert page.evaluate("document.images[0].naturalWidth") > 100
    assert said == []
    assert alone(asked, path)
