"""The pipeline: many files through one captioner, with a batch on each core or one on all."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from capexport.artifact import Manifest
from capexport.bulk.outputs import Captioned, Output
from capexport.captioner import Caption, Captioner, open_artifact
from capexport.decoding import DecodingKeywords
from capexport.errors import ImageError
from capexport.families import find_family
from capexport.preprocessing import FloatArray
from capexport.sessions import Target, targets

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Files, their pixels, and the errors of those that cannot be read; then files and captions.
_Batch: TypeAlias = tuple[list[Path], FloatArray, list[ImageError]]
_Rows: TypeAlias = tuple[Sequence[Captioned], list[ImageError]]

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def open_captioner(model: Path, device: str = "cpu", threads: int | None = None) -> Captioner:
    """`Captioner.load` for `caption_files`, with as many workers as `threads` says.

    On a device with `core_batches`, the graphs of a small model get one thread each: a core that
    takes a batch of its own through all stages never waits for another core. A large model takes
    one batch at a time, with all threads.
    """
    manifest = Manifest.read(model)
    small = find_family(manifest.family).small

    def suited(target: Target) -> Target:
        alone = small and target.device.core_batches
        return dataclasses.replace(target, threads=1) if alone else target

    return open_artifact(model, manifest, *map(suited, targets(device, threads)))


def caption_files(
    captioner: Captioner,
    paths: Sequence[Path],
    output: Output,
    *,
    batch_size: int,
    workers: int = 1,
    prompt: str | None = None,
    prefix: str = "",
    suffix: str = "",
    columns: int = 2,
    content: Mapping[Path, bytes] | None = None,
    **options: Unpack[DecodingKeywords],
) -> Iterator[tuple[int, list[ImageError]]]:
    """Caption `paths` into `output`, in their order, batch by batch.

    Each of the `workers` threads reads a batch. A captioner with one thread also captions it there;
    a captioner with several threads captions the batches in turn, while the next ones are read. At
    any time, no more than `2 * workers` batches are read and not yet written.

    Args:
        prompt, options: as for `Captioner.caption`.
        prefix, suffix: what to put before and after every caption, such as a style's name.
        columns: of a row: 3 for the caption's log-probability too, 4 for its alternatives as well.
        content: encoded images that are not files, by the path that stands for them.
    Yields:
        After each batch, how many files it had, and the errors of those that cannot be read.
    """

    def caption(batch: _Batch) -> _Rows:
        readable, pixels, errors = batch
        if not readable:
            return [], errors
        prompts = None if prompt is None else [prompt] * len(readable)
        captions = captioner.caption_pixels(pixels, prompts=prompts, **options)
        row = partial(_row, prefix=prefix, suffix=suffix, columns=columns)
        return list(map(row, readable, captions)), errors

    read = partial(_read, captioner, content or {})
    starts = range(0, len(paths), batch_size)
    batches = (paths[start : start + batch_size] for start in starts)
    pool = ThreadPoolExecutor(workers)
    try:
        if captioner.threads == 1:
            results = map_ahead(pool, lambda batch: caption(read(batch)), batches, 2 * workers)
        else:
            results = map(caption, map_ahead(pool, read, batches, 2 * workers))
        for start, (rows, errors) in zip(starts, results, strict=True):
            if rows:
                output.write(rows)
            yield min(batch_size, len(paths) - start), errors
    finally:
        pool.shutdown(cancel_futures=True)
    output.finish()


def _row(path: Path, caption: Caption, prefix: str, suffix: str, columns: int) -> Captioned:
    text, number = f"{prefix}{caption.text}{suffix}", caption.log_probability
    if columns == 2:
        return path, text
    if columns == 3:
        return path, text, number
    alternatives = [
        {"text": f"{prefix}{one.text}{suffix}", "log_probability": one.log_probability,
         "score": one.score}
        for one in caption.alternatives
    ]  # fmt: skip
    return path, text, number, alternatives


def _read(captioner: Captioner, content: Mapping[Path, bytes], batch: Sequence[Path]) -> _Batch:
    side = captioner.image.crop
    pixels = np.empty((len(batch), 3, side, side), np.float32)
    readable: list[Path] = []
    errors: list[ImageError] = []
    for path in batch:
        try:
            captioner.preprocess(content.get(path, path), pixels[len(readable)])
            readable.append(path)
        except ImageError as error:
            errors.append(error)
    return readable, pixels[: len(readable)], errors


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[_In], _Out], items: Iterator[_In], ahead: int
) -> Iterator[_Out]:
    """`pool.map`, in order, but no more than `ahead` items are begun and not yet taken."""
    waiting: deque[Future[_Out]] = deque()
    for item in items:
        if len(waiting) == ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(function, item))
    while waiting:
        yield waiting.popleft().result()
