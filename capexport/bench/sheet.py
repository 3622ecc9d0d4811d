"""A sheet of photos with what people and captioners say of them, as a picture and as a page."""

from __future__ import annotations

import base64
import html
import io
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capexport.atomic import replace_file, replacing_binary_file
from capexport.errors import importing
from capexport.preprocessing import load_image

_COLUMNS = 4
_THUMBNAIL = (360, 360)  # pixels


@dataclass(frozen=True)
class Entry:
    """A photo, its captions by captioner, and human ones where there are some."""

    photo: Path
    captions: Mapping[str, str]
    references: Sequence[str] = ()


def draw_sheet(entries: Sequence[Entry], path: Path) -> None:
    """A PNG: under each photo the captions in bold, and two references.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows = -(-len(entries) // _COLUMNS)
    lines = max(len(entry.captions) for entry in entries)
    figure = new_figure(3.6 * _COLUMNS, (4.6 + 0.6 * lines) * rows)
    grid = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axes in grid:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, entry in zip(grid, entries, strict=False):
        image = load_image(entry.photo)
        image.thumbnail(_THUMBNAIL)
        axes.imshow(image)
        named = len(entry.captions) > 1
        captions = (f"{name}: {text}" if named else text for name, text in entry.captions.items())
        title = "\n".join(textwrap.fill(caption, 36) for caption in captions)
        axes.set_title(title, fontsize=11, fontweight="bold")
        references = (textwrap.fill(textwrap.shorten(r, 90), 50) for r in entry.references[:2])
        axes.set_xlabel("\n".join(references), fontsize=8)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # A notebook's own MPLBACKEND stops the import where it is not installed. No window is drawn.
    inherited = os.environ.pop("MPLBACKEND", None)
    try:
        with importing("drawing needs `pip install 'capexport[export]'`"):
            from matplotlib.figure import Figure
    finally:
        if inherited is not None:
            os.environ["MPLBACKEND"] = inherited
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 100) -> None:
    """Write a PNG so that `path` holds the old or the new picture, never part of it."""
    with warnings.catch_warnings(record=True) as found, replacing_binary_file(path) as file:
        figure.savefig(file, dpi=dpi, format="png")
    for first in found[:1]:  # there is one for each letter that the font lacks
        warnings.warn(f"{path}: {first.message}", stacklevel=2)


def write_page(entries: Sequence[Entry], path: Path) -> None:
    """An HTML page of its own, photos included: a row for each, a column for each captioner."""
    heads = ["", *entries[0].captions]
    if any(entry.references for entry in entries):
        heads.insert(1, "people")
    rows = []
    for entry in entries:
        cells = [f'<img src="{_data_url(entry.photo)}" alt="{html.escape(entry.photo.name)}">']
        if "people" in heads:
            cells.append("<br>".join(map(html.escape, entry.references)))
        cells += map(html.escape, entry.captions.values())
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    style = (
        "body{font:16px system-ui;margin:2em auto;max-width:75em}td,th{padding:.6em;"
        "text-align:left;vertical-align:top;border-top:1px solid #ccc}"
    )
    replace_file(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Captions</title>'
        f"<style>{style}</style><table><tr>{head}</tr>\n" + "\n".join(rows) + "\n</table></html>\n",
    )


def _data_url(photo: Path) -> str:
    image = load_image(photo)
    image.thumbnail(_THUMBNAIL)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
