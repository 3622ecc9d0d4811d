"""`capexport graph`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from capexport.artifact import local_folder, refuse_existing, require_writable
from capexport.bulk.files import find_images
from capexport.captioner import BUNDLED_ARTIFACT
from capexport.cli.command import teaching
from capexport.errors import importing


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "graph",
        help="make one ONNX file of an exported folder, for any language",
        **teaching(
            "Write a whole captioner as one ONNX file: a photo's pixels go in (image: uint8, "
            "height x width x 3, any size, upright, RGB), a caption comes out (tokens: int64; "
            "words: strings; log_probability: float32). Any language that has onnxruntime runs it, "
            "without Python. The file appears only if it says what `Captioner` says.",
            "capexport graph --out captioner.onnx             # the captioner that comes along",
            "capexport graph artifacts/first --out captioner.onnx --photos photos/",
        ),
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="DIR",
        help="exported CNN-LSTM, or its id on the hub (default: the captioner that comes with "
        "capexport)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to create")
    parser.add_argument(
        "--photos",
        nargs="+",
        default=[],
        metavar="PATH",
        help="photos to compare captions on, 16 or more (default: seeded colour fields)",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    refuse_existing(options.out)
    require_writable(options.out)
    photos = find_images(options.photos, sys.stdin) if options.photos else []
    with importing("exporting needs `pip install 'capexport[cpu,export]'`"):
        from capexport.export.single import export_single
    folder = local_folder(options.model) if options.model else BUNDLED_ARTIFACT
    parity = export_single(folder, options.out, photos)
    size = options.out.stat().st_size / 1e6
    print(
        f"{options.out}: {size:.1f} MB; {parity.images} of {parity.images} captions identical to "
        f"Captioner's, largest difference of a log-probability "
        f"{parity.max_log_probability_difference:.1g}"
    )
    return 0
