"""`capexport caption`"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from capexport.artifact import FILE_NAME
from capexport.atomic import replacing_binary_file, sha256_of
from capexport.bulk.files import READERS, STDIN, Found, search
from capexport.bulk.names import shown
from capexport.bulk.outputs import (
    FORMATS,
    FileOutput,
    Output,
    SideCars,
    StreamOutput,
    refuse_existing,
)
from capexport.bulk.run import caption_files, open_captioner
from capexport.captioner import Captioner, model_folder
from capexport.cli.command import say, teaching
from capexport.cli.decoding import add_decoding, given_decoding
from capexport.errors import ImageError, OptionError, OutputExistsError
from capexport.preprocessing import image_suffixes
from capexport.sessions import available_cores

_FORMAT_OF = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".json": "coco"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "caption",
        help="caption images",
        **teaching(
            "Caption images with an exported model. One unreadable image does not stop the rest: "
            "it is reported, and the exit code is 1.",
            "capexport caption photo.jpg",
            "capexport caption -m artifacts/first photos/ --out photos/metadata.jsonl",
            "capexport caption photos/ --format txt --prefix 'in the style of xyz, '",
            "find . -name '*.png' -print0 | capexport caption - --format csv",
        ),
    )
    parser.add_argument(
        "-m",
        "--model",
        metavar="DIR",
        help="exported folder, or its id on the hub (default: the bundled captioner)",
    )
    _add_files(parser.add_argument_group("which images"))
    _add_outputs(parser.add_argument_group("where captions go"))
    _add_captions(parser.add_argument_group("what captions say"))
    running = parser.add_argument_group("how it runs")
    running.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="cpu (default), cuda, cuda:1, or auto: the first that works",
    )
    running.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    running.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="how many images go through the model together (default: 32, for a BLIP-2 8)",
    )
    running.add_argument(
        "--quiet", action="store_true", help="print nothing but captions and errors"
    )
    parser.set_defaults(run=_run)


def _add_files(group: Any) -> None:
    group.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files, folders (searched recursively), glob patterns, or - for standard input: an "
        "image, or a list of files, one a line or separated by NUL",
    )
    group.add_argument(
        "--no-recursive", action="store_true", help="leave out the folders inside of folders"
    )
    group.add_argument(
        "--truncated", action="store_true", help="caption what there is of a file that breaks off"
    )
    group.add_argument(
        "--full-size",
        action="store_true",
        help="decode large JPEGs whole; by default only to about twice the size that the model "
        "takes, which is several times as fast",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="caption only the first N; with --resume, N more"
    )


def _add_outputs(group: Any) -> None:
    group.add_argument(
        "--format",
        choices=FORMATS,
        help="text: name, tab, caption; jsonl: as metadata.jsonl of Hugging Face datasets; csv: a "
        "table, safe to open in a spreadsheet; coco: COCO results; txt: a text file beside each "
        "image, as LoRA trainers read them (default: by the ending of --out, .jsonl, .csv, or "
        ".json for coco; txt with --out-dir or --extension; else text)",
    )
    group.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (default, and -: standard output)"
    )
    group.add_argument(
        "--out-dir",
        type=_folder,
        metavar="DIR",
        help="txt: write the files below this folder, in the same subfolders",
    )
    group.add_argument(
        "--extension", metavar=".EXT", help="txt: of the files' names (default: .txt)"
    )
    group.add_argument(
        "--resume",
        "--skip-existing",
        action="store_true",
        help="caption only what is missing in --out (txt: what has no file), and keep the rest",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace what is there: --out, or the files of txt"
    )
    group.add_argument(
        "--attention",
        type=Path,
        metavar="FILE.png",
        help="also draw where the model looked for each word; takes one photo",
    )
    group.add_argument(
        "--scores", action="store_true", help="jsonl, csv: add each caption's log-probability"
    )


def _folder(name: str) -> Path:
    if not name:
        raise argparse.ArgumentTypeError("an empty name is no folder; this one is .")
    return Path(name)


def _add_captions(group: Any) -> None:
    group.add_argument(
        "--prompt", metavar="TEXT", help="text that captions continue, such as a question (BLIP-2)"
    )
    group.add_argument("--prefix", default="", metavar="TEXT", help="put before every caption")
    group.add_argument("--suffix", default="", metavar="TEXT", help="put after every caption")
    add_decoding(group)


def _run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    _check(options)
    if options.quiet:
        logging.getLogger("capexport").setLevel(logging.WARNING)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    # Pillow still refuses real decompression bombs; its warning names no file.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    changes: Any = given_decoding(options)
    found = search(options.paths, sys.stdin, not options.no_recursive)
    model = model_folder(options.model)
    captioner = open_captioner(model, options.device, options.threads)
    captioner.truncated, captioner.full_size = options.truncated, options.full_size
    if options.attention:
        _check_attention(captioner, found)
    own = dataclasses.replace(captioner.options, **changes)  # refused before anything is written
    columns = (
        4 if own.num_return_sequences > 1 and options.format == "jsonl" else 2 + options.scores
    )
    with closing(_output(options, found, _key(options, model, changes), columns)) as output:
        missing = [path for path in found.paths if not output.done(path)]
        todo = missing[: options.limit]
        results = caption_files(
            captioner,
            todo,
            output,
            batch_size=options.batch_size or captioner.batch_size,
            workers=options.threads or available_cores(),
            prompt=options.prompt,
            prefix=options.prefix,
            suffix=options.suffix,
            columns=columns,
            content=found.content,
            **changes,
        )
        failed = _follow(results, options, len(todo))
    if options.attention and not failed:
        _draw_attention(captioner, found, options, changes)
    left_out = found.ignored.copy()
    left_out["there already"] = len(found.paths) - len(missing)
    left_out["for later"] = len(missing) - len(todo)
    if not options.quiet:
        say(_summary(options, found, left_out, len(todo), failed, time.monotonic() - began))
    return 1 if failed or found.problems or found.unreadable() else 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what the arguments alone tell; find the format where none is given."""
    for name in ("batch_size", "threads", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("prompt", "prefix", "suffix"):
        if any("\ud800" <= character <= "\udfff" for character in getattr(options, name) or ""):
            raise OptionError(f"--{name} is no text: it holds bytes that are not UTF-8")
    if options.out == STDIN:  # as other tools name standard output
        options.out = None
    beside = options.out_dir is not None or options.extension is not None
    if options.format is None:
        suffix = options.out.suffix.lower() if options.out else ""
        options.format = "txt" if beside else _FORMAT_OF.get(suffix, "text")
    txt = options.format == "txt"
    if txt and options.out:
        raise OptionError("--format txt writes beside the images, or to --out-dir: leave out --out")
    if beside and not txt:
        raise OptionError(f"--out-dir and --extension go with --format txt, not {options.format}")
    if options.extension is not None:
        options.extension = _checked_extension(options.extension)
    for flag in ("resume", "overwrite"):
        if getattr(options, flag) and not (txt or options.out):
            raise OptionError(f"--{flag} needs --out FILE (or --format txt) to go on with")
    if options.resume and options.overwrite:
        raise OptionError("--resume keeps what --overwrite replaces: choose one")
    if options.scores and options.format not in ("jsonl", "csv"):
        raise OptionError(f"--scores needs --format jsonl or csv; {options.format} has no place")
    if (options.num_return_sequences or 1) > 1 and options.format != "jsonl":
        raise OptionError(
            f"--num-return-sequences needs --format jsonl; {options.format} has no place"
        )
    if options.out:
        refuse_existing(options.out, options.resume or options.overwrite)
    if options.attention:
        _refuse_drawing(options.attention)
    if sys.stdout is None and not (txt or options.out):
        raise OptionError("standard output is closed: name a file with --out")


def _check_attention(captioner: Captioner, found: Found) -> None:
    if len(found.paths) != 1:
        raise OptionError(f"--attention draws one photo, and {len(found.paths)} were found")
    captioner.check_attention(True)


def _draw_attention(
    captioner: Captioner, found: Found, options: argparse.Namespace, changes: Any
) -> None:
    from capexport.attention import draw_attention

    [path] = found.paths
    image = found.content.get(path, path)
    caption = captioner.caption(image, prompt=options.prompt, attention=True, **changes)
    options.attention.parent.mkdir(parents=True, exist_ok=True)
    with replacing_binary_file(options.attention) as file:
        draw_attention(captioner, image, caption).save(file, "PNG")
        _refuse_drawing(options.attention)  # made meanwhile


def _refuse_drawing(path: Path) -> None:
    if os.path.lexists(path):
        raise OutputExistsError(f"{path}: already there; pick another --attention")


def _checked_extension(extension: str) -> str:
    suffix = f".{extension.removeprefix('.')}"
    if Path(f"x{suffix}").suffix != suffix or shown(suffix) != suffix:
        raise OptionError(f"--extension takes one such as .caption, got {extension!r}")
    if suffix.lower() in image_suffixes() | READERS.keys():
        raise OptionError(f"--extension {suffix} is an image's")
    return suffix


def _key(options: argparse.Namespace, model: Path, changes: Any) -> str:
    """What captions depend on beside the images; a run is resumed only with the same key."""
    key = f"{sha256_of(model / FILE_NAME)} {changes} prompt={options.prompt!r}"
    key += " full size" if options.full_size else ""
    if options.prefix or options.suffix:
        key += f" prefix={options.prefix!r} suffix={options.suffix!r}"
    return key


def _output(options: argparse.Namespace, found: Found, key: str, columns: int) -> Output:
    """Where captions go."""
    paths, resume = found.paths, options.resume
    if options.format == "txt":
        if found.content:
            raise OptionError("an image on standard input has no folder for a file beside it")
        suffix, folder = options.extension or ".txt", options.out_dir
        return SideCars(
            paths,
            resume,
            overwrite=options.overwrite,
            target=lambda p: (folder / found.below(p) if folder else p).with_suffix(suffix),
        )
    if not options.out:
        return StreamOutput(options.format, sys.stdout, paths, columns)
    if options.out in paths:
        raise OptionError(f"{options.out}: is one of the images; --out takes another name")
    return FileOutput(
        options.out,
        options.format,
        paths,
        key,
        resume,
        overwrite=options.overwrite,
        columns=columns,
    )


def _follow(
    results: Iterator[tuple[int, list[ImageError]]], options: argparse.Namespace, total: int
) -> int:
    """Show progress and errors as they come; how many images could not be read."""
    failed = 0
    with tqdm(total=total, unit="image", disable=True if options.quiet else None) as bar:
        try:
            for count, errors in results:
                for error in errors:
                    say(f"capexport: {shown(str(error))}")
                failed += len(errors)
                bar.update(count)
        except KeyboardInterrupt:
            if options.out or options.format == "txt":
                say("capexport: captions so far are kept; go on with --resume")
            raise
    return failed


def _summary(
    options: argparse.Namespace,
    found: Found,
    left_out: Counter[str],
    tried: int,
    failed: int,
    seconds: float,
) -> str:
    """What a run has come to, on one line."""
    reasons = ", ".join(f"{n} {shown(reason)}" for reason, n in left_out.items() if n)
    line = f"{tried - failed} captioned, {left_out.total()} left out"
    line += f" ({reasons})" if reasons else ""
    line += f", {failed} failed in {seconds:.1f} s"
    if failed:
        line += f": {failed} of {len(found.paths)} images could not be read"
    named = {path.suffix.lower() for path in found.paths} - image_suffixes() if failed else ()
    for suffix in READERS.keys() & {*found.unreadable(), *named}:
        line += f"; {suffix}: {READERS[suffix]}"
    whole = not (failed or found.problems or found.unreadable() or left_out["for later"])
    if options.out and whole and not tried:
        line = f"{shown(str(options.out))} is complete: {line}"
    return f"capexport: {line}"
