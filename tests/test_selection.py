import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import vitxr
from vitxr.app.geometry import fitted, inside, project
from vitxr.app.script import script
from vitxr.app.selection import Selection, neurons_of, select
from vitxr.errors import ArgumentError, DataError

STAR = [[0.0, 1.0], [0.6, -0.8], [-1.0, 0.3], [1.0, 0.3], [-0.6, -0.8]]


def embedded(maps=(5, 9), rows=3, cols=4, axes=3, seed=0):
    index = pd.MultiIndex.from_product(
        [maps, range(rows), range(cols)], names=["feature_map", "patch_row", "patch_col"]
    )
    e = xr.Dataset(coords=xr.Coordinates.from_pandas_multiindex(index, "neuron"))
    score = np.random.default_rng(seed).normal(0, 0.5, (len(index), axes))
    e["score"] = (("neuron", "pc"), score)
    return e.assign_coords(pc=np.arange(1, axes + 1))


def straight(pcs=(1, 2)):
    camera = np.zeros((2, len(pcs) + 1))
    camera[[0, 1], [1, 2]] = 1
    return {"camera": camera.tolist(), "pcs": list(pcs)}


def literally_inside(x, y, polygon):
    """One point and one edge at a time."""
    out = []
    for px, py in zip(x, y, strict=True):
        odd = False
        for k in range(len(polygon)):
            (xi, yi), (xj, yj) = polygon[k], polygon[k - 1]
            if (yi > py) != (yj > py) and px < (xj - xi) * (py - yi) / (yj - yi) + xi:
                odd = not odd
        out.append(odd)
    return np.array(out)


corner = st.tuples(*[st.floats(-1, 1, width=16)] * 2)


@given(st.lists(corner, min_size=3, max_size=12), st.integers(0, 2**32 - 1))
def test_points_in_a_polygon_are_those_of_the_literal_rule(corners, seed):
    rng = np.random.default_rng(seed)
    polygon = np.array(corners)
    # On a lattice, so that points lie on edges and corners too.
    x, y = np.append(rng.integers(-8, 9, (40, 2)) / 8, polygon, axis=0).T
    assert (inside(x, y, polygon) == literally_inside(x, y, polygon)).all()


def test_points_in_a_polygon_are_those_of_matplotlib():
    path = pytest.importorskip("matplotlib.path")
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    polygon = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.2, 1, (40, 1))
    points = rng.uniform(-1, 1, (20_000, 2))
    got = inside(points[:, 0], points[:, 1], polygon)
    assert (got == path.Path(polygon).contains_points(points)).all()
    assert 0.1 < got.mean() < 0.5


def test_a_polygon_that_crosses_itself_has_a_hole():
    x, y = np.array([[0.0, 0.0], [0.0, 0.6], [2, 2]]).T
    assert inside(x, y, np.array(STAR)).tolist() == [False, True, False]


def test_points_without_a_place_are_never_inside():
    x = np.array([0.0, np.nan])
    assert inside(x, np.zeros(2), np.array([[-1, -1], [1, -1], [0, 1.0]])).tolist() == [True, False]


@pytest.mark.parametrize("axes", [2, 3])
def test_the_camera_is_linear(axes):
    rng = np.random.default_rng(1)
    points = rng.normal(size=(50, axes)).astype(np.float32)
    camera = rng.normal(size=(2, axes + 1))
    expected = camera[:, :1] + camera[:, 1:] @ points.T.astype(np.float64)
    np.testing.assert_allclose(project(points, camera), expected, rtol=1e-12, atol=1e-12)


def test_the_first_camera_shows_every_point():
    points = np.random.default_rng(2).normal(3, 5, (100, 3)).astype(np.float32)
    x, y = project(points, fitted(points))
    assert max(abs(x).max(), abs(y).max()) <= 0.9 + 1e-9
    assert max(np.ptp(x), np.ptp(y)) <= 1.8 + 1e-9
    one = fitted(np.float32([[2, 2]]))
    np.testing.assert_allclose(project(np.float32([[2, 2]]), one), 0, atol=1e-12)


def test_a_predicate_is_a_comparison_of_labels():
    e = embedded()
    got = select(e, {"feature_maps": [9], "rows": [1, 2], "cols": [0, 1]})
    expected = (e.feature_map == 9) & (e.patch_row >= 1) & (e.patch_col <= 1)
    assert (got.mask == expected.values).all()
    assert got.count == 4
    assert select(e, {"rows": [2, 1]}).count == 0


@given(
    st.recursive(
        st.sampled_from(
            [
                {"feature_maps": [5]},
                {"rows": [0, 1]},
                {"cols": [1, 2], "feature_maps": [9, 5]},
                {"polygon": STAR, **straight()},
                {"polygon": STAR[:3], **straight((3, 1, 2))},
            ]
        ),
        lambda part: (
            part.map(lambda a: {"not": a})
            | st.tuples(part, part).map(lambda p: {"and": list(p)})
            | st.tuples(part, part).map(lambda p: {"or": list(p)})
        ),
        max_leaves=6,
    )
)
def test_how_it_was_made_makes_it_again(how):
    e = embedded()
    made = select(e, how)
    assert json.loads(made.to_json()) == how
    assert (select(e, made.to_json()).mask == made.mask).all()
    ran = {"GIVEN": e}
    exec(script(made, "e = GIVEN"), ran)
    assert (ran["selected"].values == made.mask).all()
    assert ran["neurons"].sizes["neuron"] == made.count


def test_selections_join():
    e = embedded()
    a, b = select(e, {"rows": [0, 1]}), select(e, {"polygon": STAR, **straight()})
    for joined, mask in (
        (a & b, a.mask & b.mask),
        (a | b, a.mask | b.mask),
        (~a, ~a.mask),
        (a & ~b, a.mask & ~b.mask),
    ):
        assert (joined.mask == mask).all()
        assert (select(e, joined.to_json()).mask == mask).all()


def test_the_patch_map_counts_over_feature_maps():
    e = embedded(maps=(1, 2, 3))
    chosen = select(e, {"polygon": STAR, **straight()})
    expected = np.zeros((3, 4), int)
    for i in np.flatnonzero(chosen.mask):
        expected[e.patch_row.values[i], e.patch_col.values[i]] += 1
    got = chosen.patch_map(e)
    assert (got.values == expected).all()
    assert got.dims == ("patch_row", "patch_col")
    assert int(got.sum()) == chosen.count > 0


def test_it_is_exported_with_its_labels(tmp_path):
    e = embedded().assign_attrs(model="m", layer=3)
    chosen = select(e, {"rows": [0, 0]}).called("top row")
    array = chosen.to_dataarray(e)
    assert (array.sel(patch_row=0).values).all()
    assert not array.sel(patch_row=1).values.any()
    back = vitxr.open(vitxr.save(array, tmp_path / "chosen.nc"))
    assert back.attrs["selection"] == "top row"
    assert (back.attrs["model"], back.attrs["layer"]) == ("m", 3)
    again = select(e, back.attrs["how"])
    assert (again.mask == back.values.astype(bool)).all()
    with pytest.raises(DataError, match="the selection is of 24 neurons, and the Dataset has 12"):
        chosen.to_dataarray(embedded(maps=(1,)))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("{", "is not JSON"),
        ([], "cannot be read"),
        ({}, "has nothing"),
        ({"row": [0, 1]}, "has 'row'"),
        ({"and": []}, "'and' joins a list"),
        ({"rows": [0]}, "the first and the last"),
        ({"rows": ["a", 1]}, "expected finite numbers"),
        ({"feature_maps": [4]}, r"\[4.0\] are not among them"),
        ({"polygon": STAR[:2], **straight()}, "3 to 512 corners"),
        ({"polygon": STAR * 200, **straight()}, "3 to 512 corners"),
        ({"polygon": [[0, 0], [1, 0], [float("nan"), 1]], **straight()}, "finite"),
        ({"polygon": STAR, "camera": [[1, 2]], "pcs": [1, 2]}, r"camera \(1, 2\)"),
    ],
)
def test_what_cannot_be_read_is_refused(how, said):
    with pytest.raises(ArgumentError, match=said):
        select(embedded(), how)


def test_what_is_nested_without_end_is_refused():
    how = {"rows": [0, 1]}
    for _ in range(100):
        how = {"not": how}
    with pytest.raises(ArgumentError, match="cannot be read"):
        select(embedded(), how)


def test_neurons_without_labels_or_axes_are_refused():
    with pytest.raises(DataError, match="no coordinate `patch_row`"):
        neurons_of(embedded().reset_index("neuron").drop_vars("patch_row"))
    with pytest.raises(DataError, match=r"over axes \[1, 4\]"):
        select(embedded(), {"polygon": STAR, **straight((1, 4))})


def test_a_name_cannot_leave_its_comment():
    chosen = Selection(np.ones(1, bool), {"rows": [0, 1]}, "a\nimport os")
    assert script(chosen, "e = 1").startswith("# a import os\n")
