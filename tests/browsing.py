"""A real browser for the tests, and the pages that ``vitxr browse`` serves to it."""

import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from contextlib import contextmanager

import numpy as np

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@contextmanager
def served(*arguments, **environment):
    """``vitxr browse`` in a process of its own; gives its address."""
    command = ("vitxr.cli", "browse", *map(str, arguments), "--port", "0", "--no-show")
    with running(*command, **environment) as line:
        yield line.split(" at ")[1].split(" ")[0]


@contextmanager
def panel_served(path):
    """``panel serve path`` in a process of its own; gives its address."""
    with running("panel", "serve", str(path), "--port", "0", "--address", "127.0.0.1") as line:
        yield line.split(" at: ")[1].strip()


@contextmanager
def running(*command, **environment):
    """A module in a process of its own; gives the line with its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    drain = threading.Thread()
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "http://" in line:
                break
        else:
            raise AssertionError("".join(said))
        drain = threading.Thread(target=process.stdout.read, daemon=True)
        drain.start()
        yield line
    finally:
        process.terminate()
        process.wait(20)
        if drain.ident is not None:
            drain.join(20)
        process.stdout.close()


@contextmanager
def opened():
    assert CHROMIUM is not None, "needs Chromium: sh scripts/chromium.sh"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def watched(browser):
    """A page that may say nothing on the console and ask nobody but its server."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    said, asked = [], []
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    yield page
    page.close()
    # Reading pixels back is the tests' own doing.
    assert [text for text in said if "willReadFrequently" not in text] == []
    hosts = {urllib.parse.urlsplit(url).hostname for url in asked}
    assert hosts <= {None, "127.0.0.1"}


def until(what, page, seconds=40):
    """Wait until something is true; the last failure is raised if it never is."""
    end = time.monotonic() + seconds
    while True:
        try:
            found = what()
            if found is None or found is True or (found is not False and np.all(found)):
                return
            raise AssertionError(f"it is {found!r}")
        except Exception:
            if time.monotonic() > end:
                raise
            page.wait_for_timeout(100)


def visit(page, address, tab, **state):
    page.goto(f"{address}?{urllib.parse.urlencode({'tab': tab, **state})}")
    page.locator(f"[role=tab][data-key={tab}][aria-selected=true]").wait_for(timeout=60_000)
    quiet(page)


def quiet(page):
    """Wait until nothing is being worked on."""
    page.wait_for_timeout(200)
    page.locator(".vx-head .busy:empty").wait_for(state="attached", timeout=60_000)


def grid(page, title):
    return page.locator(".vx-grid", has=page.get_by_role("heading", name=title, exact=True))


def colors(part):
    """Pixels of a picture of cells, as the browser has them."""
    width, height, data = part.locator("canvas.back").evaluate(
        "c => [c.width, c.height, Array.from(c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data)]"
    )
    return np.array(data, np.uint8).reshape(height, width, 4)


def readings(page, part, rows, cols):
    """The number that is written for each cell under the pointer."""
    box = part.locator("canvas.over").bounding_box()
    out = np.full((rows, cols), np.nan)
    for r in range(rows):
        for c in range(cols):
            page.mouse.move(
                box["x"] + (c + 0.5) * box["width"] / cols,
                box["y"] + (r + 0.5) * box["height"] / rows,
            )
            words = part.locator(".said").inner_text().split(": ")[1].split()
            out[r, c] = float(words[0])
    return out


def lasso(page, corners):
    """Draw around, in the units of the camera; gives the mask of the server and the browser's."""
    points = page.locator(".vx-points")
    before = points.get_attribute("data-served")
    box = points.locator("canvas.over").bounding_box()
    half = min(box["width"], box["height"]) / 2
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    where = [(middle[0] + x * half, middle[1] - y * half) for x, y in corners]
    page.mouse.move(*where[0])
    page.mouse.down()
    for x, y in [*where[1:], where[0]]:
        page.mouse.move(x, y, steps=5)
    page.mouse.up()
    page.wait_for_function(
        "([e, n]) => e.dataset.served !== n", arg=[points.element_handle(), before]
    )
    quiet(page)
    return masks(page)


def masks(page):
    found = page.locator(".vx-points").evaluate(
        "e => [Array.from(e.chosen ? e.chosen() : []), Array.from(e.own ? e.own() : [])]"
    )
    return [np.array(one, bool) for one in found]


def query(page):
    """What the address holds."""
    parts = urllib.parse.parse_qs(urllib.parse.urlsplit(page.url).query)
    return {k: v[0] for k, v in parts.items()}
