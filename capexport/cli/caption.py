"""`capexport caption`"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from capexport.artifact import FILE_NAME, local_folder, sha256_of
from capexport.bulk.files import find_images
from capexport.bulk.outputs import (
    FORMATS,
    FileOutput,
    Output,
    SideCars,
    StreamOutput,
    journal_of,
)
from capexport.bulk.run import caption_files, open_captioner
from capexport.captioner import BUNDLED_ARTIFACT
from capexport.cli.command import teaching
from capexport.decoding import DecodingOptions
from capexport.errors import ImageError, OptionError
from capexport.sessions import available_cores

# A flag for each option of decoding that has words for its help.
DECODING_FLAGS = [item for item in dataclasses.fields(DecodingOptions) if "help" in item.metadata]
_TYPES = {"int": int, "float": float}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
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
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files, folders (searched in depth), glob patterns, or - for a list on standard input",
    )
    parser.add_argument(
        "-m",
        "--model",
        metavar="DIR",
        help="exported folder, or its id on the hub (default: the Flickr8k captioner that comes "
        "with capexport)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="text: name and caption, tab between (default); jsonl: metadata.jsonl of Hugging Face "
        "datasets; coco: COCO results; txt: a file beside each image, as LoRA trainers read",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what captions go on from, or a question (BLIP-2)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted --out or txt run"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 32, for a BLIP-2 8")
    for option in DECODING_FLAGS:
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=_TYPES[str(option.type)],
            metavar="N",
            help=f"{option.metadata['help']} (default: the model's own)",
        )
    parser.add_argument(
        "--device", default="cpu", help="cpu (default), cuda, cuda:1, or auto: the first that works"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    _check(options)
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
    given = {item.name: getattr(options, item.name) for item in DECODING_FLAGS}
    changes: Any = {name: value for name, value in given.items() if value is not None}
    dataclasses.replace(captioner.options, **changes)  # refused before anything is written
    output = _output(options, paths, f"{sha256_of(model / FILE_NAME)} {changes}")
    todo = [path for path in paths if not output.done(path)]
    results = caption_files(
        captioner,
        todo,
        output,
        batch_size=options.batch_size or captioner.batch_size,
        workers=options.threads or available_cores(),
        prompt=options.prompt,
        **changes,
    )
    resumable = bool(out) or options.format == "txt"
    failed = _follow(results, len(paths), len(paths) - len(todo), resumable)
    if failed:
        print(f"capexport: {failed} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if failed else 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what the arguments alone tell."""
    if options.batch_size is not None and options.batch_size < 1:
        raise OptionError(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.format == "txt" and options.out:
        raise OptionError("--format txt writes beside the images: leave out --out")
    if options.resume and options.format != "txt" and not options.out:
        raise OptionError("--resume needs --out FILE (or --format txt) to go on with")


def _output(options: argparse.Namespace, paths: Sequence[Path], key: str) -> Output:
    """Where captions go; `key` says what a journal was begun with."""
    if options.format == "txt":
        return SideCars(paths, options.resume)
    if options.out:
        key = f"{key} prompt={options.prompt!r}"
        return FileOutput(options.out, options.format, paths, key, options.resume)
    return StreamOutput(options.format, sys.stdout, paths)


def _follow(
    results: Iterator[tuple[int, list[ImageError]]], total: int, done: int, resumable: bool
) -> int:
    """Show progress and errors as they come; how many images could not be read."""
    failed = 0
    with tqdm(total=total, initial=done, unit="image", disable=None) as bar:
        try:
            for count, errors in results:
                for error in errors:
                    tqdm.write(f"capexport: {error}", file=sys.stderr)
                failed += len(errors)
                bar.update(count)
        except KeyboardInterrupt:
            if resumable:
                tqdm.write("capexport: captions so far are kept; go on with --resume", sys.stderr)
            raise
    return failed
