"""`capexport.ray.caption_files` against `capexport caption`, on this machine; on paper, what that
makes of 100 million photos."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from capexport.bench.cli import add_inputs, add_outputs, chosen_photos, write_outputs
from capexport.bench.report import table
from capexport.cli import run_parser, teaching
from capexport.sessions import available_cores

SAMPLE = 2.0  # seconds between two looks at the processes' memory, which takes 50 ms of Ray's
MANY = 100_000_000  # photos, on paper
COMMAND, RAY = "capexport caption", "capexport.ray"
JOB = """
import sys
import time
import tracemalloc
import ray
from capexport.bulk.places import list_images
from capexport.ray import caption_files
ray.init("local")
print(caption_files(sys.argv[1], sys.argv[2]))
ended = time.perf_counter()
seconds, peaks = [], []
for _ in range(3):  # the first imports pandas, and any may enlarge Python's table of names
    began = time.perf_counter()
    assert caption_files(sys.argv[1], sys.argv[2], resume=True).captioned == 0
    seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    found = list_images([sys.argv[1]], None)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
print(time.perf_counter() - ended, min(seconds), min(peaks))
"""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit code, 2 where it cannot be run."""
    return run_parser(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cluster.py",
        **teaching(
            "Time captioning many files with Ray, on this machine, against the command line: "
            "whole processes in turn, their start included, and the memory of all of them. Then "
            "reckon what that means for 100 million photos. The last line of standard output is "
            "JSON.",
            "python benchmarks/cluster.py --photos photos/ --markdown benchmarks/cluster.md",
            "python benchmarks/cluster.py --count 500 1000 --rounds 2",
        ),
    )
    parser.add_argument(
        "--count",
        type=int,
        nargs="+",
        default=[2000, 10_000],
        metavar="N",
        help="files in a folder; of several, the last is what speed is told of (default: 2000 "
        "10000)",
    )
    add_inputs(parser, rounds=(1, "rounds of both sides in turn"))
    add_outputs(parser)
    return parser


def _benchmark(options: argparse.Namespace) -> int:
    if min(*options.count, options.rounds) < 1:
        raise ValueError("--count and --rounds must be at least 1")
    photos = chosen_photos(options)
    size = statistics.mean(photo.stat().st_size for photo in photos)
    result: dict[str, Any] = {
        "cores": available_cores(),
        "photos": len(photos),
        "photo_kilobytes": size / 1e3,
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count, number in itertools.product(options.count, range(options.rounds)):
            files = _links(photos, count, folder / f"{count} files")
            contenders = [COMMAND, RAY] if number % 2 == 0 else [RAY, COMMAND]
            for contender in contenders:
                run = measured(contender, files, folder / f"out-{len(result['runs'])}")
                result["runs"].append({"contender": contender, "count": count, **run})
                print(f"{contender}, {count} files: {json.dumps(run)}", file=sys.stderr)
    result["paper"] = on_paper(result)
    write_outputs(options, render(result), result)
    return 0


def _links(photos: Sequence[Path], count: int, folder: Path) -> Path:
    if not folder.exists():
        folder.mkdir()
        for number, photo in enumerate(itertools.islice(itertools.cycle(photos), count)):
            (folder / f"{number:06}{photo.suffix}").symlink_to(photo.resolve())
    return folder


def measured(contender: str, files: Path, out: Path) -> dict[str, Any]:
    """One run, as a process with children.

    Returns:
        Its `seconds`, the load average before it, and the `peak_megabytes` of all its processes,
        pages that they share counted once. Of Ray also how long going on with a finished output
        takes, the bytes of the list of files, and those of the output.
    Raises:
        RuntimeError: captioning failed.
    """
    code = [JOB] if contender == RAY else []
    command = [sys.executable, "-c", *code, files, out] if code else [
        sys.executable, "-m", "capexport", "caption", files, "--scores", "--out",
        out.with_suffix(".jsonl"), "--quiet",
    ]  # fmt: skip
    load, began, peak = os.getloadavg()[0], time.perf_counter(), 0.0
    errors = out.with_suffix(".errors")
    with errors.open("w") as stream, subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=stream, text=True
    ) as process:  # fmt: skip
        while process.poll() is None:
            peak = max(peak, _megabytes(psutil.Process(process.pid)))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE)
        output = process.stdout.read() if process.stdout else ""
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"captioning failed: {errors.read_text()[-500:]}")
    run = {"seconds": seconds, "load": load, "peak_megabytes": peak}
    if contender == RAY:
        afterwards, resumed, listed = map(float, output.split()[-3:])
        written = sum(part.stat().st_size for part in out.iterdir())
        run["seconds"] -= afterwards
        run |= {"resume_seconds": resumed, "list_bytes": listed, "output_bytes": written}
    return run


def _megabytes(process: psutil.Process) -> float:
    total = 0.0
    with contextlib.suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss / 1e6
    return total


def _seconds(runs: list[dict[str, Any]], contender: str, count: int) -> float:
    """The median of a contender's runs over so many files."""
    wanted = (contender, count)
    return statistics.median(
        run["seconds"] for run in runs if (run["contender"], run["count"]) == wanted
    )


def on_paper(result: dict[str, Any]) -> dict[str, float]:
    """What the last count's figures make of `MANY` photos, if nothing but captioning counts."""
    count = result["runs"][-1]["count"]
    rates = {name: count / _seconds(result["runs"], name, count) for name in (COMMAND, RAY)}
    last = [run for run in result["runs"] if run["contender"] == RAY][-1]
    each = rates[RAY] / result["cores"]
    return {
        "ratio": rates[RAY] / rates[COMMAND],
        "files_a_second_a_core": each,
        "core_hours": MANY / each / 3600,
        "cores_for_a_day": MANY / each / 86400,
        "files_a_second": MANY / 86400,
        "megabytes_a_second": MANY / 86400 * result["photo_kilobytes"] / 1e3,
        "gigabytes_of_the_list": last["list_bytes"] / count * MANY / 1e9,
        "minutes_of_resuming": last["resume_seconds"] / count * MANY / 60,
        "gigabytes_of_captions": last["output_bytes"] / count * MANY / 1e9,
    }


def _without_start(runs: list[dict[str, Any]]) -> str:
    """The ratio from the smallest count to the largest, where starting no longer counts."""
    few, many = (bound(run["count"] for run in runs) for bound in (min, max))
    if few == many:
        return ""
    command, ray = (
        _seconds(runs, name, many) - _seconds(runs, name, few) for name in (COMMAND, RAY)
    )
    return (
        f"; from {few:,} to {many:,} files, where the start no longer counts, {command / ray:.2f}"
    )


def render(result: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        ("", "files", "seconds", "files/s", "load before", "peak memory (MB)")
    ]
    for run in result["runs"]:
        rate = run["count"] / run["seconds"]
        rows.append(
            (run["contender"], f"{run['count']}", f"{run['seconds']:.1f}", f"{rate:.1f}",
             f"{run['load']:.1f}", f"{run['peak_megabytes']:.0f}")
        )  # fmt: skip
    paper = result["paper"]
    lines = [
        f"{result['cores']} cores, {result['photos']} photos in rotation, "
        f"{result['photo_kilobytes']:.0f} KB each; whole processes in turn, "
        "their start included, Ray's own processes counted",
        "",
        table(rows),
        "",
        f"{RAY} against {COMMAND}: {paper['ratio']:.2f}{_without_start(result['runs'])}",
        "",
        f"On paper, {MANY:,} such photos: {paper['files_a_second_a_core']:.1f} files a second a "
        f"core are {paper['core_hours']:,.0f} core hours, or {paper['cores_for_a_day']:,.0f} "
        f"cores for a day, which read {paper['files_a_second']:,.0f} files, or "
        f"{paper['megabytes_a_second']:,.0f} MB, a second. The list of "
        f"files takes {paper['gigabytes_of_the_list']:.0f} GB where the job is started, the "
        f"captions {paper['gigabytes_of_captions']:.0f} GB, and going on with them "
        f"{paper['minutes_of_resuming']:.0f} minutes before the first photo.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
