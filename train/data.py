"""Flickr8k in both of its layouts, the split, the cleaning of captions and the vocabulary.

Nothing here needs torch: an exported captioner is scored without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import string
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from capexport.artifact import FILE_NAME
from capexport.cli import run_command, teaching
from capexport.errors import DatasetError, ImageError
from capexport.families.cnn_lstm import Vocabulary
from capexport.preprocessing import load_image
from capexport.references import read_references

SPLITS = ("train", "validation", "test")

_IMAGE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images")
_CAPTION_FILES = ("Flickr8k.token.txt", "captions.txt", "results.csv")  # the last is Flickr30k's
_TEXT_FOLDERS = (".", "Flickr8k_text")
_SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
_READ_AHEAD = 128  # images

T = TypeVar("T")


@dataclass(frozen=True)
class Photo:
    """An image file and its captions as people wrote them."""

    name: str
    path: Path
    captions: tuple[str, ...]


@dataclass
class Dataset:
    """The photos of each split, and by reason the names of what was left out.

    `official` says whether the split is that of Flickr8k's own files.
    """

    splits: dict[str, list[Photo]]
    official: bool = False
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


def read_dataset(
    folder: Path, validation: float, test: float, seed: int, official: bool | None = None
) -> Dataset:
    """Read captions and split; whether the images can be decoded is found out later.

    The official split counts where its three files are, or as `official` says. Otherwise photos
    are ranked by a hash of seed and name, so the split is the same on every machine, missing photos
    or not.

    Raises:
        DatasetError: no captions, no images, or nothing usable in a split.
    """
    captions = _read_captions(folder)
    images = next((folder / name for name in _IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if images is None:
        raise DatasetError(f"{folder}: no image folder there ({' or '.join(_IMAGE_FOLDERS)})")
    listed = None if official is False else _official_split(folder)
    if official and not listed:
        raise DatasetError(
            f"{folder}: not all of {', '.join(_SPLIT_FILES.values())} are there, and the model was "
            "trained on that split"
        )
    names = listed or _seeded_split(captions, validation, test, seed)
    dataset = Dataset(
        {
            split: [
                Photo(name, images / name, tuple(captions[name]))
                for name in names[split]
                if name in captions
            ]
            for split in SPLITS
        },
        official=listed is not None,
    )
    present = {path.name for path in images.iterdir() if path.is_file()}
    uncaptioned = {name for split in names.values() for name in split} | present
    dataset.skip("captioned photos without an image file", set(captions) - present)
    dataset.skip("photos without captions", uncaptioned - set(captions))
    return dataset


def _read_captions(folder: Path) -> dict[str, list[str]]:
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    for name in _CAPTION_FILES:
        if file := _text_file(folder, name):
            return read_references(file)
    raise DatasetError(f"{folder}: neither captions.txt nor Flickr8k.token.txt there")


def _text_file(folder: Path, name: str) -> Path | None:
    candidates = (folder / place / name for place in _TEXT_FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def _official_split(folder: Path) -> dict[str, list[str]] | None:
    files = {split: _text_file(folder, name) for split, name in _SPLIT_FILES.items()}
    if not all(files.values()):
        return None
    try:
        return {
            split: path.read_text(encoding="utf-8-sig").split()
            for split, path in files.items()
            if path
        }
    except UnicodeDecodeError as error:
        raise DatasetError(f"{folder}: a split file is not in UTF-8: {error}") from error


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
    words = caption.lower().translate(_NO_PUNCTUATION).split()
    return [word for word in words if word.isalpha() and (keep_articles or len(word) > 1)]


def build_vocabulary(captions: Iterable[list[str]], min_count: int) -> Vocabulary:
    """The words that occur at least `min_count` times, the most frequent first."""
    counts = Counter(word for caption in captions for word in caption)
    kept = sorted((w for w in counts if counts[w] >= min_count), key=lambda w: (-counts[w], w))
    return Vocabulary((*Vocabulary.SPECIALS, *kept))


# A photo and captions of it, as ids from `<SOS>` to `<EOS>`.
Example: TypeAlias = tuple[Path, list[NDArray[np.int32]]]


@dataclass(frozen=True)
class Examples:
    """What training goes through: photos, each with all of its captions or with one of them.

    The captions stand in one array: a shuffle is a permutation of numbers and copies none of them.

    Attributes:
        paths: of the photos.
        places: int32 (captions,), the place of each caption's photo in `paths`.
        ids: int32 (tokens,), all captions one after another.
        starts: int64 (captions + 1,): caption i is `ids[starts[i]:starts[i + 1]]`.
        firsts: int64 (examples + 1,): example i has the captions from `firsts[i]` on.
    """

    paths: Sequence[Path]
    places: NDArray[np.int32]
    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    firsts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        first, end = self.firsts[index : index + 2]
        captions = [self.ids[self.starts[i] : self.starts[i + 1]] for i in range(first, end)]
        return self.paths[self.places[first]], captions

    @property
    def longest(self) -> NDArray[np.int64]:
        """The ids of each example's longest caption, int64 (examples,)."""
        return np.maximum.reduceat(np.diff(self.starts), self.firsts[:-1])

    def digest(self) -> str:
        """A hash of photos and captions, the same wherever the photos' folder is."""
        digest = hashlib.sha256("\n".join(path.name for path in self.paths).encode())
        for part in (self.places, self.ids, self.starts, self.firsts):
            digest.update(part.tobytes())
        return digest.hexdigest()


def encode_captions(
    photos: Sequence[Photo], vocabulary: Vocabulary, keep_articles: bool, whole: bool
) -> Examples:
    """The captions of `photos`, cleaned; those without a word left are left out, and photos without
    a caption. `whole` examples are photos with all of their captions."""
    places, ids, starts = array("i"), array("i"), array("q", [0])
    for place, photo in enumerate(photos):
        for caption in photo.captions:
            if words := clean(caption, keep_articles):
                ids.extend(vocabulary.encode(words))
                places.append(place)
                starts.append(len(ids))
    of_caption = np.frombuffer(places, np.int32)
    firsts = np.flatnonzero(np.diff(of_caption, prepend=-1)) if whole else np.arange(len(places))
    return Examples(
        [photo.path for photo in photos],
        of_caption,
        np.frombuffer(ids, np.int32),
        np.frombuffer(starts, np.int64),
        np.append(firsts, len(places)),
    )


def readable(
    paths: Sequence[Path], read: Callable[[Path], T]
) -> Generator[tuple[Path, T | None], None, None]:
    """`read` each image in threads, in order; None where it raised `ImageError`."""

    def attempt(path: Path) -> tuple[Path, T | None]:
        try:
            return path, read(path)
        except ImageError:
            return path, None

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), _READ_AHEAD):
            yield from pool.map(attempt, paths[start : start + _READ_AHEAD])


def photos_as_trained(
    data: Path, split: str, captioner: Path | None, seed: int | None
) -> list[Photo]:
    """The readable photos of a split, cut as it was for the training of `captioner`.

    Args:
        captioner: exported folder, checkpoint or run folder. One that doesn't say its split, and
            None, stand for shares of 0.1 and the seed `seed`, or 0.
    Raises:
        DatasetError: no such photos.
        ValueError: a `seed` that is not that of the training.
    """
    training = _training_of(captioner) if captioner else {}
    numbers = {"validation": 0.1, "test": 0.1, "seed": seed or 0, **training.get("split", {})}
    if seed is not None and seed != numbers["seed"]:
        raise ValueError(f"--seed {seed}: {captioner} was trained with seed {numbers['seed']}")
    if captioner and "split" not in training:
        print(
            f"{captioner} does not say how its data was split: taking shares of 0.1 and seed "
            f"{numbers['seed']}",
            file=sys.stderr,
        )
    try:
        dataset = read_dataset(data, **numbers)
    except TypeError as error:
        raise DatasetError(f"{captioner}: says no split that can be made: {numbers}") from error
    paths = [photo.path for photo in dataset.splits[split]]
    checked = tqdm(readable(paths, load_image), "checking photos", len(paths), leave=False)
    dataset.skip("unreadable images", [path.name for path, image in checked if image is None])
    photos = dataset.splits[split]
    for reason, names in dataset.skipped.items():
        print(f"left out: {len(names)} {reason}, {names[0]} for one", file=sys.stderr)
    wanted = training.get("photos", {}).get(split, len(photos))
    if "split" in training and len(photos) != wanted:
        print(
            f"the training had {wanted} photos for {split}, {data} has {len(photos)}: its photos "
            "or captions have changed, so some may have been trained on",
            file=sys.stderr,
        )
    return photos


def _training_of(captioner: Path) -> dict[str, Any]:
    """What a captioner's files say of its training, without torch; empty where that is nothing."""
    names = ("checkpoint.json", "best/checkpoint.json", "training.json", "best/training.json")
    for name in (FILE_NAME, *names):
        file = captioner / name
        if file.is_file():
            try:
                document = json.loads(file.read_text(encoding="utf-8"))
                return dict(document.get("provenance", document).get("training", {}))
            except (ValueError, AttributeError, TypeError) as error:
                raise DatasetError(f"{file}: damaged: {error!r}") from error
    return {}


def main(argv: list[str] | None = None) -> int:
    """Print the paths of a split's photos, for commands that read such a list."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data",
        **teaching(
            "Print the paths of a split's photos.",
            "python -m train.data --data flickr8k --split test | capbench --photos - \\",
            "    --references flickr8k/captions.txt",
            "python -m train.data --data flickr8k --run runs/first   # split as it was",
        ),
    )
    parser.add_argument("--data", type=Path, required=True, help="Flickr8k folder")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="split as in the training of this run, checkpoint or exported folder",
    )
    parser.add_argument("--seed", type=int, help="seed of the split, where there is no --run")
    options = parser.parse_args(argv)

    def show() -> int:
        photos = photos_as_trained(options.data, options.split, options.run, options.seed)
        print(*(photo.path for photo in photos), sep="\n")
        return 0

    return run_command("train.data", show)


if __name__ == "__main__":
    sys.exit(main())
