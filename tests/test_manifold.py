"""Manifold methods: diffusion maps against a literal version and planted truth; the library's."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import sklearn.manifold
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from vitxr.analysis import embed, manifold, project
from vitxr.errors import ArgumentError, DataError, DependencyError
from vitxr.names import NEURON, validate


def factors(rows, **coords):
    f = xr.Dataset({"neuron_factor": (("neuron", "component"), np.asarray(rows))})
    return f.assign_coords(component=np.arange(f.sizes["component"]), **coords)


def ring(n, dims=5, seed=0, angle=None):
    """Points of a circle, turned into ``dims`` dimensions."""
    rng = np.random.default_rng(seed)
    angle = np.arange(n) * 2 * np.pi / n if angle is None else angle
    plane = np.linalg.qr(rng.normal(size=(dims, 2)))[0]
    return np.stack([np.cos(angle), np.sin(angle)], 1) @ plane.T, angle


def literal(rows, n_neighbors, scale_neighbor, alpha):
    """Diffusion operator and its eigenpairs, with loops over dense matrices."""
    n = len(rows)
    d = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
    scale = [sorted(d[i][d[i] > 0])[scale_neighbor - 1] for i in range(n)]
    near = [
        set(np.argsort(d[i] + np.where(np.arange(n) == i, np.inf, 0))[:n_neighbors])
        for i in range(n)
    ]
    k = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i == j or j in near[i] or i in near[j]:
                k[i, j] = np.exp(-(d[i, j] ** 2) / (scale[i] * scale[j]))
    q = k.sum(1)
    k = k / np.outer(q, q) ** alpha
    p = k / k.sum(1, keepdims=True)
    stationary = k.sum(1) / k.sum()
    values, vectors = np.linalg.eig(p)
    by_size = np.argsort(-values.real)
    values, vectors = values.real[by_size], vectors.real[:, by_size]
    vectors /= np.sqrt((stationary[:, None] * vectors**2).sum(0))
    vectors *= np.sign(vectors[abs(vectors).argmax(0), np.arange(n)])
    return values[1:], vectors[:, 1:]


@pytest.mark.parametrize("n_neighbors", [39, 12])
@pytest.mark.parametrize(("alpha", "time"), [(1.0, 1.0), (0.0, 0.0), (0.5, 3.0)])
def test_diffusion_is_the_literal_one(n_neighbors, alpha, time):
    rows = np.random.default_rng(0).random((40, 3))
    values, vectors = literal(rows, n_neighbors, 5, alpha)
    e = embed(
        factors(rows), 4, "diffusion", alpha=alpha, time=time,
        n_neighbors=n_neighbors, scale_neighbor=5,
    )  # fmt: skip
    validate(e, require=["eigenvalue", "bandwidth", "kernel_density"])
    np.testing.assert_allclose(e.eigenvalue, values[:4])
    np.testing.assert_allclose(e.score, vectors[:, :4] * values[:4] ** time, atol=1e-9)
    assert "explained_variance" not in e
    assert json.loads(e.attrs["options"]) == {
        "n_neighbors": n_neighbors, "scale_neighbor": 5, "alpha": alpha, "time": time,
    }  # fmt: skip


def test_sparse_spectrum_equals_dense(monkeypatch):
    rows = np.random.default_rng(0).random((400, 2))
    dense = manifold.diffusion_maps(rows, 5, 30, 7, 1.0)
    monkeypatch.setattr(manifold, "_DENSE", 10)
    sparse = manifold.diffusion_maps(rows, 5, 30, 7, 1.0)
    np.testing.assert_allclose(sparse.eigenvalue, dense.eigenvalue)
    np.testing.assert_allclose(sparse.eigenvector, dense.eigenvector, atol=1e-7)
    every = manifold.diffusion_maps(rows[:20], 19, 19, 3, 1.0)  # more than a sparse method finds
    np.testing.assert_allclose(every.eigenvalue, literal(rows[:20], 19, 3, 1.0)[0])


def test_axes_without_an_eigenvalue_above_zero_are_refused():
    """Rows that are there twice have the same row in the kernel."""
    rows = np.repeat(np.random.default_rng(0).random((10, 3)), 2, axis=0)
    values, _ = literal(rows, 19, 6, 1.0)  # of which each is there twice
    good = int((values > 1e-10).sum())
    assert good < 15
    options = {"n_neighbors": 19, "scale_neighbor": 3}
    with pytest.raises(DataError, match=rf"only {good} of 15 eig.*n_components={good} or fewer"):
        embed(factors(rows), 15, "diffusion", **options)
    e = embed(factors(rows), good, "diffusion", **options)
    np.testing.assert_allclose(e.eigenvalue, values[:good], atol=1e-12)


def test_a_ring_is_a_ring():
    rows, angle = ring(300)
    e = embed(factors(rows), 4, "diffusion", time=0)
    lam = e.eigenvalue.values
    np.testing.assert_allclose(lam[0], lam[1], rtol=1e-9)
    np.testing.assert_allclose(lam[2], lam[3], rtol=1e-9)
    # Of a heat kernel on a circle eigenvalues go as exp(-c k^2).
    assert np.log(lam[2]) / np.log(lam[0]) == pytest.approx(4, rel=0.01)
    x, y = e.score.values[:, 0], e.score.values[:, 1]
    np.testing.assert_allclose(np.hypot(x, y), np.sqrt(2))
    turned = np.unwrap(np.arctan2(y, x))
    turned *= np.sign(turned[1] - turned[0])
    np.testing.assert_allclose(turned - turned[0], angle, atol=1e-6)


def test_a_roll_is_unrolled():
    rng = np.random.default_rng(0)
    t = 1.5 * np.pi * (1 + 2 * rng.random(800))
    rows = np.stack([t * np.cos(t), 4 * rng.random(800), t * np.sin(t)], 1)
    length = (t * np.sqrt(1 + t**2) + np.arcsinh(t)) / 2
    e = embed(factors(rows), 1, "diffusion", n_neighbors=12)
    assert abs(spearmanr(e.score[:, 0], length).statistic) > 0.999
    pca = embed(factors(rows), 1)
    assert abs(spearmanr(pca.score[:, 0], length).statistic) < 0.9


@settings(max_examples=15)
@given(
    n=st.integers(10, 40),
    axes=st.integers(1, 3),
    size=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_diffusion_knows_distances_only(n, axes, size, seed):
    rng = np.random.default_rng(seed)
    rows = rng.random((n, 3))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    options = {"scale_neighbor": 3, "n_neighbors": 50}
    one = embed(factors(rows), axes, "diffusion", **options)
    other = embed(factors(size * (rows @ turn) + 7), axes, "diffusion", **options)
    np.testing.assert_allclose(one.eigenvalue, other.eigenvalue, atol=1e-8)
    gaps = -np.diff([1, *one.eigenvalue.values])
    if gaps.min() > 1e-3 and axes < 2:
        np.testing.assert_allclose(abs(one.score), abs(other.score), atol=1e-5)
    # The stationary distribution has weight on no axis.
    q = one.kernel_density.values
    assert (q >= 1).all()


def test_pieces_are_told():
    rows = np.concatenate([ring(40)[0], ring(40)[0] + 50])
    with pytest.warns(
        RuntimeWarning, match="10 neighbours falls into 2 pieces: the first 1 axes"
    ) as told:
        e = embed(factors(rows), 2, "diffusion", n_neighbors=10)
    assert told[0].filename == __file__
    assert e.eigenvalue[0] == pytest.approx(1)
    assert np.ptp(e.score[:40, 0].values) < 1e-6 < abs(e.score[0, 0] - e.score[50, 0])


def test_duplicates_and_dead_rows():
    rows, _ = ring(60)
    rows = np.concatenate([rows, rows[:9], rows[:1], np.zeros((3, 5))])
    middle = np.r_[:20, 72, 20:72]  # a dead row in the middle
    label = ("neuron", np.arange(len(rows)))
    for method, options in {
        "diffusion": {},
        "isomap": {"n_neighbors": 8},
        "spectral": {"n_neighbors": 8},
        "tsne": {"perplexity": 10.0},
    }.items():
        e = embed(factors(rows, tag=label), 2, method, **options)
        assert np.isnan(e.score[-3:]).all()
        assert np.isfinite(e.score[:-3]).all()
        np.testing.assert_array_equal(e.tag, np.arange(len(rows)))
        if method == "diffusion":
            np.testing.assert_allclose(e.score[0], e.score[69], atol=1e-9)
            assert np.isnan(e.bandwidth[-1])
            alone = embed(factors(rows[:-3]), 2, method)
            np.testing.assert_allclose(e.score[:-3], alone.score)
            once = embed(factors(rows[:60]), 2, method)
            np.testing.assert_allclose(e.bandwidth[:60], once.bandwidth)
            other = embed(factors(rows[middle]), 2, method)
            np.testing.assert_allclose(other.score, e.score[middle])
            np.testing.assert_allclose(other.bandwidth, e.bandwidth[middle])
            assert json.loads(e.attrs["options"]) == {
                "n_neighbors": 64, "scale_neighbor": 7, "alpha": 1, "time": 1,
            }  # fmt: skip
    assert np.isfinite(embed(factors(rows), 2).score).all()  # PCA takes zero rows as rows


@pytest.mark.parametrize(
    ("method", "make", "options"),
    [
        ("isomap", lambda **o: sklearn.manifold.Isomap(n_components=2, **o), {"n_neighbors": 9}),
        (
            "spectral",
            lambda **o: sklearn.manifold.SpectralEmbedding(
                n_components=2, affinity="nearest_neighbors", random_state=3, **o
            ),
            {"n_neighbors": 9},
        ),
        (
            "spectral",
            lambda **o: sklearn.manifold.SpectralEmbedding(n_components=2, random_state=3, **o),
            {"affinity": "rbf", "gamma": 0.5},
        ),
        (
            "tsne",
            lambda **o: sklearn.manifold.TSNE(n_components=2, random_state=3, **o),
            {"perplexity": 12.0, "max_iter": 260},
        ),
    ],
)
def test_the_librarys_methods(method, make, options):
    rows, _ = ring(80)
    index = pd.MultiIndex.from_product([range(5), range(4), range(4)], names=NEURON)
    f = factors(rows).assign_coords(xr.Coordinates.from_pandas_multiindex(index, "neuron"))
    e = validate(embed(f, 2, method, random_state=3, **options))
    np.testing.assert_allclose(e.score, make(**options).fit_transform(rows))
    assert e.indexes["neuron"].equals(index)
    assert e.pc.values.tolist() == [1, 2]
    assert ("explained_variance" in e, e.attrs["method"]) == (False, method)
    assert options.items() <= json.loads(e.attrs["options"]).items()
    assert json.loads(e.attrs["options"]).get("random_state") == (None if method == "isomap" else 3)
    assert "scikit-learn" in json.loads(e.attrs["versions"])


def test_umap_is_asked_for(monkeypatch):
    f = factors(ring(20)[0])
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(DependencyError, match=r"pip install 'vitxr\[umap\]'"):
        embed(f, 2, "umap")


# Its import says so, and would try TensorFlow.
@pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")
def test_umap_is_umap_learns():
    import umap

    rows, _ = ring(60)
    f = factors(np.concatenate([rows, np.zeros((1, 5))]), tag=("neuron", np.arange(61)))
    e = validate(embed(f, 2, "umap", random_state=3, n_neighbors=8))
    theirs = umap.UMAP(n_components=2, random_state=3, n_jobs=1, n_neighbors=8).fit_transform(rows)
    np.testing.assert_array_equal(e.score[:60], theirs)
    assert np.isnan(e.score[60]).all()
    assert "umap-learn" in json.loads(e.attrs["versions"])
    with pytest.raises(ArgumentError, match="embed takes arguments of UMAP of umap-learn"):
        embed(f, 2, "umap", beta=1)


def test_project_gives_back_what_is_there():
    rows = ring(60)[0] + 0.3
    rows[3, 1] = 0  # which does not make it a dead row
    f = factors(np.insert(rows, 7, 0, axis=0), tag=("neuron", np.arange(61)))
    f.attrs["model"] = "one"
    new = f.isel(neuron=slice(None, None, -1)).assign_attrs(model="other")
    for method, options in {
        "pca": {},
        "diffusion": {"n_neighbors": 100, "alpha": 0.5, "time": 2.0},
        "isomap": {"n_neighbors": 6},
    }.items():
        e = embed(f, 3, method, **options)
        p = validate(project(e, new))
        np.testing.assert_allclose(p.score[::-1], e.score, atol=1e-7)
        assert np.isnan(p.score[53]).all() == (method != "pca")
        assert np.isfinite(p.score).all("pc").sum() == 60 + (method == "pca")
        np.testing.assert_array_equal(p.tag, new.tag)
        assert p.pc.values.tolist() == [1, 2, 3]
        assert (p.attrs["method"], p.attrs["model"]) == (method, "other")


@pytest.mark.parametrize("n_neighbors", [200, 20])
def test_new_points_of_a_ring_fall_between(n_neighbors):
    rows, angle = ring(200)
    e = embed(factors(rows), 2, "diffusion", n_neighbors=n_neighbors)
    between = angle + np.pi / 200
    new = project(e, factors(ring(200, angle=between)[0]))
    middle = (e.score.values + np.roll(e.score.values, -1, 0)) / 2
    np.testing.assert_allclose(new.score, middle, atol=1e-3 * abs(middle).max())


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n_neighbors", [12, 59])
def test_extension_is_the_literal_one(alpha, n_neighbors):
    """Points of no constant density, new ones among them and one that is known."""
    rng = np.random.default_rng(0)
    rows = rng.random((60, 3)) ** 2
    new = np.concatenate([rng.random((5, 3)), rows[3:4]])
    options = {"alpha": alpha, "n_neighbors": n_neighbors, "scale_neighbor": 5}
    e = embed(factors(rows), 3, "diffusion", time=2.0, **options)
    values, vectors = literal(rows, n_neighbors, 5, alpha)
    for x, found in zip(new, project(e, factors(new)).score.values, strict=True):
        d = np.linalg.norm(rows - x, axis=1)
        scale = sorted(d[d > 0])[4]
        weight = np.exp(-(d**2) / (scale * e.bandwidth.values)) / e.kernel_density.values**alpha
        weight[np.argsort(d)[n_neighbors + 1 :]] = 0
        psi = weight @ vectors[:, :3] / weight.sum() / values[:3]
        np.testing.assert_allclose(found, psi * values[:3] ** 2, rtol=1e-7, atol=1e-8)


def test_isomap_projects_as_scikit_learn():
    rows, _ = ring(80)
    new = rows[:7] * 1.05
    e = embed(factors(rows), 2, "isomap", n_neighbors=7)
    theirs = sklearn.manifold.Isomap(n_components=2, n_neighbors=7).fit(rows).transform(new)
    np.testing.assert_allclose(project(e, factors(new)).score, theirs)
    e["score"] = e.score * 2
    with pytest.raises(DataError, match="fitted again, gives other coordinates"):
        project(e, factors(new))


def test_project_refuses():
    rows, _ = ring(30)
    f = factors(rows)
    with pytest.raises(ArgumentError, match="'tsne' places no new rows; 'pca', 'diffusion', 'iso"):
        project(embed(f, 2, "tsne", perplexity=5.0), f)
    with pytest.raises(DataError, match="expected the same components"):
        project(embed(f, 2), f.isel(component=slice(3)))
    with pytest.raises(DataError, match="expected the same components"):
        project(embed(f, 2, "diffusion"), f.assign_coords(component=np.arange(5) + 1))
    with pytest.raises(DataError, match="project needs an embedding"):
        project(f, f)
    with pytest.raises(DataError, match="so far from all embedded ones"):
        project(embed(f, 2, "diffusion", n_neighbors=7), factors(rows[:1] * 1e9))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"method": "pca", "mode": 1},
            ArgumentError,
            r"no argument 'mode' for method='pca'; expected n_comp.*, dim, random_state\.$",
        ),
        (
            {"beta": 1},
            ArgumentError,
            "no argument 'beta' for method='diffusion'; expected .*random_state, n_neighbors, s",
        ),
        ({"alpha": 1.1}, ArgumentError, r"alpha=1.1: expected a number of 0 or more, at most 1\."),
        ({"time": -1}, ArgumentError, "time=-1"),
        ({"time": np.inf}, ArgumentError, "time=inf"),
        ({"n_neighbors": 0}, ArgumentError, "n_neighbors is 0"),
        ({"n_neighbors": 3}, ArgumentError, "scale_neighbor=7 lies beyond n_neighbors=3"),
        ({"n_components": 30}, ArgumentError, "30 rows have at most 29 axes by 'diffusion'"),
        ({"alpha": object()}, ArgumentError, "expected numbers and strings"),
        ({"random_state": -1}, ArgumentError, "random_state is -1"),
        ({"method": "tsne", "n_components": 4}, ArgumentError, "n_components is 4; t-SNE takes"),
        ({"method": "tsne", "perplexity": 99.0}, ArgumentError, "'tsne' refuses 30 rows.*perpl"),
        (
            {"method": "isomap", "beta": 1},
            ArgumentError,
            "'isomap' does not take options=.*random_state, embed takes arguments of Isomap of sci",
        ),
    ],
)
def test_refused(arguments, error, message):
    arguments = {"method": "diffusion", "n_components": 2, **arguments}
    with pytest.raises(error, match=message):
        embed(factors(ring(30)[0]), **arguments)


def test_too_few_rows_that_differ():
    rows = np.repeat(np.eye(4), 10, axis=0)
    with pytest.raises(DataError, match="4 of 40 rows differ from each other; their 7 nearest"):
        embed(factors(rows), 2, "diffusion")
    with pytest.raises(DataError, match="3 rows, of which 2 are all zero"):
        embed(factors([[1.0, 2.0], [0, 0], [0, 0]]), 1, "isomap")
    with pytest.raises(DataError, match="rows of neuron_factor are all the same"):
        embed(factors([[1.0, 2.0], [0, 0], [1, 2]]), 1, "isomap")
