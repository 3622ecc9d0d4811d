"""The options of decoding as flags, the same of every command that has them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, cast

from capexport.decoding import (
    LONGEST_CAPTION,
    MOST_BEAMS,
    DecodingKeywords,
    DecodingOptions,
    EarlyStopping,
)

# A flag for each option of decoding that has words for its help.
DECODING_FLAGS = [item for item in dataclasses.fields(DecodingOptions) if "help" in item.metadata]


def _early_stopping(text: str) -> EarlyStopping:
    if text == "never":
        return "never"
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true, false or never, got {text!r}")
    return text == "true"


_TYPES = {"int": int, "float": float, "EarlyStopping": _early_stopping}


def add_decoding(group: Any) -> None:
    """Add a flag for each option of decoding to a parser, or to a group of one."""
    for option in DECODING_FLAGS:
        group.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=_TYPES[str(option.type)],
            metavar="true|false|never" if option.type == "EarlyStopping" else "N",
            help=f"{option.metadata['help']} (default: the model's own)",
        )


def given_decoding(options: argparse.Namespace) -> DecodingKeywords:
    """The options of decoding that were given.

    Raises:
        OptionError: one is out of range for any model.
    """
    values = {item.name: getattr(options, item.name) for item in DECODING_FLAGS}
    given = {name: value for name, value in values.items() if value is not None}
    DecodingOptions((), **{"max_tokens": LONGEST_CAPTION, "num_beams": MOST_BEAMS, **given})
    return cast(DecodingKeywords, given)
