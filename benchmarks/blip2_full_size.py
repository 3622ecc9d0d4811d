"""BLIP-2 at its real size, with random weights: `python benchmarks/blip2_full_size.py`.

Writes a checkpoint with the dimensions of blip2-opt-2.7b, exports it in each precision, captions
photos with every export and with `generate()`, and prints a table. Each measurement is a process
of its own, since two such models don't fit into the memory of most machines; they take turns, and
the medians count. PyTorch computes in float32 and bfloat16, or with `--device cuda` in float16, and
memory is then the GPU's. `--dims small` (about 150 million parameters) takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from capexport.atomic import replace_file
from capexport.bench.cli import sample_photos
from capexport.bench.measure import memory_bandwidth
from capexport.bench.report import cpu_model, gpu_model, table
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
    "tiny": {  # with heads as wide as the real ones', which a GPU has its own kernels for
        "vision": {"hidden_size": 176, "intermediate_size": 256, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "image_size": 224, "patch_size": 14},
        "qformer": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "vocab_size": 50},
        "text": {"hidden_size": 160, "ffn_dim": 320, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "word_embed_proj_dim": 160, "vocab_size": 340,
                 "max_position_embeddings": 256},
    },
}  # fmt: skip
# What PyTorch computes in; the first is as exact as the export that it is compared with.
TORCH = {"cpu": {"fp32": "float32", "bf16": "bfloat16"}, "cuda": {"fp16": "float16"}}
# Tokens after the first, timed together, and how often.
STEPS = {"cpu": (8, 3), "cuda": (32, 10)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dims", choices=DIMENSIONS, default="blip2-opt-2.7b", help="default: %(default)s"
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="at most N in each part, of the same width"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="default: all; fp16 with --device cuda"
    )
    parser.add_argument("--device", choices=STEPS, default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1], metavar="N", help="default: 1"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where models are written, and found again (default: temporary)",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=3,
        metavar="N",
        help="processes for each export and PyTorch (default: 3; 0: only export)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table")
    options = parser.parse_args(argv)
    options.precisions = options.precisions or (
        PRECISIONS if options.device == "cpu" else ("fp16",)
    )
    with tempfile.TemporaryDirectory() as name:
        text = _run(options, options.folder or Path(name))
    if options.markdown:
        replace_file(options.markdown, text + "\n")
    print(text)


def _run(options: argparse.Namespace, folder: Path) -> str:
    checkpoint = folder / "checkpoint"
    device, sizes = options.device, options.batch_sizes
    first, *_ = TORCH[device].values()
    if not checkpoint.exists():
        _process("checkpoint", options.dims, checkpoint, first, options.layers or "")
    exports = {
        f"ONNX {precision}": _export(checkpoint, folder / precision, precision)
        for precision in tqdm(options.precisions, "exporting")
    }
    if not options.turns:
        return f"exported to {folder}"
    names = [*(f"PyTorch {precision}" for precision in TORCH[device]), *exports]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in tqdm(range(options.turns), "captioning"):
        for path, outcomes in runs.items():
            model = exports[path]["folder"] if path in exports else checkpoint
            # On a shared machine it changes within minutes, and a token's time with it.
            bandwidth = _process("bandwidth", device)["bytes_per_second"]
            outcome = _process("caption", path, model, device, *sizes)
            outcomes.append({**outcome, "bandwidth": bandwidth})
    measured = {
        path: {key: statistics.median(run[key] for run in outcomes) for key in outcomes[0]}
        for path, outcomes in runs.items()
    }
    profiles = {
        path: _process("profile", export["folder"], device) for path, export in exports.items()
    }
    return _report(options, exports, measured, profiles)


def _export(checkpoint: Path, out: Path, precision: str) -> dict[str, Any]:
    known = out.with_suffix(".json")
    found = known.exists()
    if not found:
        command = ["-m", "capexport", "blip2", "--model", str(checkpoint), "--out", str(out)]
        known.write_text(json.dumps(_measured([*command, "--precision", precision])))
    outcome = json.loads(known.read_text())
    manifest = json.loads((out / "manifest.json").read_text())
    files = manifest["files"]
    if found:  # how long it took told of another day's machine
        outcome.pop("seconds", None)
    return {
        **outcome,
        **manifest["parity"]["captions"],
        "folder": out,
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


def write_checkpoint(dims: str, folder: str, dtype: str, layers: str = "") -> None:
    import torch

    from benchmarks.random_blip2 import blip2_config, save_checkpoint

    parts = {name: dict(part) for name, part in DIMENSIONS[dims].items()}
    for part in parts.values() if layers else ():
        part["num_hidden_layers"] = min(int(layers), part["num_hidden_layers"])
    config = blip2_config("opt", queries=32, **parts)
    save_checkpoint(Path(folder), config, dtype=getattr(torch, dtype))


def caption(path: str, model: str, device: str, *sizes: str) -> None:
    """Load a captioner and time it on a few batches of each size."""
    began = time.perf_counter()
    result: dict[str, float] = {}
    kind, precision = path.split()
    with _gpu_memory(result) if device == "cuda" else contextlib.nullcontext():
        if kind == "PyTorch":
            captioner = _torch_captioner(Path(model), device, TORCH[device][precision])
        else:
            captioner = Captioner.load(model, device=device)
        result["load"] = time.perf_counter() - began
        minimum = "min_new_tokens" if kind == "PyTorch" else "min_tokens"
        for size in map(int, sizes):
            result.update(_timed(captioner, minimum, size, *STEPS[device]))
    print(json.dumps(result))


def _timed(captioner: Any, minimum: str, size: int, steps: int, repeats: int) -> dict[str, float]:
    """Medians in seconds, a batch of `size`."""
    photos = itertools.cycle(sample_photos())

    def timed(tokens: int) -> Timing:
        batch = list(itertools.islice(photos, size))
        options = {"max_tokens": tokens, minimum: tokens, "batch_size": size}
        timing: Timing = captioner.caption(batch, **options)[0].timing
        return timing

    timed(1 + steps)
    pairs = [(timed(1), timed(1 + steps)) for _ in range(repeats)]
    return {
        f"encode {size}": statistics.median(timing.encode for pair in pairs for timing in pair),
        f"prefill {size}": statistics.median(short.decode for short, _ in pairs),
        f"token {size}": statistics.median(
            (long.decode - short.decode) / steps for short, long in pairs
        ),
    }


@contextlib.contextmanager
def _gpu_memory(result: dict[str, float]) -> Iterator[None]:
    """Put how much more GPU memory is used within at most into `result`, as "gpu" in bytes."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    before = int(subprocess.check_output(query))
    watcher = subprocess.Popen([*query, "-lms", "50"], stdout=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        watcher.terminate()
        used = map(int, watcher.communicate()[0].split())
        result["gpu"] = (max(used, default=before) - before) * 2**20


def profile(model: str, device: str) -> None:
    """The shares of operators in the time of each stage, as onnxruntime itself counts them."""
    from benchmarks.operators import profile as profiled

    steps, _ = STEPS[device]

    def caption(captioner: Captioner) -> None:
        for _ in range(2):  # of which the second counts
            captioner.caption(sample_photos()[:1], max_tokens=1 + steps, min_tokens=1 + steps)

    graphs = profiled(Path(model), caption, device=device)
    encoder, decoder = graphs["vision_encoder"], graphs["decoder_model_merged"]
    prefill, *others = _runs(decoder)[1 + steps :]
    stages = (
        ("image encoder", encoder, _runs(encoder)[1:]),
        ("prefill", decoder, [prefill]),
        ("a step", decoder, others),
    )
    print(json.dumps({name: _shares(events, runs) for name, events, runs in stages}))


def _runs(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["name"] == "model_run"]


def _shares(events: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, float]:
    """The share of each operator in the time of these runs, which follow each other."""
    begin, end = runs[0]["ts"], runs[-1]["ts"] + runs[-1]["dur"]
    total = sum(run["dur"] for run in runs)
    shares: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time") and begin <= event["ts"] < end:
            shares[event["args"]["op_name"]] += event["dur"] / total
    return dict(shares)


def _torch_captioner(folder: Path, device: str, dtype: str) -> Any:
    import torch

    from capexport.models.blip2 import HuggingFaceCaptioner

    return HuggingFaceCaptioner.load(folder, device, getattr(torch, dtype))


def bandwidth(device: str) -> None:
    print(json.dumps({"bytes_per_second": memory_bandwidth(device)}))


def _report(
    options: argparse.Namespace,
    exports: dict[str, dict[str, Any]],
    measured: dict[str, dict[str, float]],
    profiles: dict[str, dict[str, dict[str, float]]],
) -> str:
    on_gpu = options.device == "cuda"
    torch = [path for path in measured if path not in exports]
    made = [path for path, export in exports.items() if "seconds" in export]

    def row(title: str, cell: Callable[[str], str], paths: Collection[str]) -> tuple[str, ...]:
        return (title, *(cell(path) if path in paths else "" for path in measured))

    rows = [
        ("", *measured),
        *([row("export (s)", lambda p: f"{exports[p]['seconds']:.0f}", made)] if made else []),
        row("export: peak anonymous memory (GB)", lambda p: _gb(exports[p]["anonymous"]), exports),
        row("on disk (GB)", lambda p: _gb(exports[p]["bytes"]), exports),
    ]
    read = {path: export["step_bytes"] for path, export in exports.items()}
    if exact := read.get(torch[0].replace("PyTorch", "ONNX")):
        read |= {path: exact / (2 if path.endswith("bf16") else 1) for path in torch}
    for key, title, unit in _figures(options.batch_sizes, on_gpu):
        values = {path: unit * outcome[key] for path, outcome in measured.items()}
        rows.append(row(title, lambda p, of=values: f"{of[p]:.2f}", measured))
        if title.endswith("(ms)"):
            best = min(values[path] for path in torch)
            rows.append(
                row("  against PyTorch", lambda p, b=best, of=values: f"{b / of[p]:.2f}x", measured)
            )
        if key.startswith("token"):
            floors = {p: bytes_ / measured[p]["bandwidth"] for p, bytes_ in read.items()}
            shares = {p: floor / measured[p][key] for p, floor in floors.items()}
            rows.append(
                row("  share of the memory floor", lambda p, of=shares: f"{of[p]:.2f}", shares)
            )
    rows += _profile_rows(profiles, row)
    rows += [
        row("identical tokens", lambda p: f"{exports[p]['token_agreement']:.1%}", exports),
        row("error of the first logits", lambda p: f"{exports[p]['logit_error']:.1g}", exports),
    ]
    return f"{_title(options)}\n\n{table(rows)}"


def _figures(sizes: list[int], on_gpu: bool) -> list[tuple[str, str, float]]:
    """What was measured: its key, its row's title, and the factor to the title's unit."""
    stages = [
        (f"{stage} {size}", f"{title}, batch {size} (ms)", 1e3)
        for size in sizes
        for stage, title in (("encode", "image encoder"), ("prefill", "prefill"), ("token", "step"))
    ]
    return [
        ("load", "load (s)", 1),
        ("bandwidth", "memory bandwidth at that time (GB/s)", 1e-9),
        *stages,
        ("anonymous", "running: peak anonymous memory (GB)", 1e-9),
        *([("gpu", "running: peak GPU memory (GB)", 1e-9)] if on_gpu else []),
    ]


def _title(options: argparse.Namespace) -> str:
    depth = f" with at most {options.layers} layers a part" if options.layers else ""
    gpu = f", {gpu_model()}" if options.device == "cuda" else ""
    machine = f"{cpu_model()}, {available_cores()} cores{gpu}"
    return f"{options.dims}{depth}, random weights, {machine}; {datetime.date.today()}"


def _profile_rows(
    profiles: dict[str, dict[str, dict[str, float]]], row: Callable[..., tuple[str, ...]]
) -> Iterator[tuple[str, ...]]:
    """The operators that take at least a fiftieth of a stage, the largest first."""
    for stage in ("image encoder", "prefill", "a step"):
        shares = {path: stages[stage] for path, stages in profiles.items()}
        largest = Counter[str]()
        for found in shares.values():
            largest |= Counter(found)
        for name, most in largest.most_common():
            if most >= 0.02:
                cell = lambda p, of=shares, n=name: f"{of[p].get(n, 0):.1%}"  # noqa: E731
                yield row(f"{stage}: share of {name}", cell, shares)


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
