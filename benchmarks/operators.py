"""Where a captioner's graphs spend their time, operator by operator: onnxruntime's own profile."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from capexport import Captioner
from capexport.atomic import replace_file
from capexport.bench.cli import sample_photos
from capexport.bench.report import cpu_model, table
from capexport.captioner import BUNDLED_ARTIFACT
from capexport.cli import run_parser, teaching
from capexport.sessions import Graph

RUNS = 30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="operators.py",
        **teaching(
            "Print the operators that a captioner's graphs spend their time in.",
            "python benchmarks/operators.py                             # the bundled one",
            "python benchmarks/operators.py artifacts/first --batch-sizes 8 --markdown FILE",
        ),
    )
    parser.add_argument("artifact", nargs="?", type=Path, default=BUNDLED_ARTIFACT)
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 32], metavar="N", help="default: 1 32"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables")
    return run_parser(parser, _profile, argv)


def _profile(options: argparse.Namespace) -> int:
    parts = []
    for size in options.batch_sizes:
        photos = list(itertools.islice(itertools.cycle(sample_photos()), size))

        def caption(captioner: Captioner, photos: Sequence[Any] = photos) -> None:
            for _ in range(RUNS):
                captioner.caption(photos, batch_size=len(photos))

        parts.append(
            f"{options.artifact.name}, batch {size}, {options.threads} threads, {cpu_model()}"
        )
        found = profile(options.artifact, caption, options.threads)
        tables = (_rows(name, events) for name, events in found.items())
        parts += [table(rows) for rows in tables if len(rows) > 1]
    text = "\n\n".join(parts)
    if options.markdown:
        replace_file(options.markdown, text + "\n")
    print(text)
    return 0


def profile(
    artifact: Path,
    caption: Callable[[Captioner], object],
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, list[dict[str, Any]]]:
    """The events that onnxruntime records in each graph, by its name, while an artifact's
    captioner goes through `caption`."""
    import onnxruntime  # behind capexport, which switches its telemetry off

    plain = onnxruntime.SessionOptions
    with tempfile.TemporaryDirectory() as folder:

        def profiled() -> Any:
            settings = plain()
            settings.enable_profiling = True
            settings.profile_file_prefix = f"{folder}/profile"
            return settings

        with mock.patch.object(onnxruntime, "SessionOptions", profiled):
            captioner = Captioner.load(artifact, threads=threads, device=device)
            caption(captioner)
        opened = [*vars(captioner.encoder).values(), *vars(captioner.decoder).values()]
        return {
            graph.path.stem: json.loads(Path(graph.session.end_profiling()).read_text())
            for graph in opened
            if isinstance(graph, Graph)
        }


def _rows(graph: str, events: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Operators of at least a hundredth of the time, without the loop around its own steps."""
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time") and event["args"]["op_name"] != "Loop":
            spent[event["args"]["op_name"]] += event["dur"]
            calls[event["args"]["op_name"]] += 1
    total = sum(spent.values()) or 1
    return [
        (graph, "microseconds a batch", "share", "calls a batch"),
        *(
            (name, f"{us / RUNS:.0f}", f"{us / total:.1%}", f"{calls[name] / RUNS:.0f}")
            for name, us in spent.most_common()
            if us >= total / 100
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
