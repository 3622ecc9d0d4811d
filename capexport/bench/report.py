"""A benchmark's result as a table that reads well on a terminal and in Markdown alike."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from capexport.bench.measure import memory_bandwidth
from capexport.bench.results import STAGES, Environment, Result, Run
from capexport.bench.sheet import new_figure, save_figure
from capexport.sessions import available_cores, runtime_version

Row = tuple[str, ...]


def render(result: Result) -> str:
    """The whole report: what was measured where, the table, and what could not be measured."""
    machine = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [
        f"{result.model} on {result.device} ({machine.cpu}, {machine.threads} threads, "
        f"{machine.memory_gb_per_second:.0f} GB/s from memory; {versions})",
        f"{result.photos} decoded photos in turn, {result.repeats} batches of each size, "
        + "".join(f"{name} {value}, " for name, value in result.decoding.items())
        + "medians where nothing else is said; of several variants the fastest counts:",
        *(
            f"- batch {run.batch_size}: "
            + "; ".join(f"{name}: {variant}" for name, variant in run.variants.items())
            for run in result.runs
        ),
        "",
        table(_Rows(result).all()),
    ]
    if machine.load and machine.load > (cores := available_cores()) + 0.5:
        lines.insert(
            2,
            f"The machine was busy (load {machine.load:.1f} on {cores} cores): ratios "
            "can turn round; measure again on a quiet one.",
        )
    if result.unavailable:
        lines += ["", *(f"- {name}: {why}" for name, why in result.unavailable.items())]
    return "\n".join(lines)


class _Rows:
    """The table's rows: a label, and a cell for each captioner, empty where it has no value."""

    def __init__(self, result: Result) -> None:
        self._result = result
        self._names = [*result.runs[0].paths, *result.unavailable]
        self._rows: list[Row] = [("", *self._names)]

    def all(self) -> list[Row]:
        for run in self._result.runs:
            self._times(run)
            self._rates(run)
        self._row("error of the image's features", self._result.feature_errors, ".2g")
        for metric in ("BLEU-4", "METEOR", "CIDEr-D"):
            scores = self._result.metrics
            self._row(metric, {name: found.get(metric) for name, found in scores.items()}, ".2f")
        for key, label in (
            ("load_seconds", "import and load (s)"),
            ("peak_memory_mb", "peak memory (MB)"),
            ("disk_mb", "model on disk (MB)"),
        ):
            costs = self._result.footprint
            self._compared(label, {name: getattr(cost, key) for name, cost in costs.items()})
        return self._rows

    def _times(self, run: Run) -> None:
        for stage in STAGES:
            label = f"batch {run.batch_size}: {stage}"
            times = {name: path.milliseconds[stage] for name, path in run.paths.items()}
            medians = {name: time.p50 for name, time in times.items()}
            self._compared(f"{label} (ms)", medians)
            if stage != "total":
                continue
            if "PyTorch as usual" in medians:
                self._against("PyTorch as usual", medians)
            for statistic in ("p90", "p99", "mean"):
                values = {name: getattr(time, statistic) for name, time in times.items()}
                self._row(f"{label}, {statistic} (ms)", values, ".2f")

    def _rates(self, run: Run) -> None:
        for key, label, form in (
            ("captions_per_second", "captions a second", ".1f"),
            ("tokens_per_second", "tokens a second, decoding", ".0f"),
            ("outside_graphs", "decoding outside the graphs", ".1%"),
            ("share_of_floor", "decoding, share of the memory floor", ".2f"),
            ("identical_captions", "captions identical to PyTorch's", ".1%"),
            ("identical_tokens", "tokens identical to PyTorch's", ".1%"),
        ):
            values = {name: getattr(path, key) for name, path in run.paths.items()}
            self._row(f"batch {run.batch_size}: {label}", values, form)

    def _compared(self, label: str, values: Mapping[str, float]) -> None:
        self._row(label, values, ".2f")
        self._against("PyTorch", values)

    def _against(self, reference: str, values: Mapping[str, float]) -> None:
        wanted = values[reference]
        cells = (f"{wanted / values[n]:.2f}x" if n in values else "" for n in self._names)
        self._rows.append((f"  against {reference}", *cells))

    def _row(self, label: str, values: Mapping[str, float | str | None], form: str) -> None:
        cells = [values.get(name) for name in self._names]
        if any(cell is not None for cell in cells):
            shown = ("" if cell is None else format(cell, form) for cell in cells)
            self._rows.append((label, *shown))


def draw(result: Result, path: Path) -> None:
    """A PNG: for each batch size the ratios to PyTorch as bars, and the stages stacked.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names = list(result.runs[0].paths)[::-1]  # the first on top
    figure = new_figure(11, (0.8 + 0.4 * len(names)) * len(result.runs))
    figure.suptitle(f"{result.model} on {result.environment.cpu}")
    grid = figure.subplots(len(result.runs), 2, squeeze=False)
    for (ratios, stages), run in zip(grid, result.runs, strict=True):
        times = {name: run.paths[name].milliseconds for name in run.paths}
        speed = [times["PyTorch"]["total"].p50 / times[name]["total"].p50 for name in names]
        colors = ["C1" if name.startswith("ONNX") else "C7" for name in names]
        bars = ratios.barh(names, speed, color=colors)
        ratios.bar_label(bars, fmt=" %.1fx")
        ratios.margins(x=0.15)
        ratios.set(title=f"batch {run.batch_size}: captions a second, PyTorch = 1", xticks=[])
        left = np.zeros(len(names))
        for stage in STAGES[1:]:
            widths = np.array([times[name][stage].p50 for name in names])
            stages.barh(names, widths, left=left, label=stage)
            left += widths
        stages.set(title="milliseconds a batch", yticks=[])
        stages.legend()
    save_figure(figure, path, dpi=110)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with aligned columns; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Row) -> str:
        first, *others = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    rule: Row = ("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:]))
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def environment(threads: int, device: str = "cpu") -> Environment:
    """This machine, and the versions installed here."""
    processor = cpu_model()
    if device.startswith("cuda"):
        processor += f", {gpu_model(device)}"
    return Environment(
        cpu=processor,
        threads=threads,
        memory_gb_per_second=memory_bandwidth(device) / 1e9,
        versions={
            "Python": platform.python_version(),
            **_versions("capexport", "torch", "numpy", "pillow", "openvino", "nncf"),
            "onnxruntime": runtime_version(),
        },
    )


def load() -> float | None:
    """How many processes wanted a core within the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _versions(*packages: str) -> dict[str, str]:
    installed = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def gpu_model(device: str = "cuda") -> str:
    """The GPU's name."""
    import torch

    return str(torch.cuda.get_device_name(device))


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
