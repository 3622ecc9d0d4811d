"""What a CNN-LSTM's decoders have in common: their state, and what they predict in training."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

# By name: hidden and cell, float32 (batch, hidden_size) each, and what else a decoder carries.
State: TypeAlias = dict[str, Tensor]


class Predicted(NamedTuple):
    """The predictions of all captions of a batch, one after another, without those of padding.

    Attributes:
        logits: float32 (tokens, vocabulary).
        targets: int64 (tokens,), the words that were to be predicted.
        rows: int64 (tokens,), the captions that they belong to.
        attention: where each step looked, float32 (rows, steps, regions), padding too.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor
    attention: Tensor | None = None


def predicted(
    logits: Tensor, targets: Tensor, lengths: Tensor, attention: Tensor | None = None
) -> Predicted:
    """`logits` are packed already, in the order of `pack_padded_sequence`.

    Args:
        targets: int64 (rows, steps), padded.
        lengths: int64 (rows,) on the CPU, the steps of each row that count.
    """
    rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
    both = torch.stack([targets, rows], dim=2)
    packed = pack_padded_sequence(both, lengths, batch_first=True, enforce_sorted=False)
    targets, rows = packed.data.unbind(1)
    return Predicted(logits, targets, rows, attention)
