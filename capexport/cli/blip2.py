"""`capexport blip2`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from capexport.atomic import refuse_existing, require_writable
from capexport.bulk.files import find_images
from capexport.cli.command import teaching
from capexport.cli.comparing import add_photos, add_references, given_references
from capexport.errors import importing
from capexport.metrics import format_scores


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "blip2",
        help="export a BLIP-2 checkpoint to ONNX",
        **teaching(
            "Export a Hugging Face checkpoint of BLIP-2, with OPT or Flan-T5 as its language "
            "model, through Optimum: vision_encoder.onnx, embed_tokens.onnx, "
            "decoder_model_merged.onnx (with the key/value cache as inputs and outputs), for "
            "Flan-T5 encoder_model.onnx, tokenizer.json and manifest.json. The folder appears only "
            "if the graphs give PyTorch's values, and in fp32 its captions to the last token.",
            "capexport blip2 --out artifacts/blip2            # Salesforce/blip2-opt-2.7b",
            "capexport blip2 --model Salesforce/blip2-flan-t5-xl --precision fp16 --out DIR",
            "capexport blip2 --model my-checkpoint/ --precision int4 --out artifacts/mine",
        ),
    )
    parser.add_argument(
        "--model",
        default="Salesforce/blip2-opt-2.7b",
        metavar="ID",
        help="Hugging Face id, or a local folder (default: %(default)s)",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the id")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8", "int4"),
        default="fp32",
        help="fp32: exact (default); fp16: half the size, for CUDA; int8, int4: the language "
        "model's weights in 8 or 4 bits, the image part's in 8, for CPU",
    )
    add_photos(parser, "the first 16; with --references, all are scored")
    add_references(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # What the arguments alone tell is refused before torch is imported.
    refuse_existing(options.out)
    require_writable(options.out)
    photos = find_images(options.photos, sys.stdin)
    references = given_references(options)
    with importing("exporting BLIP-2 needs `pip install 'capexport[cpu,export,blip2]'`"):
        from capexport.export.blip2 import export_blip2
        from capexport.models.blip2_checkpoint import find_checkpoint
    folder, source = find_checkpoint(options.model, options.revision)
    manifest = export_blip2(
        folder, options.out, options.precision, source=source, photos=photos, references=references
    )
    assert manifest.parity is not None
    captions = manifest.parity.captions
    print(
        f"{options.out}: {manifest.size / 1e6:.1f} MB; {captions.identical} of "
        f"{captions.compared} captions identical to generate()'s, {captions.token_agreement:.0%} "
        f"of their tokens; error of the first logits {captions.logit_error:.1g}"
    )
    for name, metrics in (manifest.parity.metrics or {}).items():
        print(f"{name}: {format_scores(metrics)}")
    return 0
