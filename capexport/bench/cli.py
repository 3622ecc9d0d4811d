"""The `capbench` command."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capexport.artifact import Manifest, replace_file
from capexport.bench import measure, report, sheet
from capexport.bench.pairs import open_pair
from capexport.bulk import find_images
from capexport.captioner import Captioner, available_cores
from capexport.cli import bundled_checkpoint, run_command, show_progress, teaching
from capexport.errors import ArtifactError, ImageNotFoundError
from capexport.graphs import require_provider

# Photographs among the sample images of scikit-image.
_SAMPLES = (
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run `capbench`; returns its exit code, 2 where the benchmark cannot be run."""
    options = _parser().parse_args(argv)
    show_progress()
    return run_command("capbench", lambda: _benchmark(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="capbench",
        **teaching(
            "Measure a captioner's PyTorch and ONNX paths against each other: in turn, in one "
            "process, on the same photos. The last line of standard output is JSON.",
            "capbench --device cpu                            # the bundled Flickr8k model",
            "capbench runs/first --artifact artifacts/first --photos photos/ --markdown table.md",
            "capbench Salesforce/blip2-opt-2.7b --artifact artifacts/blip2 --repeats 3 \\",
            "    --sheet comparison/ --beside artifacts/first",
        ),
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="checkpoint or run folder of `python -m train` (default: bundled), or a BLIP-2's "
        "folder or Hugging Face id",
    )
    parser.add_argument(
        "--artifact", type=Path, metavar="DIR", help="its export (default: made for this run)"
    )
    parser.add_argument(
        "--photos", nargs="+", default=[], metavar="PATH", help="default: scikit-image's samples"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8"
    )
    parser.add_argument(
        "--repeats", type=int, default=50, metavar="N", help="batches of each size (default: 50)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report")
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="DIR",
        help="also write the photos with their captions: captions.png and captions.html",
    )
    parser.add_argument(
        "--beside",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="other exported folders whose captions the sheet shows",
    )
    parser.add_argument(
        "--references",
        type=Path,
        metavar="CSV",
        help="human captions for the sheet: file names and captions, as Flickr8k's captions.txt",
    )
    return parser


def sample_photos() -> list[Path]:
    """Photographs that the package scikit-image ships.

    Raises:
        ImageNotFoundError: it isn't installed.
    """
    spec = importlib.util.find_spec("skimage")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        photos = [Path(folder, "data", name) for name in _SAMPLES]
        if all(photo.is_file() for photo in photos):
            return photos
    raise ImageNotFoundError("no sample photos: `pip install scikit-image`, or pass --photos PATH")


def _benchmark(options: argparse.Namespace) -> int:
    if min(*options.batch_sizes, options.repeats, options.threads or 1) < 1:
        raise ValueError("--batch-sizes, --repeats and --threads must be at least 1")
    require_provider(options.device)
    paths = find_images(options.photos, sys.stdin) if options.photos else sample_photos()
    photos = [path.read_bytes() for path in paths]
    threads = options.threads or available_cores()
    pair = open_pair(options.checkpoint or str(bundled_checkpoint()), options.device, threads)
    with contextlib.ExitStack() as stack:
        artifact = options.artifact
        if artifact is None:
            artifact = Path(stack.enter_context(tempfile.TemporaryDirectory()), "artifact")
            pair.export(artifact)
        manifest = Manifest.read(artifact)
        if manifest.provenance["checkpoint_sha256"] != pair.sha256:
            raise ArtifactError(f"{artifact}: was not exported from {pair.folder}; export it again")
        exported = Captioner.load(artifact, device=options.device, threads=threads)
        result: dict[str, Any] = {
            "model": f"{pair.title} in {manifest.precision}",
            "device": options.device,
            "photos": len(photos),
            "repeats": options.repeats,
            "environment": report.environment(threads),
            "runs": [],
            "footprint": {},
        }
        for size in options.batch_sizes:
            variant, reference = pair.fastest(photos, size)
            run = measure.alternate(
                {"torch": reference, "onnx": exported}, photos, size, options.repeats
            )
            result["runs"].append({**run, "torch_variant": variant})
        for kind, folder in (("torch", pair.folder), ("onnx", artifact)):
            result["footprint"][kind] = {
                **measure.footprint(
                    kind, folder, paths, max(options.batch_sizes), options.device, threads
                ),
                "disk_mb": measure.folder_size(folder),
            }
        if options.sheet:
            _write_sheet(options, {artifact: exported}, paths, threads)
    table = report.render(result)
    if options.json:
        replace_file(options.json, json.dumps(result, indent=1) + "\n")
    if options.markdown:
        replace_file(options.markdown, table + "\n")
    print(table)
    print(json.dumps(result))
    return 0


def _write_sheet(
    options: argparse.Namespace,
    captioners: dict[Path, Captioner],
    photos: Sequence[Path],
    threads: int,
) -> None:
    """`captions.png` and `captions.html` in the folder `--sheet`."""
    references = sheet.read_references(options.references) if options.references else {}
    for folder in options.beside:
        captioners[folder] = Captioner.load(folder, device=options.device, threads=threads)
    columns: dict[str, list[str]] = {}
    for folder, captioner in captioners.items():
        manifest = Manifest.read(folder)
        title = f"{manifest.family} {manifest.precision}"
        columns[title] = [caption.text for caption in captioner.caption(photos, batch_size=8)]
    entries = [
        sheet.Entry(photo, dict(zip(columns, texts, strict=True)), references.get(photo.name, ()))
        for photo, texts in zip(photos, zip(*columns.values(), strict=True), strict=True)
    ]
    options.sheet.mkdir(parents=True, exist_ok=True)
    sheet.draw_sheet(entries, options.sheet / "captions.png")
    sheet.write_page(entries, options.sheet / "captions.html")


if __name__ == "__main__":
    sys.exit(main())
