"""How the cost of a caption grows with the work: batch, threads, beams, length, photo and files."""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bulk import scaled
from tqdm import tqdm

from capexport.artifact import Manifest
from capexport.atomic import replace_file
from capexport.bench.cli import add_inputs, chosen_photos
from capexport.bench.report import cpu_model, load, table
from capexport.bench.sheet import new_figure, save_figure
from capexport.captioner import BUNDLED_ARTIFACT, Captioner
from capexport.cli import run_parser, teaching
from capexport.preprocessing import load_image
from capexport.sessions import available_cores

# By what grows: its values, and the unit of what is measured.
BATCHES, BEAMS, LENGTHS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 3, 5, 8), (5, 10, 15, 20, 25, 30)
MEGAPIXELS, FILES = (0.2, 1, 3, 6, 12, 24), (10, 100, 1000, 10_000)
Curve = dict[float, float]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="growth.py",
        **teaching(
            "Measure how a captioner's cost grows with batch size, threads, beams, the length of "
            "captions, the size of photos and the number of files. The values of a curve take "
            "turns, and medians count.",
            "python benchmarks/growth.py --photos photos/ --picture growth.png --markdown FILE",
            "python benchmarks/growth.py --files 10 100           # without the longest part",
        ),
    )
    parser.add_argument(
        "artifact", nargs="?", type=Path, default=BUNDLED_ARTIFACT, metavar="DIR",
        help="exported CNN-LSTM (default: the bundled captioner)",
    )  # fmt: skip
    add_inputs(parser, rounds=(5, "timed rounds, of which medians are reported"))
    parser.add_argument(
        "--files", type=int, nargs="+", default=FILES, metavar="N", help="numbers of files"
    )
    parser.add_argument("--picture", type=Path, metavar="PNG", help="also draw the curves")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables")
    return run_parser(parser, _grow, argv)


def _grow(options: argparse.Namespace) -> int:
    photos = chosen_photos(options)
    with tempfile.TemporaryDirectory() as folder:
        curves = _curves(options, photos, Path(folder))
    title = (
        f"{options.artifact.name} ({Manifest.read(options.artifact).precision}), {cpu_model()}, "
        f"{available_cores()} cores, load {load():.1f}"
    )
    parts = [title, *(f"{name}\n\n{_rows(lines)}" for name, lines in curves.items())]
    if options.markdown:
        replace_file(options.markdown, "\n\n".join(parts) + "\n")
    if options.picture:
        _draw(title, curves, options.picture)
    print("\n\n".join(parts))
    return 0


def _curves(
    options: argparse.Namespace, photos: Sequence[Path], folder: Path
) -> dict[str, dict[str, Curve]]:
    """By what the axis is, and by what the line is."""
    load_captioner = partial(Captioner.load, options.artifact)
    cores = available_cores()
    captioner = load_captioner()
    arrays = [np.asarray(load_image(photo)) for photo in photos[:64]]
    measured = partial(_in_turn, rounds=options.rounds)

    def batch(size: int, by: Captioner = captioner, **more: Any) -> Callable[[], object]:
        some = list(itertools.islice(itertools.cycle(arrays), size))
        return lambda: by.caption(some, batch_size=size, **more)

    def rate(times: Curve, count: Callable[[float], float]) -> Curve:
        return {value: count(value) / seconds for value, seconds in times.items()}

    curves: dict[str, dict[str, Curve]] = {}
    by_threads = {n: load_captioner(threads=n) for n in {1, cores}}
    curves["images a batch, captions a second"] = {
        f"{n} threads": rate(
            measured(f"{n} threads", {size: batch(size, by) for size in BATCHES}), lambda size: size
        )
        for n, by in sorted(by_threads.items())
    }
    curves["beams, milliseconds a caption"] = {
        f"batch {size}": {
            beams: 1e3 * seconds / size
            for beams, seconds in measured(
                "beams", {beams: batch(size, num_beams=beams) for beams in BEAMS}
            ).items()
        }
        for size in (1, 16)
    }
    lengths = {n: batch(1, max_tokens=n, min_tokens=n) for n in LENGTHS}
    curves["words, milliseconds a caption"] = {
        "batch 1": {n: 1e3 * seconds for n, seconds in measured("words", lengths).items()}
    }
    curves["megapixels of a JPEG, milliseconds from file to text"] = _sizes(
        load_captioner, photos[:4], folder, measured
    )
    curves.update(_files(options, photos, folder))
    return curves


def _in_turn(title: str, actions: Mapping[float, Callable[[], object]], rounds: int) -> Curve:
    """Median seconds of each, after an untimed round."""
    seconds: dict[float, list[float]] = {value: [] for value in actions}
    for number in tqdm(range(rounds + 1), title, leave=False, disable=None):
        for value, action in actions.items():
            began = time.perf_counter()
            action()
            if number:
                seconds[value].append(time.perf_counter() - began)
    return {value: statistics.median(times) for value, times in seconds.items()}


def _sizes(
    load_captioner: Callable[[], Captioner],
    photos: Sequence[Path],
    folder: Path,
    measured: Callable[[str, Mapping[float, Callable[[], object]]], Curve],
) -> dict[str, Curve]:
    """Of photos one by one, as JPEGs are decoded and whole."""
    files: dict[float, list[Path]] = {}
    for megapixels in MEGAPIXELS:
        place = folder / f"{megapixels}"
        place.mkdir()
        files[megapixels] = scaled(photos, megapixels, place)
    lines = {}
    for title, full_size in (("reduced decoding", False), ("--full-size", True)):
        captioner = load_captioner()
        captioner.full_size = full_size
        actions = {
            megapixels: partial(captioner.caption, some, batch_size=1)
            for megapixels, some in files.items()
        }
        times = measured(title, actions)
        lines[title] = {value: 1e3 * t / len(photos) for value, t in times.items()}
    return lines


def _files(
    options: argparse.Namespace, photos: Sequence[Path], folder: Path
) -> dict[str, dict[str, Curve]]:
    """`capexport caption FOLDER`, a process each."""
    seconds, memory = {}, {}
    for count in tqdm(options.files, "files", leave=False, disable=None):
        place = folder / f"{count} files"
        place.mkdir()
        for number, photo in enumerate(itertools.islice(itertools.cycle(photos), count)):
            (place / f"{number:06}{photo.suffix}").symlink_to(photo.resolve())
        command = ["caption", "-m", options.artifact, place, "--out", folder / f"{count}.jsonl"]
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", _PEAK, *map(str, command)],
            check=True,
            stderr=(folder / "said").open("w"),
        )
        seconds[count] = time.perf_counter() - began
        memory[count] = float((folder / "said").read_text().split()[-1])
    return {
        "files, seconds of the command": {"": seconds},
        "files, megabytes of memory at most": {"": memory},
    }


# The command, which then says its own peak of resident memory.
_PEAK = """
import sys
from capexport.cli import main
code = main(sys.argv[1:])
from capexport.bench.measure import peak_memory
print(peak_memory(), file=sys.stderr)
sys.exit(code)
"""


def _rows(lines: Mapping[str, Curve]) -> str:
    values = next(iter(lines.values()))
    head = ("", *(f"{value:,g}" for value in values))
    return table([head, *((name, *(f"{v:.4g}" for v in c.values())) for name, c in lines.items())])


def _draw(title: str, curves: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    figure = new_figure(14, 8)
    figure.suptitle(title)
    grid = figure.subplots(2, 3)
    for axes, (name, lines) in zip(grid.flat, curves.items(), strict=True):
        across, up = name.split(", ")
        for label, curve in lines.items():
            axes.plot(list(curve), list(curve.values()), marker="o", label=label)
        axes.set(xlabel=across, ylabel=up, ylim=(0, None))
        if across in ("files", "images a batch"):
            axes.set_xscale("log")
        if name.startswith("files, seconds"):
            axes.set(yscale="log", ylim=(None, None))
        if any(lines):
            axes.legend()
    save_figure(figure, path, dpi=90)


if __name__ == "__main__":
    sys.exit(main())
