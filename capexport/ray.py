"""Caption more files than one machine can, on a cluster: with Ray.

`caption_files` is a whole job, from folders to a folder of captions, which goes on after an
interruption. `caption_dataset` is one step of a Ray Data pipeline of your own.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from capexport.artifact import FILE_NAME, Manifest
from capexport.atomic import sha256_of
from capexport.bulk.names import original_name, shown
from capexport.bulk.run import map_ahead
from capexport.captioner import Caption, Captioner, model_folder
from capexport.decoding import DecodingKeywords, changed
from capexport.errors import (
    ArtifactError,
    CapexportError,
    DeviceError,
    ImageError,
    OptionError,
    importing,
)
from capexport.families import find_family
from capexport.preprocessing import FloatArray, ImageSpec, image_name, preprocess

with importing("capexport.ray needs Ray Data: `pip install 'capexport[ray]'`"):
    import pyarrow as pa
    import ray
    from pyarrow.fs import FileSystem, LocalFileSystem
    from ray.exceptions import RayError, RayTaskError

    from capexport.bulk.parts import FORMATS, SCHEMA, Parts
    from capexport.bulk.places import Places, fetch, list_images, locate

if TYPE_CHECKING:
    import ray.data
    from typing_extensions import Unpack

# Files that an actor fetches at a time: an object store answers in a tenth of a second, and one
# core captions less than 300 photos in a second.
_FETCHING = 32
_LARGEST_PART = 1000  # rows
_PATIENCE = 10  # seconds between two looks at whether there is a cluster at all
# How many actors for each worker may be lost in a row, with no part done in between. After that it
# isn't machines that fail, but what runs on them.
_LOSSES = 3

# Ray reports home unless this is set before it starts. What is set already stays.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@dataclass(frozen=True)
class Job:
    """What a job has done, counted in files.

    Attributes:
        captioned: files that this run has captioned.
        failed: files that cannot be read; each has a row with an error.
        left_out: files that had a caption before.
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
    `log_probability` or, where the image cannot be read, an `error`. Columns without a value are
    null; in JSON lines, missing texts are "", since readers infer a column's type from its first
    rows. Rows come in part files of up to 1,000, each of which appears complete; their order is not
    that of the files. What is done again because a process or a machine was lost appears once.

    Args:
        photos: files and folders, searched in depth as `capexport caption` does: hidden files
            and what is no image are left out. Paths that every machine sees, URIs that pyarrow
            knows (`s3://bucket/photos`), or paths of `filesystem`, all of one file system.
        out: a folder for the captions, as `photos`; it is made.
        model: exported folder that every machine sees, or its id on the hub; by default the
            bundled captioner.
        filesystem: of `photos` and `out`, pyarrow's or fsspec's, where a URI cannot say all that
            access needs, such as credentials.
        format: "parquet", or "jsonl": a JSON object a line.
        resume: go on with what is in `out`: caption only files that have no caption there, being
            new or having failed.
        device, workers, threads: as of `caption_dataset`.
        prompt, truncated, options: as of `Captioner`.
    Raises:
        ImageNotFoundError: no images are there.
        OutputExistsError: there is something in `out` and `resume` is off, or it was made with
            another captioner or other options, or a later run has taken over.
        DeviceError: no machine of the cluster has room for a worker, or none is left.
        ArtifactError, OptionError: as `Captioner.load` and `Captioner.caption`.
        ray.exceptions.ActorDiedError: workers end again and again, and caption nothing meanwhile.
    """
    if format not in FORMATS:
        raise OptionError(f"format must be {' or '.join(FORMATS)}, got {format!r}")
    work = _Work.checked(model, device, workers, threads, prompt, truncated, options)
    places = [photos] if isinstance(photos, str | os.PathLike) else list(photos)
    source, names = list_images(places, filesystem)
    target, folder = locate(out, filesystem)
    made_with = {"captioner": work.sha256, "format": format, "prompt": prompt, **work.options}
    parts, there = Parts.begin(target, folder, format, made_with, resume)
    missing = [name for name in names if name not in there]
    captioned, failed = _write_parts(work, source, parts, missing) if missing else (0, 0)
    return Job(captioned, failed, len(names) - len(missing))


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
            uint8 arrays (`image` of `ray.data.read_images`), or structs of `bytes` and `path`, as
            data sets of Hugging Face have them.
        filesystem: where paths are; by default paths that every machine sees, or URIs.
        device: "cpu", or "cuda" for a GPU for each actor.
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
    work = _Work.checked(model, device, workers, threads, prompt, truncated, options)
    return dataset.map_batches(
        _ColumnCaptioner,
        fn_constructor_args=(work, column, filesystem),
        batch_size=8 * work.batch_size,
        batch_format="pyarrow",
        # The first alone from the start on: what comes before needs cores, too.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=work.workers, initial_size=1),
        **work.resources,
    )


@dataclass(frozen=True)
class _Work:
    """What every actor has to know: the captioner, and what to ask of it.

    Attributes:
        model: what `Captioner.load` takes; its manifest has the hash `sha256`.
        workers, threads: how many actors there are, and how many cores each has.
    """

    model: str | None
    sha256: str
    batch_size: int
    device: str
    workers: int
    threads: int
    prompt: str | None
    truncated: bool
    options: dict[str, Any]

    @classmethod
    def checked(
        cls,
        model: str | os.PathLike[str] | None,
        device: str,
        workers: int | None,
        threads: int | None,
        prompt: str | None,
        truncated: bool,
        options: DecodingKeywords,
    ) -> _Work:
        """Refuse what can be refused before anything starts."""
        if device not in ("cpu", "cuda"):
            raise OptionError(f"device must be cpu, or cuda (a GPU for each actor), got {device!r}")
        for name, number in (("workers", workers), ("threads", threads)):
            if number is not None and number < 1:
                raise OptionError(f"{name} must be at least 1, got {number}")
        if (options.get("num_return_sequences") or 1) > 1:
            raise OptionError("num_return_sequences must be 1: a row has one caption")
        folder = model_folder(model)
        manifest = Manifest.read(folder)
        changed(manifest.decoding.options, options)
        family = find_family(manifest.family)
        if model is not None:
            model = str(folder.absolute()) if folder == Path(model) else os.fspath(model)
        return cls(
            model,
            sha256_of(folder / FILE_NAME),
            family.batch_size,
            device,
            *_actors(device, workers, threads, family.small),
            prompt,
            truncated,
            {name: value for name, value in options.items() if value is not None},
        )

    @property
    def resources(self) -> dict[str, Any]:
        """What Ray reserves for an actor. With a GPU comes a core."""
        return {"num_gpus": 1} if self.device == "cuda" else {"num_cpus": self.threads}


def _actors(device: str, workers: int | None, threads: int | None, small: bool) -> tuple[int, int]:
    """How many actors there will be, and how many cores each gets: as given, or else as many as
    the cluster has room for. `small`: whether one core suits the captioner best.

    Raises:
        DeviceError: the cluster has room for none.
    """
    if not ray.is_initialized():
        ray.init()
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(machine.get("CPU", 0)) for machine in machines if machine.get("CPU", 0) >= 1]
    room = int(sum(machine.get("GPU", 0) for machine in machines))
    if device == "cuda":  # machines without a GPU lend it no cores
        cores_per_gpu = [
            machine.get("CPU", 0) // machine["GPU"] for machine in machines if machine.get("GPU")
        ]
        threads = threads or max(1, int(min(cores_per_gpu, default=1)))
    else:
        threads = threads or (1 if small else min(cores, default=1))
        room = sum(count // threads for count in cores)
    if not (workers or room):
        wanted = "a GPU" if device == "cuda" else f"{threads} cores"
        raise DeviceError(
            f"no machine of the cluster has {wanted}; workers=N waits for N of them to join it"
        )
    return workers or room, threads


class _Captioning:
    """What an actor does: it captions images, and reads the next ones meanwhile."""

    def __init__(self, work: _Work, filesystem: FileSystem | None) -> None:
        self._work = work
        self._captioner = Captioner.load(work.model, device=work.device, threads=work.threads)
        folder = self._captioner.folder
        if folder is None or sha256_of(folder / FILE_NAME) != work.sha256:
            raise ArtifactError(f"{folder}: another captioner on {socket.gethostname()}")
        self._read = partial(
            _read, spec=self._captioner.image, truncated=work.truncated, filesystem=filesystem
        )
        local = isinstance(filesystem, LocalFileSystem)
        self._readers = ThreadPoolExecutor(work.threads if local else _FETCHING)

    def rows(
        self, images: Iterable[Any], careful: bool
    ) -> Iterator[tuple[str | None, float | None, str | None]]:
        """Text, log-probability and error of each image, in order.

        Args:
            careful: read them in a separate process. An actor that had these images was lost, and
                one of them may have crashed it, since decoders are written in C.
        """
        size = self._work.batch_size
        read: Iterator[FloatArray | str]
        if careful:
            read = self._read_apart(images)
        else:
            read = map_ahead(self._readers, self._read, iter(images), 2 * size)
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

    def _read_apart(self, images: Iterable[Any]) -> Iterator[FloatArray | str]:
        apart: ProcessPoolExecutor | None = None
        for image in images:
            apart = apart or ProcessPoolExecutor(1, get_context("spawn"))
            try:
                read = apart.submit(self._read, image).result()
            except BrokenProcessPool:
                apart = None
                name = image if isinstance(image, str) else image_name(image)
                read = shown(f"{name}: ends the process that reads it")
            yield read
        if apart:  # Ray ends an actor's processes without a word, and Python complains
            apart.shutdown()


def _read(
    image: Any, spec: ImageSpec, truncated: bool, filesystem: FileSystem | None
) -> FloatArray | str:
    """The image's float32 (3, crop, crop), or what is wrong with it."""
    try:
        if isinstance(image, str):
            source, path = locate(image, filesystem)
            image = Path(path) if isinstance(source, LocalFileSystem) else fetch(source, path)
        return preprocess(image, spec, truncated=truncated)
    except (ImageError, OptionError) as error:
        return shown(str(error))


class _PartWriter:
    """An actor of `caption_files`: names become a part."""

    def __init__(self, work: _Work, filesystem: FileSystem, parts: Parts) -> None:
        self._work, self._filesystem, self._parts = work, filesystem, parts

    def load(self) -> None:
        """Load the captioner; in `__init__`, an error would lose its type."""
        self._captioning = _Captioning(self._work, self._filesystem)

    def write(self, names: Sequence[str], careful: bool) -> tuple[int, int]:
        """Caption files into a part; how many have a caption now, and how many cannot be read."""
        rows = self._captioning.rows(map(original_name, names), careful)
        part = pa.table([names, *zip(*rows, strict=True)], SCHEMA)
        self._parts.write(part)
        captioned = part["error"].null_count
        return captioned, len(part) - captioned


def _write_parts(
    work: _Work, source: FileSystem, parts: Parts, names: Sequence[str]
) -> tuple[int, int]:
    """Caption files into parts; how many have a caption now, and how many cannot be read.

    Each actor has one part in hand. If it is lost, a new one is started, and whichever is free
    first takes the part.
    """
    begin = ray.remote(_PartWriter).options(**work.resources).remote
    cut = _cut(names, work.workers, work.batch_size)
    lost: list[Sequence[str]] = []
    working: dict[ray.ObjectRef, tuple[Any, Sequence[str]]] = {}

    def start() -> None:
        actor = begin(work, source, parts)
        working[actor.load.remote()] = actor, []

    captioned = failed = losses = 0
    bar = tqdm(total=len(names), unit="image", disable=None)
    try:
        for _ in range(min(work.workers, -(-len(names) // work.batch_size))):
            start()
        while captioned + failed < len(names):
            done = _next(working)
            actor, part = working.pop(done)
            try:
                result = ray.get(done)
            except RayTaskError as error:
                if isinstance(error.cause, CapexportError | OSError):
                    raise error.cause from None  # without Ray's account of it
                raise
            except RayError:
                losses += 1
                if losses > _LOSSES * work.workers:
                    raise
                ray.kill(actor)  # which may only be out of reach
                lost += [part] * bool(part)
                start()
                continue
            if part:
                captioned, failed, losses = captioned + result[0], failed + result[1], 0
                bar.update(len(part))
            careful = bool(lost)
            if part := lost.pop() if lost else next(cut, []):
                working[actor.write.remote(part, careful)] = actor, part
    finally:
        bar.close()
        for actor, _ in working.values():
            ray.kill(actor)
    return captioned, failed


def _next(working: Iterable[ray.ObjectRef]) -> ray.ObjectRef:
    """The first that is done.

    Raises:
        DeviceError: the cluster has no machine left.
    """
    while not (done := ray.wait(list(working), timeout=_PATIENCE)[0]):
        if not any(node["Alive"] for node in ray.nodes()):  # else Ray waits for ever
            raise DeviceError("no machine of the Ray cluster is left; resume=True in another one")
    return done[0]


def _cut(names: Sequence[str], workers: int, batch_size: int) -> Iterator[Sequence[str]]:
    """Parts that become smaller, so that in the end no actor works long while all others wait."""
    start = 0
    while start < len(names):
        size = min((len(names) - start) // (4 * workers), _LARGEST_PART)
        size = max(size // batch_size, 1) * batch_size
        yield names[start : start + size]
        start += size


class _ColumnCaptioner:
    """An actor of `caption_dataset`."""

    def __init__(self, work: _Work, column: str, filesystem: FileSystem | None) -> None:
        self._captioning, self._column = _Captioning(work, filesystem), column
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's, of its own doing
            self._careful = ray.get_runtime_context().was_current_actor_reconstructed

    def __call__(self, table: pa.Table) -> pa.Table:
        if self._column not in table.column_names:
            has = ", ".join(table.column_names)
            raise OptionError(f"the dataset has no column {self._column!r}, but {has}")
        if taken := set(SCHEMA.names[1:]).intersection(table.column_names):
            raise OptionError(f"the dataset has a column {min(taken)!r} already: rename_columns")
        column = table[self._column]
        images = (_image_in(column[row]) for row in range(len(column)))
        rows = zip(*self._captioning.rows(images, self._careful), strict=True)
        for field, values in zip(list(SCHEMA)[1:], rows, strict=True):
            table = table.append_column(field, [pa.array(values, field.type)])
        return table


def _image_in(cell: pa.Scalar) -> Any:
    """What `preprocess` takes, or a path, from a cell of any of `caption_dataset`'s columns."""
    if hasattr(cell, "to_numpy"):  # Arrow's own tensors, of which `as_py` makes flat lists
        return cell.to_numpy()
    image = cell.as_py()
    return image.get("bytes") or image.get("path") if isinstance(image, dict) else image
