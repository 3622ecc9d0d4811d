"""Caption many files: find them, write what people's tools read, survive interruption.

Results first go line by line into a journal beside the output; the output itself appears in one
piece at the end. Side-car files need no journal: each is whole or not there.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TextIO, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from capexport.artifact import Manifest, replace_file, replacing_file
from capexport.captioner import Captioner, open_artifact
from capexport.errors import ImageError, ImageNotFoundError, OutputExistsError
from capexport.preprocessing import FloatArray
from capexport.vocabulary import Vocabulary

FORMATS = ("text", "jsonl", "csv", "coco", "txt")

# A file's name in the results, and its caption.
Row: TypeAlias = tuple[str, str]
# Files, their pixels, and the errors of those that cannot be read; then files and captions.
_Batch: TypeAlias = tuple[list[Path], FloatArray, list[ImageError]]
_Captioned: TypeAlias = tuple[list[tuple[Path, str]], list[ImageError]]

_In = TypeVar("_In")
_Out = TypeVar("_Out")


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


def open_captioner(model: Path, device: str = "cpu", threads: int | None = None) -> Captioner:
    """`Captioner.load`, for `caption_files` with as many workers as `threads` says.

    On a CPU a CNN-LSTM's graphs get one thread each: a core that takes a batch of its own through
    all stages never waits for another one. A larger model takes one batch at a time, with all
    threads: of its activations and caches, one batch's is enough to hold.
    """
    manifest = Manifest.read(model)
    alone = device == "cpu" and manifest.family == "cnn-lstm"
    return open_artifact(model, manifest, device, 1 if alone else threads)


def default_batch_size(captioner: Captioner) -> int:
    """As many as a decoder's step takes in its stride; a large model's caches also need room."""
    return 32 if isinstance(captioner.vocabulary, Vocabulary) else 8


def caption_files(
    captioner: Captioner,
    paths: Sequence[Path],
    output: Output,
    *,
    batch_size: int,
    workers: int = 1,
    prompt: str | None = None,
    changes: Mapping[str, float] | None = None,
) -> Iterator[tuple[int, list[ImageError]]]:
    """Caption `paths` into `output`, in their order, batch by batch.

    `workers` threads read a batch each and, where the captioner is of one thread, caption it too;
    a captioner of several threads takes their batches in turn, the next ones being read
    meanwhile. However many files there are, no more than `2 * workers` batches are read and not
    yet written. `prompt` and `changes` are as for `Captioner`.

    Yields:
        After each batch, how many files it took, and the errors of those that cannot be read.
    """

    def read(batch: Sequence[Path]) -> _Batch:
        side = captioner.image.crop
        pixels = np.empty((len(batch), 3, side, side), np.float32)
        readable: list[Path] = []
        errors: list[ImageError] = []
        for path in batch:
            try:
                captioner.preprocess(path, pixels[len(readable)])
                readable.append(path)
            except ImageError as error:
                errors.append(error)
        return readable, pixels[: len(readable)], errors

    def caption(batch: _Batch) -> _Captioned:
        readable, pixels, errors = batch
        if not readable:
            return [], errors
        prompts = None if prompt is None else [prompt] * len(readable)
        captions = captioner.caption_pixels(pixels, prompts=prompts, changes=changes)
        return [(path, c.text) for path, c in zip(readable, captions, strict=True)], errors

    starts = range(0, len(paths), batch_size)
    batches = (paths[start : start + batch_size] for start in starts)
    pool = ThreadPoolExecutor(workers)
    try:
        if captioner.threads == 1:
            results = _ahead(pool, lambda batch: caption(read(batch)), batches, 2 * workers)
        else:
            results = map(caption, _ahead(pool, read, batches, 2 * workers))
        for start, (rows, errors) in zip(starts, results, strict=True):
            if rows:
                output.write(rows)
            yield min(batch_size, len(paths) - start), errors
    finally:
        pool.shutdown(cancel_futures=True)
    output.finish()


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[_In], _Out], items: Iterator[_In], ahead: int
) -> Iterator[_Out]:
    """`pool.map`, in order, but with no more than `ahead` results begun and not yet taken."""
    waiting: deque[Future[_Out]] = deque()
    for item in items:
        if len(waiting) == ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(function, item))
    while waiting:
        yield waiting.popleft().result()
