"""Each backbone exported at its full size: files, times and errors.

Weights are random, with the batch-norm statistics of the photos: sizes, times and the parity of
float32 are those of trained weights. What int8 loses is not: errors grow through many random
layers, so that a refusal here tells little of trained weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from capexport import Captioner
from capexport.atomic import replace_file
from capexport.bench.cli import sample_photos
from capexport.bench.report import cpu_model, load, table
from capexport.cli import run_parser, teaching
from capexport.errors import OptionError, ParityError
from capexport.export.cnn_lstm import export_cnn_lstm
from capexport.families.cnn_lstm import Vocabulary
from capexport.models.backbones import BACKBONES
from capexport.models.checkpoint import Checkpoint
from capexport.models.cnn_lstm import CnnLstm, CnnLstmConfig
from capexport.models.torch_captioner import torch_captioner
from capexport.preprocessing import preprocess

RUNS = 20
HEAD = (
    "backbone", "MB in fp32", "MB in int8", "PyTorch ms", "fp32 ms", "int8 ms",
    "difference in fp32", "error of int8",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backbones.py",
        **teaching(
            "Export backbones with random weights and print a table: files, milliseconds of the "
            "image encoder at batch 1 (PyTorch in channels_last), and what differs.",
            "python benchmarks/backbones.py --threads 2",
            "python benchmarks/backbones.py resnet18 efficientnet_b0 --markdown FILE",
        ),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BACKBONES))
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table")
    return run_parser(parser, _table, argv)


def _table(options: argparse.Namespace) -> int:
    names, threads = options.names or tuple(BACKBONES), options.threads
    if unknown := set(names) - set(BACKBONES):
        raise OptionError(f"unknown: {', '.join(unknown)}; there are {', '.join(BACKBONES)}")
    torch.set_num_threads(threads)
    rows = [HEAD]
    print(*HEAD, sep=", ", file=sys.stderr)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_row(name, Path(folder), threads))
        print(*rows[-1], sep=", ", file=sys.stderr)
    text = f"{cpu_model()}, {threads} threads, load {load():.1f}\n\n{table(rows)}"
    if options.markdown:
        replace_file(options.markdown, text + "\n")
    print(text)
    return 0


def _row(name: str, folder: Path, threads: int) -> tuple[str, ...]:
    photos = sorted(sample_photos()[0].parent.glob("*.[jp][pn]g"))[:16]
    checkpoint = random_checkpoint(name, photos)
    manifest = export_cnn_lstm(checkpoint, folder / "fp32", photos)
    captioners = [torch_captioner(checkpoint), Captioner.load(folder / "fp32", threads=threads)]
    try:
        lost = export_cnn_lstm(
            checkpoint, folder / "int8", photos, precision="int8", calibration=photos
        ).parity.int8
        captioners.append(Captioner.load(folder / "int8", threads=threads))
        error = f"{(lost or {})['encoder.onnx']:.3f}"
    except ParityError as refusal:
        error = f"refused: {refusal}"
    pixels = captioners[0].preprocess(photos[0])[None]
    times = _milliseconds([lambda run=captioner.encoder: run(pixels) for captioner in captioners])
    sizes = [
        f"{(folder / precision / 'encoder.onnx').stat().st_size / 1e6:.1f}"
        for precision in ("fp32", "int8")
        if (folder / precision).exists()
    ]
    worst = max((manifest.parity.max_difference or {}).values())
    return (
        name, *(*sizes, "-")[:2], *(*(f"{ms:.1f}" for ms in times), "-")[:3], f"{worst:.1g}", error
    )  # fmt: skip


def random_checkpoint(name: str, photos: list[Path]) -> Checkpoint:
    """Random weights that tell photos apart, by the batch-norm statistics of those."""
    torch.manual_seed(0)
    words = (*Vocabulary.SPECIALS, *(f"word{number}" for number in range(100)))
    model = CnnLstm(CnnLstmConfig(len(words), backbone=name))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    spec = BACKBONES[name].image
    pixels = torch.from_numpy(np.stack([preprocess(photo, spec) for photo in photos]))
    with torch.no_grad():
        nn.Module.train(model)
        model.encoder(pixels)
    return Checkpoint(model.eval(), Vocabulary(words), spec)


def _milliseconds(calls: list[Callable[[], object]]) -> list[float]:
    """The median of each, called in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(RUNS):
        for call, spent in zip(calls, times, strict=True):
            time.sleep(0.03)  # PyTorch's threads and onnxruntime's spin for a moment after a call
            call()
            began = time.perf_counter()
            call()
            spent.append(1000 * (time.perf_counter() - began))
    return [statistics.median(spent) for spent in times]


if __name__ == "__main__":
    sys.exit(main())
