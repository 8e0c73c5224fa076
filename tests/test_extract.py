"""Extraction: labels, laziness, batches, stores, refusals."""

import dask
import numpy as np
import pytest
import xarray as xr
from conftest import make_vit

torch = pytest.importorskip("torch")

import vitxr  # noqa: E402
from vitxr.errors import ArgumentError, DataError, ModelError, StoreError  # noqa: E402

GRID = vitxr.ShiftGrid(11)
ALL = ("activation", "prefix", "embedding", "attention", "logits")


def extract(stim, model, **options):
    return vitxr.extract(
        stim, model, **{"shifts": GRID, "preprocess": "raw", "progress": False, **options}
    )


@pytest.fixture
def counted(monkeypatch):
    """Counts the forward passes."""
    from vitxr.extract import units

    sizes = []
    true = units.capture

    def capture(model, batch, *args):
        sizes.append(len(batch))
        return true(model, batch, *args)

    monkeypatch.setattr(units, "capture", capture)
    return sizes


def test_every_frame_is_the_shifted_image(stim, model, vit, images):
    ds = extract(stim, model, layers=[0, 2])
    assert dict(ds["activation"].sizes) == {
        "image": 3, "shift_y": 3, "shift_x": 5, "layer": 2,
        "feature_map": 48, "patch_row": 4, "patch_col": 6,
    }  # fmt: skip
    for i, y, x in [(0, 0, 0), (1, 2, 3), (2, 1, 4)]:
        at = ds.isel(image=i, shift_y=y, shift_x=x)
        frame = np.roll(images[i], (int(at.offset_y), int(at.offset_x)), axis=(0, 1))
        assert (int(at.offset_y), int(at.offset_x)) == (11 * y, 11 * x)
        with torch.inference_mode():
            states = vit(
                torch.as_tensor(frame.transpose(2, 0, 1)[None], dtype=torch.float32),
                output_hidden_states=True,
            ).hidden_states
        for layer in (0, 2):
            expected = states[layer + 1][0, 1:].reshape(4, 6, 48).numpy()
            np.testing.assert_allclose(
                at["activation"].sel(layer=layer).transpose("patch_row", "patch_col", ...),
                expected, rtol=1e-4, atol=1e-5,
            )  # fmt: skip


def test_no_shifts_is_one_frame(stim, model):
    ds = extract(stim, model, layers=0, shifts=None)
    assert ds.sizes["shift_y"] == ds.sizes["shift_x"] == 1
    assert ds["offset_y"].item() == ds["offset_x"].item() == 0
    shifted = extract(stim, model, layers=0).isel(shift_y=[0], shift_x=[0])
    xr.testing.assert_allclose(ds["activation"], shifted["activation"])


def test_lazy_runs_nothing_until_asked(stim, model, counted):
    ds = extract(stim, model, layers="all", variables=ALL, batch_size=15)
    assert counted == []
    ds["activation"].isel(image=1).compute()
    assert sum(counted) == 15
    assert dask.is_dask_collection(ds["logits"])


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_lazy_under_any_scheduler(stim, model, ds, scheduler):
    lazy = extract(stim, model, shifts=vitxr.ShiftGrid(11, "raster"))
    got = lazy.compute(scheduler=scheduler)
    xr.testing.assert_allclose(got, ds)


@pytest.mark.parametrize("batch_size", [1, 4, 15, 1000, "auto"])
def test_batches_change_nothing(stim, model, counted, batch_size):
    ds = extract(stim, model, layers=[1], batch_size=batch_size).compute()
    # A batch goes on from image to image where one image does not fill it.
    assert max(counted) == (45 if batch_size in (1000, "auto") else batch_size)
    assert sum(counted) == 45
    xr.testing.assert_allclose(ds, extract(stim, model, layers=[1]).compute(), atol=1e-5)


@pytest.mark.parametrize("shifts", [GRID, vitxr.ShiftGrid(11, "raster"), None])
def test_a_store_holds_what_the_lazy_result_gives(stim, model, tmp_path, shifts):
    path = tmp_path / "run.zarr"
    lazy = extract(stim, model, variables=ALL, shifts=shifts)
    stored = extract(stim, model, variables=ALL, shifts=shifts, store=path)
    xr.testing.assert_identical(stored.compute(), lazy.compute())
    assert dask.is_dask_collection(stored["activation"])
    plain = xr.open_zarr(path, consolidated=False)
    xr.testing.assert_equal(plain["attention"].compute(), stored["attention"].compute())
    assert "label" in plain.coords
    xr.testing.assert_identical(vitxr.open(path), stored)


def test_units_of_one_row(stim, model, tmp_path, monkeypatch):
    from vitxr.extract import plan

    monkeypatch.setattr(plan, "_SHARD_BYTES", 1)
    stored = extract(stim, model, layers=[0], store=tmp_path / "run.zarr")
    assert len(list((tmp_path / "run.zarr" / "activation").glob("c.*"))) == 9
    monkeypatch.undo()
    xr.testing.assert_allclose(
        stored["activation"].compute(), extract(stim, model, layers=[0])["activation"].compute()
    )


def test_resuming_runs_only_what_is_missing(stim, model, tmp_path, counted):
    from vitxr.store.ledger import Ledger

    path = tmp_path / "run.zarr"
    true, written = Ledger.write, []

    def write(self, unit, *args):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(unit)
        true(self, unit, *args)

    one = {"layers": [0], "store": path, "batch_size": 15}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "write", write)
        with pytest.raises(StoreError, match=r"No space left on device.*run extract again"):
            extract(stim, model, **one)
    with pytest.raises(StoreError, match=r"not finished: 2 of 3 units are written.*extract again"):
        vitxr.open(path)
    with pytest.raises(Exception, match=r"No such file|not found|No group"):
        xr.open_zarr(path, consolidated=False)
    with pytest.raises(StoreError, match="resume=False"):
        extract(stim, model, **one, resume=False)
    counted.clear()
    stored = extract(stim, model, **one)
    assert sum(counted) == 15
    lazy = extract(stim, model, layers=[0], batch_size=15)
    xr.testing.assert_identical(stored.compute(), lazy.compute())


def test_a_finished_store_is_opened_not_run_again(stim, model, tmp_path, counted):
    path = tmp_path / "run.zarr"
    first = extract(stim, model, layers=[0], store=path)
    ran = list(counted)
    again = extract(stim, model, layers=[0], store=path)
    assert counted == ran
    xr.testing.assert_identical(first, again)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"layers": [1]}, r"layers: \[0\] -> \[1\]"),
        ({"shifts": vitxr.ShiftGrid(9)}, "shift_step: 11 -> 9"),
        ({"storage_dtype": "float16"}, 'storage_dtype: "float32" -> "float16"'),
        ({"precision": "bfloat16"}, 'precision: "float32" -> "bfloat16"'),
        ({"feature_maps": [1, 2]}, r"channels: null -> \[\[1, 2\]\]"),
    ],
)
def test_another_fingerprint_is_refused_with_the_difference(stim, model, tmp_path, change, line):
    path = tmp_path / "run.zarr"
    extract(stim, model, layers=[0], store=path)
    with pytest.raises(StoreError, match=line):
        extract(stim, model, **{"layers": [0], "store": path, **change})


def test_another_image_or_model_is_refused(stim, model, images, tmp_path):
    path = tmp_path / "run.zarr"
    extract(stim, model, layers=[0], store=path)
    changed = images.copy()
    changed[0, 0, 0, 0] += 1
    with pytest.raises(StoreError, match=r"images\[0\]: "):
        extract(
            vitxr.open_images({"noise": changed[:2], "other": changed[2:]}),
            model, layers=[0], store=path,
        )  # fmt: skip
    with pytest.raises(StoreError, match="model_fingerprint: "):
        extract(stim, vitxr.load_model(make_vit(seed=1)), layers=[0], store=path)


def test_altered_pixels_are_other_images(stim, model, tmp_path):
    inverted = stim.assign(pixels=255 - stim["pixels"])
    path = tmp_path / "run.zarr"
    extract(stim, model, layers=[0], store=path)
    with pytest.raises(StoreError, match=r"altered_pixels\[0\]: null -> "):
        extract(inverted, model, layers=[0], store=path)
    a, b = (extract(s, model, layers=[0])["activation"] for s in (stim, inverted))
    together = abs(a - b).max().compute()
    assert float(together) == float(abs(a.compute() - b.compute()).max()) > 0.1


def test_weights_and_hooks_changed_in_place_are_seen(stim, tmp_path):
    model = vitxr.load_model(make_vit())
    path = tmp_path / "run.zarr"
    before = extract(stim, model, layers=[0], store=path).compute()
    handle = model.blocks[0].register_forward_hook(lambda _m, _a, out: out * 0)
    with pytest.raises(StoreError, match="model_hooks: "):
        extract(stim, model, layers=[0], store=path)
    assert (extract(stim, model, layers=[0])["activation"].isel(image=0) == 0).all()
    handle.remove()
    xr.testing.assert_identical(extract(stim, model, layers=[0], store=path).compute(), before)
    model.blocks[0].mlp.fc1.weight.data += 0.01
    with pytest.raises(StoreError, match="model_fingerprint: "):
        extract(stim, model, layers=[0], store=path)


def test_the_size_files_were_opened_with_is_part_of_the_fingerprint(tmp_path):
    from PIL import Image

    from vitxr.extract import plan as plans
    from vitxr.store.plans import differences

    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    digits = vitxr.load_model("digits")
    a, b = (
        plans.make_plan(
            vitxr.open_images([tmp_path / "a.png"], size=size), digits, layers=[0], shifts=None,
            variables=["activation"], feature_maps=None, preprocess="model", precision="float32",
            storage_dtype="float32", batch_size=4,
        ).fingerprint()
        for size in (20, 30)
    )  # fmt: skip
    assert differences(a, b)[1:] == ["image_size: 20 -> 30"]  # after the heights and widths


def test_a_task_holds_one_image(stim, model, tmp_path):
    import pickle

    from PIL import Image

    from vitxr.extract import plan as plans

    size = []
    for count in (2, 40):
        folder = tmp_path / f"{count}" / "a"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((32, 48, 3), i, np.uint8)).save(folder / f"{i}.png")
        plan = plans.make_plan(
            vitxr.open_images(folder.parent, progress=False), model, layers=[0], shifts=GRID,
            variables=["activation"], feature_maps=None, preprocess="raw", precision="float32",
            storage_dtype="float32", batch_size=4,
        )  # fmt: skip
        task = plan.task(0)
        size.append(len(pickle.dumps((task.stim, task.offsets))))
    assert size[1] < size[0] + 100


def test_what_is_in_the_way_is_left_alone(stim, model, tmp_path):
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match=r"is not a store of vitxr\.extract: nothing was"):
        extract(stim, model, store=tmp_path / "mine.zarr")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine.zarr", "thesis.txt"]


def test_selected_channels(stim, model, ds):
    raster = vitxr.ShiftGrid(11, "raster")
    few = extract(stim, model, shifts=raster, feature_maps=[40, 3])
    assert list(few["feature_map"]) == [40, 3]
    xr.testing.assert_allclose(
        few["activation"].compute(), ds["activation"].sel(feature_map=[40, 3])
    )
    top = extract(stim, model, shifts=raster, feature_maps=6).compute()
    assert top["channel"].dims == ("layer", "feature_map")
    for layer in range(3):
        xr.testing.assert_allclose(
            top.vit.neuron_tensor(layer=layer, feature_maps=4),
            ds.vit.neuron_tensor(layer=layer, feature_maps=4),
        )
    with pytest.raises(DataError, match="ranking='mean' needs all feature maps"):
        top.vit.neuron_tensor(layer=0, feature_maps=4, ranking="mean")
    with pytest.raises(DataError, match="drop_edge needs all feature maps"):
        top.vit.neuron_tensor(layer=0, feature_maps=4, drop_edge=1)
    # The stored order is the ranking, also where the frame it came from is left out.
    later = top.isel(image=[2], shift_y=[2]).vit.neuron_tensor(layer=1, feature_maps=3)
    assert list(later["feature_map"].values[::24]) == list(top["channel"].sel(layer=1)[:3])


def test_bfloat16_and_float16_are_near(stim, model, ds):
    half = extract(
        stim, model, shifts=vitxr.ShiftGrid(11, "raster"), precision="bfloat16",
        storage_dtype="float16",
    ).compute()  # fmt: skip
    assert half["activation"].dtype == np.float16
    error = half["activation"].astype("float32") - ds["activation"]
    assert 0 < float(abs(error).max()) < 0.05 * float(abs(ds["activation"]).max())
    assert next(model.module.parameters()).dtype == torch.float32


def test_values_that_are_not_finite_are_reported(stim):
    model = vitxr.load_model(make_vit(dead=[7]))
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] = 1e30
    lazy = extract(stim, model, layers=[0, 1], storage_dtype="float16")
    with pytest.warns(
        RuntimeWarning, match=r"image 'noise.*shift \(0, 0\), layer 1.*overflow float16"
    ):
        lazy["activation"].isel(image=0).compute(scheduler="synchronous")


def test_photographs_of_many_sizes_just_work(tmp_path):
    from PIL import Image
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for i, size in enumerate([(50, 40), (33, 90), (8, 8)]):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "cat" / f"{i}.png")
    make_vit().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 48}).save_pretrained(tmp_path / "model")
    model = vitxr.load_model(tmp_path / "model")
    stim = vitxr.open_images(tmp_path / "photos", progress=False)
    assert "pixels" not in stim
    ds = extract(stim, model, layers=0, preprocess="model").compute()
    for i, name in enumerate(ds["image"].values):
        pixels = np.asarray(Image.open(tmp_path / "photos" / name))
        frame = np.roll(model.preprocess(pixels), (11, 22), axis=(1, 2))
        with torch.inference_mode():
            hidden = model.module(torch.as_tensor(frame[None]), output_hidden_states=True)
        expected = hidden.hidden_states[1][0, 1:].reshape(4, 6, 48).numpy()
        got = ds["activation"].isel(image=i, shift_y=1, shift_x=2, layer=0)
        np.testing.assert_allclose(
            got.transpose("patch_row", "patch_col", ...), expected, rtol=1e-4, atol=1e-5
        )


# Closing a cluster leaves sockets to the garbage collector now and then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_dask_cluster_writes_the_same(stim, tmp_path):
    from distributed import Client, LocalCluster

    make_vit().save_pretrained(tmp_path / "model")
    model = vitxr.load_model(tmp_path / "model")
    path = tmp_path / "run.zarr"
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        stored = extract(stim, model, layers=[0, 1], store=path, client=client).compute()
    xr.testing.assert_identical(stored, extract(stim, model, layers=[0, 1]).compute())


def test_a_client_needs_a_store_and_a_named_model(stim, model, tmp_path):
    with pytest.raises(ArgumentError, match="client= runs an extraction into a store"):
        extract(stim, model, client=object())
    with pytest.raises(ArgumentError, match="each worker can load by itself"):
        extract(stim, model, client=object(), store=tmp_path / "x.zarr")
    assert not list(tmp_path.iterdir())


REFUSALS = {
    "layer": ({"layers": [0, 3]}, ArgumentError, r"\[3\] out of range; the model has 3 blocks"),
    "negative": ({"layers": -1}, ArgumentError, r"\[-1\] out of range"),
    "twice": ({"layers": [1, 1]}, ArgumentError, "names a block twice: 1"),
    "none": ({"layers": []}, ArgumentError, "expected one block number"),
    "text": ({"layers": "last"}, ArgumentError, "expected block numbers or 'all'"),
    "variable": ({"variables": ["gradient"]}, ArgumentError, "expected some of activation"),
    "too many": ({"feature_maps": 49}, ArgumentError, "the model has 48 feature maps"),
    "zero maps": ({"feature_maps": 0}, ArgumentError, "expected 1 to 48"),
    "channel": ({"feature_maps": [48]}, ArgumentError, "distinct channel numbers, 0 to 47"),
    "maps of": ({"feature_maps": 3, "variables": ["logits"]}, ArgumentError, "not among"),
    "mixed maps": ({"feature_maps": 3, "variables": ALL}, ArgumentError, "a call of their own"),
    "step": ({"shifts": vitxr.ShiftGrid(40)}, ArgumentError, "larger than the image, 32 x 48"),
    "shifts": ({"shifts": 11}, ArgumentError, "expected a vitxr.ShiftGrid"),
    "batch": ({"batch_size": 0}, ArgumentError, "expected a number of frames or 'auto'"),
    "precision": ({"precision": "float8"}, ArgumentError, "'float32' or 'bfloat16'"),
    "dtype": ({"storage_dtype": "int8"}, ArgumentError, "'float16', or 'bitroundN'"),
    "no bits": ({"storage_dtype": "bitround0"}, ArgumentError, r"mantissa bits \(1 to 22\)"),
    "all bits": ({"storage_dtype": "bitround23"}, ArgumentError, r"mantissa bits \(1 to 22\)"),
    "workers": ({"workers": 0}, ArgumentError, "expected a number of processes, or a device"),
    "no store": ({"workers": 2, "store": None}, ArgumentError, "name a store"),
    "protocol": ({"store": "nope://x/run.zarr"}, StoreError, "Protocol not known"),
    "preprocess": ({"preprocess": "none"}, ArgumentError, "'model' or 'raw'"),
    "processor": ({"preprocess": "model"}, ModelError, "without its image processor"),
    "name": ({"store": "run"}, ArgumentError, r"ending in \.zarr"),
    "ragged": ({"layers": [[0], [1, 2]]}, ArgumentError, "expected one block number"),
    "ragged maps": ({"feature_maps": [[0], [1, 2]]}, ArgumentError, "expected a count"),
    "no variables": ({"variables": None}, ArgumentError, "variables=None: expected some of"),
    "late batch": ({"batch_size": 0, "feature_maps": 3}, ArgumentError, "number of frames"),
    "late name": ({"store": "run", "feature_maps": 3}, ArgumentError, r"ending in \.zarr"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_come_before_any_work(stim, model, tmp_path, monkeypatch, counted, case):
    options, error, message = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        extract(stim, model, **{"store": "run.zarr", **options})
    assert counted == []
    assert not list(tmp_path.iterdir())


def test_stimuli_that_do_not_fit(stim, model, vit):
    with pytest.raises(
        DataError, match=r"it takes 32 x 48 px.*1 of 1 images differ.*size=\(32, 48\)"
    ):
        extract(vitxr.open_images(np.zeros((1, 8, 8, 3), np.uint8)), model)
    with pytest.raises(DataError, match="stim holds no images"):
        extract(stim.isel(image=[]), model)
    with pytest.raises(DataError, match=r"occur more than once: .*noise"):
        extract(stim.isel(image=[0, 0]), model)
    with pytest.raises(ArgumentError, match="without the dimension `image`"):
        extract(stim["pixels"].rename(image="i").to_dataset(), model)
    with pytest.raises(ArgumentError, match=r"Call vitxr\.load_model"):
        extract(stim, vit)
    with pytest.raises(DataError, match="no `sha256`"):
        extract(stim.drop_vars("sha256"), model)
    with pytest.raises(DataError, match="no `image`"):
        extract(stim.drop_vars("image"), model)


def test_a_model_without_a_head_has_no_logits(stim, vit):
    model = vitxr.load_model(vit.vit)
    with pytest.raises(ArgumentError, match="no classification head"):
        extract(stim, model, variables=["logits"])
    extract(stim, model, layers=0, variables=["activation"])["activation"].isel(image=0).compute()


def test_models_that_differ_in_a_hook_only_are_not_mixed_up(stim, tmp_path):
    def lesion(gain):
        return lambda _module, _args, output: output * gain

    results, path = [], tmp_path / "run.zarr"
    for gain in (1.0, 0.0):
        loaded = vitxr.load_model(make_vit())
        loaded.blocks[0].register_forward_hook(lesion(gain))
        results.append(extract(stim, loaded, layers=0))
        if gain:
            extract(stim, loaded, layers=0, store=path)
        else:
            with pytest.raises(StoreError, match="model_hooks: "):
                extract(stim, loaded, layers=0, store=path)
    both = xr.concat([abs(r["activation"]).sum() for r in results], "gain").values
    assert both[0] > 0 == both[1]


def test_other_labels_are_refused(stim, model, tmp_path):
    path = tmp_path / "run.zarr"
    extract(stim, model, layers=0, store=path)
    with pytest.raises(StoreError, match="coordinates: "):
        extract(stim.assign_coords(label=("image", list("xyz"))), model, layers=0, store=path)


def test_stimuli_that_went_through_zarr(stim, model, tmp_path):
    stim.to_zarr(tmp_path / "stim.zarr", consolidated=False, zarr_format=3)
    back = xr.open_zarr(tmp_path / "stim.zarr", consolidated=False)
    xr.testing.assert_identical(
        extract(back, model, layers=0)["activation"].compute(),
        extract(stim, model, layers=0)["activation"].compute(),
    )


def test_a_lazy_result_sends_the_model_once(stim, model):
    import pickle

    ds = extract(stim, model, layers=0, batch_size=1)
    graph = ds["activation"].data.dask
    one = len(pickle.dumps(model))
    assert ds["activation"].data.npartitions == 3
    assert one < len(pickle.dumps(dict(graph))) < 1.5 * one


def test_what_is_stored_is_hardly_padded(stim, model, tmp_path):
    for count in (17, 20, 33):
        path = tmp_path / f"{count}.zarr"
        extract(stim, model, layers=0, feature_maps=list(range(count)), store=path)
        needed = 45 * count * 24 * 4
        on_disk = sum(f.stat().st_size for f in (path / "activation").glob("c.*"))
        assert needed < on_disk < 1.1 * needed
        cost = vitxr.estimate(
            stim, model, layers=0, feature_maps=list(range(count)), shifts=GRID, preprocess="raw"
        )
        assert needed <= cost.bytes <= on_disk


def test_an_opened_store_can_be_written_again(stim, model, tmp_path):
    ds = extract(stim, model, layers=0, store=tmp_path / "run.zarr")
    for version in (2, 3):
        ds.to_zarr(tmp_path / f"{version}.zarr", zarr_format=version, consolidated=False)
        back = xr.open_zarr(tmp_path / f"{version}.zarr", consolidated=False)
        xr.testing.assert_equal(
            back["activation"].drop_vars(list(back.coords)),
            ds["activation"].drop_vars(list(ds.coords)),
        )
    ds.to_netcdf(tmp_path / "run.nc")
    assert list(ds["activation"].dims) == list(ds.sizes)[: ds["activation"].ndim]


def test_a_relative_path_outlives_a_change_of_folder(stim, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ds = extract(stim, model, layers=0, store="run.zarr")
    monkeypatch.chdir("/")
    assert np.isfinite(ds["activation"]).all().compute()


def _trained(module):
    torch.nn.functional.cross_entropy(
        module(torch.ones(1, 3, 32, 48)).logits, torch.tensor([0])
    ).backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def _exchanged(module):
    last = module.vit.layernorm
    last.weight = torch.nn.Parameter(last.weight.detach().clone())


@pytest.mark.parametrize(
    "change",
    [
        _trained,
        _exchanged,
        lambda module: module.load_state_dict(module.state_dict()),
        lambda module: module.to(torch.bfloat16),
    ],
    ids=["trained", "exchanged", "loaded", "cast"],
)
def test_weights_that_change_before_a_lazy_result_is_computed(stim, change):
    module = make_vit(patch_size=(8, 16))
    ds = extract(stim, vitxr.load_model(module), layers=[0], shifts=None)
    before = ds.compute()
    xr.testing.assert_identical(ds.compute(), before)
    module.train().eval()
    xr.testing.assert_identical(ds.compute(), before)
    change(module)
    with pytest.raises(ModelError, match=r"changed after extract was called.*\.load\(\)"):
        ds.compute()
