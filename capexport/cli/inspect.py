"""`capexport inspect`"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from capexport.artifact import Manifest, Parity, Provenance
from capexport.bulk.names import shown
from capexport.captioner import model_folder
from capexport.cli.command import add_model, teaching
from capexport.metrics import format_scores


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="check an exported folder, and say what it is",
        **teaching(
            "Check every file of an exported folder against its manifest, and say in words what "
            "the folder holds.",
            "capexport inspect                                # the bundled captioner",
            "capexport inspect artifacts/first --json",
        ),
    )
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print the manifest instead")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    folder = model_folder(options.model)
    manifest = Manifest.read(folder, thorough=True)
    if options.json:
        print(manifest.to_json())
        return 0
    print(shown(f"{folder}: a {manifest.family} captioner in {manifest.precision}"))
    print(f"  files: {len(manifest.files)}, {manifest.size / 1e6:.1f} MB, all as the manifest says")
    for title, words in [
        *_use(manifest),
        *_origin(manifest.provenance),
        *(_comparison(manifest.parity) if manifest.parity else ()),
    ]:
        print(shown(f"  {title}: {words}"))
    return 0


def _use(manifest: Manifest) -> Iterator[tuple[str, str]]:
    image, decoding = manifest.image, manifest.decoding
    edge = "the shorter edge" if image.keep_aspect else "both edges"
    yield (
        "images",
        f"{edge} resized to {image.resize} pixels, of which the central {image.crop} x "
        f"{image.crop} count",
    )
    penalty = decoding.repetition_penalty
    yield (
        "captions",
        f"at most {decoding.max_tokens} tokens"
        + (f", at least {decoding.min_tokens}" if decoding.min_tokens else "")
        + (f", repetition penalty {penalty:g}" if penalty != 1 else "")
        + (f", {decoding.num_beams} beams" if decoding.num_beams > 1 else "")
        + (f", length penalty {decoding.length_penalty:g}" if decoding.num_beams > 1 else "")
        + (", by default; prompts are taken" if manifest.prompt else ", by default; no prompts"),
    )
    if manifest.regions:
        rows, columns = manifest.regions
        yield "attention", f"over {rows} x {columns} regions of the image"


def _origin(provenance: Provenance) -> Iterator[tuple[str, str]]:
    if provenance.source:
        revision = f" at {provenance.revision}" if provenance.revision else ""
        yield "source", f"{provenance.source}{revision}"
    if provenance.licence:
        yield "licence", provenance.licence
    for key, value in (provenance.training or {}).items():
        if key in ("command", "photos"):
            counts = value.items() if isinstance(value, dict) else ()
            yield (
                "trained with" if key == "command" else "photos",
                ", ".join(f"{count} {split}" for split, count in counts) or str(value),
            )
    for note in provenance.assumed or ():
        yield "assumed", note
    yield "exported by", f"{provenance.exporter}, opset {provenance.opset}"


def _comparison(parity: Parity) -> Iterator[tuple[str, str]]:
    captions = parity.captions
    yield (
        "compared with PyTorch in float32",
        f"{captions.identical} of {captions.compared or captions.images} captions identical"
        + (f", on {parity.inputs}" if parity.inputs else ""),
    )
    if parity.int8 and "identical_captions" in parity.int8:
        yield "after rounding to 8 bits", f"{parity.int8['identical_captions']:.1%} identical"
    for name, metrics in (parity.metrics or {}).items():
        yield f"scores of {name}", format_scores(metrics)
