"""Files and folders on any file system, by paths and URIs."""

from __future__ import annotations

import glob
import io
import logging
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias, cast

import pyarrow as pa
from pyarrow.fs import (
    FileSelector,
    FileSystem,
    FileType,
    FSSpecHandler,
    LocalFileSystem,
    PyFileSystem,
)

from capexport.bulk.files import is_searched, search
from capexport.bulk.names import readable_name
from capexport.errors import ImageError, ImageNotFoundError, OptionError

log = logging.getLogger("capexport")

Places: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_MAX_BYTES = 100_000_000  # of a file that comes over the network, which is read as a whole
_NO_IMAGES = "no image files there that can be read"
# Scheme and host, path, and options such as `endpoint_override`.
_URI = re.compile(r"([a-z][a-z0-9+.-]*://[^/?]*)/?(.*?)(\?\w+=.*)?", re.DOTALL | re.IGNORECASE)


def locate(place: str | os.PathLike[str], filesystem: FileSystem | None) -> tuple[FileSystem, str]:
    """A file system, and the path there of a path or URI.

    But for `file:`, a URI's path is taken as it is, as the tools of object stores take it: %20
    may be part of a name, a space is a space.
    """
    name = os.fspath(place)
    if not name:
        raise OptionError("an empty path names nothing; this folder is .")
    uri = _URI.fullmatch(name)
    if filesystem is None and uri:
        base, path, query = uri.groups(default="")
        try:
            if base == "file://":
                filesystem, name = FileSystem.from_uri(name)
            else:
                filesystem, root = _system(base + query)
                name = f"{root.rstrip('/')}/{path}"
        except (pa.ArrowException, OSError) as error:
            raise OptionError(f"{place}: no file system can be reached: {error}") from error
    filesystem = filesystem or LocalFileSystem()
    if not isinstance(filesystem, FileSystem):  # pyarrow's own functions take fsspec's, too
        filesystem = PyFileSystem(FSSpecHandler(filesystem))
    return filesystem, os.path.abspath(name) if isinstance(filesystem, LocalFileSystem) else name


@cache
def _system(uri: str) -> tuple[FileSystem, str]:
    return cast(tuple[FileSystem, str], FileSystem.from_uri(uri))


def list_images(
    places: Sequence[str | os.PathLike[str]], filesystem: FileSystem | None
) -> tuple[FileSystem, list[str]]:
    """The images in all places, and the file system that they are on."""
    located = [locate(place, filesystem) for place in places]
    if not located or any(system != located[0][0] for system, _ in located):
        raise OptionError("photos: name places on one file system, and at least one")
    source, paths = located[0][0], [path for _, path in located]
    if isinstance(source, LocalFileSystem):
        for path in paths:
            if not (os.path.lexists(path) or glob.has_magic(path)):
                raise ImageNotFoundError(f"{path}: no such file or folder")
        found = search(paths, None)
        names: Iterable[str | Path] = found.paths
        for suffix, number in found.unreadable().items():
            log.warning("%d %s left out", number, suffix)
    else:
        names = dict.fromkeys(name for path in paths for name in _listed(source, path))
        if not names:
            raise ImageNotFoundError(f"{', '.join(paths)}: {_NO_IMAGES}")
    return source, list(map(readable_name, names))


def _listed(filesystem: FileSystem, path: str) -> list[str]:
    """The images below a folder, or the file itself, by the rules of `search`."""
    base = path.rstrip("/")
    kind = filesystem.get_file_info(base).type
    if kind == FileType.NotFound:
        raise ImageNotFoundError(f"{path}: {_NO_IMAGES}")
    if kind == FileType.File:
        return [base]
    entries = filesystem.get_file_info(FileSelector(base, recursive=True))
    names = [entry.path for entry in entries if entry.type == FileType.File]
    return sorted(name for name in names if is_searched(name[len(base) :]))


class _File(io.BytesIO):
    """A file's content, and its name for errors."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def fetch(filesystem: FileSystem, path: str) -> io.BytesIO:
    """A whole file, with its `name`.

    Raises:
        ImageError: it is not there, cannot be fetched, or is too large.
    """
    try:
        with filesystem.open_input_stream(path) as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ImageNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be fetched: {error}") from error
    if len(content) > _MAX_BYTES:
        raise ImageError(f"{path}: more than {_MAX_BYTES / 1e6:.0f} MB; save it smaller")
    return _File(content, path)
