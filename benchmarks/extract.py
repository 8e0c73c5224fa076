"""Speed and memory of the extraction engine, as ratios measured side by side in one run.

ViT-B/16 with random weights, 224 px, shifts of 11 px. Sides alternate; each line gives the median
ratio of the rounds and their range. About a quarter of an hour on two cores.

    python benchmarks/extract.py [ROW ...]

Rows: one-block, all-blocks, memory, reading, resume, photographs; all if none is named.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import numpy as np
import torch
import transformers

import vitxr
from vitxr.models import Backbone

ROUNDS = 3
#: Images of a round; each is 441 frames.
IMAGES = 2


def random_images(count: int, seed: int = 0) -> np.ndarray:
    """Noise, uint8 (image, row, col, channel)."""
    return np.random.default_rng(seed).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)


def vit(attention: str = "sdpa") -> transformers.ViTForImageClassification:
    """ViT-B/16 with random weights."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(attn_implementation=attention)
    return transformers.ViTForImageClassification(config).eval()


def seconds(run: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def report(what: str, ratios: list[float], target: str, detail: str) -> None:
    """Print one line of the table."""
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(
        f"{what}: {middle:.3g} ({low:.3g} to {high:.3g}); to reach {target}; {detail}", flush=True
    )


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder for a store, on the disk this is started on."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        yield Path(folder)


def notebook_loop(module: torch.nn.Module, frames: int) -> float:
    """Seconds a frame of the original notebook's loop: whole model, everything kept."""
    x = torch.as_tensor(random_images(1).transpose(0, 3, 1, 2), dtype=torch.float32)

    def loop() -> None:
        with torch.no_grad():
            for i in range(frames):
                module(torch.roll(x, 11 * i, 3), output_hidden_states=True, output_attentions=True)

    return seconds(loop) / frames


def extraction(model: Backbone, images: int, **options: object) -> float:
    """Seconds a frame of an extraction into a store, everything included."""
    stim = vitxr.open_images(random_images(images), progress=False)
    with scratch() as folder:
        spent = seconds(
            lambda: vitxr.extract(
                stim, model, preprocess="raw", store=folder / "run.zarr", progress=False, **options
            )
        )
    return spent / (images * 441)


def one_block() -> None:
    """Block 0 into a store, against the notebook's loop."""
    eager, model = vit("eager"), vitxr.load_model(vit())
    notebook_loop(eager, 2)
    alone = {"float32": first_block(vit()), "bfloat16": first_block(vit().to(torch.bfloat16))}
    rows: dict[str, list[tuple[float, float, float]]] = {"float32": [], "bfloat16": []}
    for _ in range(ROUNDS):
        for precision, times in rows.items():
            block = bare(alone[precision], getattr(torch, precision), 16, 96)
            before = notebook_loop(eager, 12)
            ours = extraction(model, IMAGES, layers=0, precision=precision)
            times.append((ours, (before + notebook_loop(eager, 12)) / 2, block))
    for precision, target in (("float32", "10.5"), ("bfloat16", "28")):
        ours, loop, block = (statistics.median(t) for t in zip(*rows[precision], strict=True))
        report(
            f"block 0, {precision}, into a store / notebook's loop, frames a second",
            [peer / own for own, peer, _ in rows[precision]],
            target,
            f"{ours * 1e3:.1f} ms a frame against {loop * 1e3:.0f} ms; one block alone, nothing "
            f"kept, {block * 1e3:.1f} ms, would be {loop / block:.3g}",
        )


def first_block(module: torch.nn.Module) -> torch.nn.Module:
    """The model as far as its first block: what the work cannot do without."""
    return torch.nn.Sequential(module.vit.embeddings, module.vit.layers[0])


def bare(module: torch.nn.Module, dtype: torch.dtype, batch: int, frames: int) -> float:
    """Seconds a frame of ``module(x)`` in inference mode."""
    x = torch.as_tensor(random_images(batch).transpose(0, 3, 1, 2), dtype=dtype)

    def loop() -> None:
        with torch.inference_mode():
            for _ in range(frames // batch):
                module(x)

    return seconds(loop) / (frames // batch * batch)


def all_blocks() -> None:
    """All 12 blocks into a store, against the bare model at its best batch size."""
    module = vit()
    model = vitxr.load_model(module)
    half = vit().to(torch.bfloat16)
    for name, peer, dtype, options, target in (
        ("float32", module, torch.float32, {}, "0.95"),
        ("bfloat16 stored as float16", half, torch.bfloat16,
         {"precision": "bfloat16", "storage_dtype": "float16"}, "0.90"),
    ):  # fmt: skip
        sizes = (4, 8, 16, 32)
        best = min(sizes, key=lambda b: min(bare(peer, dtype, b, 64) for _ in range(2)))
        times = []
        for _ in range(ROUNDS):
            before = bare(peer, dtype, best, 96)
            ours = extraction(model, 1, layers="all", **options)
            times.append((ours, (before + bare(peer, dtype, best, 96)) / 2))
        own, other = (statistics.median(t) for t in zip(*times, strict=True))
        report(
            f"12 blocks, {name}, into a store / bare model, frames a second",
            [b / a for a, b in times],
            target,
            f"{own * 1e3:.1f} ms a frame against {other * 1e3:.1f} ms (batch {best})",
        )


def memory() -> None:
    """Peak memory of 10 images against 1, each in a process of its own."""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, __file__, "peak", str(images)],
                capture_output=True, text=True, check=True,
            ).stdout.split()[-1]
        )
        for images in (1, 10)
    ]  # fmt: skip
    report(
        "peak memory, 10 times the images / 1 times",
        [peaks[1] / peaks[0]],
        "at most 1.05",
        f"{peaks[1] / 1e6:.2f} GB against {peaks[0] / 1e6:.2f} GB",
    )


def peak(images: int) -> None:
    """Print this process's peak memory, kB, after an extraction from files."""
    from PIL import Image

    with scratch() as folder:
        (folder / "images").mkdir()
        for i, pixels in enumerate(random_images(images)):
            Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        vitxr.extract(
            vitxr.open_images(folder / "images", progress=False), vitxr.load_model(vit()),
            layers=0, preprocess="raw", store=folder / "run.zarr", progress=False,
        )  # fmt: skip
    status = Path("/proc/self/status").read_text("utf-8")
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def reading() -> None:
    """20 feature maps of a layer, against one file of as many bytes as that takes."""
    model = vitxr.load_model(vit())
    stim = vitxr.open_images(random_images(4), progress=False)
    with scratch() as folder:
        store = folder / "run.zarr"
        vitxr.extract(
            stim, model, layers=0, preprocess="raw", store=store, precision="bfloat16",
            progress=False,
        )  # fmt: skip
        ds = vitxr.open(store)
        ranked = ds.vit.neuron_tensor(layer=0, feature_maps=20).unstack("neuron").feature_map.values
        for name, maps in (
            ("neighbours", np.arange(32, 52)), ("the 20 most active", np.sort(ranked))
        ):  # fmt: skip
            chunk = 16 * 196 * 4
            touched = len(set((maps // 16).tolist())) * chunk * 441 * 4
            plain = folder / "plain.bin"
            plain.write_bytes(np.random.default_rng(0).bytes(touched))
            files = [*(store / "activation").glob("c.*"), plain]
            for state in ("in the page cache", "from disk"):
                ratios, rates = [], []
                for _ in range(ROUNDS + 1):
                    forget(files if state == "from disk" else [])
                    ours = seconds(lambda m=maps: ds.activation.sel(feature_map=m).compute())
                    forget(files if state == "from disk" else [])
                    sequential = seconds(lambda p=plain: read(p))
                    ratios.append(sequential / ours)
                    rates.append((touched / ours, touched / sequential))
                own, other = (statistics.median(r) / 1e6 for r in zip(*rates[1:], strict=True))
                report(
                    f"reading 20 feature maps ({name}) {state} / sequential read",
                    ratios[1:],
                    "0.5",
                    f"{own:.0f} MB/s against {other:.0f} MB/s of {touched / 1e6:.0f} MB of chunks, "
                    f"{20 * 196 * 4 * 441 * 4 / touched:.0%} of them wanted",
                )


def read(path: Path) -> None:
    """Read a file from its beginning to its end into one array."""
    np.fromfile(path, np.float32)


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def resume() -> None:
    """Seconds from the call to the first forward pass, with 9,999 of 10,000 units written."""
    from PIL import Image

    from vitxr.extract import units
    from vitxr.extract.plan import make_plan
    from vitxr.extract.run import _open
    from vitxr.store.location import Location

    model = vitxr.load_model(vit())
    options = {
        "layers": [0], "shifts": None, "variables": ["activation"], "feature_maps": [0],
        "preprocess": "raw", "precision": "float32", "storage_dtype": "float32", "batch_size": 1,
    }  # fmt: skip
    with scratch() as folder:
        (folder / "images").mkdir()
        for i in range(10_000):
            Image.new("RGB", (224, 224), (i % 256, i // 256, 0)).save(folder / f"images/{i}.png")
        stim = vitxr.open_images(folder / "images", progress=False)
        plan = make_plan(stim, model, **options)
        book = _open(plan, Location(folder / "run.zarr"), resume=True)
        for unit in range(len(plan.cut) - 1):
            book.write(unit, {"activation": np.zeros((1, 1, 1, 1, 1, 14, 14), np.float32)})
        reached, true = [], units.capture

        def stop(*_args: object) -> None:
            reached.append(time.perf_counter())
            raise KeyboardInterrupt

        times = []
        for _ in range(ROUNDS):
            units.capture = stop
            start = time.perf_counter()
            try:
                vitxr.extract(stim, model, store=folder / "run.zarr", progress=False, **options)
            except KeyboardInterrupt:
                times.append(reached[-1] - start)
            units.capture = true
    report("resuming 10,000 units, seconds before the first forward", times, "under 2", "ViT-B")


def photographs() -> None:
    """The notebook's study whole: 20 photographs, 441 shifts, block 0; a sample of it checked."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import literal

    photos = vitxr.datasets.photos()
    crops = {}
    for i in range(2, 6):  # four photographs are five classes' worth of crops each
        pixels = vitxr.read_image(photos, i)
        rows = np.linspace(0, pixels.shape[0] - 224, 5).astype(int)
        columns = np.linspace(0, pixels.shape[1] - 224, 5).astype(int)
        crops[photos.label.values[i]] = np.stack(
            [pixels[r : r + 224, c : c + 224] for r, c in zip(rows, columns, strict=True)]
        )
    stim = vitxr.open_images(crops, progress=False)
    module = vit()
    with scratch() as folder:
        ds = vitxr.extract(
            stim, vitxr.load_model(module), layers=0, preprocess="raw", store=folder / "run.zarr"
        )
        found = vitxr.verify(folder / "run.zarr")
        print(f"20 photographs x 441 shifts: {found.sizes['shard']} damaged shards")
        t = ds.vit.neuron_tensor(layer=0, feature_maps=20)
        rng = np.random.default_rng(0)
        frames = [(0, 0, 0)] + [tuple(rng.integers(n) for n in (20, 21, 21)) for _ in range(60)]
        worst, order = 0.0, None
        for i, y, x in frames:
            pixels = vitxr.read_image(stim, int(i)).transpose(2, 0, 1)
            frame = np.roll(pixels, (11 * y, 11 * x), axis=(1, 2)).astype(np.float32)
            # The first frame of the first image ranks the feature maps for all.
            expected, _, _, order, _ = literal.compute_neuron_output(
                module, 0, frame[None], order, 20
            )
            ours = t.isel(image=int(i)).sel(shift_y=int(y), shift_x=int(x)).values.ravel()
            worst = max(worst, float(np.abs(ours - np.asarray(expected).ravel()).max()))
        maps = t.unstack("neuron").feature_map.values
        print(
            f"neuron tensor {dict(t.sizes)}: largest difference from the literal transcription on "
            f"{len(frames)} frames {worst:.1e}; the same 20 feature maps: "
            f"{set(maps.tolist()) == set(np.asarray(order)[:20].tolist())}"
        )


ROWS = {
    "one-block": one_block,
    "all-blocks": all_blocks,
    "memory": memory,
    "reading": reading,
    "resume": resume,
    "photographs": photographs,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(int(sys.argv[2]))
    else:
        for row in sys.argv[1:] or ROWS:
            ROWS[row]()
