"""`capexport caption FOLDER` over many photos: how fast, and in how much memory."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import operator
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from capexport.artifact import Manifest
from capexport.beam import beam_search
from capexport.bench.cli import add_inputs, add_outputs, chosen_photos, write_outputs
from capexport.bench.measure import fastest
from capexport.bench.report import environment, load, table
from capexport.bulk.files import find_images
from capexport.bulk.outputs import FileOutput
from capexport.bulk.run import caption_files, open_captioner
from capexport.captioner import Captioner
from capexport.cli import run_parser, teaching
from capexport.cli.lstm import bundled_checkpoint
from capexport.decoding import greedy
from capexport.errors import ArtifactError
from capexport.export.pairs import open_pair
from capexport.families import find_family
from capexport.preprocessing import FloatArray, ImageSpec, load_image
from capexport.sessions import available_cores

# What the encoder and the decoder are timed on alone, again and again: more than caches hold.
READY = 64
# Worker threads spin for a moment after a call; the pause lets them sleep.
PAUSE = 0.1
SAMPLE = 0.2  # seconds between two looks at a process's memory
CAPEXPORT, TORCH = "capexport caption", "PyTorch and DataLoader"
READING, ENCODER, DECODER = "reading, preprocessing alone", "encoder alone", "decoder alone"
SHARED = "the three stages' times, added up"
TOGETHER = "encoder alone, all threads on a batch"
STAGES = (READING, ENCODER, DECODER)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit code, 2 where it cannot be run."""
    return run_parser(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bulk.py",
        **teaching(
            "Measure captioning many files with a CNN-LSTM on the CPU: in images a second against "
            "PyTorch with as many DataLoader workers, and against each stage alone, in turn and "
            "in one process; then in peak memory, for folders of two sizes. The last line of "
            "standard output is JSON.",
            "python benchmarks/bulk.py --photos flickr8k/Images",
            "python benchmarks/bulk.py --photos photos/ --artifact artifacts/demo --threads 2",
            "python benchmarks/bulk.py --photos photos/ --rounds 3 --files 0    # no memory",
            "python benchmarks/bulk.py --megapixels 12 --count 64 --batch-size 8 --files 0",
        ),
    )
    parser.add_argument(
        "--megapixels", type=float, metavar="N", help="scale the photos, to JPEGs of this size"
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="CNN-LSTM checkpoint (default: the bundled one)"
    )
    parser.add_argument(
        "--artifact", type=Path, metavar="DIR", help="its export (default: made for this run)"
    )
    add_inputs(
        parser,
        count=(256, "photos a round, rounded up to whole batches"),
        rounds=(5, "timed rounds, of which medians are reported"),
        threads=(None, "CPU threads"),
        batch_size=(32, "batch size of both sides"),
    )
    parser.add_argument(
        "--files",
        type=int,
        nargs="+",
        default=[1000, 10_000],
        metavar="N",
        help="folder sizes to compare memory at; 0: don't (default: 1000 10000)",
    )
    add_outputs(parser)
    return parser


def _benchmark(options: argparse.Namespace) -> int:
    threads = options.threads or available_cores()
    if min(options.count, options.rounds, options.batch_size, threads) < 1:
        raise ValueError("--count, --rounds, --batch-size and --threads must be at least 1")
    photos = chosen_photos(options)
    pair = open_pair(options.checkpoint or str(bundled_checkpoint()), "cpu", threads)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        artifact = options.artifact or folder / "artifact"
        if options.artifact is None:
            pair.export(artifact)
        manifest = Manifest.read(artifact)
        small = find_family(manifest.family).small
        if not small or manifest.provenance.checkpoint_sha256 != pair.sha256:
            raise ArtifactError(f"{artifact}: was not exported from {pair.folder}; export it again")
        if options.megapixels:
            photos = scaled(photos[: options.count], options.megapixels, folder)
        count = -(-options.count // options.batch_size) * options.batch_size
        chosen = list(itertools.islice(itertools.cycle(photos), count))
        variants = pair.variants()
        tried = [np.asarray(load_image(path)) for path in chosen[: options.batch_size]]
        fast = fastest(variants, tried, options.batch_size, {})
        contenders = {
            TORCH: torch_path(variants[fast], chosen, threads, options.batch_size),
            **onnx_paths(artifact, chosen, threads, options.batch_size, folder),
        }
        result: dict[str, Any] = {
            "model": pair.title,
            "variant": fast,
            "megapixels": options.megapixels,
            "photos": len(photos),
            "count": count,
            "rounds": options.rounds,
            "batch_size": options.batch_size,
            "environment": dataclasses.asdict(environment(threads)),
            **speed(contenders, count, options.rounds, threads),
            "load": load(),
        }
        sizes = sorted(size for size in options.files if size)
        result["memory"] = memory(artifact, photos, sizes, threads, options.batch_size, folder)
    write_outputs(options, render(result), result)
    return 0


def scaled(paths: Sequence[Path], megapixels: float, folder: Path) -> list[Path]:
    """Copies of the photos as JPEGs with so many pixels, in the quality that cameras save in."""
    copies = []
    for number, path in enumerate(tqdm(paths, "scaling", leave=False, disable=None)):
        image = load_image(path)
        factor = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        size = round(image.width * factor), round(image.height * factor)
        copies.append(folder / f"{number}.jpg")
        image.resize(size, Image.Resampling.BICUBIC).save(copies[-1], quality=92)
    return copies


class Photos:
    """A PyTorch `Dataset` of photos, opened by Pillow and prepared by torchvision."""

    def __init__(self, paths: Sequence[Path], spec: ImageSpec) -> None:
        from torchvision import transforms

        self._paths = paths
        self._prepare = transforms.Compose(
            [
                transforms.Resize(spec.resize if spec.keep_aspect else (spec.resize, spec.resize)),
                transforms.CenterCrop(spec.crop),
                transforms.ToTensor(),
                transforms.Normalize(spec.mean, spec.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self._paths[index]) as image:
            return self._prepare(image.convert("RGB"))


def torch_path(
    captioner: Any, paths: Sequence[Path], workers: int, batch_size: int
) -> Callable[[], None]:
    """The loader's workers start in the first, untimed round and then wait for the next one."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        Photos(paths, captioner.image),  # type: ignore[arg-type]
        batch_size,
        num_workers=workers,
        persistent_workers=True,
    )

    def run() -> None:
        for pixels in loader:
            captioner.caption_pixels(pixels.numpy())

    return run


def onnx_paths(
    artifact: Path, paths: Sequence[Path], threads: int, batch_size: int, folder: Path
) -> dict[str, Callable[[], None]]:
    """The bulk path of the command line, and its stages alone on as many threads."""
    captioner = open_captioner(artifact, threads=threads)
    together = Captioner.load(artifact, threads=threads)
    names = itertools.count()
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]

    def whole() -> None:
        output = FileOutput(folder / f"{next(names)}.jsonl", "jsonl", paths, "", resume=False)
        for _, errors in caption_files(
            captioner, paths, output, batch_size=batch_size, workers=threads
        ):
            if errors:
                raise errors[0]

    def read(batch: Sequence[Path]) -> FloatArray:
        side = captioner.image.crop
        pixels = np.empty((len(batch), 3, side, side), np.float32)
        for path, row in zip(batch, pixels, strict=True):
            captioner.preprocess(path, row)
        return pixels

    each = partial(_each, count=len(batches), workers=threads)
    decode: Any = beam_search if captioner.options.num_beams > 1 else greedy
    ready = [read(batch) for batch in batches[: max(1, READY // batch_size)]]
    features = [captioner.encoder(pixels) for pixels in ready]
    return {
        CAPEXPORT: whole,
        READING: each(read, batches),
        ENCODER: each(captioner.encoder, ready),
        TOGETHER: each(together.encoder, ready, workers=1),
        DECODER: each(lambda item: decode(captioner.decoder, item, captioner.options), features),
    }


def _each(
    function: Callable[[Any], Any], items: Sequence[Any], count: int, workers: int
) -> Callable[[], None]:
    """Calls `function` with `count` of the items, taken in rotation, on as many threads."""
    pool = ThreadPoolExecutor(workers)

    def one(item: Any) -> None:
        function(item)

    def run() -> None:
        for _ in pool.map(one, itertools.islice(itertools.cycle(items), count)):
            pass

    return run


def speed(
    contenders: Mapping[str, Callable[[], None]], count: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Run the contenders in turn, after an untimed round of each.

    Returns:
        Medians: images a second, milliseconds of CPU time an image (of this process), and
        ratios, which are taken within each round.
    """
    order = list(contenders)
    rates: dict[str, list[float]] = {name: [] for name in order}
    cpu: dict[str, list[float]] = {name: [] for name in order}
    for number in tqdm(range(rounds + 1), "rounds", disable=None):
        for name in order:
            time.sleep(PAUSE)
            began, busy = time.perf_counter(), time.process_time()
            contenders[name]()
            if number:
                rates[name].append(count / (time.perf_counter() - began))
                cpu[name].append(1e3 * (time.process_time() - busy) / count)
        order.reverse()
    middle = {name: statistics.median(values) for name, values in rates.items()}
    milliseconds = {name: statistics.median(values) for name, values in cpu.items()}
    encoder = max(ENCODER, TOGETHER, key=middle.__getitem__)
    slowest = min(READING, encoder, DECODER, key=middle.__getitem__)

    # Each stage alone fills all cores; where stages share them, their times add up.
    rates[SHARED] = [
        1 / sum(1 / rate for rate in row)
        for row in zip(*(rates[stage] for stage in STAGES), strict=True)
    ]
    milliseconds[SHARED] = sum(milliseconds[stage] for stage in STAGES)
    middle[SHARED] = statistics.median(rates[SHARED])

    def ratio(name: str, other: str) -> float:
        ratios: list[float] = list(map(operator.truediv, rates[name], rates[other]))
        return statistics.median(ratios)

    return {
        "images_per_second": middle,
        "cpu_milliseconds": milliseconds,
        "slowest_stage": slowest,
        "ratios": {
            "to_torch": ratio(CAPEXPORT, TORCH),
            "to_slowest_stage": ratio(CAPEXPORT, slowest),
            "to_shared_cores": ratio(CAPEXPORT, SHARED),
            "shared_cores_to_slowest_stage": ratio(SHARED, slowest),
            "to_cpu_time": middle[CAPEXPORT] * milliseconds[SHARED] / threads / 1e3,
        },
    }


def memory(
    artifact: Path,
    photos: Sequence[Path],
    sizes: Sequence[int],
    threads: int,
    batch_size: int,
    folder: Path,
) -> dict[str, Any]:
    """Resident memory of `capexport caption` on folders of so many links to the photos.

    Returns:
        By number of files `peak_megabytes` (resident) and `private_megabytes` (without pages of
        files, which the system takes back as it likes; the median but for the first third of a
        run, when memory pools fill). Kilobytes for every 1,000 files: `kilobytes_within_a_run`, a
        line through the same part of the largest folder's run; `kilobytes_between_folders`, by
        the medians; `kilobytes_of_the_list`, what the files' paths take of that.
    Raises:
        RuntimeError: captioning failed.
    """
    peaks: dict[int, float] = {}
    medians: dict[int, float] = {}
    slopes: dict[str, float] = {}
    for size in tqdm(sizes, "folders", disable=None):
        files = folder / f"{size} files"
        files.mkdir()
        for number, photo in enumerate(itertools.islice(itertools.cycle(photos), size)):
            (files / f"{number:06}{photo.suffix}").symlink_to(photo.resolve())
        command = [sys.executable, "-m", "capexport", "caption", "-m", artifact, files]
        command += ["--format", "jsonl", "--out", folder / f"{size} files.jsonl"]
        command += ["--threads", threads, "--batch-size", batch_size]
        resident = resident_megabytes([str(word) for word in command], folder / "errors")
        peaks[size] = float(resident[:, 0].max())
        steady = resident[len(resident) // 3 :, 1]
        medians[size] = float(np.median(steady))
        if size == sizes[-1] and len(steady) > 1:
            each_sample = float(np.polyfit(range(len(steady)), steady, 1)[0])
            slopes["kilobytes_within_a_run"] = 1e6 * each_sample * len(resident) / size
            slopes["kilobytes_of_the_list"] = _list_kilobytes(files) / size * 1e3
    if len(sizes) > 1:
        growth = (medians[sizes[-1]] - medians[sizes[0]]) / (sizes[-1] - sizes[0])
        slopes["kilobytes_between_folders"] = 1e6 * growth
    return {"peak_megabytes": peaks, "private_megabytes": medians, **slopes}


def _list_kilobytes(folder: Path) -> float:
    tracemalloc.start()
    files = find_images([str(folder)], sys.stdin)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del files
    return held / 1e3


def resident_megabytes(command: Sequence[str], errors: Path) -> NDArray[np.float64]:
    """What a process holds, resident and private, time and again until it ends: (samples, 2)."""
    samples = []
    with errors.open("w+") as stream:
        with psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=stream) as process:
            while process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    info = process.memory_info()
                    samples.append((info.rss, info.rss - getattr(info, "shared", 0)))
                time.sleep(SAMPLE)
        if process.returncode:
            stream.seek(0)
            raise RuntimeError(f"captioning failed: {stream.read().strip()[-500:]}")
    return np.asarray(samples) / 1e6


def render(result: dict[str, Any]) -> str:
    rates, cpu, ratios = (result[k] for k in ("images_per_second", "cpu_milliseconds", "ratios"))
    machine = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows: list[tuple[str, ...]] = [("", "images/s", "CPU ms an image")]
    for name, rate in rates.items():
        # The loader's workers are processes of their own.
        rows.append((name, f"{rate:.0f}", "" if name == TORCH else f"{cpu[name]:.2f}"))
    lines = [
        f"{result['model']} on cpu ({machine['cpu']}, {machine['threads']} threads; {versions})",
        f"{result['count']} photos a round"
        + (f" of {result['megapixels']:g} megapixels" if result["megapixels"] else "")
        + f", {result['rounds']} rounds in turn, batches of {result['batch_size']}; PyTorch: "
        f"{result['variant']}; load {result['load']:.1f}",
        "",
        table(rows),
        "",
        f"{CAPEXPORT} against PyTorch: {ratios['to_torch']:.2f}x; against the slowest stage "
        f"({result['slowest_stage']}): {ratios['to_slowest_stage']:.2f}",
        "A stage alone has all cores to itself; a pipeline's stages share them, and their times "
        f"add up, which leaves {ratios['shared_cores_to_slowest_stage']:.2f} of the slowest.",
        f"Of what the cores allow, {CAPEXPORT} reaches {ratios['to_shared_cores']:.2f} by the "
        f"stages' times, and {ratios['to_cpu_time']:.2f} by their CPU time (other processes' load "
        "lowers this one).",
    ]
    if peaks := result["memory"]["peak_megabytes"]:
        medians = result["memory"]["private_megabytes"]
        described = ", ".join(
            f"{peak:.0f} MB ({medians[size]:.0f} private) for {size} files"
            for size, peak in peaks.items()
        )
        slopes = [
            f"{result['memory'][key]:.0f} KB {where}"
            for key, where in (
                ("kilobytes_within_a_run", "within the largest run"),
                ("kilobytes_between_folders", "between folders"),
                ("kilobytes_of_the_list", "of the list of files"),
            )
            if key in result["memory"]
        ]
        lines += ["", f"peak memory: {described}"]
        lines += [f"growth for every 1,000 files: {'; '.join(slopes)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
