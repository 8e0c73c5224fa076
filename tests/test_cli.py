"""The command line: what it prints, what it writes, how it fails."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from conftest import make_vit
from PIL import Image

pytest.importorskip("torch")

import vitxr
from vitxr.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model with its processor and a folder of photographs, as a user has them."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (40, 50 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{i}.png")
    make_vit().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 48}).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_extract_factorize_info(folder, capsys):
    args = ["photos", "run.zarr", "--model", "./model", "--layers", "0,2", "--step", "16"]
    assert main(["extract", *args, "--variables", "activation,logits", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "activation (image: 4, shift_y: 2, shift_x: 3, layer: 2" in out
    direct = vitxr.extract(
        vitxr.open_images("photos", progress=False),
        vitxr.load_model("./model"),
        layers=[0, 2],
        shifts=vitxr.ShiftGrid(16),
        variables=["activation", "logits"],
    )
    xr.testing.assert_identical(vitxr.open("run.zarr").compute(), direct.compute())

    fit = ["factorize", "run.zarr", "f.nc", "--layer", "2", "--rank", "3", "--seed", "7"]
    assert main([*fit, "--feature-maps", "6", "--quiet"]) == 0
    assert "objective 0." in capsys.readouterr().out
    factors = vitxr.open("f.nc").compute()
    same = direct.vit.neuron_tensor(layer=2, feature_maps=6).vit.factorize(3, random_state=7)
    xr.testing.assert_allclose(factors.drop_vars("seconds"), same.drop_vars("seconds"))

    ensemble = ["factorize", "run.zarr", "e.zarr", "--layer", "0", "--rank", "1,2", "--matrix"]
    assert main([*ensemble, "--replicates", "2", "--quiet"]) == 0
    assert "similarity" in capsys.readouterr().out
    assert set(vitxr.open("e.zarr").children) == {"rank_1", "rank_2"}

    for target, text in {
        "run.zarr": "model_fingerprint",
        "f.nc": "neuron_factor",
        "e.zarr": "objective (rank: 2",
        "./model": "grid 4 x 6",
    }.items():
        assert main(["info", target]) == 0
        assert text in capsys.readouterr().out


def test_datasets_by_name_and_no_shifts(folder, capsys):
    args = ["digits", "d.zarr", "--model", "./model", "--layers", "0", "--step", "0"]
    assert main(["extract", *args, "--per-class", "1", "--feature-maps", "3,5", "--quiet"]) == 0
    ds = vitxr.open("d.zarr")
    assert dict(ds.sizes)["image"] == 10
    assert list(ds["feature_map"]) == [3, 5]
    assert main(["extract", "digits", "e.zarr", "--size", "9"]) == 1
    assert "do not go with the dataset 'digits'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["extract", "nowhere", "x.zarr", "--model", "./model"], "nowhere"),
        (["extract", "photos", "x.zarr", "--model", "./modle"], "no model folder at './modle'"),
        (["extract", "photos", "x", "--model", "./model"], "ending in .zarr"),
        (["extract", "photos", "x.zarr", "--model", "./model", "--layers", "9"], "0 to 2"),
        (["extract", "photos", "x.zarr", "--model", "./model", "--step", "99"], "larger than"),
        (["factorize", "none.zarr", "f.nc", "--layer", "0", "--rank", "2"], "there is no store"),
        (["factorize", "none.zarr", "f.txt", "--layer", "0", "--rank", "2"], "ending in .nc"),
        (["info", "none.zarr"], "none.zarr"),
        (["demo", "--output", "photos"], "not an empty folder: nothing was written"),
    ],
)
def test_failures_are_one_message_and_status_1(folder, capsys, args, message):
    before = sorted(folder.rglob("*"))
    assert main(args) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"vitxr {args[0]}: ")
    assert message in err
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["extract"],
        ["demo", "--colour"],
        ["extract", "a", "b.zarr", "--layers", "x"],
        ["extract", "a", "b.zarr", "--size", "10x"],
        ["factorize", "a", "b.nc", "--layer", "0"],
    ],
)
def test_usage_is_status_2(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert "usage: vitxr" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["10x", "x", "10,20", "1x2x3", "-4", "224 x 224", ""])
def test_a_size_that_is_none(size, capsys):
    with pytest.raises(SystemExit):
        main(["extract", "a", "b.zarr", f"--size={size}"])
    said = f"argument --size: {size!r}: expected 224 or 224x224 (height x width)"
    assert said in capsys.readouterr().err


def test_interrupt_is_status_130(folder, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(vitxr, "open", interrupt)
    assert main(["info", "factors.nc"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_installed_command():
    done = subprocess.run(
        [sys.executable, "-m", "vitxr.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"vitxr {vitxr.__version__}"
