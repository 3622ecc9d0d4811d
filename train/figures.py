"""The pictures of a run. None is worth a training: one that cannot be drawn is only reported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from capexport.atomic import replacing_binary_file
from capexport.attention import draw_attention
from capexport.bench.sheet import new_figure, save_figure
from capexport.captioner import Captioner


def attempt(path: Path, draw: Callable[[Path], None]) -> None:
    """`draw(path)`, or a line that says why not: drawing may fail in as many ways as there are
    installations of matplotlib."""
    try:
        draw(path)
    except Exception as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        print(f"{path}: not drawn: {reason}", file=sys.stderr)


def draw_attentions(captioner: Captioner, photos: Sequence[Path], path: Path) -> None:
    """Where the captioner looked in each of a few photos, one below the other."""
    captions = captioner.caption(photos, attention=True)
    sheets = [draw_attention(captioner, *pair) for pair in zip(photos, captions, strict=True)]
    size = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    picture, top = Image.new("RGB", size, "white"), 0
    for sheet in sheets:
        picture.paste(sheet, (0, top))
        top += sheet.height
    with replacing_binary_file(path) as file:
        picture.save(file, "PNG")


def draw_curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Training and validation loss a token, over epochs; the best epoch is marked."""
    epochs = [epoch["epoch"] for epoch in history]
    validation = [epoch["validation_loss"] for epoch in history]
    best = min(range(len(history)), key=validation.__getitem__)
    figure = new_figure(6, 4)
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot(xlabel="epoch", ylabel="cross-entropy (nats a token)")
    axes.plot(epochs, [epoch["train_loss"] for epoch in history], "o-", label="training")
    axes.plot(epochs, validation, "o-", label="validation")
    axes.plot(epochs[best], validation[best], "k*", ms=12, label=f"best: {validation[best]:.3f}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
