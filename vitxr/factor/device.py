"""Rows that stay on a torch device, such as a GPU: small sums come and go. Only here is torch."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vitxr.errors import ArgumentError, DataError, DependencyError, ModelError
from vitxr.factor.blocks import MAX_ROWS, MEMORY_BYTES, block_rows, row_blocks
from vitxr.factor.kernels import hals_terms
from vitxr.factor.rows import Pass, Sums
from vitxr.factor.workers import check_client

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceRows", "check_place", "on_device"]

Array = npt.NDArray[Any]

#: Part of the free memory of a device that is used.
USED = 0.9
#: Rows that are updated at a time where the tensor stays on the device: a sweep of HALS is many
#: short calls, each of which takes as long for few rows as for many.
ROWS = 16384

#: How exact products are is a setting of the process: one pass at a time changes it and back.
_SETTING = threading.Lock()


def check_place(options: Mapping[str, Any], x: Any, mask: Any) -> bool:
    """Check where passes over a tensor are to be made; return whether by NumPy in this process.

    Parameters
    ----------
    options
        Of "ncp_hals"; read are ``client`` and ``device``.
    x, mask
        The tensor's data, and what counts of it.

    Raises
    ------
    ArgumentError
        If the client or the device is none, does not go with the tensor, or both are given.
    DependencyError
        If a device is given, and torch is not installed.

    Examples
    --------
    >>> check_place({}, np.ones((2, 3)), None)
    True
    """
    client, device = options.get("client"), options.get("device")
    if client is not None and device is not None:
        raise ArgumentError(
            f"device is {device!r} and client is given: the rows are on the device of this process "
            "or on the workers of the client; leave one out."
        )
    if client is not None:
        check_client(client, x, mask)
    if device is not None:
        _find(device)
        if mask is not None:
            raise ArgumentError(
                f"device is {device!r} and a mask is given, which the pass on a device does not "
                "take: leave one out."
            )
    return client is None and device is None


def _find(device: Any) -> torch.device:
    """Return the device, or say why there is none."""
    if not isinstance(device, str):
        raise ArgumentError(
            f"device is {device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:1', or None for NumPy."
        )
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"device={device!r} needs torch, which is not installed: pip install 'vitxr[models]', "
            "or leave device out."
        ) from error
    from vitxr.models.load import find_device

    try:
        found = find_device(device)
    except ModelError as error:
        raise ArgumentError(str(error)) from error
    if found.type not in ("cpu", "cuda"):
        raise ArgumentError(
            f"device is {device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:1': sums are float64, "
            "which not every other device has."
        )
    return found


@contextmanager
def on_device(x: Any, device: str, columns: int, rows: int | None = None) -> Iterator[DeviceRows]:
    """Bring a tensor to a device, if it fits, and free it at the end.

    Parameters
    ----------
    x
        Float32 or float64, NumPy or Dask, the mode to walk over in front.
    device
        "auto", "cpu", "cuda", "cuda:1".
    columns
        Most columns of the models that are iterated at a time.
    rows
        Rows of a block; chosen by default.

    Raises
    ------
    DataError
        If not even the factors, the sums and one block fit.
    """
    holder = DeviceRows(x, device, columns, rows)
    try:
        holder.load()
        yield holder
    finally:
        holder.close()


class DeviceRows:
    """The holder of rows that are on a torch device: see :class:`vitxr.factor.rows.Holder`.

    The rows of the first factors stay there, and so does the tensor if it fits; a larger one comes
    over block by block in every pass. Products are taken in the dtype of the data, and in full:
    while a pass lasts, reduced precision of float32 products (TF32, bfloat16) is off, whatever the
    process has set, and so is autocasting. Y is added up in float64 over blocks of 1024 rows.
    """

    keeps = False

    def __init__(self, x: Any, device: str, columns: int, rows: int | None = None):
        import torch

        self._x, self._device = x, _find(device)
        self._width = math.prod(x.shape[1:])
        self._type: torch.dtype = getattr(torch, np.dtype(x.dtype).name)
        self._data: torch.Tensor | None = None
        self._factor = torch.empty((0, x.shape[0]), dtype=self._type, device=self._device)
        self._read = block_rows(x.shape, np.dtype(x.dtype).itemsize)
        self.stays = self._fits(columns)
        self._rows = rows or (ROWS if self.stays else self._read)

    def _fits(self, columns: int) -> bool:
        """Whether the tensor fits beside what is needed in a pass; raise if that does not."""
        size, item = self._x.shape[0] * self._width, np.dtype(self._x.dtype).itemsize
        free = _free(self._device)
        if free is None:  # in this process, as much as a Dask tensor may take
            return size * item <= MEMORY_BYTES

        def needed(rows: int) -> int:
            # Of a column: the Khatri-Rao product, a product and the sum; the factor, twice while
            # models leave; products, targets and two arrays of float64 of the rows of a block.
            each = self._width * (2 * item + 8) + 2 * self._x.shape[0] * item
            return columns * (each + rows * (3 * item + 16))

        if needed(min(ROWS, self._x.shape[0])) + size * item <= free:
            return True
        least = needed(self._read) + 2 * self._read * self._width * item
        if least > free:
            raise DataError(
                f"{columns} components of all models side by side, with one block of the tensor, "
                f"need {least / 1e9:.3g} GB on {self._device}, of which {free / 1e9:.3g} GB "
                "are free: fit fewer models at a time, free memory there, or leave device out."
            )
        return False

    def load(self) -> None:
        """Bring the tensor over, chunk by chunk, if it is to stay."""
        import torch

        if not self.stays:
            return
        with self._guarded():
            shape = (self._x.shape[0], self._width)
            data = torch.empty(shape, dtype=self._type, device=self._device)
            for where, block in row_blocks(self._x, self._read):
                data[where] = self._send(block)
            self._data = data

    def take(self, factor: Array) -> None:
        """Take over first factors."""
        with self._guarded():
            self._factor = self._send(factor)

    def give(self, columns: slice) -> Array:
        """Return first factors, a copy."""
        return np.array(self._factor[columns].cpu().numpy())

    def keep(self, columns: Array) -> None:
        """Go on with some of the columns, a mask."""
        with self._guarded():
            self._factor = self._factor[self._send(columns)]

    def close(self) -> None:
        """Free what is on the device."""
        self._data, self._factor = None, self._factor[:0].clone()

    def run(self, task: Pass) -> Sums:
        """Make one pass over the tensor."""
        import torch

        out = Sums.zeros(task)
        with self._guarded(), _exact(self._device):
            lead = self._send(task.lead)
            linear = None if task.linear is None else self._send(task.linear)
            groups = [] if task.floor is None else list(self._groups(task))
            y = torch.zeros(lead.shape, dtype=torch.float64, device=self._device)
            for where, block in self._blocks():
                tile = self._factor[:, where]
                if groups:
                    mttkrp = lead @ block.T
                    target = mttkrp if linear is None else mttkrp - linear
                    for group in groups:
                        group.update(tile, mttkrp, target, task.nonnegative)
                # Longer sums in float32 would lose digits.
                for part in range(0, len(block), MAX_ROWS):
                    few = slice(part, part + MAX_ROWS)
                    y += tile[:, few] @ block[few]
            out.y = y.cpu().numpy()
            if groups:
                out.squares = [s for g in groups for s in g.squares.cpu().numpy()]
                out.inner = torch.cat([g.inner for g in groups]).cpu().numpy()
                if linear is not None:
                    out.totals = torch.cat([g.totals.flatten() for g in groups]).cpu().numpy()
        return out

    def _groups(self, task: Pass) -> Iterator[_Group]:
        """Models of one rank that stand side by side are updated in common."""
        start, dtype = 0, np.dtype(self._x.dtype)
        for rank, grams in itertools.groupby(task.grams, key=len):
            gram = np.array(list(grams))
            assert task.floor is not None
            divisor, others, sweeps = hals_terms(gram, task.floor)
            terms = [self._send(terms.astype(dtype)) for terms in (divisor[..., None], others)]
            yield _Group(slice(start, start + rank * len(gram)), terms[0], terms[1], sweeps)
            start += rank * len(gram)

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the tensor, on the device."""
        if self._data is None:
            for where, block in row_blocks(self._x, self._rows):
                yield where, self._send(block)
            return
        for low in range(0, len(self._data), self._rows):
            where = slice(low, min(low + self._rows, len(self._data)))
            yield where, self._data[where]

    def _send(self, values: Array) -> torch.Tensor:
        import torch

        # torch warns of arrays that may not be written to, such as those of a file.
        return torch.from_numpy(np.require(values, requirements=("C", "W"))).to(self._device)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Say what to do where the device's memory is full."""
        from vitxr.models.capture import is_out_of_memory

        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DataError(
                f"the memory of {self._device} is full, though enough of it was free before: fit "
                "fewer models at a time, end what else is there, or leave device out."
            ) from error


class _Group:
    """Models of one rank during a pass: what their update needs, and what is summed up."""

    def __init__(self, columns: slice, divisor: torch.Tensor, others: torch.Tensor, sweeps: int):
        import torch

        self._columns, self._divisor, self._others = columns, divisor, others
        self._sweeps, self._shape = sweeps, others.shape[:2]
        double: dict[str, Any] = {"dtype": torch.float64, "device": others.device}
        self.squares = torch.zeros(others.shape, **double)
        self.inner = torch.zeros(others.shape[0], **double)
        self.totals = torch.zeros(others.shape[:2], **double)

    def update(
        self, tile: torch.Tensor, mttkrp: torch.Tensor, target: torch.Tensor, nonnegative: bool
    ) -> None:
        """Update rows, in place, as :func:`vitxr.factor.kernels.hals_update` does."""
        import torch

        factor, product, goal = (
            a[self._columns].unflatten(0, self._shape) for a in (tile, mttkrp, target)
        )
        goal = goal / self._divisor
        for _ in range(self._sweeps):
            for p in range(self._shape[1]):
                component = factor[:, p : p + 1]
                row = self._others[:, p : p + 1] @ factor
                torch.sub(goal[:, p : p + 1], row, out=component)
                if nonnegative:
                    component.clamp_(min=0)
        double = factor.double()
        self.squares += double @ double.mT
        self.inner += (double * product).sum(dim=(1, 2))
        self.totals += double.sum(dim=2)


def _free(device: torch.device) -> int | None:
    """Bytes that may be used of a device with memory of its own."""
    import torch

    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(USED * (free + unused))


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Take products of float32 in full, and leave the settings of the process as they were.

    There are two: the older one, which raises where it has been mixed with the newer one, and from
    torch 2.9 on the newer one, by backend.
    """
    import torch

    with _SETTING, torch.autocast(device.type, enabled=False):
        backends: tuple[Any, ...] = (
            torch.backends.cuda.matmul,
            getattr(torch.backends.mkldnn, "matmul", None),
        )
        newer = [(b, b.fp32_precision) for b in backends if hasattr(b, "fp32_precision")]
        try:
            older = torch.get_float32_matmul_precision()
        except RuntimeError:
            older = None
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if older is not None:
                torch.set_float32_matmul_precision(older)
            for backend, value in newer:
                backend.fp32_precision = value
