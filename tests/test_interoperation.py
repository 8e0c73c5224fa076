"""Other libraries on what vitxr returns: its numbers are the same there."""

import shutil
import subprocess
import warnings

import holoviews as hv
import matplotlib.pyplot as plt
import netCDF4
import numpy as np
import pytest
import synthetic
import tensorly
import xarray as xr
import zarr
from scipy.io import loadmat
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

import vitxr

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import hvplot.pandas
    import hvplot.xarray  # noqa: F401
    import tlviz

URL = vitxr.catalog.entries().loc["activations.digits", "url"]
DS = vitxr.open(URL).compute()
T = DS.vit.neuron_tensor(layer=5, feature_maps=4)
F = T.vit.factorize(3, max_iter=30, progress=False)
E = F.vit.embed(n_components=2)
ENSEMBLE = T.vit.fit_ensemble([2, 3], replicates=2, max_iter=10, progress=False)
EQUIVARIANCE = DS.vit.equivariance()
TABLE = DS.vit.map_table().sel(layer=5)
ORDER = E.vit.spatial_order(9, random_state=0)
DIMENSION = F.vit.local_dimension(n_neighbors=10)
FOUND = T.vit.choose_rank([2, 3], replicates=1, splits=1, max_iter=10, progress=False)
SEEN = synthetic.extraction(synthetic.stimuli(per_class=1), step=16, layers=(0, 1), heads=2)
SEEN.attrs["prefix_names"] = "class"

#: Each kind of result as a plot takes it: the recipes of the how-to page.
PLOTTED = {
    "activation": DS.activation.isel(image=0, shift_y=0, shift_x=0, layer=0, feature_map=0),
    "tensor": T.isel(image=0).unstack("neuron").isel(feature_map=0, shift=0),
    "matrix": DS.vit.neuron_matrix(layer=5, feature_maps=4).isel(image=0).unstack("neuron")[0],
    "activity": DS.vit.activity().isel(shift_y=0, shift_x=0, layer=1).drop_vars("image"),
    "neuron_factor": F.neuron_factor.isel(component=0).unstack("neuron").isel(feature_map=0),
    "image_factor": F.image_factor.drop_vars("image"),
    "shift_factor": F.shift_factor.isel(component=0).unstack("shift"),
    "weight": F.weight,
    "objective_history": F.objective_history,
    "objective": ENSEMBLE.objective,
    "similarity": ENSEMBLE.similarity,
    "score": E.score.isel(pc=0).unstack("neuron").isel(feature_map=0),
    "equivariance_error": EQUIVARIANCE.equivariance_error,
    "error_map": EQUIVARIANCE.error_map.isel(layer=0, feature_map=0),
    "phase_error": EQUIVARIANCE.phase_error.isel(layer=0, phase_y=0, phase_x=0),
    "class_selectivity": TABLE.class_selectivity,
    "label_share": TABLE.label_share,
    "class_activity": DS.vit.class_activity().isel(layer=0).drop_vars("label"),
    "population_sparseness": DS.vit.population_sparseness().isel(image=0, layer=0),
    "image_r2": F.vit.explained(T).image_r2.drop_vars("image"),
    "component_share": F.vit.explained(T).component_share,
    "local_dimension": DIMENSION.local_dimension.unstack("neuron").isel(feature_map=0),
    "spatial_order": ORDER.spatial_order,
    "manifold_distance": ORDER.manifold_distance,
    "test_error": FOUND["test_error"].isel(replicate=0, split=0),
    "attention_map": SEEN.vit.attention_map().isel(image=0, shift_y=0, shift_x=0, layer=0, head=0),
    "attention_rollout": SEEN.vit.attention_rollout().isel(image=0, shift_y=0, shift_x=0),
    "attention_distance": SEEN.vit.attention_distance().isel(image=0, shift_y=0, shift_x=0),
    "attention_entropy": SEEN.vit.attention_entropy().isel(image=0, shift_y=0, shift_x=0),
    "cka": DS.vit.cka().cka,
    "rsa": DS.vit.rsa().rsa,
    "rdm": DS.vit.rdm().isel(shift_y=0, shift_x=0, layer=0).drop_vars(["image", "other_image"]),
}


def shown(drawn):
    """What a plot of xarray shows: counts of a histogram, lines, or the cells of an image."""
    if isinstance(drawn, tuple):
        return drawn[0]
    if isinstance(drawn, list):
        return [line.get_ydata() for line in drawn]
    return drawn.get_array()


@pytest.mark.parametrize("kind", PLOTTED)
def test_plots_of_xarray(kind):
    values = PLOTTED[kind].values
    try:
        total = np.nansum(shown(PLOTTED[kind].plot()))
    finally:
        plt.close("all")
    assert np.isclose(total, values.size if values.ndim > 2 else np.nansum(values))


@pytest.mark.parametrize("kind", PLOTTED)
@pytest.mark.filterwarnings("ignore")
def test_plots_of_hvplot(kind):
    element = PLOTTED[kind].rename(kind).hvplot()
    hv.renderer("bokeh").get_plot(element)
    (first, *_) = element.traverse(lambda x: x, [hv.Element])
    counted = isinstance(first, hv.Histogram)
    drawn = np.nansum(first.dimension_values("Count" if counted else kind))
    assert np.isclose(drawn, PLOTTED[kind].count() if counted else np.nansum(PLOTTED[kind]))


def test_scikit_learn():
    ours = F.vit.embed(n_components=2)
    theirs = PCA(2).fit_transform(F.neuron_factor.transpose("neuron", "component"))
    np.testing.assert_allclose(abs(ours.score.transpose("neuron", "pc")), abs(theirs), atol=1e-5)


def test_scikit_learn_on_a_tensor():
    rows = T.unstack("shift").stack(response=("image", "shift_y", "shift_x"))
    fitted = KMeans(3, random_state=0, n_init=2).fit(rows)
    labelled = T.reset_index("neuron").assign_coords(cluster=("neuron", fitted.labels_))
    squares = [
        float(((group - group.mean("neuron")) ** 2).sum())
        for _, group in labelled.groupby("cluster")
    ]
    assert len(squares) == 3
    assert sum(squares) == pytest.approx(fitted.inertia_, rel=1e-4)


def test_tensorly():
    whole = tensorly.cp_to_tensor(F.vit.to_tensorly())
    residual = np.linalg.norm(whole - T.values) / np.linalg.norm(T.values)
    np.testing.assert_allclose(residual, F.objective, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_tlviz():
    frames = F.vit.to_tensorly(labelled=True)
    residual = tlviz.model_evaluation.relative_sse(frames, T.values)
    np.testing.assert_allclose(residual, float(F.objective) ** 2, rtol=1e-3)
    figure, _ = tlviz.visualisation.components_plot(frames)
    assert len(figure.axes) >= 3
    plt.close("all")


def test_the_store_by_xarray_and_by_zarr_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_xarray = xr.open_zarr(URL, consolidated=False)
        by_zarr = zarr.open_group(URL, mode="r")
    np.testing.assert_array_equal(by_xarray.activation, DS.activation)
    np.testing.assert_array_equal(by_zarr["activation"][:], DS.activation)
    assert by_zarr["image"][:].tolist() == DS.image.values.tolist()
    assert by_zarr.attrs["model"] == DS.attrs["model"]


def test_factors_by_netcdf_alone(tmp_path):
    vitxr.save(F, tmp_path / "f.nc")
    with netCDF4.Dataset(tmp_path / "f.nc") as file:
        np.testing.assert_array_equal(file["neuron_factor"][:], F.neuron_factor)
        names = file["neuron"].compress.split()
        places = np.unravel_index(file["neuron"][:], [file.dimensions[n].size for n in names])
        for name, place in zip(names, places, strict=True):
            np.testing.assert_array_equal(file[name][:][place], F[name])


def test_tables_of_neurons():
    table = F.neuron_factor.to_pandas()
    assert table.index.names == ["feature_map", "patch_row", "patch_col"]
    row = table.loc[(int(F.feature_map[7]), int(F.patch_row[7]), int(F.patch_col[7]))]
    np.testing.assert_array_equal(row, F.neuron_factor.isel(neuron=7))


def test_matlab_files_by_scipy(tmp_path):
    T.vit.to_mat(tmp_path / "t.mat")
    np.testing.assert_array_equal(loadmat(tmp_path / "t.mat")["neuron_output_3D"], T.values)


if shutil.which("octave"):

    def test_matlab_files_by_octave(tmp_path):
        T.vit.to_mat(tmp_path / "t.mat")
        code = (
            "load t.mat; printf('%d ', size(neuron_output_3D));"
            "printf('%.9g', neuron_output_3D(2,3,4))"
        )
        done = subprocess.run(
            ["octave", "--no-gui", "--eval", code],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        *shape, value = done.stdout.split()
        assert [int(n) for n in shape] == list(T.shape)
        assert float(value) == pytest.approx(float(T[1, 2, 3]), rel=1e-6)
