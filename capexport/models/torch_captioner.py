"""The PyTorch captioner: the same `Captioner` over torch modules, the yardstick of every export.

Written as one would to run PyTorch fast: inference mode, a choice of memory format and of LSTM
call (`capbench` takes the fastest), finished rows leave the batch, and nothing is copied to the
host but the logits that choosing the next token needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from capexport.captioner import Captioner
from capexport.decoding import Decoder, DecodingOptions, TokenArray
from capexport.errors import DeviceError
from capexport.models.checkpoint import Checkpoint
from capexport.models.cnn_lstm import CnnLstm, LstmState
from capexport.preprocessing import FloatArray
from capexport.vocabulary import Vocabulary

MAX_TOKENS = 30  # Flickr8k's longest captions but for one in a thousand


class TorchEncoder:
    """Images to the decoder's state after the image."""

    def __init__(self, model: CnnLstm, device: str, channels_last: bool) -> None:
        self._model = model
        self._device = device
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        model.encoder.to(memory_format=self._format)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, images: FloatArray) -> LstmState:
        return self._model.start(
            torch.from_numpy(images).to(self._device, memory_format=self._format)
        )


class TorchDecoder(Decoder):
    """One step of the LSTM at a time."""

    def __init__(self, model: CnnLstm, device: str) -> None:
        self._model = model
        self._device = device

    def start(self, features: LstmState, prompts: object = None) -> tuple[FloatArray, LstmState]:
        batch = len(features[0])
        return self.step(np.full(batch, Vocabulary.START, np.int64), features)

    @torch.inference_mode()
    def step(self, tokens: TokenArray, state: LstmState) -> tuple[FloatArray, LstmState]:
        logits, state = self._model.decoder.step(torch.from_numpy(tokens).to(self._device), state)
        return logits.cpu().numpy(), state

    @torch.inference_mode()
    def select(self, state: LstmState, rows: NDArray[np.intp]) -> LstmState:
        index = torch.from_numpy(rows).to(self._device)
        hidden, cell = state
        return hidden[index], cell[index]


def torch_captioner(
    checkpoint: Checkpoint,
    device: str = "cpu",
    *,
    channels_last: bool = True,
    step_by_module: bool = False,
    compiled: bool = False,
    threads: int | None = None,
) -> Captioner:
    """A captioner that runs the checkpoint's own modules.

    `channels_last` is the encoder's memory format, `step_by_module` as in `CaptionDecoder`,
    `compiled` runs encoder and step through `torch.compile`, and `threads` are those of
    preprocessing (`torch.set_num_threads` sets PyTorch's own); they change the speed alone.

    Raises:
        DeviceError: PyTorch has no such device.
    """
    require_torch_device(device)
    model = checkpoint.model.to(device).eval()
    model.decoder.step_by_module = step_by_module
    if compiled:
        model.start = torch.compile(model.start)  # type: ignore[method-assign]
        model.decoder.step = torch.compile(  # type: ignore[method-assign]
            model.decoder.step, dynamic=True
        )
    return Captioner(
        TorchEncoder(model, device, channels_last),
        TorchDecoder(model, device),
        checkpoint.vocabulary,
        checkpoint.image,
        DecodingOptions(**decoding_defaults()),
        threads,
    )


def require_torch_device(device: str) -> None:
    """Raise `DeviceError` where PyTorch cannot compute on `device`."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"PyTorch cannot use the device {device!r}: {reason}") from error


def decoding_defaults() -> dict[str, Any]:
    """The `DecodingOptions` of a CNN-LSTM, as its manifest will hold them."""
    return {
        "end_tokens": (Vocabulary.END,),
        "max_tokens": MAX_TOKENS,
        "suppress_tokens": (Vocabulary.PAD, Vocabulary.START, Vocabulary.UNKNOWN),
    }
