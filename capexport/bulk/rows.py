"""The formats of rows: what is written, and how it is read back."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from capexport.bulk.names import UNSAFE, escaped, original_name, readable_name, shown, unescaped

# A file's name in the results and its caption; where asked for, the caption's log-probability, and
# in jsonl alternatives: an object for each, with text, log_probability and score.
Row: TypeAlias = tuple[str, str] | tuple[str, str, float] | tuple[str, str, float, list[Any]]

COLUMNS = ("file_name", "text", "log_probability", "alternatives")
# A spreadsheet runs a cell that begins so. `./=1.jpg` is still the same file; a caption gets an
# apostrophe.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def coco_image_id(name: str) -> int | str:
    """The number in `COCO_val2014_000000000042.jpg` or `42.jpg`; any other name without suffix."""
    stem = Path(name).stem
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", stem)
    return int(number[1]) if number else stem


class RowWriter:
    """Writes a `text`, `jsonl`, `csv` or `coco` file, row by row; csv names `columns` first."""

    def __init__(self, stream: TextIO, format: str, columns: int = 2) -> None:
        self._stream, self._format = stream, format
        self._csv = csv.writer(stream, lineterminator="\n")
        self._separator = ""
        if format == "csv":
            self._csv.writerow(COLUMNS[:columns])
        elif format == "coco":
            stream.write("[\n")

    def write(self, row: Row) -> None:
        name, text, *score = row
        if self._format == "csv":
            name, text = shown(name), escaped(text)
            name = f"./{name}" if name.startswith(_FORMULA) else name
            text = f"'{text}" if _is_formula(text) else text
            self._csv.writerow([name, text, *score])
        elif self._format == "coco":
            result = {"image_id": coco_image_id(name), "caption": text}
            self._stream.write(self._separator + to_json(result))
            self._separator = ",\n"
        elif self._format == "jsonl":
            # The last columns are missing where they were not asked for.
            self._stream.write(to_json(dict(zip(COLUMNS, row, strict=False))) + "\n")
        else:
            self._stream.write(f"{shown(name)}\t{escaped(text)}\n")

    def finish(self) -> None:
        if self._format == "coco":
            self._stream.write("\n]\n")


def read_rows(
    stream: TextIO, format: str, columns: int, names: Mapping[int | str, str]
) -> Iterator[Row]:
    """The rows that `RowWriter` wrote, whatever empty lines an editor left between them. `names`
    are the files of COCO's ids; other ids are skipped.

    Raises:
        ValueError, KeyError, TypeError: it is something else, or was edited so that it is.
    """
    wanted = COLUMNS[:columns]
    if format == "coco":
        for item in json.load(stream):
            if item["image_id"] in names:
                yield _row(names[item["image_id"]], item["caption"])
    elif format == "csv":
        header, *rows = filter(None, csv.reader(stream, strict=True))
        if tuple(header) != wanted:
            raise ValueError(f"its columns are {', '.join(header)}")
        for name, text, *score in rows:
            text = text[1:] if text.startswith("'") and _is_formula(text) else text
            name = original_name(name.removeprefix("./"))
            yield _row(readable_name(name), unescaped(text), *map(float, score))
    elif format == "jsonl":
        for document in map(json.loads, filter(str.strip, stream)):
            if set(document) != set(wanted):
                raise ValueError(f"a row has the fields {', '.join(document)}")
            yield _row(*(document[column] for column in wanted))
    else:
        for line in filter(str.strip, stream):
            name, text = line.rstrip("\r\n").split("\t")
            yield readable_name(original_name(name)), unescaped(text)


def to_json(value: Any) -> str:
    """One line of JSON without anything that a terminal would act on."""
    text = json.dumps(value, ensure_ascii=False)
    # JSON escapes only the control characters of ASCII by itself.
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _is_formula(text: str) -> bool:
    return text.lstrip("'").startswith(_FORMULA)


def _row(name: Any, text: Any, *rest: Any) -> Row:
    alternatives = rest[1:]
    if not all(map(isinstance, (name, text, *alternatives), (str, str, list))) or len(rest) > 2:
        raise ValueError(f"no row: {(name, text, *rest)}")
    return name, text, *map(float, rest[:1]), *alternatives
