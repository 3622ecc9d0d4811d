"""Caption metrics of any captioner, PyTorch or ONNX: `python -m train.score CAPTIONER --data DIR`.

The scorers are those of the COCO captioning challenge (Chen et al. 2015), from `pycocoevalcap`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from capexport import Captioner
from capexport.artifact import FILE_NAME, replace_file
from capexport.cli import run_command, teaching
from capexport.errors import MissingExtraError
from train.data import SPLITS, Photo, read_flickr8k


def score(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float | str]:
    """BLEU-1..4, ROUGE-L and CIDEr-D, times 100, of one caption an image against its references.

    With Java on the PATH, METEOR comes along and captions are split by the Penn Treebank
    tokenizer, as in published figures; without it, by a regular expression that comes close.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise MissingExtraError("metrics need `pip install 'capexport[eval]'`") from error
    java = shutil.which("java") is not None
    tokenize = _by_treebank(PTBTokenizer()) if java else _by_regular_expression
    generated = tokenize({name: [caption] for name, caption in captions.items()})
    human = tokenize({name: list(references[name]) for name in captions})
    scores: dict[str, float | str] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints its length ratio
        bleu, _ = Bleu(4).compute_score(human, generated)
        scores.update({f"BLEU-{n}": 100 * value for n, value in enumerate(bleu, 1)})
        if java:
            scores["METEOR"] = 100 * Meteor().compute_score(human, generated)[0]
        scores["ROUGE-L"] = 100 * float(Rouge().compute_score(human, generated)[0])
        scores["CIDEr-D"] = 100 * float(Cider().compute_score(human, generated)[0])
    scores["tokenizer"] = "Penn Treebank" if java else "regular expression"
    return scores


def _by_treebank(tokenizer: Any) -> Any:
    def tokenize(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        # The Java tokenizer drops empty lines and so would shift captions: a lone period is kept,
        # and removed again as punctuation.
        return dict(
            tokenizer.tokenize(
                {name: [{"caption": text or "."} for text in some] for name, some in texts.items()}
            )
        )

    return tokenize


def _by_regular_expression(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {
        name: [" ".join(re.findall(r"'s|n't|\w+(?:-\w+)*", text.lower())) for text in some]
        for name, some in texts.items()
    }


def caption_photos(
    captioner: Captioner, photos: Sequence[Photo], batch_size: int = 32
) -> dict[str, str]:
    """Each photo's caption by its file name."""
    captions = {}
    with tqdm(total=len(photos), desc="captioning") as bar:
        for start in range(0, len(photos), batch_size):
            batch = photos[start : start + batch_size]
            for photo, caption in zip(
                batch, captioner.caption([photo.path for photo in batch]), strict=True
            ):
                captions[photo.name] = caption.text
            bar.update(len(batch))
    return captions


def format_scores(scores: Mapping[str, float | str]) -> str:
    return "  ".join(
        f"{k} {v:.1f}" if isinstance(v, float) else f"({v})" for k, v in scores.items()
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.score",
        **teaching(
            "Score a captioner on a split of Flickr8k: BLEU, ROUGE-L, CIDEr-D, and METEOR where "
            "Java is installed.",
            "python -m train.score artifacts/first --data flickr8k   # ONNX",
            "python -m train.score runs/first --data flickr8k        # PyTorch",
        ),
    )
    parser.add_argument(
        "captioner", type=Path, help="exported folder (ONNX), or checkpoint or run folder (PyTorch)"
    )
    parser.add_argument("--data", type=Path, required=True, help="Flickr8k folder")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    parser.add_argument("--batch-size", type=int, default=32, help="photos a batch (default: 32)")
    parser.add_argument(
        "--captions", type=Path, help="also write {file name: caption} to this JSON"
    )
    options = parser.parse_args(argv)
    return run_command("train.score", lambda: _score(options))


def _score(options: argparse.Namespace) -> int:
    if (options.captioner / FILE_NAME).exists():
        captioner = Captioner.load(options.captioner)
    else:
        try:
            from capexport.models.checkpoint import load_checkpoint
            from capexport.models.torch_captioner import torch_captioner
        except ImportError as error:
            raise MissingExtraError(
                f"a PyTorch captioner needs `pip install -e '.[train]'` ({error})"
            ) from error
        captioner = torch_captioner(load_checkpoint(options.captioner))
    photos = read_flickr8k(options.data, 0.1, 0.1, options.seed).splits[options.split]
    captions = caption_photos(captioner, photos, options.batch_size)
    scores = score(captions, {photo.name: photo.captions for photo in photos})
    if options.captions:
        replace_file(options.captions, json.dumps(captions, indent=1) + "\n")
    print(f"{len(photos)} photos: {format_scores(scores)}")
    print(json.dumps(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
