"""From an image, in whatever form it comes, to the float array that an encoder takes.

Training uses these same functions, so a captioner never sees other pixels than its model did.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from capexport.errors import ImageError, ImageNotFoundError

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[np.uint8]
FloatArray: TypeAlias = NDArray[np.float32]

# What Pillow's decoders raise on damaged data, beside OSError.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    IndexError,
    OverflowError,
    MemoryError,
    Image.DecompressionBombError,
)

# Resizing a 1 x 20000 strip by its shorter edge would take gigabytes.
_MAX_ASPECT_RATIO = 100


@dataclass(frozen=True)
class ImageSpec:
    """What `preprocess` does; the defaults are torchvision's ImageNet recipe.

    `resize` is the length of the shorter edge and `crop` the side of the central square, both in
    pixels; `mean` and `std` normalise each RGB channel of an image scaled to 0..1. Where
    `keep_aspect` is off, both edges become `resize` long. `resample` is "bilinear" or "bicubic".
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    keep_aspect: bool = True
    resample: str = "bilinear"

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize:
            raise ValueError(f"crop must lie in 1..resize, got {self.crop} of {self.resize}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("mean and std take three numbers each, std above 0")
        if self.resample not in ("bilinear", "bicubic"):
            raise ValueError(f"resample must be bilinear or bicubic, got {self.resample!r}")


def image_name(source: ImageSource) -> str:
    """The file name behind `source` where there is one, else what kind of thing it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"array of shape {source.shape}"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return str(name) if name else f"{type(source).__name__} image"


def load_image(source: ImageSource) -> Image.Image:
    """Decode `source` into an upright RGB image.

    A path, encoded bytes, a binary file object, a PIL image, or a uint8 array of shape
    (height, width), (height, width, 1), (height, width, 3) or (height, width, 4). EXIF rotation
    is applied, transparency dropped, 16-bit grey scaled to 8 bits (Pillow alone would clip it to
    white); of an animation, the first frame counts.

    Raises:
        ImageNotFoundError: the file does not exist.
        ImageError: the data are no readable image.
    """
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(ImageOps.exif_transpose(source))  # a copy
        if isinstance(source, np.ndarray):
            return _upright_rgb(_from_array(source))
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _upright_rgb(image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageNotFoundError(f"{image_name(source)}: no such image file") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{image_name(source)}: more pixels than PIL.Image.MAX_IMAGE_PIXELS allows; "
            "scale the image down first"
        ) from error
    except _DECODE_ERRORS as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "empty, damaged, or not in an image format that Pillow knows"
        raise ImageError(f"{image_name(source)}: cannot read the image: {reason}") from error
    except AttributeError as error:
        raise ImageError(
            f"cannot read an image from {type(source).__name__}: pass a path, bytes, a binary "
            "file, a PIL image or a uint8 array; several as a list"
        ) from error


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"{image_name(array)}: pixels must be uint8, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(
            f"{image_name(array)}: expected (height, width) or (height, width, 1, 3 or 4)"
        )
    return Image.fromarray(array)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """`image` itself, changed in place, where it needs no other mode."""
    if 0 in image.size:
        raise ImageError(f"{image_name(image)}: the image has no pixels")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def preprocess(source: ImageSource, spec: ImageSpec, out: FloatArray | None = None) -> FloatArray:
    """Load an image, resize the shorter edge, crop the centre, scale to 0..1 and normalise.

    From the loaded image on, equal to torchvision's `Resize` (on the PIL image), `CenterCrop`,
    `ToTensor` and `Normalize` in that order, and to Transformers' `BlipImageProcessor` where the
    aspect ratio is not kept.

    Args:
        out: where to put the result, of the same shape and type: a batch's row, say.
    Returns:
        float32 (3, spec.crop, spec.crop), channels in RGB order.
    Raises:
        ImageNotFoundError, ImageError: as `load_image`.
    """
    image = load_image(source)
    width, height = image.size
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"{image_name(source)}: {width}x{height} is too elongated; crop it to an aspect ratio "
            f"of {_MAX_ASPECT_RATIO} or less"
        )
    if not spec.keep_aspect:
        size = (spec.resize, spec.resize)
    elif width <= height:
        size = (spec.resize, int(spec.resize * height / width))
    else:
        size = (int(spec.resize * width / height), spec.resize)
    pixels = np.asarray(_resized_centre(image, size, spec))
    output = np.empty((3, spec.crop, spec.crop), np.float32) if out is None else out
    output[...] = pixels.transpose(2, 0, 1)
    output /= np.float32(255)
    output -= np.asarray(spec.mean, np.float32)[:, None, None]
    output /= np.asarray(spec.std, np.float32)[:, None, None]
    return output


def _resized_centre(image: Image.Image, size: tuple[int, int], spec: ImageSpec) -> Image.Image:
    """The central square of `image` resized to `size`."""
    resample = Image.Resampling[spec.resample.upper()]
    left, top = (round((edge - spec.crop) / 2) for edge in size)
    box = (left, top, left + spec.crop, top + spec.crop)
    side = image.width
    # Only the pixels that remain are computed where that changes no bit: where Pillow's float32
    # holds the corners exactly, and where it has no reason to take the axes in another order.
    if image.height == side < 1 << 16 and side * 256 % spec.resize == 0:
        x0, y0, x1, y1 = (edge * side / spec.resize for edge in box)
        return image.resize((spec.crop, spec.crop), resample, (x0, y0, x1, y1))
    return image.resize(size, resample).crop(box)
