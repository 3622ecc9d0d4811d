"""Outputs that people's tools read, written so that an interruption loses nothing.

Results first go line by line into a journal beside the output; the output itself appears in one
piece at the end. Side-car files need no journal: each is either complete or not there.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeAlias

from capexport.atomic import lock, remove_dead_drafts, replacing_file
from capexport.bulk.files import STDIN, file_type
from capexport.bulk.journal import Journal, journal_of, naming, read_record, record_of
from capexport.bulk.names import original_name, readable_name
from capexport.bulk.rows import Row, RowWriter, coco_image_id, read_rows, to_json
from capexport.errors import OptionError, OutputExistsError

FORMATS = ("text", "jsonl", "csv", "coco", "txt")
_LONGEST = 255  # bytes of a file's name, on nearly all systems

# A file, and what follows its name in a `Row`.
Captioned: TypeAlias = (
    tuple[Path, str] | tuple[Path, str, float] | tuple[Path, str, float, list[Any]]
)


class Output(Protocol):
    """Where captions go."""

    def done(self, path: Path) -> bool:
        """Is there a caption of this image already?"""

    def write(self, rows: Sequence[Captioned]) -> None:
        """Store captions, so that they are safe from now on."""

    def finish(self) -> None:
        """All images are done."""

    def close(self) -> None:
        """Release what is held, whether all images are done or not."""


class StreamOutput:
    """Rows to standard output, as they come."""

    def __init__(
        self, format: str, stream: TextIO, paths: Sequence[Path], columns: int = 2
    ) -> None:
        if format == "coco":
            _refuse_clashing_ids(paths)
        self._stream = stream
        with naming("standard output"):
            self._rows = RowWriter(stream, format, columns)

    def done(self, path: Path) -> bool:
        return False

    def write(self, rows: Sequence[Captioned]) -> None:
        with naming("standard output"):
            for path, *rest in rows:
                self._rows.write((readable_name(path), *rest))
            self._stream.flush()

    def finish(self) -> None:
        with naming("standard output"):
            self._rows.finish()
            self._stream.flush()

    def close(self) -> None:
        pass


class SideCars:
    """One UTF-8 text file for each image, as image-tagging and LoRA tools expect it.

    The folders that side-cars go to are locked (the first 64, since a process may open only a few
    hundred files), so that a second run notices. No file is left behind, so nothing says with which
    options side-cars were made.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        resume: bool,
        *,
        overwrite: bool = False,
        target: Callable[[Path], Path] = lambda path: path.with_suffix(".txt"),
    ) -> None:
        """`target` names the side-car of an image; it may lie in a folder to be made."""
        self._target, self._overwrite = target, overwrite
        real: dict[Path, str] = {}

        def place(path: Path) -> str:
            """One name for one file, however its folder is spelled."""
            if path.parent not in real:
                real[path.parent] = os.path.realpath(path.parent)
            return os.path.normcase(os.path.join(real[path.parent], path.name))

        _refuse_clashes(paths, lambda path: place(target(path)), "side-car file")
        images = set(map(place, paths)) if overwrite else set()
        if clash := next((path for path in paths if place(target(path)) in images), None):
            raise OptionError(f"{clash}: its side-car file would replace an image")
        long = (p for p in paths if len(os.fsencode(target(p).name)) > _LONGEST and file_type(p))
        if path := next(long, None):
            raise OptionError(f"{path}: the name of its side-car file is too long; rename it")
        folders = {target(path).parent: path.parent for path in paths}
        for folder, beside in folders.items():
            if folder != beside:
                folder.mkdir(parents=True, exist_ok=True)
        self._locks = _lock_folders(sorted({os.path.realpath(folder) for folder in folders})[:64])
        existing = [path for path in paths if self._exists(path)]
        if existing and not (resume or overwrite):
            self.close()
            raise OutputExistsError(
                f"{target(existing[0])}: already there, as are {len(existing)} of {len(paths)} "
                "side-car files; --skip-existing keeps them, --overwrite replaces them"
            )

    def _exists(self, path: Path) -> bool:
        return os.path.lexists(self._target(path))

    def done(self, path: Path) -> bool:
        return not self._overwrite and self._exists(path)

    def write(self, rows: Sequence[Captioned]) -> None:
        for path, text, *_ in rows:
            if self.done(path):
                raise OutputExistsError(f"{self._target(path)}: was made while this run was on")
            with replacing_file(self._target(path)) as file:
                file.write(text + "\n")

    def finish(self) -> None:
        self.close()

    def close(self) -> None:
        while self._locks:
            os.close(self._locks.pop())


def _lock_folders(folders: Sequence[str]) -> list[int]:
    """Lock the folders that exist, and remove what killed runs left there; return descriptors."""
    opened = []
    for folder in folders:
        with suppress(OSError):  # as where folders cannot be opened
            opened.append((folder, os.open(folder, os.O_RDONLY)))
    for folder, number in opened:
        if lock(number) is False:
            for _, other in opened:
                os.close(other)
            raise OutputExistsError(f"{folder}: another run is writing side-car files there")
        with suppress(OSError):
            remove_dead_drafts(Path(folder))
    return [number for _, number in opened]


def refuse_existing(out: Path, accepted: bool) -> None:
    """Refuse an output file that is there already, unless the run accepts it.

    Raises:
        OutputExistsError: there is something at `out`, unless a file there is `accepted`.
    """
    if out.is_dir():
        raise OutputExistsError(f"{out}: a folder; --out takes the name of a file")
    if os.path.lexists(out) and not (accepted and out.is_file()):
        raise OutputExistsError(
            f"{out}: already there; --resume adds what is missing, --overwrite makes anew"
        )


class FileOutput:
    """One file, written when all is done; until then its rows live in `<out>.journal`.

    Images below the file's folder are named relative to it, as `metadata.jsonl` wants, others by
    their absolute path. A resumed run gives what a new run would, in the same order, but does not
    caption again what is in the journal or in the finished file.
    """

    def __init__(
        self,
        out: Path,
        format: str,
        paths: Sequence[Path],
        key: str,
        resume: bool,
        *,
        overwrite: bool = False,
        columns: int = 2,
    ) -> None:
        """`key` says what else captions depend on; a run can only be resumed with the same key."""
        self._out, self._format, self._columns = out, format, columns
        self._paths = paths
        self._folder = os.path.abspath(out.parent)
        if format == "coco":
            _refuse_clashing_ids(paths)
        refuse_existing(out, resume or overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        made_with = {"captioner": key, "format": format, "scores": columns > 2}
        self._journal = Journal(journal_of(out), made_with, resume, overwrite)
        begun = self._journal.holds_rows
        try:
            refuse_existing(out, resume or overwrite)  # now that nobody else makes it
            read_record(record_of(out))
            remove_dead_drafts(out.parent)
            # Only what is kept is held in memory, and only where it is.
            self._kept = self._keep() if resume else {}
        except BaseException:
            self._journal.close(keep=begun)  # what was added comes from the finished file
            raise
        self._added = self._journal.size()

    def _keep(self) -> dict[str, int]:
        """Where the rows begin that stay: those of images that are wanted now and still exist."""
        rows = self._journal.scan()
        if self._out.exists() and not self._journal.begun_anew:
            for row in self._finished_rows():
                if row[0] not in rows:
                    rows[row[0]] = self._journal.add([row])
        named = ((self._name(path), path) for path in self._paths)
        kept = {name: rows[name] for name, path in named if name in rows and file_type(path)}
        others = [n for n in rows.keys() - kept.keys() if file_type(self._path(n))]
        if others:
            raise OutputExistsError(
                f"{self._out}: holds captions of {len(others)} images that are there but not among "
                f"those named now, as {min(others)}: name them too, or pick another --out"
            )
        return kept

    def _finished_rows(self) -> Iterator[Row]:
        header, *names = read_record(record_of(self._out))
        if header.encode() + b"\n" != self._journal.header:
            raise OutputExistsError(
                f"{self._out}: was made with another model or other options, or not by capexport; "
                "--overwrite makes it anew"
            )
        readable = [json.loads(name) for name in names if name]
        with self._out.open(encoding="utf-8-sig", newline="") as file:
            try:
                ids = {coco_image_id(name): name for name in readable}
                yield from read_rows(file, self._format, self._columns, ids)
            except (ValueError, LookupError, TypeError, csv.Error, RecursionError) as error:
                raise OutputExistsError(
                    f"{self._out}: was edited so that its rows cannot be read ({error}); move it "
                    "away, or make it anew with --overwrite"
                ) from error

    def _name(self, path: Path) -> str:
        if path == STDIN:
            return str(STDIN)
        absolute = os.path.abspath(path)
        below = absolute.startswith(os.path.join(self._folder, ""))
        name = os.path.relpath(absolute, self._folder) if below else absolute
        return readable_name(Path(name).as_posix())

    def _path(self, name: str) -> Path:
        return Path(self._folder, original_name(name))

    def done(self, path: Path) -> bool:
        return self._name(path) in self._kept

    def write(self, rows: Sequence[Captioned]) -> None:
        self._journal.add([(self._name(path), *rest) for path, *rest in rows])

    def finish(self) -> None:
        if not self._journal.is_there and os.path.lexists(self._out):
            raise OutputExistsError(
                f"{self._journal.path}: was removed during the run; {self._out} stays as it is"
            )
        # The record is replaced first: an output without one could not be resumed.
        with replacing_file(self._out) as file, replacing_file(record_of(self._out)) as record:
            record.write(self._journal.header.decode())
            file.write("\ufeff" if self._format == "csv" else "")  # tells Excel that this is UTF-8
            writer = RowWriter(file, self._format, self._columns)
            names = map(self._name, self._paths)
            for row in self._journal.rows(names, self._kept, self._added):
                writer.write(row)
                if self._format == "coco":
                    record.write(to_json(row[0]) + "\n")
            writer.finish()
        self._journal.close(keep=False)

    def close(self) -> None:
        self._journal.close(keep=True)


def _refuse_clashes(paths: Sequence[Path], key: Callable[[Path], str], what: str) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(key(path), path)
        if other is not path:
            raise OutputExistsError(
                f"{other} and {path} would share the {what} {key(path)}: rename one"
            )


def _refuse_clashing_ids(paths: Sequence[Path]) -> None:
    _refuse_clashes(
        paths, lambda path: str(coco_image_id(readable_name(path.name))), "COCO image id"
    )
