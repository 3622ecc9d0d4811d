"""Which data set lies in a folder: its captions, photos and split, found by the names of files.

If there are several, the first in this order counts that has at least half of its photos, or if
none does, the one with the most: Karpathy's JSON (it holds the split that papers report),
Flickr8k's and Flickr30k's own files, COCO's, a Hugging Face image folder (last, since `capexport
caption` writes such files too).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from capexport.errors import DatasetError
from capexport.preprocessing import image_suffixes
from capexport.references import CaptionedImage, read_captions

_IMAGE_FOLDERS = (
    "Images",
    "images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",
    "flickr30k_images",
    "flickr30k-images",
    "flickr30k_images/flickr30k_images",
)
# Flickr30k's photos hold Flickr8k's, so its file is tried first; COCO's is the largest.
_KARPATHY_FILES = ("dataset_flickr30k.json", "dataset_flickr8k.json", "dataset_coco.json")
_FLICKR_FILES = ("Flickr8k.token.txt", "captions.txt", "results.csv", "results_20130124.token")
_FLICKR_SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
FLICKR8K_SPLIT = ", ".join(_FLICKR_SPLITS.values())
_COCO_FILE = re.compile(r"captions_(train|val|test)(\w*)\.json")
_METADATA_FILES = ("metadata.jsonl", "metadata.csv")
# What captions that have a name of their own may be called.
_RENAMED = {
    ".jsonl": "metadata.jsonl",
    ".json": "captions_train.json (COCO's form) or dataset_coco.json (Karpathy's)",
    **dict.fromkeys((".csv", ".tsv", ".txt", ".token"), "captions.txt"),
}
# Where captions lie, beside the data folder itself.
_PLACES = (
    ".",
    "annotations",
    "annotations_trainval2017/annotations",
    "annotations_trainval2014/annotations",
    "Flickr8k_text",
    "Flickr_TextData",
    "flickr30k_images",
    "caption_datasets",
)
# The words for a split, in files and of folders, Hugging Face's among them. COCO's restval is the
# part of its validation set that Karpathy gave to the training.
_SPLIT_WORDS = {
    "train": ("train", "training", "restval"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass
class Contents:
    """What the files of a data set say, held against the photos that are there.

    Attributes:
        root: the folder that names are relative to.
        captions: of each photo that has any, by name, whether it is there or not.
        missing: the photos with captions that are not there.
        uncaptioned: the photos beside the others that have no captions.
        told: the names of each split that the files tell, and of no other.
    """

    root: Path
    captions: dict[str, list[str]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    uncaptioned: set[str] = field(default_factory=set)
    told: dict[str, list[str]] = field(default_factory=dict)

    @property
    def found(self) -> int:
        return len(self.captions) - len(self.missing)


@dataclass(frozen=True)
class Source:
    """Captions that lie in a data folder, not yet read.

    Attributes:
        name: the captions files.
        split: the files or folders that tell the split; empty where nothing does.
    """

    name: str
    split: str
    read: Callable[[], Contents]


def find_captions(folder: Path, official: str | None) -> tuple[Source, Contents, list[str]]:
    """The captions that count in a folder, and in words which others lie there.

    Args:
        official: the `Source.split` that the captions must have; if empty, captions without a split
            are preferred.
    Raises:
        DatasetError: no such folder, no such captions, or none whose photos are there.
    """
    if folder.is_file():
        raise DatasetError(f"{folder}: a file; pass the folder that it lies in")
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    every = [source for find in _FINDERS for source in find(folder)]
    if not every:
        raise DatasetError(
            f"{folder}: no captions there: neither captions.txt nor another of "
            f"{', '.join((*_KARPATHY_FILES, *_FLICKR_FILES, *_METADATA_FILES))} or "
            f"annotations/captions_*.json{_other_name(folder)}"
        )
    sources = sorted(every, key=lambda source: bool(source.split)) if official == "" else every
    if official:
        sources = [source for source in every if source.split == official]
    if not sources:
        raise DatasetError(
            f"{folder}: not all of {official} is there, and the model was trained on that split"
        )
    source, contents, said = _best(folder, sources)
    return (
        source,
        contents,
        [said.get(other.name, other.name) for other in every if other != source],
    )


def _other_name(folder: Path) -> str:
    """What to call the one file that may hold captions, where there is one."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in _RENAMED]
    if len(files) != 1:
        return ""
    [file] = files
    return f"; if {file.name} holds them, rename it to {_RENAMED[file.suffix.lower()]}"


def _best(folder: Path, sources: Sequence[Source]) -> tuple[Source, Contents, dict[str, str]]:
    """The first source that has half of its photos, or else the one with the most; and by the name
    of each source that was read, how many photos it has."""
    best: tuple[Source, Contents] | None = None
    said = {}
    for source in sources:
        contents = source.read()
        said[source.name] = f"{source.name} ({contents.found} of {len(contents.captions)} photos)"
        whole = contents.found >= len(contents.missing)
        if best is None or whole or contents.found > best[1].found:
            best = source, contents
        if whole:
            break
    assert best is not None
    source, contents = best
    if not contents.found:
        raise DatasetError(
            f"{folder}: none of the {len(contents.captions)} photos is there that {source.name} "
            f"names, {next(iter(contents.captions))} for one; they may lie in the folder itself or "
            f"in one of {', '.join(_IMAGE_FOLDERS)}"
        )
    return source, contents, said


def _karpathy(folder: Path) -> Iterator[Source]:
    def places(image: CaptionedImage) -> list[str]:
        flat = image.name.rpartition("/")[2]
        if not isinstance(image.coco_id, int):
            return [image.name, flat]
        # In 2017 COCO's photos were divided anew, and named by their numbers.
        renamed = [f"{half}2017/{image.coco_id:012}.jpg" for half in ("train", "val")]
        doubled = [_doubled(name) for name in (image.name, *renamed)]
        return [image.name, flat, *renamed, *doubled]

    def read(file: Path) -> Contents:
        return _located(folder, read_captions(file), places)

    for name in _KARPATHY_FILES:
        if file := _file(folder, name):
            yield Source(name, name, partial(read, file))


def _flickr(folder: Path) -> Iterator[Source]:
    files = {split: _file(folder, name) for split, name in _FLICKR_SPLITS.items()}
    lists = {split: file for split, file in files.items() if file}
    official = FLICKR8K_SPLIT if len(lists) == len(files) else ""

    def read(file: Path) -> Contents:
        contents = _located(folder, read_captions(file))
        if official:
            contents.told = {split: _listed(names) for split, names in lists.items()}
        return contents

    for name in _FLICKR_FILES:
        if file := _file(folder, name):
            yield Source(name, official, partial(read, file))


def _coco(folder: Path) -> Iterator[Source]:
    """The captions of a year: of the splits whose photos are there, or if none is, of all."""
    years: dict[str, dict[str, Path]] = {}
    for place in _PLACES:
        for file in sorted((folder / place).glob("captions_*.json")):
            if match := _COCO_FILE.fullmatch(file.name):
                years.setdefault(match[2], {})[match[1]] = file

    def places(image: CaptionedImage) -> list[str]:
        return [image.name, image.name.rpartition("/")[2], _doubled(image.name)]

    def read(year: str, files: dict[str, Path]) -> Contents:
        images = []
        for split, file in files.items():
            for image in read_captions(file):
                image.name, image.split = f"{split}{year}/{image.name}", split
                images.append(image)
        return _located(folder, images, places)

    for year, files in sorted(years.items(), reverse=True):
        there = {split: file for split, file in files.items() if _holds(folder, split + year)}
        files = there or files
        name = ", ".join(file.name for file in files.values())
        yield Source(name, name if len(files) > 1 else "", partial(read, year, files))


def _image_folder(folder: Path) -> Iterator[Source]:
    """Hugging Face's: one file, or one in the folder of each split."""
    splits = {
        word: split
        for split, words in _SPLIT_WORDS.items()
        for word in words
        if (folder / word).is_dir()
    }

    def read(files: Sequence[Path]) -> Contents:
        images = []
        for file in files:
            for image in read_captions(file):
                image.name = (file.parent.relative_to(folder) / image.name).as_posix()
                image.split = splits.get(image.name.split("/")[0], "")
                images.append(image)
        return _located(folder, images)

    for name in _METADATA_FILES:
        paths = [folder / name] if (folder / name).is_file() else []
        paths = paths or [
            folder / word / name for word in splits if (folder / word / name).is_file()
        ]
        if paths:
            shown = ", ".join(path.relative_to(folder).as_posix() for path in paths)
            split = ", ".join(f"{word}/" for word in splits) if len(splits) > 1 else ""
            yield Source(shown, split, partial(read, paths))


_FINDERS = (_karpathy, _flickr, _coco, _image_folder)


def _file(folder: Path, name: str) -> Path | None:
    candidates = (folder / place / name for place in _PLACES)
    return next((path for path in candidates if path.is_file()), None)


def _doubled(name: str) -> str:
    """Where else a photo may lie: Kaggle and many programs unpack train2017.zip, which holds a
    folder train2017, into another folder train2017."""
    return f"{name.partition('/')[0]}/{name}"


def _holds(folder: Path, name: str) -> bool:
    return any((folder / root / name).is_dir() for root in (".", *_IMAGE_FOLDERS))


def _listed(file: Path) -> list[str]:
    try:
        return list(dict.fromkeys(file.read_text(encoding="utf-8-sig").split()))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file}: not in UTF-8; save it as UTF-8") from error


def _located(
    folder: Path,
    images: Sequence[CaptionedImage],
    places: Callable[[CaptionedImage], Sequence[str]] = lambda image: (image.name,),
) -> Contents:
    """The images, looked for in the folder that most of them lie in.

    Args:
        places: where an image may lie below that folder; the first that is there is its name.
    """
    below = {place.rpartition("/")[0] for image in images for place in places(image)}
    best: tuple[int, Path, set[str], list[str | None]] | None = None
    candidates = [[_composed(place) for place in places(image)] for image in images]
    for root in (folder / name for name in (".", *_IMAGE_FOLDERS)):
        present = set(_present(root, below))
        there = {_composed(name): name for name in present}
        names = [next((there[p] for p in tried if p in there), None) for tried in candidates]
        found = len(names) - names.count(None)
        if best is None or found > best[0]:
            best = found, root, present, names
        if found == len(images):
            break
    assert best is not None
    _, root, present, names = best
    contents = Contents(root)
    for image, name in zip(images, names, strict=True):
        if not name:
            contents.missing.add(name := image.name)
        if name in contents.captions:
            raise DatasetError(f"{root / name}: captions of two photos are for this one file")
        contents.captions[name] = image.captions
        if image.split:
            contents.told.setdefault(_split_of(image), []).append(name)
    contents.uncaptioned = _images_beside(contents.captions.keys() & present, present)
    return contents


def _composed(name: str) -> str:
    """An accented letter as one character: macOS, and what it packs, has it as two."""
    return unicodedata.normalize("NFC", name)


def _split_of(image: CaptionedImage) -> str:
    for split, words in _SPLIT_WORDS.items():
        if image.split in words:
            return split
    raise DatasetError(f"{image.name}: of a split that is not known: {image.split!r}")


def _present(root: Path, folders: Iterable[str]) -> Iterator[str]:
    """The files in `folders` below `root`, links to files among them."""
    for folder in folders:
        if (root / folder).is_dir():
            with os.scandir(root / folder) as entries:
                yield from (f"{folder}/{e.name}".lstrip("/") for e in entries if e.is_file())


def _images_beside(captioned: Set[str], present: Set[str]) -> set[str]:
    folders = {name.rpartition("/")[0] for name in captioned}
    return {
        name
        for name in present - captioned
        if name.rpartition("/")[0] in folders and Path(name).suffix.lower() in image_suffixes()
    }
