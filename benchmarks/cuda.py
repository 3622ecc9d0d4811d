"""All that a GPU must show, in one go: `python benchmarks/cuda.py --out DIR`.

Three parts, each a process of its own: whether captions are PyTorch's to the token, and what runs
on the GPU (`exact`); `capbench --device cuda` (`capbench`); BLIP-2 at its real size in float16
(`blip2`). Their tables are printed last; logs and JSON are left in DIR. `--device cpu` rehearses.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from capexport import Captioner
from capexport.bench.cli import sample_photos
from capexport.bench.report import table
from capexport.captioner import BUNDLED_ARTIFACT, Caption
from capexport.export.parity import token_agreement

PARTS = ("exact", "capbench", "blip2")
PROMPTS = ("a photo of", "Question: what is in the picture? Answer:")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dims", default="blip2-opt-2.7b", help="tiny, to rehearse")
    parser.add_argument("--turns", type=int, default=2, help="of the part blip2 (default: 2)")
    parser.add_argument("--folder", type=Path, help="of the part blip2: where its models are")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [part for part in tqdm(options.only, "parts") if not _run(part, options)]
    for part in options.only:
        text = (options.out / f"{part}.md").read_text()
        print(f"\n## {part}{' (failed: see its log)' if part in failed else ''}\n\n{text}")
    return len(failed)


def _run(part: str, options: argparse.Namespace) -> bool:
    """Whether a part succeeded; what it printed is its `.md`."""
    device, out = options.device, options.out
    here = Path(__file__).parent
    commands: dict[str, list[str]] = {
        "exact": [__file__, "exact", device],
        "capbench": [
            "-m", "capexport.bench.cli", "--device", device, "--peers", "--batch-sizes", "1", "32",
            "--json", str(out / "capbench.json"),
        ],
        "blip2": [
            str(here / "blip2_full_size.py"), "--device", device, "--dims", options.dims,
            "--precisions", "fp16", "--batch-sizes", "1", "8", "--turns", str(options.turns),
        ],
    }  # fmt: skip
    if options.folder:
        commands["blip2"] += ["--folder", str(options.folder)]
    began = time.perf_counter()
    with (out / f"{part}.log").open("w") as log, (out / f"{part}.md").open("w") as said:
        process = subprocess.run([sys.executable, *commands[part]], stdout=said, stderr=log)
        log.write(f"{time.perf_counter() - began:.0f} s, exit code {process.returncode}\n")
    return process.returncode == 0


def exact(device: str) -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = False  # as what is compared with it
    rows = [("", "captions", "identical to PyTorch's", "of the tokens")]
    placed = [("graph", "kernels a run on the GPU", "on the CPU", "copies", "on the CPU, by name")]
    with tempfile.TemporaryDirectory() as folder:
        for title, artifact, wanted, got in _models(Path(folder), device):
            rows.append(_compared(title, wanted, got))
            if device == "cuda" and not title.endswith("beams"):
                placed += _placement(title, artifact, device)
    print(f"{table(rows)}\n\n{table(placed)}")


# A title, the artifact, and the captions of PyTorch and of the artifact.
Compared = tuple[str, Path, list[Caption], list[Caption]]


def _models(folder: Path, device: str) -> Iterator[Compared]:
    exports = {
        (kind, precision): _export_blip2(folder, kind, precision)
        for kind in ("opt", "t5")
        for precision in ("fp32", "fp16")
    }
    yield from _cnn_lstm(folder / "cnn-lstm", device)
    for (kind, precision), export in exports.items():
        if export.wait():
            raise SystemExit(f"exporting {kind} in {precision} failed")
        yield from _blip2(folder, kind, precision, device)


def _cnn_lstm(folder: Path, device: str) -> Iterator[Compared]:
    from capexport.cli.lstm import bundled_checkpoint
    from capexport.export.cnn_lstm import export_cnn_lstm
    from capexport.models.checkpoint import load_checkpoint
    from capexport.models.torch_captioner import torch_captioner

    checkpoint = load_checkpoint(bundled_checkpoint())
    export_cnn_lstm(checkpoint, folder)
    pytorch = torch_captioner(checkpoint, device)
    photos = sample_photos()
    for precision, artifact in (("fp32", folder), ("int8", BUNDLED_ARTIFACT)):
        exported = Captioner.load(artifact, device=device)
        for beams in (1, 3):
            wanted, got = (each.caption(photos, num_beams=beams) for each in (pytorch, exported))
            yield f"CNN-LSTM {precision}{_beams(beams)}", artifact, wanted, got


def _export_blip2(folder: Path, kind: str, precision: str) -> subprocess.Popen[bytes]:
    """A process beside this one: most of its time only one core has work."""
    from benchmarks.random_blip2 import save_checkpoint

    checkpoint = folder / kind
    if not checkpoint.exists():
        save_checkpoint(checkpoint, _config(kind))
    command = ["-m", "capexport", "blip2", "--model", checkpoint, "--precision", precision]
    return subprocess.Popen(
        [sys.executable, *command, "--out", folder / f"{kind}-{precision}"], stdout=sys.stderr
    )


def _blip2(folder: Path, kind: str, precision: str, device: str) -> Iterator[Compared]:
    import torch

    from capexport.models.blip2 import HuggingFaceCaptioner

    artifact = folder / f"{kind}-{precision}"
    dtype = torch.float32 if precision == "fp32" or device == "cpu" else torch.float16
    pytorch = HuggingFaceCaptioner.load(folder / kind, device, dtype)
    exported = Captioner.load(artifact, device=device)
    photos = sample_photos()
    for beams in (1, 3):
        wanted, got = [], []
        for prompt in (None, *PROMPTS):
            options: Any = {"prompt": prompt, "num_beams": beams}
            wanted += pytorch.caption(photos, max_tokens=20, **options)
            got += exported.caption(photos, max_tokens=20, **options)
        yield f"BLIP-2 {kind} {precision}{_beams(beams)}", artifact, wanted, got


def _config(kind: str) -> Any:
    from benchmarks.blip2_full_size import DIMENSIONS
    from benchmarks.random_blip2 import blip2_config

    small = DIMENSIONS["tiny"]
    text = small["text"] if kind == "opt" else T5
    return blip2_config(kind, small["vision"], small["qformer"], text, queries=32)


T5 = {"d_model": 128, "d_kv": 64, "d_ff": 256, "num_layers": 2, "num_heads": 2, "vocab_size": 340,
      "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # fmt: skip


def _beams(count: int) -> str:
    return f", {count} beams" if count > 1 else ""


def _compared(title: str, wanted: Sequence[Caption], got: Sequence[Caption]) -> tuple[str, ...]:
    identical = sum(a.tokens == b.tokens for a, b in zip(wanted, got, strict=True))
    return title, str(len(wanted)), str(identical), f"{token_agreement(wanted, got):.1%}"


def _placement(title: str, artifact: Path, device: str) -> Iterator[tuple[str, ...]]:
    """Of each graph, where onnxruntime's own profile saw its operators run."""
    from benchmarks.operators import profile

    def caption(captioner: Captioner) -> None:
        captioner.caption(sample_photos()[:2], num_beams=1)

    for graph, events in profile(artifact, caption, device=device).items():
        runs = sum(event["name"] == "model_run" for event in events)
        ran = [e["args"] for e in events if e["name"].endswith("_kernel_time")]
        if not runs:
            continue
        host = Counter(e["op_name"] for e in ran if e["provider"] == "CPUExecutionProvider")
        copies = sum(e["op_name"].startswith("Memcpy") for e in ran)
        names = ", ".join(f"{name} {count / runs:g}" for name, count in host.most_common())
        counts = (len(ran) - host.total() - copies, host.total(), copies)
        yield (f"{title}: {graph}", *(f"{count / runs:g}" for count in counts), names)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for the other benchmarks
    if sys.argv[1:2] == ["exact"]:
        exact(sys.argv[2])
    else:
        sys.exit(main())
