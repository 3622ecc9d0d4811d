"""Caption metrics of a captioner, PyTorch or ONNX: `python -m train.score CAPTIONER --data DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from capexport import Captioner
from capexport.artifact import FILE_NAME
from capexport.atomic import replace_file, require_writable_file
from capexport.cli import run_parser, teaching
from capexport.cli.decoding import add_decoding, given_decoding
from capexport.errors import OptionError, importing
from capexport.metrics import format_scores, score, scorers
from train.data import SPLITS, Photo, photos_as_trained


def caption_photos(
    captioner: Any, photos: Sequence[Photo], batch_size: int = 32, **options: Any
) -> dict[str, str]:
    """Each photo's caption by its name; `options` go to the captioner's `caption`."""
    captions = {}
    with tqdm(total=len(photos), desc="captioning") as bar:
        for start in range(0, len(photos), batch_size):
            batch = photos[start : start + batch_size]
            for photo, caption in zip(
                batch, captioner.caption([photo.path for photo in batch], **options), strict=True
            ):
                captions[photo.name] = caption.text
            bar.update(len(batch))
    return captions


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.score",
        **teaching(
            "Score a captioner on a split of a data set, cut as in its training: BLEU, ROUGE-L, "
            "CIDEr-D, and METEOR where Java runs.",
            "python -m train.score artifacts/first --data flickr8k   # ONNX",
            "python -m train.score runs/first --data flickr8k        # PyTorch",
        ),
    )
    parser.add_argument(
        "captioner", type=Path, help="exported folder (ONNX), or checkpoint or run folder (PyTorch)"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder of a data set"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the split, for a captioner that doesn't say its own (default: 0)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="photos a batch (default: 32)"
    )
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="also write {photo: caption} as JSON"
    )
    add_decoding(parser.add_argument_group("how it decodes"))
    return run_parser(parser, _score, argv)


def _score(options: argparse.Namespace) -> int:
    if options.batch_size < 1:
        raise OptionError("--batch-size must be at least 1")
    scorers()  # now, not after the captions
    if options.captions:
        require_writable_file(options.captions)
    if (options.captioner / FILE_NAME).exists():
        captioner = Captioner.load(options.captioner)
    else:
        with importing("a PyTorch captioner needs `pip install -e '.[train]'`"):
            from capexport.models.checkpoint import load_checkpoint
            from capexport.models.torch_captioner import torch_captioner
        captioner = torch_captioner(load_checkpoint(options.captioner))
    photos = photos_as_trained(options.data, options.split, options.captioner, options.seed)
    changes: Any = given_decoding(options)
    captions = caption_photos(captioner, photos, options.batch_size, **changes)
    if options.captions:
        options.captions.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(captions, indent=1, ensure_ascii=False)
        replace_file(options.captions, text + "\n")
    scores = score(captions, {photo.name: photo.captions for photo in photos})
    print(f"{len(photos)} photos: {format_scores(scores)}")
    print(json.dumps(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
