"""Linear centred kernel alignment of representations, of arrays larger than memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.analysis._compared import check_counts, compared, labelled
from vitxr.analysis._grams import batches, centred, products, u_centred
from vitxr.analysis._pairs import Across, pair
from vitxr.errors import ArgumentError, DataError
from vitxr.tensors import whose

__all__ = ["cka"]

Array = npt.NDArray[Any]


def cka(
    ds: xr.Dataset,
    other: xr.Dataset | None = None,
    across: Across = "layer",
    unbiased: bool = True,
    batch_size: int = 32,
    shuffles: int = 20,
    random_state: int = 0,
    variable: str = "activation",
) -> xr.Dataset:
    r"""Linear centred kernel alignment of representations.

    A representation is what a layer does with a frame: all feature maps and patches, one row of
    features for each image. With :math:`K = XX^T` of one and :math:`L = YY^T` of another,

    .. math::

        \mathrm{CKA} = \frac{\sum \mathrm{HSIC}(K, L)}
            {\sqrt{\sum \mathrm{HSIC}(K, K) \sum \mathrm{HSIC}(L, L)}}

    summed over batches of images and, across layers, over shifts: images are only ever compared
    with images of the same shift. 1: the same up to rotations, reflections and one scale.
    Permutations of features are rotations; so is a roll of the patch grid.

    Parameters
    ----------
    ds
        Dataset with ``variable``.
    other
        Another one, of another model or store; ``ds`` itself by default. Its images are the same
        by name, and by ``sha256`` where both have it, in any order.
    across
        "layer": each layer with each layer of ``other``, at the same shifts. "shift": each shift
        with each shift of ``other``, in the same layer.
    unbiased
        Each HSIC above and below the line is HSIC_1 of Song et al. (2012, equation 5), an unbiased
        estimate of the HSIC of the images' population from any number of 4 or more, 0 in
        expectation for independent representations; CKA may then be below 0. The ratio, CKA,
        is not itself unbiased. False: HSIC_0, ``tr(K H L H) / (n - 1)^2`` with ``H = I - 1/n``, as
        CKA was first defined, of all images at once. It is biased upwards: with few images and many
        features CKA is near 1 whatever they are.
    batch_size
        Most images that are compared with one another. Batches are drawn at random and as equal
        as can be. With more the estimate varies less and takes more memory and time.
    shuffles
        How many times images are permuted within their batch for the floors.
    random_state
        Seed of batches and permutations.
    variable
        Whose feature maps: "activation", "attention_output", a module's, or any other on the
        patch grid.

    Returns
    -------
    xarray.Dataset
        ``cka``, and of shuffled images ``cka_floor_mean`` and ``cka_floor_quantile`` (95 %):
        (layer, other_layer), or (shift_y, shift_x, layer, other_shift_y, other_shift_x). Computed
        at once, one block of the data in memory at a time. NaN where a representation is the same
        for all images or holds NaN.

    Raises
    ------
    ArgumentError
        If an option does not exist or is out of range, or the result would not fit in memory.
    DataError
        If the images or shifts of the two differ, there are fewer than 4 images, or a store does
        not hold all of them yet.

    References
    ----------
    Kornblith et al. (2019), Similarity of neural network representations revisited, ICML
    (``unbiased=False``); Nguyen, Raghu and Kornblith (2021), Do wide and deep networks learn the
    same things?, ICLR (equations 2 and 3: HSIC_1 in CKA, summed over batches); Song et al. (2012),
    Feature selection via dependence maximization, JMLR 13, 1393-1434 (HSIC_1).

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=2), vitxr.load_model("digits"),
    ...                    layers="all", shifts=None, progress=False)
    >>> c = ds.vit.cka()
    >>> bool(c.cka.sel(layer=0, other_layer=1) > c.cka.sel(layer=0, other_layer=5))
    True
    """
    arrays, orders = pair(ds, other, across, variable)
    n = arrays[0].sizes["image"]
    check_counts(batch_size=(batch_size, 4), shuffles=(shuffles, 1))
    if n < 4:
        raise DataError(f"{n} images: CKA compares 4 or more.")
    if not unbiased and batch_size < n:
        raise ArgumentError(
            f"unbiased=False with batch_size={batch_size} of {n} images: biased CKA is of all "
            f"images at once. Pass batch_size={n}, or take the unbiased one."
        )
    parts = batches(n, batch_size, random_state)
    if len(parts[-1]) < 4:
        raise ArgumentError(
            f"batch_size={batch_size} cuts {n} images into batches of {len(parts[-1])}; unbiased "
            "CKA needs 4 or more in each: take another size."
        )
    dtype = np.result_type(np.float32, *(x.dtype for x in arrays))
    centre = u_centred if unbiased else centred
    rng = np.random.default_rng((random_state, 1))
    orderings = [np.stack([rng.permutation(len(p)) for _ in range(shuffles)]) for p in parts]

    def of_batch(x: Array, y: Array, batch: int) -> list[Array]:
        # n (n - 3) HSIC_1, or (n - 1)^2 HSIC_0: the mean over batches weighs them alike.
        b = len(parts[batch])
        scale = 1 / (b * (b - 3)) if unbiased else 1 / (b - 1) ** 2
        return [scale * value for value in products(centre(x), centre(y), orderings[batch])]

    remedy = "take a smaller batch_size, or some of the shifts"
    cross, shuffled, own, others = compared(
        arrays, orders, parts, across, dtype, of_batch, False, remedy
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.sqrt(own[..., :, None] * others[..., None, :])
        found, shuffled = cross / unit, np.moveaxis(shuffled, -3, 0) / unit
    return labelled("cka", found, shuffled, arrays, across, (ds, ds if other is None else other), {
        "unbiased": int(unbiased), "batches": len(parts), "images": n, "shuffles": shuffles,
        "random_state": random_state, **whose(ds, variable),
    })  # fmt: skip
