"""From an image in any form to the float array that an encoder takes.

Training uses these same functions, so a captioner sees the same pixels as its model did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capexport.errors import ImageError, OptionError
from capexport.images import (
    MAX_PIXELS,
    ImageSource,
    decoded,
    image_name,
    image_suffixes,
    load_image,
    naming,
)
from capexport.pixels import STRIP_PIXELS, Loaded, upright_rgb, upright_size

__all__ = [
    "MAX_PIXELS",
    "FloatArray",
    "ImageSource",
    "ImageSpec",
    "image_name",
    "image_suffixes",
    "load_image",
    "preprocess",
]

FloatArray: TypeAlias = NDArray[np.float32]

# Resizing a 1 x 20000 strip by its shorter edge would take gigabytes.
_MAX_ASPECT_RATIO = 100
# A reduced JPEG keeps at least this many times the size that it is resized to, as Pillow's
# thumbnail does.
_KEPT = 2


@dataclass(frozen=True)
class ImageSpec:
    """What `preprocess` does; the defaults are torchvision's ImageNet recipe.

    Attributes:
        resize: length of the shorter edge, in pixels; of both edges, if `keep_aspect` is off.
        crop: side of the central square, in pixels.
        mean, std: normalise each RGB channel of an image scaled to 0..1.
        resample: "bilinear" or "bicubic".
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    keep_aspect: bool = True
    resample: str = "bilinear"

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize:
            raise OptionError(f"crop must lie in 1..resize, got {self.crop} of {self.resize}")
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) <= 0:
            raise OptionError("mean and std take three numbers each, std above 0")
        if self.resample not in ("bilinear", "bicubic"):
            raise OptionError(f"resample must be bilinear or bicubic, got {self.resample!r}")


def preprocess(
    source: ImageSource,
    spec: ImageSpec,
    out: FloatArray | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    truncated: bool = False,
    full_size: bool = False,
) -> FloatArray:
    """Load an image, resize the shorter edge, crop the centre, scale to 0..1 and normalise.

    A large JPEG file is decoded at a half, a quarter or an eighth of its width and height, as long
    as each edge keeps twice the length that it is resized to (`Image.draft` of Pillow). That is
    several times as fast, and changes pixels a little.

    From the loaded image on, the result equals that of torchvision's `Resize` (on the PIL image),
    `CenterCrop`, `ToTensor` and `Normalize`, in that order; without `keep_aspect`, that of
    Transformers' `BlipImageProcessor`.

    Args:
        out: where to put the result, of the same shape and type, such as a row of a batch.
        max_pixels, truncated: as for `load_image`.
        full_size: decode large JPEG files whole.
    Returns:
        float32 (3, spec.crop, spec.crop), channels in RGB order.
    Raises:
        ImageNotFoundError, ImageError: as for `load_image`.
    """
    with naming(source):
        enough = None if full_size else _KEPT * spec.resize
        pixels = np.asarray(_resized_centre(decoded(source, max_pixels, truncated, enough), spec))
    output = np.empty((3, spec.crop, spec.crop), np.float32) if out is None else out
    output[...] = pixels.transpose(2, 0, 1)
    output /= np.float32(255)
    output -= np.asarray(spec.mean, np.float32)[:, None, None]
    output /= np.asarray(spec.std, np.float32)[:, None, None]
    return output


def _resized_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"{width}x{height} is too elongated; crop it to an aspect ratio of "
            f"{_MAX_ASPECT_RATIO} or less"
        )
    if not spec.keep_aspect:
        return spec.resize, spec.resize
    if width <= height:
        return spec.resize, int(spec.resize * height / width)
    return int(spec.resize * width / height), spec.resize


def _resized_centre(loaded: Loaded, spec: ImageSpec) -> Image.Image:
    """The central square of the loaded image, resized."""
    width, height = upright_size(*loaded[:2])
    size = _resized_size(width, height, spec)
    resample = Image.Resampling[spec.resample.upper()]
    left, top = (round((edge - spec.crop) / 2) for edge in size)
    box = (left, top, left + spec.crop, top + spec.crop)
    # Pillow resizes one axis after the other, and narrows the rows first unless the image is much
    # taller than wide. So a large image can be narrowed in strips, which are never all held as RGB.
    rows_first = height <= size[1] or height - size[1] <= 2 * (width - size[0])
    if rows_first and width * height > STRIP_PIXELS and (loaded[0].mode, loaded[1]) != ("RGB", 1):
        narrow = upright_rgb(loaded, lambda strip: strip.resize((size[0], strip.height), resample))
        return narrow.resize(size, resample).crop(box)
    image = upright_rgb(loaded)
    if not rows_first:  # as of Pillow 13; those before it take the rows first in any case
        image = image.resize((width, size[1]), resample)
    # Compute only the pixels that remain, if that changes no bit: if Pillow's float32 holds the
    # corners exactly, and if Pillow has no reason to take the axes in another order.
    if width == height < 1 << 16 and width * 256 % spec.resize == 0:
        x0, y0, x1, y1 = (edge * width / spec.resize for edge in box)
        return image.resize((spec.crop, spec.crop), resample, (x0, y0, x1, y1))
    return image.resize(size, resample).crop(box)
