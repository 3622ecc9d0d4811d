"""Images as they come: which formats are opened, within which limits, and as what errors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImagePalette, JpegImagePlugin, UnidentifiedImageError

from capexport.errors import ImageError, ImageNotFoundError
from capexport.image_metadata import exif_orientation, first_scan, jpeg_scans, without_metadata
from capexport.pixels import (
    BITS_PER_SAMPLE,
    TURNS,
    Loaded,
    check_colours,
    rgb_converter,
    upright_rgb,
)


class BinaryFile(Protocol):
    """What is read as a binary file: an open file, a member of a zip archive, a response's body."""

    def read(self) -> bytes: ...


ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | BinaryFile | Image.Image | NDArray[np.uint8]
)

# The formats of photos. None runs a program, as EPS does, and icons are left out because Pillow
# decodes them before their size can be checked. TGA has no signature, so it is tried last.
FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM",
    "QOI", "PSD", "DDS", "PCX", "SGI", "TGA",
)  # fmt: skip

# A phone's 108 megapixels pass; at Pillow's 4 bytes a pixel this is half a gigabyte.
MAX_PIXELS = 120_000_000
# Each scan of a JPEG in several goes over all its pixels. Encoders write about ten; more are for
# small images.
_MAX_SCANS, _MAX_SCANNED_PIXELS = 32, 200_000_000
# Of a file that is read as a whole, in bytes. It is in memory twice for a moment; the largest
# photos have a third of this.
_MAX_BYTES = 100_000_000
# Bytes a pixel that stand for the time that some modes take to become RGB, by measurements,
_SLOW_MODES = {"CMYK": 5.0, "I": 7.0, "F": 7.0}
# and decoders that are written in Python, and read a pixel at a time.
_BY_PIXEL = {"qoi": 8.0, "ppm": 8.0, "dds_rgb": 8.0, "bmp_rle": 24.0}
# So many take about a second; a photo is read in thousands of pieces at most.
_MOST_READS = 1_000_000
_LONGEST_NAME = 4096  # bytes of a path, on nearly all systems
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)  # C:/ is a path
# A TIFF's tags.
_ORIENTATION, _COLORMAP, _COMPRESSION, _ROWS_PER_STRIP = 274, 320, 259, 278
_TILE_WIDTH, _TILE_LENGTH, _PLANES = 322, 323, 284


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
        path = os.fsdecode(source)
        return path if len(path) <= _LONGEST_NAME else f"{path[:80]}..."
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
    with naming(source):
        loaded = decoded(source, max_pixels, truncated)
        upright = upright_rgb(loaded)
        shared = upright is loaded[0] and isinstance(source, Image.Image)
        return upright.copy() if shared else upright


@contextlib.contextmanager
def naming(source: ImageSource) -> Iterator[None]:
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
        said = getattr(error, "strerror", None) or str(error)  # without the file's name
        reason = " ".join(said.split())[:300] or type(error).__name__
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


def decoded(
    source: ImageSource, max_pixels: int, truncated: bool, enough: int | None = None
) -> Loaded:
    """Decode `source`. A JPEG file is reduced while decoding if `enough` is given: as far as each
    edge keeps at least so many pixels."""
    if isinstance(source, Image.Image):
        with _lock_of(source):
            if isinstance(source, ImageFile.ImageFile):
                _check_size(source, max_pixels, bool(source.info.get("progressive")))
            source.load()
            return _plain(source)
    if isinstance(source, np.ndarray):
        return _plain(_from_array(source))
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), max_pixels, truncated, enough)
    if isinstance(source, str | os.PathLike):
        _check_regular(source)
        with open(source, "rb") as file:  # noqa: PTH123
            return _read(file, max_pixels, truncated, enough)
    if hasattr(source, "read") and not isinstance(source, type):
        return _read(io.BytesIO(_content(source)), max_pixels, truncated, enough)
    raise ImageError(
        "this is no image: pass a path, bytes, a binary file, a PIL image or a uint8 array; "
        "several as a list"
    )


def _check_regular(path: str | os.PathLike[str]) -> None:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (Path("") is the current folder)
    except (OSError, ValueError) as error:
        name = os.fsdecode(path)
        if _ADDRESS.match(name):
            raise ImageNotFoundError("an address, not a file: pass what is behind it") from error
        if len(name) > _LONGEST_NAME:
            raise ImageNotFoundError(
                "too long for a file's name; if this is an image in Base64, decode it to bytes"
            ) from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise
        raise ImageNotFoundError("no such image file") from error
    if stat.S_ISDIR(mode):
        raise ImageError("this is a folder, not an image file")
    if not stat.S_ISREG(mode):  # reading it might never end
        raise ImageError(
            "this is a pipe, a socket or a device, not an image file; save its content as one"
        )


def _content(file: BinaryFile) -> bytes:
    with _lock_of(file):
        with contextlib.suppress(AttributeError, OSError):  # a stream, read once
            file.seek(0)  # type: ignore[attr-defined]
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


def _read(file: BinaryIO, max_pixels: int, truncated: bool, enough: int | None) -> Loaded:
    """Decode a file; where its metadata are what fails, without them."""
    head = file.read(12)
    if head[8:] == b"WEBP" or head[4:8] == b"ftyp" or head[:4] == b"qoif":
        _check_bytes(file)  # their decoders read all of it
    file.seek(0)
    try:
        return _decode(file, max_pixels, truncated, enough)
    except ImageError:
        raise
    except Exception:
        tried = data = _whole(file)
        for keep_orientation in (True, False):
            bare = without_metadata(data, keep_orientation)
            if bare != tried:
                with contextlib.suppress(Exception):
                    return _decode(io.BytesIO(bare), max_pixels, truncated, enough)
            tried = bare
        raise


class _Patient:
    """A file that refuses to be read in more than `_MOST_READS` pieces. Pillow searches some
    formats for their next part byte by byte, which takes minutes in a gigabyte of zeros."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, _MOST_READS

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ImageError("damaged: what follows its first bytes is no image")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _whole(file: BinaryIO) -> bytes:
    _check_bytes(file)
    file.seek(0)
    return file.read()


def _check_bytes(file: BinaryIO) -> None:
    if (size := file.seek(0, os.SEEK_END)) > _MAX_BYTES:
        raise ImageError(
            f"damaged, or too large a file of its kind: {size / 1e6:.0f} MB; save it as JPEG or PNG"
        )


def _decode(file: BinaryIO, max_pixels: int, truncated: bool, enough: int | None) -> Loaded:
    with Image.open(_Patient(file), formats=_readable_formats()) as image:
        _mend_tiles(image, file)
        in_scans = _is_in_scans(image, file)
        _check_size(image, max_pixels, in_scans)
        if in_scans:
            _check_scans(_whole(file), image.width * image.height)
        deep = _has_deep_colours(image)
        tags = getattr(image, "tag_v2", {})
        if image.mode == "P" and max(tags.get(_COLORMAP, (256,))) < 256:
            # Colours of 8 bits where 16 are due: Pillow would make them all black.
            image.palette = ImagePalette.raw("RGB;L", bytes(tags[_COLORMAP]))
        if enough:
            image.draft(None, (enough, enough))
        if truncated:
            _load_truncated(image)
        else:
            image.load()
        if deep:
            check_colours(image)
        return _plain(image)


def _is_in_scans(image: ImageFile.ImageFile, file: BinaryIO) -> bool:
    """Is it a JPEG in several scans, so that the decoder must hold all coefficients at once?"""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return False
    return bool(image.info.get("progressive")) or first_scan(file) < len(image.getbands())


def _has_deep_colours(image: ImageFile.ImageFile) -> bool:
    """Has it several channels of 16 bits, of which Pillow keeps the upper 8?"""
    deep = re.search(";16[BLN]|SGI16", str(image.tile[:1]))
    return deep is not None and len(image.getbands()) > 1


def _mend_tiles(image: ImageFile.ImageFile, file: BinaryIO) -> None:
    """Correct an opened image's parts where Pillow would decode them wrongly, and let decoders that
    read a pixel at a time past `_Patient`."""
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_PLANES) == 2 and len(image.getbands()) == 1:  # which is as if none were said
        tags[_PLANES] = 1
        image._setup()  # type: ignore[attr-defined]
    if not image.tile:
        return
    codec, _, _, args = image.tile[0]
    if (codec, args) == ("ppm", ("RGB", 65535)):
        image.tile = [image.tile[0]._replace(codec_name="raw", args="RGB;16B")]
    elif codec in _BY_PIXEL:
        place = file.tell()
        _check_bytes(file)
        file.seek(place)
        image.fp = file
    elif (codec, tags.get(_PLANES), *tags.get(BITS_PER_SAMPLE, ())[:1]) == ("raw", 2, 16):
        # Each channel by itself, which Pillow takes for one of 8 bits.
        depth = ";16L" if tags.prefix == b"II" else ";16B"
        parts: Any = image.tile
        image.tile = [part._replace(args=(part.args[0] + depth, *part.args[1:])) for part in parts]


def _plain(image: Image.Image) -> Loaded:
    """A loaded image's pixels without its metadata and file, and what these say about them."""
    if 0 in image.size:
        raise ImageError("the image has no pixels")
    if image.mode in ("P", "PA") and image.palette is None:
        raise ImageError("the image has a palette without colours")
    to_rgb = rgb_converter(image)
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
    return int(value) if value in TURNS else 1


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


def _check_size(image: ImageFile.ImageFile, max_pixels: int, in_scans: bool) -> None:
    """Refuse an image by its header, before memory is taken."""
    width, height = image.size
    allowed = int(max_pixels * 4 / _decoding_bytes(image, in_scans))
    if width * height > allowed:
        raise ImageError(
            f"{width}x{height} are more pixels than the {allowed} that are decoded of such a "
            "file; scale it down, or raise `max_pixels`"
        )


def _decoding_bytes(image: ImageFile.ImageFile, in_scans: bool) -> float:
    """About how many bytes a pixel takes while such a file is decoded, by measurements. Where
    decoding is slow rather than large, so many that the limits bound its time."""
    if image.format in ("WEBP", "AVIF", "HEIF"):
        return {"WEBP": 16, "AVIF": 8, "HEIF": 8}[image.format]
    if image.tile and image.tile[0].codec_name in _BY_PIXEL:
        return _BY_PIXEL[image.tile[0].codec_name]
    if image.format == "JPEG2000":  # where it is one tile
        return max(4, 5 * len(image.getbands()) + 1)
    if isinstance(image, JpegImagePlugin.JpegImageFile):  # in scans, the coefficients of them all
        return max(4, len(image.getbands()) * 7 / 3) if in_scans else 4
    taken = _SLOW_MODES.get(image.mode, 4)
    if raw := re.search(r"(\w+);16[BLN]", str(image.tile[:1])):
        taken = max(taken, {2: 4.5, 3: 4.5, 4: 8}.get(len(raw[1]), 4))
    tags = getattr(image, "tag_v2", {})
    if tags.get(_COMPRESSION, 1) != 1:  # a strip or tile is unpacked whole, however large it says
        wide, high = tags.get(_TILE_WIDTH, image.width), tags.get(_TILE_LENGTH, image.height)
        if _TILE_WIDTH not in tags:
            high = min(high, tags.get(_ROWS_PER_STRIP, high))
        unpacked = wide * high * sum(tags.get(BITS_PER_SAMPLE, (1,))) / 8
        taken = max(taken, 4 + float(unpacked) / max(1, image.width * image.height))
    return taken


def _check_scans(data: bytes, pixels: int) -> None:
    """Refuse a JPEG that would take minutes."""
    allowed = max(_MAX_SCANS, _MAX_SCANNED_PIXELS // max(1, pixels))
    if (scans := jpeg_scans(data, allowed)) > allowed:
        raise ImageError(f"a JPEG of {scans} scans; save it anew, with fewer")
