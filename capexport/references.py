"""Human captions, from the files that public data sets keep them in.

`.json` is Karpathy's (`dataset_flickr8k.json`, with its split) or COCO's (`captions_val2017.json`),
`.jsonl` that of a Hugging Face image folder (`metadata.jsonl`: `file_name`, `text`). Any other file
is a table, and its first line says how it is laid out:

- a header of known columns, in any order, between commas, tabs, semicolons or vertical bars:
  `image,caption` (Flickr8k on Kaggle), `image_name,comment_number,comment` (Flickr30k on Kaggle),
  `file_name,text` (`metadata.csv` of Hugging Face);
- `name.jpg#0`, a tab and a caption (`Flickr8k.token.txt`), to the letter, without quoting;
- no header: a file name and a caption, between one of the same four.

A caption is part of one line, so a quotation mark that is never closed cannot swallow the next.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from capexport.errors import DatasetError

_DELIMITERS = ",\t|;"
_COLUMNS = {
    "image": "image",
    "image_name": "image",
    "file_name": "image",
    "caption": "caption",
    "comment": "caption",
    "text": "caption",
    "comment_number": "number",
}
_SUFFIX = r"\.(?:jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|avif|heic|jp2|ppm|pgm)"
_IMAGE = rf".*{_SUFFIX}(?:\.\d+)?"  # Flickr8k.token.txt names one photo `.jpg.1`


@dataclass
class CaptionedImage:
    """An image that a file of captions names.

    Attributes:
        name: its path, with slashes, never a way out of the folder that it is relative to.
        captions: as people wrote them, but for white space at the ends; none is empty.
        split: the file's own word for it, where it has one.
        coco_id: the image's number in COCO, where Karpathy's file gives it.
    """

    name: str
    captions: list[str]
    split: str = ""
    coco_id: int | None = None


@dataclass(frozen=True)
class _Layout:
    """What a row's cells are: "image", "caption" and perhaps "number", the caption's own."""

    delimiter: str
    columns: tuple[str, ...]
    header: bool = False
    token: bool = False  # `name.jpg#0`, without quoting


def read_references(file: Path) -> dict[str, list[str]]:
    """The captions of each image by its file name, without folders; both in the file's order.

    Raises:
        DatasetError: as `read_captions`, or images in two folders have the same file name.
    """
    references: dict[str, list[str]] = {}
    for image in read_captions(file):
        name = image.name.rpartition("/")[2]
        if name in references:
            raise DatasetError(
                f"{file}: two images are called {name}, so a photo's file name doesn't tell which "
                "captions are its own"
            )
        references[name] = image.captions
    return references


def read_captions(file: Path) -> list[CaptionedImage]:
    """The images that have captions, each once, in the file's order.

    Raises:
        DatasetError: columns that are not known, damaged JSON, or a line that cannot be what it
            should be.
    """
    text = _text(file)
    if file.suffix.lower() == ".json":
        images = _from_json(file, text)
    else:
        rows = _json_rows if file.suffix.lower() == ".jsonl" else _table_rows
        images = _merged(rows(file, _lines(text)))
    images = [image for image in images if image.captions]
    if not images:
        raise DatasetError(f"{file}: no captions in it")
    return images


def _text(file: Path) -> str:
    content = file.read_bytes()
    wrong = content.find(b"\0")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        number = content.count(b"\n", 0, wrong) + 1
        raise DatasetError(f"{file}, line {number}: not a caption file in UTF-8; save it as UTF-8")
    return text


def _lines(text: str) -> Iterator[str]:
    return (match[1] for match in re.finditer(r"([^\r\n]*)(?:\r\n|\r|\n|\Z)", text))


def _inside(name: Any) -> str:
    """`name`, if it is a path that stays in its folder on every system."""
    if not isinstance(name, str) or not name.strip("./ "):
        raise ValueError(f"{name!r} is not a file name")
    path = PureWindowsPath(name)  # for it, / and \ are both separators
    if path.anchor or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of the data folder")
    return path.as_posix()


def _stripped(captions: Iterable[Any]) -> list[str]:
    captions = list(captions)
    if wrong := [caption for caption in captions if not isinstance(caption, str)]:
        raise ValueError(f"{wrong[0]!r} where a caption should be")
    return [stripped for caption in captions if (stripped := caption.strip())]


def _merged(rows: Iterable[tuple[str, list[str]]]) -> list[CaptionedImage]:
    images: dict[str, CaptionedImage] = {}
    for name, captions in rows:
        if name not in images:
            images[name] = CaptionedImage(name, [])
        images[name].captions += captions
    return list(images.values())


def _from_json(file: Path, text: str) -> list[CaptionedImage]:
    """Karpathy's JSON, or COCO's."""
    try:
        document = json.loads(text, object_hook=_needed)
        if not isinstance(document, dict) or not isinstance(document.get("images"), list):
            raise ValueError("no list of images in it")
        images: list[Any] = document["images"]
        if "annotations" in document:
            return _from_coco(images, document["annotations"])
        names: set[str] = set()
        for image in images:
            if not isinstance(image, CaptionedImage):
                raise ValueError("an image without filename and sentences")
            if image.name in names:
                raise ValueError(f"it lists {image.name} twice")
            names.add(image.name)
        return images
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DatasetError(f"{file}, {where}: damaged JSON: {error.msg}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"{file}: neither Karpathy's JSON nor COCO's captions_*.json: {error}"
        ) from None


def _needed(item: dict[str, Any]) -> Any:
    """What is kept of a JSON object as soon as it is read: all else would be ten times as much."""
    if "raw" in item:
        return item["raw"]
    if "sentences" in item and "filename" in item:
        return CaptionedImage(
            _inside("/".join(filter(None, (item.get("filepath"), item["filename"])))),
            _stripped(item["sentences"]),
            str(item.get("split", "")),
            item.get("cocoid"),
        )
    if "image_id" in item:
        return item["image_id"], item.get("caption", "")
    if "file_name" in item:
        return item.get("id"), item["file_name"]
    return item


def _from_coco(images: list[Any], annotations: Iterable[Any]) -> list[CaptionedImage]:
    found: dict[Any, CaptionedImage] = {}
    names: set[str] = set()
    for image in images:
        if not isinstance(image, tuple):
            raise ValueError("an image without file_name")
        number, name = image
        found[number] = CaptionedImage(_inside(name), [])
        names.add(found[number].name)
    if not len(names) == len(found) == len(images):
        raise ValueError("two images have the same id or file_name")
    for annotation in annotations:
        if not isinstance(annotation, tuple) or annotation[0] not in found:
            raise ValueError(f"an annotation of no image that it lists: {str(annotation)[:80]}")
        found[annotation[0]].captions += _stripped([annotation[1]])
    return list(found.values())


def _json_rows(file: Path, lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            named = isinstance(row, dict) and "file_name" in row
            if not (named and ("text" in row or "caption" in row)):
                raise ValueError('not an object with "file_name" and "text"')
            text = row.get("text", row.get("caption"))
            texts = text if isinstance(text, list) else [] if text is None else [text]
            yield _inside(row["file_name"]), _stripped(texts)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{file}, line {number}: {error}") from None


def _table_rows(file: Path, lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    names: dict[str, str] = {}
    suspect: list[tuple[int, str]] = []
    layout = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if layout is None:
                layout = _layout(line)
                if layout.header:
                    continue
            name, caption = _row(line, layout)
            if name not in names:
                names[name] = _inside(name)
        except (ValueError, csv.Error) as error:
            raise DatasetError(f"{file}, line {number}: {error}") from None
        if re.search(_SUFFIX, caption, re.IGNORECASE):
            suspect.append((number, caption))
        yield names[name], [caption] if caption else []
    for number, caption in suspect:
        if inner := _name_within(caption, names):
            raise DatasetError(
                f"{file}, line {number}: the caption holds the file name {inner}: is a line break "
                "missing, or a quotation mark misplaced?"
            )


def _layout(first: str) -> _Layout:
    if re.match(r"[^\t]+#\d+\t", first):
        return _Layout("\t", ("image", "caption"), token=True)
    image = rf'"?[^"{_DELIMITERS}]*{_SUFFIX}(?:\.\d+)?"? *([{_DELIMITERS}])'
    if match := re.match(image, first, re.IGNORECASE):
        return _Layout(match[1], ("image", "caption"))
    for delimiter in _DELIMITERS:
        names = [cell.strip().lower() for cell in _cells(first, delimiter)]
        columns = tuple(_COLUMNS.get(name, "") for name in names)
        if sorted(columns) in (["caption", "image"], ["caption", "image", "number"]):
            return _Layout(delimiter, columns, header=True)
    raise ValueError(
        f"unknown columns {first.strip()[:80]!r}: the first line must name them, and no others, as "
        "in image,caption or image_name,comment_number,comment, or hold a file name and its caption"
    )


def _row(line: str, layout: _Layout) -> tuple[str, str]:
    """The name of a line's image, and its caption."""
    if layout.token:
        match = re.fullmatch(r"([^\t]*)#\d+\t(.*)", line)
        if not match:
            raise ValueError("not a file name, # and a number, a tab and a caption")
        cells = [match[1], match[2]]
    else:
        cells = _fitted(_cells(line, layout.delimiter), layout)
    row = {column: cell.strip() for column, cell in zip(layout.columns, cells, strict=True)}
    if not re.fullmatch(_IMAGE, row["image"], re.IGNORECASE):
        raise ValueError(
            f"{row['image'][:80]!r} is not the file name of an image; a caption must not have "
            "line breaks"
        )
    if not row.get("number", "0").isdecimal():
        raise ValueError(f"{row['number'][:80]!r} is not the number of a caption")
    return row["image"], row["caption"]


def _cells(line: str, delimiter: str) -> list[str]:
    rows = list(csv.reader([line, ""], delimiter=delimiter))
    if len(rows) == 1:  # the cell goes on after the line
        raise ValueError(
            "a quotation mark opens a caption and is not closed on this line: remove or close it; "
            "a caption must not have line breaks"
        )
    return rows[0]


def _fitted(cells: list[str], layout: _Layout) -> list[str]:
    """`cells`, as many as there are columns."""
    columns, delimiter = layout.columns, layout.delimiter
    if columns == ("image", "number", "caption") and len(cells) > 1 and not any(cells[2:]):
        # Flickr30k's results.csv has a line without its second bar: `2199200615.jpg| 4   A dog`;
        # tables made of it have an empty last cell there.
        parts = cells[1].split(maxsplit=1)
        cells = [cells[0], *parts] if len(parts) == 2 else cells
    if len(cells) < len(columns):
        raise ValueError(
            f"{len(cells)} columns where {len(columns)} should be; a caption must not have line "
            "breaks"
        )
    if len(cells) > len(columns):
        if columns[-1] != "caption":
            raise ValueError(f"{len(cells)} columns where {len(columns)} should be")
        last = len(columns) - 1
        if "number" not in columns and cells[last].strip().isdecimal():
            raise ValueError(
                "a number stands before the caption: name the columns in a first line, as in "
                "image_name,comment_number,comment"
            )
        cells = [*cells[:last], delimiter.join(cells[last:])]  # it was not quoted
    return cells


def _name_within(caption: str, names: Collection[str]) -> str | None:
    for suffix in re.finditer(_SUFFIX, caption, re.IGNORECASE):
        for start in range(suffix.start()):
            if caption[start : suffix.end()] in names:
                return caption[start : suffix.end()]
    return None
