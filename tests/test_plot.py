import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import synthetic
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import vitxr
from vitxr import plot
from vitxr.errors import ArgumentError, DataError
from vitxr.plot._mosaic import Tiles, tile
from vitxr.plot._select import frame, neuron_maps, shift_words, unshifted
from vitxr.plot._style import categorical

pytest.importorskip("holoviews")


@pytest.fixture(scope="module")
def stim():
    return synthetic.stimuli(per_class=2, classes=(0, 1))


@pytest.fixture(scope="module")
def run(stim):
    return synthetic.extraction(stim, step=8, layers=(0, 1), channels=12)


@pytest.fixture(scope="module")
def detail(stim):
    return synthetic.extraction(stim, step=None, layers=(0, 1, 2), channels=12, heads=3)


@pytest.fixture(scope="module")
def tensor(run):
    return synthetic.neuron_tensor(run, 1, maps=5)


@pytest.fixture(scope="module")
def factors(tensor):
    return synthetic.factorize(tensor, 3)


@pytest.fixture(scope="module")
def ensemble(tensor):
    return synthetic.ensemble(tensor, ranks=(1, 2), replicates=3, iterations=4)[0]


@pytest.fixture(scope="module")
def embedded(factors):
    return synthetic.embed(factors)


def parts(picture, kind):
    """Elements of one kind in an overlay."""
    return [e for e in picture.traverse(lambda x: x) if type(e).__name__ == kind]


def grid(element, vdim=2):
    """Values of an image as they are drawn, the first row at the top."""
    return element.dimension_values(vdim, flat=False)


def rgb(element):
    return np.dstack([element.dimension_values(k, flat=False) for k in range(2, 6)])


def paint(drawn):
    """Draw a figure at 100 dpi; its pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn.set_dpi(100)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def texts(picture):
    return [t for e in parts(picture, "Labels") for t in e.dimension_values("text")]


def test_importing_loads_no_plotting_library():
    code = (
        "import sys, vitxr.plot, vitxr.report; "
        "print([m for m in ('holoviews', 'matplotlib', 'panel', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_backend_in_use_is_left_as_it_was(embedded):
    import holoviews as hv

    before = hv.Store.current_backend
    plot.embedding(embedded)
    assert hv.Store.current_backend == before


@given(
    maps=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=4, max_dims=4, max_side=4),
        elements=st.floats(-1, 1, width=32),
    ),
    gap=st.integers(1, 3),
)
def test_tiles_hold_the_maps_and_nothing_else(maps, gap):
    mosaic, tiles = tile(maps, gap)
    assert mosaic.shape == tiles.shape
    for i, j in np.ndindex(maps.shape[:2]):
        np.testing.assert_array_equal(mosaic[tiles.block(i, j)], maps[i, j])
    assert np.isfinite(mosaic).sum() == maps.size


def test_first_row_is_drawn_at_the_top():
    import matplotlib

    drawn = plot.figure(plot.neuron_matrix(_one_map(np.array([[0.0, 1.0], [2.0, 3.0]]))))
    pixels = paint(drawn)
    (axis,) = drawn.axes
    viridis = matplotlib.colormaps["viridis"]
    for row, col in np.ndindex(2, 2):
        x, y = axis.transData.transform((col, row)).astype(int)
        expected = viridis((2 * row + col) / 3, bytes=True)
        np.testing.assert_allclose(pixels[len(pixels) - y, x], expected, atol=3)
    low, high = axis.transData.transform([(0, 1), (0, 0)])[:, 1]
    assert low < high  # row 0 is above row 1 on the page


def _one_map(values):
    rows, cols = values.shape
    row, col = np.indices(values.shape)
    return xr.DataArray(
        values.reshape(-1, 1),
        dims=("neuron", "image"),
        coords={
            "image": ["only"],
            "feature_map": ("neuron", np.full(rows * cols, 7)),
            "patch_row": ("neuron", row.ravel()),
            "patch_col": ("neuron", col.ravel()),
        },
    )


def test_categorical_colours_are_distinct():
    assert len(set(categorical(40))) == 40
    assert all(len(c) == 7 and int(c[1:], 16) >= 0 for c in categorical(60))


#: Deuteranopia in linear sRGB: Machado, Oliveira and Fernandes (2009), severity 1.
_DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)
#: Linear sRGB to XYZ of a white of 1.
_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def lab(color, blind):
    """CIE L*a*b* of a hex colour as it is seen."""
    c = np.array([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    if blind:
        c = np.clip(_DEUTERANOPIA @ c, 0, 1)
    xyz = _XYZ @ c / _XYZ.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(("blind", "first", "later"), [(False, 25, 12), (True, 15, 8)])
def test_colours_of_one_marker_are_told_apart(blind, first, later):
    """A difference of 2.3 is just noticed; beyond the eighth class the markers differ as well."""
    seen = [lab(c, blind) for c in categorical(24)]
    for start, least in ((0, first), (8, later), (16, later)):
        group = seen[start : start + 8]
        apart = min(np.linalg.norm(a - b) for i, a in enumerate(group) for b in group[:i])
        assert apart > least


def test_stimuli_holds_every_image_and_label(stim):
    picture = plot.stimuli(stim, columns=2)
    values = rgb(parts(picture, "RGB")[0])
    gap = (values.shape[1] - 64) // 1
    tiles = Tiles(2, 2, 32, 32, gap)
    for i in range(4):
        block = values[tiles.block(*divmod(i, 2))]
        np.testing.assert_array_equal(block[..., :3], stim["pixels"].values[i])
        assert (block[..., 3] == 255).all()
    assert texts(picture) == ["0", "0", "1", "1"]


@pytest.fixture(scope="module")
def mixed():
    """Images of four sizes and two classes, each of one colour."""
    import vitxr

    sizes = [(30, 60), (900, 300), (8, 8), (20, 25)]
    arrays = [np.full((*size, 3), 40 + 50 * i, np.uint8) for i, size in enumerate(sizes)]
    return vitxr.open_images({"a": arrays[:2], "b": arrays[2:]})


def test_stimuli_of_mixed_sizes_are_fitted_into_equal_tiles(mixed):
    assert "pixels" not in mixed
    picture = plot.stimuli(mixed, columns=4)
    values = rgb(parts(picture, "RGB")[0])
    tall, wide = values.shape[0], 256
    assert tall == 256  # the 900 rows were reduced, the others enlarged
    gap = (values.shape[1] - 4 * wide) // 3
    aspects = [60 / 30, 300 / 900, 1, 25 / 20]
    for i, aspect in enumerate(aspects):
        block = values[Tiles(1, 4, tall, wide, gap).block(0, i)]
        inside = block[..., 3] == 255
        rows, cols = inside.any(1).sum(), inside.any(0).sum()
        assert inside.sum() == rows * cols
        assert max(rows, cols) == 256
        assert cols / rows == pytest.approx(aspect, rel=0.02)
        np.testing.assert_array_equal(block[inside][:, :3], 40 + 50 * i)
        # centred in the tile
        assert abs(np.argmax(inside.any(1)) * 2 + rows - tall) <= 1
        assert abs(np.argmax(inside.any(0)) * 2 + cols - wide) <= 1


def test_stimuli_show_and_decode_at_most_so_many(mixed, monkeypatch):
    import vitxr.stimuli

    asked = []

    def read(stim, i):
        asked.append(str(stim["image"].values[i]))
        return np.zeros((int(stim["height"][i]), int(stim["width"][i]), 3), np.uint8)

    monkeypatch.setattr(vitxr.stimuli, "read_image", read)
    many = xr.concat([mixed.isel(image=[0, 1])] * 40 + [mixed.isel(image=[2, 3])] * 40, "image")
    many = many.assign_coords(image=[f"i{k}" for k in range(160)])
    picture = plot.stimuli(many, most=10)
    assert asked == [f"i{k}" for k in (*range(5), *range(80, 85))]  # evenly over the classes
    assert picture.opts.get().kwargs["title"] == "Stimuli (10 of 160 images)"
    del asked[:]
    plot.stimuli(many, images=["i7", 3])
    assert asked == ["i7", "i3"]
    plot.stimuli(many)
    assert len(asked) == 2 + 96


def test_stimuli_of_large_pixels_are_reduced_one_by_one(stim):
    import dask.array as da

    lazy = da.zeros((3, 1000, 500, 3), chunks=(1, -1, -1, -1), dtype=np.uint8)
    big = xr.Dataset(
        {"pixels": (("image", "row", "col", "channel"), lazy)}, coords={"image": list("abc")}
    )
    values = rgb(parts(plot.stimuli(big, columns=3), "RGB")[0])
    assert values.shape[0] == 256
    with pytest.raises(DataError, match=r"expected stimuli.*given: the DataArray"):
        plot.stimuli(stim["label"])
    with pytest.raises(DataError, match="neither `pixels`, `encoded` nor a file"):
        plot.stimuli(stim.drop_vars("pixels"))


def test_attention_query_takes_the_one_image_of_stimuli_by_name(detail, mixed, monkeypatch):
    import vitxr.stimuli

    read = vitxr.stimuli.read_image
    asked = []
    monkeypatch.setattr(
        vitxr.stimuli, "read_image", lambda stim, i: asked.append(i) or read(stim, i)
    )
    names = [str(v) for v in mixed["image"].values]
    ds = detail.assign_coords(image=names[::-1])
    picture = plot.attention_query(ds, (3, 5), layer=1, image_at=0, pixels=mixed)
    assert asked == [3]
    shown = parts(picture, "RGB")[0]
    assert (rgb(shown)[..., 0] == 40 + 50 * 3).all()
    assert shown.bounds.lbrt() == (-0.5, -0.5, 7.5, 7.5)
    with pytest.raises(ArgumentError, match=r"no image '0-.*Give the stimuli that were extracted"):
        plot.attention_query(detail, (3, 5), layer=1, pixels=mixed)


@settings(max_examples=15)
@given(
    pixels=hnp.arrays(np.uint8, st.tuples(st.integers(1, 7), st.integers(1, 7), st.just(3))),
    dy=st.lists(st.integers(-20, 20), min_size=1, max_size=3),
    dx=st.lists(st.integers(0, 20), min_size=1, max_size=3),
)
def test_shifts_are_rolls(pixels, dy, dx):
    picture = plot.shifts(pixels, dy, dx)
    values = rgb(parts(picture, "RGB")[0])[..., :3]
    height, width = pixels.shape[:2]
    gap = (values.shape[0] - len(dy) * height) // max(len(dy) - 1, 1)
    if len(dx) > 1:
        gap = (values.shape[1] - len(dx) * width) // (len(dx) - 1)
    tiles = Tiles(len(dy), len(dx), height, width, gap)
    for i, y in enumerate(dy):
        for j, x in enumerate(dx):
            np.testing.assert_array_equal(
                values[tiles.block(i, j)], np.roll(pixels, (y, x), (0, 1))
            )
    assert texts(picture) == [f"dx {x} px" for x in dx] + [f"dy {y} px" for y in dy]


def test_shifts_of_the_raster_name_every_frame():
    dy, dx = np.array([[2, 2], [0, 0]]), np.array([[0, 2], [1, 3]])
    picture = plot.shifts(np.arange(16, dtype=np.uint8).reshape(4, 4), dy, dx)
    assert texts(picture)[:4] == ["2, 0", "2, 2", "0, 1", "0, 3"]
    with pytest.raises(ArgumentError, match=r"offset_y has shape \(2, 2\) and offset_x \(2,\)"):
        plot.shifts(np.zeros((4, 4), np.uint8), dy, [0, 1])
    with pytest.raises(ArgumentError, match="expected uint8"):
        plot.shifts(np.zeros((4, 4)), [0], [0])


def test_predictions_are_the_softmax_without_shift(run):
    picture = plot.predictions(run)
    row, col = unshifted(run)
    z = run["logits"].values[:, row, col].astype(float)
    expected = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(grid(parts(picture, "Image")[0]), expected, rtol=1e-6)
    squares, dots = parts(picture, "Points")
    assert len(squares) == len(dots) == run.sizes["image"]
    np.testing.assert_array_equal(dots.dimension_values("y"), np.arange(4))


def test_predictions_of_many_classes_keep_those_predicted():
    logits = np.zeros((3, 50))
    logits[[0, 1, 2], [49, 3, 20]] = 9
    names = [f"c{i}" for i in range(50)]
    array = xr.DataArray(
        logits, dims=("image", "class"), coords={"image": list("abc"), "class": names}
    )
    picture = plot.predictions(array)
    assert {"c49", "c3", "c20"} <= set(texts(picture))
    assert grid(parts(picture, "Image")[0]).shape == (3, 12)


def test_unshifted_is_circular():
    a = xr.DataArray(
        np.zeros((2, 3)),
        dims=("shift_y", "shift_x"),
        coords={
            "offset_y": ("shift_y", [10, 31], {"period": 32}),
            "offset_x": ("shift_x", [5, 16, 30], {"period": 32}),
        },
    )
    assert unshifted(a) == (1, 2)
    assert shift_words(a) == "shifted by (31, 30) px"
    raster = vitxr.ShiftGrid(3, "raster").lattice(32, 32)
    a = xr.DataArray(np.zeros((11, 12)), dims=("shift_y", "shift_x"), coords=raster.coords)
    y, x = unshifted(a)
    near = [min(int(a[k][y, x]), 32 - int(a[k][y, x])) for k in ("offset_y", "offset_x")]
    every = [np.minimum(a[k].values, 32 - a[k].values) for k in ("offset_y", "offset_x")]
    assert near[0] ** 2 + near[1] ** 2 == (every[0] ** 2 + every[1] ** 2).min()


def test_attention_query_is_one_row_on_the_grid(detail, stim):
    picture = plot.attention_query(detail, (3, 5), layer=1, image_at=2, pixels=stim)
    values = grid(parts(picture, "Image")[0])
    one = detail["attention"].isel(image=2, shift_y=0, shift_x=0).sel(layer=1)
    expected = one.isel(query=1 + 3 * 8 + 5).values[:, 1:].reshape(3, 8, 8)
    boxes = parts(picture, "Rectangles")[0].array()
    assert len(boxes) == 4
    for head in range(3):
        left, top = (int(v) for v in boxes[head + 1, :2] + 0.5 - np.array([5, 3]))
        np.testing.assert_array_equal(values[top : top + 8, left : left + 8], expected[head])
    assert np.isfinite(values).sum() == expected.size
    shown = parts(picture, "RGB")[0]
    np.testing.assert_array_equal(rgb(shown)[..., :3], stim["pixels"].values[2])
    assert shown.bounds.lbrt() == (-0.5, -0.5, 7.5, 7.5)


def test_attention_query_refuses_what_is_not_there(detail):
    with pytest.raises(ArgumentError, match="outside the patch grid of 8 x 8"):
        plot.attention_query(detail, (8, 0), layer=0)
    with pytest.raises(ArgumentError, match=r"layer=9 was not captured.*\[0, 1, 2\]"):
        plot.attention_query(detail, (0, 0), layer=9)
    with pytest.raises(ArgumentError, match="patch grid is unknown"):
        plot.attention_query(detail["attention"], (0, 0), layer=0)
    with pytest.raises(ArgumentError, match="there is no image 'x'"):
        plot.attention_query(detail, (0, 0), layer=0, image_at="x")
    with pytest.raises(DataError, match="needs the variable `attention`"):
        plot.attention_query(detail.drop_vars("attention"), (0, 0), layer=0)


def test_attention_of_chosen_queries_and_heads(detail):
    """Tokens and heads go by their numbers, not by where they stand."""
    detail = detail.assign_coords(query=range(65), key=range(65), head=range(3))
    some = detail.isel(query=[30, 1, 0], head=[2, 1])
    picture = plot.attention_query(some, (3, 5), layer=1, image_at=2)
    same = plot.attention_query(detail.isel(head=[2, 1]), (3, 5), layer=1, image_at=2)
    a, b = (parts(p, "Image")[0].dimension_values(2, flat=False) for p in (picture, same))
    np.testing.assert_array_equal(a, b)
    words = {str(t) for labels in parts(picture, "Labels") for t in labels.dimension_values(2)}
    assert {"head 2", "head 1"} <= words
    assert "head 0" not in words
    with pytest.raises(ArgumentError, match=r"token 31, and the attention keeps the queries 30, 1"):
        plot.attention_query(some, (3, 6), layer=1)
    with pytest.raises(DataError, match="attention of all 65 tokens; this one keeps 3 queries"):
        plot.attention_matrices(some)


def test_attention_matrices_hold_every_weight(detail):
    (element,) = parts(plot.attention_matrices(detail, image_at=1), "Image")
    exact, drawn = grid(element, "weight"), grid(element)
    expected = detail["attention"].values[1, 0, 0]
    tiles = Tiles(3, 3, 65, 65, round(0.07 * 65))
    for layer, head in np.ndindex(3, 3):
        block = tiles.block(layer, head)
        np.testing.assert_array_equal(exact[block], expected[layer, head])
        np.testing.assert_array_equal(drawn[block], np.maximum(expected[layer, head], 0.1 / 65))


def test_feature_map_layers_follow_one_channel(detail):
    (element,) = parts(plot.feature_map_layers(detail, 7, images=[0, 3]), "Image")
    raw, drawn = grid(element, "activation"), grid(element)
    tiles = Tiles(2, 4, 8, 8, 1)
    activation = detail["activation"].values[:, 0, 0, :, 7]
    for i, image in enumerate((0, 3)):
        np.testing.assert_array_equal(
            raw[tiles.block(i, 0)], detail["embedding"].values[image, 0, 0, 7]
        )
        for layer in range(3):
            block = tiles.block(i, layer + 1)
            np.testing.assert_array_equal(raw[block], activation[image, layer])
            largest = np.abs(activation[[0, 3], layer]).max()
            np.testing.assert_allclose(drawn[block], activation[image, layer] / largest, rtol=1e-6)
    with pytest.raises(ArgumentError, match="feature_map=99 is not in the data"):
        plot.feature_map_layers(detail, 99)


def test_a_channel_with_gaps_is_drawn_but_for_them(detail):
    values = detail["activation"].values.copy()
    values[0, 0, 0, 1, 7, 2] = np.nan
    holed = detail.assign(activation=(detail["activation"].dims, values))
    picture = plot.feature_map_layers(holed, 7, images=[0, 3], embedding=False)
    (element,) = parts(picture, "Image")
    block = grid(element)[Tiles(2, 3, 8, 8, 1).block(0, 1)]
    assert np.isnan(block[2]).all()
    seen = values[0, 0, 0, 1, 7] / np.nanmax(np.abs(values[[0, 3], 0, 0, 1, 7]))
    np.testing.assert_allclose(block, seen, rtol=1e-6)
    assert not any("nan" in text for text in texts(picture))


def test_channels_of_a_layer_are_not_followed_across_layers(detail):
    channels = np.arange(36).reshape(3, 12)[:, ::-1]
    own = detail.assign_coords(channel=(("layer", "feature_map"), channels))
    with pytest.raises(DataError, match=r"another channel in each.*ds\.sel\(layer=\[0\]\)"):
        plot.feature_map_layers(own, 7)
    picture = plot.feature_map_layers(own.sel(layer=[1]), 14, images=[2], embedding=False)
    (element,) = parts(picture, "Image")
    np.testing.assert_array_equal(
        grid(element, "activation"), detail["activation"].values[2, 0, 0, 1, 23 - 14]
    )


def test_neuron_maps_undo_the_stacking_and_mark_gaps(tensor):
    maps, numbers = neuron_maps(tensor)
    expected = tensor.values.reshape(5, 8, 8, 4, -1)
    np.testing.assert_array_equal(np.moveaxis(maps.values, (2, 3, 4), (0, 1, 2)), expected)
    assert numbers == list(dict.fromkeys(tensor["feature_map"].values.tolist()))
    inner = tensor.isel(neuron=(tensor["patch_row"] % 7 != 0).values)
    assert neuron_maps(inner)[0].sizes["patch_row"] == 6
    holed, _ = neuron_maps(tensor.isel(neuron=slice(1, None)))
    assert np.isnan(holed.values[:, :, 0, 0, 0]).all()
    assert np.isfinite(holed.values[:, :, 0, 0, 1]).all()
    # a row of which there is no neuron is a blank row, not a grid without it
    split, _ = neuron_maps(tensor.isel(neuron=(tensor["patch_row"] % 7 == 0).values))
    assert split["patch_row"].values.tolist() == list(range(8))
    np.testing.assert_array_equal(split.sel(patch_row=7).values, maps.sel(patch_row=7).values)
    assert np.isnan(split.sel(patch_row=slice(1, 6)).values).all()


def test_neuron_matrix_and_filmstrip_hold_the_tensor(tensor):
    matrix = tensor.mean("shift")
    values = grid(parts(plot.neuron_matrix(matrix), "Image")[0])
    tiles = Tiles(4, 5, 8, 8, 1)
    cube = matrix.values.reshape(5, 8, 8, 4)
    for i, j in np.ndindex(4, 5):
        np.testing.assert_array_equal(values[tiles.block(i, j)], cube[j, :, :, i])
    number = int(tensor["feature_map"].values[64])
    values = grid(parts(plot.filmstrip(tensor, number, image_at=2), "Image")[0])
    film = tensor.values.reshape(5, 8, 8, 4, 4, 4)[1, :, :, 2]
    tiles = Tiles(4, 4, 8, 8, 1)
    for y, x in np.ndindex(4, 4):
        np.testing.assert_array_equal(values[tiles.block(y, x)], film[:, :, y, x])
    with pytest.raises(ArgumentError, match="feature_map=-1 is not in the tensor"):
        plot.filmstrip(tensor, -1)


def test_activity_is_the_mean_over_patches(tensor):
    (element,) = parts(plot.activity(tensor, images=[1]), "Image")
    expected = tensor.values.reshape(5, 64, 4, 4, 4).mean(1)[:, 1]
    raw, drawn = grid(element, "activity"), grid(element)
    tiles = Tiles(1, 5, 4, 4, 1)
    for k in range(5):
        np.testing.assert_allclose(raw[tiles.block(0, k)], expected[k], rtol=1e-6)
        low, high = expected[k].min(), expected[k].max()
        np.testing.assert_allclose(
            drawn[tiles.block(0, k)], (expected[k] - low) / (high - low), atol=1e-5
        )
    with pytest.raises(DataError, match="no shifts"):
        plot.activity(tensor.mean("shift"))


def test_pictures_say_what_they_leave_out(tensor, run):
    def title(picture):
        return picture.opts.get().kwargs["title"]

    assert title(plot.activity(tensor)).endswith("across shifts (2 of 4 images)")
    assert title(plot.activity(tensor, most=2)).endswith("(2 of 4 images, 2 of 5 feature maps)")
    assert title(plot.activity(tensor, images=[0, 1])).endswith("across shifts")
    assert title(plot.feature_map_layers(run, 3)).endswith("(2 of 4 images)")
    assert title(plot.feature_map_layers(run, 3, images=[0])).endswith("blocks")


def test_objective_and_similarity_show_every_replicate(ensemble):
    picture = plot.objective_by_rank(ensemble)
    (points,), (line,) = parts(picture, "Scatter"), parts(picture, "Curve")
    values = ensemble["objective"].values
    np.testing.assert_array_equal(points.dimension_values("value"), values.ravel())
    np.testing.assert_array_equal(line.dimension_values("value"), values.min(1))
    picture = plot.similarity_by_rank(ensemble)
    (points,), (line,) = parts(picture, "Scatter"), parts(picture, "Curve")
    likeness = ensemble["similarity"].values
    others = [np.delete(s, o.argmin()) for s, o in zip(likeness, values, strict=True)]
    np.testing.assert_array_equal(points.dimension_values("value"), np.ravel(others))
    np.testing.assert_allclose(line.dimension_values("value"), np.mean(others, axis=1))
    with pytest.raises(DataError, match="one replicate"):
        plot.similarity_by_rank(ensemble.to_dataset().isel(replicate=[0]))


def test_factors_stand_in_their_place(factors):
    picture = plot.factors(factors)
    neurons, *lattice = parts(picture, "Image")
    raw, drawn = grid(neurons, "loading"), grid(neurons)
    cube = factors["neuron_factor"].values.T.reshape(3, 5, 8, 8)
    tiles = Tiles(3, 5, 8, 8, 1)
    for i, j in np.ndindex(3, 5):
        np.testing.assert_array_equal(raw[tiles.block(i, j)], cube[i, j])
        np.testing.assert_allclose(drawn[tiles.block(i, j)], cube[i, j] / cube[i].max(), rtol=1e-6)
    assert len(lattice) == 3
    for i, one in enumerate(lattice):
        np.testing.assert_allclose(
            grid(one), factors["shift_factor"].values[:, i].reshape(4, 4), rtol=1e-7
        )
        left, top, right, bottom = one.bounds.lbrt()
        assert top == i * 9 - 0.5
        assert bottom - top == pytest.approx(8)
        assert right - left == pytest.approx(8)
    bars = parts(picture, "Rectangles")
    assert [b.label for b in bars] == ["0", "1"]
    loadings = factors["image_factor"].values
    first = bars[0].array().astype(float)
    np.testing.assert_allclose(first[:, 4].reshape(3, 2), loadings[:2].T, rtol=1e-6)
    tall = (first[:, 3] - first[:, 1]).reshape(3, 2)
    np.testing.assert_allclose(tall, 8 * loadings[:2].T / loadings.max(0)[:, None], rtol=1e-6)


def test_labels_have_the_colours_of_their_bars(factors):
    import holoviews as hv

    labels = np.array(["", "cat", "dog", "cat"], dtype=object)
    picture = plot.factors(factors.assign_coords(label=("image", labels)))

    def color(element, kind):
        style = hv.Store.lookup_options("matplotlib", element, "style").kwargs
        return style[kind]

    bars = {b.label: color(b, "facecolor") for b in parts(picture, "Rectangles")}
    assert len(set(bars.values())) == 3
    for name in ("cat", "dog"):
        (key,) = [e for e in parts(picture, "Labels") if f"■ {name}" in e.dimension_values("text")]
        assert color(key, "color") == bars[name]


def test_factors_of_the_raster_have_no_offset_a_column(factors):
    assert "across: dx 0 to 24 px" in texts(plot.factors(factors))
    n = factors.sizes["shift"]
    runs_on = factors.assign_coords(offset_x=("shift", np.arange(n) * 8 % 32 + np.arange(n) // 4))
    assert "across: column of the raster" in texts(plot.factors(runs_on))


def test_one_shift_that_was_selected_is_drawn(run):
    t = run.isel(shift_y=1, shift_x=2).vit.neuron_tensor(1, feature_maps=2)
    film = texts(plot.filmstrip(t, int(t["feature_map"].values[0])))
    assert {"8", "16", "dy (px)", "dx (px)"} <= set(film)
    drawn = texts(plot.factors(synthetic.factorize(t, 2)))
    assert {"across: dx 16 to 16 px", "down: dy 8 to 8 px"} <= set(drawn)


def test_factors_of_a_matrix_have_no_lattice(factors):
    picture = plot.factors(factors.drop_vars("shift_factor").drop_dims("shift"))
    assert len(parts(picture, "Image")) == 1
    best = (
        r"2 replicates.*tree\.vit\.best\(3\).*tree\[\"rank_3\"\]\.to_dataset\(\)\.sel\(replicate="
    )
    with pytest.raises(ArgumentError, match=best):
        plot.factors(factors.expand_dims(replicate=2))
    tree = xr.DataTree.from_dict({"/rank_3": factors.expand_dims(replicate=2)})
    with pytest.raises(ArgumentError, match=best):
        plot.factor_curves(tree["rank_3"])
    with pytest.raises(ArgumentError, match=r"an ensemble was given, of rank_3.*best\(3\)"):
        plot.factors(tree)
    single = xr.DataTree(dataset=factors)
    assert len(parts(plot.factors(single), "Image")) == 4
    with pytest.raises(DataError, match="`shift_factor`"):
        plot.factor_curves(factors.drop_vars("shift_factor"))


def test_what_is_not_a_picture_s_input_is_refused_with_the_remedy(tensor, factors, run, ensemble):
    tucker = factors.drop_vars("component").rename(component="neuron_component")
    for call, message in (
        (lambda: plot.factors(tensor), r"given: the DataArray .*\(neuron, image.*t\.vit\.fact"),
        (lambda: plot.factors(tucker), r"Tucker model.*expected \(neuron, component\).*ncp_hals"),
        (lambda: plot.factor_curves(tensor), r"factors of one fit; given: the DataArray"),
        (lambda: plot.filmstrip(run, 3), r"its `activation` having \(image, shift_y.*neuron_tens"),
        (lambda: plot.filmstrip(tensor.mean("shift"), 3), r"with dims \(neuron, image, shift\)"),
        (lambda: plot.objective_by_rank(factors), r"\(rank, replicate\).*fit_ensemble"),
        (lambda: plot.similarity_by_rank(tensor), r"given: the DataArray `activation`"),
        (lambda: plot.neuron_matrix(tensor), r"\(neuron, image\); given.*shift\).*t\.mean"),
        (lambda: plot.neuron_matrix(run), r"ds\.vit\.neuron_matrix"),
        (lambda: plot.activity(factors), r"needs the variable `activation`.*neuron_tensor"),
        (lambda: plot.activity(run), r"expected|\(neuron, image, shift\) or \(image, shift_y"),
        (lambda: plot.embedding(factors), r"needs the variable `score`.*f\.vit\.embed"),
        (lambda: plot.embedding(tensor), r"expected an embedding Dataset; given: the DataArray"),
        (lambda: plot.explained_variance(tensor), r"`explained_variance_ratio` with dims \(pc\)"),
        (lambda: plot.predictions(tensor), r"`logits` with dims \(image, class\)"),
        (lambda: plot.attention_matrices(tensor), r"`attention` with dims .*variables="),
        (lambda: plot.feature_map_layers(tensor, 3), r"`activation` with dims .*extraction"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(ArgumentError, match="mode='time'"):
        plot.factor_curves(factors, "time")
    with pytest.raises(ArgumentError, match="every=0"):
        plot.filmstrip(tensor, int(tensor["feature_map"].values[0]), every=0)


def test_filmstrip_takes_the_tensor_from_a_dataset(tensor):
    number = int(tensor["feature_map"].values[0])
    held = xr.Dataset({"activation": tensor})
    one, other = (parts(plot.filmstrip(d, number), "Image")[0] for d in (tensor, held))
    np.testing.assert_array_equal(grid(one), grid(other))


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("mode", ["neuron", "image", "shift"])
def test_factor_curves_hold_the_loadings(factors, mode, overlay):
    picture = plot.factor_curves(factors, mode, overlay=overlay)
    kind = "Curve" if mode != "image" else "Scatter" if overlay else "Rectangles"
    assert len(parts(picture, kind)) == 3
    for k, curve in picture.items():
        np.testing.assert_allclose(
            curve.dimension_values("loading"), factors[f"{mode}_factor"].values[:, k], rtol=1e-7
        )


def test_factor_rows_do_not_overlap_and_begin_at_zero(factors):
    loading = factors["shift_factor"].values
    for k, curve in plot.factor_curves(factors, "shift").items():
        height = curve.dimension_values("height")
        np.testing.assert_allclose(
            height, 2 - k + 0.84 * loading[:, k] / loading[:, k].max(), rtol=1e-6
        )
    signed = factors.assign(shift_factor=(("shift", "component"), -loading))
    for k, curve in plot.factor_curves(signed, "shift").items():
        height = curve.dimension_values("height")
        assert 2 - k - 1e-9 <= height.min() < height.max() <= 2 - k + 0.42


def test_factor_curves_name_what_stands_along_the_axis(factors):
    def ticks(f, mode):
        return plot.factor_curves(f, mode).opts.get().kwargs["xticks"]

    assert ticks(factors, "image") == [(0.5, "0"), (2.5, "1")]
    names = [str(v) for v in factors["image"].values]
    assert [t for _, t in ticks(factors.drop_vars("label"), "image")] == names
    apart = factors.isel(image=[0, 2, 1, 3])
    assert [t for _, t in ticks(apart, "image")] == [names[i] for i in (0, 2, 1, 3)]
    assert ticks(factors, "shift") == [(0.0, "0"), (4.0, "8"), (8.0, "16"), (12.0, "24")]
    maps = list(dict.fromkeys(factors["feature_map"].values.tolist()))
    assert ticks(factors, "neuron") == [(64.0 * k, str(m)) for k, m in enumerate(maps)]


def test_factor_curves_draw_a_tucker_model(factors):
    tucker = factors.drop_vars("component").rename(component="shift_component")
    picture = plot.factor_curves(tucker, "shift")
    assert list(picture.keys()) == [0, 1, 2]


def test_embedding_by_feature_map_keeps_the_order_of_the_tensor(embedded):
    picture = plot.embedding(embedded, pcs=(2, 1))
    numbers = list(dict.fromkeys(embedded["feature_map"].values.tolist()))
    assert list(picture.keys()) == numbers
    score = embedded["score"].values
    for number, points in picture.items():
        at = embedded["feature_map"].values == number
        np.testing.assert_array_equal(points.dimension_values("pc2"), score[at, 1])
        np.testing.assert_array_equal(points.dimension_values("pc1"), score[at, 0])


@pytest.mark.parametrize("color", ["patch_row", "patch_col", "both"])
def test_embedding_by_place(embedded, color):
    (points,) = parts(plot.embedding(embedded, color), "Points")
    np.testing.assert_array_equal(points.dimension_values("pc1"), embedded["score"].values[:, 0])
    for name in ("patch_row", "patch_col"):
        np.testing.assert_array_equal(points.dimension_values(name), embedded[name].values)
    number = int(embedded["feature_map"].values[-1])
    behind, front = parts(plot.embedding(embedded, color, feature_map=number), "Points")
    assert set(front.dimension_values("feature_map")) == {number}
    assert len(behind) + len(front) == embedded.sizes["neuron"]


def test_one_map_of_a_class_that_others_have_as_well(embedded):
    import holoviews as hv

    classes = embedded["patch_row"].values // 4
    e = embedded.assign_coords(cluster=("neuron", classes))
    number = int(embedded["feature_map"].values[-1])
    picture = plot.embedding(e, "cluster", feature_map=number)
    drawn = parts(picture, "Points")
    for points in drawn:
        style = hv.Store.lookup_options("matplotlib", points, "style").kwargs
        chosen = points.dimension_values("feature_map") == number
        assert (chosen == (style["color"] != "#d9d9d9")).all()
    assert sum(map(len, drawn)) == e.sizes["neuron"]
    assert plot.render(picture, dpi=40)["png"][1:4] == b"PNG"


def test_both_backends_have_the_key_of_places(embedded):
    import base64
    import re
    from io import BytesIO

    import holoviews as hv
    from PIL import Image

    some = embedded.isel(neuron=embedded["patch_row"].values > 2)  # rows 3 to 7
    rows, cols = some["patch_row"].values - 3, some["patch_col"].values
    picture = plot.embedding(some, "both", feature_map=int(some["feature_map"].values[0]))
    drawn = parts(picture, "Points")[-1].dimension_values("color")
    first = (some["feature_map"] == some["feature_map"][0]).values
    (inset,) = plot.figure(picture).axes[0].child_axes
    keys = [np.asarray(inset.images[0].get_array())]
    (panel,) = hv.render(picture, backend="bokeh").elements
    (text,) = (one.html for one in panel.elements)
    assert re.search('alt="([^"]*)"', text)[1].startswith("Patch grid of 5 rows and 8 columns")
    assert panel.position.symbol == "bottom_right"
    png = base64.b64decode(re.search('base64,([^"]*)"', text)[1])
    keys.append(np.asarray(Image.open(BytesIO(png))))
    for key in keys:
        assert key.shape == (5, 8, 3)
        hexes = [f"#{bytes(c).hex()}" for c in key[rows[first], cols[first]]]
        assert hexes == drawn.tolist()


def test_patch_colours_tell_every_patch():
    v, u = np.meshgrid(np.linspace(0, 1, 14), np.linspace(0, 1, 14))
    assert len(np.unique(plot.patch_colors(v, u).reshape(-1, 3), axis=0)) == 196


@pytest.mark.parametrize("color", ["feature_map", "patch_row", "both"])
def test_embedding_in_three_axes(embedded, color):
    picture = plot.embedding_3d(embedded, color)
    for k in range(3):
        np.testing.assert_array_equal(
            picture.dimension_values(f"pc{k + 1}"), embedded["score"].values[:, k]
        )
    groups = {"feature_map": 5, "patch_row": 8, "both": 64}[color]
    assert len(np.unique(picture.dimension_values("code"))) == groups
    assert plot.render(picture, dpi=50)["png"].startswith(b"\x89PNG")


def of(factors, dim):
    return synthetic.embed(factors, dim=dim)


def test_embedding_of_images_by_label_and_by_image(factors):
    e = of(factors, "image")
    picture = plot.embedding(e)
    assert picture.kdims[0].name == "label"
    assert list(picture.keys()) == ["0", "1"]
    np.testing.assert_array_equal(picture["1"].dimension_values("pc1"), e["score"].values[2:, 0])
    assert list(plot.embedding(e, "image").keys()) == [str(v) for v in e["image"].values]
    assert plot.embedding(e.drop_vars("label")).kdims[0].name == "image"
    with pytest.raises(ArgumentError, match="embedding of dim 'image' is coloured by one of 'labe"):
        plot.embedding(e, "patch_row")
    with pytest.raises(ArgumentError, match="embedding of dim 'image'"):
        plot.embedding(e, feature_map=1)
    with pytest.raises(DataError, match=r"no coordinate `label` along image; .*by image"):
        plot.embedding(e.drop_vars("label"), "label")


def _options(element):
    return element.opts.get("plot").kwargs | element.opts.get("style").kwargs


@pytest.mark.parametrize("color", ["offset_y", "offset_x"])
def test_embedding_of_shifts_is_coloured_in_a_circle(factors, color):
    import matplotlib as mpl

    e = of(factors, "shift")
    (points,) = parts(plot.embedding(e, color), "Points")
    np.testing.assert_array_equal(points.dimension_values(color), e[color].values)
    options = _options(points)
    assert options["clim"] == (0.0, 32.0)  # offsets 0, 8, 16, 24: a step past the last
    palette = np.array([mpl.colors.to_rgb(c) for c in options["cmap"]])
    steps = np.abs(np.diff(np.vstack([palette, palette[:1]]), axis=0)).max(1)
    assert steps[-1] < 0.05  # the last colour is next to the first
    given = e.copy()
    given[color].attrs["period"] = 40
    (points,) = parts(plot.embedding(given, color), "Points")
    assert _options(points)["clim"] == (0.0, 40.0)


def test_embedding_by_edge_distance_and_by_a_label_of_neurons(embedded):
    far = np.minimum(embedded["patch_row"].values, 7 - embedded["patch_row"].values)
    e = embedded.assign_coords(edge_distance=("neuron", far))
    (points,) = parts(plot.embedding(e, "edge_distance"), "Points")
    np.testing.assert_array_equal(points.dimension_values("edge_distance"), far)
    e = embedded.assign_coords(label=("neuron", np.where(far > 1, "inner", "outer")))
    assert list(plot.embedding(e, "label").keys()) == ["outer", "inner"]
    with pytest.raises(DataError, match="no coordinate `edge_distance` along neuron"):
        plot.embedding(embedded, "edge_distance")


@pytest.mark.parametrize(
    ("dim", "color", "key"),
    [
        ("neuron", "feature_map", "legend"),
        ("neuron", "patch_row", "bar"),
        ("neuron", "both", "bar"),
        ("image", "label", "legend"),
        ("shift", "offset_x", "bar"),
    ],
)
def test_three_axes_have_paper_and_a_key(factors, dim, color, key):
    from io import BytesIO

    from PIL import Image

    picture = plot.embedding_3d(of(factors, dim), color)
    drawn = plot.figure(picture)
    assert [a.name for a in drawn.axes] == ["3d"]
    legend = drawn.axes[0].get_legend()
    assert (legend is not None) == (key == "legend")
    assert len(drawn.axes[0].child_axes) == (key == "bar")
    if legend:
        expected = {"feature_map": factors["feature_map"], "label": factors["label"]}[color]
        words = [t.get_text() for t in legend.get_texts()]
        assert words == [str(v) for v in dict.fromkeys(expected.values.tolist())]
    # without paper the edges of letters are transparent black, which looks bold or smeared
    pixels = np.asarray(Image.open(BytesIO(plot.render(picture, dpi=50)["png"])).convert("RGBA"))
    assert (pixels[..., 3] == 255).all()
    assert (pixels[0, 0] == 255).all()


def test_tick_labels_of_an_embedding_do_not_collide(embedded):
    score = embedded["score"].values
    for span in (0.0175, 0.02, 0.18, 1.2e4):  # the first three collided with Matplotlib's ticks
        e = embedded.assign(score=(("neuron", "pc"), score * span / np.ptp(score[:, 0])))
        drawn = plot.figure(plot.embedding(e))
        paint(drawn)
        (axis,) = drawn.axes
        boxes = [t.get_window_extent() for t in axis.get_xticklabels() if t.get_text()]
        left, right = axis.get_window_extent().x0, axis.get_window_extent().x1
        boxes = [b for b in boxes if left < (b.x0 + b.x1) / 2 < right]
        assert len(boxes) >= 3
        assert all(a.x1 + 2 < b.x0 for a, b in pairwise(boxes))


def test_embedding_refuses(embedded):
    with pytest.raises(ArgumentError, match="color='hue'"):
        plot.embedding(embedded, "hue")
    with pytest.raises(ArgumentError, match=r"pcs=\(1, 9\).*axes 1 to 3"):
        plot.embedding(embedded, pcs=(1, 9))
    with pytest.raises(ArgumentError, match="feature_map=-3 is not embedded"):
        plot.embedding(embedded, feature_map=-3)
    with pytest.raises(DataError, match="no coordinate `feature_map`"):
        plot.embedding(xr.Dataset({"score": (("neuron", "pc"), embedded["score"].values)}))


def test_frame_takes_the_unshifted_one(run):
    moved = run["activation"].roll(shift_y=1, shift_x=2, roll_coords=True)
    xr.testing.assert_equal(
        frame(moved, layer=1).drop_vars(("shift_y", "shift_x")),
        run["activation"].isel(shift_y=0, shift_x=0).sel(layer=1).drop_vars(("shift_y", "shift_x")),
    )


def test_nothing_written_lies_outside_or_overlaps(stim, run, detail, tensor, factors):
    many = synthetic.extraction(stim, step=8, layers=(0,), channels=30)
    # numbers of three digits after the point, which are wider than 24 columns are
    crowded = synthetic.neuron_tensor(many, 0, maps=24) * 0.01234
    for picture in (
        plot.stimuli(stim),
        plot.shifts(stim["pixels"].values[0], [0, 8], [0, 8, 16]),
        plot.predictions(run),
        plot.attention_matrices(detail),
        plot.feature_map_layers(detail, 0),
        plot.neuron_matrix(tensor.mean("shift")),
        plot.filmstrip(tensor, int(tensor["feature_map"].values[0])),
        plot.activity(tensor),
        plot.activity(crowded),
        plot.factors(factors),
    ):
        drawn = plot.figure(picture)
        paint(drawn)
        whole = drawn.axes[0].get_window_extent()
        boxes = [t.get_window_extent() for t in drawn.axes[0].texts if t.get_text()]
        words = [t.get_text() for t in drawn.axes[0].texts if t.get_text()]
        for i, a in enumerate(boxes):
            assert a.x0 > whole.x0 - 3, words[i]
            assert a.x1 < whole.x1 + 3, words[i]
            for j, b in enumerate(boxes[:i]):
                wide = min(a.x1, b.x1) - max(a.x0, b.x0)
                tall = min(a.y1, b.y1) - max(a.y0, b.y0)
                assert wide < 1 or tall < 2, (words[i], words[j])


def test_render_repeats_itself_and_save_knows_its_formats(tmp_path, embedded):
    picture = plot.explained_variance(embedded)
    first, again = (plot.render(picture, ("png", "pdf", "svg"), dpi=60) for _ in range(2))
    assert first == again
    assert first["pdf"].startswith(b"%PDF")
    assert b"<svg" in first["svg"]
    assert plot.save(picture, tmp_path / "a.svg").read_bytes() == first["svg"]
    with pytest.raises(ArgumentError, match=r"\.png, \.pdf, \.svg or \.html"):
        plot.save(picture, tmp_path / "a.gif")
    with pytest.raises(ArgumentError, match=r"a\.png' does not exist: make '.*none' first"):
        plot.save(picture, tmp_path / "none" / "a.png")
    with pytest.raises(ArgumentError, match="path is None; expected a name"):
        plot.save(picture, None)
    for wrong in (None, embedded, 3):
        for use in (plot.render, lambda e: plot.save(e, tmp_path / "b.png")):
            with pytest.raises(ArgumentError, match=r"the element is .*; expected what a function"):
                use(wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"]


def test_no_figure_is_left_with_pyplot(embedded):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot.render(plot.embedding(embedded), dpi=50)
    assert plt.get_fignums() == before


def test_one_of_everything():
    stim = synthetic.stimuli(per_class=1, classes=(3,))
    ds = synthetic.extraction(stim, step=None, layers=(0,), channels=4, heads=1)
    tensor = synthetic.neuron_tensor(ds, 0, maps=1)
    factors = synthetic.factorize(tensor, 1)
    for picture in (
        plot.stimuli(stim),
        plot.shifts(stim["pixels"].values[0], [0], [0]),
        plot.predictions(ds),
        plot.attention_matrices(ds),
        plot.attention_query(ds, (0, 0), layer=0),
        plot.feature_map_layers(ds, 3),
        plot.neuron_matrix(tensor.mean("shift")),
        plot.filmstrip(tensor, int(tensor["feature_map"].values[0])),
        plot.activity(tensor),
        plot.factors(factors),
        plot.factor_curves(factors),
        plot.objective_by_rank(synthetic.ensemble(tensor, (1,), 1)[0]),
    ):
        assert plot.render(picture, dpi=50)["png"].startswith(b"\x89PNG")
