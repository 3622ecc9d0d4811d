"""Timing captioners in turn, so that both meet the same moments of a busy machine."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from capexport.captioner import Caption, Captioner
from capexport.graphs import open_session
from capexport.preprocessing import load_image

_TURN = 5  # batches
# Seconds of untimed batches at the beginning of each turn: caches and threads are the other
# captioner's until then, and cores that were idle take a moment to come up to speed.
_WARM_UP = 0.05
# Both runtimes' worker threads keep spinning for a moment after a call; the pause lets them sleep,
# so that neither is timed against the other's.
_PAUSE = 0.03


# Decoded: uint8 (height, width, 3).
Photo: TypeAlias = NDArray[np.uint8]


class AnyCaptioner(Protocol):
    """`Captioner`, or what `generate()` of Transformers is wrapped in."""

    def caption(self, images: Sequence[Photo], *, batch_size: int) -> list[Caption]: ...


class Clock:
    """Opens a CNN-LSTM's graphs, and counts the seconds that its decoder's spend running."""

    def __init__(self, device: str, threads: int) -> None:
        self._device, self._threads = device, threads
        self.seconds = 0.0

    def open_graph(self, path: Path) -> Any:
        session = open_session(path, self._device, self._threads)
        return _ClockedSession(session, self) if path.name.startswith("decoder") else session


class _ClockedSession:
    def __init__(self, session: Any, clock: Clock) -> None:
        self._session, self._clock = session, clock
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> Any:
        began = time.perf_counter()
        values = self._session.run(outputs, feeds)
        self._clock.seconds += time.perf_counter() - began
        return values


STAGES = ("total", "preprocess", "encode", "decode")


def alternate(
    captioners: Mapping[str, AnyCaptioner],
    photos: Sequence[Photo],
    batch_size: int,
    repeats: int,
    clocks: Mapping[str, Clock] | None = None,
) -> dict[str, Any]:
    """Caption the same batches of decoded photos with each captioner, in turns of a few batches.

    Args:
        captioners: the first is what the captions of the others are compared to.
        photos: uint8 (height, width, 3) each; they are cycled through.
        repeats: batches to time, after a whole untimed turn of each captioner.
        clocks: of captioners whose graphs they have opened.
    Returns:
        By captioner: milliseconds a batch for each stage (mean, p50, p90, p99), captions and
        tokens a second at the median, decoding steps a batch, the share of its captions that are
        the first captioner's, and with a clock the share of decoding, from features to text, spent
        outside the graphs.
    """
    clocks = clocks or {}
    stream = itertools.cycle(photos)
    batches = [list(itertools.islice(stream, batch_size)) for _ in range(repeats)]
    turns = [batches[:_TURN], *(batches[i : i + _TURN] for i in range(0, repeats, _TURN))]
    times: dict[str, dict[str, list[float]]] = {
        name: {stage: [] for stage in STAGES} for name in captioners
    }
    captions: dict[str, list[Caption]] = {name: [] for name in captioners}
    outside: dict[str, list[float]] = {name: [] for name in clocks}
    names = list(captioners)
    title = f"batch {batch_size}"
    for number, turn in enumerate(tqdm(turns, title, leave=False, disable=None)):
        for name in names:
            time.sleep(_PAUSE)
            began = time.perf_counter()
            for batch in itertools.cycle(turn):
                captioners[name].caption(batch, batch_size=batch_size)
                if time.perf_counter() - began > _WARM_UP:
                    break
            for batch in turn if number else ():
                clocked = clocks[name].seconds if name in clocks else 0.0
                began = time.perf_counter()
                outcome = captioners[name].caption(batch, batch_size=batch_size)
                total = time.perf_counter() - began
                captions[name] += outcome
                if name in clocks:
                    timing = outcome[0].timing
                    decoding = total - timing.preprocess - timing.encode
                    inside = clocks[name].seconds - clocked
                    outside[name].append(1 - inside / decoding)
                for stage in STAGES:
                    spent = total if stage == "total" else getattr(outcome[0].timing, stage)
                    times[name][stage].append(1e3 * spent)
        names.reverse()
    paths = {}
    for name, stages in times.items():
        statistics = {stage: _statistics(values) for stage, values in stages.items()}
        lengths = [len(caption.tokens) + 1 for caption in captions[name]]  # + 1: the end token
        tokens = sum(lengths)
        longest = [max(lengths[i : i + batch_size]) for i in range(0, len(lengths), batch_size)]
        paths[name] = {
            "milliseconds": statistics,
            "steps": float(np.mean(longest)),
            "captions_per_second": 1e3 * batch_size / statistics["total"]["p50"],
            "tokens_per_second": 1e3 * tokens / repeats / statistics["decode"]["p50"],
            "identical_captions": _identical(captions[next(iter(captioners))], captions[name]),
        }
        if name in clocks:
            paths[name]["outside_graphs"] = float(np.median(outside[name]))
    return {"batch_size": batch_size, "paths": paths}


def _identical(wanted: Sequence[Caption], got: Sequence[Caption]) -> float:
    return float(np.mean([a.tokens == b.tokens for a, b in zip(wanted, got, strict=True)]))


def _statistics(values: Sequence[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99}


def fastest(
    candidates: Mapping[str, AnyCaptioner], photos: Sequence[Photo], batch_size: int, stage: str
) -> str:
    """Which candidate is quickest in one stage, by the median of a few batches."""
    paths = alternate(candidates, photos, batch_size, repeats=7)["paths"]
    return min(candidates, key=lambda name: float(paths[name]["milliseconds"][stage]["p50"]))


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
    kind: str, model: Path, photos: Sequence[Path], batch_size: int, device: str, threads: int
) -> dict[str, float]:
    """Load a captioner in a process of its own and caption one batch there.

    Returns:
        `load_seconds` (imports included) and `peak_memory_mb` (resident set).
    Raises:
        RuntimeError: that process failed.
    """
    arguments = [kind, str(model), str(batch_size), device, str(threads), *map(str, photos)]
    outcome = subprocess.run(
        [sys.executable, "-m", __spec__.name, *arguments], capture_output=True, text=True
    )
    if outcome.returncode:
        raise RuntimeError(f"measuring {kind} failed: {outcome.stderr.strip()[-500:]}")
    result: dict[str, float] = json.loads(outcome.stdout.splitlines()[-1])
    return result


def _footprint_of_this_process(arguments: Sequence[str]) -> dict[str, float]:
    kind, model, batch_size, device, threads, *photos = arguments
    began = time.perf_counter()
    captioner: AnyCaptioner
    if kind == "onnx":
        captioner = Captioner.load(model, device=device, threads=int(threads))
    else:
        from capexport.bench.pairs import open_pair

        captioner = open_pair(model, device, int(threads)).plain()
    loaded = time.perf_counter() - began
    batch = [np.asarray(load_image(photo)) for photo in photos]
    captioner.caption(
        list(itertools.islice(itertools.cycle(batch), int(batch_size))), batch_size=int(batch_size)
    )
    return {"load_seconds": loaded, "peak_memory_mb": _peak_memory()}


def _peak_memory() -> float:
    """Megabytes of this process's largest resident set."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss would start from the parent process's
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(peak) / 1e3
    import resource

    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def folder_size(folder: Path) -> float:
    """Megabytes of the files in `folder`."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


if __name__ == "__main__":
    print(json.dumps(_footprint_of_this_process(sys.argv[1:])))
