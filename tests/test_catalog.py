"""The catalog of models, what a name that is not known is told, and the cost of a pass."""

import re

import pytest
from conftest import make_vit

torch = pytest.importorskip("torch")

from families import FAMILIES  # noqa: E402

import vitxr  # noqa: E402
from vitxr.cli import main  # noqa: E402
from vitxr.errors import ModelError  # noqa: E402
from vitxr.models.catalog import hint, known_models  # noqa: E402
from vitxr.models.cost import operations, seconds  # noqa: E402


def test_every_row_is_whole():
    keys = ["id", "revision", "family", "licence", "input", "patch", "layers", "channels", "heads"]
    keys += ["prefix", "expect"]
    prefixes = {f.name: f.prefix for f in FAMILIES}
    for name, row in known_models().items():
        assert list(row) == keys, name
        assert re.fullmatch(r"main|[0-9a-f]{40}", row["revision"])
        assert row["channels"] % row["heads"] == 0
        assert row["input"] // row["patch"] > 6
        # As the tested small model of the family has them, whose registers are fewer or more.
        if row["family"] != "timm":
            expected = [t for t in prefixes[row["family"]] if not t.startswith("register")]
            assert [t for t in row["prefix"] if not t.startswith("register")] == expected


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("google/vit-base-patch16-225", "google/vit-base-patch16-224"),
        ("vit-base-patch16-224", "google/vit-base-patch16-224"),
        ("facebook/dinov2_base", "facebook/dinov2-base"),
        ("digitz", "digits"),
        ("dinov2", "facebook/dinov2-small, facebook/dinov2-base"),
        ("CLIP", "openai/clip-vit-base-patch32"),
        ("meta/dinov2-base", "facebook/dinov2-base"),
    ],
)
def test_the_nearest_known(name, nearest):
    assert nearest in hint(name)


def test_nothing_is_near():
    assert hint("a-model-of-my-own") == ""
    assert hint("facebook/dinov2-base") == ""


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ModelError, match=r"no model named 'dinov2-bas'.*facebook/dinov2-base"):
        vitxr.load_model("dinov2-bas")


def test_operations_are_those_of_the_formula(model):
    tokens, channels, hidden, layers = 1 + 4 * 6, 48, 64, 3
    block = 8 * tokens * channels**2 + 4 * tokens**2 * channels + 4 * tokens * channels * hidden
    patches = 2 * 24 * (8 * 8 * 3) * channels
    head = 2 * channels * 5
    assert operations(model) == layers * block + patches + head


def test_cost_leaves_the_model(model):
    module = make_vit(hidden_dropout_prob=0.5).train()
    loaded = vitxr.load_model(module)
    assert seconds(loaded, repeats=1) > 0
    assert operations(loaded) == operations(model)
    assert all(m.training for m in module.modules())


def test_info_of_a_model(capsys):
    assert main(["info", "digits", "--input-size", "32x64"]) == 0
    out = capsys.readouterr().out
    for text in ("(layers 0 to 5)", "class", "grid 8 x 16", "GFLOP", "weights SHA-256"):
        assert text in out
    lines = dict(line.split("  ", 1) for line in map(str.strip, out.splitlines()))
    assert lines["heads"].strip() == str(vitxr.load_model("digits").heads)


def test_an_input_size_goes_with_a_model(tmp_path, capsys):
    assert main(["info", str(tmp_path / "a.nc"), "--input-size", "32"]) == 1
    assert "--input-size goes with a model" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "a.nc"), "--revision", "main"]) == 1
    assert "--revision goes with a model" in capsys.readouterr().err


def test_info_of_what_is_neither(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no store")
    for given in (tmp_path, tmp_path / "notes.txt"):
        assert main(["info", str(given)]) == 1
        assert "is neither a store" in capsys.readouterr().err


def test_as_a_module():
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "vitxr", "info", "nowhere"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("vitxr info: no model named 'nowhere'")
