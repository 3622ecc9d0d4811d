"""What exports are compared on, on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from capexport.errors import OptionError
from capexport.metrics import scorers
from capexport.references import read_references


def add_photos(parser: argparse.ArgumentParser, which: str = "16 or more") -> None:
    """Add `--photos`; `which` says how many of them are compared."""
    parser.add_argument(
        "--photos",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"photos to compare captions on, {which} (default: seeded colour fields)",
    )


def add_references(
    parser: argparse.ArgumentParser,
    use: str = "to report BLEU, METEOR (where Java runs) and CIDEr too",
) -> None:
    """Add `--references`; `use` says what they are for."""
    parser.add_argument(
        "--references",
        type=Path,
        metavar="FILE",
        help=f"human captions of --photos, {use}: "
        "Flickr8k's or Flickr30k's file (columns image,caption or "
        "image_name,comment_number,comment; Flickr8k.token.txt), COCO's captions_*.json, "
        "Karpathy's dataset_*.json, or metadata.jsonl",
    )


def given_references(options: argparse.Namespace) -> Mapping[str, Sequence[str]] | None:
    """What `--references` names, if it was given.

    Raises:
        OptionError: there are no `--photos`.
        MissingExtraError: what scores captions is not installed.
        DatasetError: as `read_references`.
    """
    if options.references and not options.photos:
        raise OptionError("--references are human captions of --photos: pass both")
    references = read_references(options.references) if options.references else None
    if references:
        scorers()
    return references
