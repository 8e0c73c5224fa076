"""The browser of a store in a real browser: what is drawn, chosen and linked is what is stored."""

import json
from io import BytesIO

import numpy as np
import pytest
from browsing import (
    CHROMIUM,
    colors,
    grid,
    lasso,
    masks,
    opened,
    panel_served,
    query,
    quiet,
    readings,
    served,
    until,
    visit,
    watched,
)
from PIL import Image

import vitxr
from vitxr.app.geometry import fitted, project
from vitxr.app.selection import select
from vitxr.plot.screen import point_colors

pytest.importorskip("panel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store with attention, factors of planted clusters, and images as files."""
    folder = tmp_path_factory.mktemp("browse")
    rng = np.random.default_rng(0)
    for label in ("even", "odd"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    vitxr.extract(
        vitxr.open_images(folder / "images", progress=False),
        vitxr.load_model("digits"),
        layers=[0, 5],
        shifts=vitxr.ShiftGrid(step=8),
        variables=("activation", "attention"),
        store=folder / "run.zarr",
        progress=False,
    )
    ds = vitxr.open(folder / "run.zarr")
    t = ds.vit.neuron_tensor(layer=5, feature_maps=6).compute()
    f = t.vit.factorize(3, progress=False)
    # Three clusters far apart: by the row of the patch, and in the last by its column too.
    row, col = t["patch_row"].values, t["patch_col"].values
    cluster = np.where(row < 3, 0, np.where(col < 5, 1, 2))
    planted = np.eye(3)[cluster] + rng.normal(0, 0.02, (len(row), 3))
    f["neuron_factor"] = (("neuron", "component"), planted.astype(np.float32))
    vitxr.save(f.assign_coords(cluster=("neuron", cluster)), folder / "factors.nc")
    return folder


@pytest.fixture(scope="module")
def ds(folder):
    return vitxr.open(folder / "run.zarr")


@pytest.fixture(scope="module")
def neurons(folder):
    f = vitxr.open(folder / "factors.nc")
    return f.vit.embed(n_components=3).assign_coords(cluster=f["cluster"])


@pytest.fixture(scope="module")
def address(folder):
    with served(folder / "run.zarr", "--factors", folder / "factors.nc") as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with opened() as browser:
        yield browser


@pytest.fixture
def page(chromium):
    with watched(chromium) as page:
        yield page


def seen(neurons, axes):
    """Places of the neurons on the screen, through the camera that shows them at first."""
    points = neurons["score"].values[:, :axes].astype(np.float32)
    return project(points, fitted(points))


def around(xy, mask, room=0.06):
    (x0, y0), (x1, y1) = xy[:, mask].min(1) - room, xy[:, mask].max(1) + room
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_tab_is_drawn(page, address, theme):
    visit(page, address, "stimuli", theme=theme)
    keys = page.locator("[role=tab]").evaluate_all("all => all.map(b => b.dataset.key)")
    assert keys == [
        "stimuli",
        "attention",
        "maps",
        "movie",
        "factors",
        "embedding",
        "responses",
        "store",
    ]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(",")[:3])) < 200) == (theme == "dark")
    for key in keys:
        page.locator(f"[role=tab][data-key={key}]").click()
        quiet(page)
        assert page.locator("[role=alert]").count() == 0, key
        for image in page.locator("figure img").all():
            assert image.evaluate("i => i.complete && i.naturalWidth > 100"), key
            assert len(image.get_attribute("alt")) > 20
        for part in page.locator(".vx-grid:visible").all():
            assert colors(part)[..., 3].max() == 255, key  # something is drawn
        page.locator(f"[role=tab][data-key={key}][aria-selected=true]").wait_for()
        drawn = {
            "factors": "figure img",
            "embedding": ".vx-points",
            "store": "td",
            "movie": "iframe",
        }
        page.locator(drawn.get(key, ".vx-grid")).first.wait_for()
        shot = page.screenshot()
        assert len(Image.open(BytesIO(shot)).convert("RGB").getcolors(10**7)) > 60, key


def test_a_shifted_stimulus_is_a_roll(page, address, ds, folder):
    name = str(ds["image"].values[2])
    visit(page, address, "stimuli", image=name, shift_y=2, shift_x=3)
    rgb = np.asarray(Image.open(folder / "images" / name))
    until(lambda: colors(grid(page, "As the model takes it"))[..., :3] == rgb, page)
    expected = np.roll(rgb, (16, 24), (0, 1))
    until(lambda: colors(grid(page, "Shifted"))[..., :3] == expected, page)
    # Another shift, chosen on the lattice.
    lattice = grid(page, "Lattice of shifts").locator("canvas.over")
    box = lattice.bounding_box()
    lattice.click(position={"x": box["width"] * 0.4, "y": box["height"] * 0.1})
    expected = np.roll(rgb, (0, 8), (0, 1))
    until(lambda: colors(grid(page, "Shifted"))[..., :3] == expected, page)
    assert (query(page)["shift_y"], query(page)["shift_x"]) == ("0", "1")


def test_the_map_of_a_query_patch_is_its_row_of_attention(page, address, ds):
    state = {"layer": 5, "image": str(ds["image"].values[1]), "shift_y": 1, "shift_x": 0, "head": 2}
    visit(page, address, "attention", row=3, col=6, **state)
    part = grid(page, "What it attends to, head 2")
    frame = ds["attention"].sel(layer=5, head=2).isel(image=1, shift_y=1, shift_x=0)
    expected = frame.isel(query=1 + 3 * 8 + 6).values[1:].reshape(8, 8)
    np.testing.assert_allclose(readings(page, part, 8, 8), expected, rtol=6e-3, atol=1e-9)
    # Another patch, chosen on the image.
    over = grid(page, "Query patch").locator("canvas.over")
    box = over.bounding_box()
    over.click(position={"x": box["width"] * 0.8 / 8, "y": box["height"] * 5.5 / 8})
    until(lambda: (query(page)["row"], query(page)["col"]) == ("5", "0"), page)
    page.get_by_text("patch (5, 0)").first.wait_for()
    expected = frame.isel(query=1 + 5 * 8).values[1:].reshape(8, 8)
    np.testing.assert_allclose(readings(page, part, 8, 8), expected, rtol=6e-3, atol=1e-9)


def test_a_lasso_finds_a_planted_cluster_and_its_patches(page, address, neurons):
    visit(page, address, "embedding")
    xy = seen(neurons, 2)
    planted = neurons["cluster"].values == 2
    served_mask, own = lasso(page, around(xy, planted))
    assert (served_mask == planted).all()
    assert (own == planted).all()
    count = f"{planted.sum():,} of {planted.size:,} neurons"
    assert count in page.locator(".vx-points .said").inner_text()
    patches = readings(page, grid(page, "On the patch grid"), 8, 8)
    expected = np.zeros((8, 8))
    expected[3:, 5:] = 6
    assert (patches == expected).all()
    how = json.loads(query(page)["select"])
    assert (select(neurons, how).mask == planted).all()
    # The outline goes with the selection.
    outline = page.locator(".vx-points canvas.over")
    drawn = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)"
    assert outline.evaluate(drawn)
    page.get_by_role("button", name="Clear").click()
    until(lambda: not masks(page)[0].any() and not outline.evaluate(drawn), page)


def test_the_images_and_shifts_are_those_of_the_neuron_tensor(page, address, ds, neurons):
    how = {"rows": [0, 1], "cols": [2, 7]}
    visit(page, address, "embedding", select=json.dumps(how))
    t = ds.vit.neuron_tensor(layer=5, feature_maps=6)
    chosen = t.isel(neuron=select(neurons, how).mask)
    expected = chosen.mean(("neuron", "shift")).values

    def agree():
        shown = page.locator(".vx-gallery .value").all_inner_texts()
        np.testing.assert_allclose([float(v) for v in shown], expected, rtol=6e-3)

    until(agree, page)
    part = grid(page, "Across shifts")
    expected = chosen.mean(("neuron", "image")).values.reshape(4, 4)
    np.testing.assert_allclose(readings(page, part, 4, 4), expected, rtol=6e-3)


def point_pixels(page, places):
    """Colours of the picture of the points at places of the camera, without their transparency."""
    return np.array(
        page.locator(".vx-points canvas.gl").evaluate(
            """(c, places) => {
              const flat = document.createElement("canvas");
              [flat.width, flat.height] = [c.width, c.height];
              const pen = flat.getContext("2d"), half = Math.min(c.width, c.height) / 2;
              pen.drawImage(c, 0, 0);
              return places.map(([x, y]) => Array.from(pen.getImageData(
                Math.round(c.width / 2 + x * half), Math.round(c.height / 2 - y * half), 1, 1
              ).data));
            }""",
            places.tolist(),
        )
    )


def test_points_are_coloured_by_cluster_and_by_loading(page, address, neurons, folder):
    visit(page, address, "embedding", color="cluster", clusters=3)
    clustered = neurons.vit.cluster(3)
    places = seen(neurons, 2).T

    def drawn(values, by):
        # Where nothing lies over it, a point has its own colour.
        x, y = places.T
        near = np.hypot(x[:, None] - x, y[:, None] - y) < 0.03
        same = (np.abs(values[:, None, :].astype(int) - values) <= 6).all(-1)
        alone = np.flatnonzero((same | ~near).all(1))
        assert len({tuple(values[i]) for i in alone}) >= by
        got = point_pixels(page, places[alone])
        np.testing.assert_allclose(got[:, :3], values[alone], atol=8)

    by_cluster, key = point_colors(clustered, "cluster")
    until(lambda: drawn(by_cluster, 3), page)
    legend = page.get_by_text("By cluster", exact=True).locator("..")
    assert legend.inner_text().replace(" ", "").endswith("Bycluster●0●1●2")
    # Keys alone reach another colouring and its component.
    page.get_by_label("Clusters (k-means)").wait_for()
    page.get_by_label("Colour by").focus()
    page.keyboard.press("ArrowDown")
    until(lambda: query(page)["color"] == "loading", page)
    page.get_by_label("Component", exact=True).focus()
    page.keyboard.press("ArrowDown")
    until(lambda: query(page)["component"] == "1", page)
    f = vitxr.open(folder / "factors.nc")
    by_loading, key = point_colors(neurons, f["neuron_factor"].sel(component=1))
    until(lambda: drawn(by_loading, 2), page)
    page.get_by_text(f"By {key['label'][0].lower()}{key['label'][1:]}").wait_for()
    assert not page.get_by_label("Clusters (k-means)").is_visible()


def test_without_webgl_it_says_so_and_all_else_works(chromium, address, neurons):
    without = ["--no-sandbox", "--disable-gpu", "--disable-webgl", "--disable-software-rasterizer"]
    bare = chromium.browser_type.launch(executable_path=CHROMIUM, args=without)
    with watched(bare) as page:
        visit(page, address, "embedding")
        said = page.locator(".vx-points [role=alert]").inner_text()
        assert "This browser gives no WebGL" in said
        assert "hardware acceleration" in said
        over = grid(page, "On the patch grid").locator("canvas.over")
        over.focus()
        for key in ("ArrowRight", "Shift+ArrowRight", "Shift+ArrowDown", "Enter"):
            page.keyboard.press(key)
        how = {"rows": [0, 1], "cols": [1, 2]}
        until(lambda: json.loads(query(page)["select"]) == how, page)
        count = f"{select(neurons, how).count:,} of {neurons.sizes['neuron']:,} neurons"
        page.get_by_text(count).first.wait_for()
        for tab in ("stimuli", "attention", "maps", "movie", "factors", "responses", "store"):
            page.locator(f"[role=tab][data-key={tab}]").click()
            quiet(page)
            assert page.locator("[role=alert]").count() == 0, tab
            shot = Image.open(BytesIO(page.screenshot())).convert("RGB")
            assert len(shot.getcolors(10**7)) > 60, tab
    bare.close()


def test_panel_serve_shows_a_file(page, chromium, folder, neurons):
    path = folder / "page.py"
    path.write_text(
        "import vitxr\n"
        f"ds = vitxr.open({str(folder / 'run.zarr')!r})\n"
        f"vitxr.browse(ds, vitxr.open({str(folder / 'factors.nc')!r})).servable()\n"
    )
    with panel_served(path) as address:
        visit(page, address, "embedding")
        planted = neurons["cluster"].values == 1
        mask, own = lasso(page, around(seen(neurons, 2), planted))
        assert (mask == planted).all()
        assert (own == planted).all()
        shot = Image.open(BytesIO(page.screenshot())).convert("RGB")
        assert len(shot.getcolors(10**7)) > 60
        other = chromium.new_page()
        other.goto(page.url)
        until(lambda: masks(other)[0] == planted, other)
        other.close()


def test_a_box_of_patches_lights_up_on_the_embedding_and_a_lasso_leads_back(page, address, neurons):
    visit(page, address, "embedding")
    over = grid(page, "On the patch grid").locator("canvas.over")
    box = over.bounding_box()
    at = [(box["x"] + c * box["width"] / 8, box["y"] + r * box["height"] / 8) for r, c in
          ((1.5, 2.5), (4.5, 6.5))]  # fmt: skip
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()
    expected = select(neurons, {"rows": [1, 4], "cols": [2, 6]}).mask
    until(lambda: masks(page)[0] == expected, page)
    assert expected.sum() == 4 * 5 * 6
    # Of these, those of one cluster.
    page.get_by_label("New selection").select_option("and")
    xy = seen(neurons, 2)
    planted = neurons["cluster"].values == 0
    got, _ = lasso(page, around(xy, planted))
    assert (got == (expected & planted)).all()
    patches = readings(page, grid(page, "On the patch grid"), 8, 8)
    assert (np.argwhere(patches > 0).max(0) == (2, 6)).all()


def test_after_a_turn_in_three_dimensions_both_find_the_same(page, address):
    visit(page, address, "embedding", axes=3)
    over = page.locator(".vx-points canvas.over")
    box = over.bounding_box()
    for turn in ((70, 30), (-120, 55)):
        page.get_by_role("button", name="Move", exact=True).click()
        page.mouse.move(box["x"] + 200, box["y"] + 200)
        page.mouse.down()
        page.mouse.move(box["x"] + 200 + turn[0], box["y"] + 200 + turn[1], steps=6)
        page.mouse.up()
        page.get_by_role("button", name="Lasso", exact=True).click()
        mask, own = lasso(page, [(-0.8, -0.7), (0.5, -0.8), (0.35, 0.4), (-0.2, 0.9)])
        assert 0 < mask.sum() < mask.size
        assert (mask == own).all()


def test_axes_are_changed_in_the_page(page, address, neurons):
    """To three and back: points, camera and selection follow."""
    visit(page, address, "embedding")
    planted = neurons["cluster"].values == 1
    corners = [(-0.8, -0.7), (0.5, -0.8), (0.35, 0.4), (-0.2, 0.9)]
    for axes in (3, 2, 3, 2):
        page.get_by_label("Axes", exact=True).select_option(label=f"{axes} axes")
        page.get_by_label(f"Embedding of {planted.size} neurons of block 5 over {axes}").wait_for()
        quiet(page)
        mask, own = lasso(page, corners if axes == 3 else around(seen(neurons, 2), planted))
        assert 0 < mask.sum() < mask.size
        assert (mask == own).all()
        assert len(json.loads(query(page)["select"])["camera"][0]) == axes + 1
    assert (mask == planted).all()


def test_the_address_restores_the_selection_and_the_view(page, chromium, address, neurons):
    visit(page, address, "embedding", axes=3, color="both", theme="dark")
    mask, _ = lasso(page, [(-0.8, -0.7), (0.5, -0.8), (0.35, 0.4), (-0.2, 0.9)])
    page.get_by_label("Its name").fill("mine")
    page.keyboard.press("Tab")
    until(lambda: query(page)["name"] == "mine", page)
    other = chromium.new_page()
    other.goto(page.url)
    other.locator(".vx-points").wait_for()
    until(lambda: masks(other)[0] == mask, other)
    assert 0 < mask.sum() < mask.size
    assert other.get_by_label("Its name").input_value() == "mine"
    assert (
        other.get_by_label("Colour by").input_value()
        == page.get_by_label("Colour by").input_value()
    )
    assert other.evaluate("document.documentElement.dataset.vx") == "dark"
    assert query(other)["select"] == query(page)["select"]
    other.close()


def test_an_address_that_makes_no_sense_is_said(page, address):
    visit(page, address, "embedding", select='{"rows":[1]}')
    page.get_by_text("the first and the last").wait_for()
    visit(page, address, "embedding", select="nothing", layer=7)
    page.get_by_text("layer=7").wait_for()
    assert not masks(page)[0].any()


def test_the_keys_alone_reach_layer_query_and_selection(page, address, neurons):
    visit(page, address, "stimuli")
    keys = page.keyboard
    page.locator("body").press("Tab")

    def tab_to(what):
        for _ in range(60):
            here = page.evaluate(
                "() => { let e = document.activeElement; while (e.shadowRoot?.activeElement) "
                "e = e.shadowRoot.activeElement; return [e.getAttribute('aria-label'), "
                "e.labels?.[0]?.innerText, e.innerText].join('|') }"
            )
            if what in here:
                return
            keys.press("Tab")
        raise AssertionError(f"{what} is not reached")

    tab_to("Stimuli")
    keys.press("ArrowRight")
    until(lambda: query(page)["tab"] == "attention", page)
    quiet(page)
    tab_to("Layer")
    keys.press("ArrowDown")
    until(lambda: query(page)["layer"] == "5", page)
    tab_to("Query patch. Arrow keys")
    keys.press("ArrowUp")
    keys.press("ArrowLeft")
    keys.press("Enter")
    until(lambda: (query(page)["row"], query(page)["col"]) == ("3", "3"), page)
    visit(page, address, "embedding")
    tab_to("On the patch grid. Arrow keys")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        keys.press(key)
    for key in ("Shift+ArrowRight", "Shift+ArrowDown", "Enter"):
        keys.press(key)
    expected = select(neurons, {"rows": [1, 2], "cols": [2, 3]}).mask
    until(lambda: masks(page)[0] == expected, page)
    visit(page, address, "responses")
    tab_to("Select these")
    keys.press("Enter")
    how = {"rows": [0, 7], "cols": [0, 7]}
    until(lambda: json.loads(query(page)["select"]) == how, page)


def test_all_that_can_be_used_has_a_name(page, address):
    """For screen readers: what the keyboard reaches says what it is, in every tab."""
    nameless = """() => {
      const found = [], walk = root => { for (const e of root.querySelectorAll("*")) {
        if (e.shadowRoot) walk(e.shadowRoot);
        const used = e.matches("a[href], button, input, select, textarea, iframe, [tabindex]");
        if (!used || e.tabIndex < 0 || !e.checkVisibility()) continue;
        const by = e.getAttribute("aria-labelledby");
        const named = e.getAttribute("aria-label") || e.title || (e.labels?.[0]?.innerText) ||
          (by && root.getElementById(by)?.innerText) || (!e.matches("select") && e.innerText) || "";
        if (!named.trim()) found.push(e.outerHTML.slice(0, 200));
      }};
      walk(document);
      return found;
    }"""
    visit(page, address, "embedding", select='{"rows":[0,3]}')
    tabs = page.locator("[role=tab]").evaluate_all("tabs => tabs.map(t => t.dataset.key)")
    assert len(tabs) == 8
    for tab in tabs:
        visit(page, address, tab, select='{"rows":[0,3]}')
        assert page.evaluate(nameless) == [], tab
