"""The browser of a store, measured in headless Chromium with software rendering.

Brush: 150,528 neurons (768 maps of 14 x 14), lassoed on the embedding; from letting go of the
pointer to the picture of the selection, everything linked to it included; bytes of the websocket.
Movie: frames that the player draws a second. First view: a store of 5 GB, from asking for the page
to its first view. Sessions: twenty opened and closed; resident memory of the server.

    python benchmarks/app.py [ROW ...]

Rows: brush, movie, first_view, sessions; all if none is named.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xarray as xr

import vitxr

FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
BRUSHES, SESSIONS = 9, 20
MAPS, SIDE = 768, 14


@contextmanager
def served(*arguments: object) -> Iterator[tuple[str, subprocess.Popen]]:
    command = [sys.executable, "-m", "vitxr.cli", "browse", *map(str, arguments)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--no-show"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield line.split(" at ")[1].split(" ")[0], process
    finally:
        process.terminate()
        process.wait(20)


def extracted(images: int, shifts: int, layers: int = 1) -> xr.Dataset:
    """An extraction of ViT-B's sizes; every number is drawn once and used again."""
    rng = np.random.default_rng(0)
    one = rng.integers(0, 4, (1, 1, 1, layers, MAPS, SIDE, SIDE)).astype(np.float32)
    sizes = (images, shifts, shifts, layers, MAPS, SIDE, SIDE)
    import dask.array as da

    chunks = (1, shifts, shifts, 1, 16, SIDE, SIDE)
    few = da.from_array(one, chunks=(1, 1, 1, 1, 16, SIDE, SIDE))
    whole = da.broadcast_to(few, sizes, chunks=chunks)
    return xr.Dataset(
        {
            "activation": (
                (
                    *("image", "shift_y", "shift_x", "layer"),
                    *("feature_map", "patch_row", "patch_col"),
                ),
                whole,
            )
        },
        coords={
            "image": [f"image_{i:02d}" for i in range(images)],
            **{
                d: np.arange(n)
                for d, n in zip(("shift_y", "shift_x"), (shifts, shifts), strict=True)
            },
            "layer": np.arange(layers),
            "feature_map": np.arange(MAPS),
            "patch_row": np.arange(SIDE),
            "patch_col": np.arange(SIDE),
            "offset_y": ("shift_y", 11 * np.arange(shifts)),
            "offset_x": ("shift_x", 11 * np.arange(shifts)),
        },
        attrs={"model": "numbers", "input_height": 224, "input_width": 224},
    )


def factors_of(ds: xr.Dataset) -> xr.Dataset:
    """Factors of all neurons of block 0: places in five clouds."""
    t = ds.vit.neuron_tensor(layer=0, feature_maps=None)
    rng = np.random.default_rng(1)
    count = t.sizes["neuron"]
    centre = rng.normal(0, 1, (5, 4))
    f = xr.Dataset(coords={n: c for n, c in t.coords.items() if "neuron" in c.dims})
    values = centre[rng.integers(0, 5, count)] + rng.normal(0, 0.35, (count, 4))
    f["neuron_factor"] = (("neuron", "component"), values.astype(np.float32))
    f["objective"] = 0.5
    return f.assign_attrs(layer=0, method="none", rectify=1, normalize=1)


@contextmanager
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=next(found), args=FLAGS)
        yield chromium
        chromium.close()


def quiet(page) -> None:
    page.wait_for_timeout(300)
    page.locator(".vx-head .busy:empty").wait_for(state="attached", timeout=300_000)


def brush(folder: Path) -> None:
    ds = extracted(images=20, shifts=6)
    vitxr.save(factors_of(ds), folder / "factors.nc")
    vitxr.save(ds, folder / "brush.zarr")
    with (
        served(folder / "brush.zarr", "--factors", folder / "factors.nc") as (address, _),
        browser() as chromium,
    ):
        page = chromium.new_page(viewport={"width": 1400, "height": 900})
        sent, got = [0], [0]

        def listen(socket) -> None:
            socket.on("framesent", lambda d: sent.__setitem__(0, sent[0] + len(d)))
            socket.on("framereceived", lambda d: got.__setitem__(0, got[0] + len(d)))

        page.on("websocket", listen)
        page.goto(f"{address}?tab=embedding")
        points = page.locator(".vx-points")
        points.wait_for(timeout=120_000)
        quiet(page)
        box = points.locator("canvas.over").bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        times, out, into, shares = [], [], [], []
        for k in range(BRUSHES):
            angle = np.linspace(0, 2 * np.pi, 24)
            size = 50 + 15 * k
            page.mouse.move(middle[0] + size, middle[1])
            page.mouse.down()
            for a in angle[1:]:
                page.mouse.move(middle[0] + size * np.cos(a), middle[1] + size * np.sin(a))
            sent[0] = got[0] = 0
            points.evaluate("e => { delete e.dataset.elapsed }")
            page.mouse.up()
            page.wait_for_function("e => e.dataset.elapsed", arg=points.element_handle())
            page.wait_for_timeout(400)
            times.append(float(points.get_attribute("data-elapsed")))
            shares.append(int(points.get_attribute("data-count")))
            out.append(sent[0])
            into.append(got[0])
    print(
        f"brush: median {statistics.median(times):.0f} ms (range {min(times):.0f} to "
        f"{max(times):.0f}), {min(shares):,} to {max(shares):,} of {MAPS * SIDE**2:,} neurons; "
        f"sent at most {max(out) / 1000:.1f} kB, received at most {max(into) / 1000:.1f} kB"
    )


def movie(folder: Path) -> None:
    ds = extracted(images=1, shifts=21)
    vitxr.save(ds, folder / "movie.zarr")
    with served(folder / "movie.zarr") as (address, _), browser() as chromium:
        page = chromium.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{address}?tab=movie")
        page.locator("iframe").wait_for(timeout=120_000)
        quiet(page)
        player = page.locator("iframe").content_frame
        player.locator("#rate").select_option("30")
        player.locator("#play").click()
        rate = player.locator("#at").evaluate(
            """at => new Promise(done => {
                 let frames = 0, last = at.value; const start = performance.now();
                 const look = () => {
                   if (at.value !== last) { frames++; last = at.value; }
                   const took = performance.now() - start;
                   took < 5000 ? requestAnimationFrame(look) : done(1000 * frames / took);
                 };
                 look();
               })"""
        )
    print(f"movie: {rate:.1f} frames a second of 441, 13 maps, 30 asked for")


def first_view(folder: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        num_hidden_layers=1, hidden_size=MAPS, intermediate_size=8, patch_size=224 // SIDE
    )
    model = vitxr.load_model(transformers.ViTModel(config).eval())
    pixels = np.random.default_rng(0).integers(0, 256, (20, 224, 224, 3), dtype=np.uint8)
    stim = vitxr.open_images({f"image_{i:02d}": image for i, image in enumerate(pixels)})
    ds = vitxr.extract(
        stim, model, shifts=vitxr.ShiftGrid(11), preprocess="raw", store=folder / "big.zarr"
    )
    size = sum(p.stat().st_size for p in (folder / "big.zarr").rglob("*") if p.is_file())
    with browser() as chromium:
        start = time.perf_counter()
        with served(folder / "big.zarr") as (address, _):
            ready = time.perf_counter()
            page = chromium.new_page(viewport={"width": 1400, "height": 900})
            page.goto(address)
            page.locator(".vx-gallery button").first.wait_for(timeout=60_000)
            shown = time.perf_counter()
    print(
        f"first view: {shown - ready:.1f} s after the server is up, which takes "
        f"{ready - start:.1f} s; the store has {ds.nbytes / 1e9:.1f} GB, {size / 1e9:.2f} on disk"
    )


def resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


def sessions(folder: Path) -> None:
    from vitxr.demo import run_demo

    run_demo(folder / "demo", progress=False)
    store, fits = folder / "demo" / "activations.zarr", folder / "demo" / "ensemble_layer0.nc"
    with served(store, "--factors", fits) as (address, process), browser() as chromium:

        def visit() -> None:
            context = chromium.new_context(viewport={"width": 1400, "height": 900})
            page = context.new_page()
            page.goto(address)
            for key in ("stimuli", "maps", "embedding", "responses", "store"):
                page.locator(f"[role=tab][data-key={key}]").click(timeout=60_000)
                quiet(page)
            context.close()

        for _ in range(3):  # what is loaded and kept once
            visit()
        time.sleep(25)  # closed pages are forgotten
        before = resident(process.pid)
        for _ in range(SESSIONS):
            visit()
        time.sleep(25)
        after = resident(process.pid)
    print(
        f"sessions: {before:.0f} MB before, {after:.0f} MB after {SESSIONS} opened and closed: "
        f"{after / before - 1:+.1%}"
    )


ROWS = {row.__name__: row for row in (brush, movie, first_view, sessions)}


def main() -> None:
    for name in sys.argv[1:] or ROWS:
        folder = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
        try:
            ROWS[name](folder)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
