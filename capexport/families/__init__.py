"""What is particular to each family of captioners, without torch: one file for each.

The module of a family defines `FAMILY`, and is imported when an artifact of that family is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from capexport.artifact import Manifest
from capexport.decoding import Decoder, Encoder, Text
from capexport.errors import ArtifactError, CapexportError, DeviceError
from capexport.sessions import Target

# What is raised when the parts of an artifact don't fit each other or the manifest.
MISFIT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

log = logging.getLogger("capexport")

_MODULES = {"cnn-lstm": "cnn_lstm", "blip2": "blip2"}


class Parts(NamedTuple):
    """An opened artifact: what a `Captioner` is made of."""

    encoder: Encoder
    decoder: Decoder
    text: Text


@dataclass(frozen=True)
class Family:
    """What the runtime knows of a family.

    Attributes:
        open: opens an artifact's folder on a target.
        batch_size: how many images of a list go through the graphs together by default.
        small: whether each core may take a batch of its own through all stages. The activations
            and caches of a large model's batches would need too much memory.
        image_graph: the file of the graph that images go through.
        step_weights: the file that a decoding step reads from end to end.
        optional: files without which an artifact still works, more slowly.
    """

    open: Callable[[Path, Manifest, Target], Parts]
    batch_size: int
    small: bool
    image_graph: str
    step_weights: str
    optional: tuple[str, ...] = ()

    def open_on_first(
        self, path: Path, manifest: Manifest, candidates: Sequence[Target]
    ) -> tuple[Parts, Target]:
        """Open an artifact on the first target that works.

        Raises:
            DeviceError: none works; it is the last target's.
            ArtifactError: the artifact is incomplete, or its parts do not fit together.
        """
        for target in candidates[:-1]:
            try:
                return self._open_on(path, manifest, target), target
            except DeviceError as error:
                log.info("%s cannot be used: %s", target.name, error)
        return self._open_on(path, manifest, candidates[-1]), candidates[-1]

    def _open_on(self, path: Path, manifest: Manifest, target: Target) -> Parts:
        try:
            return self.open(path, manifest, target)
        except CapexportError:
            raise
        except MISFIT as error:
            raise ArtifactError(f"{path}: incomplete artifact: {error!r}; export again") from error


def find_family(name: str) -> Family:
    """The family of this name.

    Raises:
        ArtifactError: this version knows no such family.
    """
    if name not in _MODULES:
        raise ArtifactError(
            f"unknown model family {name!r}: this capexport knows {', '.join(_MODULES)}; upgrade it"
        )
    family: Family = import_module(f"{__name__}.{_MODULES[name]}").FAMILY
    return family
