"""Caption metrics against what people wrote.

The scorers are those of the COCO captioning challenge (Chen et al. 2015), from `pycocoevalcap`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capexport.errors import MissingExtraError


def read_references(file: Path) -> dict[str, list[str]]:
    """Human captions by file name, from a CSV of names and captions as Flickr8k's captions.txt.

    Raises:
        ValueError: it is no such file.
    """
    references: dict[str, list[str]] = defaultdict(list)
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            for name, *caption in list(csv.reader(stream))[1:]:
                references[name].append(",".join(caption).strip())
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{file}: not a CSV of file names and captions: {error}") from error
    return references


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


def format_scores(scores: Mapping[str, float | str]) -> str:
    return "  ".join(
        f"{k} {v:.1f}" if isinstance(v, float) else f"({v})" for k, v in scores.items()
    )
