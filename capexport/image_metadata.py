"""The metadata of an image file, read leniently from its bytes.

Every program that a photo passes through writes metadata, and Pillow refuses or stops at much that
is odd in them. So this module finds what the photo needs of them, and leaves out the rest.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, Literal

_ORIENTATION = 274
# Not the markers within a JPEG's coded pixels, nor the escaped 255s there.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
# The TIFF tags that say where the pixels are and what they mean.
_TIFF_TAGS = {
    256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325,
    332, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532,
}  # fmt: skip


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in EXIF data, even if the rest of them is damaged."""
    exif = exif.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"
    for tag, start, _ in _tiff_entries(exif):
        if tag == _ORIENTATION:
            return int.from_bytes(exif[start + 8 : start + 10], order)
    return None


def jpeg_scans(data: bytes, enough: int) -> int:
    """How many scans a JPEG has; up to `enough`, the count may be too high."""
    scans = data.count(b"\xff\xda")  # with those of thumbnails, and in what follows the image
    if scans <= enough:
        return scans
    return sum(marker == 0xDA for marker, _, _ in _jpeg_segments(data))


def first_scan(file: BinaryIO) -> int:
    """How many components the first scan of a JPEG file holds; 0 where there is none."""
    size = 1 << 16
    while True:
        file.seek(0)
        head = file.read(size)
        for marker, start, _ in _jpeg_segments(head):
            if marker == 0xDA and start + 2 < len(head):
                return head[start + 2]
        if len(head) < size:
            return 0
        size *= 8


def without_metadata(data: bytes, keep_orientation: bool) -> bytes:
    """An encoded image without its metadata; unchanged, if its format is not known here.

    Args:
        keep_orientation: leave what holds its orientation: EXIF and XMP.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _bare_png(data, keep_orientation)
    if data.startswith(b"\xff\xd8"):
        return _bare_jpeg(data, keep_orientation)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _bare_tiff(data, keep_orientation)
    if data[4:8] == b"ftyp":  # AVIF and HEIC, whose rotation is no metadata
        return re.sub(rb"(?s)(infe.{8,10}?)(?:Exif|mime)", rb"\1skip", data)
    return data


def _bare_png(data: bytes, keep_orientation: bool) -> bytes:
    parts, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind, start = data[at + 4 : at + 8], data[at + 8 : at + 32]
        orients = kind == b"eXIf" or start.startswith((b"Raw profile type exif", b"XML:com.adobe"))
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (keep_orientation and orients):
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _bare_jpeg(data: bytes, keep_orientation: bool) -> bytes:
    bare = bytearray(data)
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xDA:
            break
        body = data[start + 2 : start + 40]
        orients = body.startswith((b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"))
        # JFIF and Adobe say what the colours mean, unless too short for the decoder itself.
        colours = end - start >= {0xE0: 16, 0xEE: 14}.get(marker, 1 << 16)
        if 0xE0 <= marker <= 0xEF and not colours and not (keep_orientation and orients):
            bare[start - 1] = 0xFE  # a comment
    return bytes(bare)


def _bare_tiff(data: bytes, keep_orientation: bool) -> bytes:
    bare = bytearray(data)
    for tag, start, end in _tiff_entries(data):
        if tag not in _TIFF_TAGS and not (keep_orientation and tag == _ORIENTATION):
            bare[start:end] = b"\xfd\xfd" + bytes(end - start - 2)  # unknown, of no type
    return bytes(bare)


def _tiff_entries(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(tag, start, end) of each entry of the first directory of a TIFF, or of EXIF data."""
    order = "<" if data[:2] == b"II" else ">"
    where, offset, count, size = (8, "Q", "Q", 20) if b"+" in data[2:4] else (4, "L", "H", 12)
    with contextlib.suppress(struct.error):  # beyond the end
        (at,) = struct.unpack_from(order + offset, data, where)
        (entries,) = struct.unpack_from(order + count, data, at)
        at += struct.calcsize(order + count)
        for start in range(at, min(at + entries * size, len(data) - size + 1), size):
            yield struct.unpack_from(order + "H", data, start)[0], start, start + size


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of a JPEG's segments to the end of its (first) image."""
    at = 2
    while found := _MARKER.search(data, at):
        marker, start = data[found.end() - 1], found.end()
        if marker == 0xD9:
            return
        at = start + (0 if marker == 0xD8 else int.from_bytes(data[start : start + 2], "big"))
        yield marker, start, at
