"""Factors and tensors of other data are told apart: shifts, images, source, treatment."""

import numpy as np
import pytest
import xarray as xr
from test_factor import neuron_tensor

import vitxr
from vitxr.errors import ArgumentError, DataError
from vitxr.factor import (
    explained,
    factor_match_score,
    factorize,
    fit_ensemble,
    reconstruct,
    smooth,
    transform,
)
from vitxr.factor.same import difference, other_source
from vitxr.names import PROVENANCE, unwritten

RUN = {"max_iter": 8, "tol": 0}
MADE = {"layer": 0, "precision": "float32", "rectify": 1, "normalize": 1}


def labelled(step=11, **attrs):
    t = neuron_tensor(dtype="float64")
    t = t.drop_vars("layer").assign_coords(
        offset_y=("shift", np.repeat([0, step], 3), {"period": 224}),
        sha256=("image", np.array([f"{i}" * 64 for i in range(5)], object)),
        image=t.image.values.astype(object),
        label=("image", t.label.values.astype(object)),
    )
    return t.assign_attrs(MADE | attrs)


T = labelled()
F = factorize(T, 2, **RUN)
SHIFTED = labelled(step=16)
RENAMED = T.assign_coords(sha256=("image", ["0" * 64, "1" * 64, "f" * 64, "3" * 64, "4" * 64]))
OFFSETS = r"offset_y of shift.*at shift \(shift_y 1, shift_x 0\) .* offset_y 11, .* 16"
FILES = r"sha256 of image.*at image im2 .* sha256 2{12}\.\.\., .* f{12}\.\.\."


@pytest.mark.parametrize(("other", "message"), [(SHIFTED, OFFSETS), (RENAMED, FILES)])
def test_equal_labels_of_other_data_are_refused(other, message):
    with pytest.raises(DataError, match="differ in the " + message):
        explained(F, other)
    with pytest.raises(DataError, match=message):
        F.vit.transform(other, dim="neuron")
    with pytest.raises(DataError, match="start has other " + message):
        factorize(other, 2, start=F, **RUN)
    with pytest.raises(DataError, match="start has other"):
        factorize(other, 2, start=F, fixed=["shift"], **RUN)
    with pytest.raises(DataError, match="models differ in the " + message):
        factor_match_score(F, factorize(other, 2, **RUN))
    with pytest.raises(DataError, match="mask has other " + message):
        factorize(other, 2, mask=T.notnull(), **RUN)
    tree = fit_ensemble(T, [1], 1, progress=False, **RUN)
    with pytest.raises(DataError, match=message):
        fit_ensemble(other, [1], 1, progress=False, resume=tree, **RUN)
    with pytest.raises(DataError, match=message):
        other.vit.core_consistency(F)


def test_what_is_new_may_have_the_same_labels():
    g = transform(F, SHIFTED)  # other offsets: the shifts are what is new
    assert g.attrs["transformed"] == "shift"
    np.testing.assert_array_equal(g.offset_y, SHIFTED.offset_y)
    assert transform(F, RENAMED).attrs["transformed"] == "image"
    both = SHIFTED.assign_coords(sha256=RENAMED.sha256)
    with pytest.raises(DataError, match=r"sha256 of image and the offset_y of shift; one may: at"):
        transform(F, both)


def test_what_only_one_knows_is_no_difference():
    for name in ("sha256", "offset_y"):
        explained(F, T.drop_vars(name))
        explained(F.drop_vars(name), T)
    explained(F, T.assign_coords(sha256=("image", [""] * 5)))
    explained(F, T.assign_coords(label=("image", list("vwxyz"))))
    explained(F.drop_attrs(deep=False), T)
    explained(F, T.drop_attrs(deep=False))
    wide = T.assign_coords(offset_y=("shift", T.offset_y.values, {"period": 448}))
    with pytest.raises(
        DataError, match="in offset_y the model a period of 224 px, the tensor of 4"
    ):
        explained(F, wide)


@pytest.mark.parametrize("ending", ["nc", "zarr"])
def test_saved_factors_are_compared_as_they_were(ending, tmp_path):
    f = vitxr.open(vitxr.save(F, tmp_path / f"f.{ending}"))
    assert {k: f.attrs[k] for k in MADE} == MADE
    xr.testing.assert_allclose(explained(f, T), explained(F, T))
    t = vitxr.open(vitxr.save(T, tmp_path / f"t.{ending}"))
    xr.testing.assert_allclose(explained(f, t), explained(F, T))
    with pytest.raises(DataError, match="sha256 of image"):
        explained(f, RENAMED)
    with pytest.raises(DataError, match="factors are of layer 0, the tensor of 3"):
        explained(f, T.assign_attrs(layer=3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rectify": 0}, "a tensor made with rectify=True, and this one is made with rectify=Fal"),
        ({"normalize": 0}, "made with normalize=True, and this one is made with normalize=False"),
        ({"smoothing": "{}"}, "a tensor without smoothing, and this one is with smoothing {}"),
    ],
)
def test_another_treatment_is_refused(changed, message):
    other = T.assign_attrs(changed)
    with pytest.raises(DataError, match=message):
        explained(F, other)
    for dim in T.dims:  # new neurons as well: the scale of their rows would be another one
        with pytest.raises(DataError, match=message):
            transform(F, other, dim)
    with pytest.raises(DataError, match="some factors are fixed, but the factors are of a tensor"):
        factorize(other, 2, start=F, fixed=["image"], **RUN)
    factorize(other, 2, start=F, **RUN)  # a place to start from
    tree = fit_ensemble(T, [1], 1, progress=False, **RUN)
    with pytest.raises(DataError, match=message):
        fit_ensemble(other, [1], 1, progress=False, resume=tree, **RUN)
    explained(F, other.drop_attrs(deep=False))


def test_another_source_is_refused_but_for_new_neurons():
    other = T.assign_attrs(precision="bfloat16", layer=3)
    with pytest.raises(DataError, match="precision 'float32', the tensor of 'bfloat16'"):
        explained(F, other)
    assert transform(F, other, "neuron").attrs["precision"] == "bfloat16"
    with pytest.raises(DataError, match="some factors are fixed, but the factors are of precision"):
        factorize(other, 2, start=F, fixed=["neuron"], **RUN)
    factorize(other, 2, start=F, fixed=["image", "shift"], **RUN)
    assert other_source({}, MADE) == other_source(MADE, {}) == ""


def test_smoothed_and_plain_are_told_apart():
    t = T.drop_vars(["offset_y"])
    s = smooth(t, 0.7)
    f = factorize(s, 2, **RUN)
    explained(f, s)
    with pytest.raises(DataError, match=r"with smoothing .* this one is without smoothing"):
        explained(f, t)
    with pytest.raises(DataError, match=r"with smoothing .*0.7.* is with smoothing .*0.9"):
        explained(f, smooth(t, 0.9))
    explained(f, t.drop_attrs(deep=False))


def test_how_a_tensor_was_made_goes_along(ds, tmp_path):
    t = ds.vit.neuron_tensor(layer=0, feature_maps=3, normalize=False)
    assert (t.attrs["rectify"], t.attrs["normalize"]) == (1, 0)
    assert t.attrs["precision"] == "float32"
    f = factorize(t, 2, **RUN)
    e = f.vit.embed(2)
    back = vitxr.read_mat(t.vit.to_mat(tmp_path / "t.mat"))
    m = ds.vit.neuron_matrix(layer=0, feature_maps=3, normalize=False)
    for made in (f, e, back, m, reconstruct(f), explained(f, t), transform(f, t, "image")):
        for name in ("precision", "rectify", "normalize"):
            assert made.attrs[name] == t.attrs[name]
    assert {"precision", "rectify", "normalize"} <= set(PROVENANCE)


@pytest.mark.parametrize("name", ["r2", "neuron_squares", "shift_r2", "component_drop"])
def test_a_coordinate_with_a_results_name_is_refused(name):
    f = F.assign_coords({name: ("image", np.arange(5))})
    with pytest.raises(ArgumentError, match=rf"a coordinate named {name}.*f.rename\({name}=...\)"):
        explained(f, T)
    assert "kept" in explained(f.rename({name: "kept"}), T).coords


def test_messages_have_plain_numbers():
    bad = T.copy(deep=True)
    bad[3, 2, 1] = np.nan
    place = (
        r"at neuron \(feature_map 7, patch_row 1, patch_col 1\), image im2, "
        r"shift \(shift_y 0, shift_x 1\); drop or fill it, or hide it with mask"
    )
    for call in (lambda: explained(F, bad), lambda: transform(F, bad, "image")):
        with pytest.raises(DataError, match=place):
            call()
    a = xr.DataArray(np.zeros(2), dims="neuron").assign_coords(
        a=("neuron", [1, 2]), b=("neuron", [3, 4])
    )
    one, other = (
        x.set_index(neuron=["a", "b"]) for x in (a, a.assign_coords(b=("neuron", [3, 5])))
    )
    assert difference(one, other, "neuron") == (
        "labels",
        "at 1 of neuron the model has (a 2, b 4), the tensor (a 2, b 5)",
    )


@pytest.mark.parametrize(
    ("written", "remedy"),
    [
        ([[1, 1], [1, 0]], 't.isel(image=t.written.all("shift_y").values)'),
        ([[0, 1], [1, 0]], "run the same extract again"),
    ],
)
def test_the_remedy_for_what_is_not_written(written, remedy):
    x = xr.DataArray(np.zeros((2, 2)), dims=("image", "shift_y"))
    x = x.assign_coords(written=(x.dims, np.array(written, bool)))
    assert remedy in unwritten(x)
    assert unwritten(x.assign_coords(written=(x.dims, np.ones((2, 2), bool)))) == ""
    assert unwritten(x.drop_vars("written")) == ""
    scalar = x.isel(image=1, shift_y=1)
    assert "run the same extract again" in unwritten(scalar)
