"""Images from files, stacks, arrays and Pillow: policies, names, order, laziness."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import dask
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from vitxr.errors import ArgumentError, DataError, ImageError
from vitxr.stimuli import open_images, read_image
from vitxr.stimuli.decode import decode_bytes, from_array, from_pillow
from vitxr.stimuli.sources import natural_key

RNG = np.random.default_rng(7)


def noise(height: int = 12, width: int = 16, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path, array, **options) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return array


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def quiet(source, **options) -> xr.Dataset:
    return open_images(source, progress=False, **options)


@pytest.fixture
def classes(tmp_path):
    """Two classes of three equal images, with files that are no images beside them."""
    arrays = {}
    for label in ("husky", "guitar"):
        for n in ("1", "2", "10"):
            arrays[f"{label}/{n}.png"] = save(tmp_path / label / f"{n}.png", noise())
    (tmp_path / "labels.csv").write_text("a,b\n")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "husky" / "notes.txt").write_text("x")
    (tmp_path / "husky" / "._1.png").write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    return tmp_path, arrays


# -- folders, names, order -----------------------------------------------------------------------


def test_class_folders(classes):
    root, arrays = classes
    ds = quiet(root)
    names = [f"{c}/{n}.png" for c in ("guitar", "husky") for n in ("1", "2", "10")]
    assert ds.image.values.tolist() == names
    assert ds.label.values.tolist() == ["guitar"] * 3 + ["husky"] * 3
    assert ds.source.values.tolist() == [str(root / name) for name in names]
    assert set(ds.height.values.tolist()) == {12}
    assert set(ds.width.values.tolist()) == {16}
    assert "size" not in ds.attrs
    for i, name in enumerate(names):
        assert ds.sha256.values[i] == hashlib.sha256((root / name).read_bytes()).hexdigest()
        np.testing.assert_array_equal(ds.pixels.sel(image=name).values, arrays[name])
        np.testing.assert_array_equal(read_image(ds, i), arrays[name])
        np.testing.assert_array_equal(read_image(ds, name), arrays[name])


def test_flat_folder_and_deep_class(tmp_path):
    save(tmp_path / "cats" / "a.png", noise())
    assert quiet(tmp_path / "cats").label.values.tolist() == ["cats"]
    assert quiet(tmp_path / "cats").image.values.tolist() == ["a.png"]
    save(tmp_path / "cats" / "more" / "b.png", noise())
    ds = quiet({"cat": tmp_path / "cats"})
    assert ds.image.values.tolist() == ["a.png", "more/b.png"]
    assert ds.label.values.tolist() == ["cat", "cat"]
    assert quiet(tmp_path).label.values.tolist() == ["cats", "cats"]
    assert quiet([tmp_path / "cats"]).label.values.tolist() == ["cats", "cats"]
    with pytest.raises(DataError, match="images beside subfolders with images"):
        quiet(tmp_path / "cats")


def test_lists_and_mappings_keep_their_order(classes):
    root, _ = classes
    paths = [root / "husky" / "2.png", str(root / "guitar" / "10.png"), root / "husky" / "1.png"]
    ds = quiet(paths)
    assert ds.image.values.tolist() == ["husky/2.png", "guitar/10.png", "husky/1.png"]
    assert ds.label.values.tolist() == ["husky", "guitar", "husky"]
    ds = quiet({"dog": root / "husky", "music": root / "guitar" / "1.png", "noise": [noise()] * 2})
    assert ds.label.values.tolist() == ["dog"] * 3 + ["music"] + ["noise"] * 2
    assert ds.image.values.tolist()[-3:] == [
        "guitar/1.png",
        "noise/image_0000",
        "noise/image_0001",
    ]


@pytest.mark.parametrize("per_class", [1, 2, np.int64(3)])
def test_per_class(classes, per_class):
    ds = quiet(classes[0], per_class=per_class)
    expected = ["1.png", "2.png", "10.png"][:per_class]
    assert [n.split("/")[1] for n in ds.image.values] == expected * 2


def test_per_class_too_many(classes):
    save(classes[0] / "husky" / "11.png", noise())
    with pytest.raises(DataError, match=r"per_class=4, but the class 'guitar' has 3\."):
        quiet(classes[0], per_class=4)


@pytest.mark.parametrize("per_class", [0, -1, 1.0, True, "2"])
def test_per_class_invalid(classes, per_class):
    with pytest.raises(ArgumentError, match="expected None or a positive integer"):
        quiet(classes[0], per_class=per_class)


def test_per_class_decodes_only_what_is_kept(classes):
    (classes[0] / "husky" / "10.png").write_bytes(b"broken")
    assert quiet(classes[0], per_class=2).sizes["image"] == 4


def test_natural_key():
    names = ["b/10.png", "a10/1", "a2/1", "b/2.png", "b/²", "b/010.png"]
    assert sorted(names, key=natural_key) == [
        "a2/1", "a10/1", "b/2.png", "b/010.png", "b/10.png", "b/²",
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform == "darwin", reason="not on macOS, which normalises file names")
def test_unicode_names(tmp_path):
    nfd, nfc = "e\u0301", "\u00e9"
    save(tmp_path / nfd / f"{nfd}.png", noise())
    ds = quiet(tmp_path)
    assert ds.image.values.tolist() == [f"{nfc}/{nfc}.png"]
    assert ds.label.values.tolist() == [nfc]
    assert Path(ds.source.values[0]).exists()
    assert read_image(ds, f"{nfc}/{nfc}.png").shape == (12, 16, 3)
    save(tmp_path / nfd / f"{nfc}.png", noise())
    with pytest.raises(DataError, match=r"two images have the name .* rename one"):
        quiet(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux, where such names exist")
def test_name_that_is_not_utf8(tmp_path):
    save(tmp_path / "a.png", noise())
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(DataError, match=r"caf\\udce9\.png' is not UTF-8; .* rename"):
        quiet(tmp_path)


def test_duplicates(classes, monkeypatch):
    root, _ = classes
    path = root / "husky" / "1.png"
    with pytest.raises(DataError, match=r"1\.png is given twice"):
        quiet([path, root / "guitar" / ".." / "husky" / "1.png"])
    with pytest.raises(DataError, match="is given twice"):
        quiet({"a": path, "b": root / "husky"})
    monkeypatch.chdir(root)
    assert quiet(["husky/1.png"]).source.values.tolist() == [str(path)]


def test_nothing_found(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path.name}: no images\. .*\.png"):
        quiet(tmp_path)
    save(tmp_path / "a" / "1.png", noise())
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="b: no images"):
        quiet(tmp_path)
    for empty in ([], {}, {"a": []}):
        with pytest.raises(DataError, match="no images"):
            quiet(empty)
    with pytest.raises(ImageError, match=r"nowhere: no such file or folder"):
        quiet(tmp_path / "nowhere")


@pytest.mark.parametrize("source", [3, {1, 2}, None, iter(["a"]), [3], {"a": {"b": 1}}])
def test_unusable_source(source):
    with pytest.raises(DataError, match="expected"):
        quiet(source)


def test_other_formats_are_not_left_out_silently(tmp_path):
    save(tmp_path / "a.png", noise())
    (tmp_path / "b.HEIC").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"b\.HEIC: the format \.heic is not read.*convert"):
        quiet(tmp_path)
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(ImageError, match=r"extension '\.txt' is not read"):
        quiet(tmp_path / "c.txt")


# -- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 400), (224, 224), (50, 60), (1, 500), (251, 173)])
def test_thumbnail_is_the_notebooks(shape):
    array = noise(*shape)
    im = Image.fromarray(array.astype(np.uint8))
    im.thumbnail((224, 224), Image.Resampling.LANCZOS)
    ds = quiet([array], size=224)
    np.testing.assert_array_equal(read_image(ds, 0), np.array(im))
    assert ds.attrs["size"] == 224
    assert (ds.height.item(), ds.width.item()) == (im.height, im.width)


def test_thumbnail_of_a_jpeg_decodes_it_fully(tmp_path):
    save(tmp_path / "a.jpg", noise(400, 300), quality=90)
    im = Image.fromarray(np.array(Image.open(tmp_path / "a.jpg")))
    im.thumbnail((40, 40), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(read_image(quiet(tmp_path, size=40), 0), np.array(im))


def test_exact_size():
    array = noise(30, 41)
    expected = Image.fromarray(array).resize((17, 9), Image.Resampling.LANCZOS)
    ds = quiet([array, noise(9, 17)], size=(9, 17))
    np.testing.assert_array_equal(read_image(ds, 0), np.array(expected))
    assert ds.pixels.shape == (2, 9, 17, 3)
    assert ds.attrs["size"] == [9, 17]


@pytest.mark.parametrize("size", [0, -3, 2.5, True, (3,), (3, 0), (1, 2, 3), "224", (10**6, 10**6)])
def test_size_invalid(size):
    with pytest.raises(ArgumentError, match="expected"):
        quiet([noise()], size=size)


# -- lazy and eager ------------------------------------------------------------------------------


def test_files_are_lazy(classes):
    ds = quiet(classes[0], size=8)

    def refuse(*args, **kwargs):
        raise AssertionError("computed")

    with dask.config.set(scheduler=refuse):
        assert ds.label.values[0] == "guitar"
        assert ds.isel(image=slice(2)).pixels.chunks == ((1, 1), (6,), (8,), (3,))
        with pytest.raises(AssertionError, match="computed"):
            ds.pixels.compute()
    together = ds.pixels.values
    assert together.dtype == ds.pixels.dtype == np.uint8
    for i in range(6):
        np.testing.assert_array_equal(together[i], read_image(ds, i))


def test_one_chunk_reads_one_file(classes):
    ds = quiet(classes[0])
    (classes[0] / "husky" / "1.png").unlink()
    ds.pixels.sel(image="husky/2.png").compute()
    with pytest.raises(ImageError, match=r"1\.png: no such file"):
        ds.pixels.sel(image="husky/1.png").compute(scheduler="synchronous")


@pytest.mark.parametrize("same", [True, False])
def test_changed_file(tmp_path, same):
    save(tmp_path / "a.png", noise())
    save(tmp_path / "b.png", noise(12 if same else 13))
    ds = quiet(tmp_path)
    assert ("pixels" in ds) is same
    save(tmp_path / "a.png", noise())
    with pytest.raises(ImageError, match=r"a\.png: changed since it was opened"):
        read_image(ds, "a.png")


def test_sizes_that_differ_stay_files(tmp_path):
    arrays = [save(tmp_path / "a.png", noise(9)), save(tmp_path / "b.png", noise(10)), noise(11)]
    ds = quiet(tmp_path)
    assert not ds.data_vars
    mixed = quiet([tmp_path / "a.png", arrays[2], tmp_path / "b.png"])
    assert mixed.encoded.dtype == object
    assert [bool(png) for png in mixed.encoded.values] == [False, True, False]
    assert mixed.image.values.tolist() == ["a.png", "image_0001", "b.png"]
    for i, array in enumerate([arrays[0], arrays[2], arrays[1]]):
        np.testing.assert_array_equal(read_image(mixed, i), array)
    np.testing.assert_array_equal(read_image(mixed.isel(image=[1]), 0), arrays[2])


def test_same_size_in_memory_and_in_files(tmp_path):
    arrays = [
        noise(),
        save(tmp_path / "a.png", noise()),
        save(tmp_path / "b.png", noise()),
        noise(),
    ]
    ds = quiet([arrays[0], tmp_path / "a.png", tmp_path / "b.png", arrays[3]])
    assert ds.pixels.chunks[0] == (1, 1, 1, 1)
    np.testing.assert_array_equal(ds.pixels.values, arrays)


def test_lost_size_is_noticed(tmp_path):
    save(tmp_path / "a.png", noise(40, 30))
    save(tmp_path / "b.png", noise(30, 40))
    ds = quiet(tmp_path, size=20)
    assert read_image(ds, 0).shape == (20, 15, 3)
    with pytest.raises(DataError, match=r"attrs\['size'\] is None"):
        read_image(ds.drop_attrs(), 0)


def test_read_image_arguments():
    ds = quiet([noise(), noise()])
    np.testing.assert_array_equal(read_image(ds, -1), ds.pixels[1])
    read_image(ds, 0)[:] = 0
    assert ds.pixels[0].values.any()
    for i in (2, -3, "no", 1.0, True):
        with pytest.raises(ArgumentError, match="image"):
            read_image(ds, i)
    with pytest.raises(DataError, match="has neither `pixels`, `encoded` nor a file"):
        read_image(ds.drop_vars("pixels"), 0)


def test_round_trip_through_zarr(tmp_path):
    save(tmp_path / "in" / "é.png", noise())
    ds = quiet([tmp_path / "in" / "é.png", noise()], size=8)
    ds.to_zarr(tmp_path / "x.zarr", consolidated=False)
    back = xr.open_zarr(tmp_path / "x.zarr", consolidated=False)
    assert back.attrs == {"size": 8}
    for name in ds.image.values:
        np.testing.assert_array_equal(read_image(back, name), read_image(ds, name))
    np.testing.assert_array_equal(
        read_image(back.drop_vars("pixels"), "é.png"), read_image(ds, "é.png")
    )


@pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification")
def test_encoded_survives_zarr(tmp_path):
    ds = quiet([noise(), noise(13)])
    ds.to_zarr(tmp_path / "x.zarr", consolidated=False)
    back = xr.open_zarr(tmp_path / "x.zarr", consolidated=False)
    for i in range(2):
        np.testing.assert_array_equal(read_image(back, i), read_image(ds, i))


def test_progress(classes, capsys):
    open_images(classes[0], progress=True)  # quick work shows no bar
    assert capsys.readouterr().err == ""


# -- bad image files -----------------------------------------------------------------------------


def png(width: int, height: int, body: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + idat + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_600, 50_000])
def test_decompression_bomb(side):
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"bomb: .*xpected at most 89478485"):
        decode_bytes(png(side, side), "bomb")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("limit", [None, 89_478_485])
def test_own_cap_holds_without_pillows(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match="xpected at most 89478485"):
        decode_bytes(png(50_000, 2_000), "bomb")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_truncated(kind, share):
    data = encode(Image.fromarray(noise(40, 50)), kind)
    assert decode_bytes(data, "whole").shape == (40, 50, 3)
    with pytest.raises(ImageError, match=r"cut: (truncated|not an image)"):
        decode_bytes(data[: int(share * len(data))], "cut")


def test_png_truncated_after_the_last_pixel():
    data = encode(Image.fromarray(noise()), "PNG")
    for cut in (1, 4, 12, 16):
        with pytest.raises(ImageError, match="truncated"):
            decode_bytes(data[:-cut], "cut")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_raise_only_image_errors(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]))
    raw = bytearray(
        encode(Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)), kind)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        rgb = decode_bytes(bytes(raw), "damaged")
    except ImageError as error:
        assert str(error).startswith("damaged: ")  # noqa: PT017
    else:
        assert rgb.dtype == np.uint8
        assert rgb.ndim == 3


def test_truncated_files_may_not_be_tolerated(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES is True"):
        quiet([noise()])


def test_all_bad_files_are_named(classes):
    root, _ = classes
    (root / "husky" / "1.png").write_bytes(b"")
    (root / "guitar" / "2.png").write_bytes((root / "guitar" / "2.png").read_bytes()[:-20])
    with pytest.raises(ImageError, match=r"(?s)2 of 6 images .*guitar/2\.png.*husky/1\.png"):
        quiet(root)
    for i in range(20, 32):
        (root / "husky" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"(?s)14 of 18 images cannot be used.*and 4 more"):
        quiet(root)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_frames(kind):
    frames = [Image.fromarray(noise()) for _ in range(3)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="film: has 3 frames; expected one"):
        decode_bytes(data, "film")


def test_mpo_is_its_main_picture():
    first, second = Image.fromarray(noise()), Image.fromarray(noise())
    data = encode(first, "MPO", save_all=True, append_images=[second])
    expected = np.array(Image.open(io.BytesIO(encode(first, "JPEG"))))
    np.testing.assert_array_equal(decode_bytes(data, "camera"), expected)


def test_not_an_image_that_is_run(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(ImageError, match="not an image file that can be read"):
        quiet(tmp_path)


# -- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation(orientation, kind):
    # The transformation each value stands for, from the definition of the tag.
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = noise(8, 16)
    plain = decode_bytes(encode(Image.fromarray(array), kind), "plain")
    rotated = decode_bytes(encode(Image.fromarray(array), kind, exif=exif), "rotated")
    np.testing.assert_array_equal(rotated, turn(plain))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey(kind):
    deep = RNG.integers(0, 65536, (9, 7), dtype=np.uint16)
    deep[0, :4] = 0, 128, 129, 65535
    expected = np.rint(deep / 257).astype(np.uint8)
    assert expected[0, :4].tolist() == [0, 0, 1, 255]
    rgb = decode_bytes(encode(Image.fromarray(deep), kind), "deep")
    np.testing.assert_array_equal(rgb, np.repeat(expected[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(from_array(deep, "deep"), rgb)
    np.testing.assert_array_equal(from_array(deep.astype(">u2"), "deep"), rgb)
    np.testing.assert_array_equal(from_pillow(Image.fromarray(deep.astype(np.int32)), "I"), rgb)


def test_sixteen_bit_grey_with_a_transparent_value():
    deep = np.array([[0, 257, 65535]], dtype=np.uint16)
    raw = encode(Image.fromarray(deep), "PNG")
    at = raw.index(b"IDAT") - 4
    body = b"tRNS" + struct.pack(">H", 257)
    raw = raw[:at] + struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body)) + raw[at:]
    assert decode_bytes(raw, "key")[0, :, 0].tolist() == [0, 255, 255]


def test_thirty_two_bit_is_refused_beyond_sixteen():
    with pytest.raises(ImageError, match="32-bit values from -1 to 70000"):
        from_pillow(Image.fromarray(np.array([[-1, 70_000]], dtype=np.int32)), "wide")
    with pytest.raises(ImageError, match=r"may mean 0\.\.1"):
        from_pillow(Image.fromarray(np.array([[0.0, 0.7]], dtype=np.float32)), "F")


def test_grey_palette_and_bilevel():
    grey = noise(channels=1)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_bytes(encode(Image.fromarray(grey), "PNG"), "L"), expected)
    palette = Image.fromarray(noise()).quantize(16)
    np.testing.assert_array_equal(
        decode_bytes(encode(palette, "PNG"), "P"), np.array(palette.convert("RGB"))
    )
    bits = Image.fromarray(grey > 100)
    rgb = decode_bytes(encode(bits, "PNG"), "1")
    np.testing.assert_array_equal(rgb[..., 2], np.where(grey > 100, 255, 0))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_other_colour_spaces(mode):
    data = encode(Image.fromarray(noise()).convert(mode), "JPEG")
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert Image.open(io.BytesIO(data)).mode in (mode, "RGB")
    np.testing.assert_array_equal(decode_bytes(data, mode), expected)


def test_cmyk_primaries():
    inks = [[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]
    ink = Image.new("CMYK", (3, 1))
    for x, value in enumerate(inks):
        ink.putpixel((x, 0), tuple(value))
    assert from_pillow(ink, "ink").tolist() == [[[255] * 3, [0, 255, 255], [0, 0, 0]]]


def test_alpha_is_composited_over_white():
    rgba = noise(channels=4)
    rgba[0, :4, 3] = 0, 255, 128, 1
    alpha = rgba[..., 3:] / 255
    expected = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    for rgb in (
        decode_bytes(encode(Image.fromarray(rgba), "PNG"), "png"),
        from_array(rgba, "array"),
        from_pillow(Image.fromarray(rgba), "pillow"),
    ):
        np.testing.assert_array_equal(rgb, expected)
    grey = Image.merge("LA", [Image.fromarray(np.ascontiguousarray(rgba[..., c])) for c in (0, 3)])
    np.testing.assert_array_equal(
        decode_bytes(encode(grey, "PNG"), "LA"), np.repeat(expected[..., :1], 3, axis=2)
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "La", "RGBa", "1"])
def test_hidden_colours_do_not_show(mode):
    """Two images that differ only where they are transparent read the same: white."""
    if mode == "P":
        image = Image.new("P", (2, 1), 3)
        image.putpalette([9, 99, 199] * 256)
        image = Image.open(io.BytesIO(encode(image, "PNG", transparency=3)))
    elif mode in ("L", "RGB", "1"):
        colour = {"L": 77, "RGB": (7, 8, 9), "1": 1}[mode]
        key = {"L": 77, "RGB": (7, 8, 9), "1": 1}[mode]
        image = Image.open(
            io.BytesIO(encode(Image.new(mode, (2, 1), colour), "PNG", transparency=key))
        )
    else:
        image = Image.new(mode, (2, 1), 0)
    assert from_pillow(image, mode).tolist() == [[[255] * 3] * 2]


def test_pillow_images_in_memory(tmp_path):
    array = noise()
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = Image.open(io.BytesIO(encode(Image.fromarray(array), "PNG", exif=exif)))
    ds = quiet([Image.fromarray(array), turned, turned])
    np.testing.assert_array_equal(ds.pixels.values, [array, array[::-1, ::-1], array[::-1, ::-1]])
    assert ds.source.values.tolist() == ["", "", ""]
    assert ds.sha256.values[0] == hashlib.sha256(array.tobytes()).hexdigest()
    assert quiet(Image.fromarray(array)).image.values.tolist() == ["image_0000"]
    with pytest.raises(ImageError, match=r"image_0000: 0 x 4 pixels"):
        quiet(Image.new("RGB", (4, 0)))


# -- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((4, 4), bool), r"image_0000: dtype bool; .*255 \* mask"),
        (np.zeros((4, 4), complex), "dtype complex128"),
        (np.full((4, 4), None), "dtype object"),
        (np.full((4, 4), "x"), "dtype <U1"),
        (np.full((4, 4), 256), r"int64 values from 256 to 256; expected 0\.\.255"),
        (np.full((4, 4), -1, np.int16), "values from -1 to -1"),
        (np.full((4, 4), 255.5), "values from 255.5"),
        (np.full((4, 4), 0.5), r"may mean 0\.\.1 or 0\.\.255"),
        (np.zeros((0, 4, 3), np.uint8), "0 x 4 pixels; expected at least one"),
        (np.zeros((3, 40, 50), np.uint8), r"channels seem to come first.*moveaxis\(x, 0, -1\)"),
        (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((2, 4, 4, 3), np.uint8), "expected \\(height, width\\)"),
        (np.zeros(4, np.uint8), "shape \\(4,\\)"),
        (np.ma.masked_equal(np.eye(3, dtype=np.uint8), 0), "masked pixels"),
        (np.broadcast_to(np.uint8(0), (10**4, 10**4)), "expected at most 89478485"),
    ],
)
def test_bad_arrays(array, match):
    with pytest.raises(ImageError, match=match):
        quiet([array])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_is_located(value):
    array = np.full((4, 5, 3), 100.0)
    array[2, 3, 1] = value
    with pytest.raises(ImageError, match=r"b/image_0000: 1 values .* first at \(2, 3, 1\)"):
        quiet({"a": noise(), "b": array})


def test_one_array_is_an_image_or_a_stack():
    assert quiet(noise()).pixels.shape == (1, 12, 16, 3)
    assert quiet(noise(channels=1)).pixels.shape == (1, 12, 16, 3)
    stack = RNG.integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)
    ds = quiet(stack)
    np.testing.assert_array_equal(ds.pixels, stack)
    assert isinstance(ds.pixels.data, np.ndarray)
    np.testing.assert_array_equal(quiet(stack[..., 0]).pixels[..., 2], stack[..., 0])
    with pytest.raises(ImageError, match="channels first"):
        quiet(stack[:3, :, :, 0])
    assert quiet(stack[:3, :, :, :1]).sizes["image"] == 3
    with pytest.raises(ImageError, match=r"channels seem to come second.*moveaxis\(x, 1, -1\)"):
        quiet(np.moveaxis(stack, -1, 1))


def test_opened_arrays_do_not_follow_later_changes():
    array = noise()
    ds = quiet([array])
    before = ds.pixels.values.copy()
    array[:] = 0
    np.testing.assert_array_equal(ds.pixels, before)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([(), (1,), (3,)])),
    dtype=st.sampled_from(["u1", "u4", ">i2", "i4", "i8", "f2", ">f4", "f8"]),
    order=st.sampled_from(["C", "F"]),
    data=st.data(),
)
def test_arrays_of_any_size_and_dtype(shape, dtype, order, data):
    values = data.draw(hnp.arrays(np.uint8, (*shape[:2], *shape[2])))
    array = np.asarray(values.astype(dtype), order=order)
    if array.dtype.kind == "f" and 0 < array.max() <= 1:
        with pytest.raises(ImageError, match="which may mean"):
            from_array(array, "x")
        return
    rgb = from_array(array, "x")
    grey = values if values.ndim == 3 else values[:, :, None]
    np.testing.assert_array_equal(rgb, np.broadcast_to(grey, rgb.shape))
    assert rgb.dtype == np.uint8
    assert rgb.flags.c_contiguous
    ds = quiet([array])
    np.testing.assert_array_equal(read_image(ds, 0), rgb)
    assert ds.sha256.item() == hashlib.sha256(rgb.tobytes()).hexdigest()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 60),
    st.integers(2, 60),
    st.one_of(st.integers(1, 70), st.tuples(st.integers(1, 70), st.integers(1, 70))),
)
def test_height_and_width_are_those_of_the_pixels(height, width, size):
    ds = quiet([np.zeros((height, width), np.uint8)], size=size)
    assert ds.pixels.shape == (1, ds.height.item(), ds.width.item(), 3)
    if isinstance(size, int):
        assert max(ds.pixels.shape[1:3]) <= max(size, 1)
        assert ds.height.item() <= height
    else:
        assert ds.pixels.shape[1:3] == size


# -- stacks in .npy files ------------------------------------------------------------------------


def test_stacks(tmp_path):
    stacks = {n: RNG.integers(0, 256, (12, 8, 9, 3), dtype=np.uint8) for n in ("cat", "dog")}
    for name, stack in stacks.items():
        np.save(tmp_path / f"{name}.npy", stack)
    ds = quiet(tmp_path, per_class=11)
    assert ds.image.values.tolist()[9:13] == ["cat[9]", "cat[10]", "dog[0]", "dog[1]"]
    assert ds.source.values[12] == str(tmp_path / "dog.npy[1]")
    assert ds.label.values.tolist() == ["cat"] * 11 + ["dog"] * 11
    assert ds.pixels.chunks[0] == (1,) * 22
    np.testing.assert_array_equal(ds.pixels[11:], stacks["dog"][:11])
    np.testing.assert_array_equal(read_image(ds, "dog[3]"), stacks["dog"][3])
    assert ds.sha256.values[12] == hashlib.sha256(stacks["dog"][1].tobytes()).hexdigest()
    same = quiet([tmp_path / "cat.npy", tmp_path / "dog.npy"], per_class=11)
    xr.testing.assert_identical(same.drop_vars("pixels"), ds.drop_vars("pixels"))
    turned = quiet([tmp_path / "dog.npy", tmp_path / "cat.npy"], per_class=1)
    assert turned.label.values.tolist() == ["dog", "cat"]
    assert quiet({"pet": tmp_path / "cat.npy"}).label.values.tolist() == ["pet"] * 12


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">f8", "int32"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_stack_dtypes_and_orders(tmp_path, dtype, order):
    white = 65536 if dtype == "uint16" else 256
    stack = np.asarray(RNG.integers(2, white, (3, 8, 9)).astype(dtype), order=order)
    np.save(tmp_path / "grey.npy", stack)
    ds = quiet(tmp_path / "grey.npy")
    for i in range(3):
        np.testing.assert_array_equal(ds.pixels[i].values, from_array(stack[i], "x"))


def test_uint16_arrays_of_8_bit_values_are_refused():
    with pytest.raises(ImageError, match=r"uint16 values up to 200.*may mean 0\.\.255"):
        from_array(np.full((2, 2), 200, np.uint16), "dim")
    assert from_array(np.zeros((2, 2), np.uint16), "black").max() == 0


def test_a_dark_16_bit_file_says_its_depth(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "dark.png")
    assert (quiet([tmp_path / "dark.png"]).pixels.values == 1).all()


def test_altered_pixels_are_seen(tmp_path):
    from vitxr.stimuli.images import altered

    save(tmp_path / "a.png", noise())
    save(tmp_path / "b.png", noise())
    for stim in (quiet(tmp_path), quiet(noise()), quiet(tmp_path).isel(image=[1])):
        none = [None] * stim.sizes["image"]
        assert altered(stim) == none
        assert altered(stim.isel(image=slice(None, None, -1))) == none
        inverted = stim.assign(pixels=255 - stim["pixels"])
        assert None not in altered(inverted)
        assert altered(inverted) == altered(inverted.compute())


def test_stacks_in_class_folders(tmp_path):
    (tmp_path / "cat").mkdir()
    np.save(tmp_path / "cat" / "a.npy", noise())
    ds = quiet(tmp_path)
    assert (ds.image.item(), ds.label.item()) == ("cat/a[0]", "cat")
    save(tmp_path / "cat" / "b.png", noise())
    with pytest.raises(DataError, match=r"\.npy stacks beside image files"):
        quiet(tmp_path)


def header(shape: str, dtype: str = "|u1", body: bytes = b"") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (header("(1000000, 1000, 1000, 3)", body=b"x" * 99), "3000000000000 bytes, but 99 follow"),
        (header("(2, 4, 4)", body=b"x" * 31), "32 bytes, but 31 follow"),
        (header("(2, 4, 4)", body=b"x" * 33), "32 bytes, but 33 follow"),
        (header("(-2, -4, 4)", body=b"x" * 32), "at least one image"),
        (header("(0, 4, 4, 3)"), "at least one image"),
        (header("()", body=b"x"), "at least one image"),
        (header("(4,)", body=b"x" * 4), "expected a stack"),
        (header("(2, 4, 4)", "|O", b"x" * 32), "dtype object.*never"),
        (header("(2, 4, 4)", "|b1", b"x" * 32), "dtype bool"),
        (b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff" + b"{" * 99, r"not a \.npy file"),
        (b"\x93NUMPY\x09\x00" + b"x" * 99, r"not a \.npy file"),
        (b"not numpy", r"not a \.npy file"),
        (b"", r"not a \.npy file"),
    ],
)
def test_bad_stacks(tmp_path, raw, match):
    (tmp_path / "bad.npy").write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(ImageError, match=rf"bad\.npy: .*{match}"):
        quiet(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_pickles_are_not_loaded(tmp_path):
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ImageError, match="dtype object"):
        quiet(tmp_path)


def test_bad_entries_of_a_stack_are_named(tmp_path):
    stack = np.full((4, 5, 6), 9.0)
    stack[2, 1, 1] = np.nan
    stack[3] = 300
    np.save(tmp_path / "s.npy", stack)
    with pytest.raises(
        ImageError, match=r"(?s)2 of 4 .*s\.npy\[2\]: 1 values.*s\.npy\[3\]: float64"
    ):
        quiet(tmp_path)


def test_stack_replaced_by_a_shorter_one(tmp_path):
    np.save(tmp_path / "s.npy", np.ones((4, 5, 6), np.uint8))
    ds = quiet(tmp_path)
    np.save(tmp_path / "s.npy", np.zeros((2, 5, 6), np.uint8))
    with pytest.raises(ImageError, match=r"s\.npy\[3\]: the stack has 2 images"):
        read_image(ds, 3)
    with pytest.raises(ImageError, match=r"s\.npy\[0\]: changed since"):
        read_image(ds, 0)
