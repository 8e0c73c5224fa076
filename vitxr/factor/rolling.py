"""The arithmetic of shift-aligned nonnegative CP, on plain arrays: rolls by FFT, and HALS."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.factor.blocks import Pool, Share, row_blocks, shares
from vitxr.factor.kernels import contract, hals_update, khatri_rao, random_start

__all__ = ["Rolled", "best_rolls", "places", "rolled"]

Array = npt.NDArray[Any]

#: Bytes of a block; several of its size exist beside it.
BLOCK_BYTES = 8 << 20
#: Iterations at the start that look for new rolls each; of later ones each fifth does.
EVERY = 5
#: Passes that align all responses to their own mean before the first iteration.
ROUNDS = 4
#: Relative rolls of a component that are tried at a time, and iterations for each.
TRIED, TRIAL = 3, 40
#: Entries that are transformed to compare all relative rolls of a component on a sample, and most
#: responses of the sample.
SAMPLE_ENTRIES, SAMPLE = 1 << 26, 4096
#: Smallest divisor of an update, for data of norm 1 or more.
FLOOR = 1e-6


def places(sizes: tuple[int, int]) -> Array:
    """Where each entry of a rolled response comes from, ``(roll, entry)``, all indices flat.

    Examples
    --------
    >>> places((1, 3))
    array([[0, 1, 2],
           [2, 0, 1],
           [1, 2, 0]])
    """
    ny, nx = sizes
    y, x = (g.ravel() for g in np.mgrid[:ny, :nx])
    return (y - y[:, None]) % ny * nx + (x - x[:, None]) % nx


def rolled(x: Array, rolls: Array, table: Array) -> Array:
    """Roll responses ``(..., entry)``, each by its own roll.

    Examples
    --------
    >>> rolled(np.array([[5, 6, 7], [5, 6, 7]]), np.array([0, 1]), places((1, 3)))
    array([[5, 6, 7],
           [7, 5, 6]])
    """
    return np.take_along_axis(x, table[rolls], axis=-1)


def best_rolls(x: Array, model: Array, current: Array, sizes: tuple[int, int]) -> Array:
    """Find for each response the roll with which it fits its model best.

    ``|R_d x - m|`` is least where the cross-correlation ``sum_s x(s - d) m(s)`` is largest; all
    places of it come from one product of spectra.

    Parameters
    ----------
    x
        Responses ``(n, entry)``, float32 or float64.
    model
        Spectra of their models, ``rfft2`` flattened, ``(n, frequency)``.
    current
        Their rolls so far, flat: kept unless another one is better by more than rounding.
    sizes
        Of the lattice.

    Returns
    -------
    numpy.ndarray
        ``(n,)``.

    Examples
    --------
    >>> from scipy.fft import rfft2
    >>> model = rfft2(np.array([[[7.0, 5.0, 6.0]]])).reshape(1, -1)
    >>> best_rolls(np.array([[5.0, 6.0, 7.0]]), model, np.array([0]), (1, 3))
    array([1])
    """
    from scipy.fft import irfft2, rfft2

    spectra = rfft2(x.reshape(-1, *sizes)).conj()
    spectra *= model.reshape(spectra.shape)
    fits = irfft2(spectra, sizes).reshape(x.shape)
    best = fits.argmax(axis=1)
    every = np.arange(len(x))
    rounding = 1e-5 if x.dtype == np.float32 else 1e-10
    better = fits[every, best] * (1 - rounding) > fits[every, current]
    return np.where(better, best, current)


class Rolled:
    """One model while it is fitted, and the roll of each response.

    Attributes
    ----------
    factors
        Component-major: of the first mode, which is walked over, in the dtype of the data; of the
        second, and of the entries of the lattice, float64.
    rolls
        ``(n_0, n_1)``, flat.
    """

    _sample: Array
    _sampled: Array

    def __init__(self, x: Any, sizes: tuple[int, int], norm: float, pool: Pool):
        self._x, self._sizes, self._norm, self._pool = x, sizes, norm, pool
        self._table = places(sizes)
        self._rows = max(1, BLOCK_BYTES // (math.prod(x.shape[1:]) * x.dtype.itemsize))
        self._shares = shares(x, self._rows, pool.threads)
        self._floor = FLOOR * min(1.0, norm ** (4 / 3))
        self.rolls = np.zeros(x.shape[:2], np.intp)
        self.factors: list[Array] = []

    def _blocks(self, share: Share) -> Any:
        """Walk over responses: the rows, and ``(row * second mode, entry)``."""
        for where, block in row_blocks(self._x, self._rows, share):
            yield where, block.reshape(-1, self._x.shape[2])

    def start(self, rank: int, seed: int) -> None:
        """Align all responses to one of them, then to their mean; draw factors."""
        rng = np.random.default_rng(seed)

        def energies(share: Share) -> None:
            for where, block in self._blocks(share):
                squares = np.square(block, dtype=np.float64).sum(axis=1)
                energy[where] = squares.reshape(-1, energy.shape[1])

        energy: Array = np.empty(self.rolls.shape)
        self._pool.map(energies, self._shares)
        drawn = rng.choice(energy.size, p=energy.ravel() / energy.sum())
        row, column = (int(i) for i in np.unravel_index(drawn, energy.shape))
        template: Array = np.asarray(self._x[row, column], np.float64)
        for _ in range(ROUNDS):
            template = self._centred(template)
            template = np.sum(
                self._pool.map(lambda s, t=template: self._gather(s, t), self._shares), axis=0
            )
        wanted = min(SAMPLE, SAMPLE_ENTRIES // len(template) ** 2) // energy.shape[1]
        rows = energy.sum(axis=1)
        count = min(max(1, wanted), np.count_nonzero(rows))
        self._sample = np.sort(rng.choice(len(rows), count, replace=False, p=rows / rows.sum()))
        self._sampled = np.asarray(self._x[self._sample]).reshape(-1, len(template))
        start = random_start(self._x.shape, rank, self._norm, seed)
        first = np.array(start[0].T, self._x.dtype, order="C")
        self.factors = [first, *(np.array(f.T, order="C") for f in start[1:])]

    def _centred(self, profile: Array) -> Array:
        """Roll a profile so that its largest entry comes first, where all seeds begin."""
        ny, nx = self._sizes
        y, x = divmod(int(profile.argmax()), nx)
        return np.roll(profile.reshape(ny, nx), (-y, -x), (0, 1)).ravel()

    def _gather(self, share: Share, template: Array) -> Array:
        """Align responses to a template, and add them up."""
        from scipy.fft import rfft2

        total = np.zeros(len(template))
        spectrum = rfft2(template.astype(self._x.dtype).reshape(1, *self._sizes)).reshape(1, -1)
        for where, block in self._blocks(share):
            model = np.broadcast_to(spectrum, (len(block), spectrum.shape[1]))
            current = self.rolls[where].ravel()
            found = best_rolls(block, model, current, self._sizes)
            self.rolls[where] = found.reshape(-1, self.rolls.shape[1])
            total += rolled(block, found, self._table).sum(axis=0, dtype=np.float64)
        return total

    def fit(self, tol: float, max_iter: int) -> tuple[list[float], bool]:
        """Iterate to a minimum, then try to leave it by rolling one component against the others.

        What a response with several components is rolled by depends on how these lie to one
        another, and the iteration cannot move one of them alone: it ends in minima in which they
        lie wrong. The rolls of a component that look best on a sample of responses, with all
        rolls new and the factors as they are, are tried in turn; one is kept if the objective
        ends lower by ``tol`` or more, otherwise everything is put back. The fit has converged
        when no component gains by it.

        Returns
        -------
        list of float
            The lowest objective so far, after each iteration, those of trials included.
        bool
            Whether it converged.
        """
        history, converged = self.iterate(tol, max_iter)
        best, rank = history[-1], len(self.factors[0])
        since, r = 0, 0  # components tried since the last gain
        while converged and rank > 1 and since < rank:
            since += 1
            for place in self._candidates(r):
                if len(history) >= max_iter:
                    converged = False
                    break
                kept = [f.copy() for f in self.factors], self.rolls.copy()
                self.factors[2][r] = self.factors[2][r][self._table[place]]
                trial, _ = self.iterate(tol, min(TRIAL, max_iter - len(history)))
                history += np.minimum(trial, best).tolist()
                if trial[-1] < best - tol:
                    best, since = trial[-1], 0
                    break
                self.factors, self.rolls = kept
            r = (r + 1) % rank
        return np.minimum.accumulate(history).tolist(), converged

    def _candidates(self, r: int) -> list[int]:
        """Relative rolls of a component after which a sample of responses is fitted best."""
        from scipy.fft import rfft2

        a, b, c = self.factors
        loads = (a[:, self._sample].T[:, None] * b.T).reshape(-1, len(a))
        x, current = self._sampled, self.rolls[self._sample].ravel()
        errors = np.empty(len(self._table))
        for place, source in enumerate(self._table):
            moved = c.copy()
            moved[r] = c[r][source]
            spectra = rfft2(moved.reshape(-1, *self._sizes)).reshape(len(c), -1)
            found = best_rolls(x, loads @ spectra, current, self._sizes)
            errors[place] = np.square(rolled(x, found, self._table) - loads @ moved).sum()
        return [int(p) for p in np.argsort(errors, kind="stable") if p != 0][:TRIED]

    def iterate(self, tol: float, max_iter: int) -> tuple[list[float], bool]:
        """Iterate to convergence; return the history, and whether it converged."""
        history: list[float] = []
        look = True
        while len(history) < max_iter:
            last = len(history) + 1 == max_iter
            look = look or last or len(history) < EVERY or len(history) % EVERY == 0
            history.append(self._iteration(look))
            fell = math.inf if len(history) == 1 else history[-2] - history[-1]
            if fell < tol and look:
                return history, True
            look = fell < tol
        return history, False

    def _iteration(self, look: bool) -> float:
        """New rolls, then all factors; return the relative residual."""
        a, b, c = self.factors
        right = khatri_rao([b, c]).astype(a.dtype)
        products = self._pool.map(lambda share: self._pass(share, right, look), self._shares)
        y = np.sum(products, axis=0)
        # By row: Gram matrices of many rows in float32 would lose digits.
        exact = a.astype(np.float64)
        first = exact @ exact.T
        size = [b, c]
        hals_update(b, contract(y, size, keep=0), first * (c @ c.T), self._floor)
        target = contract(y, size, keep=1)
        gram = first * (b @ b.T)
        hals_update(c, target, gram, self._floor)
        cross, own = float((c * target).sum()), float((gram * (c @ c.T)).sum())
        return math.sqrt(max(self._norm**2 - 2 * cross + own, 0.0)) / self._norm

    def _pass(self, share: Share, right: Array, look: bool) -> Array:
        """One pass: rolls and the first factor of each block; the product for the others."""
        from scipy.fft import rfft2

        a, b, c = self.factors
        rank, dtype = len(a), a.dtype
        spectra = rfft2(c.reshape(rank, *self._sizes)).reshape(rank, -1)
        spectra = spectra.astype(np.result_type(dtype, np.complex64))
        second = b.T.astype(dtype)
        gram = (b @ b.T) * (c @ c.T)
        out = np.zeros((rank, right.shape[1]))
        for where, block in self._blocks(share):
            rows = np.ascontiguousarray(a[:, where])
            if look:
                loads = (rows.T[:, None] * second).reshape(-1, rank)
                current = self.rolls[where].ravel()
                found = best_rolls(block, loads @ spectra, current, self._sizes)
                self.rolls[where] = found.reshape(-1, self.rolls.shape[1])
            moved = rolled(block, self.rolls[where].ravel(), self._table)
            moved = moved.reshape(rows.shape[1], -1)
            hals_update(rows, right @ moved.T, gram, self._floor)
            a[:, where] = rows
            out += rows @ moved
        return out

    def settle(self) -> None:
        """Put the model's shift profile first on the lattice, and rolls that say nothing to 0."""
        a, b, c = self.factors
        ny, nx = self._sizes
        lengths = np.linalg.norm(a.astype(np.float64), axis=1) * np.linalg.norm(b, axis=1)
        y, x = divmod(int((lengths @ c).argmax()), nx)
        c[:] = np.roll(c.reshape(-1, ny, nx), (-y, -x), (1, 2)).reshape(c.shape)
        was = np.stack(np.unravel_index(self.rolls, self._sizes))
        self.rolls = (was[0] - y) % ny * nx + (was[1] - x) % nx
        alive = (np.linalg.norm(c, axis=1) > 0)[:, None]
        silent = ((a > 0) & alive).T.astype(float) @ (b > 0) == 0
        for share in self._shares:
            for where, block in self._blocks(share):
                silent[where] |= ~block.any(axis=1).reshape(-1, silent.shape[1])
        self.rolls[silent] = 0
