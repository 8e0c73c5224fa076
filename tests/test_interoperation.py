"""Other libraries on what vitxr returns: its numbers are the same there."""

import shutil
import subprocess
import warnings

import holoviews as hv
import matplotlib.pyplot as plt
import netCDF4
import numpy as np
import pytest
import tensorly
import xarray as xr
import zarr
from scipy.io import loadmat
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
    "cka": DS.vit.cka().cka,
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
    assert first.dimension_values(kind).size > 0


def test_scikit_learn():
    ours = F.vit.embed(n_components=2)
    theirs = PCA(2).fit_transform(F.neuron_factor.transpose("neuron", "component"))
    np.testing.assert_allclose(abs(ours.score.transpose("neuron", "pc")), abs(theirs), atol=1e-5)


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
