"""The loop that every captioner shares, and the two protocols that it runs on.

ONNX and PyTorch both implement `Encoder` and `Decoder`; a difference between their captions, or
their times, can therefore only come from the graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from capexport.preprocessing import FloatArray

TokenArray: TypeAlias = NDArray[np.int64]
# What a decoder carries from step to step. Its owner alone looks inside: arrays, tensors, or
# values that stay on the device; batch is axis 0 of each.
State: TypeAlias = Any
Features: TypeAlias = Any


class Encoder(Protocol):
    """Runs once for a batch of images."""

    def __call__(self, images: FloatArray) -> Features:
        """Take float32 (batch, 3, height, width); return all that the decoder needs to start."""


class Decoder(Protocol):
    """Runs once for every token."""

    def start(self, features: Features) -> tuple[FloatArray, State]:
        """Logits of the first word, float32 (batch, vocabulary), and the state behind them.

        The logits are the caller's to overwrite.
        """

    def step(self, tokens: TokenArray, state: State) -> tuple[FloatArray, State]:
        """Feed one token a row, int64 (batch,); return the next logits and the next state."""

    def select(self, state: State, rows: NDArray[np.intp]) -> State:
        """The state of `rows` alone, in that order: finished rows leave, beams are reordered."""


@dataclass(frozen=True)
class DecodingOptions:
    """How captions are decoded; the artifact's manifest holds the defaults.

    `max_tokens` bounds a caption, the end token not counted; `suppress_tokens` are never chosen
    (padding, start and unknown words: nothing that a reader should see).
    """

    end_token: int
    max_tokens: int = 30
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass
class Hypothesis:
    """A decoded caption: its token ids without the end token, and the natural logarithm of its
    probability, the end token's included where it was reached."""

    tokens: list[int]
    log_probability: float = 0.0


def greedy(decoder: Decoder, features: Features, options: DecodingOptions) -> list[Hypothesis]:
    """Take the likeliest token at every step; rows that have ended leave the batch."""
    logits, state = decoder.start(features)
    hypotheses = [Hypothesis([]) for _ in range(len(logits))]
    running: Sequence[Hypothesis] = hypotheses
    while True:
        tokens, log_probabilities = _likeliest(logits, options.suppress_tokens)
        for hypothesis, token, log_probability in zip(
            running, tokens.tolist(), log_probabilities.tolist(), strict=True
        ):
            hypothesis.log_probability += log_probability
            if token != options.end_token:
                hypothesis.tokens.append(token)
        rows = np.flatnonzero(tokens != options.end_token)
        # Every running row has the same length, so they meet the bound together.
        if len(rows) == 0 or len(running[int(rows[0])].tokens) == options.max_tokens:
            return hypotheses
        if len(rows) < len(running):
            state = decoder.select(state, rows)
            tokens = tokens[rows]
            running = [running[row] for row in rows.tolist()]
        logits, state = decoder.step(tokens, state)


def _likeliest(logits: FloatArray, suppressed: Sequence[int]) -> tuple[TokenArray, FloatArray]:
    """The best token of each row, the first of equals, and its log-probability."""
    if suppressed:
        logits[:, list(suppressed)] = -np.inf
    tokens: TokenArray = logits.argmax(axis=1)
    best = logits[np.arange(len(logits)), tokens]
    log_sum = np.log(np.exp(logits - best[:, None]).sum(axis=1))
    return tokens, -log_sum
