"""A benchmark's result as a table that reads well on a terminal and in Markdown alike."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from capexport.graphs import runtime_version

Row = tuple[str, ...]


def render(result: dict[str, Any]) -> str:
    """The whole report: what was measured where, and the table."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    identical = min(run["identical_captions"] for run in result["runs"])
    lines = [
        f"{result['model']} on {result['device']} ({environment['cpu']}, "
        f"{environment['threads']} threads; {versions})",
        f"{result['photos']} photos in turn, {result['repeats']} batches of each size; PyTorch's "
        "fastest variant: "
        + "; ".join(f"batch {run['batch_size']}: {run['torch_variant']}" for run in result["runs"]),
        "",
        table(_rows(result)),
        "",
        f"identical captions: {identical:.1%}",
    ]
    return "\n".join(lines)


def _rows(result: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [("", "PyTorch", "ONNX", "ratio")]
    for run in result["runs"]:
        torch, onnx = run["paths"]["torch"], run["paths"]["onnx"]
        title = f"batch {run['batch_size']}"
        for stage in ("total", "preprocess", "encode", "decode"):
            for statistic in ("p50", "p90", "p99", "mean") if stage == "total" else ("p50",):
                slow, fast = (path["milliseconds"][stage][statistic] for path in (torch, onnx))
                label = f"{title}: {stage} {statistic} (ms)"
                rows.append((label, f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.2f}x"))
        for key, label in (
            ("captions_per_second", "captions a second"),
            ("tokens_per_second", "tokens a second, decoding"),
        ):
            slow, fast = torch[key], onnx[key]
            rows.append((f"{title}: {label}", f"{slow:.1f}", f"{fast:.1f}", f"{fast / slow:.2f}x"))
    torch, onnx = result["footprint"]["torch"], result["footprint"]["onnx"]
    for key, label in (
        ("load_seconds", "import and load (s)"),
        ("peak_memory_mb", "peak memory (MB)"),
        ("disk_mb", "model on disk (MB)"),
    ):
        rows.append(
            (label, f"{torch[key]:.1f}", f"{onnx[key]:.1f}", f"{torch[key] / onnx[key]:.2f}x")
        )
    return rows


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


def environment(threads: int) -> dict[str, Any]:
    """The machine and the versions that a measurement depends on."""
    return {
        "cpu": cpu_model(),
        "threads": threads,
        "versions": {
            "Python": platform.python_version(),
            **{name: metadata.version(name) for name in ("capexport", "torch", "numpy", "pillow")},
            "onnxruntime": runtime_version(),
        },
    }


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
