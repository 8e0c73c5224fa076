"""Equivariance, against a literal version, planted truths and the patch embedding's identity."""

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import vitxr
from vitxr.errors import DataError
from vitxr.names import LATTICE, validate
from vitxr.stimuli.shifts import ShiftGrid, no_shifts

RESULTS = (
    "equivariance_error",
    "still_error",
    "invariance",
    "variance",
    "error_map",
    "phase_error",
    "phase_activity",
)


def make(values, lattice, patch):
    """Wrap (image, shift_y, shift_x, layer, map, row, col) as an extraction does."""
    n, _, _, layers, maps, rows, columns = values.shape
    ds = lattice.assign_coords(
        image=[f"i{k}" for k in range(n)],
        layer=np.arange(layers) * 2,
        feature_map=np.arange(maps) + 3,
        patch_row=np.arange(rows),
        patch_col=np.arange(columns),
    )
    dims = list(LATTICE)
    ds["activation"] = (dims, values)
    ds.attrs = {"patch_height": patch[0], "patch_width": patch[1], "model": "planted"}
    return ds


def random(seed=0, n=3, layers=2, maps=3, grid=(4, 6), patch=(4, 2), step=3, scheme="grid"):
    lattice = ShiftGrid(step, scheme).lattice(grid[0] * patch[0], grid[1] * patch[1])
    shape = (n, lattice.sizes["shift_y"], lattice.sizes["shift_x"], layers, maps, *grid)
    values = np.random.default_rng(seed).normal(5, 1, shape)
    return make(values, lattice, patch)


def offsets(ds):
    """Offsets of every frame, (shift_y, shift_x, 2)."""
    y, x = xr.broadcast(ds.offset_y, ds.offset_x)
    return np.stack([y.transpose("shift_y", "shift_x"), x.transpose("shift_y", "shift_x")], -1)


def nearest(offset, patch):
    """Whole patches and the rest, from minus half a patch on."""
    steps = (offset + patch // 2) // patch
    return steps, offset - steps * patch


def literal(ds):
    """Every formula of the docstring, frame by frame."""
    a = ds.activation.values.astype(np.float64)
    n, height, width, layers, maps, rows, columns = a.shape
    by = offsets(ds) - offsets(ds)[0, 0]
    patch = ds.attrs["patch_height"], ds.attrs["patch_width"]
    out = {name: np.full((layers, maps), np.nan) for name in RESULTS[:4]}
    out["error_map"] = np.full((layers, maps, rows, columns), np.nan)
    phases = {}
    for layer, m in np.ndindex(layers, maps):
        x = a[:, :, :, layer, m]
        variance = (x**2).mean() - x.mean() ** 2
        squares, still, where, of_phase, activity = [], [], [], {}, {}
        for i, y, z in np.ndindex(n, height, width):
            (down, phase_y), (right, phase_x) = (
                nearest(int(o), p) for o, p in zip(by[y, z], patch, strict=True)
            )
            phase = phase_y, phase_x
            activity.setdefault(phase, []).append(x[i, y, z].mean())
            if (y, z) == (0, 0):
                continue
            back = np.roll(x[i, y, z], (-down, -right), (0, 1))
            d = (back - x[i, 0, 0]) ** 2
            squares.append(d.mean())
            still.append(((x[i, y, z] - x[i, 0, 0]) ** 2).mean())
            where.append(np.roll(d, (down, right), (0, 1)))
            of_phase.setdefault(phase, []).append(d.mean())
        unit = 2 * variance
        out["equivariance_error"][layer, m] = np.mean(squares) / unit
        out["still_error"][layer, m] = np.mean(still) / unit
        out["error_map"][layer, m] = np.mean(where, axis=0) / unit
        out["variance"][layer, m] = variance
        means = x.mean((3, 4)).reshape(n, -1)
        s = means.shape[1]
        between = s * means.mean(1).var(ddof=1) if n > 1 else np.nan
        within = means.var(axis=1, ddof=1).mean()
        out["invariance"][layer, m] = (between - within) / (between + (s - 1) * within)
        for phase, values in activity.items():
            phases.setdefault(("phase_activity", *phase), {})[layer, m] = np.mean(values)
        for phase, values in of_phase.items():
            phases.setdefault(("phase_error", *phase), {})[layer, m] = np.mean(values) / unit
            phases.setdefault(("phase_frames", *phase), {})[layer, m] = len(values) / n
    return out, phases


def check(ds, rtol):
    e = validate(ds.vit.equivariance().compute(), require=RESULTS)
    expected, phases = literal(ds)
    for name, values in expected.items():
        np.testing.assert_allclose(e[name].values, values, rtol, rtol, err_msg=name)
    for name in ("phase_error", "phase_activity"):
        for py in e.phase_y.values.tolist():
            for px in e.phase_x.values.tolist():
                found = e[name].sel(phase_y=py, phase_x=px).values
                true = phases.get((name, py, px))
                if true is None:
                    assert np.isnan(found).all()
                else:
                    true = np.reshape(list(true.values()), found.shape)
                    np.testing.assert_allclose(found, true, rtol, rtol, err_msg=name)
    counts = {k[1:]: v[0, 0] for k, v in phases.items() if k[0] == "phase_frames"}
    stacked = e.phase_frames.stack(p=("phase_y", "phase_x"))
    assert {p: c for p, c in zip(stacked.p.values, stacked.values, strict=True) if c} == counts
    return e


@settings(max_examples=40)
@given(
    n=st.integers(1, 3),
    layers=st.integers(1, 2),
    maps=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    patch=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    step=st.integers(1, 6),
    scheme=st.sampled_from(["grid", "raster"]),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    seed=st.integers(0, 99),
)
def test_equals_the_literal_version(n, layers, maps, grid, patch, step, scheme, dtype, seed):
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    step = min(step, *size)
    ds = random(seed, n, layers, maps, grid, patch, step, scheme)
    if ds.offset_y.size * ds.offset_x.size == 1 or size == [1, 1]:
        return
    ds["activation"] = ds.activation.astype(dtype)
    check(ds, 1e-9 if dtype == "float64" else 2e-4)


def test_offsets_in_any_order():
    """A lattice of the user's own, whose rows are no rows."""
    ds = random(scheme="raster", n=2, maps=2, layers=1)
    rng = np.random.default_rng(0)
    for name, side in (("offset_y", 16), ("offset_x", 12)):
        own = rng.integers(0, side, ds[name].shape)
        ds = ds.assign_coords({name: (("shift_y", "shift_x"), own, ds[name].attrs)})
    check(ds, 1e-9)


@pytest.mark.parametrize("maps", [1, 37])
def test_parts_of_many_maps(maps, monkeypatch):
    from vitxr.analysis import _rolled

    monkeypatch.setattr(_rolled, "_BUFFER_BYTES", 5000)  # some maps at a time, not all
    check(random(maps=maps, layers=1, n=2), 1e-9)


@settings(max_examples=10)
@given(data=st.data(), scheme=st.sampled_from(["grid", "raster"]), variable=st.booleans())
def test_chunked_equals_eager_and_stays_lazy(data, scheme, variable):
    ds = random(scheme=scheme, step=5, grid=(4, 3), patch=(4, 5))
    if variable:
        ds["embedding"] = ds.activation.isel(layer=0, drop=True)
    name = "embedding" if variable else "activation"
    sizes = ds[name].sizes
    chunks = {
        str(d): data.draw(st.integers((k + 1) // 2, k), label=str(d)) for d, k in sizes.items()
    }

    def never(*_args, **_kwargs):
        raise AssertionError("computed")

    with dask.config.set(scheduler=never):
        lazy = ds.assign({name: ds[name].variable.chunk(chunks)})
        back, e = lazy.vit.unshift(name), lazy.vit.equivariance(name)
    assert all(isinstance(e[v].data, da.Array) for v in RESULTS)
    assert back.chunks is not None
    with dask.config.set(scheduler="sync"):
        xr.testing.assert_identical(back.compute(), ds.vit.unshift(name))
        computed = e.compute()
    xr.testing.assert_allclose(computed, ds.vit.equivariance(name), rtol=1e-9)
    for result in e.data_vars:
        assert e[result].dtype == computed[result].dtype
        assert e[result].shape == computed[result].shape


def planted(ds, seed=0):
    """Maps that are those of the first frame, rolled by the whole patches of the shift."""
    a = ds.activation.values.copy()
    by = offsets(ds) - offsets(ds)[0, 0]
    patch = ds.attrs["patch_height"], ds.attrs["patch_width"]
    for y, x in np.ndindex(by.shape[:2]):
        steps = [nearest(int(o), p)[0] for o, p in zip(by[y, x], patch, strict=True)]
        a[:, y, x] = np.roll(a[:, 0, 0], steps, (-2, -1))
    return ds.assign(activation=(ds.activation.dims, a))


@pytest.mark.parametrize("scheme", ["grid", "raster"])
@pytest.mark.parametrize("step", [3, 4])
def test_what_moves_with_the_image_has_no_error(scheme, step):
    e = planted(random(scheme=scheme, step=step)).vit.equivariance()
    assert (e.equivariance_error == 0).all()
    assert (e.error_map == 0).all()
    assert float(e.phase_error.max()) == 0
    assert (e.still_error > 0.3).all()
    np.testing.assert_allclose(e.invariance, 1, atol=1e-9)


def test_independent_noise_has_error_one_and_no_invariance():
    e = random(n=40, grid=(8, 8), patch=(4, 4), step=4, maps=6).vit.equivariance()
    for name in ("equivariance_error", "still_error", "phase_error"):
        np.testing.assert_allclose(e[name], 1, atol=0.03)
    np.testing.assert_allclose(e.error_map.mean(("layer", "feature_map")), 1, atol=0.1)
    np.testing.assert_allclose(e.invariance, 0, atol=0.02)


def test_what_stays_where_it_is():
    ds = random(step=4, patch=(4, 4))
    ds["activation"] = ds.activation.copy(
        data=np.broadcast_to(ds.activation.values[:, :1, :1], ds.activation.shape)
    )
    e = ds.vit.equivariance()
    assert (e.still_error == 0).all()
    assert (e.equivariance_error > 0.5).all()


def test_the_map_of_errors_says_where():
    """One corner of the grid answers with noise, whatever lies there."""
    ds = planted(random(n=6, step=4, patch=(4, 4), grid=(6, 6)))
    a = ds.activation.values
    noise = np.random.default_rng(1).normal(5, 1, a.shape[:-2])
    noise[:, 0, 0] = a[:, 0, 0, :, :, 0, 0]
    a[..., 0, 0] = noise
    e = ds.vit.equivariance()
    assert (e.error_map.argmax(("patch_row", "patch_col"))["patch_row"] == 0).all()
    assert (e.error_map.isel(patch_row=0, patch_col=0) > 0.7).all()
    rest = e.error_map.where((e.patch_row > 0) | (e.patch_col > 0))
    assert float(rest.max()) == 0
    mean = e.error_map.mean(("patch_row", "patch_col"))
    xr.testing.assert_allclose(mean, e.equivariance_error.rename("error_map"))


def test_large_values_with_small_differences():
    """Some channels of real models are a hundred times their own spread from zero."""
    ds = random(n=4, step=4)
    exact = ds.vit.equivariance()
    far = ds.assign(activation=(ds.activation * 0.02 + 300).astype("float32"))
    small = far.assign(activation=far.activation.astype("float64"))
    got, true = far.vit.equivariance(), small.vit.equivariance()
    for name in RESULTS:
        np.testing.assert_allclose(got[name], true[name], rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(got.equivariance_error, exact.equivariance_error, rtol=2e-3)


def test_invariance_is_the_f_ratio_of_scipy():
    from scipy.stats import f_oneway

    ds = random(n=5)
    means = ds.activation.mean(("patch_row", "patch_col")).stack(s=("shift_y", "shift_x"))
    f, _ = f_oneway(*means.transpose("image", "s", ...).values, axis=0)
    icc = (f - 1) / (f + means.sizes["s"] - 1)
    np.testing.assert_allclose(ds.vit.equivariance().invariance, icc)


@pytest.mark.parametrize("scheme", ["grid", "raster"])
def test_patch_embedding_is_permuted_by_whole_patches(stim, model, vit, scheme):
    """Before positions are added, a shift by whole patches moves the embeddings and no more."""
    ds = vitxr.extract(
        stim, model, [0], ShiftGrid(8, scheme), variables=("embedding", "activation"),
        preprocess="raw",
    ).compute()  # fmt: skip
    place = vit.vit.embeddings.position_embeddings.detach().numpy()[0, 1:]
    rows, columns = ds.sizes["patch_row"], ds.sizes["patch_col"]
    place = xr.DataArray(
        place.T.reshape(-1, rows, columns), dims=("feature_map", "patch_row", "patch_col")
    )
    bare = ds.assign(embedding=ds.embedding - place)
    back = bare.vit.unshift("embedding")
    assert (back.phase_y == 0).all()
    assert (back.phase_x == 0).all()
    first = back.isel(shift_y=0, shift_x=0)
    scale = float(abs(first).max())
    assert float(abs(back - first).max()) < 1e-5 * scale
    assert float(bare.embedding.std()) > 1e-3 * scale  # there was something to permute
    e = bare.vit.equivariance("embedding")
    assert e.equivariance_error.dims == ("feature_map",)
    assert float(e.equivariance_error.max()) < 1e-9
    assert float(e.still_error.min()) > 0.1
    # With positions, and after a block that sees all patches, it is no longer exact.
    assert float(ds.vit.equivariance("embedding").equivariance_error.min()) > 1e-7
    assert float(ds.vit.equivariance().equivariance_error.min()) > 1e-7


@pytest.mark.parametrize("scheme", ["grid", "raster"])
@pytest.mark.parametrize("patch", [(4, 4), (3, 5), (1, 2)])
def test_unshift_rolls_every_frame(scheme, patch):
    ds = random(patch=patch, step=2, scheme=scheme)
    back = validate(ds.vit.unshift().to_dataset()).activation
    assert back.offset_y.dims == back.phase_y.dims
    by = offsets(ds)
    for y, x in np.ndindex(by.shape[:2]):
        steps = [nearest(int(o), p)[0] for o, p in zip(by[y, x], patch, strict=True)]
        frame = np.roll(ds.activation.values[:, y, x], [-s for s in steps], (-2, -1))
        assert (back.values[:, y, x] == frame).all()
    whole = ds.offset_y - back.phase_y
    assert (whole % patch[0] == 0).all()
    assert back.phase_x.min() >= -(patch[1] // 2)
    assert back.phase_x.max() < patch[1] - patch[1] // 2
    assert back.phase_y.attrs["units"] == "px"


def test_parts_of_the_lattice():
    ds = random(step=2)
    row = ds.isel(shift_y=2)
    kept = row.expand_dims("shift_y").assign_coords(
        offset_y=("shift_y", [int(row.offset_y)], row.offset_y.attrs)
    )
    kept["activation"] = kept.activation.transpose(*ds.activation.dims)
    a, b = row.vit.equivariance(), kept.vit.equivariance()
    xr.testing.assert_allclose(a, b)
    xr.testing.assert_identical(
        row.vit.unshift().squeeze("shift_y"), ds.vit.unshift().isel(shift_y=2)
    )
    xr.testing.assert_allclose(
        ds.sel(layer=2).vit.equivariance().squeeze("layer"),
        ds.vit.equivariance().sel(layer=2),
    )


def test_stores_keep_what_is_needed(stim, model, tmp_path):
    ds = vitxr.extract(
        stim, model, [0, 2], ShiftGrid(11), feature_maps=5, preprocess="raw",
        store=tmp_path / "s.zarr", progress=False,
    )  # fmt: skip
    e = ds.vit.equivariance().compute()
    xr.testing.assert_allclose(e, ds.compute().vit.equivariance())
    assert e.channel.dims == ("layer", "feature_map")
    assert e.attrs["model_fingerprint"] == ds.attrs["model_fingerprint"]
    assert (e.attrs["shift_scheme"], e.attrs["shift_step"]) == ("grid", 11)


def test_constant_maps_and_single_images_are_nan():
    ds = random(n=1)
    ds["activation"] = ds.activation.where(ds.feature_map != 4, 7.7)
    e = ds.vit.equivariance()
    assert np.isnan(e.equivariance_error.sel(feature_map=4)).all()
    assert (e.variance.sel(feature_map=4) == 0).all()
    assert np.isfinite(e.equivariance_error.sel(feature_map=3)).all()
    assert np.isnan(e.invariance).all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 7.7, 1e-9])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_constant_map_is_not_a_perfect_one(value, dtype):
    """Its mean may not be itself exactly."""
    ds = random(grid=(7, 7), patch=(4, 4), step=4)
    ds["activation"] = ds.activation.where(ds.feature_map != 4, value).astype(dtype)
    e = ds.vit.equivariance()
    for name in ("equivariance_error", "still_error", "error_map", "phase_error", "invariance"):
        assert np.isnan(e[name].sel(feature_map=4)).all(), name
        assert np.isfinite(e[name].sel(feature_map=3)).any(), name
    assert (e.variance.sel(feature_map=4) == 0).all()


def test_any_variable_on_the_patch_grid(stim, model):
    """Attention output, MLP, queries of a head, a module with and without layers."""
    ds = vitxr.extract(
        stim, model, [0, 2], ShiftGrid(8), preprocess="raw",
        variables=("attention_output", "mlp_hidden", "attention_query", "embedding"),
        modules={"gate": "vit.layers.{layer}.mlp.fc1", "patch": "vit.embeddings"},
    ).compute()  # fmt: skip
    query = ds.sel(head=1)
    for name, of in (
        ("attention_output", ds), ("mlp_hidden", ds), ("attention_query", query), ("gate", ds),
        ("patch", ds),
    ):  # fmt: skip
        x = (
            of[name]
            .rename(
                {
                    d: "feature_map"
                    for d in of[name].dims
                    if d in {"hidden_unit", "head_channel", "gate_unit", "patch_unit"}
                }
            )
            .drop_vars("head", errors="ignore")
        )
        if "layer" not in x.dims:
            x = x.expand_dims("layer", 3)
        same = x.rename("activation").to_dataset().assign_attrs(ds.attrs)
        e, true = of.vit.equivariance(name), same.vit.equivariance()
        assert ("layer" in e.dims) == (name != "patch")
        for result in RESULTS:
            np.testing.assert_allclose(e[result].values.ravel(), true[result].values.ravel())
        assert e.attrs["variable"] == name
        assert e.attrs.get("head") == (1 if name == "attention_query" else None)
        back = of.vit.unshift(name)
        assert back.name == name
        np.testing.assert_array_equal(back.values.ravel(), same.vit.unshift().values.ravel())
    # A block that happens to be selected is none of the embedding's.
    assert "layer" not in ds.sel(layer=0).vit.equivariance("embedding").coords


def test_stores_that_are_not_whole_are_refused():
    ds = random()
    partly = ds.assign_coords(written=(("image", "shift_y"), np.arange(18).reshape(3, 6) < 12))
    partly["activation"] = partly.activation.where(partly.written)
    with pytest.raises(DataError, match=r"`activation` is NaN where it is not written yet.*isel"):
        partly.vit.equivariance()
    whole = partly.isel(image=partly.written.all("shift_y").values)
    xr.testing.assert_allclose(whole.vit.equivariance(), ds.isel(image=slice(2)).vit.equivariance())
    assert np.isnan(partly.vit.unshift().isel(image=2)).all()
    # NaN for another reason is in all that it is part of.
    ds["activation"][1, 2, 1, 0, 1, 0, 0] = np.nan
    e = ds.vit.equivariance()
    for name in RESULTS:
        of_map = np.isnan(e[name].isel(layer=0, feature_map=1))
        # The mean over shifts of another phase does not see it.
        assert of_map.any() if name == "phase_activity" else of_map.all(), name
        ok = e[name].isel(feature_map=[0, 2])
        assert np.isfinite(ok.dropna("phase_y", how="all") if "phase_y" in ok.dims else ok).any()


def test_refusals():
    ds = random()
    wrong = ds.assign_coords(offset_y=ds.offset_y.assign_attrs(period=18))
    with pytest.raises(DataError, match=r"4 patches of 4 px do not make.*18 px"):
        wrong.vit.equivariance()
    with pytest.raises(DataError, match=r"3 patches of 4 px do not make.*Keep all patches"):
        ds.isel(patch_row=slice(3)).vit.unshift()
    with pytest.raises(DataError, match="rolled back already"):
        ds.assign(activation=ds.vit.unshift()).vit.equivariance()
    with pytest.raises(DataError, match="no attribute patch_height"):
        ds.drop_attrs(deep=False).vit.unshift()
    with pytest.raises(DataError, match="no coordinate offset_x"):
        ds.drop_vars("offset_x").vit.unshift()
    with pytest.raises(DataError, match="has no attribute `period`"):
        ds.drop_attrs().assign_attrs(ds.attrs).vit.unshift()
    with pytest.raises(DataError, match="one shift: equivariance compares two"):
        ds.isel(shift_y=[0], shift_x=[0]).vit.equivariance()
    with pytest.raises(DataError, match="not shifted and no others: extract with shifts="):
        make(np.zeros((1, 1, 1, 1, 1, 2, 2)), no_shifts(), (4, 4)).vit.equivariance()
    with pytest.raises(DataError, match="has no `embedding`"):
        ds.vit.equivariance("embedding")
    attention = ds.assign(
        attention=(("image", "shift_y", "shift_x", "query"), np.zeros((3, 6, 4, 5)))
    )
    with pytest.raises(DataError, match=r"`attention` has dims .* which are not on the patch grid"):
        attention.vit.unshift("attention")
    with pytest.raises(DataError, match="`activation` is empty along image"):
        ds.isel(image=[]).vit.unshift()


@pytest.mark.parametrize("dim", ["patch_row", "patch_col"])
def test_patches_in_another_order_are_refused(dim):
    ds = vitxr.catalog.open("activations.digits")
    turned = ds.isel({dim: slice(None, None, -1)})
    for method in (turned.vit.equivariance, turned.vit.unshift):
        with pytest.raises(DataError, match=rf"{dim} does not run from 0 to 7.*sortby\('{dim}'\)"):
            method()
    xr.testing.assert_identical(
        turned.sortby(dim).vit.unshift().compute(), ds.vit.unshift().compute()
    )
