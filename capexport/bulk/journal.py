"""The rows of an unfinished output, kept line by line, so that no kill loses a caption."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capexport.atomic import is_at, lock
from capexport.bulk.rows import Row, to_json
from capexport.errors import OutputExistsError

# Follow no link, and wait for nobody at the other end of a pipe.
_CAUTION: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class Journal:
    """A file with the rows of an unfinished output, locked while it is open.

    Its first line says that it is a journal, and what the rows are made with. Every other line is a
    row.

    Attributes:
        header: the first line.
        begun_anew: whether to disregard an output that is there already.
    """

    BEGINNING = b'{"captioner": '

    def __init__(self, path: Path, made_with: dict[str, Any], resume: bool, anew: bool) -> None:
        """Open or create it. If it is to begin `anew`, drop the rows that are there.

        Raises:
            OutputExistsError: it is in use, is not a journal, is there although `resume` and `anew`
                are off, or was begun with another model or other options.
        """
        self.path = path
        self.header, begun_anew = (
            to_json(header).encode() + b"\n" for header in (made_with, {**made_with, "anew": True})
        )
        there = os.path.lexists(path)
        self._file = io.FileIO(_open_locked(path), "r+")
        try:
            with self._reading(0) as reader:
                first = reader.readline(1 << 20)
            whole = first.startswith(self.BEGINNING) and first.endswith(b"\n")
            if not (whole or self.BEGINNING.startswith(first[: len(self.BEGINNING)])):
                raise OutputExistsError(
                    f"{path}: where the journal would be is a file that is none; pick another --out"
                )
            if there and not (resume or anew):
                raise OutputExistsError(
                    f"{path}: left by an interrupted run; go on with --resume, or remove it"
                )
            if whole and not anew and first not in (self.header, begun_anew):
                raise OutputExistsError(
                    f"{path}: was begun with another model or other options; --overwrite drops it"
                )
        except BaseException:
            self._file.close()
            raise
        self.begun_anew = anew or first == begun_anew
        if anew or not whole:
            self._file.truncate(0)
            try:
                self.append(begun_anew if anew else self.header)
            except OSError:
                self.close(keep=False)
                raise

    def append(self, line: bytes) -> int:
        """Add a line; return where it begins."""
        beginning = self._file.seek(0, os.SEEK_END)
        with naming(self.path):
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        return beginning

    def add(self, rows: Sequence[Row]) -> int:
        """Add rows; return where the first begins."""
        return self.append(b"".join(to_json(row).encode() + b"\n" for row in rows))

    def scan(self) -> dict[str, int]:
        """Where each image's row begins, by name. An incomplete last line is cut off."""
        found = {}
        with self._reading(0) as reader:
            end = len(reader.readline())
            for line in reader:
                if not line.endswith(b"\n"):
                    break
                try:
                    name, _, *_ = json.loads(line)
                    found[name] = end
                except (ValueError, TypeError) as error:
                    raise OutputExistsError(f"{self.path}: damaged ({error}); remove it") from error
                end += len(line)
        self._file.truncate(end)
        return found

    def rows(self, names: Iterator[str], kept: Mapping[str, int], added: int) -> Iterator[Row]:
        """Rows in the order of `names`: those that begin at `kept`, and those from `added` on. The
        latter are in that order already, so their places need not be known."""
        with self._reading(added) as reader:
            row = _read_row(reader)
            for name in names:
                if name in kept:
                    position = reader.tell()
                    reader.seek(kept[name])
                    yield _read_row(reader)
                    reader.seek(position)
                elif row and row[0] == name:
                    yield row
                    row = _read_row(reader)
            while row:  # out of order after all
                yield row
                row = _read_row(reader)

    @contextmanager
    def _reading(self, beginning: int) -> Iterator[io.BufferedReader[Any]]:
        self._file.seek(beginning)
        reader = io.BufferedReader(self._file)
        try:
            yield reader
        finally:
            reader.detach()

    def size(self) -> int:
        return self._file.seek(0, os.SEEK_END)

    @property
    def holds_rows(self) -> bool:
        with self._reading(0) as reader:
            return bool(reader.readline() and reader.readline())

    @property
    def is_there(self) -> bool:
        return is_at(self._file.fileno(), self.path)

    def close(self, keep: bool) -> None:
        """Close it, and remove it unless it is to be kept and holds rows."""
        if self._file.closed:
            return
        unlink = self.is_there and not (keep and self.holds_rows)
        if os.name == "nt":  # where no open file is removed
            self._file.close()
        if unlink:
            self.path.unlink(missing_ok=True)
        self._file.close()


def _read_row(reader: io.BufferedReader[Any]) -> Row:
    """The row that begins here; an empty one at the end."""
    line = reader.readline()
    return tuple(json.loads(line)) if line else ()


def _open_locked(path: Path) -> int:
    """Open a file, made if need be and no link, and lock it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | _CAUTION
    while True:
        try:
            number = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OutputExistsError(f"{path}: a link, not a journal; remove it") from error
        if stat.S_ISREG(os.fstat(number).st_mode) and lock(number) is not False:
            if is_at(number, path):
                return number
            os.close(number)  # the run that held it has just finished
            continue
        os.close(number)
        raise OutputExistsError(f"{path}: another run is writing it; wait for its end")


def journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def record_of(out: Path) -> Path:
    """The hidden file beside a finished output that says what made it, since no format of rows has
    a place for that. For COCO it also holds the names behind the ids."""
    return out.with_name(f".{out.name}.capexport")


def read_record(record: Path) -> list[str]:
    """The lines of a record; one empty line if there is no record.

    Raises:
        OutputExistsError: it is somebody else's file.
    """
    try:
        number = os.open(record, os.O_RDONLY | _CAUTION)
        with os.fdopen(number, encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")
    except FileNotFoundError:
        return [""]
    if not lines[0].encode().startswith(Journal.BEGINNING):
        raise OutputExistsError(f"{record}: not capexport's, but in its way; move it")
    return lines


@contextmanager
def naming(name: str | Path) -> Iterator[None]:
    """Add a name to an `OSError`: the system names no file when a disk is full."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(name)) from error
