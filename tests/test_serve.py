"""Who is served, and what is said of a store that cannot be opened: with a real server."""

import shutil
import socket
import urllib.parse
import urllib.request

import pandas as pd
import pytest
from browsing import opened, served, visit, watched

import vitxr

pytest.importorskip("panel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    vitxr.extract(
        vitxr.datasets.digits(per_class=1).isel(image=[0, 1]),
        vitxr.load_model("digits"),
        layers=[0],
        shifts=None,
        store=folder / "run.zarr",
        progress=False,
    )
    return folder


@pytest.fixture(scope="module")
def chromium():
    with opened() as browser:
        yield browser


@pytest.fixture
def page(chromium):
    with watched(chromium) as page:
        yield page


def shaken(address, origin):
    """First line of the answer to a websocket's handshake."""
    host = urllib.parse.urlsplit(address).netloc
    name, port = host.split(":")
    lines = (
        "GET /ws HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol: bokeh, x",
        f"Origin: {origin}",
    )
    with socket.create_connection((name, int(port)), timeout=20) as line:
        line.sendall("\r\n".join([*lines, "", ""]).encode())
        return line.recv(200).decode().splitlines()[0]


def test_a_websocket_of_another_origin_is_refused(folder):
    """Even where an environment variable of Bokeh would let every page in."""
    with served(folder / "run.zarr", BOKEH_ALLOW_WS_ORIGIN="*") as address:
        port = urllib.parse.urlsplit(address).port
        for origin in ("http://evil.example", f"http://evil.example:{port}", "http://127.0.0.1:1"):
            assert " 403 " in shaken(address, origin)
        assert " 403 " not in shaken(address, f"http://127.0.0.1:{port}")


def test_a_network_address_asks_for_the_password(folder):
    password = {"VITXR_BROWSE_PASSWORD": "open sesame"}
    with served(folder / "run.zarr", "--address", "0.0.0.0", **password) as address:
        with urllib.request.urlopen(address.replace("0.0.0.0", "127.0.0.1")) as answer:
            text = answer.read().decode()
        assert "login" in answer.geturl()
        assert "password" in text.lower()
        assert "digits" not in text
        port = urllib.parse.urlsplit(address).port
        local = address.replace("0.0.0.0", "127.0.0.1")
        assert " 101 " not in shaken(local, f"http://127.0.0.1:{port}")


def test_the_password_alone_opens_the_page(page, folder):
    """Without a name; even one that is the path of a file."""
    own = str(folder / "run.zarr" / "zarr.json")
    with served(folder / "run.zarr", "--address", "0.0.0.0", VITXR_BROWSE_PASSWORD=own) as address:
        page.goto(address.replace("0.0.0.0", "127.0.0.1"))
        assert page.get_by_role("heading", name="vitxr").is_visible()
        for word, opens in (("wrong", False), (own, True)):
            page.get_by_label("Password").fill(word)
            page.keyboard.press("Enter")
            if not opens:
                page.get_by_text("That is not the password.").wait_for()
        page.get_by_role("tab", name="Stimuli").wait_for(timeout=60_000)


@pytest.mark.parametrize("kind", ["unfinished", "other"])
def test_a_store_that_cannot_be_opened_says_so(page, folder, tmp_path, kind):
    store = tmp_path / "run.zarr"
    if kind == "unfinished":
        shutil.copytree(folder / "run.zarr", store)
        (store / "zarr.json").unlink()
    elif kind == "other":
        vitxr.save(pd.DataFrame({"a": [1.0]}).to_xarray(), store)
    said = {
        "unfinished": "is not finished",
        "other": "expected a Dataset of vitxr.extract",
    }
    with served(store) as address:
        page.goto(address)
        page.get_by_text("This cannot be shown").wait_for(timeout=60_000)
        assert said[kind] in page.locator("[role=alert]").inner_text()


def test_a_damaged_shard_says_so(page, folder, tmp_path):
    store = tmp_path / "run.zarr"
    shutil.copytree(folder / "run.zarr", store)
    shards = list((store / "activation").glob("c.*"))
    assert shards
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-9])
    with served(store) as address:
        visit(page, address, "maps")
        assert "is damaged" in page.locator("[role=alert]").inner_text()
