"""Going on with an ensemble: what is kept is kept bit for bit, what is another one is refused."""

import json

import numpy as np
import pytest
import xarray as xr

import vitxr
from vitxr.errors import ArgumentError, DataError
from vitxr.factor import checks, factorize, fit_ensemble, methods
from vitxr.names import validate

DIMS = ("neuron", "image", "shift")
GIVEN = {"ranks": [2, 3], "replicates": 3, "random_state": 8, "progress": False}


def planted(dtype="float32"):
    rng = np.random.default_rng(0)
    data = np.einsum("ir,jr,kr->ijk", *(rng.gamma(0.6, size=(n, 3)) for n in (16, 6, 5)))
    data += 0.1 * rng.random(data.shape)
    t = xr.DataArray(data.astype(dtype), dims=DIMS, coords={"layer": 4})
    t = t.assign_coords(image=np.array(list("uvwxyz"), object))
    levels = {"feature_map": ("neuron", np.repeat([7, 9], 8)), "patch": ("neuron", [*range(8)] * 2)}
    return t.assign_coords(levels).set_index(neuron=["feature_map", "patch"])


@pytest.fixture(scope="module")
def tensor():
    return planted()


@pytest.fixture(scope="module")
def whole(tensor):
    return fit_ensemble(tensor, **GIVEN)


def interrupt_after(patch, ended):
    """Press Ctrl-C when so many fits have ended."""
    real, seen = methods.hals.fit_models, []

    def fit_models(*args, **given):
        def stop(number, iteration, objective, last):
            seen.extend([number] * last)
            if len(seen) >= ended:
                raise KeyboardInterrupt

        return real(*args, **{**given, "callback": stop})

    patch.setattr(methods.hals, "fit_models", fit_models)


def count_fits(patch):
    real, ranks = methods.hals.fit_models, []

    def fit_models(x, starts, **given):
        starts = list(starts)
        ranks.extend(start[0].shape[1] for start in starts)
        return real(x, starts, **given)

    patch.setattr(methods.hals, "fit_models", fit_models)
    return ranks


def by_seed(tree, rank):
    """Weight, factors and history of every fit, in the order that factorize gives."""
    child = tree[f"rank_{rank}"].to_dataset(inherit=False)
    out = {}
    for i in range(child.sizes["replicate"]):
        f = child.isel(replicate=i)
        order = np.argsort(-f.weight.values, kind="stable")
        names = ["weight", *(f"{d}_factor" for d in DIMS)]
        values = [f[name].values[..., order] for name in names]
        history = f.objective_history.values[: int(f.iterations)]
        out[int(f.seed)] = (*values, history, f.objective.values, f.seconds.values)
    return out


@pytest.mark.parametrize("ending", ["nc", "zarr"])
def test_an_interrupted_ensemble_goes_on(tensor, whole, ending, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.warns(RuntimeWarning, match=r"4 of 6 fits have no model.*resume=\.\.\. to fit"):
            partial = fit_ensemble(tensor, **GIVEN)
    assert partial.attrs["interrupted"] == 4
    saved = vitxr.open(vitxr.save(partial, tmp_path / f"partial.{ending}"))
    with monkeypatch.context() as patch:
        fitted = count_fits(patch)
        tree = fit_ensemble(tensor, **GIVEN, resume=saved)
    assert len(fitted) == 4
    assert tree.attrs["interrupted"] == 0
    assert not tree.failed.any()
    validate(tree.to_dataset())
    for rank in (2, 3):
        before, after, at_once = (by_seed(one, rank) for one in (partial, tree, whole))
        assert after.keys() == at_once.keys()
        kept = partial.seed.sel(rank=rank).values[~partial.failed.sel(rank=rank).values]
        for seed in kept.tolist():
            for mine, old in zip(after[seed], before[seed], strict=True):
                np.testing.assert_array_equal(mine, old)
        for seed in after:
            np.testing.assert_allclose(after[seed][-2], at_once[seed][-2], rtol=1e-5)
            np.testing.assert_allclose(after[seed][1], at_once[seed][1], atol=1e-3)
    np.testing.assert_array_equal(tree.seed, whole.seed)
    np.testing.assert_array_equal(tree.best_replicate, whole.best_replicate)
    np.testing.assert_allclose(tree.similarity, whole.similarity, atol=1e-4)


def test_what_is_whole_is_returned_as_it_is(tensor, whole, monkeypatch):
    fitted = count_fits(monkeypatch)
    again = fit_ensemble(tensor, **GIVEN, resume=whole)
    assert not fitted
    assert (whole.attrs["reused"], again.attrs["reused"]) == (0, 6)
    told = {"reused": 6}
    xr.testing.assert_identical(again.to_dataset(), whole.to_dataset().assign_attrs(told))
    for rank in (2, 3):
        one, other = (e[f"rank_{rank}"].to_dataset() for e in (again, whole))
        xr.testing.assert_identical(one, other)


def test_more_ranks_and_replicates_are_added(tensor, whole, monkeypatch):
    fitted = count_fits(monkeypatch)
    more = fit_ensemble(tensor, **{**GIVEN, "ranks": [1, 3], "replicates": 4}, resume=whole)
    assert sorted(fitted) == [1, 1, 1, 1, 3]
    np.testing.assert_array_equal(more.seed.sel(rank=3)[:3], whole.seed.sel(rank=3))
    np.testing.assert_array_equal(more.objective.sel(rank=3)[:3], whole.objective.sel(rank=3))
    assert list(more.children) == ["rank_1", "rank_3"]
    new = int(more.seed.sel(rank=3)[3])
    one = factorize(tensor, 3, random_state=new)
    np.testing.assert_allclose(more.objective.sel(rank=3)[3], one.objective, rtol=1e-5)


def test_fits_that_ran_into_the_limit_go_further(tensor, whole, monkeypatch):
    given = {**GIVEN, "ranks": 3}
    limit = int(whole.iterations.sel(rank=3).min()) + 1
    short = fit_ensemble(tensor, **given, max_iter=limit)
    limited = int((~short.converged).sum())
    assert 0 < limited < 3
    fitted = count_fits(monkeypatch)
    fit_ensemble(tensor, **given, max_iter=limit, resume=short)
    assert not fitted
    longer = fit_ensemble(tensor, **given, max_iter=2000, resume=short)
    assert len(fitted) == limited
    assert longer.converged.all()
    assert longer.attrs["max_iter"] == 2000
    kept = short.converged.values
    np.testing.assert_array_equal(longer.objective.values[kept], short.objective.values[kept])
    with pytest.raises(ArgumentError, match=f"max_iter 2000, not {limit}"):
        fit_ensemble(tensor, **given, max_iter=limit, resume=longer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tol": 1e-3}, r"fitted with tol 1e-05, not 0\.001"),
        ({"random_state": 9}, "fitted with random_state 8, not 9"),
        ({"compress": False}, r"fitted with options \{\}, not \{'compress': False\}"),
        ({"method": "non_negative_parafac"}, "method 'ncp_hals', not 'non_negative_parafac'"),
        ({"max_iter": 400}, "max_iter 500, not 400: give the same"),
        ({"resume": xr.Dataset()}, "resume is a Dataset; expected an ensemble"),
        ({"resume": xr.DataTree()}, "resume is another tree; expected an ensemble"),
    ],
)
def test_other_settings_are_refused(tensor, whole, change, message, monkeypatch):
    monkeypatch.setattr("vitxr.factor.fits.fit", None)
    with pytest.raises(ArgumentError, match=message):
        fit_ensemble(tensor, **{**GIVEN, "resume": whole, **change})


def another(tensor, values):
    return tensor.copy(data=values)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda t: t.isel(image=slice(5)), "other labels of image: it has 6 of image, this one 5"),
        (
            lambda t: t.assign_coords(image=list("uvwxy?")),
            r"other labels of image: at 5 of image it has z, this one \?",
        ),
        (lambda t: t.drop_vars("image"), "which has labels of image"),
        (lambda t: t.rename(shift="frame"), "dims neuron, image, shift, not neuron, image, frame"),
        (lambda t: t.astype("float64"), "is float32, not float64"),
        (lambda t: another(t, 2 * t.values), "has norm"),
        (
            lambda t: another(t, t.values[:, ::-1]),
            "same labels and norm but other values: a fit of",
        ),
    ],
)
def test_another_tensor_is_refused(tensor, whole, other, message, monkeypatch):
    monkeypatch.setattr("vitxr.factor.fits.fit", None)
    with pytest.raises(DataError, match=message):
        fit_ensemble(other(tensor), **GIVEN, resume=whole)


def test_a_fit_that_broke_down_is_tried_again(tensor, monkeypatch):
    given = {**GIVEN, "ranks": 2, "method": "parafac", "max_iter": 5}
    whole = fit_ensemble(tensor, **given)
    broken, real = int(whole.seed[0, 1]), methods._fit_tensorly
    seen = []

    def breaks(data, rank, method, seed, *rest):
        seen.append(seed)
        if seed == broken and len(seen) <= 3:
            raise DataError("met a singular system")
        return real(data, rank, method, seed, *rest)

    monkeypatch.setattr(methods, "_fit_tensorly", breaks)
    with pytest.warns(RuntimeWarning, match="1 of 3 fits .* met a singular system.$"):
        partial = fit_ensemble(tensor, **given)
    assert partial.attrs["interrupted"] == 0
    seen.extend([0] * 3)
    again = fit_ensemble(tensor, **given, resume=partial)
    assert seen[-1] == broken
    assert len(seen) == 7
    np.testing.assert_array_equal(again.objective, whole.objective)


def test_versions_of_all_parts_are_kept(tensor, whole):
    old = whole.copy()
    for child in old.children.values():
        child.attrs["versions"] = json.dumps({"vitxr": "0.0.1", "numpy": np.__version__})
    more = fit_ensemble(tensor, **{**GIVEN, "ranks": [2, 3, 1]}, resume=old)
    found = json.loads(more.attrs["versions"])
    assert found["vitxr"] == f"0.0.1, {vitxr.__version__}"
    assert found["numpy"] == np.__version__


def test_an_equal_mask_in_another_form_goes_on(tensor, monkeypatch):
    rng = np.random.default_rng(3)
    mask = tensor.copy(data=rng.random(tensor.shape) < 0.9)
    given = {**GIVEN, "ranks": [2], "max_iter": 10}
    tree = fit_ensemble(tensor, **given, mask=mask)
    fitted = count_fits(monkeypatch)
    for form in (
        mask.transpose("shift", "neuron", "image"),
        mask.chunk(neuron=5, image=2, shift=-1),
        mask.chunk(neuron=-1, image=1, shift=2).transpose("image", "shift", "neuron"),
    ):
        again = fit_ensemble(tensor, **given, mask=form, resume=tree)
        assert again.attrs["options"] == tree.attrs["options"]
    monkeypatch.setattr(checks, "IN_MEMORY_BYTES", 0)  # read from its chunks, in another order
    for chunks in ({"image": 2, "neuron": -1}, {"shift": 2, "image": 4}, {"neuron": 3}):
        fit_ensemble(tensor.chunk(chunks), **given, mask=mask.chunk(neuron=5), resume=tree)
    assert not fitted
    over = mask.isel(shift=0, drop=True)
    tree = fit_ensemble(tensor, **given, mask=over)
    fitted.clear()
    fit_ensemble(tensor, **given, mask=over.broadcast_like(tensor), resume=tree)
    assert not fitted


def test_another_mask_is_said_without_hashes(tensor):
    mask = tensor.copy(data=np.ones(tensor.shape, bool))
    mask[0, 0, 0] = mask[1, 1, 1] = False
    given = {**GIVEN, "ranks": [2], "max_iter": 10}
    tree = fit_ensemble(tensor, **given, mask=mask)
    fewer = mask.copy(deep=True)
    fewer[2, 2, 2] = False
    sizes = r"\(image: 6, neuron: 16, shift: 5\)"
    with pytest.raises(ArgumentError) as raised:
        fit_ensemble(tensor, **given, mask=fewer, resume=tree)
    assert "fingerprint" not in str(raised.value)
    said = rf"fitted with mask {sizes}, 478 of 480 True, not {sizes}, 477 of 480 True: give"
    with pytest.raises(ArgumentError, match=said):
        fit_ensemble(tensor, **given, mask=fewer, resume=tree)
    with pytest.raises(ArgumentError, match=rf"mask {sizes}, 478 of 480 True, not none: give"):
        fit_ensemble(tensor, **given, resume=tree)
    moved = mask.copy(deep=True)
    moved[0, 0, 0], moved[3, 3, 3] = True, False
    with pytest.raises(
        ArgumentError, match=rf"another mask of the same sizes.*{sizes}.*True: give"
    ):
        fit_ensemble(tensor, **given, mask=moved, resume=tree)
    with pytest.raises(ArgumentError, match=r"True; options \{\}, not \{'nonnegative'"):
        fit_ensemble(tensor, **given, mask=fewer, nonnegative="image", resume=tree)
