"""The README's script and the examples, as a reader would run them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("holoviews")

import literal
from PIL import Image

import vitxr

ROOT = Path(__file__).parent.parent


def run(args, folder):
    done = subprocess.run(
        [sys.executable, *args], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_that_are_shown_have_their_arguments():
    scripts = {path.name: path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py")}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = [*scripts.values(), *(page.read_text("utf-8") for page in pages)]
    text = re.sub(r"\\\n#? *", "", "\n".join(shown))
    commands = re.findall(r"python examples/(\S+)(.*)", text)
    assert {name for name, _ in commands} == set(scripts)
    for name, line in commands:
        known = re.findall(r'add_argument\(\s*"(--[\w-]+)"', scripts[name])
        assert set(re.findall(r"--[\w-]+", line.partition("#")[0])) <= set(known), (name, line)


def test_the_readmes_script(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "script.py").write_text(code, "utf-8")
    run(["script.py"], tmp_path)
    assert vitxr.open(tmp_path / "run.zarr").sizes["image"] == 20
    assert (tmp_path / "embedding.png").stat().st_size > 10_000


def test_the_main_job(tmp_path):
    out = run([ROOT / "examples" / "main_job.py", "--layer", "5", "--output", "out"], tmp_path)
    factors = vitxr.open(tmp_path / "out" / "factors.nc")
    assert factors.attrs["layer"] == 5
    assert f"{float(factors.objective):.1%}" in out
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"factors.png", "embedding.png"}


def test_the_notebook_again(tmp_path):
    out = run([ROOT / "examples" / "notebook.py", "--step", "8"], tmp_path)
    assert "512000 values, largest difference" in out
    assert "25600 values, largest difference" in out
    pictures = list((tmp_path / "notebook").glob("*.png"))
    assert len(pictures) == 22
    assert min(picture.stat().st_size for picture in pictures) > 10_000
    ds = vitxr.open(tmp_path / "notebook" / "activations.zarr")
    digits = vitxr.datasets.digits(per_class=5)
    model = vitxr.load_model("digits")
    stacks = {d: digits.pixels.values[digits.label == d] for d in "0347"}
    images = vitxr.open_images(stacks, size=model.input_size).pixels.values
    given = literal.channels_first(images), True, None, 20, 8, 20
    frames, *_ = literal.show_stimuli_3D(model.module, 0, *given)
    means, *_ = literal.show_stimuli_2D(model.module, 5, *given)
    tensor, matrix = ds.vit.neuron_tensor(layer=0), ds.vit.neuron_matrix(layer=5)
    np.testing.assert_allclose(tensor, literal.neuron_output_3D(frames), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(matrix, literal.neuron_output_2D(means), rtol=1e-5, atol=1e-5)
    for name, expected in (("3D", tensor), ("2D", matrix)):
        back = vitxr.read_mat(tmp_path / "notebook" / f"neuron_output_{name}.mat")
        assert back.identical(expected.compute())


def test_three_families(tmp_path):
    out = run(
        [ROOT / "examples" / "compare_families.py", "--shifts", "2", "--output", "out"], tmp_path
    )
    stores = sorted(p.stem for p in (tmp_path / "out").glob("*.zarr"))
    assert stores == ["dinov2-registers", "siglip", "vit"]
    grids = {s: vitxr.open(tmp_path / "out" / f"{s}.zarr").sizes["patch_row"] for s in stores}
    assert grids == {"vit": 4, "dinov2-registers": 6, "siglip": 8}
    assert "prefix class, register_0, register_1, register_2, register_3" in out
    assert "prefix none" in out
    assert out.count("1.00") == 3


def test_one_model_alone(tmp_path):
    digits = vitxr.datasets.digits(per_class=1)
    for label, pixels in zip(digits.label.values, digits.pixels.values, strict=True):
        (tmp_path / "photos" / label).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / label / "a.png")
    script = ROOT / "examples" / "compare_families.py"
    out = run([script, "photos", "digits", "--shifts", "2", "--output", "a/b"], tmp_path)
    assert out.count("1.0") == 1
    assert (tmp_path / "a" / "b" / "digits.zarr" / "zarr.json").exists()


def test_choosing_the_rank(tmp_path):
    out = run(
        [ROOT / "examples" / "choosing_rank.py", "--step", "16", "--ranks", "1", "2", "3"], tmp_path
    )
    found = vitxr.open(tmp_path / "choosing_rank" / "criteria.nc")
    factors = vitxr.open(tmp_path / "choosing_rank" / "factors.nc")
    rank = factors.sizes["component"]
    best = found.objective.sel(rank=rank, replicate=found.best_replicate.sel(rank=rank))
    np.testing.assert_allclose(factors.objective, best, rtol=1e-5)
    assert f"rank {rank}: objective {float(best):.4f}" in out


def test_larger_than_memory(tmp_path):
    script = ROOT / "examples" / "larger_than_memory.py"
    out = run([script, "--per-class", "1", "--step", "8", "--rank", "3"], tmp_path)
    assert "tensor: 3072 neurons x 10 images x 16 shifts, 2 MB, kept by 2 workers" in out
    ds = vitxr.open(tmp_path / "larger_than_memory" / "activations.zarr")
    f = vitxr.open(tmp_path / "larger_than_memory" / "factors.nc")
    t = ds.vit.neuron_tensor(layer=5, feature_maps=None, normalize=False)
    np.testing.assert_allclose(f.vit.explained(t).objective, f.objective, rtol=1e-4)


def test_equivariance_of_layers(tmp_path):
    out = run([ROOT / "examples" / "equivariance_of_layers.py", "--step", "8"], tmp_path)
    e = vitxr.open(tmp_path / "equivariance" / "digits.nc")
    assert e.sizes["layer"] == 6
    # Steps of 8 px are whole patches of 4: there is no other phase.
    np.testing.assert_allclose(e.phase_error.squeeze(), e.equivariance_error, rtol=1e-6)
    middle = e.equivariance_error.median("feature_map").values.round(2).tolist()
    assert f"median of maps: {middle}" in out
    assert (tmp_path / "equivariance" / "equivariance.pdf").stat().st_size > 5_000


def test_exploring_the_manifold(tmp_path):
    script = ROOT / "examples" / "exploring_the_manifold.py"
    out = run([script, "--step", "8", "--maps", "3", "--rank", "4"], tmp_path)
    grouped = vitxr.open(tmp_path / "manifold" / "embedding.nc")
    counts = grouped.cluster.to_series().value_counts().sort_index().to_list()
    assert f"clusters: {counts}" in out
    assert sum(counts) == grouped.sizes["neuron"] == 192
    assert grouped.sizes["pc"] == 3
