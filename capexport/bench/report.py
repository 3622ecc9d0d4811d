"""A benchmark's result as a table that reads well on a terminal and in Markdown alike."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from capexport.bench.measure import STAGES, memory_bandwidth
from capexport.bench.sheet import new_figure, save_figure
from capexport.graphs import runtime_version

Row = tuple[str, ...]


def render(result: dict[str, Any]) -> str:
    """The whole report: what was measured where, the table, and what could not be measured."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"{result['model']} on {result['device']} ({environment['cpu']}, "
        f"{environment['threads']} threads, {environment['memory_gb_per_second']:.0f} GB/s from "
        f"memory; {versions})",
        f"{result['photos']} decoded photos in turn, {result['repeats']} batches of each size, "
        "medians where nothing else is said; of several variants the fastest counts:",
        *(
            f"- batch {run['batch_size']}: "
            + "; ".join(f"{name}: {variant}" for name, variant in run["variants"].items())
            for run in result["runs"]
        ),
        "",
        table(_rows(result)),
    ]
    if result["unavailable"]:
        lines += ["", *(f"- {name}: {why}" for name, why in result["unavailable"].items())]
    return "\n".join(lines)


def _rows(result: dict[str, Any]) -> list[Row]:
    names = [*result["runs"][0]["paths"], *result["unavailable"]]
    rows: list[Row] = [("", *names)]

    def row(label: str, values: Mapping[str, float | None], form: str) -> None:
        cells = (values.get(name) for name in names)
        rows.append((label, *("" if cell is None else format(cell, form) for cell in cells)))

    def against(reference: str, values: Mapping[str, float]) -> None:
        ratios = (f"{values[reference] / values[n]:.2f}x" if n in values else "" for n in names)
        rows.append((f"  against {reference}", *ratios))

    def compared(label: str, values: Mapping[str, float]) -> None:
        row(label, values, ".2f")
        against("PyTorch", values)

    for run in result["runs"]:
        title = f"batch {run['batch_size']}: "
        paths = run["paths"]
        for stage in STAGES:
            times = {name: path["milliseconds"][stage] for name, path in paths.items()}
            medians = {name: time["p50"] for name, time in times.items()}
            compared(f"{title}{stage} (ms)", medians)
            if stage == "total" and "PyTorch as usual" in medians:
                against("PyTorch as usual", medians)
            for statistic in ("p90", "p99", "mean") if stage == "total" else ():
                values = {name: time[statistic] for name, time in times.items()}
                row(f"{title}{stage}, {statistic} (ms)", values, ".2f")
        for key, label, form in (
            ("captions_per_second", "captions a second", ".1f"),
            ("tokens_per_second", "tokens a second, decoding", ".0f"),
            ("outside_graphs", "decoding outside the graphs", ".1%"),
            ("share_of_floor", "decoding, share of the memory floor", ".2f"),
            ("identical_captions", "captions identical to PyTorch's", ".1%"),
        ):
            values = {name: path.get(key) for name, path in paths.items()}
            if any(value is not None for value in values.values()):
                row(title + label, values, form)
    for metric in ("BLEU-4", "METEOR", "CIDEr-D"):
        values = {name: scores.get(metric) for name, scores in result["metrics"].items()}
        if any(value is not None for value in values.values()):
            row(metric, values, ".2f")
    for key, label in (
        ("load_seconds", "import and load (s)"),
        ("peak_memory_mb", "peak memory (MB)"),
        ("disk_mb", "model on disk (MB)"),
    ):
        compared(label, {name: cost[key] for name, cost in result["footprint"].items()})
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    """A PNG: for each batch size the ratios to PyTorch as bars, and the stages stacked.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    runs = result["runs"]
    names = list(runs[0]["paths"])[::-1]  # the first on top
    figure = new_figure(11, (0.8 + 0.4 * len(names)) * len(runs))
    figure.suptitle(f"{result['model']} on {result['environment']['cpu']}")
    grid = figure.subplots(len(runs), 2, squeeze=False)
    for (ratios, stages), run in zip(grid, runs, strict=True):
        medians = {
            name: {stage: run["paths"][name]["milliseconds"][stage]["p50"] for stage in STAGES}
            for name in names
        }
        speed = [medians["PyTorch"]["total"] / medians[name]["total"] for name in names]
        colors = ["C1" if name.startswith("ONNX") else "C7" for name in names]
        bars = ratios.barh(names, speed, color=colors)
        ratios.bar_label(bars, fmt=" %.1fx")
        ratios.margins(x=0.15)
        ratios.set(title=f"batch {run['batch_size']}: captions a second, PyTorch = 1", xticks=[])
        left = np.zeros(len(names))
        for stage in STAGES[1:]:
            widths = np.array([medians[name][stage] for name in names])
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


def environment(threads: int, device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions that a measurement depends on."""
    return {
        "cpu": cpu_model(),
        "threads": threads,
        "memory_gb_per_second": memory_bandwidth(device) / 1e9,
        "versions": {
            "Python": platform.python_version(),
            **_versions("capexport", "torch", "numpy", "pillow", "openvino"),
            "onnxruntime": runtime_version(),
        },
    }


def _versions(*packages: str) -> dict[str, str]:
    installed = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
