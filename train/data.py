"""A data set's photos in their splits, the cleaning of captions, the vocabulary.

Nothing here needs torch: an exported captioner is scored without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import string
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from capexport.artifact import FILE_NAME
from capexport.cli import run_parser, teaching
from capexport.errors import DatasetError, ImageError
from capexport.families.cnn_lstm import Vocabulary
from capexport.metrics import MARKS
from capexport.preprocessing import ImageSpec, preprocess
from train.formats import FLICKR8K_SPLIT, find_captions

SPLITS = ("train", "validation", "test")

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
    """The photos of each split, no two with the same name.

    Attributes:
        official: the files or folders that tell the split; empty where a seed made it.
        skipped: by reason, the names of what was left out.
    """

    splits: dict[str, list[Photo]]
    official: str = ""
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
                left_out = "; ".join(
                    f"{len(v)} {k}, {v[0]} for one" for k, v in self.skipped.items()
                )
                raise DatasetError(
                    f"no usable photo is left for {split}" + (f" ({left_out})" if left_out else "")
                )


def read_dataset(
    folder: Path, validation: float, test: float, seed: int, official: str | bool | None = None
) -> Dataset:
    """Read captions and split; whether the images can be decoded is found out later.

    `train.formats` finds the captions in the folder, and a line on stderr says which it took. The
    split is the one that the data set's files give. Without a test split, as in COCO, whose test
    captions are not public, the validation split is halved; without a validation split the training
    split gives its share. Without any, photos are ranked by a hash of seed and name, so the split
    is the same on every machine, missing photos or not.

    Args:
        official: what tells the split, as an earlier `Dataset` had it.
    Raises:
        DatasetError: no captions, no images, or nothing usable in a split.
    """
    if official is not None and not isinstance(official, str):
        official = FLICKR8K_SPLIT if official else ""  # in checkpoints of 0.1
    source, contents, others = find_captions(folder, official)
    told = {} if official == "" else contents.told
    names, how = _split(told, contents.captions, validation, test, seed)
    listed = set().union(*names.values())
    if len(listed) < sum(map(len, names.values())):
        raise DatasetError(f"{folder}: {source.split} has a photo in two splits")
    dataset = Dataset(
        {
            split: [
                Photo(name, contents.root / name, tuple(contents.captions[name]))
                for name in names[split]
                if name in contents.captions
            ]
            for split in SPLITS
        },
        official=source.split if "train" in told and len(told) > 1 else "",
    )
    captioned = contents.captions.keys()
    dataset.skip("captioned photos without an image file", contents.missing)
    dataset.skip("photos without captions", contents.uncaptioned | (listed - captioned))
    dataset.skip("photos in no split", captioned - contents.missing - listed)
    also = f"; not taken: {', '.join(others)}" if others else ""
    print(f"{folder}: captions of {source.name}, {how}{also}", file=sys.stderr)
    return dataset


def _split(
    told: Mapping[str, list[str]], names: Iterable[str], validation: float, test: float, seed: int
) -> tuple[dict[str, list[str]], str]:
    """The names of each split, and in words where the split comes from."""

    def ranked(names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())

    if told.keys() == set(SPLITS):
        return dict(told), "with their split"
    if told.keys() == {"train", "validation"}:
        order = ranked(told["validation"])
        middle = len(order) // 2
        halves = {"validation": order[:middle], "test": order[middle:]}
        return {"train": told["train"], **halves}, (
            f"no test split: the validation split is halved into validation and test, seed {seed}"
        )
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise DatasetError(
            "--validation and --test must leave some photos to each split: each above 0, and "
            f"together below 1, not {validation} and {test}"
        )
    apart = told.keys() == {"train", "test"}
    order = ranked(told["train"] if apart else names)
    # Of a handful of photos, a split still gets one.
    n_validation = max(1, round(len(order) * validation))
    n_test = 0 if apart else max(1, round(len(order) * test))
    n_train = len(order) - n_validation - n_test
    if n_train < 1:
        raise DatasetError(
            f"too few photos with captions to divide among train, validation and test: {len(order)}"
        )
    cut = {
        "train": order[:n_train],
        "validation": order[n_train : n_train + n_validation],
        "test": told["test"] if apart else order[n_train + n_validation :],
    }
    return cut, (
        f"no validation split: {validation:.0%} of the training split, seed {seed}"
        if apart
        else f"split by photo, seed {seed}"
    )


class _Punctuation(dict[int, int | None]):
    """What `str.translate` makes of each character: nothing of punctuation in any script."""

    def __missing__(self, code: int) -> int | None:
        sign = chr(code)
        punctuation = sign in string.punctuation or unicodedata.category(sign)[0] == "P"
        self[code] = None if punctuation else code
        return self[code]


_NO_PUNCTUATION = _Punctuation()


def clean(caption: str, keep_articles: bool) -> list[str]:
    """The published cleaning: lower case, no punctuation, no words with digits or other
    non-letters, and no single letters unless `keep_articles`. An accent or a vowel sign belongs to
    its letter, however it is encoded."""
    text = unicodedata.normalize("NFC", caption).lower().translate(_NO_PUNCTUATION)
    return [word for word in text.split() if _spells(word) and (keep_articles or len(word) > 1)]


def _spells(word: str) -> bool:
    """Whether a word is all letters, with the marks and joiners that some scripts write them by."""
    return word.isalpha() or (
        word[0].isalpha()
        and all(sign.isalpha() or unicodedata.category(sign) in MARKS for sign in word)
    )


def build_vocabulary(captions: Iterable[list[str]], min_count: int) -> Vocabulary:
    """The words that occur at least `min_count` times, the most frequent first."""
    counts = Counter(word for caption in captions for word in caption)
    kept = sorted((w for w in counts if counts[w] >= min_count), key=lambda w: (-counts[w], w))
    return Vocabulary((*Vocabulary.SPECIALS, *kept))


Ids: TypeAlias = Sequence[int] | NDArray[np.int32]
# A photo and captions of it, as ids.
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
        """A hash of the captions and of whose they are."""
        digest = hashlib.sha256()
        for part in (self.places, self.ids, self.starts, self.firsts):
            digest.update(part.tobytes())
        return digest.hexdigest()


def encode_captions(
    photos: Sequence[Photo], vocabulary: Vocabulary, keep_articles: bool, whole: bool
) -> Examples:
    """The captions of `photos`, cleaned. Captions without a word left are left out, and so are
    photos without a caption. An example is a photo with one caption or, if `whole`, with all of
    them."""
    rows = (
        (place, vocabulary.encode(words))
        for place, photo in enumerate(photos)
        for caption in photo.captions
        if (words := clean(caption, keep_articles))
    )
    return pack(photos, rows, whole)


def pack(photos: Sequence[Photo], rows: Iterable[tuple[int, Ids]], whole: bool = False) -> Examples:
    """Put captions into `Examples`; `whole` is as of `encode_captions`.

    Args:
        rows: for each caption the place of its photo in `photos` and its ids, in the photos' order.
    """
    places, ids, starts = array("i"), array("i"), array("q", [0])
    for place, row in rows:
        ids.extend(row)
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


def check_photo(path: Path) -> bool:
    """Whether every captioner can take a photo, for `readable`.

    Raises:
        ImageError: it cannot be decoded, or is a strip that none takes.
    """
    preprocess(path, ImageSpec())
    return True


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
    name_of = {photo.path: photo.name for photo in dataset.splits[split]}
    checked = tqdm(
        readable(list(name_of), check_photo), "checking photos", len(name_of), leave=False
    )
    dataset.skip("unreadable images", [name_of[path] for path, good in checked if not good])
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
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder of a data set"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="split as in the training of this run, checkpoint or exported folder",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of the split, where there is no --run"
    )
    return run_parser(parser, _show, argv)


def _show(options: argparse.Namespace) -> int:
    photos = photos_as_trained(options.data, options.split, options.run, options.seed)
    print(*(photo.path for photo in photos), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
