"""The `capbench` command."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from capexport.artifact import Manifest, replace_file
from capexport.bench import measure, report, sheet
from capexport.bench.measure import AnyCaptioner, Photo
from capexport.bench.pairs import Pair, open_pair
from capexport.bulk import find_images
from capexport.captioner import BUNDLED_ARTIFACT, available_cores, load_cnn_lstm, open_artifact
from capexport.cli import bundled_checkpoint, run_command, show_progress, teaching
from capexport.errors import ArtifactError, ImageNotFoundError
from capexport.export.metrics import score
from capexport.graphs import require_provider
from capexport.preprocessing import load_image
from capexport.references import read_references

# By the names of their columns: each artifact, and each contender's variants.
Artifacts: TypeAlias = dict[str, tuple[Path, Manifest]]
Contenders: TypeAlias = dict[str, Mapping[str, AnyCaptioner]]
# What a decoding step reads, all but the embeddings of other words.
_DECODER_WEIGHTS = {"cnn-lstm": "decoder.data", "blip2": "decoder_model_merged.onnx.data"}
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
            "capbench --peers --picture ratios.png",
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
        "--artifact",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="its exports, one of each precision (default: one in fp32, made for this run, and of "
        "the bundled checkpoint the bundled one in int8)",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also measure PyTorch as most people run it, torch.compile, and OpenVINO on the same "
        "graphs (needs the extra `peers`)",
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
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="also draw the ratios and the stages"
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
        metavar="FILE",
        help="human captions, in a file as Flickr8k's or Flickr30k's: for the sheet, and where "
        "they cover all photos for BLEU, METEOR and CIDEr beside the speed",
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
    references = read_references(options.references) if options.references else {}
    photos = [np.asarray(load_image(path)) for path in paths]
    threads = options.threads or available_cores()
    checkpoint = options.checkpoint or str(bundled_checkpoint())
    pair = open_pair(checkpoint, options.device, threads)
    with contextlib.ExitStack() as stack:
        folders = options.artifact
        if not folders:
            made = Path(stack.enter_context(tempfile.TemporaryDirectory()), "artifact")
            pair.export(made)
            folders = [made, *([] if options.checkpoint else [BUNDLED_ARTIFACT])]
        artifacts = _by_precision(folders, pair)
        exported, clocks = _open_exported(artifacts, options.device, threads)
        contenders: Contenders = {}
        unavailable: dict[str, str] = {}
        if options.peers:
            contenders, unavailable = _open_peers(pair, artifacts, photos[:2])
        contenders.update({name: {"": captioner} for name, captioner in exported.items()})
        result: dict[str, Any] = {
            "model": pair.title,
            "device": options.device,
            "photos": len(photos),
            "repeats": options.repeats,
            "environment": report.environment(threads, options.device),
            "runs": [],
            "metrics": {},
            "unavailable": unavailable,
            "footprint": {},
        }
        if references and all(path.name in references for path in paths):
            for name, captioner in {"PyTorch": pair.plain(), **exported}.items():
                captions = captioner.caption(photos, batch_size=32)
                said = {path.name: c.text for path, c in zip(paths, captions, strict=True)}
                result["metrics"][name] = score(said, references)
        bandwidth = result["environment"]["memory_gb_per_second"] * 1e9
        for size in options.batch_sizes:
            variants, chosen = _fastest(pair, contenders, photos, size)
            run = measure.alternate(chosen, photos, size, options.repeats, clocks)
            for name, (_, manifest) in artifacts.items():
                path = run["paths"][name]
                if weights := manifest.files.get(_DECODER_WEIGHTS[manifest.family]):
                    floor = 1e3 * path["steps"] * weights.bytes / bandwidth
                    path["share_of_floor"] = floor / path["milliseconds"]["decode"]["p50"]
            result["runs"].append({**run, "variants": variants})
        models = {"PyTorch": pair.folder}
        models.update({name: folder for name, (folder, _) in artifacts.items()})
        for name, folder in models.items():
            kind = "torch" if name == "PyTorch" else "onnx"
            result["footprint"][name] = {
                **measure.footprint(
                    kind, folder, paths, max(options.batch_sizes), options.device, threads
                ),
                "disk_mb": measure.folder_size(folder),
            }
        if options.sheet:
            shown = [(*artifacts[name], captioner) for name, captioner in exported.items()]
            for folder in options.beside:
                manifest = Manifest.read(folder)
                captioner = open_artifact(folder, manifest, options.device, threads)
                shown.append((folder, manifest, captioner))
            _write_sheet(options.sheet, _columns(shown, photos), paths, references)
    table = report.render(result)
    if options.json:
        replace_file(options.json, json.dumps(result, indent=1) + "\n")
    if options.markdown:
        replace_file(options.markdown, table + "\n")
    if options.picture:
        report.draw(result, options.picture)
    print(table)
    print(json.dumps(result))
    return 0


def _by_precision(folders: Sequence[Path], pair: Pair) -> Artifacts:
    artifacts: Artifacts = {}
    for folder in folders:
        manifest = Manifest.read(folder)
        name = f"ONNX {manifest.precision}"
        if manifest.provenance["checkpoint_sha256"] != pair.sha256:
            raise ArtifactError(f"{folder}: was not exported from {pair.folder}; export it again")
        if name in artifacts:
            raise ValueError(f"{folder}: a second artifact in {manifest.precision}")
        artifacts[name] = (folder, manifest)
    return artifacts


def _open_exported(
    artifacts: Artifacts, device: str, threads: int
) -> tuple[dict[str, AnyCaptioner], dict[str, measure.Clock]]:
    """Their captioners, and the clocks of those whose graphs can be timed apart."""
    exported: dict[str, AnyCaptioner] = {}
    clocks = {}
    for name, (folder, manifest) in artifacts.items():
        if manifest.family == "cnn-lstm" and device == "cpu":
            clock = clocks[name] = measure.Clock(device, threads)
            exported[name] = load_cnn_lstm(folder, manifest, device, threads, clock.open_graph)
        else:
            exported[name] = open_artifact(folder, manifest, device, threads)
    return exported, clocks


def _open_peers(
    pair: Pair, artifacts: Artifacts, photos: Sequence[Photo]
) -> tuple[Contenders, dict[str, str]]:
    """The peers that can caption `photos`, and why the others cannot."""
    peers: Contenders = {}
    unavailable = {}
    folders = {manifest.precision: folder for folder, manifest in artifacts.values()}
    for name, opener in tqdm(pair.peers(folders).items(), "peers", leave=False, disable=None):
        try:
            variants = opener()
            for captioner in variants.values():
                captioner.caption(photos, batch_size=len(photos))
            peers[name] = variants
        except Exception as error:  # a compiler or a runtime may throw anything
            unavailable[name] = (str(error).splitlines() or [repr(error)])[0]
    return peers, unavailable


def _fastest(
    pair: Pair, contenders: Contenders, photos: Sequence[Photo], batch_size: int
) -> tuple[dict[str, str], dict[str, AnyCaptioner]]:
    """Of each contender the quickest variant: what it is where there are several, and itself."""
    variants, chosen = {}, {}
    variants["PyTorch"], chosen["PyTorch"] = pair.fastest(photos, batch_size)
    for name, candidates in contenders.items():
        variant = next(iter(candidates))
        if len(candidates) > 1:
            variant = measure.fastest(candidates, photos, batch_size, "total")
        if variant:
            variants[name] = variant
        chosen[name] = candidates[variant]
    return variants, chosen


def _columns(
    shown: Sequence[tuple[Path, Manifest, AnyCaptioner]], photos: Sequence[Photo]
) -> dict[str, list[str]]:
    """What each captioner says of the photos, by the title of its column."""
    columns: dict[str, list[str]] = {}
    for folder, manifest, captioner in shown:
        title = f"{manifest.family} {manifest.precision}"
        if title in columns:
            title += f" ({folder.name})"
        columns[title] = [caption.text for caption in captioner.caption(photos, batch_size=8)]
    return columns


def _write_sheet(
    folder: Path,
    columns: Mapping[str, Sequence[str]],
    photos: Sequence[Path],
    references: Mapping[str, Sequence[str]],
) -> None:
    """`captions.png` and `captions.html` in `folder`."""
    entries = [
        sheet.Entry(photo, dict(zip(columns, texts, strict=True)), references.get(photo.name, ()))
        for photo, texts in zip(photos, zip(*columns.values(), strict=True), strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    sheet.draw_sheet(entries, folder / "captions.png")
    sheet.write_page(entries, folder / "captions.html")


if __name__ == "__main__":
    sys.exit(main())
