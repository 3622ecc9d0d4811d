"""What a trained BLIP-2 loses with each precision, on photos that it has not learnt from."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from capexport import Captioner
from capexport.atomic import replace_file
from capexport.bench.report import table
from capexport.captioner import Caption
from capexport.cli import run_parser, teaching
from capexport.export.blip2 import TOLERANCES, export_blip2
from capexport.export.parity import IMAGES, scored, token_agreement
from capexport.metrics import ciders, scorers
from capexport.models.blip2 import HuggingFaceCaptioner
from train.data import photos_as_trained

BATCH = 8
RESAMPLES = 2000
HEAD = (
    "", "MB", "BLEU-4", "CIDEr-D", "difference", "its 95% interval",
    "captions identical", "tokens identical",
)  # fmt: skip


class Photos(NamedTuple):
    paths: list[Path]
    names: list[str]
    references: dict[str, Sequence[str]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="quality.py",
        **teaching(
            "Export a BLIP-2 checkpoint in each precision and score its captions of a data set's "
            "test split, as it was cut for the training.",
            "python benchmarks/train_small_blip2.py --data flickr8k --out small --device cuda",
            "python benchmarks/quality.py --checkpoint small --data flickr8k",
        ),
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="BLIP-2 checkpoint"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="as of `python -m train`"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=TOLERANCES, default=[*TOLERANCES], metavar="NAME",
        help="default: all",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="photos (default: the split)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    return run_parser(parser, _run, argv)


def _run(options: argparse.Namespace) -> int:
    scorers()
    split = photos_as_trained(options.data, "test", options.checkpoint, None)[: options.limit]
    photos = Photos(
        [photo.path for photo in split],
        [photo.name for photo in split],
        {photo.name: photo.captions for photo in split},
    )
    wanted = HuggingFaceCaptioner.load(options.checkpoint).caption(photos.paths, batch_size=BATCH)
    size = sum(file.stat().st_size for file in options.checkpoint.glob("*.safetensors"))
    rows = [HEAD, _row("PyTorch fp32", size, wanted, wanted, photos)]
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precisions:
            out = Path(folder, precision)
            export_blip2(options.checkpoint, out, precision, photos=photos.paths[:IMAGES])
            captioner = Captioner.load(out)
            captioner.full_size = True  # as PyTorch has them
            got = captioner.caption(photos.paths, batch_size=BATCH)
            size = sum(file.stat().st_size for file in out.iterdir())
            rows.append(_row(f"ONNX {precision}", size, wanted, got, photos))
    text = f"{len(split)} photos, {len({c.text for c in wanted})} different captions\n\n"
    text += table(rows)
    print(text)
    if options.markdown:
        replace_file(options.markdown, text + "\n")
    return 0


def _row(
    name: str, size: int, wanted: Sequence[Caption], got: Sequence[Caption], photos: Photos
) -> tuple[str, ...]:
    scores = scored(photos.names, got, photos.references)
    same = np.mean([a.tokens == b.tokens for a, b in zip(wanted, got, strict=True)])
    change, low, high = _change(wanted, got, photos)
    return (
        name, f"{size / 1e6:.1f}", f"{scores['BLEU-4']:.2f}", f"{scores['CIDEr-D']:.2f}",
        f"{change:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{same:.1%}",
        f"{token_agreement(wanted, got):.1%}",
    )  # fmt: skip


def _change(
    wanted: Sequence[Caption], got: Sequence[Caption], photos: Photos
) -> tuple[float, float, float]:
    """The difference of CIDEr-D, and where it lies for other photos like these (bootstrap)."""

    def each(captions: Sequence[Caption]) -> np.ndarray:
        texts = {n: c.text for n, c in zip(photos.names, captions, strict=True)}
        return np.array(list(ciders(texts, photos.references).values()))

    gaps = each(got) - each(wanted)
    drawn = np.random.default_rng(0).integers(0, len(gaps), (RESAMPLES, len(gaps)))
    low, high = np.percentile(gaps[drawn].mean(1), [2.5, 97.5])
    return float(gaps.mean()), low, high


if __name__ == "__main__":
    sys.exit(main())
