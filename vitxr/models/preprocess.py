"""From an image of any size to a model's input, with Pillow and NumPy alone."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vitxr.errors import ArgumentError
from vitxr.stimuli.framing import centre_crop, resized_shape

__all__ = ["Preprocess", "at_size", "described", "output_size", "prepared"]

_FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


def _are_numbers(values: Any) -> bool:
    return isinstance(values, tuple | list | np.ndarray) and all(
        isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values
    )


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop the centre, scale to 0..1 and standardize.

    ``(image / 255 - mean) / std``, float32, after resizing and cropping with Pillow.

    Attributes
    ----------
    resize
        Length of the shorter side, the other in proportion; or (height, width); None to leave it.
    interpolation
        Pillow's filter: nearest, bilinear, bicubic, lanczos, box or hamming.
    mean, std
        Of the three channels, on the scale 0..1.
    floating
        Whether to resize in floating point, without rounding to 8 bits (DINOv3).
    cover
        Whether an image resized to (height, width) keeps its proportions and covers both.
    crop
        Height and width cut from the centre, black where the image is smaller; None to keep all.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.full((30, 40, 3), 255, np.uint8)
    >>> array = Preprocess(resize=16, crop=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)(image)
    >>> array.shape, float(array.max())
    ((3, 16, 16), 1.0)
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    floating: bool = False
    cover: bool = False

    def __post_init__(self) -> None:
        for name, size, one in (("resize", self.resize, True), ("crop", self.crop, False)):
            both = (size, size) if one and not np.iterable(size) else size
            if size is not None and not (
                isinstance(both, tuple | list | np.ndarray)
                and len(both) == 2
                and all(isinstance(n, int | np.integer) and n > 0 for n in both)
                and not any(isinstance(n, bool) for n in both)
            ):
                what = "the length of the shorter side, " if one else ""
                raise ArgumentError(
                    f"{name}={size!r}: expected {what}(height, width) in pixels, or None."
                )
            if size is not None:  # numbers of NumPy's too, which JSON does not know
                whole = tuple(np.asarray(size).reshape(-1).tolist())
                object.__setattr__(self, name, whole if np.iterable(size) else whole[0])
        if self.interpolation not in _FILTERS:
            raise ArgumentError(
                f"interpolation={self.interpolation!r}: expected one of {', '.join(_FILTERS)}."
            )
        for name, three in (("mean", self.mean), ("std", self.std)):
            values = np.asarray(three, dtype=np.float64) if _are_numbers(three) else np.array([])
            if not np.isfinite(values).all() or values.size != 3 or (name == "std" and 0 in values):
                raise ArgumentError(
                    f"{name}={three!r}: expected three numbers, of the channels R, G, B"
                    + (", none of them 0." if name == "std" else ".")
                )
            object.__setattr__(self, name, tuple(map(float, three)))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return float32 (channel, row, col) of a uint8 image (row, col, channel)."""
        image = centre_crop(self._resized(image), self.crop)
        scaled: np.ndarray = image.astype(np.float32) / np.float32(255)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))

    def _resized(self, image: np.ndarray) -> np.ndarray:
        from PIL import Image

        height, width = resized_shape(image.shape[:2], self.resize, self.cover)
        if (height, width) == image.shape[:2]:
            return image
        method = getattr(Image.Resampling, self.interpolation.upper())
        if not self.floating:
            return np.asarray(Image.fromarray(image).resize((width, height), method))
        channels = [Image.fromarray(c) for c in np.moveaxis(image.astype(np.float32), 2, 0)]
        return np.stack([np.asarray(c.resize((width, height), method)) for c in channels], 2)

    @classmethod
    def like(
        cls, settings: Mapping[str, Any], size: tuple[int, int], floating: bool = False
    ) -> Preprocess:
        """Return one with the filter, mean and std of a transformers image processor."""
        from PIL import Image

        return cls(
            resize=size,
            interpolation=Image.Resampling(int(settings["resample"])).name.lower(),
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
            floating=floating,
        )

    def settings(self) -> dict[str, Any]:
        """Return all settings, for the record."""
        return asdict(self)


def output_size(processor: Any) -> tuple[int, int] | None:
    """Return the height and width that images of all sizes come out with; None if they vary."""
    if isinstance(processor, Preprocess):
        resize = processor.resize if not processor.cover else None
        return processor.crop or (resize if isinstance(resize, tuple) else None)
    cropped = getattr(processor, "do_center_crop", None)
    size = getattr(processor, "crop_size" if cropped else "size", None) or {}
    sides = dict(size)
    if cropped or {"height", "width"} <= {key for key, value in sides.items() if value}:
        return sides["height"], sides["width"]
    return None


def prepared(processor: Any, image: np.ndarray) -> np.ndarray:
    """Return float32 (channel, row, col) of a uint8 image (row, col, channel)."""
    if isinstance(processor, Preprocess):
        return processor(image)
    # Without the format, an image three pixels high would be taken for channels first.
    out = processor(images=[image], return_tensors="np", input_data_format="channels_last")
    return np.ascontiguousarray(np.asarray(out["pixel_values"])[0], dtype=np.float32)


def at_size(processor: Any, size: tuple[int, int]) -> Any:
    """Return a transformers image processor that gives images of another size.

    What is cropped keeps its share: a shorter side of 256 px for a crop of 224 becomes 512 for
    one of 448.

    Parameters
    ----------
    processor
        The model's own.
    size
        Height and width wanted.
    """
    settings = processor.to_dict()
    scale = [new / old for new, old in zip(size, output_size(processor) or size, strict=True)]
    resize = {key: value for key, value in dict(settings.get("size") or {}).items() if value}
    cropped = bool(settings.get("do_center_crop"))
    if not cropped:
        resize = {"height": size[0], "width": size[1]}
    elif "shortest_edge" in resize:
        resize = {"shortest_edge": round(resize["shortest_edge"] * max(scale))}
    else:
        resize = {
            key: round(resize[key] * factor)
            for key, factor in zip(("height", "width"), scale, strict=True)
        }
    crop = {"crop_size": {"height": size[0], "width": size[1]}} if cropped else {}
    return type(processor).from_dict({**settings, "size": resize, **crop})


def described(processor: Any) -> str:
    """Say in one line what is done to an image, such as ``shorter side 256 px (bicubic), ...``."""
    from PIL import Image

    if processor is None:
        return "not known; preprocess='raw' only"
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    if isinstance(processor, Preprocess):
        resize, crop, method = processor.resize, processor.crop, processor.interpolation
        scale, mean, std = 1 / 255, processor.mean, processor.std
    else:
        known = processor.to_dict()
        size = {key: side for key, side in dict(known.get("size") or {}).items() if side}
        resize = size.get("shortest_edge") or tuple(size.values())
        resize = resize if known.get("do_resize") else None
        crop = tuple(known["crop_size"].values()) if known.get("do_center_crop") else None
        method = Image.Resampling(int(known["resample"])).name.lower() if resize else ""
        scale = known["rescale_factor"] if known.get("do_rescale") else 1
        if known.get("do_normalize"):
            mean, std = known["image_mean"], known["image_std"]
    parts = []
    if resize:
        to = f"shorter side {resize}" if isinstance(resize, int) else " x ".join(map(str, resize))
        parts.append(f"{to} px ({method})")
    if crop:
        parts.append(f"middle {crop[0]} x {crop[1]} px")
    if abs(255 * scale - 1) > 1e-6:
        parts.append(f"values times {scale:.4g}")
    for name, three in (("mean", mean), ("std", std)):
        if three:
            values = [f"{value:.4g}" for value in three]
            parts.append(f"{name} {' '.join(values[:1] if len(set(values)) == 1 else values)}")
    return ", ".join(parts) or "0..1"
