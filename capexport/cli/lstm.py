"""`capexport lstm`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from capexport.artifact import Manifest
from capexport.atomic import refuse_existing, require_writable
from capexport.bulk.files import find_images
from capexport.cli.command import teaching
from capexport.cli.comparing import add_photos, add_references, given_references
from capexport.cli.decoding import add_decoding, given_decoding
from capexport.errors import CheckpointError, OptionError, importing
from capexport.metrics import format_scores

BUNDLED_CHECKPOINT = Path(__file__).parents[2] / "artifacts" / "default"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "lstm",
        help="export a CNN-LSTM checkpoint to ONNX",
        **teaching(
            "Export a CNN-LSTM checkpoint to a folder that `Captioner.load` reads: encoder.onnx, "
            "decoder_loop.onnx (whole captions), decoder_step.onnx (single steps, for what the "
            "loop cannot do), vocabulary.json and manifest.json. The folder appears only if the "
            "graphs give the same values and captions as PyTorch. int8 graphs are made from "
            "graphs that passed, and their manifest says what they lose.",
            "capexport lstm --out artifacts/demo              # the bundled Flickr8k model",
            "capexport lstm runs/first --out artifacts/first --photos photos/",
            "capexport lstm runs/first --out artifacts/small --precision int8 \\",
            "    --calibration training/ --photos test/ --references captions.txt",
        ),
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        help="checkpoint or run folder of `python -m train` (default: the bundled one)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    add_photos(parser)
    parser.add_argument(
        "--precision",
        choices=("fp32", "int8"),
        default="fp32",
        help="fp32: exact (default); int8: less than a third of the size, faster on most CPUs",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="PATH",
        help="photos that show int8 the range of values: about a hundred, like those that the "
        "model was trained on",
    )
    add_references(parser)
    add_decoding(parser.add_argument_group("how the artifact decodes by default"))
    parser.set_defaults(run=_run)


def bundled_checkpoint() -> Path:
    if not BUNDLED_CHECKPOINT.is_dir():
        raise CheckpointError(
            "the bundled checkpoint comes with a checkout of the repository, not with the package: "
            "pass a CHECKPOINT folder"
        )
    return BUNDLED_CHECKPOINT


def _run(options: argparse.Namespace) -> int:
    # What the arguments alone tell is refused before torch is imported.
    refuse_existing(options.out)
    require_writable(options.out)
    if (options.precision == "int8") != bool(options.calibration):
        raise OptionError("int8, and int8 alone, needs --calibration photos: a hundred or so")
    photos, calibration = (
        find_images(paths, sys.stdin) for paths in (options.photos, options.calibration)
    )
    references, decoding = given_references(options), given_decoding(options)
    with importing("exporting needs `pip install 'capexport[cpu,export]'`"):
        from capexport.export.cnn_lstm import export_cnn_lstm
        from capexport.models.checkpoint import load_checkpoint
    checkpoint = load_checkpoint(options.checkpoint or bundled_checkpoint())
    manifest = export_cnn_lstm(
        checkpoint,
        options.out,
        photos,
        precision=options.precision,
        calibration=calibration,
        references=references,
        decoding=decoding,
    )
    _report(options.out, manifest)
    return 0


def _report(out: Path, manifest: Manifest) -> None:
    parity = manifest.parity
    assert parity is not None and parity.max_difference is not None
    captions = parity.captions
    difference = max(parity.max_difference.values())
    print(
        f"{out}: {manifest.size / 1e6:.1f} MB; {captions.identical} of {captions.images} captions "
        f"identical to PyTorch's in fp32, largest difference of a value {difference:.1g}"
    )
    if parity.int8:
        print(
            f"int8: {parity.int8['identical_captions']:.1%} of captions and "
            f"{parity.int8['token_agreement']:.1%} of tokens identical to PyTorch's"
        )
    for name, metrics in (parity.metrics or {}).items():
        print(f"{name}: {format_scores(metrics)}")
