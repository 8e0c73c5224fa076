"""Catalogs of stores: read and written, by vitxr and by Intake."""

import hashlib

import pytest
import synthetic
import xarray as xr

import vitxr
from vitxr.cli import main
from vitxr.errors import ArgumentError, StoreError

intake = pytest.importorskip("intake")

BUNDLED = vitxr.catalog.entries()
STIM = synthetic.stimuli(per_class=1)
RUN = synthetic.extraction(STIM, step=16)
FACTORS = synthetic.factorize(synthetic.neuron_tensor(RUN, 0, maps=3), 2)


def by_intake(path):
    """Open every entry of a catalog with Intake alone."""

    def walk(catalog, prefix):
        for name in catalog:
            entry = catalog[name]
            if entry.container == "catalog":
                yield from walk(entry, f"{prefix}{name}.")
            else:
                about = catalog._entries[name].describe()["metadata"]
                yield f"{prefix}{name}", entry.to_dask(), about

    return {name: (ds, about) for name, ds, about in walk(intake.open_catalog(str(path)), "")}


@pytest.mark.parametrize("name", BUNDLED.index)
def test_every_bundled_entry_opens_with_both(name):
    ours = vitxr.catalog.open(name)
    theirs, about = by_intake(vitxr.catalog._file(None))[name]
    for variable in ours.data_vars:
        xr.testing.assert_equal(
            ours[variable].drop_vars(ours.coords).compute(),
            theirs[variable].drop_vars(theirs.coords, errors="ignore").compute(),
        )
    assert about["licence"] == "CC BY 4.0"
    assert about["made"]["vitxr_version"]
    assert BUNDLED.loc[name, "sizes"] == dict(ours.sizes) == about["sizes"]


def test_the_bundled_activations_are_those_of_the_bundled_model_and_images():
    ds = vitxr.catalog.open("activations.digits")
    stim = vitxr.catalog.open("stimuli.digits")
    xr.testing.assert_equal(stim.compute(), vitxr.datasets.digits(per_class=1).compute())
    again = vitxr.extract(
        stim, vitxr.load_model("digits"), layers=[0, 5], shifts=vitxr.ShiftGrid(step=16)
    ).compute()
    kept = ds.activation.compute()
    assert float(abs(kept - again.activation).max()) <= 2**-10 * float(abs(kept).max())
    images = BUNDLED["stimuli_sha256"]
    assert images["activations.digits"] == images["stimuli.digits"]
    assert (
        vitxr.verify(vitxr.catalog.entries().loc["activations.digits", "url"]).sizes["shard"] == 0
    )


@pytest.fixture
def lab(tmp_path):
    vitxr.save(STIM, tmp_path / "images.zarr")
    vitxr.save(FACTORS, tmp_path / "far" / "some factors.zarr")
    vitxr.save(RUN, tmp_path / "run.zarr")
    (tmp_path / "lab").mkdir()
    return tmp_path


def test_stores_are_added_and_opened_by_both(lab):
    path = lab / "lab.yaml"
    assert vitxr.catalog.add(lab / "images.zarr", path, licence="CC0") == "images"
    path.write_text(path.read_text() + "  # a comment of the user's\n")
    name = vitxr.catalog.add(
        lab / "far" / "some factors.zarr", path, name="fit", description="Ü: 1"
    )
    assert name == "fit"
    assert "# a comment of the user's" in path.read_text()
    table = vitxr.catalog.entries(path)
    assert table.index.tolist() == ["images", "fit"]
    assert table.loc["fit", "description"] == "Ü: 1"
    assert table.loc["fit", "licence"] is None
    assert table.loc["images", "licence"] == "CC0"
    assert table.loc["images", "url"] == str(lab / "images.zarr")
    sums = sorted(STIM.sha256.values.tolist())
    assert (
        table.loc["images", "stimuli_sha256"]
        == hashlib.sha256("\n".join(sums).encode()).hexdigest()
    )
    size = sum(p.stat().st_size for p in (lab / "images.zarr").rglob("*") if p.is_file())
    assert table.loc["images", "bytes"] == size
    xr.testing.assert_identical(vitxr.catalog.open("fit", path).compute(), FACTORS)
    read = by_intake(path)
    assert set(read["fit"][0].data_vars) == set(FACTORS.data_vars)
    assert read["images"][1]["sizes"] == dict(STIM.sizes)
    (moved := lab.parent / f"{lab.name}-moved").mkdir()
    for file in ("lab.yaml", "images.zarr", "far"):
        (lab / file).rename(moved / file)
    xr.testing.assert_identical(vitxr.catalog.open("fit", moved / "lab.yaml").compute(), FACTORS)


def test_a_store_elsewhere(lab):
    path = lab / "lab" / "lab.yaml"
    vitxr.catalog.add(lab / "run.zarr", path)
    assert vitxr.catalog.entries(path).loc["run", "url"] == str(lab / "run.zarr")
    assert vitxr.catalog.entries(path).loc["run", "variables"] == ["activation", "logits"]


def test_catalogs_name_catalogs(lab):
    path = lab / "lab.yaml"
    vitxr.catalog.add(lab / "run.zarr", path)
    nested = lab / "lab" / "all.yaml"
    row = "{driver: yaml_file_cat, args: {path: '{{CATALOG_DIR}}/%s'}}"
    nested.write_text(f"sources:\n  a: {row % '../lab.yaml'}\n")
    assert vitxr.catalog.entries(nested).index.tolist() == ["a.run"]
    assert vitxr.catalog.open("a.run", nested).sizes == RUN.sizes
    nested.write_text(f"sources:\n  a: {row % 'all.yaml'}\n")
    with pytest.raises(StoreError, match="names itself"):
        vitxr.catalog.entries(nested)


def test_what_is_refused_leaves_the_catalog_as_it_was(lab):
    path = lab / "lab.yaml"
    vitxr.catalog.add(lab / "run.zarr", path)
    before = path.read_text()
    for wrong, kind, message in [
        ({"store": lab / "run.zarr"}, ArgumentError, r"'run' is in .* already. Give another name"),
        ({"store": lab / "run.zarr", "name": "a b"}, ArgumentError, "Give name="),
        ({"store": lab / "far" / "some factors.zarr"}, ArgumentError, "name='some factors'"),
        ({"store": lab / "none.zarr"}, StoreError, "there is no store"),
    ]:
        with pytest.raises(kind, match=message):
            vitxr.catalog.add(catalog=path, **wrong)
        assert path.read_text() == before
    vitxr.save(FACTORS, lab / "factors.nc")
    with pytest.raises(StoreError, match="is a file"):
        vitxr.catalog.add(lab / "factors.nc", path, name="f")
    assert sorted(p.name for p in lab.glob("*lab*")) == ["lab", "lab.yaml"]


def test_an_unfinished_store_is_refused(tmp_path):
    model, stim = vitxr.load_model("digits"), vitxr.datasets.digits(per_class=1)
    vitxr.extract(stim, model, layers=0, shifts=None, store=tmp_path / "run.zarr", progress=False)
    (tmp_path / "run.zarr" / "zarr.json").unlink()
    with pytest.raises(StoreError, match="finish"):
        vitxr.catalog.add(tmp_path / "run.zarr", tmp_path / "lab.yaml")
    assert not (tmp_path / "lab.yaml").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "is no catalog"),
        ("a: 1", "is no catalog"),
        ("sources: {a: 1}", "is no catalog"),
        ("sources: [a]", "is no catalog"),
        ("metadata: {version: 2}\nsources: {}", "version 1"),
        ("sources: {a: {driver: zarr}}", "cannot be added to as it is written"),
        ("sources:\n  a: {driver: zarr}\nplugins: {}", "cannot be added to as it is written"),
    ],
)
def test_catalogs_written_by_hand(lab, text, message):
    path = lab / "lab.yaml"
    path.write_text(text)
    with pytest.raises(StoreError, match=message):
        vitxr.catalog.add(lab / "run.zarr", path)
    assert path.read_text() == text


def test_an_empty_catalog_is_filled(lab):
    for text in ("sources:", "sources: {}\n", "metadata: {version: 1}\nsources:\n\n"):
        (lab / "lab.yaml").write_text(text)
        vitxr.catalog.add(lab / "run.zarr", lab / "lab.yaml")
        assert vitxr.catalog.entries(lab / "lab.yaml").index.tolist() == ["run"]


def test_names_that_are_not_there(lab):
    with pytest.raises(ArgumentError, match=r"has stimuli.digits, activations.digits"):
        vitxr.catalog.open("digits")
    with pytest.raises(ArgumentError, match=r"a store's path goes to vitxr\.open"):
        vitxr.catalog.open("run.zarr")
    with pytest.raises(ArgumentError, match=r"first, then the catalog: open\('run', 'lab.yaml'\)"):
        vitxr.catalog.open("lab.yaml", "run")
    with pytest.raises(ArgumentError, match=r"open\('NAME', 'lab.yaml'\)"):
        vitxr.catalog.open("lab.yaml")
    with pytest.raises(StoreError, match="there is no catalog"):
        vitxr.catalog.entries(lab / "none.yaml")
    with pytest.raises(StoreError, match="is a folder; expected a catalog"):
        vitxr.catalog.open("run", lab / "run.zarr")
    (lab / "binary.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(StoreError, match="is no text; expected a catalog"):
        vitxr.catalog.add(lab / "run.zarr", lab / "binary.yaml")
    (lab / "lab.yaml").write_text("sources: {a: {driver: csv, args: {urlpath: a.csv}}}")
    assert vitxr.catalog.entries(lab / "lab.yaml").loc["a", "url"] == "a.csv"
    with pytest.raises(ArgumentError, match="read by 'csv'"):
        vitxr.catalog.open("a", lab / "lab.yaml")


def test_models():
    table = vitxr.catalog.models()
    assert table.loc["google/vit-base-patch16-224", "layers"] == 12
    assert table.index.is_unique


def test_models_by_intake(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    transformers = pytest.importorskip("transformers")
    # The hub is not asked whether it has them; its own reading of each address is what is checked.
    monkeypatch.setattr(
        hub.HfFileSystem, "_repo_and_revision_exist", lambda *args, **settings: (True, None)
    )
    path = vitxr.catalog._file(None).with_name("models.yaml")
    read, table = intake.open_catalog(str(path)), vitxr.catalog.models()
    assert list(read) == list(vitxr.catalog.entries(path).index) == list(table.index)
    for name in read:
        entry, about = read[name], read._entries[name].describe()
        place = hub.HfFileSystem(skip_instance_cache=True).resolve_path(entry._urlpath)
        timms = name.startswith("timm:")
        repo = place.repo_id.partition(".")[0] if timms else place.repo_id
        assert repo == name.replace(":", "/")
        assert place.path_in_repo == "config.json"
        assert place.revision == about["metadata"]["revision"] == table.loc[name, "revision"]
        assert about["description"] == table.loc[name, "expect"]
    transformers.ViTConfig().save_pretrained(tmp_path)
    here = intake.open_catalog(str(path))["google/vit-base-patch16-224"]
    here._urlpath = str(tmp_path / "config.json")
    assert here.read()["num_hidden_layers"] == 12
    with pytest.raises(ArgumentError, match="read by 'jsonfiles'"):
        vitxr.catalog.open("facebook/dinov2-base", path)


def test_on_the_command_line(lab, capsys):
    add = ["--add", str(lab / "run.zarr")]
    assert main(["catalog", str(lab / "lab.yaml"), *add, "--licence", "CC0"]) == 0
    assert "run is in" in capsys.readouterr().out
    assert main(["catalog", str(lab / "lab.yaml")]) == 0
    assert "CC0" in capsys.readouterr().out
    assert main(["catalog"]) == 0
    assert "activations.digits  493 kB, digits, CC BY 4.0" in capsys.readouterr().out
    assert main(["catalog", *add]) == 1
    assert "--add takes a catalog" in capsys.readouterr().err
    assert main(["catalog", "--name", "x"]) == 1
    assert "go with --add" in capsys.readouterr().err
