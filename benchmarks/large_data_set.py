"""An epoch of training on synthetic data sets, up to COCO's size: with small photos and a small
network, for the sake of time, but as many names, captions and pooled features, all made anew."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bulk import resident_megabytes
from PIL import Image

from capexport.bench.report import cpu_model, load, table
from capexport.cli import run_command, teaching

CAPTIONS, WORDS = 5, 1000  # of a photo; different ones
TRAIN = "--epochs 1 --squash --crop 32 --embed-size 64 --hidden-size 64 --batch-size 256"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="large_data_set.py",
        **teaching(
            "Run `python -m train` on data sets with five captions a photo, in COCO's layout: "
            "seconds, and peak memory, with and without pages of files. Other flags are train's.",
            "python benchmarks/large_data_set.py --backbone-weights mobilenet_v2.safetensors",
        ),
    )
    parser.add_argument("--photos", type=int, nargs="+", default=[1200, 120_000], metavar="N")
    options, more = parser.parse_known_args(argv)
    return run_command("large_data_set.py", lambda: _run(options.photos, more))


def _run(counts: Sequence[int], more: Sequence[str]) -> int:
    rows = [("photos", "seconds", "of the epoch", "features, MB", "peak memory, MB", "private, MB")]
    for photos in counts:
        with tempfile.TemporaryDirectory() as name:
            data, cache, run = (Path(name, part) for part in ("data", "cache", "run"))
            _write(data, photos)
            command = [sys.executable, "-m", "train", *TRAIN.split(), *more, f"--data={data}"]
            command += [f"--cache={cache}", f"--out={run}"]
            began = time.perf_counter()
            peaks = resident_megabytes(command, Path(name, "errors")).max(axis=0)
            [epoch] = json.loads((run / "history.json").read_text())
            features = sum(file.stat().st_size for file in cache.glob("*/*")) / 1e6
            seconds = time.perf_counter() - began, epoch["seconds"]
        rows.append(tuple(f"{figure:,.0f}" for figure in (photos, *seconds, features, *peaks)))
    print(f"{cpu_model()}, load {load():.1f}\n\n{table(rows)}")
    return 0


def _write(folder: Path, photos: int) -> None:
    rng, stream = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(stream, "JPEG")
    words = [bytes(rng.integers(97, 123, n, np.uint8)).decode() for n in rng.integers(2, 8, WORDS)]
    said = np.repeat(words, WORDS // np.arange(1, WORDS + 1))  # Zipf's law
    for half, numbers in (("val", range(photos // 24)), ("train", range(photos // 24, photos))):
        images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in numbers]
        (folder / f"{half}2017").mkdir(parents=True)
        for number in numbers:  # a comment makes it a file of its own
            content = b"\xff\xd8\xff\xfe\x00\x08%06d" % number + stream.getvalue()[2:]
            (folder / f"{half}2017" / f"{number:012}.jpg").write_bytes(content)
        captions = [
            {"image_id": number, "caption": " ".join(rng.choice(said, size))}
            for number in numbers
            for size in rng.integers(8, 15, CAPTIONS)
        ]
        document = json.dumps({"images": images, "annotations": captions})
        (folder / f"captions_{half}2017.json").write_text(document)


if __name__ == "__main__":
    sys.exit(main())
