"""`captioner.onnx`, the one file, against `Captioner`: what resizing and a whole caption take."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from tqdm import tqdm

from capexport import Captioner
from capexport.artifact import Manifest
from capexport.bench.cli import add_inputs, chosen_photos
from capexport.bench.report import cpu_model, table
from capexport.captioner import BUNDLED_ARTIFACT
from capexport.cli import run_parser, teaching
from capexport.export.head import image_head
from capexport.export.single_file import export_file
from capexport.preprocessing import load_image, preprocess
from capexport.sessions import CPU, Graph, runtime_version

LARGE = (4000, 3000)  # width and height of a phone's photo


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit code, 2 where it cannot be run."""
    parser = argparse.ArgumentParser(
        prog="single_graph.py",
        **teaching(
            "Time the one file of `capexport graph` against Pillow and `Captioner`, in turn and in "
            "one process, from decoded pixels on: medians in milliseconds.",
            "python benchmarks/single_graph.py --photos flickr8k/Images --threads 1",
        ),
    )
    parser.add_argument(
        "--artifact", type=Path, default=BUNDLED_ARTIFACT, metavar="DIR",
        help="exported CNN-LSTM (default: the bundled captioner)",
    )  # fmt: skip
    add_inputs(parser, count=(20, "photos that are timed"), threads=(1, "CPU threads"))
    return run_parser(parser, _benchmark, argv)


def _benchmark(options: argparse.Namespace) -> int:
    paths = chosen_photos(options)
    photos = [load_image(path) for path in paths[: options.count]]
    large = [photo.resize(LARGE, Image.Resampling.BICUBIC) for photo in photos[:3]]
    manifest = Manifest.read(options.artifact)
    captioner = Captioner.load(options.artifact, threads=options.threads)
    target = dataclasses.replace(CPU, threads=options.threads)
    files = {manifest.precision: "as-is"} | ({"w8": "w8"} if manifest.precision == "int8" else {})
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder, "head.onnx")
        onnx.save(image_head(manifest.image, 20, 10), head)
        graphs = {}
        for name, precision in files.items():
            export_file(options.artifact, path := Path(folder, f"{name}.onnx"), precision=precision)
            graphs[f"one file, {name}"] = target.open(path)
        resizing: dict[str, Callable[[np.ndarray], object]] = {
            "Pillow": lambda pixels: preprocess(pixels, manifest.image),
            "the graph": _runner(target.open(head)),
        }
        whole: dict[str, Callable[[np.ndarray], object]] = {
            f"Captioner, {manifest.precision}": captioner.caption,
            **{name: _runner(graph) for name, graph in graphs.items()},
        }
        width, height = LARGE
        sizes = {"photos as they are": photos, f"of {width}x{height}": large}
        rows = [
            (f"{what}, {size}", name, f"{ms:.1f}")
            for what, ways in (("resizing", resizing), ("a caption", whole))
            for size, images in sizes.items()
            for name, ms in _alternate(ways, images).items()
        ]
        print(f"{cpu_model()}, {options.threads} threads, onnxruntime {runtime_version()}")
        print(table([("", "", "ms"), *rows]))
    return 0


def _runner(graph: Graph) -> Callable[[np.ndarray], object]:
    return lambda pixels: graph.run({"image": pixels}, list(graph.outputs))


def _alternate(
    ways: dict[str, Callable[[np.ndarray], object]], images: Sequence[Image.Image]
) -> dict[str, float]:
    """The median milliseconds of each way, over all images, one way after the other."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(3):  # the first one warms up
        for image in tqdm(images, leave=False, disable=None):
            pixels = np.asarray(image)
            for name, way in ways.items():
                began = time.perf_counter()
                way(pixels)
                if turn:
                    took[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) * 1000 for name, values in took.items()}


if __name__ == "__main__":
    raise SystemExit(main())
