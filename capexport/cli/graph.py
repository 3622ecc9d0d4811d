"""`capexport graph`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capexport.atomic import refuse_existing, require_writable
from capexport.bulk.files import find_images
from capexport.captioner import model_folder
from capexport.cli.command import add_model, teaching
from capexport.cli.comparing import add_photos, add_references, given_references
from capexport.cli.decoding import add_decoding, given_decoding
from capexport.errors import importing
from capexport.metrics import format_scores

if TYPE_CHECKING:
    from capexport.export.single_file import FileParity


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "graph",
        help="make one ONNX file of an exported folder, for any language",
        **teaching(
            "Write a whole captioner as one ONNX file: a photo's pixels go in (image: uint8, "
            "height x width x 3, any size, upright, RGB), a caption comes out (tokens: int64; "
            "words: strings; log_probability: float32). Any language that has onnxruntime runs it, "
            "without Python. The file appears only if it says what `Captioner` says.",
            "capexport graph --out captioner.onnx             # the bundled captioner",
            "capexport graph --out captioner.onnx --precision w8",
            "capexport graph artifacts/first --out captioner.onnx --photos photos/",
        ),
    )
    add_model(parser, "exported CNN-LSTM")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to create")
    add_photos(parser)
    parser.add_argument(
        "--precision",
        choices=("as-is", "w8"),
        default="as-is",
        help="as-is: the artifact's own (default); w8: the 8-bit weights of an int8 artifact, but "
        "computed in float32, which is faster in WebAssembly",
    )
    add_references(parser)
    add_decoding(parser.add_argument_group("how the file decodes"))
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    refuse_existing(options.out)
    require_writable(options.out)
    photos = find_images(options.photos, sys.stdin)
    references, decoding = given_references(options), given_decoding(options)
    with importing("a graph is made with `pip install 'capexport[cpu]' 'onnx>=1.23'`"):
        from capexport.export.single_file import export_file
    parity = export_file(
        model_folder(options.model),
        options.out,
        photos,
        precision=options.precision,
        references=references,
        decoding=decoding,
    )
    _report(options.out, parity)
    return 0


def _report(out: Path, parity: FileParity) -> None:
    captions, manifest = parity.captions, parity.manifest
    beams = manifest.decoding.num_beams
    print(
        f"{out}: {manifest.precision}, {f'{beams} beams' if beams > 1 else 'greedy'}, "
        f"{out.stat().st_size / 1e6:.1f} MB; {captions.identical} of {captions.images} captions "
        f"identical to Captioner's, log-probabilities to "
        f"{captions.max_log_probability_difference:.1g}, resizing to the bit at {parity.sizes} "
        "sizes"
    )
    if parity.kept:
        same, tokens = parity.kept
        print(f"w8: {same:.1%} of captions and {tokens:.1%} of tokens identical to int8's")
    for name, metrics in parity.metrics.items():
        print(f"{name}: {format_scores(metrics)}")
