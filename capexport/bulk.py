"""Caption many files: find them, write what people's tools read, survive interruption.

Results first go line by line into a journal beside the output; the output itself appears in one
piece at the end. Side-car files need no journal: each is whole or not there.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TextIO, TypeAlias

import numpy as np
from PIL import Image

from capexport.artifact import replace_file
from capexport.captioner import Captioner
from capexport.errors import ImageError, ImageNotFoundError, OutputExistsError
from capexport.preprocessing import FloatArray

FORMATS = ("text", "jsonl", "csv", "coco", "txt")
_CSV_HEADER = "file_name,text\n"

# A file's name in the results, and its caption.
Row: TypeAlias = tuple[str, str]


def find_images(arguments: Sequence[str], stdin: TextIO) -> list[Path]:
    """The files behind paths, folders (searched in depth), glob patterns and `-` (a list, one
    path a line, on `stdin`), each once. A file that doesn't exist stays in: it is reported later.

    Raises:
        ImageNotFoundError: a folder, pattern or list yields no image at all.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            paths = [Path(line.rstrip("\r\n")) for line in stdin if line.strip()]
        elif path.is_dir():
            Image.init()
            paths = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in Image.EXTENSION and file.is_file()
            )
        elif not path.exists() and glob.has_magic(argument):
            paths = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
        else:
            paths = [path]
        if not paths:
            raise ImageNotFoundError(f"{argument}: no image files there")
        found += paths
    return list({os.path.abspath(path): path for path in found}.values())


def coco_image_id(name: str) -> int | str:
    """The number in `COCO_val2014_000000000042.jpg` or `42.jpg`; any other name without suffix."""
    stem = Path(name).stem
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", stem)
    return int(number[1]) if number else stem


def format_rows(rows: Sequence[Row], style: str) -> str:
    """The text of a `text`, `jsonl`, `csv` or `coco` file."""
    if style == "jsonl":
        return "".join(
            json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n"
            for name, text in rows
        )
    if style == "coco":
        results = [{"image_id": coco_image_id(name), "caption": text} for name, text in rows]
        return json.dumps(results, ensure_ascii=False, indent=1) + "\n"
    table = io.StringIO()
    if style == "csv":
        csv.writer(table, lineterminator="\n").writerows(rows)
    else:
        table.writelines(f"{name}\t{text}\n" for name, text in rows)
    return table.getvalue()


class Output(Protocol):
    """Where captions go."""

    def done(self, path: Path) -> bool:
        """Was this image captioned by the run that is being resumed?"""

    def write(self, rows: Sequence[tuple[Path, str]]) -> None:
        """Keep some images' captions, safe from now on."""

    def finish(self) -> None:
        """All images are done."""


class StreamOutput:
    """Rows to standard output, as they come; a COCO list at the end."""

    def __init__(self, style: str, stream: TextIO, paths: Sequence[Path]) -> None:
        if style == "coco":
            _refuse_clashing_ids(paths)
        self._style, self._stream = style, stream
        self._rows: list[Row] = []
        if style == "csv":
            stream.write(_CSV_HEADER)

    def done(self, path: Path) -> bool:
        return False

    def write(self, rows: Sequence[tuple[Path, str]]) -> None:
        named = [(_readable_name(path), text) for path, text in rows]
        if self._style == "coco":
            self._rows += named
        else:
            self._stream.write(format_rows(named, self._style))
            self._stream.flush()

    def finish(self) -> None:
        if self._style == "coco":
            self._stream.write(format_rows(self._rows, "coco"))


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
        header = json.dumps({"captioner": key}) + "\n"
        lines = _whole_lines(self._journal) if self._journal.exists() else []
        if lines and lines[0] != header:
            raise OutputExistsError(
                f"{self._journal}: was begun with another model or other options; remove it first"
            )
        try:
            self._rows: dict[str, str] = dict(json.loads(line) for line in lines[1:])
        except (ValueError, TypeError) as error:
            raise OutputExistsError(f"{self._journal}: damaged ({error}); remove it") from error
        out.parent.mkdir(parents=True, exist_ok=True)
        # Cut off a line that the interruption tore before anything is appended behind it.
        replace_file(self._journal, "".join(lines or [header]))
        self._stream = self._journal.open("a", encoding="utf-8", newline="")

    def _name(self, path: Path) -> str:
        absolute = os.path.abspath(path)
        below = absolute.startswith(os.path.join(self._folder, ""))
        return _readable_name(os.path.relpath(absolute, self._folder) if below else absolute)

    def done(self, path: Path) -> bool:
        return self._name(path) in self._rows

    def write(self, rows: Sequence[tuple[Path, str]]) -> None:
        for path, text in rows:
            row = (self._name(path), text)
            self._rows.update([row])
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._stream.flush()

    def finish(self) -> None:
        self._stream.close()
        text = format_rows(list(self._rows.items()), self._style)
        replace_file(self._out, (_CSV_HEADER if self._style == "csv" else "") + text)
        self._journal.unlink()


def _whole_lines(journal: Path) -> list[str]:
    with journal.open(encoding="utf-8", errors="replace", newline="") as file:
        return [line for line in file if line.endswith("\n")]


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


def caption_files(
    captioner: Captioner,
    paths: Sequence[Path],
    output: Output,
    *,
    batch_size: int,
    prompt: str | None = None,
    changes: Mapping[str, float] | None = None,
) -> Iterator[tuple[int, list[ImageError]]]:
    """Caption `paths` into `output`, the next batch being read while one goes through the graphs.

    `prompt` and `changes` are as for `Captioner`.

    Yields:
        After each batch, how many files it took, and the errors of those that cannot be read.
    """

    def read(path: Path) -> FloatArray | ImageError:
        try:
            return captioner.preprocess(path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(captioner.threads) as pool:
        batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
        following = [pool.submit(read, path) for path in batches[0]] if batches else []
        for index, batch in enumerate(batches):
            current, following = following, []
            if index + 1 < len(batches):
                following = [pool.submit(read, path) for path in batches[index + 1]]
            images = [future.result() for future in current]
            readable = [
                (path, image)
                for path, image in zip(batch, images, strict=True)
                if not isinstance(image, ImageError)
            ]
            if readable:
                pixels = np.stack([image for _, image in readable])
                prompts = None if prompt is None else [prompt] * len(readable)
                captions = captioner.caption_pixels(pixels, prompts=prompts, changes=changes)
                output.write(
                    [(path, c.text) for (path, _), c in zip(readable, captions, strict=True)]
                )
            yield len(batch), [image for image in images if isinstance(image, ImageError)]
    output.finish()
