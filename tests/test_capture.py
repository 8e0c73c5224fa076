"""What is inside a block through extract: labels, laziness, stores, choices, refusals."""

import dask
import numpy as np
import pytest
import xarray as xr
from conftest import make_vit

torch = pytest.importorskip("torch")

import vitxr  # noqa: E402
from vitxr.cli import main  # noqa: E402
from vitxr.errors import ArgumentError, DataError, ModelError, StoreError  # noqa: E402
from vitxr.models.capture import capture  # noqa: E402
from vitxr.models.sites import SITES  # noqa: E402
from vitxr.names import VARIABLES, validate  # noqa: E402

GRID = vitxr.ShiftGrid(11)
ALL = ("activation", "prefix", "embedding", *SITES, "logits")
#: A module of each form: tokens, tokens without layers, one vector a frame, a map.
MODULES = {
    "gate": "layers.{layer}.mlp.fc1",
    "normed": "vit.layernorm",
    "scores": "classifier",
    "conv": "patch_embeddings.projection",
}


def extract(stim, model, **options):
    return vitxr.extract(
        stim, model, **{"shifts": GRID, "preprocess": "raw", "progress": False, **options}
    )


@pytest.fixture(scope="module")
def everything(stim, model):
    """All there is of two layers, computed."""
    return extract(stim, model, layers=[0, 2], variables=ALL, modules=MODULES).compute()


def test_everything_is_labelled(everything):
    ds = validate(everything)
    for name in ALL:
        assert ds[name].dims == VARIABLES[name].dims[0]
        assert ds[name].attrs["long_name"] == VARIABLES[name].meaning
        assert np.isfinite(ds[name]).all()
        for dim in ds[name].dims:
            assert dim in ds.indexes
    assert ds.sizes["hidden_unit"] == 64
    assert ds.sizes["head_channel"] == 12
    assert ds["gate"].dims == (
        *VARIABLES["activation"].dims[0][:4],
        "gate_unit",
        "patch_row",
        "patch_col",
    )
    assert ds["normed"].dims == (
        "image",
        "shift_y",
        "shift_x",
        "normed_unit",
        "patch_row",
        "patch_col",
    )
    assert ds["scores"].dims == ("image", "shift_y", "shift_x", "scores_unit")
    assert ds["conv"].sizes["conv_unit"] == 48
    assert ds["gate"].attrs["long_name"] == "output of layers.{layer}.mlp.fc1, patch tokens"
    assert ds["gate"].attrs["taken_from"] == "output of vit.layers.0.mlp.fc1, vit.layers.2.mlp.fc1"
    assert ds["mlp_hidden"].attrs["taken_from"].startswith("input of vit.layers.0.mlp.fc2")


def test_every_frame_is_the_shifted_image(everything, model, images):
    frame = np.roll(images[1], (22, 33), axis=(0, 1)).transpose(2, 0, 1)
    direct = capture(model, torch.as_tensor(frame[None], dtype=torch.float32), [0, 2], ALL)
    at = everything.isel(image=1, shift_y=2, shift_x=3)
    for name in ALL:
        np.testing.assert_allclose(at[name], direct[name][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(at["scores"], at["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        torch.nn.functional.gelu(torch.as_tensor(at["gate"].values)), at["mlp_hidden"],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_alone_and_together_are_the_same(stim, model):
    """Nothing that is captured changes the numbers of something else."""
    options = {"layers": [0, 2], "shifts": None, "batch_size": 1}
    together = extract(stim, model, **options, variables=ALL, modules=MODULES).compute()
    for name in ALL:
        alone = extract(stim, model, **options, variables=[name])
        np.testing.assert_array_equal(alone[name], together[name])


def test_batches_change_nothing(stim, model, everything):
    one = extract(stim, model, layers=[0, 2], variables=ALL, modules=MODULES, batch_size=7)
    xr.testing.assert_allclose(one.compute(), everything, rtol=1e-4, atol=1e-5)


def test_a_store_holds_what_the_lazy_result_gives(stim, model, tmp_path):
    options = {"variables": ALL, "modules": MODULES, "heads": [3, 1], "queries": [0, (2, 5)]}
    lazy = extract(stim, model, **options)
    assert dask.is_dask_collection(lazy["mlp_hidden"])
    stored = extract(stim, model, **options, store=tmp_path / "run.zarr")
    assert dask.is_dask_collection(stored["gate"])
    xr.testing.assert_identical(stored.compute(), lazy.compute())
    xr.testing.assert_identical(vitxr.open(tmp_path / "run.zarr").compute(), lazy.compute())
    assert vitxr.verify(tmp_path / "run.zarr", progress=False).sizes["shard"] == 0
    plain = xr.open_zarr(tmp_path / "run.zarr", consolidated=False)
    xr.testing.assert_equal(plain["gate"].compute(), stored["gate"].compute())
    # An altered byte is seen in the new variables as in the others.
    shard = next((tmp_path / "run.zarr" / "mlp_hidden").glob("c.*"))
    raw = bytearray(shard.read_bytes())
    raw[1000] ^= 1
    shard.write_bytes(raw)
    found = vitxr.verify(tmp_path / "run.zarr", progress=False, reset=True)
    assert found["key"].values.tolist() == [f"mlp_hidden/{shard.name}"]
    again = extract(stim, model, **options, store=tmp_path / "run.zarr")
    xr.testing.assert_identical(again.compute(), lazy.compute())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"heads": [1, 3]}, r"heads: \[3, 1\] -> \[1, 3\]"),
        ({"queries": [0, 18]}, r"queries: \[0, 17\] -> \[0, 18\]"),
        ({"modules": {"gate": "layers.{layer}.mlp.fc2"}}, r"sites\.gate: .*fc1.* -> .*fc2"),
        ({"modules": {"up": MODULES["gate"]}}, r"sites\.gate: .* -> .absent"),
    ],
)
def test_another_choice_is_another_run(stim, model, tmp_path, change, line):
    options = {
        "variables": ["attention"], "modules": {"gate": MODULES["gate"]}, "heads": [3, 1],
        "queries": [0, (2, 4)], "layers": [1], "store": tmp_path / "run.zarr",
    }  # fmt: skip
    extract(stim, model, **options)
    with pytest.raises(StoreError, match=line):
        extract(stim, model, **{**options, **change})


def test_chosen_heads_and_queries(stim, model, everything):
    some = extract(
        stim, model, layers=[0, 2], variables=["attention", "attention_value"], heads=[3, 1],
        queries=[0, (2, 5), 4],
    ).compute()  # fmt: skip
    assert some["head"].values.tolist() == [3, 1]
    assert some["query"].values.tolist() == [0, 18, 4]  # one prefix token, six columns
    assert some["key"].size == 25
    chosen = everything.sel(head=[3, 1], query=[0, 18, 4])
    xr.testing.assert_allclose(some["attention"], chosen["attention"], rtol=1e-4, atol=1e-6)
    xr.testing.assert_allclose(some["attention_value"], chosen["attention_value"], rtol=1e-4)
    np.testing.assert_allclose(some["attention"].sum("key"), 1, rtol=1e-5)
    for queries, expected in (("prefix", range(1)), ("patches", range(1, 25))):
        lazy = extract(stim, model, variables=["attention"], queries=queries)
        assert lazy["query"].values.tolist() == list(expected)


def test_tokens_have_their_names(stim, model, tmp_path):
    names = ["class", *(f"({r}, {c})" for r in range(4) for c in range(6))]
    queries = [(2, 3), 0, 24]
    options = {"layers": [0, 1], "variables": ["attention"], "queries": queries}
    lazy = extract(stim, model, **options)
    assert lazy["key_token"].values.tolist() == names
    assert lazy["query_token"].values.tolist() == ["(2, 3)", "class", "(3, 5)"]
    extract(stim, model, store=tmp_path / "run.zarr", **options)
    ds = vitxr.open(tmp_path / "run.zarr")
    validate(ds)
    for name in ("query_token", "key_token"):
        assert ds[name].values.tolist() == lazy[name].values.tolist()
    one = ds["attention"].set_xindex("key_token").sel(key_token="(2, 3)")
    np.testing.assert_array_equal(one, ds["attention"].isel(key=1 + 2 * 6 + 3))
    assert ds.vit.attention_map((2, 3)).dims[-2:] == ("patch_row", "patch_col")
    whole = extract(stim, model, variables=["attention"])
    rolled = whole.vit.attention_rollout(query=None)
    assert rolled["key_token"].values.tolist() == rolled["query_token"].values.tolist() == names
    assert "key_token" not in whole.vit.attention_rollout().coords
    assert "query_token" not in extract(stim, model, layers=[0]).coords


def test_numpy_numbers_choose_as_others_do(stim, model):
    variables = ["attention", "activation"]
    plain = extract(
        stim,
        model,
        layers=[1],
        variables=variables,
        heads=[2],
        queries=[3, (1, 2)],
        feature_maps=[4],
    )
    n = np.int64
    other = extract(
        stim, model, layers=n(1), variables=variables, heads=np.array([2], np.uint8),
        queries=[n(3), (n(1), n(2))], feature_maps=[n(4)], batch_size=n(2),
    )  # fmt: skip
    assert plain.identical(other)
    one = extract(stim, model, layers=[1], variables=["attention"], queries=[(1, 2)])
    two = extract(stim, model, layers=[1], variables=["attention"], queries=[1, 2])
    assert one["query"].values.tolist() == [1 + 6 + 2]
    assert two["query"].values.tolist() == [1, 2]


CHOICES = {
    "no heads": ({"heads": [0]}, ArgumentError, r"variables=\['activation'\] has none of them"),
    "head": ({"variables": ["attention"], "heads": [4]}, ArgumentError, "heads, 0 to 3"),
    "twice": ({"variables": ["attention"], "heads": [1, 1]}, ArgumentError, "Named twice: 1"),
    "none": ({"variables": ["attention"], "heads": []}, ArgumentError, "distinct heads"),
    "no rows": ({"queries": "prefix"}, ArgumentError, "rows of `attention`, which is not among"),
    "rows of": (
        {"variables": ["attention_query"], "queries": [0]}, ArgumentError, "not among variables",
    ),
    "word": ({"variables": ["attention"], "queries": "cls"}, ArgumentError, "'prefix', 'patches'"),
    "token": ({"variables": ["attention"], "queries": [25]}, ArgumentError, "numbers, 0 to 24"),
    "patch": ({"variables": ["attention"], "queries": [(4, 0)]}, ArgumentError, "grid of 4 x 6"),
    "same": ({"variables": ["attention"], "queries": [1, (0, 0)]}, ArgumentError, "twice: token 1"),
    "pair": (
        {"variables": ["attention"], "queries": (2, np.int64(3))}, ArgumentError,
        r"two ways: write queries=\[\(2, .*3\)*\] for the patch .* queries=\[2, .*3\)*\] for two",
    ),
    "guess": ({"variables": ["atention", "mlp"]}, ArgumentError, r"Perhaps 'attention' for 'atent"),
    "maps twice": ({"feature_maps": [3, 3, 1]}, ArgumentError, "Named twice: 3"),
    "dim": ({"modules": {"head": "vit"}}, ArgumentError, "'head' is a dimension, variable or coo"),
    "coordinate": ({"modules": {"channel": "vit"}}, ArgumentError, "'channel' cannot be the name"),
    "width": (
        {"modules": {"hidden": "vit"}}, ArgumentError, "'hidden_unit' is a dim.* would be its width"
    ),
    "triple": ({"variables": ["attention"], "queries": [(0, 0, 0)]}, ArgumentError, "distinct tok"),
    "no dict": ({"modules": ["a"]}, ArgumentError, "expected a dict of names and paths"),
    "empty": ({"modules": {}}, ArgumentError, "expected a dict of names and paths"),
    "name": ({"modules": {"a-b": "vit"}}, ArgumentError, "'a-b' cannot be the name"),
    "taken": ({"modules": {"prefix": "vit"}}, ArgumentError, "'prefix' cannot be the name"),
    "of stim": ({"modules": {"label": "vit"}}, ArgumentError, "'label' cannot be the name"),
    "unit": (
        {"modules": {"a": "vit", "a_unit": "vit"}}, ArgumentError, "'a_unit' cannot be the name",
    ),
    "braces": ({"modules": {"a": "{block}.x"}}, ArgumentError, r"with \{layer\} where"),
    "nearest": (
        {"modules": {"a": "layer.{layer}.mlp.fc1"}}, ArgumentError,
        r"'layer.\{layer\}.mlp.fc1' fits no module.*vit.layers.0.mlp.fc1",
    ),
    "several": ({"modules": {"a": "mlp.fc1"}}, ArgumentError, "fits 3 modules"),
    "form": (
        {"modules": {"a": "patch_embeddings"}}, ModelError,
        r"of 2 frames the module vit.embeddings.patch_embeddings gives \(2, 24, 48\)",
    ),
    "output": ({"modules": {"a": "vit"}}, ModelError, "gives a BaseModelOutput"),
    "maps": (
        {"variables": ["activation", "attention_output"], "feature_maps": 3}, ArgumentError,
        "a call of their own",
    ),
    "nothing": ({"variables": []}, ArgumentError, "expected some of activation"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_refusals_come_before_any_work(stim, model, tmp_path, case):
    options, error, message = CHOICES[case]
    with pytest.raises(error, match=message):
        extract(stim, model, **options, store=tmp_path / "run.zarr")
    assert not list(tmp_path.iterdir())


def test_prefix_tokens_of_a_model_without_any(stim):
    model = vitxr.load_model(make_vit())
    from dataclasses import replace

    with pytest.raises(ArgumentError, match="queries='prefix'"):
        extract(stim, replace(model, prefix=()), variables=["attention"], queries="prefix")


def test_modules_alone(stim, model, everything):
    ds = extract(stim, model, layers=[2], variables=(), modules={"gate": MODULES["gate"]})
    assert list(ds.data_vars) == ["gate"]
    xr.testing.assert_allclose(
        ds["gate"].compute(), everything["gate"].sel(layer=[2]), rtol=1e-4, atol=1e-5
    )


def test_a_count_of_feature_maps_goes_with_what_has_others(stim, model, everything):
    ds = extract(
        stim, model, layers=[0, 2], feature_maps=4, variables=["activation", "mlp_hidden"]
    ).compute()
    assert (ds.sizes["feature_map"], ds.sizes["hidden_unit"]) == (4, 64)
    np.testing.assert_allclose(ds["mlp_hidden"], everything["mlp_hidden"], rtol=1e-4, atol=1e-5)


def test_the_estimate_counts_them(stim, model, tmp_path):
    options = {"variables": ALL, "modules": MODULES, "heads": [0], "queries": "prefix"}
    options |= {"shifts": GRID, "preprocess": "raw"}
    cost = vitxr.estimate(stim, model, **options)
    stored = vitxr.extract(stim, model, **options, store=tmp_path / "run.zarr", progress=False)
    on_disk = sum(
        f.stat().st_size
        for name in stored.data_vars
        for f in (tmp_path / "run.zarr" / name).glob("c.*")
    )
    values = sum(array.nbytes for array in stored.data_vars.values())
    assert values == cost.bytes < on_disk < 1.1 * values
    files = sum(1 for f in (tmp_path / "run.zarr").rglob("*") if f.is_file())
    counted = vitxr.estimate(stim, model, **options, store=tmp_path / "other.zarr")
    assert counted.files == files


def test_chunks_of_a_large_model(stim):
    """A ViT-B's sizes: shards of some 40 MB, chunks of one head or some units."""
    from vitxr.extract.plan import make_plan

    big = vitxr.load_model(
        make_vit(
            image_size=224, patch_size=16, hidden_size=96, num_attention_heads=3,
            intermediate_size=384, layers=1,
        )
    )  # fmt: skip
    photos = vitxr.open_images(np.zeros((2, 224, 224, 3), np.uint8))
    names = ["attention", "attention_key", "attention_output", "mlp_hidden"]
    plan = make_plan(
        photos, big, layers=[0], shifts=vitxr.ShiftGrid(11), variables=names, feature_maps=None,
        preprocess="raw", precision="float32", storage_dtype="float32", batch_size=4,
    )  # fmt: skip
    arrays = plan.arrays
    size = {name: (4 * np.prod(a.shard), 4 * np.prod(a.chunk)) for name, a in arrays.items()}
    assert 20e6 < max(shard for shard, _ in size.values()) < 50e6
    assert max(chunk for _, chunk in size.values()) <= 16e6
    at = dict(zip(arrays["attention_key"].dims, arrays["attention_key"].chunk, strict=True))
    assert (at["head"], at["head_channel"]) == (1, 32)
    at = dict(zip(arrays["mlp_hidden"].dims, arrays["mlp_hidden"].chunk, strict=True))
    assert at["hidden_unit"] == 16


def test_one_head_of_a_store_is_read_alone(stim, model, tmp_path):
    ds = extract(stim, model, variables=["attention_key"], store=tmp_path / "run.zarr")
    assert ds["attention_key"].chunksizes["head"] == (1, 1, 1, 1)


def test_what_is_not_finite_is_reported_with_its_layer(stim):
    module = make_vit()
    with torch.no_grad():
        module.vit.layers[1].mlp.fc1.bias[3] = 1e6
    lazy = extract(
        stim, vitxr.load_model(module), layers=[0, 1], variables=["mlp_hidden"],
        storage_dtype="float16",
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match=r"`mlp_hidden` has.*layer 1.*overflow float16"):
        lazy["mlp_hidden"].isel(image=0).compute(scheduler="synchronous")


def test_the_command_line(tmp_path, capsys):
    path = tmp_path / "run.zarr"
    arguments = ["extract", "digits", str(path), "--model", "digits", "--layers", "5", "--quiet"]
    arguments += ["--per-class", "1", "--step", "0", "--variables", "attention,mlp_hidden"]
    arguments += ["--heads", "2,0", "--queries", "0,3:4", "--modules", "up=layers.{layer}.mlp.fc1"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "10 forward passes" in capsys.readouterr().out
    assert main(arguments) == 0
    ds = vitxr.open(path)
    assert ds["head"].values.tolist() == [2, 0]
    assert ds["query"].values.tolist() == [0, 1 + 3 * 8 + 4]
    np.testing.assert_allclose(
        torch.nn.functional.gelu(torch.as_tensor(ds["up"].values)), ds["mlp_hidden"],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        main(["extract", "digits", str(path), "--queries", "first"])
    with pytest.raises(SystemExit):
        main(["extract", "digits", str(path), "--modules", "fc1"])
    assert main(["extract", "digits", str(path), "--model", "digits", "--heads", "0"]) == 1


# Tensors of what is not the block's output


def literal(values, maps, drop_edge):
    """The notebook's rule, on (image, frame, map, row, col), in plain loops."""
    inner = slice(drop_edge, -drop_edge or None)
    values = np.maximum(values[..., inner, inner], 0)
    mean = values[0, 0].mean((-2, -1), dtype=np.float64).astype(np.float32)
    kept = np.argsort(-1 * mean)[:maps]
    out = values[:, :, kept]
    for place in np.ndindex(out.shape[:3]):
        top = out[place].max()
        out[place] /= top if top > 0 else 1
    return kept, out.reshape(*out.shape[:2], -1).transpose(2, 0, 1)


UNITS = {
    "attention_output": ("feature_map", 2), "mlp_hidden": ("hidden_unit", 2),
    "attention_key": ("head_channel", 2), "gate": ("gate_unit", 2), "normed": ("normed_unit", None),
    "embedding": ("feature_map", None),
}  # fmt: skip


@pytest.mark.parametrize("variable", UNITS)
def test_tensors_follow_the_same_rule(everything, variable):
    dim, layer = UNITS[variable]
    ds = everything.sel(head=3)
    source = ds[variable] if layer is None else ds[variable].sel(layer=layer)
    values = source.transpose("image", "shift_y", "shift_x", dim, "patch_row", "patch_col").values
    kept, expected = literal(values.reshape(3, 15, *values.shape[3:]), 5, 1)
    t = ds.vit.neuron_tensor(layer=layer, feature_maps=5, drop_edge=1, variable=variable)
    np.testing.assert_allclose(t, expected, rtol=1e-6)
    assert (t.name, t.attrs["variable"]) == (variable, variable)
    assert t["neuron"].to_index().names == ["feature_map", "patch_row", "patch_col"]
    assert list(dict.fromkeys(t["feature_map"].values)) == kept.tolist()
    assert ("head" in t.attrs, "layer" in t.attrs) == (dim == "head_channel", layer is not None)
    matrix = ds.vit.neuron_matrix(layer=layer, feature_maps=5, drop_edge=1, variable=variable)
    np.testing.assert_allclose(matrix, expected.mean(2, dtype=float), rtol=1e-5)
    mean = ds.vit.activity(variable=variable)
    assert mean.dims[-1] == "feature_map"
    mean = mean if layer is None else mean.sel(layer=layer)
    np.testing.assert_allclose(
        mean, np.maximum(values, 0).mean((-2, -1), dtype=float), rtol=1e-5, atol=1e-7
    )
    # One layer, selected before: the same.
    one = everything.sel(head=3).sel(layer=2 if layer is None else layer)
    again = one.vit.neuron_tensor(layer=layer, feature_maps=5, drop_edge=1, variable=variable)
    xr.testing.assert_identical(again.drop_vars("layer", errors="ignore"), t)


def test_tensors_of_others_stay_lazy(stim, model, everything):
    lazy = extract(
        stim, model, layers=[0, 2], variables=["activation", "mlp_hidden"], feature_maps=4
    )
    t = lazy.vit.neuron_tensor(layer=0, feature_maps=None, variable="mlp_hidden")
    assert dask.is_dask_collection(t)
    # The count of maps that were kept of `activation` says nothing of the hidden units.
    some = lazy.vit.neuron_tensor(layer=0, feature_maps=7, ranking="mean", variable="mlp_hidden")
    expected = everything.vit.neuron_tensor(
        layer=0, feature_maps=7, ranking="mean", variable="mlp_hidden"
    )
    np.testing.assert_allclose(some, expected, rtol=1e-4, atol=1e-5)


def test_tensors_of_what_is_not_on_the_grid(everything):
    for variable in ("prefix", "logits", "attention"):
        with pytest.raises(DataError, match=f"`{variable}` has dims .*not on the patch grid"):
            everything.vit.neuron_tensor(layer=0, variable=variable)
    with pytest.raises(DataError, match=r"`scores` has dims \(.*\); expected \(.*patch_row"):
        everything.vit.neuron_tensor(layer=None, variable="scores")
    with pytest.raises(DataError, match=r"has 4 heads.*ds\.sel\(head=0\)"):
        everything.vit.neuron_tensor(layer=0, variable="attention_value")
    with pytest.raises(DataError, match="no `mlp_hiden`; it has: activation"):
        everything.vit.activity(variable="mlp_hiden")
    with pytest.raises(ArgumentError, match=r"layer=0: `normed` has no layers. Pass layer=None"):
        everything.vit.neuron_tensor(layer=0, variable="normed")
    with pytest.raises(ArgumentError, match="expected one block number"):
        everything.vit.neuron_tensor(layer=None)


def test_a_tensor_of_hidden_units_goes_on(everything, tmp_path):
    """Factors, and files, take it as they take any other."""
    t = everything.vit.neuron_tensor(layer=2, feature_maps=6, variable="mlp_hidden")
    factors = t.vit.factorize(rank=2, max_iter=20)
    assert factors.attrs["variable"] == "mlp_hidden"
    other = everything.vit.neuron_tensor(
        layer=2, feature_maps=t["feature_map"].values[::24], variable="gate"
    )
    with pytest.raises(DataError, match="the factors are of variable 'mlp_hidden', the tensor of"):
        factors.vit.explained(other)
    back = vitxr.read_mat(t.vit.to_mat(tmp_path / "t.mat"))
    assert (back.name, back.attrs["variable"]) == ("mlp_hidden", "mlp_hidden")
    assert factors["neuron_factor"].sizes["neuron"] == 6 * 24


def test_a_plan_that_went_to_another_process(stim, tmp_path):
    """The model is loaded there by its name, and the plan says where variables are taken."""
    import pickle

    from vitxr.extract.plan import make_plan
    from vitxr.extract.units import compute

    make_vit().save_pretrained(tmp_path / "model")
    plan = make_plan(
        stim, vitxr.load_model(tmp_path / "model"), layers=[1], shifts=GRID,
        variables=["attention", "attention_output"], feature_maps=None, preprocess="raw",
        precision="float32", storage_dtype="float32", batch_size=15, heads=[1], queries="prefix",
        modules={"gate": MODULES["gate"]},
    )  # fmt: skip
    there = pickle.loads(pickle.dumps(plan))
    assert there.model._model is None
    here, _ = compute(plan.task(0))
    for name, values in compute(there.task(0))[0].items():
        np.testing.assert_array_equal(values, here[name])
