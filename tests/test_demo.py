"""The main job on the bundled model, from end to end."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

pytest.importorskip("torch")
pytest.importorskip("holoviews")

import literal  # needs torch

import vitxr
from vitxr.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--output", str(folder), "--quiet"]) == 0
    return folder


def test_what_the_demo_leaves(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"report.html", "figures", "activations.zarr", "detail.zarr"} <= names
    assert {"factors_layer0.nc", "ensemble_layer5.nc", "neuron_output_3D_layer0.mat"} <= names
    assert list((folder / "figures").glob("*.png"))


def test_the_stored_tensor_is_the_models(folder):
    """Frames of the demo's 3-D tensor, computed again frame by frame."""
    ds = vitxr.open(folder / "activations.zarr")
    stim = vitxr.datasets.digits().sel(image=ds["image"].values)
    model = vitxr.load_model("digits")
    tensor = vitxr.read_mat(folder / "neuron_output_3D_layer5.mat")
    frames = [(0, 0, 0), (7, 3, 10), (19, 10, 4)]
    for image, y, x in frames:
        still = model.preprocess(stim["pixels"].values[image])
        offset = int(ds["offset_y"][y]), int(ds["offset_x"][x])
        frame = np.roll(still, offset, axis=(1, 2))[None]
        channels = ds.vit.neuron_tensor(layer=5)["feature_map"].values[::64]
        expected, *_ = literal.compute_neuron_output(model.module, 5, frame, channels, 20)
        got = tensor.sel(shift=(y, x)).isel(image=image)
        np.testing.assert_allclose(got, expected[0], rtol=1e-4, atol=1e-5)


def test_ensemble_and_factors_agree(folder):
    tree = vitxr.open(folder / "ensemble_layer0.nc")
    factors = vitxr.open(folder / "factors_layer0.nc").compute()
    rank = factors.sizes["component"]
    best = float(tree["objective"].sel(rank=rank).min())
    assert float(factors["objective"]) == pytest.approx(best)
    model = sum(
        factors["weight"].values[c]
        * np.multiply.outer(
            np.multiply.outer(
                factors["neuron_factor"].values[:, c], factors["image_factor"].values[:, c]
            ),
            factors["shift_factor"].values[:, c],
        )
        for c in range(rank)
    )
    tensor = vitxr.read_mat(folder / "neuron_output_3D_layer0.mat").values
    residual = np.linalg.norm(tensor - model) / np.linalg.norm(tensor)
    assert residual == pytest.approx(best, rel=1e-4)
    assert (np.diff(tree["objective"].min("replicate")) < 0).all()


def test_every_result_says_where_it_comes_from(folder):
    ds = vitxr.open(folder / "activations.zarr")
    factors = vitxr.open(folder / "factors_layer5.nc")
    for result in (ds.vit.neuron_matrix(layer=5), factors, factors.vit.embed()):
        assert result.attrs["model_fingerprint"] == ds.attrs["model_fingerprint"]
        assert result.attrs["layer"] == 5


def test_the_model_knows_what_it_sees(folder):
    """Deeper activations tell the digits apart: the last block's mean maps are separable."""
    ds = vitxr.open(folder / "activations.zarr")
    mean = ds["activation"].sel(layer=5).mean(("patch_row", "patch_col", "shift_y", "shift_x"))
    labels = ds["label"].values.astype(str)
    score = LogisticRegression(C=10.0, max_iter=2000).fit(mean, labels).score(mean, labels)
    still = ds["logits"].isel(shift_y=0, shift_x=0).idxmax("class").values
    assert score > 0.9
    assert (still == labels).mean() >= 0.9


def test_the_page_says_what_was_done(folder):
    text = (folder / "report.html").read_text("utf-8")
    ds = vitxr.open(folder / "activations.zarr")
    assert ds.attrs["model_fingerprint"][:12] in text
    for word in ("digits", "Attention", "Factors", "rank"):
        assert word in text
