"""Pictures of a run: the loss curves, and a sheet of captioned photos."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from capexport.preprocessing import load_image
from train.data import Photo

_COLUMNS = 4


def draw_curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Training and validation loss a token, over epochs; the best epoch is marked."""
    epochs = [epoch["epoch"] for epoch in history]
    validation = [epoch["validation_loss"] for epoch in history]
    best = min(range(len(history)), key=validation.__getitem__)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(
        title="CNN-LSTM captioner", xlabel="epoch", ylabel="cross-entropy (nats a token)"
    )
    axes.plot(epochs, [epoch["train_loss"] for epoch in history], "o-", label="training")
    axes.plot(epochs, validation, "o-", label="validation")
    axes.plot(epochs[best], validation[best], "k*", ms=12, label=f"best: {validation[best]:.3f}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_samples(photos: Sequence[Photo], captions: Sequence[str], path: Path) -> None:
    """A sheet of photos: the model's caption in bold, two of the references below it."""
    rows = -(-len(photos) // _COLUMNS)
    figure = Figure(figsize=(3.6 * _COLUMNS, 5.2 * rows), layout="constrained")
    grid = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axes in grid:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, photo, caption in zip(grid, photos, captions, strict=False):
        image = load_image(photo.path)
        image.thumbnail((360, 360))
        axes.imshow(image)
        axes.set_title(textwrap.fill(caption, 36), fontsize=11, fontweight="bold")
        references = (textwrap.fill(textwrap.shorten(text, 90), 50) for text in photo.captions[:2])
        axes.set_xlabel("\n".join(references), fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    draft = path.with_name(path.name + ".partial")
    figure.savefig(draft, dpi=100, format="png")
    draft.replace(path)
