"""How every export is written: as a draft, compared with its model, and then once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from capexport.artifact import Manifest, record_files
from capexport.atomic import new_folder
from capexport.captioner import Captioner, open_artifact
from capexport.export.card import FILE_NAME as CARD
from capexport.export.card import model_card
from capexport.sessions import CPU, Target


class Draft:
    """An artifact in the making.

    Attributes:
        folder: where its files are being written.
        manifest: what it says of itself so far; its files are recorded by `captioner`.
    """

    manifest: Manifest

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def captioner(self, target: Target = CPU) -> Captioner:
        """Record the files that are here now, and open them."""
        self.manifest = dataclasses.replace(self.manifest, files=record_files(self.folder))
        return open_artifact(self.folder, self.manifest, target)


@contextmanager
def draft_artifact(out: Path) -> Iterator[Draft]:
    """A draft that becomes the artifact `out` at the end of the block, which compares it with its
    model.

    Raises:
        OutputExistsError: `out` is there already.
    """
    with new_folder(out) as folder, torch.no_grad():
        draft = Draft(folder)
        yield draft
        assert draft.manifest.parity is not None, "nothing is written that was not compared"
        card = model_card(draft.manifest, out.resolve().name)
        (folder / CARD).write_text(card, encoding="utf-8")
        draft.manifest.write(folder)
