"""The `capexport` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from capexport.artifact import FILE_NAME, Manifest, sha256_of
from capexport.bulk import (
    FORMATS,
    FileOutput,
    Output,
    SideCars,
    StreamOutput,
    caption_files,
    default_batch_size,
    find_images,
    journal_of,
    open_captioner,
)
from capexport.captioner import BUNDLED_ARTIFACT, available_cores, local_folder
from capexport.errors import CapexportError, CheckpointError, MissingExtraError
from capexport.references import read_references

BUNDLED_CHECKPOINT = Path(__file__).parent.parent / "artifacts" / "default"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0: done; 1: some images could not be read; 2: refused, with one line that says why;
    130: interrupted; 141: nobody reads standard output any more.
    """
    options = _parser().parse_args(argv)
    show_progress()
    return run_command("capexport", lambda: int(options.run(options)))


class _ToStderr(logging.Handler):
    """Messages above the progress bars, on whatever standard error is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def show_progress() -> None:
    """Print what the package logs."""
    log = logging.getLogger("capexport")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(_ToStderr())


def run_command(name: str, command: Callable[[], int]) -> int:
    """`command()`, with the errors a user can mend as one line on standard error."""
    try:
        return command()
    except BrokenPipeError:  # as when `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (CapexportError, OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130


def teaching(description: str, *examples: str) -> dict[str, Any]:
    """Arguments for an `ArgumentParser` whose help ends in examples, a line each."""
    return {
        "description": textwrap.fill(description, 79),
        "epilog": "\n  ".join(["examples:", *examples]),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="capexport", description="Image captioning from training to production."
    )
    parser.add_argument(
        "--version", action="version", version=f"capexport {metadata.version('capexport')}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    lstm = commands.add_parser(
        "lstm",
        help="export a CNN-LSTM checkpoint to ONNX",
        **teaching(
            "Export a CNN-LSTM checkpoint to a folder that `Captioner.load` reads: encoder.onnx, "
            "decoder_loop.onnx (whole captions), decoder_step.onnx (single steps, for what the "
            "loop cannot do), vocabulary.json and manifest.json. The folder appears only if the "
            "graphs give the same values and captions as PyTorch; int8 graphs are made of such "
            "ones, and their manifest says what they lose.",
            "capexport lstm --out artifacts/demo              # the bundled Flickr8k model",
            "capexport lstm runs/first --out artifacts/first --photos photos/",
            "capexport lstm runs/first --out artifacts/small --precision int8 \\",
            "    --calibration training/ --photos test/ --references captions.txt",
        ),
    )
    lstm.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        help="checkpoint or run folder of `python -m train` (default: the bundled one)",
    )
    lstm.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    lstm.add_argument(
        "--photos",
        nargs="+",
        default=[],
        metavar="PATH",
        help="photos to compare captions on, 16 or more (default: seeded colour fields)",
    )
    lstm.add_argument(
        "--precision",
        choices=("fp32", "int8"),
        default="fp32",
        help="fp32: exact (default); int8: a third of the size, faster on CPU",
    )
    lstm.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="PATH",
        help="photos that show int8 the range of values, a hundred or so of the kind that the "
        "model was trained on",
    )
    lstm.add_argument(
        "--references",
        type=Path,
        metavar="FILE",
        help="human captions of --photos, in a file as Flickr8k's or Flickr30k's (columns "
        "image,caption or image_name,comment_number,comment; Flickr8k.token.txt): also report BLEU "
        "and CIDEr",
    )
    lstm.set_defaults(run=_export_lstm)

    blip2 = commands.add_parser(
        "blip2",
        help="export a BLIP-2 checkpoint to ONNX",
        **teaching(
            "Export a BLIP-2 checkpoint of Hugging Face, with OPT or Flan-T5 as its language "
            "model, through Optimum: vision_encoder.onnx, embed_tokens.onnx, "
            "decoder_model_merged.onnx (the key/value cache in and out), for Flan-T5 "
            "encoder_model.onnx, tokenizer.json and manifest.json. The folder appears only if the "
            "graphs give PyTorch's values; in fp32, its captions to the last token.",
            "capexport blip2 --out artifacts/blip2            # Salesforce/blip2-opt-2.7b",
            "capexport blip2 --model Salesforce/blip2-flan-t5-xl --precision fp16 --out DIR",
            "capexport blip2 --model my-checkpoint/ --precision int4 --out artifacts/mine",
        ),
    )
    blip2.add_argument(
        "--model",
        default="Salesforce/blip2-opt-2.7b",
        metavar="ID",
        help="Hugging Face id, or a local folder (default: %(default)s)",
    )
    blip2.add_argument("--revision", metavar="R", help="branch, tag or commit of the id")
    blip2.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    blip2.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8", "int4"),
        default="fp32",
        help="fp32: exact (default); fp16: half the size, for CUDA; int8, int4: the language "
        "model's weights in so many bits, the image part's in 8, for CPU",
    )
    blip2.add_argument(
        "--photos",
        nargs="+",
        default=[],
        metavar="PATH",
        help="photos to compare captions on (default: seeded colour fields)",
    )
    blip2.set_defaults(run=_export_blip2)

    caption = commands.add_parser(
        "caption",
        help="caption images",
        **teaching(
            "Caption images with an exported model. One unreadable image does not stop the rest: "
            "it is reported, and the exit code is 1.",
            "capexport caption photo.jpg",
            "capexport caption -m artifacts/first photos/ --format jsonl --out metadata.jsonl",
            "find . -name '*.png' | capexport caption -m artifacts/first - --format txt",
        ),
    )
    caption.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files, folders (searched in depth), glob patterns, or - for a list on standard input",
    )
    caption.add_argument(
        "-m",
        "--model",
        metavar="DIR",
        help="exported folder, or its id on the hub (default: the Flickr8k captioner that comes "
        "with capexport)",
    )
    caption.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="text: name and caption, tab between (default); jsonl: metadata.jsonl of Hugging Face "
        "datasets; coco: COCO results; txt: a file beside each image, as LoRA trainers read",
    )
    caption.add_argument(
        "--prompt", metavar="TEXT", help="what captions go on from, or a question (BLIP-2)"
    )
    caption.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    caption.add_argument(
        "--resume", action="store_true", help="go on with an interrupted --out or txt run"
    )
    caption.add_argument("--batch-size", type=int, metavar="N", help="default: 32, for a BLIP-2 8")
    caption.add_argument("--max-tokens", type=int, metavar="N", help="longest caption, in tokens")
    caption.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    caption.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    caption.set_defaults(run=_caption)

    inspect = commands.add_parser(
        "inspect",
        help="check an exported folder and say what it is",
        **teaching(
            "Check an exported folder against its manifest, and print the manifest.",
            "capexport inspect artifacts/first",
        ),
    )
    inspect.add_argument("model", metavar="DIR", help="exported folder, or its id on the hub")
    inspect.set_defaults(run=_inspect)
    return parser


def bundled_checkpoint() -> Path:
    if not BUNDLED_CHECKPOINT.is_dir():
        raise CheckpointError(
            "the bundled checkpoint comes with a checkout of the repository, not with the package: "
            "pass a CHECKPOINT folder"
        )
    return BUNDLED_CHECKPOINT


def _export_lstm(options: argparse.Namespace) -> int:
    try:
        from capexport.export.cnn_lstm import export_cnn_lstm
        from capexport.export.metrics import format_scores
        from capexport.models.checkpoint import load_checkpoint
    except ImportError as error:
        raise MissingExtraError(
            f"exporting needs `pip install 'capexport[cpu,export]'` ({error})"
        ) from error
    checkpoint = load_checkpoint(options.checkpoint or bundled_checkpoint())
    photos, calibration = (
        find_images(paths, sys.stdin) if paths else []
        for paths in (options.photos, options.calibration)
    )
    manifest = export_cnn_lstm(
        checkpoint,
        options.out,
        photos,
        precision=options.precision,
        calibration=calibration,
        references=read_references(options.references) if options.references else None,
    )
    parity = manifest.parity
    captions = parity["captions"]
    difference = max(parity["max_difference"].values())
    size = sum(record.bytes for record in manifest.files.values()) / 1e6
    print(
        f"{options.out}: {size:.1f} MB; {captions['identical']} of {captions['images']} captions "
        f"identical to PyTorch's in fp32, largest difference of a value {difference:.1g}"
    )
    if options.precision == "int8":
        print(
            f"int8: {parity['int8']['identical_captions']:.1%} of captions and "
            f"{parity['int8']['token_agreement']:.1%} of tokens identical to PyTorch's"
        )
    for name, metrics in parity.get("metrics", {}).items():
        print(f"{name}: {format_scores(metrics)}")
    return 0


def _export_blip2(options: argparse.Namespace) -> int:
    try:
        from capexport.export.blip2 import export_blip2
        from capexport.models.blip2 import find_checkpoint
    except ImportError as error:
        raise MissingExtraError(
            f"exporting BLIP-2 needs `pip install 'capexport[cpu,export,blip2]'` ({error})"
        ) from error
    # Without a network it warns of every attempt; the error at the end says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    folder, source = find_checkpoint(options.model, options.revision)
    photos = find_images(options.photos, sys.stdin) if options.photos else []
    manifest = export_blip2(folder, options.out, options.precision, source=source, photos=photos)
    captions = manifest.parity["captions"]
    size = sum(record.bytes for record in manifest.files.values()) / 1e6
    print(
        f"{options.out}: {size:.1f} MB; {captions['identical']} of {captions['compared']} captions "
        f"identical to generate()'s, {captions['token_agreement']:.0%} of their tokens; error of "
        f"the first logits {captions['logit_error']:.1g}"
    )
    return 0


def _caption(options: argparse.Namespace) -> int:
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.format == "txt" and options.out:
        raise ValueError("--format txt writes beside the images: leave out --out")
    if options.resume and options.format != "txt" and not options.out:
        raise ValueError("--resume needs --out FILE (or --format txt) to go on with")
    out = options.out
    if options.resume and out and out.exists() and not journal_of(out).exists():
        print(f"capexport: {out} is complete", file=sys.stderr)
        return 0
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    # Pillow still refuses real decompression bombs; its warning names no file.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    paths = find_images(options.paths, sys.stdin)
    model = local_folder(options.model) if options.model else BUNDLED_ARTIFACT
    captioner = open_captioner(model, options.device, options.threads)
    changes = {} if options.max_tokens is None else {"max_tokens": options.max_tokens}
    output: Output
    if options.format == "txt":
        output = SideCars(paths, options.resume)
    elif options.out:
        key = f"{sha256_of(model / FILE_NAME)} {changes} prompt={options.prompt!r}"
        output = FileOutput(options.out, options.format, paths, key, options.resume)
    else:
        output = StreamOutput(options.format, sys.stdout, paths)
    todo = [path for path in paths if not output.done(path)]
    failed = 0
    with tqdm(total=len(paths), initial=len(paths) - len(todo), unit="image", disable=None) as bar:
        try:
            for count, errors in caption_files(
                captioner,
                todo,
                output,
                batch_size=options.batch_size or default_batch_size(captioner),
                workers=options.threads or available_cores(),
                prompt=options.prompt,
                changes=changes,
            ):
                for error in errors:
                    tqdm.write(f"capexport: {error}", file=sys.stderr)
                failed += len(errors)
                bar.update(count)
        except KeyboardInterrupt:
            if options.out or options.format == "txt":
                tqdm.write("capexport: captions so far are kept; go on with --resume", sys.stderr)
            raise
    if failed:
        print(f"capexport: {failed} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if failed else 0


def _inspect(options: argparse.Namespace) -> int:
    print(
        json.dumps(
            dataclasses.asdict(Manifest.read(local_folder(options.model), thorough=True)), indent=1
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
