"""What is browsed: a store, perhaps factors of it, its images; read lazily, kept once read.

One source serves all sessions of a server.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitxr.app.means import Means, means
from vitxr.app.pixels import pixels
from vitxr.errors import ArgumentError, DataError
from vitxr.names import NEURON, SHIFT
from vitxr.plot.movie import Movie

__all__ = ["Source", "open_source"]

#: Feature maps whose neurons are shown where no factors say which.
_MAPS = 20
#: Bytes kept of what is quickly read or drawn again: frames, pixels, pictures, movies.
_BYTES = 256_000_000
#: Things kept of each kind that is slow to make, so that no walk through frames drops them.
_SLOW = {"means": 4, "factors": 32, "clusters": 32, "neurons": 32, "maps": 32}


def open_source(store: str | Path, factors: str | Path | None = None) -> Source:
    """Open a store and a file of factors or of an ensemble.

    Raises
    ------
    StoreError
        If one of them is missing, unfinished or damaged.
    DataError
        If it holds something else, or the factors are of another model.
    """
    import vitxr.store

    ds = vitxr.store.open_store(store)
    found = None if factors is None else vitxr.store.open_store(factors)
    where = (_anywhere(store), None if factors is None else _anywhere(factors))
    return Source(ds, found, where=where)


def _anywhere(path: str | Path) -> str:
    """A path as a script in any folder has it; an address on the network as it is."""
    return str(path) if "://" in str(path) else str(Path(path).absolute())


class Source:
    """A Dataset of activations, and what goes with it.

    Parameters
    ----------
    ds
        As :func:`vitxr.open` opens a store of :func:`vitxr.extract`.
    factors
        Factors of a neuron tensor of ``ds``, or an ensemble of them.
    stimuli
        Its images, where they are not files.
    where
        The paths of both, for scripts.

    Raises
    ------
    DataError
        If ``ds`` has no activations, or the factors are not of it.
    """

    def __init__(
        self,
        ds: Any,
        factors: Any = None,
        stimuli: xr.Dataset | None = None,
        where: tuple[str, str | None] | None = None,
    ):
        needed = {"image", "layer", *NEURON}
        known = isinstance(ds, xr.Dataset) and "activation" in ds
        if not known or not needed <= set(ds["activation"].dims):
            raise DataError(
                "expected a Dataset of vitxr.extract, with `activation` of (image, shift_y, "
                f"shift_x, layer, feature_map, patch_row, patch_col); given: {type(ds).__name__} "
                f"with {', '.join(map(str, getattr(ds, 'data_vars', ()))) or 'nothing'}."
            )
        self.ds = ds
        self.stimuli = stimuli
        self.where = where
        self.ensemble = factors if isinstance(factors, xr.DataTree) else None
        self._factors = factors if isinstance(factors, xr.Dataset) else None
        self.layers = [int(v) for v in np.atleast_1d(ds["layer"].values)]
        self.images = [str(v) for v in ds["image"].values]
        self.feature_maps = [int(v) for v in ds["feature_map"].values]
        self.grid = (ds.sizes["patch_row"], ds.sizes["patch_col"])
        self.lattice = (ds.sizes.get("shift_y", 1), ds.sizes.get("shift_x", 1))
        #: Pixels down, and to the right, of every place of the lattice.
        self.offsets = np.zeros((2, *self.lattice), int)
        for out, name in zip(self.offsets, ("offset_y", "offset_x"), strict=True):
            if name in ds.coords:
                values = np.asarray(ds[name].values)
                out[:] = values[:, None] if ds[name].dims == (SHIFT[0],) else values
        self.ranks: list[int] = []
        if self.ensemble is not None:
            names = [n for n in self.ensemble.children if n.startswith("rank_")]
            self.ranks = sorted(int(n.removeprefix("rank_")) for n in names)
        if factors is not None:
            self._check(factors)
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.RLock] = {}

    def _check(self, factors: Any) -> None:
        if self.ensemble is None and (
            self._factors is None or "neuron_factor" not in self._factors
        ):
            raise DataError(
                f"expected factors or an ensemble; given: {type(factors).__name__} with "
                f"{', '.join(map(str, getattr(factors, 'data_vars', ()))) or 'nothing'}. Give what "
                "vitxr factorize wrote."
            )
        if self._factors is not None and "component" not in self._factors.dims:
            raise DataError(
                "the factors are those of a Tucker model, which has no components that neurons, "
                "images and shifts share. Give factors of a CP model, such as method='ncp_hals'."
            )
        if self.ensemble is not None and not self.ranks:
            raise DataError("the ensemble has no ranks (rank_8, ...). Give what fit_ensemble made.")
        mine, theirs = (x.attrs.get("model_fingerprint") for x in (self.ds, factors))
        if mine and theirs and mine != theirs:
            raise DataError(
                f"the factors are of another model: fingerprint {theirs[:12]}, the store's is "
                f"{mine[:12]}. Give factors of this store."
            )
        if self.factor_layer not in self.layers:
            raise DataError(
                f"the factors are of block {self.factor_layer}, and the store holds "
                f"{', '.join(map(str, self.layers))}. Give factors of this store."
            )
        self._check_labels(
            factors if self._factors is not None else factors[f"rank_{self.ranks[0]}"]
        )

    def _check_labels(self, f: Any) -> None:
        """Refuse factors of images or patches that the store does not hold."""
        names = [str(n) for n in f["image"].values] if "image" in f.coords else []
        unknown = sorted(set(names) - set(self.images))
        if unknown:
            more = f" and {len(unknown) - 1} more" * (len(unknown) > 1)
            raise DataError(
                f"the factors are of images that the store does not hold: {unknown[0]!r}{more}. "
                "Give factors of this store."
            )
        for name, size in zip(NEURON[1:], self.grid, strict=True):
            if name in f.coords and int(f[name].max()) >= size:
                raise DataError(
                    f"the factors have neurons at `{name}` {int(f[name].max())}, and the store's "
                    f"patch grid is {self.grid[0]} x {self.grid[1]}. Give factors of this store."
                )

    @property
    def title(self) -> str:
        """The store's name, and its model."""
        name = Path(self.where[0].rstrip("/")).name if self.where else "a Dataset"
        model = self.ds.attrs.get("model")
        return f"{name}, {model}" if model else name

    @property
    def has_factors(self) -> bool:
        """Whether factors were given."""
        return self._factors is not None or self.ensemble is not None

    @property
    def factor_layer(self) -> int:
        """The block that the factors are of."""
        given: Any = self._factors if self.ensemble is None else self.ensemble
        if "layer" not in given.attrs:
            raise DataError(
                "the factors do not say of which block they are (attribute `layer`). Give factors "
                "of a tensor made with ds.vit.neuron_tensor."
            )
        return int(given.attrs["layer"])

    def keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Give what is kept under a key, made if it is not there: once, however many ask."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            turn = self._making.setdefault(key, threading.RLock())
        with turn:
            with self._lock:
                if key in self._kept:
                    return self._kept[key]
            try:
                value = make()
                with self._lock:
                    self._kept[key] = value
                    self._drop(_kind(key))
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return value

    def _drop(self, kind: Hashable) -> None:
        """Forget what was not asked for for the longest time, never the newest."""
        most = _SLOW.get(str(kind))
        if most is not None:
            for key in [k for k in self._kept if _kind(k) == kind][:-most]:
                del self._kept[key]
            return
        quick = [k for k in self._kept if str(_kind(k)) not in _SLOW]
        total = sum(_weight(self._kept[k]) for k in quick)
        for key in quick[:-1]:
            if total <= _BYTES:
                break
            total -= _weight(self._kept.pop(key))

    @property
    def components(self) -> int:
        """Components of the factors, of the largest rank where there are several; 0 without."""
        if self._factors is not None:
            return int(self._factors.sizes["component"])
        return max(self.ranks, default=0)

    def factors(self, rank: int | None = None) -> xr.Dataset:
        """Factors in memory: of an ensemble, the best replicate of a rank."""

        def load() -> xr.Dataset:
            if self._factors is not None:
                from vitxr.plot._select import one_fit

                return one_fit(self._factors).compute()
            from vitxr.factor import best

            if rank not in self.ranks:
                raise ArgumentError(f"rank={rank}: the ensemble has {self.ranks}.")
            assert self.ensemble is not None
            return best(self.ensemble, rank).compute()

        return self.keep(("factors", rank), load)

    def neurons(self, layer: int, rank: int | None = None) -> xr.Dataset:
        """The neurons that can be selected: of the factors, with their embedding, if there are.

        Without factors, those of the most active maps of a layer, which have no places.
        """

        def make() -> xr.Dataset:
            if self.has_factors:
                from vitxr.analysis import embed

                f = self.factors(rank)
                return embed(f, n_components=min(10, f.sizes["component"]))
            from vitxr.tensors import neuron_tensor

            count = min(_MAPS, len(self.feature_maps))
            t = neuron_tensor(self.ds, layer, feature_maps=count)
            own = {n: c for n, c in t.coords.items() if c.dims == ("neuron",)}
            return xr.Dataset(coords=own, attrs=t.attrs)

        return self.keep(self.neurons_key(layer, rank), make)

    def neurons_key(self, layer: int, rank: int | None) -> tuple[str, int | None, int | None]:
        """What tells the neurons that are shown from those of another layer or rank."""
        return ("neurons", None if self.has_factors else layer, rank)

    def clustered(self, rank: int | None, count: int) -> xr.Dataset:
        """The neurons of the factors, divided into clusters by k-means on their embedding."""

        def make() -> xr.Dataset:
            from vitxr.analysis import cluster

            return cluster(self.neurons(self.factor_layer, rank), count)

        return self.keep(("clusters", rank, count), make)

    def known_clusters(self, rank: int | None, count: int) -> xr.Dataset | None:
        """The same if they are there already."""
        with self._lock:
            return self._kept.get(("clusters", rank, count))

    def maps_of(self, layer: int, rank: int | None = None) -> list[int]:
        """Feature maps of the neurons, in their order."""

        def make() -> list[int]:
            values = self.neurons(layer, rank)["feature_map"].values
            return [int(v) for v in dict.fromkeys(values.tolist())]

        return self.keep(("maps", None if self.has_factors else layer, rank), make)

    def means(
        self, layer: int, rank: int | None, tell: Callable[[int, int], None] | None = None
    ) -> Means:
        """Mean responses of the neurons; ``tell(done, of)`` is called as images are read."""
        e, maps = self.neurons(layer, rank), tuple(self.maps_of(layer, rank))
        layer = self.factor_layer if self.has_factors else layer
        return self.keep(("means", layer, maps), lambda: means(self.ds, layer, e, tell))

    def known_means(self, layer: int, rank: int | None) -> Means | None:
        """The mean responses if they have been read, else None: nothing is read."""
        maps = tuple(self.maps_of(layer, rank))
        layer = self.factor_layer if self.has_factors else layer
        with self._lock:
            return self._kept.get(("means", layer, maps))

    def pixels(self, image: str) -> np.ndarray:
        """One image at the size at which the model takes it, uint8 (height, width, 3)."""
        return self.keep(("pixels", image), lambda: pixels(self.ds, image, self.stimuli))

    def label(self, image: str) -> str:
        """Class of an image in brackets, or nothing."""
        if "label" not in self.ds.coords:
            return ""
        label = str(self.ds["label"].sel(image=image).values)
        return f" ({label})" if label else ""

    def channel(self, layer: int, feature_map: int) -> int:
        """The model's channel number of a stored map."""
        if "channel" not in self.ds.coords:
            return feature_map
        return int(self.ds["channel"].sel(layer=layer, feature_map=feature_map))

    def offset(self, shift_y: int, shift_x: int) -> tuple[int, int]:
        """Pixels, down and to the right, of a place of the lattice."""
        dy, dx = self.offsets[:, shift_y, shift_x].tolist()
        return dy, dx

    @property
    def lattice_names(self) -> dict[str, Any]:
        """What a grid calls the rows and columns of the lattice: pixels where they have one."""
        if self.ds.get("offset_x", xr.DataArray()).ndim != 1:
            return {"row_name": "shift row", "col_name": "column"}
        down = [f"{v} px" for v in self.offsets[0, :, 0]]
        right = [f"{v} px" for v in self.offsets[1, 0]]
        return {"row_name": "dy", "row_labels": down, "col_name": "dx", "col_labels": right}

    def frame(self, layer: int, image: str, shift_y: int, shift_x: int) -> xr.DataArray:
        """All maps of one frame of a block, (feature_map, patch_row, patch_col)."""

        def read() -> xr.DataArray:
            one = self.ds["activation"].sel(layer=layer, image=image)
            at = {"shift_y": shift_y, "shift_x": shift_x}
            return one.isel({d: i for d, i in at.items() if d in one.dims}).compute()

        return self.keep(("frame", layer, image, shift_y, shift_x), read)

    def attention(self, layer: int, image: str, shift_y: int, shift_x: int) -> xr.DataArray:
        """Attention of one frame of a block, (head, query, key)."""

        def read() -> xr.DataArray:
            one = self.ds["attention"].sel(layer=layer, image=image)
            at = {"shift_y": shift_y, "shift_x": shift_x}
            return one.isel({d: i for d, i in at.items() if d in one.dims}).compute()

        return self.keep(("attention", layer, image, shift_y, shift_x), read)


def _kind(key: Hashable) -> Hashable:
    """What is kept under a key: its first part."""
    return key[0] if isinstance(key, tuple) else key


def _weight(value: Any) -> int:
    """Bytes of an array, of encoded pictures, or of a movie."""
    if isinstance(value, Movie):
        return int(value.frames.nbytes) + len(value.html)
    return len(value) if isinstance(value, bytes) else int(getattr(value, "nbytes", 0))
