"""`capexport web`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from capexport.atomic import refuse_existing, require_writable
from capexport.bulk.files import find_images
from capexport.captioner import model_folder
from capexport.cli.command import add_model, teaching
from capexport.cli.comparing import add_photos
from capexport.cli.decoding import add_decoding, given_decoding
from capexport.web import PACKAGE, write_site


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "web",
        help="make a web page that captions in the browser",
        **teaching(
            "Write a web page that captions photos in the browser, as static files that any web "
            "server hosts. Photos stay on the visitor's device, and after the first visit no "
            "network is needed. captioner.js, one of the files, captions for pages of your own.",
            "capexport web --out site/                        # the bundled captioner",
            "capexport web artifacts/first --out site/ --num-beams 1",
            "python -m http.server -d site/                   # to see it",
        ),
    )
    add_model(parser, "exported CNN-LSTM")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="DIR",
        help=f"the folder `dist` of the npm package {PACKAGE}; without it, npm fetches that",
    )
    parser.add_argument(
        "--precision",
        choices=("as-is", "w8"),
        help="as for `capexport graph` (default: w8 for an int8 artifact, which is faster in "
        "browsers; else as-is)",
    )
    add_photos(parser)
    add_decoding(parser.add_argument_group("how the page decodes"))
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    refuse_existing(options.out)
    require_writable(options.out)
    decoding = given_decoding(options)
    site = write_site(
        model_folder(options.model),
        options.out,
        find_images(options.photos, sys.stdin),
        runtime=options.runtime,
        precision=options.precision,
        decoding=decoding,
    )
    captions, precision = site.parity.captions, site.parity.manifest.precision
    total, graph = (size / 1e6 for size in (sum(site.sizes.values()), site.sizes["captioner.onnx"]))
    print(
        f"{options.out}: {len(site.sizes)} files, {total:.1f} MB, of which captioner.onnx "
        f"({precision}) {graph:.1f} MB; {captions.identical} of {captions.images} captions "
        f"identical to Captioner's"
    )
    print(f"to see it: python -m http.server -d {options.out}")
    return 0
