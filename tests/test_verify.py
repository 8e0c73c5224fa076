"""What verify finds in a store, finished or not, and what it takes back."""

import json
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr

import vitxr
from vitxr.errors import StoreError
from vitxr.store.layout import Array, create
from vitxr.store.ledger import Ledger
from vitxr.store.location import Location
from vitxr.store.plans import Cut

IMAGES = ["a/0.png", "a/1.png", "b/é.png"]
LAYERS = [3, 11]
DIMS = ("image", "shift_y", "shift_x", "layer", "feature_map")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished store: 3 images x 5 rows in bands of two, two layers, and scores."""
    path = tmp_path_factory.mktemp("store") / "run.zarr"
    arrays = {
        "activation": Array(DIMS, (3, 5, 2, 2, 20), "float32", (1, 2, 2, 1, 32), (1, 2, 2, 1, 16)),
        "logits": Array(
            (*DIMS[:3], "class"), (3, 5, 2, 4), "float32", (1, 2, 2, 4), (1, 2, 2, 4), compress=True
        ),
    }
    coords = xr.Dataset(
        coords={
            "image": np.array(IMAGES, dtype=object),
            "layer": LAYERS,
            "label": ("image", np.array(["a", "a", "b"], dtype=object)),
        },
        attrs={"model": "none"},
    )
    fingerprint = {"model": "none", "image_names": IMAGES, "layers": LAYERS}
    book = create(Location(path), coords, arrays, Cut(3, 5, 1, 2), fingerprint)
    for unit in range(9):
        write(book, unit)
    book.finish()
    return path


def write(book, unit):
    rng, region = np.random.default_rng(unit), book.cut.region(unit)
    rows = region["shift_y"].stop - region["shift_y"].start
    shapes = {"activation": (1, rows, 2, 2, 20), "logits": (1, rows, 2, 4)}
    book.write(unit, {name: rng.normal(size=s).astype("float32") for name, s in shapes.items()})


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run.zarr")


def verify(store, **options):
    return vitxr.verify(store, progress=False, **options)


def rows(found):
    names = ("problem", "unit", "image", "shift_y", "layer", "variable", "key")
    return [tuple(found[n].values[i] for n in names) for i in range(found.sizes["shard"])]


#: A shard of image 1, rows 2 and 3, layer 11; and the last row of image 2, which has no layer.
ONE = (4, "a/1.png", 2, 11, "activation", "activation/c.1.1.0.1.0")
LAST = (8, "b/é.png", 4, -1, "logits", "logits/c.2.2.0.0")


def longer(file):
    file.write_bytes(file.read_bytes() + b"more")


def shorter(file):
    file.write_bytes(file.read_bytes()[:-1])


def altered(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "cut short": shorter,
    "altered": altered,
    "longer": longer,
    "emptied": lambda file: file.write_bytes(b""),
    "another's": lambda file: file.write_bytes(
        file.with_name(file.name.replace("c.1.1.0", "c.0.1.0").replace("c.2", "c.0")).read_bytes()
    ),
}
PROBLEM = {"longer": "altered", "emptied": "cut short"}


def test_all_is_well(store):
    found = verify(store)
    assert isinstance(found, xr.Dataset)
    assert dict(found.sizes) == {"shard": 0}
    assert set(found.coords) == {"unit", "shift_y", "layer", "image", "variable", "key"}
    assert list(found.data_vars) == ["problem"]
    shards = [*store.glob("activation/c.*"), *store.glob("logits/c.*")]
    assert len(shards) == 27
    size = sum(p.stat().st_size for p in shards)
    assert found.attrs == {"units": 9, "damaged": 0, "bytes": size}
    xr.testing.assert_identical(verify(str(store)), found)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("victim", [ONE, LAST])
def test_a_damage_is_named(store, victim, damage):
    if damage == "another's" and victim is LAST:
        # A last row's shard ends in NaN: of the other's size only if it is not compressed.
        victim = (8, "b/é.png", 4, 3, "activation", "activation/c.2.2.0.0.0")
    DAMAGES[damage](store / victim[-1])
    problem = PROBLEM.get(damage, damage.replace("another's", "altered"))
    found = verify(store)
    assert rows(found) == [(problem, *victim)]
    assert found.attrs["damaged"] == 1
    # Looking changes nothing.
    assert (store / "zarr.json").exists()
    assert rows(verify(store)) == [(problem, *victim)]
    # A selection that names what is damaged, by labels.
    table = found.to_dataframe()
    assert list(table["image"]) == [victim[1]]


def test_the_checksums_are_of_the_data(store):
    # A CRC of bytes that end with their own CRC says nothing about them: it is a constant.
    checksums = Ledger(Location(store)).records()[:, :, 1]
    assert len(np.unique(checksums)) == checksums.size


def test_several_damages_are_all_found(store):
    DAMAGES["missing"](store / ONE[-1])
    DAMAGES["altered"](store / "logits" / "c.1.1.0.0")  # of the same unit
    DAMAGES["cut short"](store / LAST[-1])
    found = verify(store)
    assert [(p, u) for p, u, *_ in rows(found)] == [
        ("missing", 4),
        ("altered", 4),
        ("cut short", 8),
    ]
    assert found.attrs["damaged"] == 2


def test_reset_takes_back_what_is_damaged_and_no_more(store):
    DAMAGES["altered"](store / ONE[-1])
    before = Ledger(Location(store)).records()
    assert rows(verify(store, reset=True)) == [("altered", *ONE)]
    assert not (store / "zarr.json").exists()
    with pytest.raises(StoreError, match="not finished: 8 of 9 units"):
        vitxr.open(store)
    assert not vitxr.open(store, partial=True)["written"].values[1, 2:4].any()
    book = Ledger(Location(store))
    np.testing.assert_array_equal(np.flatnonzero(~book.done()), [4])
    np.testing.assert_array_equal(np.delete(book.records(), 4, 0), np.delete(before, 4, 0))
    # The shards of the unit have no record to be compared with now.
    assert {p[:2] for p in rows(verify(store))} == {("not recorded", 4)}
    write(book, 4)
    book.finish()
    assert verify(store).sizes["shard"] == 0
    np.testing.assert_array_equal(book.records(), before)


def test_a_folder_in_the_place_of_a_shard_is_missing_data(store):
    book = Ledger(Location(store))
    (_, key, _), *_ = book.shards(4)
    good = (store / key).read_bytes()
    (store / key).unlink()
    (store / key / "inside").mkdir(parents=True)
    (store / key / "inside" / "a.txt").write_text("a")
    found = vitxr.verify(store, progress=False)
    assert found["problem"].values.tolist() == ["missing"]
    assert found["key"].values.tolist() == [key]
    assert found["unit"].values.tolist() == [4]
    with pytest.raises(StoreError, match=rf"{key} is missing\. vitxr.verify names all"):
        vitxr.open(store).load()
    assert np.flatnonzero(~book.done()).tolist() == [4]
    vitxr.verify(store, reset=True, progress=False)
    with pytest.raises(StoreError, match=rf"{key} cannot be written: .*not empty"):
        write(book, 4)  # what lies there is somebody's
    assert (store / key / "inside" / "a.txt").read_text() == "a"
    (store / key / "inside" / "a.txt").unlink()
    (store / key / "inside").rmdir()
    write(book, 4)
    book.finish()
    assert (store / key).read_bytes() == good
    assert vitxr.verify(store, progress=False).sizes["shard"] == 0


def test_a_folder_in_the_place_of_a_record(store):
    record = store / "_vitxr" / "record" / "c.2.0.0"
    record.unlink()
    record.mkdir()
    found = vitxr.verify(store, progress=False)
    assert set(found["problem"].values) == {"not recorded"}
    assert set(found["unit"].values) == {2}
    book = Ledger(Location(store))
    book.forget([2])
    assert not record.exists()
    record.mkdir()
    write(book, 2)
    assert record.is_file()


def test_reset_of_a_store_without_damage_leaves_it(store):
    assert verify(store, reset=True).attrs["damaged"] == 0
    vitxr.open(store)
    # What is not written yet is no damage.
    (store / "zarr.json").unlink()
    (store / "_vitxr" / "record" / "c.2.0.0").unlink()
    found = verify(store, reset=True)
    assert found.attrs["damaged"] == 0
    assert [(p, u) for p, u, *_ in rows(found)] == [("not recorded", 2)] * 3
    assert list(np.flatnonzero(~Ledger(Location(store)).done())) == [2]


def test_a_store_that_has_lost_its_plan_is_refused(store):
    (store / "_vitxr" / "zarr.json").unlink()
    for call in (vitxr.open, vitxr.verify, Ledger):
        with pytest.raises(StoreError, match=r"_vitxr/zarr\.json\) cannot be read: it is missing"):
            call(Location(store) if call is Ledger else store)


def test_a_record_that_is_damaged(store):
    record = store / "_vitxr" / "record" / "c.4.0.0"
    data = np.frombuffer(record.read_bytes(), "<u8").reshape(3, 2).copy()
    assert data[1, 0] == (store / ONE[-1]).stat().st_size
    data[1, 0] -= 1
    record.write_bytes(data.tobytes())
    assert rows(verify(store)) == [("altered", *ONE)]
    assert list(np.flatnonzero(~Ledger(Location(store)).done())) == [4]
    data[1] += np.array([1, 1], "<u8")  # now the checksum
    record.write_bytes(data.tobytes())
    assert rows(verify(store)) == [("altered", *ONE)]


LOOKS = [verify, vitxr.open, lambda store: vitxr.open(store, partial=True)]


@pytest.mark.parametrize(
    "name", ["image/c/0", "image/zarr.json", "activation/zarr.json", "_vitxr/record/zarr.json"]
)
@pytest.mark.parametrize("damage", ["altered", "missing", "cut short"])
def test_coordinates_and_metadata_that_are_not_as_they_were_written(store, name, damage):
    if name == "activation/zarr.json" and damage == "altered":
        # Still JSON, and of another meaning.
        meta = json.loads((store / name).read_text())
        meta["attributes"]["units"] = "mV"
        (store / name).write_text(json.dumps(meta))
    else:
        DAMAGES[damage](store / name)
    how = "missing" if damage == "missing" else "altered"
    message = rf"metadata .*{name}: {how}\. The same extract, run again, .*from a copy"
    looks = [verify] if (name, damage) == ("_vitxr/record/zarr.json", "missing") else LOOKS
    for look in looks:
        with pytest.raises(StoreError, match=message):
            look(store)


def test_a_flipped_bit_in_a_coordinate_is_no_other_number(tmp_path):
    """Every bit of a small coordinate's chunk, which by itself is of another value or none."""
    arrays = {"logits": Array(("image", "class"), (2, 3), "float32", (1, 3), (1, 3))}
    coords = xr.Dataset(coords={"height": ("image", [32, 33])})
    book = create(Location(tmp_path / "run.zarr"), coords, arrays, Cut(2, 1, 1, 1), {})
    for unit in range(2):
        book.write(unit, {"logits": np.ones((1, 3), "float32")})
    book.finish()
    file = tmp_path / "run.zarr" / "height" / "c" / "0"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(StoreError, match=r"height/c/0: altered"):
            vitxr.open(tmp_path / "run.zarr")
    file.write_bytes(whole)
    assert list(vitxr.open(tmp_path / "run.zarr")["height"].values) == [32, 33]


def test_many_objects_that_are_missing_are_counted(store):
    for name in ("image", "layer", "label"):
        shutil.rmtree(store / name)
    with pytest.raises(StoreError, match=r"(c/0|json): missing; and 1 more\. The same"):
        vitxr.open(store)


@pytest.mark.parametrize("text", [b"", b'{"shape": [1', b"\xff\xfe", b"[]", b'{"codecs": []}'])
def test_metadata_that_make_no_sense(store, text):
    (store / "activation" / "zarr.json").write_bytes(text)
    for look in LOOKS:
        with pytest.raises(StoreError, match=r"run\.zarr' has .*: activation/zarr\.json: altered"):
            look(store)
    with pytest.raises(StoreError, match=r"^activation/zarr\.json of the store .* makes no sense"):
        Ledger(Location(store))


def test_another_root(store):
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["model"] = "another"
    (store / "zarr.json").write_text(json.dumps(root))
    for look in (verify, vitxr.open):
        with pytest.raises(
            StoreError,
            match=r'(?s)all units .* are written.*found:\n  model: "none" -> "another"\n.*anew',
        ):
            look(store)
    del root["attributes"]["model"]
    (store / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreError, match='model: "none" -> "absent"'):
        vitxr.open(store)
    (store / "zarr.json").write_text("{")
    for look in (verify, vitxr.open):
        with pytest.raises(StoreError, match=r"root \(zarr\.json\) .*\n  cannot be read \(JSON"):
            look(store)
    Ledger(Location(store)).finish()
    vitxr.open(store)


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_what_users_may_add_to_the_root(store):
    before = vitxr.open(store)
    zarr.consolidate_metadata(store)
    xr.testing.assert_identical(vitxr.open(store).compute(), before.compute())
    zarr.open_group(store, mode="r+").attrs["note"] = "mine"
    assert vitxr.open(store).attrs == {**before.attrs, "note": "mine"}
    assert verify(store).sizes["shard"] == 0


def test_what_has_no_record(tmp_path):
    with pytest.raises(StoreError, match=r"nothing\.zarr' does not exist: it has no record"):
        verify(tmp_path / "nothing.zarr")
    xr.Dataset({"x": ("a", [1.0])}).to_zarr(
        tmp_path / "other.zarr", consolidated=False, zarr_format=3
    )
    with pytest.raises(StoreError, match=r"is not a store of vitxr\.extract: it has no record"):
        verify(tmp_path / "other.zarr")


def test_a_plan_that_cannot_be_read(store):
    plan = store / "_vitxr" / "zarr.json"
    known = json.loads(plan.read_text())
    for text, message in {
        "{": r"plan of the store .*_vitxr/zarr\.json.* cannot be read",
        "[]": "cannot be read",
        json.dumps({"attributes": {}}): "cannot be read",
        json.dumps({**known, "attributes": {**known["attributes"], "format": 99}}): "layout 99",
    }.items():
        plan.write_text(text)
        for look in LOOKS:
            with pytest.raises(StoreError, match=message):
                look(store)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cut", None),
        ("cut", {"images": 3}),
        ("cut", {"images": 3, "rows": 5, "images_per_unit": 0, "rows_per_unit": 2}),
        ("cut", {"images": 10**15, "rows": 5, "images_per_unit": 1, "rows_per_unit": 2}),
        ("cut", {"images": "3", "rows": 5, "images_per_unit": 1, "rows_per_unit": 2}),
        ("variables", None),
        ("variables", [["activation"]]),
        ("root", []),
        ("layout", None),
        ("fingerprint", "none"),
    ],
)
def test_a_plan_that_makes_no_sense(store, key, value):
    plan = store / "_vitxr" / "zarr.json"
    known = json.loads(plan.read_text())
    known["attributes"][key] = value
    plan.write_text(json.dumps(known))
    for look in (verify, lambda s: vitxr.open(s, partial=True)):
        with pytest.raises(StoreError, match=r"plan of the store .* cannot be read"):
            look(store)


def test_an_unfinished_store_is_verified(tmp_path, made):
    store = shutil.copytree(made, tmp_path / "run.zarr")
    (store / "zarr.json").unlink()
    for unit in range(5, 9):
        (store / "_vitxr" / "record" / f"c.{unit}.0.0").unlink()
    DAMAGES["altered"](store / ONE[-1])
    found = verify(store)
    assert [r for r in rows(found) if r[0] != "not recorded"] == [("altered", *ONE)]
    assert (found["problem"] == "not recorded").sum() == 12
    assert found.attrs["units"] == 9
    assert verify(store, reset=True).attrs["damaged"] == 1
    assert list(np.flatnonzero(Ledger(Location(store)).done())) == [0, 1, 2, 3]


def test_the_command_says_what_to_do_next(store, capsys):
    from vitxr.cli import main

    command = ["verify", str(store), "--quiet"]
    assert main(command) == 0
    assert "All is as it was written: 9 units, " in capsys.readouterr().out
    book = Ledger(Location(store))
    for unit in (2, 5):
        next((store / key).unlink() for _, key, _ in book.shards(unit))
    assert main(command) == 1
    assert "2 of 9 units are damaged. Take back what is with --reset" in capsys.readouterr().err
    assert main([*command, "--reset"]) == 0
    told = capsys.readouterr()
    assert "2 damaged units were taken back. Run vitxr extract again, with the same" in told.out
    assert not told.err
    for again in ([], ["--reset"]):
        assert main([*command, *again]) == 1
        assert "the store is not finished. Run vitxr extract again" in capsys.readouterr().err
    write(book, 2)
    write(book, 5)
    book.finish()
    assert main(command) == 0
    next((store / key).unlink() for _, key, _ in book.shards(0))
    assert main([*command, "--reset"]) == 0
    assert "1 damaged unit was taken back" in capsys.readouterr().out
    assert main(["info", str(store)]) == 1
    said = capsys.readouterr().err
    assert "8 of 9 units are written. Run extract again with the same arguments" in said
    assert "in Python, open what there is: vitxr.open(path, partial=True)" in said


def test_progress(store, capsys):
    vitxr.verify(store)
    assert capsys.readouterr().out == ""
