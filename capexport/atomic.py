"""Files and folders that appear complete or not at all, and locks on them."""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from capexport.errors import OutputExistsError

_NO_LINK: int = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT: int = getattr(os, "O_NONBLOCK", 0)
_DRAFT = re.compile(r"\.(.+)\.[0-9a-f]{16}\.partial")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A draft folder that becomes `out` when the block ends well, and vanishes if it fails.

    Raises:
        OutputExistsError: `out` is there already, or another export is making it.
    """
    out = out.resolve()
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _draft(out, folder=True) as (draft, _):
        rivals = remove_dead_drafts(out.parent) - {draft.name}
        if any(_target_of(name) == _target_of(draft.name) for name in rivals):
            raise OutputExistsError(f"{out}: another export is making it; wait, or pick another")
        yield draft
        refuse_existing(out)
        draft.replace(out)


def refuse_existing(out: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        OutputExistsError: there is something at `out` other than an empty folder.
    """
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise OutputExistsError(f"{out}: already there; remove it, or pick another --out")


def require_writable(path: Path) -> None:
    """Check that `path` can be created, before anything is computed for it.

    Raises:
        OSError: `path`, or the folders above it, cannot be created.
    """
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    with _draft(above / path.name, folder=True):
        pass


def require_writable_file(path: Path) -> None:
    """As `require_writable`, for a file, which may be there already.

    Raises:
        OutputExistsError: `path` is a folder.
        OSError: as for `require_writable`.
    """
    require_writable(path)
    if path.is_dir():
        raise OutputExistsError(f"{path}: a folder, not the name of a file")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def replace_file(path: Path, text: str) -> None:
    """Write UTF-8 text so that `path` holds the old or the new content, never part of it."""
    with suppress(OSError):
        remove_dead_drafts(path.parent)
    with replacing_file(path) as file:
        file.write(text)


@contextmanager
def replacing_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 stream whose content replaces `path` when the block ends well.

    Its draft is a new file beside `path`: nothing that was there before is opened or followed.
    """
    with replacing_binary_file(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        yield file
        file.detach()  # flushed, and left to be closed there


@contextmanager
def replacing_binary_file(path: Path) -> Iterator[BinaryIO]:
    """As `replacing_file`, for bytes."""
    with _draft(path) as (draft, number), os.fdopen(number, "wb") as file:
        yield file
        file.flush()
        os.fsync(number)
        if os.name == "nt":  # where no open file is renamed
            file.close()
        draft.replace(path)


def _target_of(draft: str) -> str | None:
    """The final name of a draft, or as much of it as the draft's name holds; None if `draft` is not
    the name of a draft."""
    match = _DRAFT.fullmatch(draft)
    return match and match[1]


@contextmanager
def _draft(path: Path, folder: bool = False) -> Iterator[tuple[Path, int]]:
    """A new, locked file (or folder) beside `path`, and its open descriptor, which the caller
    closes if it is a file. The draft is removed at the end of the block, unless it was renamed."""
    stem = os.fsencode(path.name)[:100].decode("utf-8", "ignore") or "file"
    draft, number = path, -1
    try:
        while number < 0:
            draft = path.with_name(f".{stem}.{secrets.token_hex(8)}.partial")
            if folder:
                draft.mkdir()
                number = os.open(draft, os.O_RDONLY) if os.name != "nt" else 0
            else:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK | getattr(os, "O_BINARY", 0)
                number = os.open(draft, flags, 0o666)
            if number and (lock(number) is False or not is_at(number, draft)):
                os.close(number)  # another process took it for a dead one before it was locked
                number = -1
        yield draft, number
    except OSError as error:
        raise _with_name(error, path) from error
    finally:
        if folder:
            shutil.rmtree(draft, ignore_errors=True)
            if number > 0:
                os.close(number)
        elif draft != path:
            with suppress(OSError):
                draft.unlink()


def remove_dead_drafts(folder: Path) -> set[str]:
    """Remove the drafts of writers that were killed; return the names of those still in use."""
    alive = set()
    for entry in os.scandir(folder):
        if not _target_of(entry.name) or entry.is_symlink():
            continue
        with suppress(OSError):
            number = os.open(entry.path, os.O_RDONLY | _NO_LINK | _NO_WAIT)
            try:
                held = lock(number)
                if held and entry.is_dir():
                    shutil.rmtree(entry.path, ignore_errors=True)
                elif held:
                    Path(entry.path).unlink()
                elif held is False:
                    alive.add(entry.name)
            finally:
                os.close(number)
    return alive


def lock(number: int) -> bool | None:
    """Lock an open file (or folder, on POSIX) until it is closed or the process ends in any way.

    Returns:
        True; False if another process holds it; None if the file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        try:  # one byte far beyond the end, since nobody else can read what is locked
            os.lseek(number, 1 << 30, os.SEEK_SET)
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(number: int, path: Path) -> bool:
    """Is this open file still the one at `path`, which is no link?"""
    try:
        return os.path.samestat(os.fstat(number), path.lstat())
    except OSError:
        return False


def _with_name(error: OSError, path: Path) -> OSError:
    """The same error with the name of `path`: the system names no file when a disk is full, and the
    draft in other errors."""
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | Path)]
    ours = any(_target_of(part) for name in names for part in Path(name).parts)
    if error.errno is None or (names and not ours):
        return error
    return OSError(error.errno, error.strerror, str(path))
