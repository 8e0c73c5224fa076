"""Small real models and stimuli that the tests share."""

from __future__ import annotations

import os

# Two test workers share the cores: more threads would only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings

# No timing in the tests: a busy machine is not a failure.
settings.register_profile("vitxr", deadline=None, max_examples=50)
settings.load_profile("vitxr")

#: Run by themselves, in environments of their own: see the Makefile.
collect_ignore = ["base", "timm"]


def make_vit(image_size=(32, 48), patch_size=8, dead=(), layers=3, seed=0, **options):
    """A small ViT with random weights; channels in ``dead`` never become positive."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        **{
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "num_labels": 5,
            **options,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for block in module.vit.layers:
            block.mlp.fc2.bias[list(dead)] = -1e4
    return module


@pytest.fixture(scope="session")
def vit():
    """A ViT that takes 32 x 48 px: a 4 x 6 grid, 48 channels, 3 blocks."""
    return make_vit()


@pytest.fixture(scope="session")
def model(vit):
    import vitxr

    return vitxr.load_model(vit)


@pytest.fixture(scope="session")
def images():
    """Three 32 x 48 px images, uint8 (image, row, col, channel)."""
    return np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def stim(images):
    import vitxr

    return vitxr.open_images({"noise": images[:2], "other": images[2:]})


@pytest.fixture(scope="session")
def ds(stim, model):
    """All blocks under the notebook's shifts, computed."""
    import vitxr

    return vitxr.extract(
        stim, model, shifts=vitxr.ShiftGrid(11, "raster"), preprocess="raw"
    ).compute()


def _lacking(reporter):
    """Tests that were skipped because something is missing, and not for the platform's sake."""
    if not os.environ.get("VITXR_NO_SKIP") or reporter is None:
        return []
    reasons = [report.longrepr[2] for report in reporter.stats.get("skipped", [])]
    return [r for r in reasons if not r.startswith(("Skipped: not on ", "Skipped: only on "))]


def pytest_terminal_summary(terminalreporter):
    for reason in _lacking(terminalreporter):
        terminalreporter.write_line(f"VITXR_NO_SKIP is set, and a test was {reason}", red=True)


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and _lacking(session.config.pluginmanager.get_plugin("terminalreporter")):
        session.exitstatus = 1
