"""BLIP-2 at its real size, with random weights: `python benchmarks/blip2_full_size.py`.

Writes a checkpoint with the dimensions of blip2-opt-2.7b, exports it in each precision, captions
photos with every export and with `generate()`, and prints a table. Each measurement is a process
of its own, since two such models don't fit into the memory of most machines; they take turns, and
the medians count. `--dims small` (about 150 million parameters) takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from capexport.artifact import replace_file
from capexport.bench.cli import sample_photos
from capexport.bench.measure import memory_bandwidth
from capexport.bench.report import cpu_model, table
from capexport.captioner import Captioner, Timing
from capexport.sessions import available_cores

PRECISIONS = ("fp32", "fp16", "int8", "int4")
DIMENSIONS: dict[str, dict[str, dict[str, Any]]] = {
    # config.json of Salesforce/blip2-opt-2.7b
    "blip2-opt-2.7b": {
        "vision": {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39,
                   "num_attention_heads": 16, "image_size": 224, "patch_size": 14},
        "qformer": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                    "num_attention_heads": 12, "vocab_size": 30522},
        "text": {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "word_embed_proj_dim": 2560, "vocab_size": 50304,
                 "max_position_embeddings": 2048},
    },
    "small": {
        "vision": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
                   "num_attention_heads": 8, "image_size": 224, "patch_size": 14},
        "qformer": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
                    "num_attention_heads": 4, "vocab_size": 30522},
        "text": {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
                 "num_attention_heads": 12, "word_embed_proj_dim": 768, "vocab_size": 50304,
                 "max_position_embeddings": 2048},
    },
}  # fmt: skip
STEPS = 8  # tokens after the first, timed together


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", choices=DIMENSIONS, default="blip2-opt-2.7b")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--folder", type=Path, help="where models are written (default: temporary)")
    parser.add_argument("--turns", type=int, default=3, help="processes a path (default: 3)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        text = _run(options, Path(name))
    if options.markdown:
        replace_file(options.markdown, text + "\n")
    print(text)


def _run(options: argparse.Namespace, folder: Path) -> str:
    checkpoint = folder / "checkpoint"
    _process("checkpoint", options.dims, checkpoint)
    exports = {
        precision: _export(checkpoint, folder / precision, precision)
        for precision in tqdm(options.precisions, "exporting")
    }
    runs: dict[str, list[dict[str, Any]]] = {"torch": [], **{name: [] for name in exports}}
    for _ in tqdm(range(options.turns), "captioning"):
        for path, outcomes in runs.items():
            model = checkpoint if path == "torch" else folder / path
            # On a shared machine it changes within minutes, and a token's time with it.
            bandwidth = _process("bandwidth")["bytes_per_second"]
            outcomes.append({**_process("caption", path, model), "bandwidth": bandwidth})
    measured = {
        path: {key: statistics.median(run[key] for run in outcomes) for key in outcomes[0]}
        for path, outcomes in runs.items()
    }
    profiles = {path: _process("profile", folder / path) for path in exports}
    return _report(options.dims, exports, measured, profiles)


def _export(checkpoint: Path, out: Path, precision: str) -> dict[str, Any]:
    command = ["-m", "capexport", "blip2", "--model", str(checkpoint), "--out", str(out)]
    outcome = _measured([*command, "--precision", precision])
    manifest = json.loads((out / "manifest.json").read_text())
    files = manifest["files"]
    return {
        **outcome,
        **manifest["parity"]["captions"],
        "bytes": sum(record["bytes"] for record in files.values()),
        "step_bytes": files["decoder_model_merged.onnx.data"]["bytes"],
    }


def _process(command: str, *arguments: object) -> dict[str, Any]:
    return _measured([__file__, command, *map(str, arguments)])


def _measured(arguments: list[str]) -> dict[str, Any]:
    """Run Python: the JSON in its last line, its seconds, and its peak of anonymous memory, that
    is of what can't be dropped and read from a file again."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            with contextlib.suppress(OSError):
                found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
                peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: failed")
    last = (output.strip().splitlines() or [""])[-1]
    said = json.loads(last) if last.startswith("{") else {}
    return {"seconds": time.perf_counter() - began, "anonymous": peak, **said}


def write_checkpoint(dims: str, folder: str) -> None:
    from benchmarks.random_blip2 import blip2_config, save_checkpoint

    save_checkpoint(Path(folder), blip2_config("opt", queries=32, **DIMENSIONS[dims]))


def caption(path: str, model: str) -> None:
    """Load a captioner and time it on three photos, one by one."""
    began = time.perf_counter()
    captioner = _torch_captioner(Path(model)) if path == "torch" else Captioner.load(model)
    loaded = time.perf_counter() - began
    minimum = "min_new_tokens" if path == "torch" else "min_tokens"

    def timed(photo: Path, tokens: int) -> Timing:
        return captioner.caption([photo], max_tokens=tokens, **{minimum: tokens})[0].timing

    photos = sample_photos()[-3:]
    timed(photos[0], 2)
    pairs = [(timed(photo, 1), timed(photo, 1 + STEPS)) for photo in photos]
    result = {
        "load": loaded,
        "encode": statistics.median(timing.encode for pair in pairs for timing in pair),
        "prefill": statistics.median(short.decode for short, _ in pairs),
        "token": statistics.median((long.decode - short.decode) / STEPS for short, long in pairs),
    }
    print(json.dumps(result))


def profile(model: str) -> None:
    """The shares of operators in the time of decoding steps, as onnxruntime itself counts them."""
    from benchmarks.operators import profile as profiled

    def caption(captioner: Captioner) -> None:
        captioner.caption(sample_photos()[:1], max_tokens=1 + STEPS, min_tokens=1 + STEPS)

    events = profiled(Path(model), caption)["decoder"]
    _, *steps = [event for event in events if event["name"] == "model_run"]
    total = sum(step["dur"] for step in steps)
    shares: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= steps[0]["ts"]:
            shares[event["args"]["op_name"]] += event["dur"] / total
    print(json.dumps(dict(shares.most_common())))


def _torch_captioner(folder: Path) -> Any:
    from capexport.models.blip2 import HuggingFaceCaptioner

    return HuggingFaceCaptioner.load(folder)


def bandwidth() -> None:
    print(json.dumps({"bytes_per_second": memory_bandwidth()}))


def _report(
    dims: str,
    exports: dict[str, dict[str, Any]],
    measured: dict[str, dict[str, float]],
    profiles: dict[str, dict[str, float]],
) -> str:
    reference = measured["torch"]
    exact = exports.get("fp32", {}).get("step_bytes")

    def row(title: str, torch: str, cell: Callable[[str], str]) -> tuple[str, ...]:
        return (title, torch, *map(cell, exports))

    def floor(bytes_read: float | None, path: str) -> str:
        outcome = measured[path]
        return f"{bytes_read / outcome['bandwidth'] / outcome['token']:.2f}" if bytes_read else ""

    rows = [
        ("", "PyTorch fp32", *(f"ONNX {precision}" for precision in exports)),
        row("export (s)", "", lambda p: f"{exports[p]['seconds']:.0f}"),
        row("export: peak anonymous memory (GB)", "", lambda p: _gb(exports[p]["anonymous"])),
        row("on disk (GB)", "", lambda p: _gb(exports[p]["bytes"])),
    ]
    for key, title, unit in (
        ("load", "load (s)", 1), ("encode", "image encoder (ms)", 1e3),
        ("prefill", "prefill (ms)", 1e3),
        ("bandwidth", "memory bandwidth at that time (GB/s)", 1e-9), ("token", "a token (ms)", 1e3),
        ("anonymous", "running: peak anonymous memory (GB)", 1e-9),
    ):  # fmt: skip
        values = {path: f"{unit * outcome[key]:.1f}" for path, outcome in measured.items()}
        rows.append(row(title, values["torch"], values.__getitem__))
        if key in ("encode", "token"):
            ratios = {path: f"{reference[key] / measured[path][key]:.2f}x" for path in exports}
            rows.append(row("  against PyTorch", "", ratios.__getitem__))
        if key == "token":
            rows.append(
                row(
                    "  share of the floor",
                    floor(exact, "torch"),
                    lambda p: floor(exports[p]["step_bytes"], p),
                )
            )
    operators = {name for shares in profiles.values() for name in shares} - {"seconds", "anonymous"}
    largest = {name: max(shares.get(name, 0) for shares in profiles.values()) for name in operators}
    for name in sorted(operators, key=largest.__getitem__, reverse=True):
        if largest[name] >= 0.01:
            title = f"a token: share of {name}"
            rows.append(row(title, "", lambda p, n=name: f"{profiles[p].get(n, 0):.1%}"))
    rows += [
        row("identical tokens", "", lambda p: f"{exports[p]['token_agreement']:.1%}"),
        row("error of the first logits", "", lambda p: f"{exports[p]['logit_error']:.1g}"),
    ]
    return (
        f"{dims}, random weights, batch 1, {cpu_model()}, {available_cores()} cores; "
        f"{datetime.date.today()}\n\n{table(rows)}"
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for benchmarks.random_blip2
    commands = {
        "checkpoint": write_checkpoint,
        "caption": caption,
        "bandwidth": bandwidth,
        "profile": profile,
    }
    if sys.argv[1:2] and sys.argv[1] in commands:
        commands[sys.argv[1]](*sys.argv[2:])
    else:
        main()
