"""What an image file may be, and what one may do: damaged, odd, huge, shared, not a file at all."""

import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_photo
from PIL import Image, ImageFile, ImageOps, features

from capexport import ImageError, ImageNotFoundError, ImageSpec
from capexport.preprocessing import image_suffixes, load_image, preprocess

PHOTO = draw_photo(1, (64, 48))
GREY = np.asarray(PHOTO.convert("L"))
SIDEWAYS = PHOTO.transpose(Image.Transpose.ROTATE_90)  # as a camera held upright stores it


def encoded(image: Image.Image, style: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, style, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A black PNG, with `chunks` before its pixels."""
    row = bytes(1 + (width * depth * {0: 1, 2: 3, 3: 1, 6: 4}[colour] + 7) // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    )


def with_chunk(content: bytes, kind: bytes, body: bytes, crc: int = 0) -> bytes:
    """A PNG with one more chunk behind its header; its checksum is off by `crc`."""
    check = struct.pack(">I", zlib.crc32(kind + body) ^ crc)
    return content[:33] + struct.pack(">I4s", len(body), kind) + body + check + content[33:]


def with_segment(content: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment at its beginning."""
    return content[:2] + struct.pack(">BBH", 255, marker, len(body) + 2) + body + content[2:]


def tiff(pixels: np.ndarray, meaning: int = 1, kind: int = 1, extra: tuple = ()) -> bytes:
    """An uncompressed grey TIFF: 1 black or 0 white is zero; unsigned 1, signed 2, float 3."""
    height, width = pixels.shape
    bits, count = 8 * pixels.itemsize, pixels.nbytes
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1)]
    tags += [(262, 3, 1, meaning), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height)]
    tags = sorted([*tags, (279, 4, 1, count), (339, 3, 1, kind), *extra])
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + count) + pixels.tobytes() + directory


def tiff_colours(pixels: np.ndarray, meaning: int = 2) -> bytes:
    """An uncompressed TIFF of 16 bits a channel: 2 for RGB, 5 for CMYK."""
    height, width, channels = pixels.shape
    body = pixels.astype("<u2").tobytes() + struct.pack("<H", 16) * channels
    bits = 8 + pixels.size * 2
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, bits), (259, 3, 1, 1)]
    tags += [(262, 3, 1, meaning), (273, 4, 1, 8), (277, 3, 1, channels), (278, 4, 1, height)]
    return tiff_of(body, [*tags, (279, 4, 1, pixels.size * 2)])


def tiff_planes(pixels: np.ndarray) -> bytes:
    """An uncompressed RGB TIFF of 16 bits, one channel behind the other."""
    height, width, _ = pixels.shape
    size, end = height * width * 2, 8 + pixels.size * 2
    body = pixels.transpose(2, 0, 1).astype("<u2").tobytes()
    body += struct.pack("<3H6I", 16, 16, 16, 8, 8 + size, 8 + 2 * size, size, size, size)
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, end), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2), (273, 4, 3, end + 6), (277, 3, 1, 3), (278, 4, 1, height)]
    return tiff_of(body, [*tags, (279, 4, 3, end + 18), (284, 3, 1, 2)])


def tiff_of(body: bytes, tags: list[tuple[int, int, int, int]]) -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def png_colours(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    )


def ppm_colours(pixels: np.ndarray) -> bytes:
    return b"P6 64 48 65535\n" + pixels.astype(">u2").tobytes()


def exif(*tags: tuple[int, int, int, int]) -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


# --- What is an image


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n",
        b"%PDF-1.4\n1 0 obj\n",
        b"\0\0\1\xb3\4\0\x30\x13\0" + bytes(40),
        b"\x89HDF\r\n\x1a\n" + bytes(40),
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60),
    ],
    ids=["EPS", "PDF", "MPEG", "HDF5", "SVG", "a Mac's ._ file"],
)
def test_what_holds_no_pixels_is_no_image_and_runs_no_program(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program, path = tmp_path / "gs", tmp_path / "cat.jpg"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"cat\.jpg: .*not in an image format that is read here"):
        load_image(path)
    assert not (tmp_path / "ran").exists()


def test_suffixes_are_those_of_what_can_be_read(tmp_path: Path):
    suffixes = image_suffixes()
    assert {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".mpo"} <= suffixes
    assert (".webp" in suffixes) == features.check("webp")
    assert not {".eps", ".ps", ".pdf", ".mpg", ".wmf", ".h5", ".svg", ".txt"} & suffixes
    for suffix in (".jpg", ".png", ".gif", ".bmp", ".tif", ".ppm", ".tga", ".pcx", ".sgi"):
        path = tmp_path / f"photo{suffix}"
        PHOTO.convert("RGB").save(path)
        assert load_image(path).size == PHOTO.size


def test_heic_where_pillow_heif_is_installed():
    pytest.importorskip("pillow_heif")
    assert {".heic", ".heif"} <= image_suffixes()
    turned = load_image(encoded(SIDEWAYS, "HEIF", exif=exif((274, 3, 1, 6))))
    assert turned.size == PHOTO.size
    with pytest.raises(ImageError, match="64x64 are more pixels than the 4095"):
        load_image(encoded(Image.new("RGB", (64, 64)), "HEIF"), max_pixels=64 * 64 * 2 - 1)


def test_what_is_not_a_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would never end
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
        for path in ("pipe.jpg", "socket.jpg", "/dev/zero"):
            with pytest.raises(ImageError, match=f"{path}: this is a pipe, a socket or a device"):
                load_image(path)
    with pytest.raises(ImageError, match="this is a folder"):
        load_image(tmp_path)
    (tmp_path / "link.jpg").symlink_to("photo.jpg")
    for absent in ("", "link.jpg", "photo.jpg/photo.jpg"):
        with pytest.raises(ImageNotFoundError, match="no such image file"):
            load_image(absent)
    PHOTO.save("photo.jpg")
    assert load_image("link.jpg").size == PHOTO.size


# --- Whatever a decoder raises


class Failing(io.BytesIO):
    def __init__(self, error: BaseException) -> None:
        super().__init__(b"x")
        self.error, self.name = error, "some.jpg"

    def read(self, size: int | None = -1) -> bytes:
        raise self.error


@pytest.mark.parametrize("kind", [OSError, RuntimeError, TypeError, KeyError, AssertionError])
def test_any_exception_becomes_an_image_error_with_the_name(kind: type[Exception]):
    with pytest.raises(ImageError, match=r"some\.jpg: cannot read the image") as caught:
        load_image(Failing(kind("disk\non fire")))
    assert isinstance(caught.value.__cause__, kind)
    assert "\n" not in str(caught.value)


def test_an_interrupt_is_no_image_error():
    with pytest.raises(KeyboardInterrupt):
        load_image(Failing(KeyboardInterrupt()))


DDS = b"DDS " + struct.pack("<7I", 124, 0x1007, 8, 8, 0, 0, 0) + bytes(44)


@pytest.mark.parametrize(
    "content",
    [
        png(8, 8, 8, 3),
        DDS + struct.pack("<II4s5I", 32, 4, b"XXXX", 0, 0, 0, 0, 0) + bytes(90),
        tiff(GREY).replace(struct.pack("<HHI", 257, 4, 1), struct.pack("<HHI", 257, 5, 1)),
        encoded(PHOTO, "AVIF")[:-9] if features.check("avif") else b"",
        encoded(PHOTO, "WEBP")[:-9] if features.check("webp") else b"",
    ],
    ids=["palette without colours", "pixel format", "fraction as a size", "AVIF", "WebP"],
)
def test_damage_of_every_kind_is_named(content: bytes, tmp_path: Path):
    path = tmp_path / "damaged.jpg"
    path.write_bytes(content)
    for source in (path, content, io.BytesIO(content)):
        with pytest.raises(ImageError, match=r"damaged\.jpg: |image of|BytesIO image: "):
            load_image(source)


@pytest.mark.parametrize(
    "source",
    [None, 5, {1}, int, io.StringIO("x"), ["a.jpg"]],
    ids=lambda source: type(source).__name__,
)
def test_only_the_wrong_type_is_told_what_to_pass(source: Any):
    with pytest.raises(ImageError, match=r"pass a path, bytes|open the file in binary mode"):
        load_image(source)
    with pytest.raises(ImageError) as caught:
        load_image("a\0b.jpg")
    assert "pass a path" not in str(caught.value)


def test_texts_that_are_no_paths_are_told_what_to_pass():
    base64 = "iVBORw0KGgo" * 100_000
    for source, message in (
        ("https://example.org/a.jpg", "an address, not a file"),
        (Path("https://example.org/a.jpg"), "an address, not a file"),
        (f"data:image/png;base64,{base64}", "an address, not a file"),
        (base64, "decode it to bytes"),
        ("c:/absent.jpg", "no such image file"),
        ("absent: a.jpg", "no such image file"),
    ):
        with pytest.raises(ImageNotFoundError, match=message) as caught:
            load_image(source)
        assert len(str(caught.value)) < 200


@pytest.mark.skipif(os.name == "nt", reason="a link needs rights there")
def test_the_system_s_words_do_not_name_the_file_again(tmp_path: Path):
    (tmp_path / "a.jpg").symlink_to("a.jpg")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "a.jpg")
    assert str(caught.value).count("a.jpg") == 1


# --- Metadata

TURNED = exif((274, 3, 1, 6))
JPEG = encoded(SIDEWAYS, "JPEG", exif=TURNED)
PNG = encoded(SIDEWAYS, "PNG", exif=TURNED)
ODD_TAGS = [
    (270, 2, 5000, 65535),  # text that lies beyond the end
    (270, 2, 2**32 - 1, 8),
    (271, 12, 1, 8),
    (272, 99, 7, 0),
    (273, 5, 1, 2**31),
    (34665, 4, 1, 2**31),
    (34665, 7, 4, 0),
    (40965, 4, 1, 8),
    (34853, 2, 3, 1),
]


@pytest.mark.parametrize("tag", ODD_TAGS, ids=str)
@pytest.mark.parametrize("style", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of writing
def test_odd_tags_neither_refuse_a_photo_nor_leave_it_unturned(style: str, tag: tuple):
    if style in ("WEBP", "AVIF") and not features.check(style.lower()):
        pytest.skip(f"this Pillow writes no {style}")
    plain = (270, 2, 4, 0x636261)  # writers refuse some tags
    content = encoded(SIDEWAYS, style, exif=exif(*sorted([plain, (274, 3, 1, 6)])))
    odd = content.replace(struct.pack("<HHII", *plain), struct.pack("<HHII", *tag))
    assert odd != content
    if style == "PNG":
        odd = encoded(SIDEWAYS, style, exif=exif(*sorted([tag, (274, 3, 1, 6)])))
    assert load_image(odd).size == PHOTO.size


def test_odd_tags_of_a_tiff():
    sideways = np.rot90(GREY).copy()
    for tag in [*ODD_TAGS, (282, 2, 4, 7), (700, 3, 2, 7), (700, 12, 1, 8), (34675, 5, 9, 8)]:
        if tag[0] == 273:
            continue
        turned = load_image(tiff(sideways, extra=((274, 3, 1, 6), tag)))
        np.testing.assert_array_equal(np.asarray(turned)[:, :, 0], GREY, str(tag))


@pytest.mark.parametrize(
    "content",
    [
        with_chunk(PNG, b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8), 9)),
        with_chunk(PNG, b"iCCP", b"p\0\0" + zlib.compress(bytes(10**7), 9)),
        with_chunk(PNG, b"zTXt", b"k\0\7xx"),
        with_chunk(PNG, b"tEXt", b"k\0v", crc=1),
        with_chunk(PNG, b"tRNS", b""),
        PNG[:-12] + struct.pack(">I4s", 500, b"tEXt") + b"k\0v",
        PNG + b"garbage" * 99,
        JPEG + b"garbage" * 99,
        with_segment(JPEG, 0xE0, b"JFIF\0\1"),
        with_segment(JPEG, 0xEE, b"Adobe"),
        with_segment(JPEG, 0xE2, b"MPF\0II*\0\x08\0\0\0" + bytes(30)),
        with_segment(JPEG, 0xED, b"Photoshop 3.0\08BIM\4\4\0\0\xff\xff\xff\xff"),
        with_segment(JPEG, 0xE2, b"ICC_PROFILE\0\1\xff" + bytes(900)),
    ],
    ids=[
        *("text bomb", "profile bomb", "unknown packing", "checksum", "transparency"),
        *("text cut off", "PNG tail"),
        *("JPEG tail", "JFIF", "Adobe", "MPF", "Photoshop", "profile"),
    ],
)
def test_a_photo_is_read_and_turned_whatever_describes_it(content: bytes):
    loaded = np.asarray(load_image(content)).astype(int)
    assert loaded.shape == (48, 64, 3)
    assert np.abs(loaded - np.asarray(PHOTO)).mean() < 3


@pytest.mark.parametrize(
    "block", [b"", b"garbage", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_broken_exif_is_no_exif(block: bytes):
    image = PHOTO.copy()
    image.info["exif"] = block
    assert load_image(image).size == PHOTO.size
    jpeg = with_segment(encoded(PHOTO, "JPEG"), 0xE1, b"Exif\0\0" + block)
    assert load_image(jpeg).size == PHOTO.size


def test_an_image_object_keeps_pixels_mode_and_metadata_and_is_not_turned_twice():
    for orientation in range(1, 9):
        image = PHOTO.quantize(16)
        image.info = {"exif": exif((274, 3, 1, orientation)), "transparency": "x"}
        before = (image.tobytes(), image.mode, dict(image.info))
        loaded = load_image(image)
        assert (image.tobytes(), image.mode, dict(image.info)) == before
        np.testing.assert_array_equal(np.asarray(load_image(loaded)), np.asarray(loaded))


def test_nothing_is_written_to_stderr_and_other_warnings_stay(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    lzw = bytearray(encoded(PHOTO, "TIFF", compression="tiff_lzw"))
    lzw[2000:2400] = bytes(400)
    odd = [bytes(lzw), encoded(SIDEWAYS, "JPEG", exif=exif((270, 2, 5000, 65535)))]
    odd += [tiff(GREY, extra=((270, 2, 10**6, 8),)), tiff(GREY, extra=((277, 3, 1, 65535),))]
    transparent = PHOTO.quantize(16)
    odd += [encoded(transparent, "PNG", transparency=bytes(range(16)))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in odd:
            try:
                load_image(content)
            except ImageError as error:
                assert "Warning" not in str(error)
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)
        with pytest.warns(UserWarning), warnings.catch_warnings():  # Pillow's, in somebody's code
            warnings.simplefilter("always")
            with Image.open(io.BytesIO(odd[1])) as image:
                image.getexif()
    assert capfd.readouterr().err == ""


# --- Bounds


def test_too_many_pixels_are_refused_before_they_are_decoded():
    damaged = png(100, 100, 8, 2)[:60]
    with pytest.raises(ImageError, match="100x100 are more pixels than the 9999"):
        load_image(damaged, max_pixels=9999)
    with pytest.raises(ImageError, match="cannot read the image"):
        load_image(damaged, max_pixels=10000)
    lazy = Image.open(io.BytesIO(png(100, 100, 8, 2)))
    with pytest.raises(ImageError, match="100x100 are more pixels"):
        preprocess(lazy, ImageSpec(), max_pixels=9999)
    assert preprocess(lazy, ImageSpec(), max_pixels=10000).shape == (3, 224, 224)
    with pytest.raises(ImageError, match="11000x11000 are more pixels"):
        load_image(png(11000, 11000, 1, 0))


def test_pixels_that_take_longer_count_for_more():
    for content, allowed in (
        (png(100, 100, 16, 6), 20_000),
        (encoded(Image.new("CMYK", (100, 100)), "TIFF"), 12_500),
        (encoded(Image.new("F", (100, 100)), "TIFF"), 17_500),
        (encoded(Image.new("CMYK", (100, 100)), "JPEG", progressive=True), 23_334),
        (bmp_rle(PHOTO.resize((100, 100))), 60_000),
    ):
        with pytest.raises(ImageError, match="100x100 are more pixels than the 99"):
            load_image(content, max_pixels=allowed - 10)
        try:
            load_image(content, max_pixels=allowed)
        except ImageError as error:  # black
            assert "no certain brightness" in str(error)


def bmp_rle(image: Image.Image) -> bytes:
    """A BMP whose every pixel is a run."""
    image = image.quantize(256)
    rows = np.asarray(image)[::-1]
    runs = b"".join(b"".join(bytes((1, value)) for value in row.tolist()) + b"\0\0" for row in rows)
    palette = np.zeros((256, 4), np.uint8)
    colours = np.reshape(image.getpalette(), (-1, 3))
    palette[: len(colours), :3] = colours[:, ::-1]
    head = struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078)
    size = struct.pack("<IiiHHIIiiII", 40, *image.size, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + head + size + palette.tobytes() + runs


def dds_rgb(image: Image.Image) -> bytes:
    """A DDS of 24 bits a pixel, each channel by its mask."""
    head = struct.pack("<7I", 124, 0x1007, image.height, image.width, 0, 0, 0) + bytes(44)
    masks = struct.pack("<II4s5I", 32, 0x40, bytes(4), 24, 0xFF0000, 0xFF00, 0xFF, 0)
    return b"DDS " + head + masks + bytes(20) + np.asarray(image)[:, :, ::-1].tobytes()


@pytest.mark.parametrize(
    "content",
    [
        encoded(PHOTO, "QOI"),
        b"P6 64 48 1023\n" + (np.asarray(PHOTO).astype(">u2") << 2).astype(">u2").tobytes(),
        b"P6 64 48 65535\n" + np.repeat(np.asarray(PHOTO), 2).tobytes(),
        dds_rgb(PHOTO),
        bmp_rle(PHOTO),
    ],
    ids=["QOI", "PPM of 10 bits", "PPM of 16 bits", "DDS", "BMP of runs"],
)
def test_a_photo_that_is_read_pixel_by_pixel_is_not_damaged(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Some of Pillow's decoders do; a photo has more pixels than a search may take reads."""
    monkeypatch.setattr("capexport.images._MOST_READS", 100)
    path = tmp_path / "photo"
    path.write_bytes(content)
    for source in (content, path):
        loaded = np.asarray(load_image(source)).astype(int)
        assert np.abs(loaded - np.asarray(PHOTO)).mean() < 8  # of a palette, 6


def test_a_tile_is_no_larger_in_memory_than_an_image_may_be():
    # 64 x 64 pixels in one tile of 65536 x 16384, packed by LZW
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 5), (262, 3, 1, 1)]
    tags += [(277, 3, 1, 1), (322, 4, 1, 65536), (323, 4, 1, 16384), (324, 4, 1, 8), (325, 4, 1, 9)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    content = b"II*\0" + struct.pack("<IQH", 16, 0, len(tags)) + entries + bytes(4)
    with pytest.raises(ImageError, match="64x64 are more pixels"):
        load_image(content)


MEASURE = """
import sys
from capexport.preprocessing import ImageSpec, preprocess
from PIL import Image
def megabytes(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) / 1024
content = open(sys.argv[1], "rb").read()
preprocess(Image.new("RGB", (300, 300)), ImageSpec())
open("/proc/self/clear_refs", "w").write("5")
before = megabytes("VmRSS")
preprocess(content, ImageSpec())
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("depth", "colour", "bytes_a_pixel"), [(16, 0, 2), (8, 0, 1), (8, 2, 4)], ids=str
)
def test_an_image_is_held_once_in_its_own_type(depth, colour, bytes_a_pixel, tmp_path: Path):
    path = tmp_path / "large.png"
    path.write_bytes(png(6000, 5000, depth, colour, (b"eXIf", TURNED[6:])))
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 30 * bytes_a_pixel + 30


def test_a_jpeg_whose_components_come_one_by_one_is_one_of_several_scans():
    whole = encoded(PHOTO, "JPEG", subsampling=0)
    at = whole.find(b"\xff\xda")
    scans = [b"\xff\xda\0\x08\1" + bytes((1, 0, 0, 63, 0)), b"\xff\xda\0\x08\1\2\x11\0\x3f\0"]
    content = whole[:at] + b"".join(scans)
    assert load_image(content + scans[0] * 10 + b"\xff\xd9").size == PHOTO.size
    with pytest.raises(ImageError, match="64x48 are more pixels than the 3071"):
        load_image(content + b"\xff\xd9", max_pixels=64 * 48 * 7 // 4 - 1)
    # As large as an image that is worth it, 100 kB of comments before its first scan.
    large = bytearray(content[:2] + (b"\xff\xfe\xc3\x50" + bytes(0xC34E)) * 2 + content[2:])
    frame = large.find(b"\xff\xc0")
    large[frame + 5 : frame + 9] = struct.pack(">HH", 2000, 2000)
    with pytest.raises(ImageError, match=r"JPEG of \d+ scans"):
        load_image(bytes(large) + scans[0] * 400 + b"\xff\xd9")


def test_a_progressive_jpeg_of_many_scans_is_refused():
    content = encoded(Image.new("L", (2000, 2000)), "JPEG", quality=1, progressive=True)
    scan = content[content.rfind(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match=r"JPEG of \d+ scans"):
        load_image(content[:-2] + scan * 400 + b"\xff\xd9")
    # What merely looks like scans, in metadata or behind the image, is none.
    harmless = with_segment(content, 0xE5, b"\xff\xda" * 9000) + b"\xff\xda" * 900
    assert load_image(harmless).size == (2000, 2000)


@pytest.mark.parametrize(
    ("orientation", "mode"),
    [(1, "P"), (2, "L"), (3, "RGB"), (4, "P"), (5, "L"), (6, "RGB"), (7, "RGB"), (8, "CMYK")],
)
def test_large_images_get_the_same_pixels_in_strips(orientation: int, mode: str):
    size = (2600, 2200)
    photo = draw_photo(5, size)
    image = photo.quantize(64) if mode == "P" else photo.convert(mode)
    image.info["exif"] = exif((274, 3, 1, orientation))
    plain = ImageOps.exif_transpose(image).convert("RGB")
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(plain))
    for spec in (ImageSpec(), ImageSpec(384, 384, keep_aspect=False, resample="bicubic")):
        np.testing.assert_array_equal(preprocess(image, spec), preprocess(plain, spec))


# --- Brightness

ONE_PLANE = ((284, 3, 1, 2),)  # each channel by itself, which says nothing of a single one


@pytest.mark.parametrize(
    "content",
    [
        tiff((GREY / 255).astype(np.float32), kind=3),
        tiff(GREY.astype(np.float32), kind=3),
        tiff((1 - GREY / 255).astype(np.float32), meaning=0, kind=3),
        tiff(GREY.astype(np.int32), kind=2),
        tiff(GREY.astype(np.int32) * 257, kind=2),
        tiff(GREY.astype(np.int16) * 128, kind=2),
        tiff(GREY.astype(np.int16), kind=2),
        tiff(GREY.astype(np.uint16) * 16),
        tiff(65535 - GREY.astype(np.uint16) * 257, meaning=0),
        tiff(255 - GREY, meaning=0),
        tiff(255 - GREY, meaning=0, extra=ONE_PLANE),
        tiff(GREY.astype(np.uint16) * 257, extra=ONE_PLANE),
        b"Pf\n64 48\n-1.0\n" + (GREY[::-1] / 255).astype("<f4").tobytes(),
    ],
    ids=[
        *("float to 1", "float to 255", "float, white is 0", "int32 of 8 bits", "int32 of 16"),
        *("int16", "int16 of 8 bits", "12 bits", "uint16, white is 0", "uint8, white is 0"),
        *("a plane, white is 0", "a plane of 16 bits", "PFM"),
    ],
)
def test_every_depth_of_grey_gets_its_brightness(content: bytes):
    loaded = np.asarray(load_image(content)).astype(int)
    assert np.abs(loaded - GREY[:, :, None]).max() <= 1


@pytest.mark.parametrize(
    "content",
    [
        tiff((GREY / 255 * 5).astype(np.float32), kind=3),
        tiff((GREY / 255 - 0.5).astype(np.float32), kind=3),
        tiff(np.where(GREY > 99, np.nan, GREY / 255).astype(np.float32), kind=3),
        tiff(GREY.astype(np.int32) << 22, kind=2),
        tiff((GREY.astype(np.int32) * 257 - 32768).astype(np.int16), kind=2),
        tiff((GREY // 2).astype(np.int8), kind=2),
    ],
    ids=["HDR", "negative floats", "not a number", "int32", "negative int16", "int8"],
)
def test_uncertain_brightness_is_refused(content: bytes):
    with pytest.raises(ImageError, match="no certain brightness"):
        load_image(content)


COLOURS = np.asarray(PHOTO).astype(np.uint16)
OPAQUE = np.full((48, 64, 1), 65535, np.uint16)


@pytest.mark.parametrize("used", [8, 10, 12])
def test_colours_that_use_few_of_16_bits_are_never_black(used: int):
    """Pillow keeps the upper 8 bits of each channel, where these have next to nothing."""
    few = COLOURS << (used - 8)
    for content in (
        tiff_colours(few),
        tiff_planes(few),
        tiff_colours(np.dstack([few, 0 * OPAQUE]), meaning=5),
        png_colours(few),
        png_colours(np.dstack([few, OPAQUE])),
        png_colours(np.dstack([few[:, :, :1], OPAQUE])),
        ppm_colours(few),
    ):
        with pytest.raises(ImageError, match="no certain brightness"):
            load_image(content)


@pytest.mark.parametrize("make", [tiff_colours, tiff_planes, png_colours, ppm_colours])
def test_colours_of_16_bits_keep_their_brightness(make: Callable[[np.ndarray], bytes]):
    np.testing.assert_array_equal(np.asarray(load_image(make(COLOURS * 257))), COLOURS)
    dark = COLOURS // 8 * 257  # a photo taken at night
    np.testing.assert_array_equal(np.asarray(load_image(make(dark))), COLOURS // 8)
    black = np.asarray(load_image(encoded(Image.new("RGB", (8, 8)), "PNG")))  # with 8 bits, it is
    assert not black.any()


def test_colours_of_8_bits_in_a_tiff_of_16_bit_colours():
    content = encoded(PHOTO.quantize(256), "TIFF")
    with Image.open(io.BytesIO(content)) as image:
        colours = image.tag_v2[320]
    packed = struct.pack("<768H", *colours)
    dim = content.replace(packed, struct.pack("<768H", *(colour // 256 for colour in colours)))
    assert dim != content
    np.testing.assert_array_equal(np.asarray(load_image(dim)), np.asarray(load_image(content)))


# --- One object, many times


@pytest.fixture
def switching_threads() -> Iterator[None]:
    """Python goes from thread to thread all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize(
    "shared",
    [
        lambda path: path.open("rb"),
        lambda path: io.BytesIO(path.read_bytes()),
        Image.open,
        lambda path: Image.open(io.BytesIO(path.read_bytes())),
    ],
    ids=["file", "buffer", "lazy image", "lazy image of a buffer"],
)
def test_one_object_can_be_loaded_often_and_in_threads(
    shared: Callable[[Path], Any], tmp_path: Path, switching_threads: None
):
    path = tmp_path / "photo.png"
    draw_photo(2, (500, 400)).quantize(200).save(path)
    wanted = preprocess(path, ImageSpec())
    with shared(path) as source, ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: preprocess(source, ImageSpec()), range(40)):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_fork_while_a_file_is_being_read_leaves_the_child_free():
    reading, parent, proceed = threading.Event(), os.getpid(), threading.Event()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if os.getpid() == parent:
                reading.set()
                proceed.wait(30)
            return super().read(size)

    source = Slow(encoded(PHOTO, "PNG"))
    thread = threading.Thread(target=load_image, args=(source,))
    thread.start()
    reading.wait(30)
    child = os.fork()
    if child == 0:
        done = threading.Thread(target=load_image, args=(source,), daemon=True)
        done.start()
        done.join(20)
        os._exit(done.is_alive())
    assert os.waitpid(child, 0)[1] == 0
    proceed.set()
    thread.join()


# --- Files that break off


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("lost", [2, 40])
def test_a_truncated_jpeg_gives_what_it_has_on_demand_alone(progressive: bool, lost: int):
    whole = encoded(PHOTO, "JPEG", progressive=progressive)
    cut = whole[:-lost]
    with pytest.raises(ImageError, match="`truncated` takes what there is"):
        load_image(cut)
    loaded = np.asarray(load_image(cut, truncated=True)).astype(int)
    assert np.abs(loaded - np.asarray(load_image(whole))).mean() < (0.1 if lost == 2 else 25)
    assert preprocess(cut, ImageSpec(), truncated=True).shape == (3, 224, 224)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(ImageError):
        load_image(cut)


def test_whole_images_of_one_colour_stay_images_where_truncated_ones_are_allowed():
    for style in ("JPEG", "PNG"):
        for progressive in (False, True):
            whole = encoded(Image.new("RGB", (20, 20)), style, progressive=progressive)
            assert not np.asarray(load_image(whole, truncated=True)).any()


@pytest.mark.parametrize("style", ["PNG", "GIF", "BMP", "PPM", "TIFF"])
def test_other_truncated_formats_are_never_taken_for_black(style: str):
    whole = encoded(PHOTO, style)
    half = np.asarray(load_image(whole[: len(whole) * 2 // 3], truncated=True))
    assert half.any()
    for length in range(0, len(whole) // 3, 37):
        try:
            assert np.asarray(load_image(whole[:length], truncated=True)).any()
        except ImageError as error:
            assert re.search("breaks off|cannot read", str(error))


@pytest.mark.parametrize(
    "head",
    [b"RIFF\xff\xff\xff\x7fWEBPVP8 ", b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B",
     b"qoif\0\0\1\0\0\0\1\0\3\0", b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0", b"\xff\xd8\xff\xe0",
     b"\xff\xd8" + b"\xff\xfe\0\2" * 2_000_000, b"GIF89a\1\0\1\0\0\0\0"],
)  # fmt: skip
def test_a_file_with_nothing_behind_its_head_is_not_read_whole(head: bytes, tmp_path: Path):
    path = tmp_path / "sparse.img"
    path.write_bytes(head)
    os.truncate(path, 12 * 10**8)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"sparse\.img"):
            load_image(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
