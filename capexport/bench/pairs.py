"""What is measured: a checkpoint, run by PyTorch at its best, and how it becomes an artifact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from capexport.bench import measure
from capexport.bench.measure import AnyCaptioner, Photo
from capexport.bench.openvino import openvino_captioner
from capexport.captioner import Captioner, is_hub_id
from capexport.errors import DeviceError, MissingExtraError

# Opens the variants of which the fastest counts.
Opener: TypeAlias = Callable[[], Mapping[str, AnyCaptioner]]


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

    def plain(self) -> AnyCaptioner:
        """The PyTorch captioner with its defaults."""

    def fastest(self, photos: Sequence[Photo], batch_size: int) -> tuple[str, AnyCaptioner]:
        """The quickest of its variants for batches of this size, and what that one is."""

    def peers(self, artifacts: Mapping[str, Path]) -> Mapping[str, Opener]:
        """Other ways to run it, or its exports (by precision)."""


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
    try:
        import torch

        torch.set_num_threads(threads)
        return Blip2(checkpoint, device) if is_blip2 else CnnLstm(checkpoint, device, threads)
    except ImportError as error:
        extras = "cpu,export,blip2" if is_blip2 else "cpu,export"
        raise MissingExtraError(
            f"the PyTorch path needs `pip install 'capexport[{extras}]'` ({error})"
        ) from error


class CnnLstm:
    """Its variants: memory formats of the encoder, and calls of the LSTM."""

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

    def plain(self) -> AnyCaptioner:
        return self._variant("channels_last", "nn.LSTMCell")

    def _variant(self, encoder: str, decoder: str, compiled: bool = False) -> Captioner:
        from capexport.models.torch_captioner import torch_captioner

        own = copy.copy(self._checkpoint)
        own.model = copy.deepcopy(self._checkpoint.model)
        return torch_captioner(
            own,
            self._device,
            channels_last=encoder == "channels_last",
            step_by_module=decoder == "nn.LSTM",
            compiled=compiled,
            threads=self._threads,
        )

    def peers(self, artifacts: Mapping[str, Path]) -> Mapping[str, Opener]:
        def usual() -> Mapping[str, AnyCaptioner]:
            return {"contiguous, nn.LSTM": self._variant("contiguous", "nn.LSTM")}

        def compiled() -> Mapping[str, AnyCaptioner]:
            return {
                f"{encoder}, nn.LSTMCell": self._variant(encoder, "nn.LSTMCell", compiled=True)
                for encoder in ("contiguous", "channels_last")
            }

        def openvino(folder: Path) -> Mapping[str, AnyCaptioner]:
            return {
                graph: openvino_captioner(folder, self._device, self._threads, loop=graph == "loop")
                for graph in ("loop", "steps")
            }

        openers = {"PyTorch as usual": usual, "torch.compile": compiled}
        for precision, folder in artifacts.items():
            openers[f"OpenVINO {precision}"] = partial(openvino, folder)
        return openers

    def fastest(self, photos: Sequence[Photo], batch_size: int) -> tuple[str, AnyCaptioner]:
        encoders, decoders = ("contiguous", "channels_last"), ("nn.LSTMCell", "nn.LSTM")
        variants = {}
        for encoder, decoder in zip(encoders, decoders, strict=True):
            variants[encoder] = variants[decoder] = self._variant(encoder, decoder)
        encoder = measure.fastest({k: variants[k] for k in encoders}, photos, batch_size, "encode")
        decoder = measure.fastest({k: variants[k] for k in decoders}, photos, batch_size, "decode")
        best = copy.copy(variants[encoder])
        best.decoder = variants[decoder].decoder
        return f"{encoder}, {decoder}", best


class Blip2:
    """`generate()` of Transformers has no variants."""

    def __init__(self, checkpoint: str, device: str) -> None:
        from capexport.models.blip2_checkpoint import Weights, find_checkpoint

        self.folder, source = find_checkpoint(checkpoint)
        self._device = device
        self.sha256 = Weights(self.folder, self.folder).sha256()
        self.title = f"blip2 {source['source']}"

    def export(self, out: Path) -> None:
        from capexport.export.blip2 import export_blip2

        export_blip2(self.folder, out)

    def plain(self) -> AnyCaptioner:
        from capexport.models.blip2 import HuggingFaceCaptioner

        return HuggingFaceCaptioner.load(self.folder, self._device)

    def fastest(self, photos: Sequence[Photo], batch_size: int) -> tuple[str, AnyCaptioner]:
        return "generate()", self.plain()

    def peers(self, artifacts: Mapping[str, Path]) -> Mapping[str, Opener]:
        def not_wired() -> Mapping[str, AnyCaptioner]:
            raise NotImplementedError("its key/value cache is bound to onnxruntime's own values")

        def half() -> Mapping[str, AnyCaptioner]:
            if self._device != "cuda":
                raise DeviceError("a CPU computes float16 no faster than float32")
            from torch import float16

            from capexport.models.blip2 import HuggingFaceCaptioner

            return {"generate()": HuggingFaceCaptioner.load(self.folder, self._device, float16)}

        peers: dict[str, Opener] = {"PyTorch fp16": half}
        return {**peers, **{f"OpenVINO {precision}": not_wired for precision in artifacts}}
