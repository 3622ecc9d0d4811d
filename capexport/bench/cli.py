"""The `capbench` command."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from capexport.artifact import Manifest
from capexport.atomic import replace_file, require_writable, require_writable_file
from capexport.bench import measure, report, sheet
from capexport.bench.measure import Clock, ClockedTarget
from capexport.bench.openvino import nncf_captioners, openvino_captioners
from capexport.bench.results import Footprint, Result, Run
from capexport.bulk.files import find_images
from capexport.captioner import BUNDLED_ARTIFACT, Captioner, open_artifact
from capexport.cli import run_parser, teaching
from capexport.cli.comparing import add_references
from capexport.cli.decoding import add_decoding, given_decoding
from capexport.cli.lstm import bundled_checkpoint
from capexport.decoding import changed
from capexport.errors import ArtifactError, ImageNotFoundError, OptionError
from capexport.export.pairs import Pair, Variants, open_pair
from capexport.export.parity import relative_error
from capexport.families import find_family
from capexport.metrics import score, scorers
from capexport.preprocessing import load_image
from capexport.references import read_references
from capexport.sessions import Target, available_cores, targets

# By the names of their columns: each artifact, and each contender's variants.
Artifacts: TypeAlias = dict[str, tuple[Path, Manifest]]
Contenders: TypeAlias = dict[str, Variants]
_COMPARED = 32  # photos
_COMPILED = "torch.compile"  # its variants are among PyTorch's
# Photographs among the sample images of scikit-image.
_SAMPLES = (
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run `capbench`; returns its exit code, 2 where the benchmark cannot be run."""
    return run_parser(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="capbench",
        **teaching(
            "Measure a captioner in PyTorch and its ONNX exports against each other: in turn, in "
            "one process, on the same photos. Prints a table; the last line is JSON.",
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
    _add_contenders(parser)
    add_inputs(parser, threads=(None, "CPU threads"), repeats=(50, "batches of each size"))
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu (default), cuda or cuda:1"
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8"
    )
    add_decoding(parser.add_argument_group("how every captioner decodes"))
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="also draw the ratios and the stages"
    )
    add_outputs(parser)
    _add_sheet(parser)
    return parser


def _add_contenders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--artifact",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="its exports, one of each precision (default: one in fp32, made for this run; for the "
        "bundled checkpoint also the bundled one in int8)",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also try torch.compile, and measure PyTorch as most people run it, BLIP-2 in 16 "
        "bits, and OpenVINO on the same graphs and with NNCF's int8 (needs the extra `peers`)",
    )


def add_inputs(parser: argparse.ArgumentParser, **numbers: tuple[int | None, str]) -> None:
    """Add `--photos`, which `chosen_photos` reads, and a flag for each number, from its default
    (None: all that there are) and its help."""
    parser.add_argument(
        "--photos",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, folders or patterns, taken in rotation (default: scikit-image's samples)",
    )
    for name, (default, what) in numbers.items():
        flag, shown = f"--{name.replace('_', '-')}", f"{what} (default: {default or 'all'})"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=shown)


def chosen_photos(options: argparse.Namespace) -> list[Path]:
    """The files that `--photos` names, or else `sample_photos`."""
    return find_images(options.photos, sys.stdin) or sample_photos()


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--markdown`, for `write_outputs`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report")


def write_outputs(options: argparse.Namespace, report: str, result: dict[str, Any]) -> None:
    """Print the report and, as the last line, the result as JSON; write the files asked for."""
    if options.json:
        replace_file(options.json, json.dumps(result, indent=1) + "\n")
    if options.markdown:
        replace_file(options.markdown, report + "\n")
    print(report)
    print(json.dumps(result))


def _add_sheet(parser: argparse.ArgumentParser) -> None:
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
    add_references(
        parser, "for the sheet; if they cover all photos, also for BLEU, METEOR and CIDEr"
    )


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
    given = (options.threads, options.num_beams)
    if min(*options.batch_sizes, options.repeats, *(n for n in given if n is not None)) < 1:
        raise OptionError("--batch-sizes, --repeats, --threads and --num-beams must be at least 1")
    _check_outputs(options)
    threads = options.threads or available_cores()
    target = targets(options.device, threads)[0]
    target.require_provider()
    paths = chosen_photos(options)
    references = read_references(options.references) if options.references else {}
    if _cover(references, paths):
        scorers()
    pair = open_pair(options.checkpoint or str(bundled_checkpoint()), target.name, threads)
    with contextlib.ExitStack() as stack:
        folders = options.artifact
        if not folders:
            made = Path(stack.enter_context(tempfile.TemporaryDirectory()), "artifact")
            pair.export(made)
            folders = [made, *([] if options.checkpoint else [BUNDLED_ARTIFACT])]
        bench = _Bench(options, pair, _by_precision(folders, pair), target, paths)
        result = bench.run(references)
        if options.sheet:
            _write_sheet(options.sheet, bench.columns(options.beside), paths, references)
    for path in _files(options):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_outputs(options, report.render(result), dataclasses.asdict(result))
    if options.picture:
        report.draw(result, options.picture)
    return 0


def _files(options: argparse.Namespace) -> list[Path]:
    return [path for path in (options.picture, options.json, options.markdown) if path]


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse what could not be written or drawn at the end."""
    for path in _files(options):
        require_writable_file(path)
    if options.sheet:
        require_writable(options.sheet / "captions.html")
    if options.picture or options.sheet:
        sheet.new_figure(1, 1)


def _cover(references: Mapping[str, Sequence[str]], paths: Sequence[Path]) -> bool:
    return bool(references) and all(path.name in references for path in paths)


def _by_precision(folders: Sequence[Path], pair: Pair) -> Artifacts:
    artifacts: Artifacts = {}
    for folder in folders:
        manifest = Manifest.read(folder)
        name = f"ONNX {manifest.precision}"
        if manifest.provenance.checkpoint_sha256 != pair.sha256:
            raise ArtifactError(f"{folder}: was not exported from {pair.folder}; export it again")
        if name in artifacts:
            raise OptionError(f"{folder}: a second artifact in {manifest.precision}")
        artifacts[name] = (folder, manifest)
    return artifacts


class _Bench:
    """A checkpoint, its artifacts, and the photos that all are measured on."""

    def __init__(
        self,
        options: argparse.Namespace,
        pair: Pair,
        artifacts: Artifacts,
        target: Target,
        paths: Sequence[Path],
    ) -> None:
        self._options, self._pair, self._artifacts = options, pair, artifacts
        self._target, self._paths = target, paths
        self._photos = [np.asarray(load_image(path)) for path in paths]
        self._decoding = given_decoding(options)
        self._exported: dict[str, Captioner] = {}
        self._clocks: dict[str, Clock] = {}
        for name, (folder, manifest) in artifacts.items():
            graph = find_family(manifest.family).image_graph
            clocked = ClockedTarget(**vars(target), image_graph=graph)
            self._exported[name] = open_artifact(folder, manifest, clocked)
            changed(self._exported[name].options, self._decoding)  # refused now
            self._clocks[name] = clocked.clock

    def run(self, references: Mapping[str, Sequence[str]]) -> Result:
        options = self._options
        footprint = self._footprints()  # in processes of their own, before PyTorch's model is here
        peers, unavailable = self._peers() if options.peers else ({}, {})
        exported = {name: {"": captioner} for name, captioner in self._exported.items()}
        pytorch = {**self._pair.variants(), **peers.pop(_COMPILED, {})}
        contenders: Contenders = {"PyTorch": pytorch, **peers, **exported}
        scored = _cover(references, self._paths)
        environment = report.environment(self._target.threads or 1, self._target.name)
        bandwidth = environment.memory_gb_per_second * 1e9
        metrics = self._metrics(contenders, references) if scored else {}
        errors = self._feature_errors(contenders)
        runs = [self._run(contenders, size, bandwidth) for size in options.batch_sizes]
        return Result(
            model=self._pair.title,
            device=self._target.name,
            photos=len(self._photos),
            repeats=options.repeats,
            environment=dataclasses.replace(environment, load=report.load()),
            metrics=metrics,
            runs=runs,
            unavailable=unavailable,
            footprint=footprint,
            feature_errors=errors,
            decoding=dict(self._decoding),
        )

    def _peers(self) -> tuple[Contenders, dict[str, str]]:
        """The peers that can caption, and why the others cannot."""
        openers = {_COMPILED: self._pair.compiled, **self._pair.peers()}
        threads = self._target.threads or 1
        for folder, manifest in self._artifacts.values():
            openers[f"OpenVINO {manifest.precision}"] = partial(
                openvino_captioners, folder, self._target.name, threads
            )
        exact, int8 = (self._artifacts.get(f"ONNX {name}") for name in ("fp32", "int8"))
        if exact and int8 and find_family(exact[1].family).small:
            openers["OpenVINO, NNCF int8"] = partial(
                nncf_captioners, exact[0], int8[0], self._photos, self._target.name, threads
            )
        peers: Contenders = {}
        unavailable = {}
        photos = self._photos[:2]
        for name, opener in tqdm(openers.items(), "peers", leave=False, disable=None):
            try:
                variants = opener()
                for captioner in variants.values():
                    captioner.caption(photos, batch_size=len(photos), **self._decoding)
                peers[name] = variants
            except Exception as error:  # a compiler or a runtime may throw anything
                unavailable[name] = (str(error).splitlines() or [repr(error)])[0]
        return peers, unavailable

    def _metrics(
        self, contenders: Contenders, references: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, float | str]]:
        metrics = {}
        for name in ("PyTorch", *self._exported):
            captioner = next(iter(contenders[name].values()))
            captions = captioner.caption(self._photos, batch_size=32, **self._decoding)
            said = {path.name: c.text for path, c in zip(self._paths, captions, strict=True)}
            metrics[name] = score(said, references)
        return metrics

    def _feature_errors(self, contenders: Contenders) -> dict[str, float]:
        """Of each contender with an encoder of its own, on the first photos, on a CPU."""
        captioners = {name: next(iter(each.values())) for name, each in contenders.items()}
        encoders = {n: c for n, c in captioners.items() if isinstance(c, Captioner)}
        if "PyTorch" not in encoders or self._target.name != "cpu":
            return {}
        photos = self._photos[:_COMPARED]
        features = {
            name: each.encoder(np.stack([each.preprocess(photo) for photo in photos]))
            for name, each in encoders.items()
        }
        arrays = {n: {k: np.asarray(v) for k, v in found.items()} for n, found in features.items()}
        wanted = arrays["PyTorch"]
        return {
            name: max(relative_error(wanted[key], found[key]) for key in wanted)
            for name, found in arrays.items()
        }

    def _run(self, contenders: Contenders, size: int, bandwidth: float) -> Run:
        """Batches of one size: of each contender the quickest variant, in turn."""
        variants, chosen = {}, {}
        for name, candidates in contenders.items():
            variant = measure.fastest(candidates, self._photos, size, self._decoding)
            chosen[name] = candidates[variant]
            if variant:
                variants[name] = variant
        run = measure.alternate(
            chosen, self._photos, size, self._options.repeats, self._clocks, self._decoding
        )
        paths = dict(run.paths)
        for name, (_, manifest) in self._artifacts.items():
            path = paths[name]
            if weights := manifest.files.get(find_family(manifest.family).step_weights):
                floor = 1e3 * path.steps * weights.bytes / bandwidth
                share = floor / path.milliseconds["decode"].p50
                paths[name] = dataclasses.replace(path, share_of_floor=share)
        return dataclasses.replace(run, paths=paths, variants=variants)

    def _footprints(self) -> dict[str, Footprint]:
        models = {"PyTorch": ("torch", self._pair.folder)}
        models.update({k: ("onnx", folder) for k, (folder, _) in self._artifacts.items()})
        size, threads = max(self._options.batch_sizes), self._target.threads or 1
        return {
            name: measure.footprint(
                kind, folder, self._paths, size, self._target.name, threads, self._decoding
            )
            for name, (kind, folder) in models.items()
        }

    def columns(self, beside: Sequence[Path]) -> dict[str, list[str]]:
        """What each artifact, and those in other folders, say of the photos, by the title of its
        column."""
        shown = [(*self._artifacts[name], c) for name, c in self._exported.items()]
        for folder in beside:
            manifest = Manifest.read(folder)
            shown.append((folder, manifest, open_artifact(folder, manifest, self._target)))
        columns: dict[str, list[str]] = {}
        for folder, manifest, captioner in shown:
            title = f"{manifest.family} {manifest.precision}"
            if title in columns:
                title += f" ({folder.name})"
            captions = captioner.caption(self._photos, **self._decoding)
            columns[title] = [caption.text for caption in captions]
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
