"""Timing captioners in turn, so that both meet the same moments of a busy machine."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from capexport.bench.results import STAGES, Footprint, PathResult, Run, Statistics
from capexport.captioner import Caption, Captioner
from capexport.decoding import DecodingKeywords
from capexport.export.pairs import AnyCaptioner, Photo, Variants, open_pair
from capexport.export.parity import token_agreement
from capexport.sessions import Graph, Target

_TURN = 5  # batches
# Seconds of untimed batches at the beginning of each turn: caches and threads are the other
# captioner's until then, and cores that were idle take a moment to come up to speed.
_WARM_UP = 0.05
# Both runtimes' worker threads keep spinning for a moment after a call; the pause lets them sleep,
# so that neither is timed against the other's.
_PAUSE = 0.03


class Clock:
    """Counts the seconds that graphs spend running."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def timed(*arguments: Any, **more: Any) -> dict[str, Any]:
            began = time.perf_counter()
            values = run(*arguments, **more)
            self.seconds += time.perf_counter() - began
            return values

        return timed


@dataclass(frozen=True)
class ClockedTarget(Target):
    """Opens graphs with a clock in each, but for the one that images go through."""

    clock: Clock = field(default_factory=Clock)
    image_graph: str = ""

    def open(self, path: Path, **how: Any) -> Graph:
        graph = super().open(path, **how)
        if path.name != self.image_graph:
            graph.run = self.clock.timed(graph.run)  # type: ignore[method-assign]
        return graph


class _Times:
    """What one captioner's batches took, and their captions."""

    def __init__(
        self, captioner: AnyCaptioner, options: DecodingKeywords, clock: Clock | None
    ) -> None:
        self._captioner, self._options, self._clock = captioner, options, clock
        self.milliseconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.captions: list[Caption] = []
        self.outside: list[float] = []

    def warm_up(self, batches: Sequence[list[Photo]]) -> None:
        time.sleep(_PAUSE)
        began = time.perf_counter()
        for batch in itertools.cycle(batches):
            self._captioner.caption(batch, batch_size=len(batch), **self._options)
            if time.perf_counter() - began > _WARM_UP:
                break

    def time(self, batch: list[Photo]) -> None:
        before = self._clock.seconds if self._clock else 0.0
        began = time.perf_counter()
        captions = self._captioner.caption(batch, batch_size=len(batch), **self._options)
        total = time.perf_counter() - began
        self.captions += captions
        timing = captions[0].timing
        if self._clock:
            decoding = total - timing.preprocess - timing.encode
            self.outside.append(1 - (self._clock.seconds - before) / decoding)
        for stage in STAGES:
            spent = total if stage == "total" else getattr(timing, stage)
            self.milliseconds[stage].append(1e3 * spent)

    def summary(self, batch_size: int, wanted: Sequence[Caption]) -> PathResult:
        statistics = {stage: _statistics(values) for stage, values in self.milliseconds.items()}
        lengths = [len(caption.tokens) + 1 for caption in self.captions]  # + 1: the end token
        starts = range(0, len(lengths), batch_size)
        longest = [max(lengths[start : start + batch_size]) for start in starts]
        tokens_a_batch = sum(lengths) / len(starts)
        return PathResult(
            milliseconds=statistics,
            steps=float(np.mean(longest)),
            captions_per_second=1e3 * batch_size / statistics["total"].p50,
            tokens_per_second=1e3 * tokens_a_batch / statistics["decode"].p50,
            identical_captions=_identical(wanted, self.captions),
            identical_tokens=token_agreement(wanted, self.captions),
            outside_graphs=float(np.median(self.outside)) if self.outside else None,
        )


def alternate(
    captioners: Mapping[str, AnyCaptioner],
    photos: Sequence[Photo],
    batch_size: int,
    repeats: int,
    clocks: Mapping[str, Clock] | None = None,
    options: DecodingKeywords | None = None,
) -> Run:
    """Caption the same batches of decoded photos with each captioner, in turns of a few batches.

    Args:
        captioners: the first is what the captions of the others are compared to.
        photos: uint8 (height, width, 3) each; they are cycled through.
        repeats: batches to time, after a whole untimed turn of each captioner.
        clocks: of captioners whose graphs they have opened.
        options: how captions are decoded.
    """
    stream = itertools.cycle(photos)
    batches = [list(itertools.islice(stream, batch_size)) for _ in range(repeats)]
    turns = [batches[:_TURN], *(batches[i : i + _TURN] for i in range(0, repeats, _TURN))]
    clocks, own = clocks or {}, options or {}
    times = {name: _Times(each, own, clocks.get(name)) for name, each in captioners.items()}
    order = list(times.values())
    title = f"batch {batch_size}"
    for number, turn in enumerate(tqdm(turns, title, leave=False, disable=None)):
        for each in order:
            each.warm_up(turn)
            for batch in turn if number else ():
                each.time(batch)
        order.reverse()
    wanted = next(iter(times.values())).captions
    return Run(batch_size, {name: each.summary(batch_size, wanted) for name, each in times.items()})


def _identical(wanted: Sequence[Caption], got: Sequence[Caption]) -> float:
    return float(np.mean([a.tokens == b.tokens for a, b in zip(wanted, got, strict=True)]))


def _statistics(values: Sequence[float]) -> Statistics:
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Statistics(float(np.mean(values)), p50, p90, p99)


def fastest(
    variants: Variants, photos: Sequence[Photo], batch_size: int, options: DecodingKeywords
) -> str:
    """Which variant is quickest, by the median of a few batches."""
    if len(variants) == 1:
        return next(iter(variants))
    paths = alternate(variants, photos, batch_size, repeats=7, options=options).paths
    return min(variants, key=lambda name: paths[name].milliseconds["total"].p50)


def memory_bandwidth(device: str = "cpu") -> float:
    """Bytes a second that PyTorch's threads, or a GPU, read from memory, the median of a few
    times: the floor of a decoding step whose weights stay in no cache."""
    import torch

    block = torch.ones(2**28, device=device)
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        block.sum().item()  # which waits for a GPU
        seconds.append(time.perf_counter() - began)
    return block.nbytes / float(np.median(seconds))


def footprint(
    kind: str,
    model: Path,
    photos: Sequence[Path],
    batch_size: int,
    device: str,
    threads: int,
    options: DecodingKeywords,
) -> Footprint:
    """Load a captioner in a process of its own and caption one batch there.

    Raises:
        RuntimeError: that process failed.
    """
    decoding = json.dumps(options)
    arguments = [kind, str(model), str(batch_size), device, str(threads), decoding]
    arguments += map(str, photos)
    outcome = subprocess.run(
        [sys.executable, "-m", __spec__.name, *arguments], capture_output=True, text=True
    )
    if outcome.returncode:
        raise RuntimeError(f"measuring {kind} failed: {outcome.stderr.strip()[-500:]}")
    found = json.loads(outcome.stdout.splitlines()[-1])
    return Footprint(**found, disk_mb=_folder_size(model))


def _footprint_of_this_process(arguments: Sequence[str]) -> dict[str, float]:
    kind, model, batch_size, device, threads, decoding, *photos = arguments
    options: DecodingKeywords = json.loads(decoding)
    began = time.perf_counter()
    captioner: AnyCaptioner
    if kind == "onnx":
        captioner = Captioner.load(model, device=device, threads=int(threads))
    else:
        captioner = next(iter(open_pair(model, device, int(threads)).variants().values()))
    loaded = time.perf_counter() - began
    # As files: what a caption of them needs is counted, but no photo that waits.
    batch = list(itertools.islice(itertools.cycle(map(Path, photos)), int(batch_size)))
    captioner.caption(batch, batch_size=int(batch_size), **options)
    return {"load_seconds": loaded, "peak_memory_mb": peak_memory()}


def peak_memory() -> float:
    """Megabytes of this process's largest resident set."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss would start from the parent process's
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(peak) / 1e3
    import resource

    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _folder_size(folder: Path) -> float:
    """Megabytes of the files in `folder`."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


if __name__ == "__main__":
    print(json.dumps(_footprint_of_this_process(sys.argv[1:])))
