"""The PyTorch captioner: the same `Captioner` over torch modules, the yardstick of every export.

It is written to run PyTorch fast: in inference mode, with a choice of memory format, of the
encoder's form and of the LSTM call (`capbench` takes the fastest). Finished rows leave the batch,
and only the logits, which choosing the next token needs, are copied to the host.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from capexport.captioner import Captioner
from capexport.decoding import Decoder, Regions, TokenArray, changed
from capexport.errors import DeviceError
from capexport.families.cnn_lstm import ATTENTION, DECODING, Vocabulary, replay
from capexport.models.checkpoint import Checkpoint
from capexport.models.cnn_lstm import CnnLstm, ImageEncoder
from capexport.models.steps import State
from capexport.preprocessing import FloatArray

Form: TypeAlias = Literal["plain", "folded", "frozen"]


class TorchEncoder:
    """Images to the decoder's state after the image."""

    def __init__(self, model: CnnLstm, device: str, layout: torch.memory_format) -> None:
        self._model = model
        self._device = device
        self._layout = layout

    @torch.inference_mode()
    def __call__(self, images: FloatArray) -> State:
        return self._model.start(
            torch.from_numpy(images).to(self._device, memory_format=self._layout)
        )


class TorchDecoder(Decoder):
    """One step of the model's decoder at a time."""

    def __init__(self, model: CnnLstm, device: str, regions: Regions | None = None) -> None:
        self._model = model
        self._device = device
        self.constant = model.decoder.constant
        self.shared = model.decoder.shared
        self.regions = regions

    def start(
        self, features: Mapping[str, Tensor], prompts: object = None
    ) -> tuple[FloatArray, Mapping[str, Tensor]]:
        batch = len(next(iter(features.values())))
        return self.step(np.full(batch, Vocabulary.START, np.int64), features)

    @torch.inference_mode()
    def step(
        self, tokens: TokenArray, state: Mapping[str, Tensor]
    ) -> tuple[FloatArray, Mapping[str, Tensor]]:
        ids = torch.from_numpy(tokens).to(self._device)
        logits, state = self._model.decoder.step(ids, dict(state))
        return logits.cpu().numpy(), state

    def attend(
        self, tokens: TokenArray, state: Mapping[str, Tensor]
    ) -> tuple[FloatArray, Mapping[str, Tensor]]:
        _, state = self.step(tokens, state)
        return state[ATTENTION].cpu().numpy(), state

    def attention(
        self, features: Mapping[str, Tensor], captions: Sequence[Sequence[int]]
    ) -> list[FloatArray]:
        return replay(self, features, captions)

    @torch.inference_mode()
    def select(self, state: Mapping[str, Tensor], rows: NDArray[np.intp]) -> Mapping[str, Tensor]:
        index = torch.from_numpy(rows).to(self._device)
        return {name: value[index] for name, value in state.items()}


def torch_captioner(
    checkpoint: Checkpoint,
    device: str = "cpu",
    *,
    channels_last: bool = True,
    encoder: Form = "plain",
    step_by_module: bool = False,
    compiled: bool = False,
    threads: int | None = None,
) -> Captioner:
    """A captioner that runs a copy of the checkpoint's modules.

    `channels_last` is the encoder's memory format, `encoder` its form: "folded" has the batch
    norms within the convolutions, "frozen" is that, traced and optimised for inference.
    `step_by_module` is as in `CaptionDecoder`, `compiled` runs encoder and step through
    `torch.compile`, and `threads` are those of preprocessing (`torch.set_num_threads` sets
    PyTorch's own); they change the speed alone.

    Raises:
        DeviceError: PyTorch has no such device.
    """
    require_torch_device(device)
    options = changed(DECODING, checkpoint.decoding).options
    model = copy.deepcopy(checkpoint.model).to(device).eval()
    model.decoder.step_by_module = step_by_module
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.encoder.to(memory_format=layout)  # type: ignore[call-overload]
    if encoder != "plain":
        crop = checkpoint.image.crop
        example = torch.zeros(1, 3, crop, crop, device=device).to(memory_format=layout)
        model.encoder = _optimised(model.encoder, encoder, example)  # type: ignore[assignment]
    if compiled:
        model.start = torch.compile(model.start)  # type: ignore[method-assign]
        model.decoder.step = torch.compile(  # type: ignore[method-assign]
            model.decoder.step, dynamic=True
        )
    return Captioner(
        TorchEncoder(model, device, layout),
        TorchDecoder(model, device, regions_of(checkpoint)),
        checkpoint.vocabulary,
        checkpoint.image,
        options,
        threads=threads,
        device=device,
        title="PyTorch",
    )


@torch.no_grad()
def _optimised(encoder: ImageEncoder, form: Form, example: Tensor) -> nn.Module:
    layers: list[nn.Module] = [encoder.backbone]
    if encoder.pools:
        layers += [encoder.pool, nn.Flatten(1), encoder.linear, encoder.norm]
    folded: nn.Module = fuse(nn.Sequential(*layers).eval())
    if form == "folded":
        return folded
    with warnings.catch_warnings():  # deprecated, but what people run, and on CPUs the fastest
        warnings.simplefilter("ignore", FutureWarning)
        traced = torch.jit.trace(folded, example)
        frozen: nn.Module = torch.jit.optimize_for_inference(traced)
    return frozen


@torch.no_grad()
def regions_of(checkpoint: Checkpoint) -> Regions | None:
    """Rows and columns of the regions that the decoder looks at; None where it looks at none."""
    if not checkpoint.model.decoder.attends:
        return None
    size = checkpoint.image.crop
    parameter = next(checkpoint.model.parameters())
    images = torch.zeros(1, 3, size, size, device=parameter.device)
    rows, columns = checkpoint.model.encoder(images).shape[2:]
    return rows, columns


def require_torch_device(device: str) -> None:
    """Raise `DeviceError` where PyTorch cannot compute on `device`."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"PyTorch cannot use the device {device!r}: {reason}") from error
