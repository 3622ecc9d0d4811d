"""Human captions, from the files that public data sets keep them in.

A file's first line says how it is laid out:

- a header of known columns, in any order, between commas, tabs, semicolons or vertical bars:
  `image,caption` (Flickr8k on Kaggle), `image_name,comment_number,comment` (Flickr30k on Kaggle);
- `name.jpg#0`, a tab and a caption (`Flickr8k.token.txt`), to the letter, without quoting;
- no header: a file name and a caption, between one of the same four.

A caption is part of one line, so a quotation mark that is never closed cannot swallow the next.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from capexport.errors import DatasetError

_DELIMITERS = ",\t|;"
_COLUMNS = {
    "image": "image",
    "image_name": "image",
    "caption": "caption",
    "comment": "caption",
    "comment_number": "number",
}
_SUFFIX = r"\.(?:jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|avif|heic|jp2|ppm|pgm)"
_IMAGE = rf".*{_SUFFIX}(?:\.\d+)?"  # Flickr8k.token.txt names one photo `.jpg.1`


@dataclass(frozen=True)
class _Layout:
    """What a row's cells are: "image", "caption" and perhaps "number", the caption's own."""

    delimiter: str
    columns: tuple[str, ...]
    header: bool = False
    token: bool = False  # `name.jpg#0`, without quoting


def read_references(file: Path) -> dict[str, list[str]]:
    """The captions of each image by its file name, both in the file's order; empty ones left out.

    Raises:
        DatasetError: columns that are not known, or a line that cannot be what it should be.
    """
    lines = [(number, line) for number, line in enumerate(_lines(file), 1) if line.strip()]
    rows: list[tuple[int, str, str]] = []
    layout = None
    for number, line in lines:
        try:
            if layout is None:
                layout = _layout(line)
                if layout.header:
                    continue
            rows.append((number, *_row(line, layout)))
        except (ValueError, csv.Error) as error:
            raise DatasetError(f"{file}, line {number}: {error}") from None
    names = {name for _, name, _ in rows}
    references: dict[str, list[str]] = {}
    for number, name, caption in rows:
        if inner := _name_within(caption, names):
            raise DatasetError(
                f"{file}, line {number}: the caption holds the file name {inner}: is a line break "
                "missing, or a quotation mark misplaced?"
            )
        if caption:
            references.setdefault(name, []).append(caption)
    if not references:
        raise DatasetError(f"{file}: no captions in it")
    return references


def _lines(file: Path) -> list[str]:
    content = file.read_bytes()
    wrong = content.find(b"\0")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        number = content.count(b"\n", 0, wrong) + 1
        raise DatasetError(f"{file}, line {number}: not a caption file in UTF-8; save it as UTF-8")
    return re.split("\r\n|\r|\n", text)


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
        f"unknown columns {first.strip()[:80]!r}: the first line must name them, as in "
        "image,caption or image_name,comment_number,comment, or hold a file name and its caption"
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
    if columns == ("image", "number", "caption") and len(cells) == 2:
        # Flickr30k's results.csv has a line without its second bar: `2199200615.jpg| 4   A dog`.
        cells = [cells[0], *cells[1].split(maxsplit=1)]
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
