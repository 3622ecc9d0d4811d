"""What caching image features saves: `python benchmarks/feature_cache.py --data flickr8k`.

Runs `python -m train` for ten epochs with the cache (filled from nothing) and without it, on the
same photos, epoch by epoch in turn, and prints the seconds of each and their ratio.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import tempfile
import time
from pathlib import Path

from train.config import TrainConfig
from train.data import read_dataset
from train.loop import train

EPOCHS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Flickr8k folder")
    parser.add_argument("--backbone-weights", type=Path, help="as for python -m train")
    parser.add_argument("--photos", type=int, default=300, help="how many to use (default: 300)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = subset(options.data, options.photos, folder / "data")
        base = TrainConfig(
            data=data,
            backbone_weights=options.backbone_weights,
            cache=folder / "cache",
            patience=EPOCHS,
        )
        seconds = {"cached": 0.0, "not cached": 0.0}
        for epoch in range(1, EPOCHS + 1):
            for title in seconds:
                config = dataclasses.replace(
                    base,
                    epochs=epoch,
                    no_feature_cache=title == "not cached",
                    out=folder / title,
                )
                began = time.perf_counter()
                train(config)  # goes on with the epochs before
                seconds[title] += time.perf_counter() - began
    cached, live = seconds.values()
    print(
        f"{options.photos} photos, {EPOCHS} epochs: {cached:.0f} s with the feature cache (its "
        f"filling included), {live:.0f} s without: {live / cached:.1f} times as long"
    )


def subset(source: Path, count: int, target: Path) -> Path:
    """The first `count` photos of the training split, as a folder in the Kaggle layout."""
    photos = read_dataset(source, 0.1, 0.1, 0).splits["train"][:count]
    (target / "Images").mkdir(parents=True)
    with (target / "captions.txt").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for photo in photos:
            (target / "Images" / photo.name).symlink_to(photo.path.resolve())
            writer.writerows([photo.name, caption] for caption in photo.captions)
    return target


if __name__ == "__main__":
    main()
