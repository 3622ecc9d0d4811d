"""The picture of a run: its loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from capexport.bench.sheet import new_figure, save_figure


def draw_curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Training and validation loss a token, over epochs; the best epoch is marked."""
    epochs = [epoch["epoch"] for epoch in history]
    validation = [epoch["validation_loss"] for epoch in history]
    best = min(range(len(history)), key=validation.__getitem__)
    figure = new_figure(6, 4)
    axes = figure.add_subplot(
        title="CNN-LSTM captioner", xlabel="epoch", ylabel="cross-entropy (nats a token)"
    )
    axes.plot(epochs, [epoch["train_loss"] for epoch in history], "o-", label="training")
    axes.plot(epochs, validation, "o-", label="validation")
    axes.plot(epochs[best], validation[best], "k*", ms=12, label=f"best: {validation[best]:.3f}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
