"""A checkpoint as PyTorch runs it, and how it becomes an artifact: what `capbench` compares."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from capexport.artifact import is_hub_id
from capexport.captioner import Caption, Captioner
from capexport.decoding import DecodingKeywords
from capexport.errors import importing
from capexport.preprocessing import ImageSource

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Decoded: uint8 (height, width, 3).
Photo: TypeAlias = NDArray[np.uint8]


class AnyCaptioner(Protocol):
    """`Captioner` or `HuggingFaceCaptioner`."""

    def caption(
        self, images: Sequence[ImageSource], *, batch_size: int, **options: Unpack[DecodingKeywords]
    ) -> list[Caption]: ...


# Ways to run the same model, by name; the fastest of them counts.
Variants: TypeAlias = Mapping[str, AnyCaptioner]


class Pair(Protocol):
    """A model's PyTorch side.

    Attributes:
        title: the model's name in a report.
        folder: where its checkpoint is.
        sha256: of its weights, as the provenance of its artifact says.
    """

    title: str
    folder: Path
    sha256: Any

    def export(self, out: Path) -> None:
        """Make its artifact."""

    def variants(self) -> Variants:
        """The model in PyTorch, the plainest first."""

    def compiled(self) -> Variants:
        """More of them, through `torch.compile`: it takes minutes, and needs a compiler."""

    def peers(self) -> Mapping[str, Callable[[], Variants]]:
        """Other ways to run it, by name, as functions that open them: not every machine can."""


def open_pair(checkpoint: str, device: str, threads: int) -> Pair:
    """Load a checkpoint: of `python -m train`, or of a BLIP-2 (a folder, or an id of the hub).

    Raises:
        MissingExtraError: PyTorch, or for BLIP-2 Transformers, is not installed.
        CheckpointError, DownloadError: there is no such checkpoint.
    """
    folder = Path(checkpoint)
    is_blip2 = is_hub_id(checkpoint)
    if folder.is_dir():
        # A run folder of `python -m train` has a config.json too, beside its best checkpoint.
        is_blip2 = (folder / "config.json").exists() and not (folder / "best").exists()
    extras = "cpu,export,blip2" if is_blip2 else "cpu,export"
    with importing(f"the PyTorch path needs `pip install 'capexport[{extras}]'`"):
        import torch

        import_module(f"capexport.export.{'blip2' if is_blip2 else 'cnn_lstm'}")
    torch.set_num_threads(threads)
    return _Blip2(checkpoint, device) if is_blip2 else _CnnLstm(checkpoint, device, threads)


_FORMATS = ("channels_last", "contiguous")


class _CnnLstm:
    """Its variants are memory formats and forms of the encoder, and calls of the LSTM."""

    def __init__(self, checkpoint: str, device: str, threads: int) -> None:
        from capexport.models.checkpoint import find_checkpoint, load_checkpoint

        self.folder = find_checkpoint(Path(checkpoint)).parent
        self._checkpoint = load_checkpoint(self.folder)
        self._device, self._threads = device, threads
        self.sha256 = self._checkpoint.sha256
        self.title = f"cnn-lstm {self.sha256[:12]}"

    def export(self, out: Path) -> None:
        from capexport.export.cnn_lstm import export_cnn_lstm

        export_cnn_lstm(self._checkpoint, out)

    def variants(self) -> Mapping[str, Captioner]:
        kinds = [*itertools.product(_FORMATS, ("plain", "folded")), ("contiguous", "frozen")]
        steps = [(*kind, "nn.LSTMCell") for kind in kinds]
        if not self._checkpoint.model.decoder.attends:
            steps += [(*kind, "nn.LSTM") for kind in (kinds[0], kinds[-1])]
        return {", ".join(kind): self._variant(*kind) for kind in steps}

    def _variant(self, layout: str, form: Any, step: str, compiled: bool = False) -> Captioner:
        from capexport.models.torch_captioner import torch_captioner

        return torch_captioner(
            self._checkpoint,
            self._device,
            channels_last=layout == "channels_last",
            encoder=form,
            step_by_module=step == "nn.LSTM",
            compiled=compiled,
            threads=self._threads,
        )

    def compiled(self) -> Mapping[str, Captioner]:
        return {
            f"{layout}, folded, compiled": self._variant(layout, "folded", "nn.LSTMCell", True)
            for layout in _FORMATS
        }

    def peers(self) -> Mapping[str, Callable[[], Variants]]:
        def usual() -> Variants:
            kind = ("contiguous", "plain", "nn.LSTM")
            return {", ".join(kind): self._variant(*kind)}

        return {"PyTorch as usual": usual}


class _Blip2:
    """`generate()` of Transformers in float32; its peers are `generate()` in 16 bits."""

    def __init__(self, checkpoint: str, device: str) -> None:
        from capexport.models.blip2_checkpoint import Weights, find_checkpoint

        self.folder, source = find_checkpoint(checkpoint)
        self._device = device
        self.sha256 = Weights(self.folder, self.folder).sha256()
        self.title = f"blip2 {source['source']}"

    def export(self, out: Path) -> None:
        from capexport.export.blip2 import export_blip2

        export_blip2(self.folder, out)

    def _loaded(self, dtype: str = "float32", compiled: bool = False) -> Variants:
        import torch

        from capexport.models.blip2 import HuggingFaceCaptioner

        found = HuggingFaceCaptioner.load(self.folder, self._device, getattr(torch, dtype))
        if compiled:
            found.compile()
        return {"generate(), compiled" if compiled else "generate()": found}

    def variants(self) -> Variants:
        return self._loaded()

    def compiled(self) -> Variants:
        return self._loaded(compiled=True)

    def peers(self) -> Mapping[str, Callable[[], Variants]]:
        """In 16 bits: on a GPU float16, on a CPU bfloat16, since that computes float16 slowly."""
        dtype, name = ("float16", "fp16") if self._device != "cpu" else ("bfloat16", "bf16")
        return {
            f"PyTorch {name}": partial(self._loaded, dtype),
            f"PyTorch {name}, compiled": partial(self._loaded, dtype, True),
        }
