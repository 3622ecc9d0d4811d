"""`capexport inspect`"""

from __future__ import annotations

import argparse
from typing import Any

from capexport.artifact import Manifest, local_folder
from capexport.cli.command import teaching


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="check an exported folder and say what it is",
        **teaching(
            "Check an exported folder against its manifest, and print the manifest.",
            "capexport inspect artifacts/first",
        ),
    )
    parser.add_argument("model", metavar="DIR", help="exported folder, or its id on the hub")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    print(Manifest.read(local_folder(options.model), thorough=True).to_json())
    return 0
