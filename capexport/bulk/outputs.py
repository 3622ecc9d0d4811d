"""What people's tools read, written so that an interruption loses nothing.

Results first go line by line into a journal beside the output; the output itself appears in one
piece at the end. Side-car files need no journal: each is whole or not there.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TextIO, TypeAlias

from capexport.artifact import replace_file, replacing_file
from capexport.errors import OutputExistsError

FORMATS = ("text", "jsonl", "csv", "coco", "txt")

# A file's name in the results, and its caption.
Row: TypeAlias = tuple[str, str]


def coco_image_id(name: str) -> int | str:
    """The number in `COCO_val2014_000000000042.jpg` or `42.jpg`; any other name without suffix."""
    stem = Path(name).stem
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", stem)
    return int(number[1]) if number else stem


class RowWriter:
    """Writes a `text`, `jsonl`, `csv` or `coco` file, row by row."""

    def __init__(self, stream: TextIO, style: str) -> None:
        self._stream, self._style = stream, style
        self._csv = csv.writer(stream, lineterminator="\n")
        self._separator = ""
        if style == "csv":
            self._csv.writerow(["file_name", "text"])
        elif style == "coco":
            stream.write("[\n")

    def write(self, row: Row) -> None:
        name, text = row
        if self._style == "csv":
            self._csv.writerow(row)
        elif self._style == "coco":
            result = {"image_id": coco_image_id(name), "caption": text}
            self._stream.write(self._separator + json.dumps(result, ensure_ascii=False))
            self._separator = ",\n"
        elif self._style == "jsonl":
            document = {"file_name": name, "text": text}
            self._stream.write(json.dumps(document, ensure_ascii=False) + "\n")
        else:
            self._stream.write(f"{name}\t{text}\n")

    def finish(self) -> None:
        if self._style == "coco":
            self._stream.write("\n]\n")


class Output(Protocol):
    """Where captions go."""

    def done(self, path: Path) -> bool:
        """Was this image captioned by the run that is being resumed?"""

    def write(self, rows: Sequence[tuple[Path, str]]) -> None:
        """Keep some images' captions, safe from now on."""

    def finish(self) -> None:
        """All images are done."""


class StreamOutput:
    """Rows to standard output, as they come."""

    def __init__(self, style: str, stream: TextIO, paths: Sequence[Path]) -> None:
        if style == "coco":
            _refuse_clashing_ids(paths)
        self._stream = stream
        self._rows = RowWriter(stream, style)

    def done(self, path: Path) -> bool:
        return False

    def write(self, rows: Sequence[tuple[Path, str]]) -> None:
        for path, text in rows:
            self._rows.write((_readable_name(path), text))
        self._stream.flush()

    def finish(self) -> None:
        self._rows.finish()


class SideCars:
    """One UTF-8 text file beside each image, as image-tagging and LoRA tools expect it."""

    def __init__(self, paths: Sequence[Path], resume: bool) -> None:
        _refuse_clashes(paths, lambda path: str(path.with_suffix(".txt")), "side-car file")
        existing = [path for path in paths if self.done(path)]
        if existing and not resume:
            raise OutputExistsError(
                f"{existing[0].with_suffix('.txt')}: already there, as are {len(existing)} of "
                f"{len(paths)} side-car files; keep them with --resume, or remove them"
            )

    def done(self, path: Path) -> bool:
        return path.with_suffix(".txt").exists()

    def write(self, rows: Sequence[tuple[Path, str]]) -> None:
        for path, text in rows:
            replace_file(path.with_suffix(".txt"), text + "\n")

    def finish(self) -> None:
        pass


def journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


class FileOutput:
    """One file, written when all is done; until then its rows live in `<out>.journal`.

    Images below the file's folder are named relative to it, as `metadata.jsonl` wants, others by
    their absolute path.
    """

    def __init__(
        self, out: Path, style: str, paths: Sequence[Path], key: str, resume: bool
    ) -> None:
        self._out, self._style = out, style
        self._folder = os.path.abspath(out.parent)
        self._journal = journal_of(out)
        if style == "coco":
            _refuse_clashing_ids(paths)
        if out.exists() and not (resume and self._journal.exists()):
            raise OutputExistsError(f"{out}: already there and complete; remove it or pick another")
        if self._journal.exists() and not resume:
            raise OutputExistsError(
                f"{self._journal}: left by an interrupted run; go on with --resume, or remove it"
            )
        self._header = json.dumps({"captioner": key}) + "\n"
        # Only what an interrupted run has left is held in memory, not what this one adds.
        try:
            self._done = {name for name, _ in self._journalled()} if resume else set()
        except (ValueError, TypeError) as error:
            raise OutputExistsError(f"{self._journal}: damaged ({error}); remove it") from error
        out.parent.mkdir(parents=True, exist_ok=True)
        if self._journal.exists():
            _cut_torn_line(self._journal)
        self._stream = self._journal.open("a", encoding="utf-8", newline="")
        if self._stream.tell() == 0:
            self._stream.write(self._header)

    def _journalled(self) -> Iterator[Row]:
        """The rows that the journal holds, but for one that an interruption tore."""
        if not self._journal.exists():
            return
        with self._journal.open(encoding="utf-8", errors="replace", newline="") as file:
            for number, line in enumerate(file):
                if number and line.endswith("\n"):
                    name, text = json.loads(line)
                    yield name, text
                elif line.endswith("\n") and line != self._header:
                    raise OutputExistsError(
                        f"{self._journal}: was begun with another model or other options; remove "
                        "it first"
                    )

    def _name(self, path: Path) -> str:
        absolute = os.path.abspath(path)
        below = absolute.startswith(os.path.join(self._folder, ""))
        return _readable_name(os.path.relpath(absolute, self._folder) if below else absolute)

    def done(self, path: Path) -> bool:
        return self._name(path) in self._done

    def write(self, rows: Sequence[tuple[Path, str]]) -> None:
        for path, text in rows:
            row = (self._name(path), text)
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._stream.flush()

    def finish(self) -> None:
        self._stream.close()
        with replacing_file(self._out) as file:
            writer = RowWriter(file, self._style)
            for row in self._journalled():
                writer.write(row)
            writer.finish()
        self._journal.unlink()


def _cut_torn_line(journal: Path) -> None:
    """Drop what an interruption wrote of a last line, before anything is appended behind it."""
    with journal.open("r+b") as file:
        end = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(end)


def _readable_name(path: Path | str) -> str:
    """File names may hold bytes that are no UTF-8; results may not."""
    return os.fsencode(path).decode("utf-8", "replace")


def _refuse_clashes(paths: Sequence[Path], key: Callable[[Path], str], what: str) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(key(path), path)
        if other is not path:
            raise OutputExistsError(
                f"{other} and {path} would share the {what} {key(path)}: rename one"
            )


def _refuse_clashing_ids(paths: Sequence[Path]) -> None:
    _refuse_clashes(paths, lambda path: str(coco_image_id(path.name)), "COCO image id")
