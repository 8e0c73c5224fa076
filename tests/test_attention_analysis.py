"""Attention: against literal transcriptions on transformers' own weights, and identities."""

import copy

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import make_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import vitxr
from vitxr.analysis import (
    attention_distance,
    attention_entropy,
    attention_map,
    attention_rollout,
    mass_mask,
)
from vitxr.errors import ArgumentError, DataError
from vitxr.names import validate

GRID = (4, 3)  # of patches of 8 x 16 px


@pytest.fixture(scope="module")
def module():
    """A ViT of 32 x 48 px and patches that are not square, whose heads differ."""
    module = make_vit(patch_size=(8, 16))
    with torch.no_grad():
        for block in module.vit.layers:
            block.attention.q_proj.weight *= 20
            block.attention.k_proj.weight *= 20
    return module


@pytest.fixture(scope="module")
def att(module):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    return vitxr.extract(
        vitxr.open_images({"noise": images}),
        vitxr.load_model(module),
        shifts=vitxr.ShiftGrid(16),
        variables=["attention"],
        preprocess="raw",
    )


@pytest.fixture(scope="module")
def theirs(module):
    """(layer, head, query, key) of the second image, shifted by (16, 32), by transformers."""
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    frame = np.roll(images[1], (16, 32), (0, 1)).transpose(2, 0, 1)[None].astype("float32")
    eager = copy.deepcopy(module)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(torch.tensor(frame), output_attentions=True)
    return np.stack([a[0].numpy() for a in out.attentions]).astype(float)


def one(array):
    return array.isel(image=1, shift_y=1, shift_x=2)


def synthetic(weights, prefix=1, grid=(2, 3), patch=(4, 8), **attrs):
    """A Dataset of given weights (..., head, query, key)."""
    dims = ("image", "layer", "head", "query", "key")[-weights.ndim :]
    return xr.Dataset(
        {"attention": (dims, weights)},
        attrs={
            "prefix_tokens": prefix,
            "prefix_names": ", ".join(["class", "register_0", "register_1"][:prefix]),
            "input_height": grid[0] * patch[0],
            "input_width": grid[1] * patch[1],
            "patch_height": patch[0],
            "patch_width": patch[1],
            **attrs,
        },
    )


def refuse(*_args, **_kwargs):
    raise AssertionError("a lazy function computed")


def softmax(seed, shape):
    x = np.exp(np.random.default_rng(seed).normal(size=shape) * 2)
    return x / x.sum(-1, keepdims=True)


def test_map_is_a_row_on_the_grid(att, theirs):
    m = one(validate(attention_map(att, (2, 1)).to_dataset(name="attention_map")).attention_map)
    assert m.dims == ("layer", "head", "patch_row", "patch_col")
    token = 1 + 2 * 3 + 1
    for row in range(4):
        for col in range(3):
            np.testing.assert_allclose(
                m.sel(patch_row=row, patch_col=col),
                theirs[:, :, token, 1 + row * 3 + col],
                atol=1e-6,
            )
    c = one(attention_map(att))
    np.testing.assert_allclose(c, theirs[:, :, 0, 1:].reshape(3, 4, *GRID), atol=1e-6)
    assert c.attrs["query"] == "class"
    assert c.label.item() == "noise"


def literal_rollout(weights, fusion, residual):
    """Abnar & Zuidema's recursion, with loops."""
    tokens = weights.shape[-1]
    rollout = np.eye(tokens)
    for heads in weights:
        mixed = np.empty((tokens, tokens))
        for q in range(tokens):
            for k in range(tokens):
                fused = {"mean": np.mean, "max": max, "min": min}[fusion](heads[:, q, k])
                mixed[q, k] = (1 - residual) * fused + residual * (q == k)
            mixed[q] /= sum(mixed[q])
        rollout = mixed @ rollout
    return rollout


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("residual", [0.5, 0.0, 0.3])
def test_rollout_is_the_published_recursion(att, theirs, fusion, residual):
    expected = literal_rollout(theirs, fusion, residual)
    whole = one(attention_rollout(att, None, fusion, residual))
    np.testing.assert_allclose(whole, expected, atol=2e-6)
    np.testing.assert_allclose(whole.sum("key"), 1, atol=1e-5)
    for query, token in (("class", 0), ((3, 2), 12)):
        row = one(attention_rollout(att, query, fusion, residual))
        np.testing.assert_allclose(row, expected[token, 1:].reshape(GRID), atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "out", "rtol"),
    [("float16", "float32", 1e-5), ("float32", "float32", 1e-5), ("float64", "float64", 1e-12)],
)
def test_rollout_in_half_and_in_double_precision(dtype, out, rtol):
    weights = softmax(0, (3, 2, 7, 7)).astype(dtype)
    expected = literal_rollout(weights.astype(float), "max", 0.3)
    whole = attention_rollout(synthetic(weights), None, "max", 0.3)
    row = attention_rollout(synthetic(weights), (1, 2), "max", 0.3)
    np.testing.assert_allclose(whole, expected, rtol=rtol)
    np.testing.assert_allclose(row, expected[6, 1:].reshape(2, 3), rtol=rtol)
    assert whole.dtype == row.dtype == out
    assert [row.attrs[k] for k in ("query", "fusion", "residual")] == [[1, 2], "max", 0.3]
    assert whole.attrs["query"] == "all"


def test_rollout_of_some_layers(att, theirs):
    some = attention_rollout(att.isel(layer=[1, 2]), None)
    np.testing.assert_allclose(one(some), literal_rollout(theirs[1:], "mean", 0.5), atol=2e-6)
    assert some.attrs["layers"] == "1 to 2"
    last = one(attention_rollout(att.isel(layer=2), None))
    np.testing.assert_allclose(last, literal_rollout(theirs[2:], "mean", 0.5), atol=2e-6)


@settings(max_examples=10)
@given(
    layers=st.integers(1, 4),
    heads=st.integers(1, 3),
    prefix=st.integers(0, 3),
    rows=st.integers(1, 4),
    cols=st.integers(1, 4),
    fusion=st.sampled_from(["mean", "max", "min"]),
    seed=st.integers(0, 99),
    chunk=st.integers(1, 3),
)
def test_chunked_equals_eager_and_rows_sum_to_one(
    layers, heads, prefix, rows, cols, fusion, seed, chunk
):
    tokens = prefix + rows * cols
    ds = synthetic(softmax(seed, (2, layers, heads, tokens, tokens)), prefix, (rows, cols))
    lazy = ds.chunk({"image": 1, "layer": chunk, "head": chunk, "query": chunk + 1, "key": 3})
    both = [
        lambda d: attention_rollout(d, None, fusion),
        lambda d: attention_rollout(d, (rows - 1, 0), fusion),
        lambda d: attention_map(d, (0, cols - 1)),
        attention_distance,
        attention_entropy,
        lambda d: mass_mask(attention_map(d, (0, 0)), 0.7),
    ]
    for f in both:
        with dask.config.set(scheduler=refuse):
            later = f(lazy)
        assert later.chunks is not None
        xr.testing.assert_allclose(later.compute(), f(ds))
        assert later.dtype == f(ds).dtype
    whole = attention_rollout(ds, None, fusion)
    np.testing.assert_allclose(whole.sum("key"), 1)
    assert (whole >= 0).all()


def literal_distance(weights, prefix, grid, patch):
    """Weighted mean distance between patch centres, with loops over patches."""
    total = []
    places = [(r * patch[0], c * patch[1]) for r in range(grid[0]) for c in range(grid[1])]
    for q, (y, x) in enumerate(places):
        row = weights[prefix + q, prefix:]
        apart = [np.hypot(y - v, x - u) for v, u in places]
        total.append(np.dot(row / row.sum(), apart))
    return np.mean(total)


def test_distance_is_the_literal_one(att, theirs):
    px, steps = one(attention_distance(att)), one(attention_distance(att, "patch"))
    for layer in range(3):
        for head in range(4):
            given = theirs[layer, head]
            assert px[layer, head] == pytest.approx(literal_distance(given, 1, GRID, (8, 16)), 1e-5)
            assert steps[layer, head] == pytest.approx(
                literal_distance(given, 1, GRID, (1, 1)), 1e-5
            )
    assert (px.attrs["units"], steps.attrs["units"]) == ("px", "patch")


def test_uniform_attention_has_known_distance_and_entropy():
    tokens = 2 + 6
    ds = synthetic(np.full((1, 2, tokens, tokens), 1 / tokens), prefix=2)
    # 2 x 3 patches of 4 x 8 px: of 36 ordered pairs 6 lie 0 apart, 6 by 4, 8 by 8, 8 by sqrt(80),
    # 4 by 16 and 4 by sqrt(272).
    known = (6 * 4 + 8 * 8 + 8 * np.sqrt(80) + 4 * 16 + 4 * np.sqrt(272)) / 36
    np.testing.assert_allclose(attention_distance(ds), known)
    np.testing.assert_allclose(attention_entropy(ds), np.log(tokens))
    sharp = synthetic(np.broadcast_to(np.eye(tokens), (1, 2, tokens, tokens)), prefix=2)
    np.testing.assert_allclose(attention_distance(sharp), 0)
    np.testing.assert_allclose(attention_entropy(sharp), 0)


def test_some_queries_are_where_they_are():
    """Attention of a selection of tokens, by their numbers."""
    weights = softmax(0, (2, 3, 8, 8))
    ds = synthetic(weights, prefix=2).assign_coords(query=np.arange(8))
    some = ds.isel(query=[7, 1, 3])
    place = np.array([(r * 4, c * 8) for r in range(2) for c in range(3)])
    apart = np.linalg.norm(place[:, None] - place[None], axis=-1)
    rows = weights[:, :, [7, 3]]
    kept = rows[..., 2:] / rows[..., 2:].sum(-1, keepdims=True)
    true = (kept * apart[[5, 1]]).sum(-1).mean(-1)
    np.testing.assert_allclose(attention_distance(some), true)
    np.testing.assert_allclose(attention_entropy(some), -(rows * np.log(rows)).sum(-1).mean(-1))
    np.testing.assert_array_equal(attention_map(some, (0, 1)), attention_map(ds, (0, 1)))


def test_queries_without_weight_on_patches_do_not_count():
    weights = softmax(0, (1, 1, 7, 7))
    weights[..., 3, :] = np.eye(7)[0]
    ds = synthetic(weights)
    rows = [r for r in range(1, 7) if r != 3]
    kept = weights[0, 0, rows, 1:] / weights[0, 0, rows, 1:].sum(-1, keepdims=True)
    place = np.array([(r * 4, c * 8) for r in range(2) for c in range(3)])
    apart = np.linalg.norm(place[:, None] - place[None], axis=-1)[np.array(rows) - 1]
    assert attention_distance(ds).item() == pytest.approx((kept * apart).sum(-1).mean())
    weights[..., 1:, :] = np.eye(7)[0]
    assert np.isnan(attention_distance(synthetic(weights))).all()


def test_rows_that_do_not_sum_to_one():
    """As rounded ones do not: entropy and distance are of what they sum to."""
    weights = softmax(0, (2, 3, 7, 7))
    for measure in (attention_entropy, attention_distance):
        np.testing.assert_allclose(measure(synthetic(weights * 0.7)), measure(synthetic(weights)))


def test_nan_is_in_all_that_it_is_part_of():
    """As of a store that is not whole."""
    weights = softmax(0, (2, 3, 7, 7))
    weights[1, 0, 4] = np.nan
    ds = synthetic(weights)
    for result in (attention_distance(ds), attention_entropy(ds)):
        where = np.isnan(result.values).reshape(2, 3)
        assert where.tolist() == [[False] * 3, [True, False, False]]
    m = attention_map(ds, (1, 0))  # token 4
    assert np.isnan(m.values).any(axis=(-2, -1)).ravel().tolist() == [False] * 3 + [
        True,
        False,
        False,
    ]
    lost = ~mass_mask(m).any(("patch_row", "patch_col"))
    assert lost.values.ravel().tolist() == [False] * 3 + [True, False, False]
    for fusion in ("mean", "max", "min"):
        lost = np.isnan(attention_rollout(ds, None, fusion))
        assert lost.any("key").values.tolist() == lost.all("key").values.tolist()
        assert np.flatnonzero(lost.any("key")).tolist() == [4]
        for token, query in enumerate(["class", (0, 0), (0, 1), (0, 2), (1, 0)]):
            row = np.isnan(attention_rollout(ds, query, fusion))
            assert row.values.all() == row.values.any() == (token == 4)


def test_entropy_is_scipys(att, theirs):
    from scipy.stats import entropy

    mine = one(attention_entropy(att))
    np.testing.assert_allclose(mine, entropy(theirs[:, :, 1:], axis=-1).mean(-1), rtol=1e-5)


def dino(attentions, threshold):
    """The mask of DINO's visualize_attention.py, one map: keep the mass ``threshold``."""
    order = np.argsort(attentions, kind="stable")
    values = attentions[order] / attentions.sum()
    kept = np.cumsum(values) > 1 - threshold
    return kept[np.argsort(order)]


@given(n=st.integers(1, 30), mass=st.floats(0.01, 0.99), seed=st.integers(0, 999))
def test_mask_is_dinos_and_the_smallest(n, mass, seed):
    values = np.random.default_rng(seed).random(n)
    m = mass_mask(xr.DataArray(values[None], dims=("patch_row", "patch_col")), mass)
    np.testing.assert_array_equal(m.values[0], dino(values, mass))
    kept = values[m.values[0]]
    assert kept.sum() >= mass * values.sum() * (1 - 1e-8)
    assert kept.sum() - kept.min() < mass * values.sum()


def test_mask_ties_and_edges():
    grid = ("patch_row", "patch_col")
    flat = xr.DataArray(np.full((7, 7), 1 / 49, "float32"), dims=grid)
    assert mass_mask(flat, 21 / 49).values.ravel().tolist() == [True] * 21 + [False] * 28
    assert mass_mask(flat, 1.0).all()
    assert not mass_mask(flat * 0).any()
    transposed = mass_mask(flat.T, 21 / 49)
    assert transposed.dims == ("patch_col", "patch_row")
    assert transposed.values[:, :3].all()


def test_mask_of_equal_patches_counts_them():
    """Whatever their sums are rounded to; of equal ones the first, row by row."""
    for n in range(1, 41):
        flat = xr.DataArray(np.full((1, n), 1 / n), dims=("patch_row", "patch_col"))
        for k in range(1, n + 1):
            assert mass_mask(flat, k / n).values[0].tolist() == [True] * k + [False] * (n - k)
    many = np.where(np.random.default_rng(0).random((20, 30)) < 0.5, 3.0, 1.0)
    some = mass_mask(xr.DataArray(many, dims=("patch_row", "patch_col")), 0.9).values.ravel()
    high = many.ravel() == 3
    assert some[high].all()
    low = some[~high]
    assert 0 < low.sum() < low.size
    assert (np.diff(low.astype(int)) <= 0).all()


def test_names_of_prefix_tokens():
    ds = synthetic(softmax(0, (1, 8, 8)), prefix=2)
    np.testing.assert_allclose(
        attention_map(ds, "register_0"), ds.attention.values[:, 1, 2:].reshape(1, 2, 3)
    )
    with pytest.raises(ArgumentError, match="prefix tokens are class, register_0"):
        attention_map(ds, "distillation")
    none = synthetic(softmax(0, (1, 6, 6)), prefix=0)
    with pytest.raises(ArgumentError, match="prefix tokens are none"):
        attention_map(none)
    with pytest.raises(ArgumentError, match="or a prefix token \\(there is none\\)"):
        attention_map(none, (2, 0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: attention_map(d, (2, 0)), ArgumentError, r"0 <= row < 2 and 0 <= col < 3"),
        (lambda d: attention_map(d, (0, -1)), ArgumentError, "expected .row, col."),
        (lambda d: attention_map(d, (0, 1.0)), ArgumentError, "expected .row, col."),
        (lambda d: attention_map(d, 5), ArgumentError, "expected .row, col."),
        (lambda d: attention_map(d.attention), DataError, "expected a Dataset.*Extract it"),
        (lambda d: attention_map(d.drop_vars("attention")), DataError, "given: none"),
        (lambda d: attention_map(d.isel(head=0)), DataError, "has dims"),
        (lambda d: attention_map(d.drop_attrs()), DataError, "lacks the attributes input_height"),
        (lambda d: attention_map(d.isel(key=slice(3))), DataError, "3 keys; expected 1 prefix"),
        (lambda d: attention_rollout(d, fusion="sum"), ArgumentError, "'mean', 'max', 'min'"),
        (lambda d: attention_rollout(d, residual=1), ArgumentError, "residual=1"),
        (lambda d: attention_rollout(d, residual=True), ArgumentError, "residual=True"),
        (lambda d: attention_rollout(d.isel(query=[0])), DataError, "1 of 7 queries"),
        (
            lambda d: attention_rollout(d.assign_coords(layer=[0, 2])),
            DataError,
            r"layers \[0, 2\]; a rollout needs all",
        ),
        (
            lambda d: attention_rollout(d.assign_attrs(heads=4)),
            DataError,
            "2 of 4 heads; the rollout fuses all",
        ),
        (lambda d: attention_map(d.isel(query=[1, 2])), DataError, "not hold the query token"),
        (lambda d: attention_entropy(d.isel(query=[0])), DataError, "prefix tokens only"),
        (lambda d: attention_distance(d, "mm"), ArgumentError, "unit='mm'"),
        (lambda d: mass_mask(d.attention), DataError, "dims patch_row and patch_col"),
        (lambda d: mass_mask(attention_map(d), 0), ArgumentError, "mass=0"),
        (lambda d: mass_mask(attention_map(d), 1.1), ArgumentError, "mass=1.1"),
    ],
)
def test_refused(call, error, message):
    ds = synthetic(softmax(0, (1, 2, 2, 7, 7)))
    ds = ds.assign_coords(query=np.arange(7), layer=[0, 1])
    with pytest.raises(error, match=message):
        call(ds)


def test_accessor(att):
    xr.testing.assert_identical(att.vit.attention_map((1, 2)), attention_map(att, (1, 2)))
    xr.testing.assert_identical(att.vit.attention_rollout(None), attention_rollout(att, None))
    xr.testing.assert_identical(
        att.vit.attention_distance("patch"), attention_distance(att, "patch")
    )
    xr.testing.assert_identical(att.vit.attention_entropy(), attention_entropy(att))
    m = attention_map(att)
    xr.testing.assert_identical(m.vit.mass_mask(0.3), mass_mask(m, 0.3))
    with pytest.raises(AttributeError, match="a method of an extraction"):
        m.vit.attention_rollout()


def test_a_mask_of_negative_values_is_refused():
    m = xr.DataArray([[0.5, -0.1]], dims=("patch_row", "patch_col"))
    for given_map in (m, m.chunk()):
        with pytest.raises(DataError, match=r"negative values.*clip\(min=0\)"):
            mass_mask(given_map).compute()
