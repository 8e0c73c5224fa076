"""Stores at fsspec URLs: in memory, and on an S3 server of this machine, which also fails."""

import gc
import os
import threading
import uuid
import warnings

import numpy as np
import pytest
import xarray as xr
from forked import PATIENCE, guarded
from forked import contents as files_of

fsspec = pytest.importorskip("fsspec")
s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import vitxr  # noqa: E402
from vitxr.errors import ArgumentError, StoreError  # noqa: E402
from vitxr.store.layout import Array, create  # noqa: E402
from vitxr.store.ledger import Ledger  # noqa: E402
from vitxr.store.location import Location  # noqa: E402
from vitxr.store.plans import Cut  # noqa: E402

# Clients that are not closed but left to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _swept():
    """Collect the clients that were left before the tests of another module are blamed."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s3fs.S3FileSystem.clear_instance_cache()
        gc.collect()


class Server:
    """An S3 server whose answers to some requests are "503 Slow Down"."""

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._s3 = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self.heal()
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.port}"

    def __call__(self, environ, start):
        asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        with self._lock:
            fails = self._part is not None and self._part in asked and self._left > 0
            self._left -= fails
            self.failed += fails
        if not fails:
            return self._s3(environ, start)
        # What was sent is taken, or the connection would break.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        answer = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
        answer *= environ["REQUEST_METHOD"] != "HEAD"
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(answer)))]
        start("503 Slow Down", headers)
        return [answer]

    def fail(self, part, times=10**9):
        """Fail what is asked for with that in its method and path, for some times or for ever."""
        with self._lock:
            self._part, self._left, self.failed = part, times, 0

    def heal(self):
        self._part, self._left, self.failed = None, 0, 0

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def server():
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "2",
        }.items():
            patch.setenv(name, value)
        # Four attempts in all, where s3fs makes 25: what never works fails in a second.
        patch.setattr(s3fs.S3FileSystem, "retries", 2)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.close()


@pytest.fixture(params=["memory", "s3"])
def root(request):
    """A URL under which there is nothing yet."""
    name = uuid.uuid4().hex
    if request.param == "memory":
        yield f"memory://{name}"
        fs = fsspec.filesystem("memory")
        if fs.exists(f"/{name}"):
            fs.rm(f"/{name}", recursive=True)
    else:
        server = request.getfixturevalue("server")
        yield f"s3://bucket/{name}"
        server.heal()


@pytest.fixture
def s3(server):
    yield f"s3://bucket/{uuid.uuid4().hex}"
    server.heal()


def contents(url):
    """Every object under a URL, by key."""
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {
        key.split(path.strip("/"), 1)[1]: fs.cat_file(key)
        for key in (fs.find(path) if fs.exists(path) else [])
    }


# Objects


def test_objects(root):
    location = Location(f"{root}/run.zarr")
    assert not location.exists()
    assert location.read("a") is None
    assert location.read_many(["a", "b/c"]) == {}
    assert location.read_many([]) == {}
    assert location.sizes("b") == {}
    location.erase(["a", "b/c"])
    location.remove()
    location.write({"a": b"", "b/c": b"123", "b/d": np.arange(4, dtype=np.uint8), "b/e/f": b"1"})
    assert location.exists()
    assert location.read("a") == b""
    assert location.read("b/d") == bytes([0, 1, 2, 3])
    assert location.read("b") is None
    assert location.read_many(["b/c", "b/x", "a"]) == {"b/c": b"123", "a": b""}
    assert location.sizes("b") == {"b/c": 3, "b/d": 4}
    location.write({"b/c": b"4"})
    assert location.read("b/c") == b"4"
    assert location.sizes("b")["b/c"] == 1
    location.erase(["b/c", "b/c", "x"])
    assert location.read("b/c") is None
    assert location.free() is None
    with location.alone():
        pass
    location.remove()
    assert not location.exists()
    assert contents(root) == {}


@pytest.mark.parametrize("name", ["a b.zarr", "é.zarr", "100%41.zarr", "a+b&c=d.zarr"])
def test_names_that_mean_something_elsewhere(root, name):
    Location(f"{root}/a.zarr").write({"a/b": b"other"})
    location = Location(f"{root}/{name}")
    assert not location.exists()
    location.write({"a/b": b"this", "a/c": b"12"})
    assert location.exists()
    assert location.read_many(["a/b", "a/x"]) == {"a/b": b"this"}
    assert location.sizes("a") == {"a/b": 4, "a/c": 2}
    location.erase(["a/c"])
    assert location.sizes("a") == {"a/b": 4}
    location.remove()
    assert not location.exists()
    assert contents(root) == {"/a.zarr/a/b": b"other"}


@pytest.mark.parametrize("name", ["run[1].zarr", "run*.zarr", "run?.zarr"])
def test_names_that_are_patterns_are_refused(root, name):
    # fsspec would read, and delete, whatever they match.
    Location(f"{root}/run1.zarr").write({"a/b": b"other"})
    with pytest.raises(StoreError, match=r"run.*\.zarr.*pattern"):
        Location(f"{root}/{name}")
    with pytest.raises(StoreError, match=r"run.*\.zarr.*pattern"):
        vitxr.open(f"{root}/{name}")


def test_what_was_written_elsewhere_is_seen_at_once(s3):
    # A listing that is kept would hide what another process has written.
    here, there = Location(f"{s3}/run.zarr"), s3fs.S3FileSystem(skip_instance_cache=True)
    there.pipe_file(f"{s3}/run.zarr/a/b", b"1")
    assert here.sizes("a") == {"a/b": 1}
    there.pipe_file(f"{s3}/run.zarr/a/c", b"12")
    assert here.sizes("a") == {"a/b": 1, "a/c": 2}
    assert here.read("a/c") == b"12"
    there.rm_file(f"{s3}/run.zarr/a/b")
    assert here.sizes("a") == {"a/c": 2}
    assert here.read("a/b") is None
    there.rm_file(f"{s3}/run.zarr/a/c")
    assert not here.exists()


def test_many_objects_at_once(root):
    location = Location(f"{root}/run.zarr")
    objects = {f"record/c.{i}": f"{i}".encode() for i in range(150)}
    location.write(objects)  # more than fsspec asks for at once
    assert location.read_many([*objects, "record/x"]) == objects
    assert location.sizes("record") == {key: len(data) for key, data in objects.items()}


# A store


@pytest.fixture
def book(root):
    """A store of 4 images, laid out and empty."""
    arrays = {
        "logits": Array(
            ("image", "shift_y", "shift_x", "class"),
            (4, 1, 1, 6),
            "float32",
            (1, 1, 1, 6),
            (1, 1, 1, 3),
        ),
    }
    coords = xr.Dataset(
        coords={"image": np.array([f"{i}.png" for i in range(4)], dtype=object)},
        attrs={"model": "none"},
    )
    fingerprint = {"model": "none", "image_names": [f"{i}.png" for i in range(4)]}
    return create(Location(f"{root}/run.zarr"), coords, arrays, Cut(4, 1, 1, 1), fingerprint)


def values(unit):
    return {"logits": np.arange(6, dtype="float32").reshape(1, 1, 1, 6) + unit}


def test_a_store_from_its_layout_to_its_end(book):
    url = str(book.location)
    for unit in (0, 2):
        book.write(unit, values(unit))
    with pytest.raises(StoreError, match="not finished: 2 of 4 units are written"):
        vitxr.open(url)
    with pytest.raises(Exception, match=r"No group found|No such file|not found"):
        # Otherwise it would be remembered that there is nothing.
        xr.open_zarr(url, consolidated=False, storage_options={"use_listings_cache": False})
    with pytest.raises(StoreError, match=r"misses 2 of 4 units \(the first: image '1\.png'\)"):
        book.finish()
    partial = vitxr.open(url, partial=True)
    assert list(partial["written"].values[:, 0]) == [True, False, True, False]
    np.testing.assert_array_equal(
        partial["logits"][:, 0, 0], [np.arange(6), [np.nan] * 6, np.arange(6) + 2, [np.nan] * 6]
    )
    found = vitxr.verify(url, progress=False)
    assert list(found["problem"].values) == ["not recorded"] * 2
    again = Ledger(Location(url))
    for unit in (1, 3):
        again.write(unit, values(unit))
    again.finish()
    expected = np.arange(6) + np.arange(4)[:, None]
    for ds in (vitxr.open(url), xr.open_zarr(url, consolidated=False)):
        np.testing.assert_array_equal(ds["logits"][:, 0, 0], expected)
        assert ds.attrs == {"model": "none"}
    # Where the shifts of an image are few, a chunk for Dask holds several images.
    assert vitxr.open(url)["logits"].chunks == ((4,), (1,), (1,), (6,))
    assert vitxr.verify(url, progress=False).sizes["shard"] == 0


def test_damages_are_found_and_taken_back(book):
    for unit in range(4):
        book.write(unit, values(unit))
    book.finish()
    location, url = book.location, str(book.location)
    data = bytearray(location.read("logits/c.1.0.0.0"))
    data[3] ^= 1
    location.write({"logits/c.1.0.0.0": bytes(data)})
    location.write({"logits/c.2.0.0.0": location.read("logits/c.2.0.0.0")[:-5]})
    location.erase(["logits/c.3.0.0.0"])
    found = vitxr.verify(url, progress=False, reset=True)
    assert list(found["problem"].values) == ["altered", "cut short", "missing"]
    assert list(found["image"].values) == ["1.png", "2.png", "3.png"]
    with pytest.raises(StoreError, match="not finished: 1 of 4"):
        vitxr.open(url)
    for unit in (1, 2, 3):
        book.write(unit, values(unit))
    book.finish()
    assert vitxr.verify(url, progress=False).sizes["shard"] == 0


def test_what_is_in_the_way_at_a_url(root):
    Location(f"{root}/mine.zarr").write({"thesis.txt": b"precious"})
    with pytest.raises(StoreError, match=r"not a Zarr v3 store \(no zarr\.json"):
        vitxr.open(f"{root}/mine.zarr")
    with pytest.raises(StoreError, match=r"is not a store of vitxr\.extract: it has no record"):
        vitxr.verify(f"{root}/mine.zarr")
    with pytest.raises(StoreError, match="there is no store at"):
        vitxr.open(f"{root}/nothing.zarr")
    with pytest.raises(StoreError, match=r"nothing\.zarr' does not exist"):
        vitxr.verify(f"{root}/nothing.zarr")


# Extractions


@pytest.fixture(scope="module")
def extract():
    """Extract three images into a URL, nine units; or into nothing, for comparison."""
    pytest.importorskip("torch")
    from conftest import make_vit

    from vitxr.extract import plan

    model = vitxr.load_model(make_vit())
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    stim = vitxr.open_images({"noise": pixels[:2], "other": pixels[2:]})

    def run(store=None, **options):
        arguments = {"model": model, "layers": [0, 2], "variables": ["activation", "logits"]}
        arguments |= {"shifts": vitxr.ShiftGrid(11), "preprocess": "raw", "batch_size": 5}
        return vitxr.extract(stim, store=store, progress=False, **arguments | options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_SHARD_BYTES", 1)
        yield run


@pytest.fixture(scope="module")
def expected(extract):
    return extract().compute()


@pytest.fixture
def counted(monkeypatch):
    """Counts the frames of every forward pass."""
    pytest.importorskip("torch")
    from vitxr.extract import units

    sizes, true = [], units.capture

    def capture(model, batch, *rest):
        sizes.append(len(batch))
        return true(model, batch, *rest)

    monkeypatch.setattr(units, "capture", capture)
    return sizes


def test_an_extraction_at_a_url(root, extract, expected, counted, tmp_path):
    url = f"{root}/run.zarr"
    xr.testing.assert_identical(extract(url).compute(), expected)
    xr.testing.assert_identical(vitxr.open(url).compute(), expected)
    plain = xr.open_zarr(url, consolidated=False)
    xr.testing.assert_equal(plain["activation"].compute(), expected["activation"])
    assert vitxr.verify(url, progress=False).sizes["shard"] == 0
    counted.clear()
    extract(url)
    assert counted == []
    with pytest.raises(StoreError, match='storage_dtype: "float32" -> "float16"'):
        extract(url, storage_dtype="float16")
    with pytest.raises(StoreError, match="resume=False"):
        extract(url, resume=False)
    # The same objects as on a disk, byte for byte.
    extract(tmp_path / "run.zarr")
    files = files_of(tmp_path / "run.zarr")
    assert contents(url) == {f"/{key}": data for key, data in files.items()}


def test_an_extraction_at_a_url_goes_on(root, extract, expected, counted):
    url = f"{root}/run.zarr"
    extract(url)
    whole = contents(url)
    location = Location(url)
    location.erase(["zarr.json", "_vitxr/record/c.4.0.0", "activation/c.2.1.0.0.0.0.0"])
    location.write({"logits/c.0.1.0.0": location.read("logits/c.0.1.0.0")[:9]})
    counted.clear()
    xr.testing.assert_identical(extract(url).compute(), expected)
    assert sum(counted) == 15
    assert contents(url) == whole


def test_what_is_in_the_way_at_a_url_is_left_alone(root, extract, counted):
    Location(f"{root}/mine.zarr").write({"thesis.txt": b"precious"})
    with pytest.raises(StoreError, match=r"is not a store of vitxr\.extract: nothing was written"):
        extract(f"{root}/mine.zarr")
    assert contents(root) == {"/mine.zarr/thesis.txt": b"precious"}
    assert counted == []


def test_two_runs_at_one_url_write_the_same(root, extract, expected):
    # Object stores have no locks. Nothing is lost: each object is written whole, if twice.
    url, out = f"{root}/run.zarr", []
    start = threading.Barrier(2)

    def work():
        start.wait()
        out.append(extract(url))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(out) == 2
    xr.testing.assert_identical(vitxr.open(url).compute(), expected)
    assert vitxr.verify(url, progress=False).sizes["shard"] == 0


def test_the_memory_of_this_process_is_not_for_others(extract):
    with pytest.raises(ArgumentError, match="is in the memory of this one"):
        extract("memory://shared/run.zarr", workers=2)
    assert contents("memory://shared") == {}


def test_a_worker_process_writes_to_s3(s3, extract, expected):
    stored = extract(f"{s3}/run.zarr", workers=["cpu"]).compute()
    xr.testing.assert_allclose(stored, expected, rtol=1e-4, atol=1e-5)
    assert vitxr.verify(f"{s3}/run.zarr", progress=False).sizes["shard"] == 0


def test_the_command_line_takes_urls(s3, capsys):
    pytest.importorskip("torch")
    from vitxr.cli import main

    url = f"{s3}/run.zarr"
    command = ["extract", "digits", url, "--model", "digits", "--per-class", "1"]
    assert main([*command, "--layers", "0", "--step", "16", "--quiet"]) == 0
    assert f"The store is {url}" in capsys.readouterr().out
    assert main(["info", url]) == 0
    assert "activation (image: 10" in capsys.readouterr().out
    assert main(["verify", url, "--quiet"]) == 0


# A server that fails


UNAVAILABLE = "SlowDown|Reduce your request rate|Service Unavailable|503"


@pytest.mark.parametrize("key", ["activation/c.1.1.0.1", "_vitxr/zarr.json"])
def test_a_server_that_is_slow_for_a_while(server, s3, extract, expected, key):
    url = f"{s3}/run.zarr"
    server.fail(f"PUT /{url[5:]}/{key}", times=3)
    stored = guarded(extract, url)
    assert server.failed == 3
    xr.testing.assert_identical(stored.compute(), expected)
    assert vitxr.verify(url, progress=False).sizes["shard"] == 0


@pytest.mark.parametrize("key", ["activation/c.1.1.0.1", "_vitxr/record/c.4"])
def test_a_server_that_is_slow_for_ever(server, s3, extract, expected, counted, key):
    url = f"{s3}/run.zarr"
    server.fail(f"PUT /{url[5:]}/{key}")
    with pytest.raises(
        StoreError,
        match=r"writing image 'noise/.*1', shift_y 1 to 1 to 's3://.*' failed: "
        rf".*({UNAVAILABLE}).*recorded as done is safe.*run extract again",
    ):
        guarded(extract, url)
    assert server.failed >= 2
    assert sum(counted) <= 5 * 6
    server.heal()
    done = sum("/record/c." in object_ for object_ in contents(url))
    assert done in (4, 5)  # the next may have been written when it was noticed
    with pytest.raises(StoreError, match=f"not finished: {done} of 9 units are written"):
        vitxr.open(url)
    counted.clear()
    xr.testing.assert_identical(extract(url).compute(), expected)
    assert sum(counted) == 5 * (9 - done)


def test_a_server_that_fails_at_the_start_or_the_end(server, s3, extract, expected, counted):
    url = f"{s3}/run.zarr"
    message = rf"(?s)run\.zarr.*({UNAVAILABLE})"
    for key in ("_vitxr/zarr.json", "label/zarr.json"):
        server.fail(f"PUT /{url[5:]}/{key}")
        with pytest.raises(StoreError, match=message):
            guarded(extract, url)
        server.heal()
        assert contents(url) == {}
    assert counted == []
    server.fail(f"PUT /{url[5:]}/zarr.json")
    with pytest.raises(StoreError, match=message):
        guarded(extract, url)
    server.heal()
    counted.clear()
    xr.testing.assert_identical(extract(url).compute(), expected)
    assert counted == []


def test_a_server_that_cannot_be_read_is_not_an_empty_one(server, s3, extract, counted):
    url = f"{s3}/run.zarr"
    extract(url)
    before = contents(url)
    counted.clear()
    for key, look in {
        "_vitxr/zarr.json": extract,
        "_vitxr/record/c.4": extract,
        "zarr.json": extract,
        "logits/zarr.json": vitxr.open,
        "_vitxr/record/c.5": lambda url: vitxr.verify(url, progress=False),
        "activation/c.1.0": lambda url: vitxr.verify(url, progress=False),
    }.items():
        server.fail(f" /{url[5:]}/{key}")
        with pytest.raises(StoreError, match=rf"(?s)run\.zarr.*({UNAVAILABLE})"):
            guarded(look, url)
        server.heal()
    assert counted == []
    assert contents(url) == before


def test_no_server_and_no_bucket(server, extract, counted, monkeypatch):
    with pytest.raises(StoreError, match=r"s3://nowhere.*(bucket|Bucket)"):
        guarded(extract, "s3://nowhere/run.zarr")
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StoreError, match=r"s3://bucket/run\.zarr.*[Cc]onnect"):
            guarded(extract, "s3://bucket/run.zarr")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert counted == []


def test_the_package_for_a_protocol_is_named(monkeypatch):
    from fsspec.registry import known_implementations

    monkeypatch.setitem(
        known_implementations,
        "lacking",
        {"class": "lacking.FileSystem", "err": "Install lackingfs to access it"},
    )
    with pytest.raises(StoreError, match=r"Install lackingfs.*s3fs for s3://"):
        vitxr.open("lacking://x/run.zarr")


def test_a_file_url_is_a_folder(tmp_path):
    location = Location(f"file://{tmp_path}/run.zarr")
    assert location.folder == tmp_path / "run.zarr"
    location.write({"a/b": b"1"})
    assert (tmp_path / "run.zarr" / "a" / "b").read_bytes() == b"1"
    assert location.read("a/b") == b"1"
