"""What a source of images means: folders, files, stacks and arrays to a list of named entries.

An entry is one image that has not been decoded yet. Order: a folder is sorted
naturally ("2" before "10"); a sequence or a mapping keeps the order it was given.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitxr.errors import DataError, ImageError
from vitxr.stimuli.decode import MAX_BYTES, decode_bytes, digest, from_array
from vitxr.stimuli.stacks import as_stack, open_stack

__all__ = ["EXTENSIONS", "Entry", "collect", "natural_key", "read_source", "take_per_class"]

#: Extensions of image files that are read; ``.npy`` stacks besides.
EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
#: Images of other formats: leaving one out of its class without a word would be worse.
_UNREAD = (
    *(".arw", ".cr2", ".cr3", ".dng", ".exr", ".heic", ".heif", ".j2k", ".jp2"),
    *(".jxl", ".nef", ".orf", ".psd", ".raf", ".rw2", ".svg", ".tga"),
)
_ENTRY = re.compile(r"(?P<path>.+)\[(?P<index>[0-9]+)\]", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One image of a source.

    Attributes
    ----------
    name
        Unique name of the image.
    label
        Its class.
    source
        Absolute path, ``path/stack.npy[3]`` for the entries of a stack, or ``""``.
    image
        The array or Pillow image, where there is no file.
    """

    name: str
    label: str
    source: str = ""
    image: Any = None


def collect(source: Any) -> list[Entry]:
    """List the images of a source without decoding them.

    Parameters
    ----------
    source
        Anything :func:`vitxr.open_images` takes.

    Returns
    -------
    list of Entry
        With unique, NFC-normalised names, in their final order.

    Raises
    ------
    DataError
        If nothing is found, the source is ambiguous, or names collide or cannot
        be written as UTF-8.
    ImageError
        If a path does not exist or a stack's header does not fit its file.
    """
    root: Path | None = None
    if isinstance(source, Mapping):
        entries = []
        for key, value in source.items():
            if isinstance(value, Mapping):
                raise DataError(
                    f"the class {key!r} holds a mapping; expected images: give one mapping only."
                )
            found = list(_expand(value, f"{key}/", classes=False))
            if not found:
                raise DataError(f"the class {key!r} holds no images; expected at least one.")
            entries += [replace(entry, label=str(key)) for entry in found]
    else:
        if _is_path(source) and (folder := _absolute(source)).is_dir():
            root = folder
        entries = list(_expand(source, "", classes=True))
    if not entries:
        raise DataError("the source holds no images; expected at least one.")
    return _named(entries, root)


def take_per_class(entries: list[Entry], per_class: int) -> list[Entry]:
    """Keep the first `per_class` entries of each class, in order.

    Raises
    ------
    DataError
        If a class has fewer.
    """
    counts = Counter(e.label for e in entries)
    short = [f"{label!r} has {n}" for label, n in counts.items() if n < per_class]
    if short:
        raise DataError(
            f"per_class={per_class}, but the class {', '.join(short)}. Expected at least that many "
            "in every class: ask for fewer or leave the class out."
        )
    seen: Counter[str] = Counter()
    kept = []
    for entry in entries:
        seen[entry.label] += 1
        if seen[entry.label] <= per_class:
            kept.append(entry)
    return kept


def read_source(source: str) -> tuple[np.ndarray, str]:
    """Read one image by its source.

    Parameters
    ----------
    source
        Absolute path of an image file, or ``path/stack.npy[3]``.

    Returns
    -------
    rgb : numpy.ndarray
        uint8, ``(height, width, 3)``, before any resizing.
    sha256 : str
        Of the file's bytes, or of the pixels of a stack's entry.

    Raises
    ------
    ImageError
        If it is missing or refused by a policy of :mod:`vitxr.stimuli.decode`.
    """
    entry = _ENTRY.fullmatch(source)
    if entry is not None and entry["path"].lower().endswith(".npy"):
        stack = open_stack(Path(entry["path"]))
        index = int(entry["index"])
        if index >= len(stack):
            raise ImageError(f"{source}: the stack has {len(stack)} images; it was replaced.")
        rgb = from_array(stack[index], source)
        return rgb, digest(rgb)
    try:
        path = Path(source)
        if not path.is_file():
            raise ImageError(
                f"{source}: no such file. Expected an image file: restore it, or open the images "
                "where they are now."
            )
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(
                f"{source}: {path.stat().st_size} bytes; expected at most {MAX_BYTES}."
            )
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{source}: cannot be read ({error}).") from error
    return decode_bytes(data, source), digest(data)


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key that puts "2" before "10", folder by folder.

    Examples
    --------
    >>> sorted(["b/10.png", "b/2.png", "a.png"], key=natural_key)
    ['a.png', 'b/2.png', 'b/10.png']
    """
    parts = [
        tuple(
            int(text) if i % 2 else text.casefold()
            for i, text in enumerate(re.split(r"([0-9]+)", part))
        )
        for part in unicodedata.normalize("NFC", name).split("/")
    ]
    return (parts, name)


def _expand(item: Any, prefix: str, *, classes: bool) -> Iterator[Entry]:
    """Entries of one item, still without names where they are files."""
    from PIL.Image import Image

    if _is_path(item):
        yield from _from_path(_absolute(item), classes=classes)
    elif isinstance(item, list | tuple):
        for i, one in enumerate(item):
            if _is_path(one):
                yield from _from_path(_absolute(one), classes=False)
            elif isinstance(one, Image) or hasattr(one, "__array__"):
                array = one if isinstance(one, Image) else np.asanyarray(one)
                yield Entry(f"{prefix}image_{i:04d}", "", image=array)
            else:
                raise DataError(
                    f"item {i} is {_kind(one)}; expected paths, arrays or Pillow images."
                )
    elif isinstance(item, Image):
        yield Entry(f"{prefix}image_0000", "", image=item)
    elif hasattr(item, "__array__"):
        array = np.asanyarray(item)
        if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] not in (3, 4):
            raise ImageError(
                f"an array of shape {array.shape} may be three grey images or one image with its "
                "channels first; expected no doubt: give np.moveaxis(x, 0, -1) for one image, "
                "x[..., np.newaxis] for three."
            )
        for i, one in enumerate(as_stack(array, "the array")):
            yield Entry(f"{prefix}image_{i:04d}", "", image=one)
    else:
        raise DataError(
            f"the source is {_kind(item)}; expected a folder, a path, a list of paths, arrays or "
            "Pillow images, an array, or a mapping of labels to these. Make a sorted list of "
            "anything else that can be listed."
        )


def _from_path(path: Path, *, classes: bool) -> Iterator[Entry]:
    if path.is_dir():
        yield from _from_folder(path, classes=classes)
    elif not path.exists():
        raise ImageError(f"{path}: no such file or folder. Expected images there: check the path.")
    elif path.suffix.lower() == ".npy":
        yield from _from_stack(path, path.stem)
    elif path.suffix.lower() in EXTENSIONS:
        yield Entry("", path.parent.name, str(path))
    else:
        raise ImageError(
            f"{path}: the extension {path.suffix!r} is not read. Expected .npy or one of "
            f"{', '.join(EXTENSIONS)}: convert the file."
        )


def _from_folder(folder: Path, *, classes: bool) -> Iterator[Entry]:
    """Images of a folder: one class, one class a subfolder, or one class a stack."""
    found: list[Path] = []
    empty: list[str] = []
    for child in sorted(_children(folder)):
        if child.name.startswith((".", "__")):
            continue  # hidden files; __MACOSX, __pycache__
        if child.is_dir():
            inside = [path for path in _below(child) if _is_image(path, child)]
            found += inside
            if not inside:
                empty.append(str(child))
        elif _is_image(child, folder):
            found.append(child)
    if empty and (classes or not found):
        raise DataError(f"{', '.join(sorted(empty))}: no images. {_LOOKED_FOR}")
    if not found:
        raise DataError(f"{folder}: no images. {_LOOKED_FOR}")
    top = [p for p in found if p.parent == folder]
    stacks = [p for p in found if p.suffix.lower() == ".npy"]
    if classes and 0 < len(top) < len(found):
        raise DataError(
            f"{folder}: images beside subfolders with images ({top[0].name} and "
            f"{next(p for p in found if p.parent != folder).relative_to(folder)}). Expected either "
            "one subfolder for each class or one class without subfolders: move them, or give a "
            "mapping of labels to folders."
        )
    if 0 < len(stacks) < len(found):
        raise DataError(
            f"{folder}: .npy stacks beside image files ({stacks[0].name} and "
            f"{next(p for p in found if p not in stacks).name}). Expected one kind: give a list of "
            "the paths you mean."
        )
    for path in sorted(found, key=lambda p: natural_key(p.relative_to(folder).as_posix())):
        inner = path.relative_to(folder)
        deep = len(inner.parts) > 1
        label = inner.parts[0] if classes and deep else folder.name
        if path.suffix.lower() == ".npy":
            yield from _from_stack(path, label if deep else path.stem)
        else:
            yield Entry("", label, str(path))


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ImageError(f"{folder}: cannot be listed ({error}).") from error


def _below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ImageError(f"{folder}: cannot be listed ({error}).") from error

    for inner, _, files in os.walk(folder, onerror=refuse):
        yield from (Path(inner, file) for file in files)


def _is_image(path: Path, root: Path) -> bool:
    if any(part.startswith((".", "__")) for part in path.relative_to(root).parts):
        return False
    suffix = path.suffix.lower()
    if suffix in _UNREAD:
        raise ImageError(
            f"{path}: the format {suffix} is not read. Expected .npy or one of "
            f"{', '.join(EXTENSIONS)}: convert the file, or move it out of the folder."
        )
    return suffix == ".npy" or suffix in EXTENSIONS


def _from_stack(path: Path, label: str) -> Iterator[Entry]:
    for i in range(len(open_stack(path))):
        yield Entry("", label, f"{path}[{i}]")


def _named(entries: list[Entry], root: Path | None) -> list[Entry]:
    """Give files their names relative to the common folder; normalise and check all names."""
    files = [e.source for e in entries if e.source]
    if root is None and files:
        try:
            root = Path(os.path.commonpath([os.path.dirname(_file(s)) for s in files]))  # noqa: PTH120
        except ValueError as error:
            raise DataError(
                f"the files have no common folder ({error}); expected them on one drive."
            ) from error
    named = []
    seen: dict[str, str] = {}
    for entry in entries:
        name = entry.name
        if entry.source:
            name = Path(entry.source).relative_to(root or "/").as_posix()
            if match := _ENTRY.fullmatch(name) if _file(entry.source) != entry.source else None:
                name = f"{match['path'][:-4]}[{match['index']}]"
        for text in (name, entry.label, entry.source):
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise DataError(
                    f"the name {text!a} is not UTF-8; expected names that can be written as "
                    "UTF-8: rename the file or folder."
                )
        name = unicodedata.normalize("NFC", name)
        given = entry.source or entry.name
        if name in seen:
            if seen[name] == given:
                raise DataError(f"{given} is given twice; expected each image once: remove one.")
            raise DataError(
                f"two images have the name {name!r}: {seen[name]!a} and {given!a}. "
                "Expected unique names after Unicode normalisation (NFC): rename one."
            )
        seen[name] = given
        named.append(replace(entry, name=name, label=unicodedata.normalize("NFC", entry.label)))
    return named


def _file(source: str) -> str:
    """The file of a source: without the index of a stack's entry."""
    match = _ENTRY.fullmatch(source)
    return match["path"] if match and match["path"].lower().endswith(".npy") else source


def _is_path(item: Any) -> bool:
    return isinstance(item, str | bytes | os.PathLike)


def _absolute(item: Any) -> Path:
    return Path(os.path.abspath(Path(os.fsdecode(item)).expanduser()))  # noqa: PTH100 (keeps links)


def _kind(item: Any) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"


_LOOKED_FOR = (
    f"Expected .npy stacks or files with one of the extensions {', '.join(EXTENSIONS)}: check the "
    "folder, or remove it if it is no class."
)
