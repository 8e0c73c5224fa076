"""Catalogs of stores: Intake's YAML files (its version 1), read and written without Intake.

A catalog names stores, says what is in each and where it lies. Files of one project may lie
beside their catalog (``{{ CATALOG_DIR }}``), so that folder and catalog move together.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, StoreError
from vitxr.store.drafts import replacing
from vitxr.store.files import Result, open_store
from vitxr.store.location import Location
from vitxr.store.plans import read_plan

__all__ = ["add", "entries", "models", "open"]

_HERE = "{{ CATALOG_DIR }}"
_COLUMNS = [
    *("description", "variables", "sizes", "model", "stimuli_sha256", "schema_version"),
    *("bytes", "licence", "made", "url"),
]


def entries(catalog: str | Path | None = None) -> pd.DataFrame:
    """List the stores of a catalog, and of the catalogs that it names.

    Parameters
    ----------
    catalog
        A YAML file, as :func:`add` writes it or written by hand; the one that comes with
        vitxr if None.

    Returns
    -------
    pandas.DataFrame
        A row for each store, by its name (``"activations.digits"`` where a catalog names
        another): ``description``, ``variables``, ``sizes`` (of the dimensions), ``model``,
        ``stimuli_sha256`` (one hash of all images), ``schema_version`` (of the store's
        layout; None for saved results), ``bytes`` (on disk), ``licence``, ``made`` (the
        store's attributes: versions and settings), ``url``. What a catalog does not say is
        None.

    Raises
    ------
    StoreError
        If a catalog is missing, cannot be read, or is not one of Intake's version 1.

    Examples
    --------
    >>> import vitxr
    >>> vitxr.catalog.entries()[["model", "licence"]]  # doctest: +NORMALIZE_WHITESPACE
                          model licence
    stimuli.digits         None  CC BY 4.0
    activations.digits   digits  CC BY 4.0
    """
    rows = dict(_walk(_file(catalog), "", ()))
    table = {
        name: {
            **dict.fromkeys(_COLUMNS),
            **{k: v for k, v in row.get("metadata", {}).items() if k in _COLUMNS},
            "description": row.get("description"),
            "url": row.get("args", {}).get("urlpath"),
        }
        for name, row in rows.items()
    }
    frame = pd.DataFrame.from_dict(table, orient="index", columns=_COLUMNS, dtype=object)
    return frame.where(frame.notna(), None)


def open(name: str, catalog: str | Path | None = None) -> Result:  # noqa: A001
    """Open a store by its name in a catalog; as :func:`vitxr.open` does.

    Parameters
    ----------
    name
        As :func:`entries` lists it.
    catalog
        A YAML file; the one that comes with vitxr if None.

    Raises
    ------
    ArgumentError
        If the catalog has no such entry, it is not a Zarr store, or the catalog is given first.
    StoreError
        If the catalog or the store cannot be read.

    Examples
    --------
    >>> import vitxr
    >>> vitxr.catalog.open("activations.digits").activation.dims[:3]
    ('image', 'shift_y', 'shift_x')
    """
    if str(name).endswith((".yaml", ".yml")):
        asked = "NAME" if catalog is None else str(catalog)
        raise ArgumentError(
            f"name={str(name)!r} is a catalog; expected the name of an entry first, then the "
            f"catalog: open({asked!r}, {str(name)!r}). Its names: "
            f"vitxr.catalog.entries({str(name)!r})."
        )
    path = _file(catalog)
    rows = dict(_walk(path, "", ()))
    if name not in rows:
        raise ArgumentError(
            f"name={name!r}: {str(path)!r} has {', '.join(rows) or 'no entries'}. Give one of its "
            "names; a store's path goes to vitxr.open."
        )
    row = rows[name]
    url = row.get("args", {}).get("urlpath")
    if row.get("driver") != "zarr" or not isinstance(url, str):
        raise ArgumentError(
            f"name={name!r} is read by {row.get('driver')!r}; expected a Zarr store (driver: zarr "
            "with one urlpath). Open it with Intake."
        )
    return open_store(url)


def add(
    store: str | Path,
    catalog: str | Path,
    *,
    name: str | None = None,
    description: str = "",
    licence: str = "",
) -> str:
    """Add a finished store to a catalog.

    Parameters
    ----------
    store
        What :func:`vitxr.extract` or :func:`vitxr.save` wrote, ending in ``.zarr``; a folder
        or a URL.
    catalog
        YAML file to add to; it is made if there is none. Stores in its folder, or below, are
        named relative to it.
    name
        Name of the entry, an identifier; the store's own without its ending if None.
    description, licence
        What it is, and under which terms it may be used.

    Returns
    -------
    str
        The name of the entry. What it says besides is read from the store: variables, sizes,
        model, hash of the images, version of the layout, bytes, and the attributes.

    Raises
    ------
    StoreError
        If the store is missing, not finished or not Zarr, or the catalog cannot be read. The
        catalog is as it was.
    ArgumentError
        If the name is no identifier or is taken.

    Examples
    --------
    >>> import tempfile
    >>> import vitxr
    >>> folder = Path(tempfile.mkdtemp())
    >>> run = vitxr.save(vitxr.datasets.digits(per_class=1), folder / "digits.zarr")
    >>> vitxr.catalog.add(run, folder / "lab.yaml", licence="CC BY 4.0")
    'digits'
    >>> vitxr.catalog.open("digits", folder / "lab.yaml").sizes["image"]
    10
    """
    import yaml

    location = Location(store)
    if name is None:
        name = str(location).rstrip("/").rpartition("/")[2].removesuffix(".zarr")
    if not name.isidentifier():
        raise ArgumentError(
            f"name={name!r}: expected letters, digits and underscores, as Intake makes an "
            "attribute of it. Give name=."
        )
    entry = _entry(location, Path(catalog), description, licence)
    path = Path(catalog).absolute()
    text = _read(path) if path.exists() else "metadata:\n  version: 1\nsources:\n"
    before = _parsed(text, path)
    sources = before["sources"] or {}
    if name in sources:
        raise ArgumentError(f"name={name!r} is in {str(catalog)!r} already. Give another name.")
    after = {**before, "sources": {**sources, name: entry}}
    if not sources:
        text = text.replace("sources: {}", "sources:")
    block = yaml.safe_dump({name: entry}, sort_keys=False, allow_unicode=True, width=100)
    # Added at the end, so that comments stay.
    text = text.rstrip("\n") + "\n" + "".join(f"  {line}\n" for line in block.splitlines())
    try:
        whole = yaml.safe_load(text) == after
    except yaml.YAMLError:
        whole = False
    if not whole:
        raise StoreError(
            f"{str(catalog)!r} cannot be added to as it is written. Expected 'sources:' as its "
            "last key, its entries indented by two spaces."
        )
    with replacing(path) as draft:
        draft.write_text(text, "utf-8")
    return name


def models() -> pd.DataFrame:
    """List the models that are known to fit: a row for each id that ``load_model`` takes.

    Returns
    -------
    pandas.DataFrame
        ``revision`` (a commit, or main, the newest), ``family``, ``licence``,
        ``input`` and ``patch`` (pixels), ``layers``, ``channels``, ``heads``, ``prefix`` (tokens
        before the patches), ``expect`` (what to know before).

    Examples
    --------
    >>> import vitxr
    >>> int(vitxr.catalog.models().loc["facebook/dinov2-base", "patch"])
    14
    """
    from vitxr.models.catalog import known_models

    return pd.DataFrame(list(known_models().values())).set_index("id")


def _file(catalog: str | Path | None) -> Path:
    if catalog is not None:
        return Path(catalog).absolute()
    return Path(str(importlib.resources.files("vitxr") / "catalogs" / "intake.yaml"))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (IsADirectoryError, UnicodeDecodeError) as error:
        what = "a folder" if path.is_dir() else "no text"
        raise StoreError(f"{str(path)!r} is {what}; expected a catalog, a YAML file.") from error


def _parsed(text: str, path: Path) -> dict[str, Any]:
    import yaml

    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StoreError(f"{str(path)!r} is not YAML: {error}") from error
    rows = read.get("sources", ...) if isinstance(read, dict) else ...
    named = isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())
    if not (named or rows is None) or read.get("metadata", {}).get("version", 1) != 1:
        raise StoreError(
            f"{str(path)!r} is no catalog. Expected one of Intake's version 1: a mapping with "
            "'sources', of names to entries."
        )
    return read


def _walk(path: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each store's full name and entry, its place resolved."""
    if path in above:
        raise StoreError(f"the catalog {str(path)!r} names itself, by way of {str(above[-1])!r}.")
    if not path.exists():
        raise StoreError(f"there is no catalog at {str(path)!r}. vitxr.catalog.add makes one.")
    sources = _parsed(_read(path), path)["sources"] or {}
    for name, row in sources.items():
        given = row.get("args") or {}
        args = {k: _placed(v, path.parent) for k, v in given.items()}
        if row.get("driver") == "yaml_file_cat":
            yield from _walk(Path(args["path"]), f"{prefix}{name}.", (*above, path))
        else:
            yield f"{prefix}{name}", {**row, "args": args, "metadata": row.get("metadata") or {}}


def _placed(value: Any, folder: Path) -> Any:
    if not isinstance(value, str):
        return value
    for here in (_HERE, _HERE.replace(" ", "")):
        value = value.replace(here, str(folder))
    return value


def _entry(location: Location, catalog: Path, description: str, licence: str) -> dict[str, Any]:
    """Say what a store holds, as an entry of a catalog."""
    result = open_store(str(location))  # finished, or it raises
    plan = read_plan(location)
    if location.folder is not None and not location.folder.is_dir():
        raise StoreError(f"{str(location)!r} is a file; expected a Zarr store, a folder or a URL.")
    if isinstance(result, xr.DataArray):
        result = result.to_dataset(name=result.name or "data")
    tree = result if isinstance(result, xr.DataTree) else xr.DataTree(result)
    groups = [node.to_dataset() for node in tree.subtree]
    sizes: dict[str, int] = {}
    for group in groups:
        sizes |= {str(d): int(n) for d, n in group.sizes.items()}
    hashes = [g["sha256"] for g in groups if "sha256" in g.coords]
    attrs = {str(k): v for k, v in _plain(result.attrs).items()}
    return {
        "description": description,
        "driver": "zarr",
        "args": {"urlpath": _url(location, catalog), "consolidated": False},
        "metadata": {
            "variables": sorted({str(v) for group in groups for v in group.data_vars}),
            "sizes": sizes,
            "model": attrs.get("model"),
            "stimuli_sha256": _hash(hashes[0].values.tolist()) if hashes else None,
            "schema_version": None if plan is None else plan["format"],
            "bytes": location.total(),
            "licence": licence or None,
            "made": attrs,
        },
    }


def _plain(attrs: Mapping[Any, Any]) -> dict[Any, Any]:
    """Attributes as YAML's own types."""
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in attrs.items()}


def _hash(sums: list[str]) -> str:
    """One hash for a set of images, whatever their order."""
    return hashlib.sha256("\n".join(sorted(sums)).encode()).hexdigest()


def _url(location: Location, catalog: Path) -> str:
    if location.folder is None:
        return str(location)
    folder, here = location.folder, catalog.absolute().parent
    if not folder.is_relative_to(here):
        return str(folder)
    return f"{_HERE}/{folder.relative_to(here).as_posix()}"
