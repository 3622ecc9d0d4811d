"""What exports are compared on, on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from capexport.metrics import scorers
from capexport.references import read_references


def add_photos(parser: argparse.ArgumentParser) -> None:
    """Add `--photos`, of an export that compares 16 images or more."""
    parser.add_argument(
        "--photos",
        nargs="+",
        default=[],
        metavar="PATH",
        help="photos to compare captions on, 16 or more (default: seeded colour fields)",
    )


def given_references(options: argparse.Namespace) -> Mapping[str, Sequence[str]] | None:
    """What `--references` names, if it was given.

    Raises:
        MissingExtraError: what scores captions is not installed.
        DatasetError: as `read_references`.
    """
    references = read_references(options.references) if options.references else None
    if references:
        scorers()
    return references
