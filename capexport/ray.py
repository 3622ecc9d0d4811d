"""Caption more files than one machine can, on a cluster: with Ray Data.

`caption_files` is a whole job, from folders to a folder of captions, which goes on after an
interruption. `caption_dataset` is one step of a Ray Data pipeline of your own.
"""

from __future__ import annotations

import io
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from capexport.artifact import FILE_NAME, Manifest, local_folder, sha256_of
from capexport.bulk.files import is_searched, search
from capexport.bulk.names import original_name, readable_name
from capexport.bulk.run import map_ahead
from capexport.captioner import BUNDLED_ARTIFACT, Caption, Captioner
from capexport.decoding import DecodingKeywords, changed
from capexport.errors import (
    ArtifactError,
    CapexportError,
    DeviceError,
    ImageError,
    ImageNotFoundError,
    OptionError,
    importing,
)
from capexport.families import find_family
from capexport.preprocessing import FloatArray, ImageSource

with importing("capexport.ray needs Ray Data: `pip install 'capexport[ray]'`"):
    import pyarrow as pa
    import ray
    import ray.data
    from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

    from capexport.bulk.parts import FORMATS, SCHEMA, Parts

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger("capexport")

Places: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_MAX_BYTES = 100_000_000  # of a file that comes over the network, which is read as a whole
# Files that an actor fetches at a time: an object store answers in a tenth of a second, and one
# core captions less than 300 photos in a second.
_FETCHING = 32
_LARGEST_PART, _PARTS_AN_ACTOR = 1000, 16
_RETRIES = 5  # of what a lost process did: an image that ends its process is no endless job

# Ray reports home unless this is set before it starts. What is set already stays.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@dataclass(frozen=True)
class Job:
    """What a job has come to, in files.

    Attributes:
        captioned: those that have a caption since this run.
        failed: those that cannot be read; each has its row, with an error.
        left_out: those that had a caption before.
    """

    captioned: int
    failed: int
    left_out: int


def caption_files(
    photos: Places,
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    filesystem: FileSystem | None = None,
    format: str = "parquet",
    resume: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    threads: int | None = None,
    prompt: str | None = None,
    truncated: bool = False,
    **options: Unpack[DecodingKeywords],
) -> Job:
    """Caption files into a folder of captions, on all machines of a Ray cluster, or on this one.

    Each row has a `file_name` (a path in its file system), and either a `text` with its
    `log_probability` or an `error`: an image that cannot be read stops nothing. Rows come in parts
    of up to 1,000, each of which appears in one piece; their order is not that of the files. What
    Ray runs again, because a process or a machine was lost, is there once.

    Args:
        photos: files and folders, searched in depth as `capexport caption` does: hidden files
            and what is no image are left out. Paths that every machine sees, URIs that pyarrow
            knows (`s3://bucket/photos`), or paths of `filesystem`, all of one file system.
        out: a folder for the captions, as `photos`; it is made.
        model: exported folder that every machine sees, or its id on the hub; by default the
            bundled captioner.
        filesystem: where `photos` and `out` are, for access that a URI cannot tell.
        format: "parquet", or "jsonl": a JSON object a line.
        resume: go on with what is in `out`: files that have no caption there, as those that are
            new or could not be read, are captioned, and the other rows stay.
        device, workers, threads: as of `caption_dataset`.
        prompt, truncated, options: as of `Captioner`.
    Raises:
        ImageNotFoundError: no images are there.
        OutputExistsError: there is something in `out` and `resume` is off, or it was made with
            another captioner or other options, or a later run has taken over.
        ArtifactError, OptionError: as `Captioner.load` and `Captioner.caption`.
    """
    if format not in FORMATS:
        raise OptionError(f"format must be {' or '.join(FORMATS)}, got {format!r}")
    work = _Work.checked(model, device, threads, prompt, truncated, options)
    places = [photos] if isinstance(photos, str | os.PathLike) else list(photos)
    source, names = _found(places, filesystem)
    target, folder = _located(out, filesystem)
    made_with = {"captioner": work.sha256, "format": format, "prompt": prompt, **work.options}
    parts, captioned = Parts.begin(target, folder, format, made_with, resume)
    missing = [name for name in names if name not in captioned]
    counts = [0, 0]
    if missing:
        pool = work.pool(workers)
        each = -(-len(missing) // (pool["compute"].max_size * _PARTS_AN_ACTOR))
        each = -(-min(each, _LARGEST_PART) // work.batch_size) * work.batch_size
        starts = range(0, len(missing), each)
        tables = [pa.table({"file_name": missing[start : start + each]}) for start in starts]
        written = ray.data.from_arrow(tables).map_batches(
            _PartWriter,
            fn_constructor_args=(work, source, parts),
            batch_size=each,
            batch_format="pyarrow",
            **pool,
        )
        with _plain_errors():
            for row in written.iter_rows():
                counts = [counts[0] + row["captioned"], counts[1] + row["failed"]]
    return Job(*counts, len(names) - len(missing))


def caption_dataset(
    dataset: ray.data.Dataset,
    column: str,
    model: str | os.PathLike[str] | None = None,
    *,
    filesystem: FileSystem | None = None,
    device: str = "cpu",
    workers: int | None = None,
    threads: int | None = None,
    prompt: str | None = None,
    truncated: bool = False,
    **options: Unpack[DecodingKeywords],
) -> ray.data.Dataset:
    """Add `text`, `log_probability` and `error` to the rows of a dataset.

    Args:
        dataset: nothing of it is computed before the result is asked for.
        column: the one with the images: encoded (`bytes` of `ray.data.read_binary_files`), paths,
            or uint8 arrays (`image` of `ray.data.read_images`).
        filesystem: where paths are; by default paths that every machine sees, or URIs.
        device: "cpu", or "cuda" for a GPU an actor.
        workers: how many actors caption, a captioner each; by default as many as the cluster has
            GPUs, or as its cores allow.
        threads: CPU cores of an actor; by default one (a BLIP-2's: all of a machine), and with
            GPUs those that there are for each.
        model, prompt, truncated, options: as of `caption_files`.
    Returns:
        The dataset's rows. Where an image cannot be read, `text` and `log_probability` are null.
    Raises:
        ArtifactError, OptionError: as `Captioner.load` and `Captioner.caption`; a prompt that
            doesn't suit the model is refused when the rows are asked for.
    """
    work = _Work.checked(model, device, threads, prompt, truncated, options)
    return dataset.map_batches(
        _ColumnCaptioner,
        fn_constructor_args=(work, column, filesystem),
        batch_size=8 * work.batch_size,
        batch_format="pyarrow",
        **work.pool(workers, reserve=True),
    )


@dataclass(frozen=True)
class _Work:
    """What every actor has to know."""

    model: str | None
    sha256: str
    small: bool
    batch_size: int
    device: str
    threads: int | None
    prompt: str | None
    truncated: bool
    options: dict[str, Any]

    @classmethod
    def checked(
        cls,
        model: str | os.PathLike[str] | None,
        device: str,
        threads: int | None,
        prompt: str | None,
        truncated: bool,
        options: DecodingKeywords,
    ) -> _Work:
        """Refuse what can be refused before anything starts."""
        if device not in ("cpu", "cuda"):
            raise OptionError(f"device must be cpu, or cuda for a GPU an actor, got {device!r}")
        if threads is not None and threads < 1:
            raise OptionError(f"threads must be at least 1, got {threads}")
        if (options.get("num_return_sequences") or 1) > 1:
            raise OptionError("num_return_sequences must be 1: a row has one caption")
        folder = local_folder(BUNDLED_ARTIFACT if model is None else model)
        manifest = Manifest.read(folder)
        changed(manifest.decoding.options, options)
        family = find_family(manifest.family)
        name = os.fspath(model) if model is not None else None
        if name is not None and folder == Path(name):
            name = str(folder.absolute())
        given = {key: value for key, value in options.items() if value is not None}
        return cls(
            name,
            sha256_of(folder / FILE_NAME),
            family.small,
            family.batch_size,
            device,
            threads,
            prompt,
            truncated,
            given,
        )

    def pool(self, workers: int | None, reserve: bool = False) -> dict[str, Any]:
        """How many actors there are, and what each takes; what `map_batches` calls all that.

        With `reserve` they are started one by one, as what comes before them leaves cores free.
        """
        if workers is not None and workers < 1:
            raise OptionError(f"workers must be at least 1, got {workers}")
        if not ray.is_initialized():
            ray.init()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        if self.device == "cuda":
            threads = self.threads or max(1, sum(cores) // max(1, gpus))
            count = workers or gpus
        else:
            threads = self.threads or (1 if self.small else min(cores, default=1))
            count = workers or sum(n // threads for n in cores)
        if not count:
            raise DeviceError(
                f"no machine of the cluster has a {'GPU' if self.device == 'cuda' else 'core'} "
                "free: start Ray with some, or say how many workers it will have"
            )
        started = 1 if reserve else count
        return {
            "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=count, initial_size=started),
            "num_cpus": threads,
            "num_gpus": 1 if self.device == "cuda" else None,
            "max_task_retries": _RETRIES,
        }


class _Captioning:
    """What an actor does: images through a captioner, those to come being read meanwhile."""

    def __init__(self, work: _Work, filesystem: FileSystem | None) -> None:
        threads = work.threads or 1
        self._work, self._filesystem = work, filesystem
        self._captioner = Captioner.load(work.model, device=work.device, threads=threads)
        self._captioner.truncated = work.truncated
        folder = self._captioner.folder
        if folder is None or sha256_of(folder / FILE_NAME) != work.sha256:
            raise ArtifactError(f"{folder}: another captioner on {socket.gethostname()}")
        self._reading = ThreadPoolExecutor(threads if _is_local(filesystem) else _FETCHING)

    def rows(self, images: Iterable[Any]) -> Iterator[tuple[str | None, float | None, str | None]]:
        """Text, log-probability and error of each image, in order."""
        size = self._work.batch_size
        read = map_ahead(self._reading, self._read, iter(images), 2 * size)
        while batch := list(islice(read, size)):
            pixels = [one for one in batch if not isinstance(one, str)]
            captions = iter(self._caption(np.stack(pixels)) if pixels else ())
            for one in batch:
                if isinstance(one, str):
                    yield None, None, one
                else:
                    caption = next(captions)
                    yield caption.text, caption.log_probability, None

    def _caption(self, pixels: FloatArray) -> list[Caption]:
        prompts = None if self._work.prompt is None else [self._work.prompt] * len(pixels)
        return self._captioner.caption_pixels(pixels, prompts=prompts, **self._work.options)

    def _read(self, image: Any) -> FloatArray | str:
        """Its pixels, or what is wrong with it."""
        try:
            return self._captioner.preprocess(self._source(image))
        except ImageError as error:
            return str(error)

    def _source(self, image: Any) -> ImageSource:
        if not isinstance(image, str):
            return cast(ImageSource, image)
        filesystem, path = _located(image, self._filesystem)
        return Path(path) if _is_local(filesystem) else _fetched(filesystem, path)


class _PartWriter:
    """An actor of `caption_files`: a table of names becomes a part, and a row with counts."""

    def __init__(self, work: _Work, filesystem: FileSystem, parts: Parts) -> None:
        self._captioning, self._parts = _Captioning(work, filesystem), parts

    def __call__(self, table: pa.Table) -> pa.Table:
        names = table["file_name"].to_pylist()
        rows = zip(*self._captioning.rows(map(original_name, names)), strict=True)
        part = pa.table([names, *rows], SCHEMA)
        self._parts.write(part)
        failed = len(part) - part["error"].null_count
        return pa.table({"captioned": [len(part) - failed], "failed": [failed]})


class _ColumnCaptioner:
    """An actor of `caption_dataset`."""

    def __init__(self, work: _Work, column: str, filesystem: FileSystem | None) -> None:
        self._captioning, self._column = _Captioning(work, filesystem), column

    def __call__(self, table: pa.Table) -> pa.Table:
        column = table[self._column]
        images = (column[row].as_py() for row in range(len(column)))
        rows = zip(*self._captioning.rows(images), strict=True)
        for field, values in zip(list(SCHEMA)[1:], rows, strict=True):
            table = table.append_column(field, [pa.array(values, field.type)])
        return table


class _File(io.BytesIO):
    """A file's content, and its name for errors."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def _fetched(filesystem: FileSystem, path: str) -> _File:
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


def _is_local(filesystem: FileSystem | None) -> bool:
    return isinstance(filesystem, LocalFileSystem | None)


def _located(
    place: str | os.PathLike[str], filesystem: FileSystem | None
) -> tuple[FileSystem, str]:
    """A file system, and the path there of a path or URI."""
    name = os.fspath(place)
    if filesystem is None and "://" in name:
        try:
            filesystem, name = FileSystem.from_uri(name)
        except (pa.ArrowException, OSError) as error:
            raise OptionError(f"{place}: no URI of a file system here: {error}") from error
    filesystem = filesystem or LocalFileSystem()
    return filesystem, os.path.abspath(name) if _is_local(filesystem) else name


def _found(
    places: Sequence[str | os.PathLike[str]], filesystem: FileSystem | None
) -> tuple[FileSystem, list[str]]:
    """The images in all places, and the file system that they are on."""
    located = [_located(place, filesystem) for place in places]
    if len({type(system) for system, _ in located}) != 1:
        raise OptionError("photos: name places on one file system, and at least one")
    source, paths = located[0][0], [path for _, path in located]
    if _is_local(source):
        found = search(paths, None)
        names: Iterable[str | Path] = found.paths
        problems = found.problems
        problems += [f"{n} {suffix} left out" for suffix, n in found.unreadable().items()]
    else:
        names = dict.fromkeys(name for path in paths for name in _listed(source, path))
        problems = []
    for problem in problems:
        log.warning("%s", problem)
    return source, list(map(readable_name, names))


def _listed(filesystem: FileSystem, path: str) -> list[str]:
    """The images below a folder, or the file itself, by the rules of `search`."""
    base = path.rstrip("/")
    kind = filesystem.get_file_info(base).type
    if kind == FileType.File:
        return [base]
    entries = []
    if kind == FileType.Directory:
        entries = filesystem.get_file_info(FileSelector(base, recursive=True))
    names = [entry.path for entry in entries if entry.type == FileType.File]
    names = sorted(name for name in names if is_searched(name[len(base) :]))
    if not names:
        raise ImageNotFoundError(f"{path}: no image files there that can be read")
    return names


@contextmanager
def _plain_errors() -> Iterator[None]:
    """An error of capexport's in an actor is raised as such, without Ray's account of it."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CapexportError):
            raise error.cause from None
        raise
