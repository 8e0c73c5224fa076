"""CKA, dissimilarities and RSA, against the published formulas, scipy, and their invariances."""

import itertools
from unittest import mock

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr

import vitxr
from vitxr.analysis import _grams, _walk
from vitxr.errors import ArgumentError, DataError
from vitxr.names import LATTICE, SHIFT, validate
from vitxr.stimuli.shifts import ShiftGrid


def make(seed=0, n=7, layers=3, maps=4, step=8, dtype="float64", scheme="grid"):
    """Images that layers share more or less of, at 2 x 2 shifts of a 2 x 3 grid."""
    rng = np.random.default_rng(seed)
    lattice = ShiftGrid(step, scheme).lattice(16, 16)
    shape = (n, lattice.sizes["shift_y"], lattice.sizes["shift_x"], layers, maps, 2, 3)
    common = rng.normal(size=(n, *shape[1:3], 1, maps, 2, 3))
    values = common + rng.normal(size=shape) * np.arange(1, layers + 1)[:, None, None, None] / 2
    return label((values + 3).astype(dtype), lattice)


def label(values, lattice):
    ds = lattice.assign_coords(
        image=[f"i{k}" for k in range(len(values))],
        layer=np.arange(values.shape[3]) * 2,
        feature_map=np.arange(values.shape[4]),
        patch_row=np.arange(values.shape[5]),
        patch_col=np.arange(values.shape[6]),
    ).assign_coords(
        sha256=("image", [f"{k:064x}" for k in range(len(values))]),
        label=("image", [str(k % 2) for k in range(len(values))]),
    )
    ds["activation"] = (LATTICE, values)
    ds.attrs = {"model": "planted", "patch_height": 8, "patch_width": 8}
    return ds


def rows(ds, layer, y=0, x=0):
    """Features of each image, (image, feature)."""
    part = ds.activation.isel(layer=layer, shift_y=y, shift_x=x)
    return part.values.reshape(ds.sizes["image"], -1).astype(np.float64)


def hsic_0(k, m):
    """Kornblith et al. (2019), section 3: tr(K H L H) / (n - 1)^2."""
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return np.trace(k @ h @ m @ h) / (n - 1) ** 2


def hsic_1(k, m):
    """Nguyen et al. (2021), equation 3, which is Song et al. (2012), equation 5."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    return (
        np.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


def literal_cka(pairs, hsic):
    """Nguyen et al. (2021), equation 2: sums over batches of images."""
    grams = [(x @ x.T, y @ y.T) for x, y in pairs]
    cross = sum(hsic(k, m) for k, m in grams)
    own, other = (sum(hsic(g[i], g[i]) for g in grams) for i in (0, 1))
    return cross / np.sqrt(own * other)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_cka_is_the_published_formula(unbiased, dtype):
    ds = make(dtype=dtype)
    c = validate(ds.vit.cka(unbiased=unbiased, batch_size=7))
    frames = list(np.ndindex(2, 2))
    for a, b in itertools.product(range(3), repeat=2):
        pairs = [(rows(ds, a, *f), rows(ds, b, *f)) for f in frames]
        true = literal_cka(pairs, hsic_1 if unbiased else hsic_0)
        np.testing.assert_allclose(c.cka[a, b], true, atol=1e-9 if dtype == "float64" else 1e-5)
    s = ds.vit.cka(across="shift", unbiased=unbiased, batch_size=7)
    for (a, b), layer in itertools.product(itertools.product(frames, repeat=2), range(3)):
        true = literal_cka(
            [(rows(ds, layer, *a), rows(ds, layer, *b))], hsic_1 if unbiased else hsic_0
        )
        found = s.cka.isel(
            layer=layer, shift_y=a[0], shift_x=a[1], other_shift_y=b[0], other_shift_x=b[1]
        )
        np.testing.assert_allclose(found, true, atol=1e-9 if dtype == "float64" else 1e-5)


def test_batches_are_summed():
    ds = make(n=14).isel(shift_y=[0], shift_x=[1])
    c = ds.vit.cka(batch_size=5, random_state=3)
    parts = _grams.batches(14, 5, 3)
    assert sorted(np.concatenate(parts)) == list(range(14))
    assert [len(p) for p in parts] == [5, 5, 4]
    for a, b in itertools.product(range(3), repeat=2):
        pairs = [(rows(ds, a)[p], rows(ds, b)[p]) for p in parts]
        np.testing.assert_allclose(c.cka[a, b], literal_cka(pairs, hsic_1))
    assert (c.attrs["batches"], c.attrs["images"]) == (3, 14)


def test_batches_are_drawn_at_random():
    """Images sorted by class come together with others, by a seed."""
    parts = _grams.batches(100, 50, 0)
    assert all(15 < (part < 50).sum() < 35 for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert not np.array_equal(parts[0], _grams.batches(100, 50, 1)[0])


@given(n=st.integers(4, 12), seed=st.integers(0, 999))
def test_centring_gives_the_published_hsic(n, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, 5)) + 2
    k, m = x @ x.T, y @ y.T
    one = (_grams.u_centred(k) * _grams.u_centred(m)).sum() / (n * (n - 3))
    np.testing.assert_allclose(one, hsic_1(k, m), rtol=1e-7, atol=1e-9)
    nil = (_grams.centred(k) * _grams.centred(m)).sum() / (n - 1) ** 2
    np.testing.assert_allclose(nil, hsic_0(k, m), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_does_not_see_rotations_and_scale(unbiased):
    """Nor where on the patch grid things lie."""
    from scipy.stats import ortho_group

    ds = make().isel(shift_y=[0], shift_x=[0], layer=[0, 1])
    x = rows(ds, 0)
    rotated = 3.7 * x @ ortho_group.rvs(x.shape[1], random_state=0) + 5
    ds["activation"][:, 0, 0, 1] = rotated.reshape(len(x), 4, 2, 3)
    c = ds.vit.cka(unbiased=unbiased)
    np.testing.assert_allclose(c.cka, 1, atol=1e-9)
    rolled = ds.assign(activation=ds.activation.roll(patch_col=1, patch_row=1))
    np.testing.assert_allclose(ds.vit.cka(rolled, unbiased=unbiased).cka, 1, atol=1e-9)


def test_independent_representations():
    """Few images and many features: the biased estimate says that they are alike."""
    rng = np.random.default_rng(0)
    lattice = ShiftGrid(8).lattice(16, 16)
    ds = label(rng.normal(size=(12, 2, 2, 2, 100, 2, 3)), lattice)
    true = ds.vit.cka()
    biased = ds.vit.cka(unbiased=False)
    assert abs(float(true.cka[0, 1])) < 0.1
    assert float(biased.cka[0, 1]) > 0.9
    # The floors say so of each.
    assert abs(float(true.cka_floor_mean[0, 1])) < 0.05
    assert float(true.cka_floor_quantile[0, 1]) > float(true.cka[0, 1])
    assert float(biased.cka_floor_mean[0, 1]) > 0.9
    np.testing.assert_allclose(np.diag(true.cka), 1)
    # Each layer's own floor is not 1: only the images of one side are shuffled.
    assert (np.diag(true.cka_floor_mean) < 0.3).all()


def test_floors_are_of_permuted_images():
    ds = make(n=6).isel(shift_y=[0])
    c = ds.vit.cka(shuffles=30, random_state=2)
    rng = np.random.default_rng((2, 1))
    found = []
    for _ in range(30):
        p = rng.permutation(6)
        pairs = [(rows(ds, 0, 0, x), rows(ds, 2, 0, x)) for x in (0, 1)]
        cross = sum(hsic_1(x @ x.T, y[p] @ y[p].T) for x, y in pairs)
        own, other = (sum(hsic_1(v[i] @ v[i].T, v[i] @ v[i].T) for v in pairs) for i in (0, 1))
        found.append(cross / np.sqrt(own * other))
    np.testing.assert_allclose(c.cka_floor_mean[0, 2], np.mean(found))
    np.testing.assert_allclose(
        c.cka_floor_quantile[0, 2], np.quantile(found, 0.95, method="weibull")
    )
    xr.testing.assert_identical(c, ds.vit.cka(shuffles=30, random_state=2))


def test_large_values_with_small_differences():
    """Features a thousand times further from zero than apart, in float32."""
    ds = make(n=9)
    far = ds.assign(activation=(ds.activation * 0.01 + 10 * ds.feature_map).astype("float32"))
    exact = far.assign(activation=far.activation.astype("float64"))
    np.testing.assert_allclose(far.vit.cka().cka, exact.vit.cka().cka, atol=1e-6)
    np.testing.assert_allclose(far.vit.rdm(), exact.vit.rdm(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", ["correlation", "euclidean"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rdm_is_scipys(metric, dtype):
    ds = make(dtype=dtype)
    d = validate(ds.vit.rdm(metric).to_dataset()).dissimilarity
    for layer, y, x in np.ndindex(3, 2, 2):
        true = squareform(pdist(rows(ds, layer, y, x), metric))
        np.testing.assert_allclose(d[:, y, x, layer], true, atol=1e-9)
    assert (d.image == ds.image).all()
    assert (d.other_image.values == ds.image.values).all()
    assert (d.label == ds.label).all()
    assert d.attrs["metric"] == metric


@pytest.mark.parametrize("metric", ["correlation", "euclidean"])
def test_rsa_is_scipys(metric):
    ds = make(n=6)
    r = validate(ds.vit.rsa(metric=metric, shuffles=25, random_state=5))
    frames = list(np.ndindex(2, 2))
    far = {
        (layer, *f): pdist(rows(ds, layer, *f), metric)
        for layer, f in itertools.product(range(3), frames)
    }
    for a, b in itertools.product(range(3), repeat=2):
        true = np.mean([spearmanr(far[a, *f], far[b, *f])[0] for f in frames])
        np.testing.assert_allclose(r.rsa[a, b], true, atol=1e-12)
    s = ds.vit.rsa(across="shift", metric=metric)
    true = spearmanr(far[1, 0, 1], far[1, 1, 0])[0]
    np.testing.assert_allclose(s.rsa.isel(layer=1)[0, 1, 1, 0], true)
    rng = np.random.default_rng((5, 1))
    shuffled = []
    for p in [rng.permutation(6) for _ in range(25)]:
        moved = [squareform(squareform(far[2, *f])[np.ix_(p, p)]) for f in frames]
        each = [spearmanr(far[0, *f], m)[0] for f, m in zip(frames, moved, strict=True)]
        shuffled.append(np.mean(each))
    np.testing.assert_allclose(r.rsa_floor_mean[0, 2], np.mean(shuffled))
    floor = np.quantile(shuffled, 0.95, method="weibull")
    np.testing.assert_allclose(r.rsa_floor_quantile[0, 2], floor)


def test_rsa_with_ties():
    ds = make(n=6).isel(shift_y=[0], shift_x=[0])
    ds["activation"] = ds.activation.round()
    a, b = (pdist(rows(ds, k), "euclidean") for k in (0, 1))
    assert len(set(a)) < len(a)
    np.testing.assert_allclose(ds.vit.rsa(metric="euclidean").rsa[0, 1], spearmanr(a, b)[0])


@pytest.mark.parametrize("metric", ["correlation", "euclidean"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rsa_of_what_ties_but_for_rounding(metric, dtype):
    """Images that are there twice; of correlation, with another scale and offset."""
    from scipy.stats import rankdata

    ds = make(n=11, dtype=dtype).isel(shift_y=[0], shift_x=[0])
    x = ds.activation.values
    x[7:] = x[:4]
    if metric == "correlation":
        x[7:] = np.float64([0.3, 0.7, 3, 11]).reshape(4, *[1] * 6) * x[:4].astype(float) - 0.1
    far = [pdist(rows(ds, k), metric) for k in range(3)]
    digits = 12 if dtype == "float64" or metric == "euclidean" else 5
    if dtype == "float64":
        true = [[spearmanr(a.round(digits), b.round(digits))[0] for a in far] for b in far]
        np.testing.assert_allclose(ds.vit.rsa(metric=metric).rsa, true, atol=1e-12)
    if metric == "correlation" and dtype == "float64":  # there was something to tie
        assert not np.array_equal(rankdata(far[0]), rankdata(far[0].round(digits)))


@given(
    levels=st.lists(st.integers(0, 5), min_size=2, max_size=20),
    size=st.sampled_from([1e-3, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_ranks_do_not_see_rounding(levels, size, seed):
    from scipy.stats import rankdata

    exact = np.array([levels, levels[::-1]], float) * size
    noise = np.full(exact.shape, 1e-13 * size)
    off = noise * np.random.default_rng(seed).uniform(-0.99, 0.99, exact.shape)
    np.testing.assert_array_equal(_grams.ranks(exact + off, noise), rankdata(exact, axis=-1))
    np.testing.assert_array_equal(
        _grams.ranks(exact + off, 0 * noise), rankdata(exact + off, axis=-1)
    )
    exact[0, 0] = np.nan
    assert np.isnan(_grams.ranks(exact, noise)).all(axis=-1).tolist() == [True, False]


def test_what_differs_by_little_does_not_tie():
    """Distances a thousand-millionth apart: more than rounding."""
    ds = make(n=5).isel(shift_y=[0], shift_x=[0])
    ds["activation"][:, 0, 0, 0] = 0
    for image, more in enumerate((0, 1, 3, 7, 12)):  # whose sums in pairs all differ
        ds["activation"][image, 0, 0, 0, image % 4, image // 4, 0] = 1 + more * 1e-9
    far = [pdist(rows(ds, k), "euclidean") for k in (0, 1)]
    assert len(set(far[0])) == 10
    np.testing.assert_allclose(ds.vit.rsa(metric="euclidean").rsa[0, 1], spearmanr(*far)[0])


def test_ranks_of_images_that_are_zero():
    """Their products have no rounding at all."""
    ds = make(n=8).isel(shift_y=[0], shift_x=[0])
    ds["activation"][2:5] = 0
    far = [pdist(rows(ds, k), "euclidean") for k in (0, 1)]
    np.testing.assert_allclose(ds.vit.rsa(metric="euclidean").rsa[0, 1], spearmanr(*far)[0])


@settings(max_examples=5)
@given(data=st.data())
def test_chunked_equals_eager(data):
    ds = make(n=6, dtype="float32")
    sizes = ds.activation.sizes
    chunks = {
        str(d): data.draw(st.integers((k + 1) // 2, k), label=str(d)) for d, k in sizes.items()
    }
    lazy = ds.assign(activation=ds.activation.variable.chunk(chunks))
    with dask.config.set(scheduler="sync"):
        xr.testing.assert_allclose(lazy.vit.cka(), ds.vit.cka(), atol=1e-5)
        xr.testing.assert_allclose(lazy.vit.rsa(), ds.vit.rsa(), atol=1e-9)
        xr.testing.assert_allclose(lazy.vit.rdm(), ds.vit.rdm(), atol=1e-9)


@pytest.mark.parametrize("limits", [(1, 1), (3000, 1), (1, 10**6)])
@pytest.mark.parametrize("across", ["layer", "shift"])
def test_blocks_of_the_lattice_change_nothing(limits, across, monkeypatch):
    ds = make(n=9, step=4)
    whole = ds.vit.cka(across=across, batch_size=5), ds.vit.rsa(across=across), ds.vit.rdm()
    lazy = ds.chunk(image=2, shift_y=2, shift_x=3, layer=2, feature_map=3)
    monkeypatch.setattr(_walk, "_BLOCK_BYTES", limits[0])
    monkeypatch.setattr(_walk, "_CHUNK_BYTES", limits[1])
    assert len(_walk.blocks([lazy.activation], [5, 4])) > 1
    batches = [np.arange(5), np.arange(5, 9)]
    assert len(_walk.groups([lazy.activation], batches)) == (2 if limits[1] == 1 else 1)
    with dask.config.set(scheduler="sync"):
        cut = lazy.vit.cka(across=across, batch_size=5), lazy.vit.rsa(across=across), lazy.vit.rdm()
    for a, b in zip(whole, cut, strict=True):
        xr.testing.assert_allclose(a, b)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    chunk=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    other=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    images=st.lists(st.integers(4, 9), min_size=1, max_size=3),
    most=st.integers(1, 10**5),
    chunks=st.integers(1, 10**5),
)
def test_blocks_cover_the_lattice(size, chunk, other, images, most, chunks):
    x = xr.DataArray(np.zeros((30, *size, 1, 4, 2, 3)), dims=LATTICE)
    a, b = (x.chunk(dict(zip(SHIFT, c, strict=True))) for c in (chunk, other))
    with mock.patch.multiple(_walk, _BLOCK_BYTES=most, _CHUNK_BYTES=chunks):
        for arrays in ([x], [a], [a, b]):
            seen = np.zeros(size, int)
            for block in _walk.blocks(arrays, images):
                seen[block] += 1
            assert (seen == 1).all()
            parts = np.split(np.arange(sum(images)), np.cumsum(images)[:-1])
            covered = [i for group in _walk.groups(arrays, parts) for i in group]
            assert covered == list(range(len(images)))


def test_layers_and_batches_by_turns_where_matrices_do_not_fit(monkeypatch):
    ds = make(n=9)
    whole = ds.vit.cka(across="shift", batch_size=5), ds.vit.rsa(across="shift")
    for size in (16 * 81 * 8, 2 * 16 * 81 * 8, 16 * 25 * 8):  # one layer, two, one batch
        monkeypatch.setattr(_walk, "_GRAM_BYTES", size)
        xr.testing.assert_allclose(ds.vit.cka(across="shift", batch_size=5), whole[0])
        if size >= 16 * 81 * 8:
            xr.testing.assert_allclose(ds.vit.rsa(across="shift"), whole[1])


def test_chunks_are_not_cut_where_there_is_room():
    x = xr.DataArray(np.zeros((8, 7, 6, 1, 4, 2, 3)), dims=LATTICE).chunk(shift_y=3, shift_x=4)
    frame = 8 * 4 * 6 * 8  # bytes of all images, maps and patches
    with mock.patch.multiple(_walk, _BLOCK_BYTES=frame, _CHUNK_BYTES=12 * frame):
        found = _walk.blocks([x], [8])
    rows, columns = (slice(0, 3), slice(3, 6), slice(6, 7)), (slice(0, 4), slice(4, 6))
    assert found == list(itertools.product(rows, columns))
    with mock.patch.multiple(_walk, _BLOCK_BYTES=frame, _CHUNK_BYTES=11 * frame):
        assert len(_walk.blocks([x], [8])) == 42
    with mock.patch.multiple(_walk, _BLOCK_BYTES=40 * frame):
        assert [b[0] for b in _walk.blocks([x], [8])] == [slice(0, 6), slice(6, 7)]
    with mock.patch.multiple(
        _walk, _BLOCK_BYTES=32 * frame
    ):  # five rows, of which chunks have three
        assert [b[0] for b in _walk.blocks([x], [8])] == [slice(0, 3), slice(3, 7)]


def test_only_what_is_asked_is_read():
    """Images of a batch alone, each block of shifts once."""
    import dask.array as da

    ds = make(n=8)
    seen = np.zeros(ds.activation.shape, int)

    class Watched:
        shape, dtype, ndim = ds.activation.shape, ds.activation.dtype, 7

        def __getitem__(self, key):
            seen[key] += 1
            return ds.activation.values[key]

    data = da.from_array(
        Watched(), chunks=(3, 2, 2, 1, 2, 2, 3), asarray=False, meta=np.empty((0,) * 7)
    )
    lazy = ds.assign(activation=(LATTICE, data))
    with dask.config.set(scheduler="sync"):
        c = lazy.vit.cka(batch_size=4)
    assert (seen == 1).all()
    xr.testing.assert_allclose(c, ds.vit.cka(batch_size=4))


def test_two_datasets_are_matched_by_name():
    a, b = make(0), make(1, maps=6, layers=2)
    mixed = b.isel(image=[3, 0, 6, 1, 5, 2, 4])
    xr.testing.assert_identical(a.vit.cka(mixed), a.vit.cka(b))
    xr.testing.assert_identical(a.vit.rsa(mixed), a.vit.rsa(b))
    c = a.vit.cka(b)
    assert c.sizes == {"layer": 3, "other_layer": 2}
    assert c.other_layer.values.tolist() == [0, 2]
    assert c.attrs["other_model"] == "planted"
    pairs = [(rows(a, 2, *f), rows(b, 1, *f)) for f in np.ndindex(2, 2)]
    np.testing.assert_allclose(c.cka[2, 1], literal_cka(pairs, hsic_1))
    r = a.vit.rsa(b)
    far = [(pdist(rows(a, 2, *f), "correlation"), pdist(rows(b, 1, *f), "correlation"))
           for f in np.ndindex(2, 2)]  # fmt: skip
    np.testing.assert_allclose(r.rsa[2, 1], np.mean([spearmanr(*pair)[0] for pair in far]))
    # Another layer of another model, across shifts.
    one, other, mixed = a.sel(layer=[4]), b.sel(layer=[2]), mixed.sel(layer=[2])
    s = one.vit.cka(other, across="shift")
    true = literal_cka([(rows(a, 2, 0, 1), rows(b, 1, 1, 1))], hsic_1)
    np.testing.assert_allclose(s.cka[0, 1, 0, 1, 1], true)
    xr.testing.assert_allclose(one.vit.cka(mixed, across="shift"), s)
    xr.testing.assert_allclose(
        one.vit.rsa(mixed, across="shift"), one.vit.rsa(other, across="shift")
    )
    # With itself under another name it is what it is with itself.
    np.testing.assert_allclose(a.vit.cka(a.copy(deep=True)).cka, a.vit.cka().cka)


def test_whole_patch_shifts_of_what_moves_along():
    """Maps that move with the image are the same representation at every shift."""
    ds = make(n=6, layers=1)
    first = ds.activation.values[:, :1, :1]
    for y, x in np.ndindex(2, 2):
        ds["activation"][:, y, x] = np.roll(first[:, 0, 0], (y, x), (-2, -1))
    s = ds.vit.cka(across="shift")
    np.testing.assert_allclose(s.cka, 1)
    assert s.cka.dims == ("shift_y", "shift_x", "layer", "other_shift_y", "other_shift_x")
    assert s.offset_y.dims == ("shift_y",)


def test_real_models(stim, model, tmp_path):
    """A model, the same one from a store, and one with other weights."""
    from conftest import make_vit

    images = np.random.default_rng(1).integers(0, 256, (8, 32, 48, 3), dtype=np.uint8)
    stim = vitxr.open_images({"noise": images})
    options = {"shifts": ShiftGrid(16), "preprocess": "raw", "progress": False}
    here = vitxr.extract(stim, model, **options).compute()
    stored = vitxr.extract(
        stim.isel(image=slice(None, None, -1)), model, store=tmp_path / "s.zarr", **options
    )
    np.testing.assert_allclose(here.vit.cka(stored).cka, here.vit.cka().cka, atol=1e-4)
    np.testing.assert_allclose(here.vit.rsa(stored).rsa, here.vit.rsa().rsa, atol=1e-2)
    another = vitxr.load_model(make_vit(seed=1, patch_size=16))
    c = here.vit.cka(vitxr.extract(stim, another, layers=[0, 2], **options))
    assert c.sizes == {"layer": 3, "other_layer": 2}
    assert (c.cka < 1).all()


@pytest.mark.parametrize("across", ["layer", "shift"])
def test_a_model_runs_once(stim, model, vit, across):
    """Over the frames of all layers and pairs, though nothing is stored."""
    images = np.random.default_rng(1).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    stim = vitxr.open_images({"noise": images})
    frames = 0

    def count(_module, given, _output):
        nonlocal frames
        frames += len(given[0])

    handle = vit.vit.embeddings.patch_embeddings.projection.register_forward_hook(count)
    try:
        ds = vitxr.extract(stim, model, shifts=ShiftGrid(16), preprocess="raw", progress=False)
        for run in (
            lambda: ds.vit.cka(across=across, batch_size=5),
            lambda: ds.vit.rsa(across=across),
            lambda: ds.vit.rdm(),
            lambda: ds.vit.equivariance().compute(),
        ):
            frames = 0
            run()
            assert frames == 9 * ds.sizes["shift_y"] * ds.sizes["shift_x"]
    finally:
        handle.remove()


@pytest.mark.parametrize("n", [5, 13, 33])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_no_similarity_is_made_of_rounding(n, dtype):
    """Features of any value that are the same for all images; images whose features are alike."""
    ds = make(n=n, dtype=dtype)
    ds["activation"][:, :, :, 1] = ds.activation[:1, :, :, 1].values
    found = [ds.vit.cka().cka, ds.vit.cka(unbiased=False, batch_size=n).cka]
    found += [ds.vit.rsa(metric=metric).rsa for metric in ("correlation", "euclidean")]
    for result in found:
        assert np.isnan(result.sel(layer=2)).all()
        assert np.isfinite(result.sel(layer=[0, 4], other_layer=[0, 4])).all()
    for metric in ("correlation", "euclidean"):
        assert (ds.vit.rdm(metric).sel(layer=2) == 0).all()
    ds["activation"][1] = 0.1
    d = ds.vit.rdm()
    assert np.isnan(d[1]).all()  # Pearson's correlation is not defined
    assert np.isfinite(d[2, ..., 3]).all()


def test_representations_that_are_all_the_same_are_nan():
    ds = make()
    ds["activation"][:, :, :, 1] = 4.0
    for result in (ds.vit.cka().cka, ds.vit.rsa().rsa):
        assert np.isnan(result.sel(layer=2)).all()
        assert np.isfinite(result.sel(layer=[0, 4], other_layer=[0, 4])).all()


def test_any_variable_on_the_patch_grid():
    ds = make()
    more = ds.assign(
        mlp_hidden=ds.activation.rename(feature_map="hidden_unit") ** 2,
        embedding=ds.activation.isel(layer=0, drop=True),
    )
    same = ds.assign(activation=ds.activation**2)
    for run in (
        lambda d, **of: d.vit.cka(**of),
        lambda d, **of: d.vit.rsa(**of, across="shift"),
        lambda d, **of: d.vit.rdm(**of).to_dataset(),
    ):
        found = run(more, variable="mlp_hidden")
        assert found.attrs.get("variable", "mlp_hidden") == "mlp_hidden"
        xr.testing.assert_allclose(found.drop_attrs(), run(same).drop_attrs())
        one = run(more, variable="embedding")
        assert one.sizes["layer"] == 1
        first = run(ds.isel(layer=[0]))
        for name in one.data_vars:
            np.testing.assert_allclose(one[name], first[name])
    with pytest.raises(DataError, match="the Dataset has no `attention_output`"):
        ds.vit.cka(variable="attention_output")


def test_what_is_missing():
    """NaN of a store that is not whole is refused, or NaN for the images and all with them."""
    ds = make()
    written = xr.DataArray(np.ones((7, 2), bool), dims=("image", "shift_y"))
    written[5, 1] = False
    partly = ds.assign_coords(written=written)
    partly["activation"] = partly.activation.where(partly.written)
    for run in (partly.vit.cka, partly.vit.rsa, lambda: ds.vit.cka(partly)):
        with pytest.raises(DataError, match=r"is NaN where it is not written yet.*has the images"):
            run()
    d, whole = partly.vit.rdm(), ds.vit.rdm()
    lost = (d.image == "i5") | (d.other_image == "i5")
    assert np.isnan(d.isel(shift_y=1).where(lost, drop=False)).all()
    kept = ~(lost & (d.shift_y == 1))
    xr.testing.assert_allclose(d.drop_vars("written"), whole.where(kept))
    ds["activation"][2, 0, 0, 1] = np.nan
    for result in (ds.vit.cka().cka, ds.vit.rsa().rsa):
        assert np.isnan(result.sel(layer=2)).all()
        assert np.isfinite(result.sel(layer=[0, 4], other_layer=[0, 4])).all()


def test_refusals(monkeypatch):
    ds = make()
    with pytest.raises(ArgumentError, match="across='image': expected 'layer' or 'shift'"):
        ds.vit.cka(across="image")
    with pytest.raises(ArgumentError, match="metric='cosine': expected 'correlation' or"):
        ds.vit.rsa(metric="cosine")
    with pytest.raises(ArgumentError, match="metric='cosine'"):
        ds.vit.rdm("cosine")
    with pytest.raises(ArgumentError, match="batch_size=3: expected an integer of 4"):
        ds.vit.cka(batch_size=3)
    with pytest.raises(ArgumentError, match="shuffles=0: expected an integer of 1"):
        ds.vit.rsa(shuffles=0)
    with pytest.raises(ArgumentError, match="batch_size=5 cuts 7 images into batches of 3"):
        ds.vit.cka(batch_size=5)
    with pytest.raises(ArgumentError, match=r"batch_size=4 of 7 images.*Pass batch_size=7"):
        ds.vit.cka(batch_size=4, unbiased=False)
    with pytest.raises(DataError, match="3 images: CKA compares 4 or more"):
        ds.isel(image=slice(3)).vit.cka()
    with pytest.raises(DataError, match="3 images: RSA compares the pairs of 4"):
        ds.isel(image=slice(3)).vit.rsa()
    with pytest.raises(DataError, match=r"7 and 6 images, of which 6.*only one of them has i6"):
        ds.vit.cka(ds.isel(image=slice(6)))
    with pytest.raises(DataError, match=r"6 and 7 images, of which 6.*only one of them has i6"):
        ds.isel(image=slice(6)).vit.rsa(ds)
    other = ds.assign_coords(sha256=("image", ["x", *ds.sha256.values[1:]]))
    with pytest.raises(DataError, match=r"1 images of the same name have other contents.*i0"):
        ds.vit.cka(other)
    twice = ds.assign_coords(image=["a"] * 7)
    with pytest.raises(DataError, match="matched by name: give them unique"):
        ds.vit.cka(twice)
    with pytest.raises(DataError, match=r"other shifts \(`offset_y` differs\)"):
        ds.vit.cka(ds.isel(shift_y=[1]))
    with pytest.raises(DataError, match="other layers, and shifts are compared in the same"):
        ds.vit.cka(ds.isel(layer=[1]), across="shift")
    monkeypatch.setattr(_walk, "_GRAM_BYTES", 1000)
    with pytest.raises(ArgumentError, match=r"12 matrices between 7 images.*select some of"):
        ds.vit.rdm()
    with pytest.raises(ArgumentError, match=r"16 matrices between 7 images.*smaller batch_size"):
        ds.vit.cka(across="shift")


@pytest.mark.parametrize("measure", ["cka", "rsa"])
@pytest.mark.parametrize(
    "other", ["run.zarr", 5, vitxr.catalog.open("activations.digits").activation]
)
def test_the_other_is_a_dataset(measure, other):
    ds = vitxr.catalog.open("activations.digits")
    with pytest.raises(ArgumentError, match=r"other is a .*; expected a Dataset.*vitxr\.open"):
        getattr(ds.vit, measure)(other)
