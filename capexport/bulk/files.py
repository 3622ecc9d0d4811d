"""Which files a user means by paths, folders, patterns and lists."""

from __future__ import annotations

import codecs
import glob
import io
import logging
import mimetypes
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TextIO

from PIL import Image, UnidentifiedImageError

from capexport.errors import ImageNotFoundError
from capexport.preprocessing import image_suffixes

log = logging.getLogger("capexport")

STDIN = Path("-")
# Folders that systems keep beside people's photos: thumbnails, parts of files, deleted files.
_NOT_SEARCHED = frozenset({"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN"})
# Images by their suffix, but of formats that need another program.
READERS = {
    **dict.fromkeys((".heic", ".heif", ".hif", ".heics", ".heifs"), "pip install pillow-heif"),
    ".jxl": "djxl converts them to PNG",
    **dict.fromkeys(
        (
            ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc",
            ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2",
            ".srf", ".srw", ".x3f",
        ),
        "dcraw converts them to TIFF",
    ),
}  # fmt: skip
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",  # before that of UTF-16, which it begins as
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# What no list of files holds, unless names are odd: a tag at its beginning, control characters,
# nothing between two NULs, and, as UTF-16 does, a NUL at the end of a line or behind every letter.
_NO_LIST = re.compile(
    rb"\A\s*<|[\1-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f]|\A\0|\0[\0\n]|\n\0|\A(?:[^\0]\0){3}"
)
# What lies beside images and has no type of its own among Internet media types.
_SIDE_CARS = re.compile(
    r"\.(captions?|tags|jsonl|ndjson|np[yz]|safetensors|parquet|arrow|md|ya?ml|toml|ini|cfg|log|db|"
    r"lnk|url|aae|xmp|pp3|dop|on1|vrd|acr|nksc|pt|md5|sha\d+|journal|partial)"
)


@dataclass
class Found:
    """What a search has found.

    Attributes:
        paths: the files, each once, in order. A file that doesn't exist is among them, so that
            reading it reports it.
        searched: the folders that were searched.
        content: the image from standard input, by the path that stands for it.
        ignored: how many files and folders were left out, by lower-case suffix or kind.
        problems: what could not be searched, one line each, which `search` logs.
    """

    paths: list[Path] = field(default_factory=list)
    searched: set[Path] = field(default_factory=set)
    content: dict[Path, bytes] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def unreadable(self) -> Counter[str]:
        """How many images were left out because capexport does not read them, by suffix."""
        return Counter({suffix: n for suffix, n in self.ignored.items() if suffix in READERS})

    def below(self, path: Path) -> Path:
        """`path` relative to the folder that was searched for it, or else its name."""
        folders = [folder for folder in path.parents if folder in self.searched]
        return path.relative_to(folders[-1] if folders else path.parent)


def find_images(arguments: Sequence[str], stdin: TextIO | None) -> list[Path]:
    """The files that `search` finds, without what else it knows about them; none for no arguments.

    Raises:
        ImageNotFoundError: as for `search`, or standard input holds an image.
    """
    if not arguments:
        return []
    found = search(arguments, stdin)
    if found.content:
        raise ImageNotFoundError("-: an image, where a list of files is expected")
    return found.paths


def search(arguments: Sequence[str], stdin: TextIO | None, recursive: bool = True) -> Found:
    """Find the files behind paths, folders (searched recursively), patterns and `-`.

    In folders, the suffixes of readable images count. Links are followed, each real folder is
    entered once, and hidden files and folders are left out. `-` is standard input: an image, or a
    list of paths, one a line or separated by NUL. A named file is taken whatever its suffix, except
    side-cars, documents and films, which a pattern such as `photos/*` names too. No file is opened.

    Raises:
        ImageNotFoundError: an argument is empty, or a pattern, a list or the whole has no image.
    """
    found = Found()
    seen: dict[str, Path] = {}
    real: dict[Path, str] = {}
    for argument in arguments:
        before = len(seen), found.ignored.total()
        repeated = False
        for path in _meant(argument, stdin, recursive, found):
            if path.parent not in real:
                real[path.parent] = os.path.realpath(path.parent)
            key = os.path.normcase(os.path.join(real[path.parent], path.name))
            repeated |= seen.setdefault(key, path) is not path
        if not repeated and before == (len(seen), found.ignored.total()):
            if file_type(Path(argument)) != stat.S_IFDIR:
                raise ImageNotFoundError(f"{argument}: no image files there")
            found.ignored["empty folder"] += 1
    for problem in found.problems:
        log.warning("%s", problem)
    found.paths = list(seen.values())
    if not found.paths:
        wanted = found.unreadable()
        others = "".join(f"; {n} {suffix}: {READERS[suffix]}" for suffix, n in wanted.items())
        raise ImageNotFoundError(f"{arguments[0]}: no image files there that can be read{others}")
    return found


def _meant(argument: str, stdin: TextIO | None, recursive: bool, found: Found) -> Iterator[Path]:
    """The files of one argument."""
    if not argument:
        raise ImageNotFoundError("an empty argument names no file; this folder is .")
    if argument == "-":
        names = _from_stdin(stdin, found)
    elif not os.path.lexists(argument) and glob.has_magic(argument):
        matches = map(Path, glob.glob(argument, recursive=True))
        names = sorted(path for path in matches if _NOT_SEARCHED.isdisjoint(path.parts))
    else:
        names = [Path(argument)]
    for name in names:
        if name.name in _NOT_SEARCHED:
            found.ignored[name.name] += 1
        elif file_type(name) == stat.S_IFDIR:
            found.searched.add(name)
            yield from sorted(_walk(name, recursive, found))
        elif _is_other(name) and os.path.lexists(name):
            found.ignored[name.suffix.lower()] += 1
        else:
            yield name


def _is_other(path: Path) -> bool:
    """Does the name say that this is no image?"""
    suffix = path.suffix.lower()
    if path.name.startswith("._"):  # what macOS cannot store in a file on foreign disks
        return True
    if suffix in image_suffixes():
        return False
    kind = _media_types().get(suffix, "image/")
    return bool(_SIDE_CARS.fullmatch(suffix)) or not kind.startswith(
        ("image/", "application/octet-stream")
    )


@cache
def _media_types() -> dict[str, str]:
    """By suffix, the same on every machine."""
    return mimetypes.MimeTypes().types_map[True]


def _walk(folder: Path, recursive: bool, found: Found) -> Iterator[Path]:
    """The images below `folder`; links to folders come last, so that real names win."""
    waiting: list[Path] = [folder]
    links: list[Path] = []
    entered: set[str] = set()
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        real = os.path.realpath(here)
        if real in entered:
            continue
        entered.add(real)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            found.problems.append(f"{here}: cannot be searched: {error.strerror}")
            continue
        for entry in entries:
            path = here / entry.name
            if _is_hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting += [path] * recursive
            elif entry.is_symlink() and file_type(path) == stat.S_IFDIR:
                links += [path] * recursive
            elif path.suffix.lower() in READERS.keys() - image_suffixes():
                found.ignored[path.suffix.lower()] += 1
            elif path.suffix.lower() in image_suffixes() and (
                entry.is_file(follow_symlinks=False) or file_type(path) in (stat.S_IFREG, 0)
            ):
                yield path


def is_searched(name: str) -> bool:
    """Does a search take the file of this name? It is relative to the folder, with `/`."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in image_suffixes() and not any(map(_is_hidden, name.split("/")))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _NOT_SEARCHED


def file_type(path: Path) -> int:
    """The type of what is at `path`, or behind a link there; 0 if nothing can be seen."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError):
        return 0


def _from_stdin(stdin: TextIO | None, found: Found) -> list[Path]:
    """The paths in a list on standard input, or the path that stands for an image there."""
    if stdin is None:
        raise ImageNotFoundError("-: standard input is closed")
    buffer = getattr(stdin, "buffer", None)
    data = buffer.read() if buffer else stdin.read().encode("utf-8", "surrogateescape")
    names = None if _is_image(data) else _names(data)
    if names is None:
        found.content[STDIN] = data
        return [STDIN]
    return [Path(os.fsdecode(name)) for name in names]


def _names(data: bytes) -> list[bytes] | None:
    """The names in a list; None where it is no list, but an image that nothing here reads, say."""
    for mark, encoding in _MARKS.items():  # from PowerShell
        if data.startswith(mark):
            data = data.removeprefix(mark).decode(encoding, "replace").encode()
            break
    data = data.removeprefix(codecs.BOM_UTF8)
    names = _separated(data)
    first = names[0] if names else b""
    if not _NO_LIST.search(data) or (len(first) > 1 and os.path.lexists(first)):
        return names
    if b"\0" not in data:
        return None
    big_endian = data[::2].count(0) > data[1::2].count(0)
    with suppress(UnicodeDecodeError):  # UTF-16 without a mark, as of cmd /u
        text = data.decode("utf-16-be" if big_endian else "utf-16-le").encode()
        if b"\0" not in text and not _NO_LIST.search(text):
            return _separated(text)
    return None


def _separated(data: bytes) -> list[bytes]:
    """Names with NULs between them, or a line each."""
    if b"\0" in data:
        names = data.split(b"\0")
    else:
        names = [line.rstrip(b"\r") for line in data.split(b"\n")]
    return [name for name in names if name.strip()]


def _is_image(data: bytes) -> bool:
    """Does an image begin here? It is not decoded."""
    try:
        Image.open(io.BytesIO(data)).close()
    except UnidentifiedImageError:
        return False
    except Exception:  # a damaged one, or a list whose first name begins as images do
        return b"\0" in data[:64]
    return True
