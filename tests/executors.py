"""What the tests of executors share: eight images, models saved in folders, what a run makes."""

import re

import numpy as np
import xarray as xr
from conftest import make_vit
from forked import records

import vitxr

#: What is said of the model that overflows, by every executor.
OVERFLOW = (
    r"(?s)`activation` has .* not finite, first at image '.*', shift \(0, 0\), layer 1.*float16"
)


def eight():
    """Eight images: as many units."""
    pixels = np.random.default_rng(1).integers(0, 256, (8, 32, 48, 3), dtype=np.uint8)
    return vitxr.open_images(pixels)


def saved(folder, overflowing=False):
    """A model that each process can load; the values of its second block may overflow float16."""
    module = make_vit()
    if overflowing:
        module.vit.layers[1].mlp.fc2.bias.data[3] = 1e30
    module.save_pretrained(folder)
    return vitxr.load_model(folder)


def extract(stim, model, **options):
    return vitxr.extract(
        stim,
        model,
        **{
            "layers": [0, 1],
            "variables": ["activation", "logits"],
            "shifts": vitxr.ShiftGrid(11),
            "preprocess": "raw",
            "progress": False,
            "batch_size": 15,
            **options,
        },
    )


def reported(caught):
    """Images that warnings of activations name, in their order."""
    found = [re.search("`activation` .* first at image '(.*?)'", str(w.message)) for w in caught]
    return sorted(f[1] for f in found if f)


def check(store, expected):
    """A store is whole, and what another executor makes, up to rounding."""
    xr.testing.assert_allclose(vitxr.open(store).compute(), expected, rtol=1e-4, atol=1e-5)
    assert vitxr.verify(store, progress=False).sizes["shard"] == 0
    assert records(store) == list(range(8))
