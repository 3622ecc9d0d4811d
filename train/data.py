"""Flickr8k in both of its layouts, the split, the cleaning of captions and the vocabulary."""

from __future__ import annotations

import argparse
import csv
import hashlib
import string
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from capexport.cli import run_command, teaching
from capexport.errors import CapexportError
from capexport.families.cnn_lstm import Vocabulary

SPLITS = ("train", "validation", "test")

_IMAGE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
_TEXT_FOLDERS = (".", "Flickr8k_text")
_SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


class DatasetError(CapexportError, ValueError):
    """The data folder holds nothing to train on."""


@dataclass(frozen=True)
class Photo:
    """An image file and its captions as people wrote them."""

    name: str
    path: Path
    captions: tuple[str, ...]


@dataclass
class Flickr8k:
    """The photos of each split, and by reason the names of what was left out."""

    splits: dict[str, list[Photo]]
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def photos(self) -> list[Photo]:
        return [photo for split in SPLITS for photo in self.splits[split]]

    def skip(self, reason: str, names: Iterable[str]) -> None:
        """Leave photos out.

        Raises:
            DatasetError: a split has none left.
        """
        gone = set(names)
        if gone:
            self.skipped[reason] = sorted(gone)
        for split, photos in self.splits.items():
            self.splits[split] = [photo for photo in photos if photo.name not in gone]
            if not self.splits[split]:
                left_out = "; ".join(f"{len(v)} {k}" for k, v in self.skipped.items())
                raise DatasetError(
                    f"no usable photo is left for {split}" + (f" ({left_out})" if left_out else "")
                )


def read_flickr8k(folder: Path, validation: float, test: float, seed: int) -> Flickr8k:
    """Read captions and split; whether the images can be decoded is found out later.

    The official split counts where its three files are. Otherwise photos are ranked by a hash of
    seed and name, so the split is the same on every machine, missing photos or not.

    Raises:
        DatasetError: no captions, no images, or nothing usable in a split.
    """
    captions = _read_captions(folder)
    images = next((folder / name for name in _IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if images is None:
        raise DatasetError(f"{folder}: no image folder there ({' or '.join(_IMAGE_FOLDERS)})")
    names = _official_split(folder) or _seeded_split(captions, validation, test, seed)
    dataset = Flickr8k(
        {
            split: [
                Photo(name, images / name, tuple(captions[name]))
                for name in names[split]
                if name in captions
            ]
            for split in SPLITS
        }
    )
    present = {path.name for path in images.iterdir() if path.is_file()}
    uncaptioned = {name for split in names.values() for name in split} | present
    dataset.skip("captioned photos without an image file", set(captions) - present)
    dataset.skip("photos without captions", uncaptioned - set(captions))
    return dataset


def _read_captions(folder: Path) -> dict[str, list[str]]:
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    captions: dict[str, list[str]] = defaultdict(list)
    original = _text_file(folder, "Flickr8k.token.txt")
    kaggle = folder / "captions.txt"
    source = original or kaggle
    try:
        if original:
            for line in original.read_text(encoding="utf-8").splitlines():
                name, separator, caption = line.partition("\t")
                if separator and caption.strip():
                    captions[name.rpartition("#")[0]].append(caption.strip())
        elif kaggle.is_file():
            with kaggle.open(encoding="utf-8", newline="") as file:
                for row in list(csv.reader(file))[1:]:
                    if len(row) > 1 and (caption := ",".join(row[1:]).strip()):
                        captions[row[0]].append(caption)
        else:
            raise DatasetError(f"{folder}: neither captions.txt nor Flickr8k.token.txt there")
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{source}: not a caption file: {error}") from error
    if not captions:
        raise DatasetError(f"{source}: no captions in it")
    return dict(captions)


def _text_file(folder: Path, name: str) -> Path | None:
    candidates = (folder / place / name for place in _TEXT_FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def _official_split(folder: Path) -> dict[str, list[str]] | None:
    files = {split: _text_file(folder, name) for split, name in _SPLIT_FILES.items()}
    if not all(files.values()):
        return None
    return {
        split: path.read_text(encoding="utf-8").split() for split, path in files.items() if path
    }


def _seeded_split(
    names: Iterable[str], validation: float, test: float, seed: int
) -> dict[str, list[str]]:
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    if validation <= 0 or test <= 0 or validation + test >= 1:
        raise DatasetError(
            "the shares for validation and test must leave some photos to each split"
        )
    n_validation = round(len(ranked) * validation)
    n_test = round(len(ranked) * test)
    n_train = len(ranked) - n_validation - n_test
    return {
        "train": ranked[:n_train],
        "validation": ranked[n_train : n_train + n_validation],
        "test": ranked[n_train + n_validation :],
    }


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(caption: str, keep_articles: bool) -> list[str]:
    """The published cleaning: lower case, no punctuation, no words with digits or other
    non-letters, and no single letters unless `keep_articles`."""
    words = (word.translate(_NO_PUNCTUATION) for word in caption.lower().split())
    return [word for word in words if word.isalpha() and (keep_articles or len(word) > 1)]


def build_vocabulary(captions: Iterable[list[str]], min_count: int) -> Vocabulary:
    """The words that occur at least `min_count` times, the most frequent first."""
    counts = Counter(word for caption in captions for word in caption)
    kept = sorted((w for w in counts if counts[w] >= min_count), key=lambda w: (-counts[w], w))
    return Vocabulary((*Vocabulary.SPECIALS, *kept))


def main(argv: list[str] | None = None) -> int:
    """Print the paths of a split's photos, for commands that read such a list."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data",
        **teaching(
            "Print the paths of a split's photos.",
            "python -m train.data --data flickr8k --split test | capbench --photos - \\",
            "    --references flickr8k/captions.txt",
        ),
    )
    parser.add_argument("--data", type=Path, required=True, help="Flickr8k folder")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    options = parser.parse_args(argv)

    def show() -> int:
        dataset = read_flickr8k(options.data, 0.1, 0.1, options.seed)
        print(*(photo.path for photo in dataset.splits[options.split]), sep="\n")
        return 0

    return run_command("train.data", show)


if __name__ == "__main__":
    sys.exit(main())
