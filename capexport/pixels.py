"""From a decoded image, of any mode and orientation, to upright RGB."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capexport.errors import ImageError

# A decoded image without metadata, its EXIF orientation, and a function that makes parts of it RGB.
Loaded: TypeAlias = tuple[Image.Image, int, Callable[[Image.Image], Image.Image]]

# Larger images are turned and converted in pieces of this many pixels, which a core's cache holds,
# and never held twice.
STRIP_PIXELS = 1 << 18

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A TIFF's tags.
BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339


def upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    return image.size if orientation < 5 else (image.height, image.width)


def _upright_strips(image: Image.Image, orientation: int) -> Iterator[Image.Image]:
    """The image, turned upright, in strips from top to bottom; a small one whole."""
    width, height = upright_size(image, orientation)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        first, last = top, min(top + rows, height)
        if orientation in (3, 4, 7, 8):  # its bottom, or right, comes to the top
            first, last = height - last, height - first
        box = (0, first, width, last) if orientation < 5 else (first, 0, last, width)
        strip = image if rows >= height else image.crop(box)
        yield strip if orientation == 1 else strip.transpose(TURNS[orientation])


def upright_rgb(
    loaded: Loaded, narrowed: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """The loaded image upright and RGB, each of its strips `narrowed` to another width."""
    image, orientation, to_rgb = loaded
    if image.mode == "RGB" and orientation == 1 and narrowed is None:
        return image
    whole, top, (_, height) = None, 0, upright_size(image, orientation)
    for strip in map(to_rgb, _upright_strips(image, orientation)):
        strip = narrowed(strip) if narrowed else strip
        if strip.height == height:
            return strip
        whole = whole or Image.new("RGB", (strip.width, height))
        whole.paste(strip, (0, top))
        top += strip.height
    assert whole is not None
    return whole


def rgb_converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """A function that makes parts of `image` RGB."""
    mode = image.mode
    tags = getattr(image, "tag_v2", {})
    if mode == "F" or mode.startswith("I"):
        scaled = _scaling(image, tags)
        return lambda part: Image.fromarray(scaled(np.asarray(part))).convert("RGB")
    if mode == "L" and tags.get(_SAMPLE_FORMAT) == (2,):
        raise ImageError("signed 8-bit pixels have no certain brightness; save them unsigned")
    if mode in ("La", "RGBa"):
        return lambda part: part.convert(mode.upper()).convert("RGB")
    return lambda part: part if mode == "RGB" else part.convert("RGB")


def check_colours(image: Image.Image) -> None:
    """Refuse a loaded image of 16 bits a channel whose upper 8, all that Pillow keeps, hold next to
    nothing: its values have fewer bits, and it would be captioned as a black one."""
    colours = len(image.getbands()) - image.mode.upper().endswith("A")  # without transparency
    strips = map(np.asarray, _upright_strips(image, 1))
    if all(strip[:, :, :colours].max() < 16 for strip in strips):
        raise ImageError(
            "colours below a sixteenth of their 16 bits have no certain brightness; save the image "
            "with 8 bits a channel"
        )


def _scaling(image: Image.Image, tags: Any) -> Callable[[NDArray[Any]], NDArray[np.uint8]]:
    """A function that turns grey of more than 8 bits into 0..255, judged by its range in `image`.

    Files seldom say which part of their 16 or 32 bits they use. A photo that reaches only a
    sixteenth of full white would be captioned as a black one, so that is never assumed.
    """
    ranges = [(part.min(), part.max()) for part in map(np.asarray, _upright_strips(image, 1))]
    low, high = float(np.min(ranges)), float(np.max(ranges))
    floats = image.mode == "F"
    bits = tags.get(BITS_PER_SAMPLE), tags.get(_SAMPLE_FORMAT)
    whites: tuple[int, ...] = (255, 1023, 4095, 32767 if bits == ((16,), (2,)) else 65535)
    if floats:
        whites = (1, 255, 65535)
    elif bits[0] == (12,):
        whites = (4095,)
    slack = 0.1 if floats else 0  # filters overshoot
    white = next((white for white in whites if high <= white * (1 + slack)), 0)
    dark = floats and white > 1 and high * 16 < white
    if not (white and low >= -white * slack) or dark:
        raise ImageError(
            f"pixels from {low:g} to {high:g} have no certain brightness; save the image with 8 "
            "bits a channel"
        )
    inverted = bool(tags) and tags.get(_PHOTOMETRIC, 0) == 0  # Pillow leaves these as they are

    def scaled(values: NDArray[Any]) -> NDArray[np.uint8]:
        if floats:
            grey = (values * np.float32(255 / white) + np.float32(0.5)).clip(0, 255)
        else:
            grey = values >> (white.bit_length() - 8)
        return 255 - grey.astype(np.uint8) if inverted else grey.astype(np.uint8)

    return scaled
