"""From an image, in whatever form it comes, to the float array that an encoder takes.

Training uses these same functions, so a captioner never sees other pixels than its model did.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import logging
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImagePalette, JpegImagePlugin, UnidentifiedImageError

from capexport.errors import ImageError, ImageNotFoundError
from capexport.image_metadata import exif_orientation, jpeg_scans, without_metadata

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[np.uint8]
FloatArray: TypeAlias = NDArray[np.float32]
# A decoded image without metadata, its EXIF orientation, and what makes its parts RGB.
_Loaded: TypeAlias = tuple[Image.Image, int, Callable[[Image.Image], Image.Image]]

# What photos come in: nothing that runs a program (EPS) or holds no photo, and no icons, which
# Pillow decodes before their size can be seen. TGA has no signature, so it is tried last.
FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM",
    "QOI", "PSD", "DDS", "PCX", "SGI", "TGA",
)  # fmt: skip

# A phone's 108 megapixels pass; at Pillow's 4 bytes a pixel this is half a gigabyte.
MAX_PIXELS = 120_000_000
# Each scan of a progressive JPEG goes over all its pixels. Encoders write about ten; more are for
# small images.
_MAX_SCANS, _MAX_SCANNED_PIXELS = 32, 200_000_000
# Bytes of a file that is read as a whole, twice for a moment; the largest photos have a third.
_MAX_BYTES = 100_000_000
# Resizing a 1 x 20000 strip by its shorter edge would take gigabytes.
_MAX_ASPECT_RATIO = 100
# Larger images are turned and converted in pieces of this many pixels, never held twice.
_STRIP_PIXELS = 1 << 22

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A TIFF's tags.
_ORIENTATION, _COLORMAP, _PHOTOMETRIC, _SAMPLE_FORMAT = 274, 320, 262, 339
_BITS_PER_SAMPLE, _COMPRESSION, _ROWS_PER_STRIP = 258, 259, 278
_TILE_WIDTH, _TILE_LENGTH = 322, 323


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


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The file name endings, ".jpg" and so on in lower case, of the images that are read here.

    Those of HEIC are among them where pillow-heif is installed.
    """
    readable = {*_readable_formats(), "MPO"}  # opened as a JPEG is
    extensions = Image.registered_extensions().items()
    return frozenset(suffix for suffix, style in extensions if style in readable)


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this installation reads."""
    with contextlib.suppress(Exception):  # not installed, or not made for this Pillow
        importlib.import_module("pillow_heif").register_heif_opener()
    # libtiff writes its complaints to stderr, without a file's name; Pillow raises them as well.
    # Where Pillow holds libtiff within its own library, as on Windows, they can't be reached.
    with contextlib.suppress(Exception):
        libtiff = ctypes.CDLL(importlib.import_module("PIL._imaging").__file__)
        libtiff.TIFFSetErrorHandler(None)
        libtiff.TIFFSetWarningHandler(None)
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    Image.init()
    return tuple(style for style in FORMATS if style in Image.OPEN)


def image_name(source: ImageSource) -> str:
    """The file name behind `source` where there is one, else what kind of thing it is."""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"array of shape {source.shape}"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return str(name) if name else f"{type(source).__name__} image"


def load_image(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, truncated: bool = False
) -> Image.Image:
    """Decode `source` into an upright RGB image.

    A path, encoded bytes, a binary file object, a PIL image, or a uint8 array of shape
    (height, width), (height, width, 1), (height, width, 3) or (height, width, 4). EXIF rotation
    is applied, transparency dropped, grey of more than 8 bits scaled to 8 (Pillow alone would
    clip it to white or black); of an animation, the first frame counts. One object may be loaded
    several times, also by several threads at once; PIL images stay as they are.

    Args:
        max_pixels: files with more are refused before they are decoded. Where a format needs
            more memory a pixel than a JPEG does, fewer are allowed: of WebP a quarter.
        truncated: take what there is of a file that breaks off early; what is missing stays
            grey or black. PIL images and arrays are whole in any case.
    Raises:
        ImageNotFoundError: the file does not exist.
        ImageError: the data are no readable image, or too large.
    """
    with _named(source):
        loaded = _decoded(source, max_pixels, truncated)
        upright = _upright_rgb(loaded)
        shared = upright is loaded[0] and isinstance(source, Image.Image)
        return upright.copy() if shared else upright


@contextlib.contextmanager
def _named(source: ImageSource) -> Iterator[None]:
    """Whatever goes wrong with `source` becomes an `ImageError` that begins with its name."""
    _silence_pillow()
    outer, _thread.loads = getattr(_thread, "loads", False), True
    try:
        yield
    except ImageError as error:
        raise type(error)(f"{image_name(source)}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{image_name(source)}: more pixels than PIL.Image.MAX_IMAGE_PIXELS allows; "
            "scale the image down first"
        ) from error
    except Exception as error:  # decoders raise what they like
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "empty, damaged, or not in an image format that is read here"
        elif "truncated" in reason:
            reason += " (the option `truncated` takes what there is)"
        raise ImageError(f"{image_name(source)}: cannot read the image: {reason}") from error
    finally:
        _thread.loads = outer


_thread = threading.local()


class _WhileLoading:
    """The pattern of a warning filter that holds in the threads that are loading an image."""

    def match(self, text: str) -> bool:
        return getattr(_thread, "loads", False)


_FILTER = ("ignore", _WhileLoading(), Warning, None, 0)


def _silence_pillow() -> None:
    """Keep Pillow's warnings, which name no file, off stderr; everybody else's stay.

    `warnings.catch_warnings` would change the filters of all threads, and clear what they know.
    """
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    if not filters or filters[0] is not _FILTER:
        with contextlib.suppress(ValueError):
            filters.remove(_FILTER)
        filters.insert(0, _FILTER)


def _new_locks() -> None:
    global _locks
    _locks = [threading.RLock() for _ in range(61)]


_locks: list[threading.RLock]
_new_locks()
if hasattr(os, "register_at_fork"):  # another thread of the parent may hold one
    os.register_at_fork(after_in_child=_new_locks)


def _lock_of(source: object) -> contextlib.AbstractContextManager[object]:
    """A lock that is the same for the same object."""
    return _locks[hash(id(source)) % len(_locks)]


def _decoded(source: ImageSource, max_pixels: int, truncated: bool) -> _Loaded:
    if isinstance(source, Image.Image):
        with _lock_of(source):
            if isinstance(source, ImageFile.ImageFile):
                _check_size(source, max_pixels)
            source.load()
            return _plain(source)
    if isinstance(source, np.ndarray):
        return _plain(_from_array(source))
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), max_pixels, truncated)
    if isinstance(source, str | os.PathLike):
        _check_regular(source)
        with open(source, "rb") as file:  # noqa: PTH123
            return _read(file, max_pixels, truncated)
    if hasattr(source, "read") and not isinstance(source, type):
        return _read(io.BytesIO(_content(source)), max_pixels, truncated)
    raise ImageError(
        "this is no image: pass a path, bytes, a binary file, a PIL image or a uint8 array; "
        "several as a list"
    )


def _check_regular(path: str | os.PathLike[str]) -> None:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (Path("") is the current folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageNotFoundError("no such image file") from error
    if stat.S_ISDIR(mode):
        raise ImageError("this is a folder, not an image file")
    if not stat.S_ISREG(mode):  # reading it might never end
        raise ImageError(
            "this is a pipe, a socket or a device, not an image file; save its content as one"
        )


def _content(file: BinaryIO) -> bytes:
    with _lock_of(file):
        with contextlib.suppress(AttributeError, OSError):  # a stream, read once
            file.seek(0)
        content: object = file.read()
    if not isinstance(content, bytes):
        raise ImageError(f"read() gives {type(content).__name__}; open the file in binary mode")
    return content


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"pixels must be uint8, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError("expected (height, width) or (height, width, 1, 3 or 4)")
    return Image.fromarray(array)


def _read(file: BinaryIO, max_pixels: int, truncated: bool) -> _Loaded:
    """Decode a file; where its metadata are what fails, without them."""
    head = file.read(12)
    if head[8:] == b"WEBP" or head[4:8] == b"ftyp" or head[:4] == b"qoif":
        _check_bytes(file)  # their decoders read all of it
    file.seek(0)
    try:
        return _decode(file, max_pixels, truncated)
    except ImageError:
        raise
    except Exception:
        tried = data = _whole(file)
        for keep_orientation in (True, False):
            bare = without_metadata(data, keep_orientation)
            if bare != tried:
                with contextlib.suppress(Exception):
                    return _decode(io.BytesIO(bare), max_pixels, truncated)
            tried = bare
        raise


def _whole(file: BinaryIO) -> bytes:
    _check_bytes(file)
    file.seek(0)
    return file.read()


def _check_bytes(file: BinaryIO) -> None:
    if (size := file.seek(0, os.SEEK_END)) > _MAX_BYTES:
        raise ImageError(
            f"damaged, or too large a file of its kind: {size / 1e6:.0f} MB; save it as JPEG or PNG"
        )


def _decode(file: BinaryIO, max_pixels: int, truncated: bool) -> _Loaded:
    with Image.open(file, formats=_readable_formats()) as image:
        _check_size(image, max_pixels)
        if image.info.get("progressive"):
            _check_scans(_whole(file), image.width * image.height)
        tags = getattr(image, "tag_v2", {})
        if image.mode == "P" and max(tags.get(_COLORMAP, (256,))) < 256:
            # Colours of 8 bits where 16 are due: Pillow would make them all black.
            image.palette = ImagePalette.raw("RGB;L", bytes(tags[_COLORMAP]))
        if truncated:
            _load_truncated(image)
        else:
            image.load()
        return _plain(image)


def _plain(image: Image.Image) -> _Loaded:
    """A loaded image's pixels without its metadata and file, and what these say about them."""
    if 0 in image.size:
        raise ImageError("the image has no pixels")
    if image.mode in ("P", "PA") and image.palette is None:
        raise ImageError("the image has a palette without colours")
    to_rgb = _converter(image)
    plain = image._new(image.im)
    plain.info = {}
    return plain, _orientation(image), to_rgb


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the metadata have none that is readable."""
    value, exif = None, image.info.get("exif")
    with contextlib.suppress(Exception):
        value = image.getexif().get(_ORIENTATION)
    if value is None and isinstance(exif, bytes):  # Pillow stops at a tag that leads nowhere
        value = exif_orientation(exif)
    return int(value) if value in _TURNS else 1


def _load_truncated(image: ImageFile.ImageFile) -> None:
    """Load what a file that breaks off has, without Pillow's switch, which is all threads'."""
    ends = [b"\xff\xd9"]  # without it, nothing of a progressive JPEG is shown
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        read = image.load_read
        image.load_read = lambda read_bytes: (  # type: ignore[method-assign]
            read(read_bytes) or (ends.pop() if ends else b"")
        )
    try:
        image.load()
    except (OSError, EOFError):
        ends.clear()
        image.tile = []  # what was decoded is there
        image.load()
    if not ends and all(low == high for low, high in np.reshape(image.getextrema(), (-1, 2))):
        raise ImageError("the file breaks off before its first pixels")


def _check_size(image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Refuse an image by its header, before memory is taken."""
    width, height = image.size
    allowed = int(max_pixels * 4 / _decoding_bytes(image))
    if width * height > allowed:
        raise ImageError(
            f"{width}x{height} are more pixels than the {allowed} that are decoded of such a "
            "file; scale it down, or raise `max_pixels`"
        )


def _decoding_bytes(image: ImageFile.ImageFile) -> float:
    """About how many bytes a pixel takes while such a file is decoded, by measurements."""
    if image.format in ("WEBP", "AVIF", "QOI"):
        return {"WEBP": 16, "AVIF": 8, "QOI": 8}[image.format]
    if image.format == "JPEG2000":  # where it is one tile
        return max(4, 5 * len(image.getbands()) + 1)
    if image.info.get("progressive"):  # the coefficients of all scans
        return 7 if image.mode == "RGB" else 4
    tags = getattr(image, "tag_v2", {})
    if tags.get(_COMPRESSION, 1) != 1:  # a strip or tile is unpacked whole, however large it says
        wide, high = tags.get(_TILE_WIDTH, image.width), tags.get(_TILE_LENGTH, image.height)
        if _TILE_WIDTH not in tags:
            high = min(high, tags.get(_ROWS_PER_STRIP, high))
        unpacked = wide * high * sum(tags.get(_BITS_PER_SAMPLE, (1,))) / 8
        return 4 + float(unpacked) / max(1, image.width * image.height)
    return 4


def _check_scans(data: bytes, pixels: int) -> None:
    """Refuse a progressive JPEG that would take minutes."""
    allowed = max(_MAX_SCANS, _MAX_SCANNED_PIXELS // max(1, pixels))
    if (scans := jpeg_scans(data, allowed)) > allowed:
        raise ImageError(f"a progressive JPEG of {scans} scans; save it anew, with fewer")


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    return image.size if orientation < 5 else (image.height, image.width)


def _upright_strips(image: Image.Image, orientation: int) -> Iterator[Image.Image]:
    """The image, turned upright, in strips from top to bottom; a small one whole."""
    width, height = _upright_size(image, orientation)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        first, last = top, min(top + rows, height)
        if orientation in (3, 4, 7, 8):  # its bottom, or right, comes to the top
            first, last = height - last, height - first
        box = (0, first, width, last) if orientation < 5 else (first, 0, last, width)
        strip = image if rows >= height else image.crop(box)
        yield strip if orientation == 1 else strip.transpose(_TURNS[orientation])


def _upright_rgb(
    loaded: _Loaded, narrowed: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """The loaded image upright and RGB, each of its strips `narrowed` to another width."""
    image, orientation, to_rgb = loaded
    if image.mode == "RGB" and orientation == 1 and narrowed is None:
        return image
    whole, top, (_, height) = None, 0, _upright_size(image, orientation)
    for strip in map(to_rgb, _upright_strips(image, orientation)):
        strip = narrowed(strip) if narrowed else strip
        if strip.height == height:
            return strip
        whole = whole or Image.new("RGB", (strip.width, height))
        whole.paste(strip, (0, top))
        top += strip.height
    assert whole is not None
    return whole


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
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


def _scaling(image: Image.Image, tags: Any) -> Callable[[NDArray[Any]], NDArray[np.uint8]]:
    """How grey of more than 8 bits becomes 0..255, judged by its range in all of `image`.

    Files seldom say which part of their 16 or 32 bits is used. A photo that reaches but a
    sixteenth of full white would be captioned as a black one, so that is never assumed.
    """
    ranges = [(part.min(), part.max()) for part in map(np.asarray, _upright_strips(image, 1))]
    low, high = float(np.min(ranges)), float(np.max(ranges))
    floats = image.mode == "F"
    bits = tags.get(_BITS_PER_SAMPLE), tags.get(_SAMPLE_FORMAT)
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


def preprocess(
    source: ImageSource,
    spec: ImageSpec,
    out: FloatArray | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    truncated: bool = False,
) -> FloatArray:
    """Load an image, resize the shorter edge, crop the centre, scale to 0..1 and normalise.

    From the loaded image on, equal to torchvision's `Resize` (on the PIL image), `CenterCrop`,
    `ToTensor` and `Normalize` in that order, and to Transformers' `BlipImageProcessor` where the
    aspect ratio is not kept.

    Args:
        out: where to put the result, of the same shape and type: a batch's row, say.
        max_pixels, truncated: as `load_image`.
    Returns:
        float32 (3, spec.crop, spec.crop), channels in RGB order.
    Raises:
        ImageNotFoundError, ImageError: as `load_image`.
    """
    with _named(source):
        pixels = np.asarray(_resized_centre(_decoded(source, max_pixels, truncated), spec))
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


def _resized_centre(loaded: _Loaded, spec: ImageSpec) -> Image.Image:
    """The central square of the loaded image, resized."""
    width, height = _upright_size(*loaded[:2])
    size = _resized_size(width, height, spec)
    resample = Image.Resampling[spec.resample.upper()]
    left, top = (round((edge - spec.crop) / 2) for edge in size)
    box = (left, top, left + spec.crop, top + spec.crop)
    # Pillow resizes one axis after the other, the rows first unless the image is that tall; so a
    # large image can be narrowed in strips, which are never all held as RGB.
    rows_first = height <= size[1] or height - size[1] <= 2 * (width - size[0])
    if rows_first and width * height > _STRIP_PIXELS and (loaded[0].mode, loaded[1]) != ("RGB", 1):
        narrow = _upright_rgb(loaded, lambda strip: strip.resize((size[0], strip.height), resample))
        return narrow.resize(size, resample).crop(box)
    image = _upright_rgb(loaded)
    # Only the pixels that remain are computed where that changes no bit: where Pillow's float32
    # holds the corners exactly, and where it has no reason to take the axes in another order.
    if width == height < 1 << 16 and width * 256 % spec.resize == 0:
        x0, y0, x1, y1 = (edge * width / spec.resize for edge in box)
        return image.resize((spec.crop, spec.crop), resample, (x0, y0, x1, y1))
    return image.resize(size, resample).crop(box)
