import base64
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import synthetic

from vitxr.errors import ArgumentError
from vitxr.report import RESULTS, write_report

pytest.importorskip("holoviews")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: sh scripts/chromium.sh"
)

VOID = {"meta", "link", "img", "br", "hr"}


class Reader(HTMLParser):
    """Collects what the tests ask about, and refuses tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.links, self.ids, self.tags, self.words = [], [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attrs)
        self.links += [attrs[k] for k in ("href", "src", "action", "data", "srcset") if k in attrs]
        if "id" in attrs:
            self.ids.append(attrs["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(path):
    html = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return html, reader


@pytest.fixture(scope="module")
def results():
    stim = synthetic.stimuli(per_class=2, classes=(0, 1))
    run = synthetic.extraction(stim, step=8, layers=(0, 1), channels=12)
    detail = synthetic.extraction(stim, step=None, layers=(0, 1), channels=12, heads=2)
    tensors = {layer: synthetic.neuron_tensor(run, layer, maps=3) for layer in (0, 1)}
    matrices = {layer: t.mean("shift") for layer, t in tensors.items()}
    factors = {layer: synthetic.factorize(t, 3) for layer, t in tensors.items()}
    return {
        "stimuli": stim,
        "activations": run,
        "detail": detail,
        "tensors": tensors,
        "matrices": matrices,
        "ensembles": {k: synthetic.ensemble(t, (1, 2), 2, 4)[0] for k, t in tensors.items()},
        "ensembles_2d": {1: synthetic.ensemble(matrices[1], (1, 2), 1, 4)[0]},
        "factors": factors,
        "embeddings": {layer: synthetic.embed(f) for layer, f in factors.items()},
    }


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    path = write_report(folder, results, title="Shifts & <neurons>", command="python a.py --n 2")
    assert path == folder / "report.html"
    return path, *read(path)


def test_the_page_refers_to_nothing_outside(written):
    _, html, reader = written
    assert not re.search(r"(?i)https?:|//[a-z0-9.-]+\.[a-z]{2,}|@import|url\(", html)
    assert "script" not in reader.tags
    for link in reader.links:
        assert link.startswith(("#", "data:"))
        if link.startswith("#"):
            assert link[1:] in reader.ids
    assert len(reader.ids) == len(set(reader.ids))


def test_every_image_is_a_picture_and_said_in_words(written):
    from PIL import Image

    path, _, reader = written
    assert len(reader.images) >= 20
    stored = {p.read_bytes() for p in (path.parent / "figures").glob("*.png")}
    for attrs in reader.images:
        assert len(attrs["alt"]) > 20
        assert attrs["alt"].endswith(".")
        head, data = attrs["src"].split(",", 1)
        assert head == "data:image/png;base64"
        content = base64.b64decode(data, validate=True)
        assert content in stored
        picture = Image.open(BytesIO(content)).convert("RGB")
        assert len(picture.getcolors(maxcolors=picture.width * picture.height)) > 10
        ratio = int(attrs["width"]) / int(attrs["height"])
        assert ratio == pytest.approx(picture.width / picture.height, rel=0.02)
    assert len(list((path.parent / "figures").glob("*.pdf"))) == len(reader.images)
    assert sorted(p.name for p in path.parent.iterdir()) == ["figures", "report.html"]


def test_headings_contents_and_title(written):
    _, html, reader = written
    assert html.startswith("<!DOCTYPE html>")
    assert '<html lang="en">' in html
    assert "Shifts &amp; &lt;neurons&gt;" in html
    assert reader.tags.count("h1") == 1
    assert reader.tags.count("section") == 9 == html.count('<li><a href="#')
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_the_numbers_are_those_of_the_results(written, results):
    text = written[2].text
    logits = results["detail"]["logits"].values[:, 0, 0]
    labels = results["stimuli"]["label"].values
    right = int((np.array(["0", "1"])[logits.argmax(1)] == labels).sum())
    assert f"{right} of 4 images predicted correctly" in text
    for tree in results["ensembles"].values():
        least = tree["objective"].min("replicate").values
        said = f"{least[0]:.3f} at rank 1 and {least[1]:.3f} at rank 2"
        assert said in text
    for f in results["factors"].values():
        assert f"relative residual {float(f['objective']):.3f}" in text
    for e in results["embeddings"].values():
        share = 100 * float(e["explained_variance_ratio"][:2].sum())
        assert f"the first two axes hold {share:.0f} %" in text
    assert "192 x 4 x 16 (neuron, image, shift): 3 feature maps" in text


def test_provenance_is_stated(written, results):
    text = written[2].text
    for words in (
        "synthetic filters",
        "0123456789abcdef" * 4,
        "python a.py --n 2",
        "numpy ",
        "vitxr ",
    ):
        assert words in text
    assert "4 images x 4 x 4 shifts" in text
    seeds = sorted(int(s) for s in np.ravel(results["ensembles"][0]["seed"]))
    assert f"4 seeds: {', '.join(map(str, seeds))}" in text


def test_what_is_missing_is_said_with_the_remedy(results, tmp_path):
    few = {"stimuli": results["stimuli"], "activations": results["activations"][["activation"]]}
    _, reader = read(write_report(tmp_path, few, command="x"))
    for words in (
        "Attention was not captured.",
        'variables=("activation", "attention")',
        "Class logits were not captured.",
        "No neuron tensors were given.",
        "No ensembles were given.",
        "No factors were given.",
        "No embeddings were given.",
    ):
        assert words in reader.text


def test_one_of_everything(tmp_path):
    stim = synthetic.stimuli(per_class=1, classes=(3,))
    ds = synthetic.extraction(stim, step=None, layers=(0,), channels=4, heads=1)
    tensor = synthetic.neuron_tensor(ds, 0, maps=1)
    factors = synthetic.factorize(tensor, 1)
    results = {
        "stimuli": stim,
        "activations": ds,
        "detail": ds,
        "tensors": {0: tensor},
        "matrices": {0: tensor.mean("shift")},
        "ensembles": {0: synthetic.ensemble(tensor, (1,), 1)[0]},
        "factors": {0: factors},
        "embeddings": {0: synthetic.embed(factors)},
    }
    _, reader = read(write_report(tmp_path, results, command="x"))
    assert "The images were not shifted." in reader.text
    assert "one frame an image" in reader.text
    assert "fit two or more" in reader.text
    assert "1 components" not in reader.text
    assert "one axis only" in reader.text
    assert "nan" not in reader.text


def test_a_bar_counts_the_pictures_unless_it_is_not_wanted(tmp_path, results, capsys):
    few = {k: results[k] for k in ("stimuli", "activations")}
    few["activations"] = few["activations"][["activation"]]
    page = write_report(tmp_path, few, command="x", progress=True)
    said = capsys.readouterr().err
    pictures = len(read(page)[1].images)
    assert f"{pictures}/{pictures}" in said
    assert "report" in said
    assert "picture" in said
    write_report(tmp_path, few, command="x", progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ndim", [1, 2])
def test_the_shifts_shown_are_evenly_spaced_and_said(tmp_path, monkeypatch, ndim):
    from vitxr import plot

    stim = synthetic.stimuli(per_class=1, classes=(0,))
    run = synthetic.extraction(stim, step=3, layers=(0,), channels=4)  # 11 x 11 shifts
    if ndim == 2:
        dy, dx = np.meshgrid(run["offset_y"].values, run["offset_x"].values, indexing="ij")
        lattice = ("shift_y", "shift_x")
        run = run.assign_coords(offset_y=(lattice, dy), offset_x=(lattice, dx))
    drawn, shifts = [], plot.shifts
    monkeypatch.setattr(
        plot, "shifts", lambda p, dy, dx: drawn.append((dy, dx)) or shifts(p, dy, dx)
    )
    page = write_report(tmp_path, {"stimuli": stim, "activations": run}, progress=False)
    ((dy, dx),) = drawn
    dy, dx = (dy[:, 0], dx[0]) if ndim == 2 else (dy, dx)
    assert dy.tolist() == [0, 9, 18, 27]
    assert dx.tolist() == [0, 6, 12, 18, 24, 30]
    text = read(page)[1].text
    assert "4 x 6 of the 121 shifts" in text
    assert "every 3rd vertical and every 2nd horizontal one" in text


def test_stimuli_of_mixed_sizes_are_drawn(tmp_path):
    import vitxr

    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (*size, 3), np.uint8) for size in ((20, 30), (40, 25))]
    stim = vitxr.open_images(arrays)
    run = synthetic.extraction(
        synthetic.stimuli(per_class=2, classes=(0,)), step=8, layers=(0,), channels=4, heads=1
    ).assign_coords(image=stim["image"].values)
    page = write_report(tmp_path, {"stimuli": stim, "activations": run}, progress=False)
    _, reader = read(page)
    assert "20 x 30 to 40 x 25 pixels, each fitted into its tile" in reader.text
    names = {p.stem for p in (tmp_path / "figures").glob("*.png")}
    assert {"stimuli", "shifts", "attention_query_block_0"} <= names


def test_a_neuron_matrix_of_many_images_is_shown_by_class(results):
    from vitxr.report.found import _few_rows

    stim = synthetic.stimuli(per_class=5, classes=(3, 1))
    run = synthetic.extraction(stim, step=8, layers=(0,), channels=6)
    matrix = synthetic.neuron_tensor(run, 0, maps=2).mean("shift")
    shown, title, row = _few_rows(matrix)
    assert shown.dims == ("neuron", "image")
    assert shown["image"].values.tolist() == ["3", "1"]
    for k, label in enumerate(("3", "1")):
        of_class = matrix.values[:, matrix["label"].values == label]
        np.testing.assert_allclose(shown.values[:, k], of_class.mean(1), rtol=1e-6)
    np.testing.assert_array_equal(shown["feature_map"], matrix["feature_map"])
    assert title.endswith("images of a class")
    assert row.startswith("a class")
    few = results["matrices"][0]
    assert _few_rows(few)[0] is few
    shown, title, _ = _few_rows(matrix.drop_vars("label"))
    assert shown.sizes["image"] == 8
    assert title.endswith("(8 of 10 images)")


@pytest.mark.parametrize(
    ("n", "said"),
    [(1, "every"), (2, "every 2nd"), (3, "every 3rd"), (11, "every 11th"), (21, "every 21st")],
)
def test_every_so_many_in_words(n, said):
    from vitxr.report.words import ordinal

    assert ordinal(n) == said


def test_refuses_unknown_results_before_writing(tmp_path, results):
    with pytest.raises(ArgumentError, match=r"results has 'stimulus'; expected .* stimuli"):
        write_report(tmp_path / "a", {"stimulus": results["stimuli"]})
    with pytest.raises(ArgumentError, match="results has no keys"):
        write_report(tmp_path / "a", {})
    factors = results["factors"][0].drop_vars("image_factor")
    broken = {"stimuli": results["stimuli"], "factors": {0: factors}}
    with pytest.raises(KeyError, match="image_factor"):
        write_report(tmp_path / "a", broken, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert set(results) == set(RESULTS)


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1300])
def test_the_report_needs_nothing_but_itself(browser, written, width, scheme):
    report = written[0]
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.context.set_offline(True)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_load_state("load")
    sizes = page.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.width])")
    assert len(sizes) >= 10
    assert all(natural > 100 and shown > 50 for natural, shown in sizes)
    # Nothing but the page itself and the pictures inside it.
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert said == []
    # It fits the window: only what scrolls by itself may be wider.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor] }"
    )
    light = [sum(map(int, c[4:-1].split(",")[:3])) for c in (ink, paper)]
    assert (light[0] < light[1]) == (scheme == "light")
    # Every entry of the table of contents leads somewhere.
    assert page.evaluate(
        "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))"
    )
