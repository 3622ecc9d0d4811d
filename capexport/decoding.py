"""Greedy decoding, the protocols that it runs on, and the options of decoding. Beam search is in
`capexport.beam`.

ONNX and PyTorch both implement `Encoder` and `Decoder`, and share these loops. So a difference
between their captions, or their times, can only come from the graphs.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from capexport.errors import OptionError
from capexport.preprocessing import FloatArray

LONGEST_CAPTION = 2048  # tokens: a model that never ends is stopped
MOST_BEAMS = 1024
NOTHING_LEFT = (
    "the options leave no token to go on with: lower min_tokens or max_tokens, or allow more "
    "(suppress_tokens, no_repeat_ngram_size)"
)
STEEPEST_PENALTY = 10  # LONGEST_CAPTION to this power still fits a float32

TokenArray: TypeAlias = NDArray[np.int64]
# What a decoder carries from step to step: tensors by name, with the batch on axis 0. They are
# arrays, torch tensors, or values that stay on a device; only their decoder looks inside.
State: TypeAlias = Mapping[str, Any]
Features: TypeAlias = Any
# Some tokens of each row: their log-probabilities, float32, and their ids, int64, (batch, count).
Likeliest: TypeAlias = tuple[FloatArray, TokenArray]
Regions: TypeAlias = tuple[int, int]  # rows and columns of the grid that attention looks at
EarlyStopping: TypeAlias = bool | Literal["never"]


class Encoder(Protocol):
    """Runs once for a batch of images."""

    def __call__(self, images: FloatArray) -> Features:
        """Take float32 (batch, 3, height, width); return all that the decoder needs to start."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch, as token ids.

    Attributes:
        tokens: int64 (batch, length), with a place for each of the image's features.
        mask: int64 (batch, length), 0 for padding.
        context: int64 (batch, n), the ids that count as said before the caption begins, for the
            repetition penalty and for sequences that must not come twice.
        room: int64 (batch,), for how many tokens after each prompt the model has positions; None
            if it has no limit.
    """

    tokens: TokenArray
    mask: TokenArray
    context: TokenArray
    room: TokenArray | None = None


class Decoder(Protocol):
    """Runs once for every token.

    Attributes:
        constant: the names of the values in its state that no step changes.
        shared: those of them that have one row for each image, however many beams it has.
        regions: the grid that a decoder with attention looks at before each token, else None.
    """

    constant: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    regions: Regions | None = None

    def start(self, features: Features, prompts: Prompts | None) -> tuple[FloatArray, State]:
        """Logits of the first token, float32 (batch, vocabulary), and the state after them.

        The caller may overwrite the logits.
        """

    def step(self, tokens: TokenArray, state: State) -> tuple[FloatArray, State]:
        """Feed one token for each row, int64 (batch,); return the next logits and state.

        An image may have several rows, one after the other, and all images have equally many.
        """

    def likeliest(
        self, tokens: TokenArray, state: State, excluded: Sequence[int], count: int
    ) -> tuple[Likeliest, State] | None:
        """As `step`, but instead of logits return the `count` likeliest tokens of each row (or as
        many as there are, in any order). `excluded` tokens have minus infinity. None if the decoder
        has no faster way than `step`."""
        return None

    def select(self, state: State, rows: NDArray[np.intp]) -> State:
        """The state of these `rows`, in this order: to drop finished rows, and to reorder beams.

        `state` may hold only some of a state's values, and `rows` may name a row several times.
        """

    def attention(self, features: Features, captions: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Where it looked before each token of `captions`, which has one for each image: the
        weights of the regions, which sum to 1, float32 (tokens, rows, columns)."""
        raise OptionError("this decoder looks at no regions of an image")

    def greedy(self, features: Features, options: DecodingOptions) -> list[Hypothesis] | None:
        """Whole captions in one call, if the decoder holds the loop; None if it must step."""
        return None


class Text(Protocol):
    """Prompts to token ids, and token ids to captions; `len` is the number of ids."""

    def __len__(self) -> int: ...

    def frame(self, prompts: Sequence[str] | None, batch: int, needed: int) -> Prompts | None:
        """Make ready for the decoder a prompt for each image of a batch, or for none.

        Each prompt must leave room for at least `needed` tokens.

        Raises:
            OptionError: a prompt doesn't suit the model.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special ones left out."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DecodingOptions:
    """How captions are decoded; the artifact's manifest holds the defaults.

    All options mean what they mean in Transformers' `generate()`.

    Attributes:
        end_tokens: a caption ends with one of these.
        max_tokens: the longest caption, end token not counted (`max_new_tokens` there).
        min_tokens: before this many tokens, no end token is chosen.
        repetition_penalty: above 1, tokens that were said before become less likely (Keskar et al.
            2019, section 4.1).
        suppress_tokens: never chosen: padding, start and unknown words, which no reader should see.
        num_beams: how many captions are followed at once; 1 is greedy decoding.
        length_penalty: beams are ranked by log-probability divided by the length (end token
            counted) to this power: above 0, long captions gain.
        early_stopping: when a search with beams ends. True: at `num_beams` finished captions.
            False: when no caption of the present length is likely to be better. "never": when no
            caption of any length can be better.
        num_return_sequences: how many of the best captions are returned.
        no_repeat_ngram_size: no sequence of so many tokens comes twice; 0 allows all.
    Raises:
        OptionError: a value is of another type, or out of range.
    """

    end_tokens: tuple[int, ...]
    max_tokens: int = _option(30, "longest caption, in tokens")
    min_tokens: int = _option(0, "shortest caption, in tokens")
    repetition_penalty: float = _option(1.0, "above 1: tokens that came before become less likely")
    suppress_tokens: tuple[int, ...] = ()
    num_beams: int = _option(1, "how many captions are followed at once; 1 is greedy decoding")
    length_penalty: float = _option(1.0, "with beams: above 0 favours long captions, below 0 short")
    early_stopping: EarlyStopping = _option(
        False,
        "with beams, when to stop: true: at num_beams captions; never: when none can be better",
    )
    num_return_sequences: int = _option(
        1, "with beams: how many of an image's captions are returned"
    )
    no_repeat_ngram_size: int = _option(0, "no sequence of so many tokens comes twice; 0: any may")

    def __post_init__(self) -> None:
        self._check_beams()
        for name in ("max_tokens", "min_tokens", "no_repeat_ngram_size"):
            _require(name, getattr(self, name), numbers.Integral, "a whole number")
        _require("repetition_penalty", self.repetition_penalty, numbers.Real, "a number")
        for name in ("end_tokens", "suppress_tokens"):
            tokens = getattr(self, name)
            _require(name, tokens, tuple, "a tuple of token ids")
            for token in tokens:
                _require(name, token, numbers.Integral, "a tuple of token ids")
                if token < 0:
                    raise OptionError(f"{name} must be at least 0, got {token}")
        if not 1 <= self.max_tokens <= LONGEST_CAPTION:
            raise OptionError(
                f"max_tokens must be at least 1, at most {LONGEST_CAPTION}, got {self.max_tokens}"
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise OptionError(
                f"min_tokens must lie in 0..max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        if not 0 < self.repetition_penalty < math.inf:
            raise OptionError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.no_repeat_ngram_size < 0:
            raise OptionError(
                f"no_repeat_ngram_size must be at least 0, got {self.no_repeat_ngram_size}"
            )

    def _check_beams(self) -> None:
        beams, returned = self.num_beams, self.num_return_sequences
        for name in ("num_beams", "num_return_sequences"):
            _require(name, getattr(self, name), numbers.Integral, "a whole number")
        _require("length_penalty", self.length_penalty, numbers.Real, "a number")
        if not 1 <= beams <= MOST_BEAMS:
            raise OptionError(f"num_beams must be at least 1, at most {MOST_BEAMS}, got {beams}")
        if not 1 <= returned <= beams:
            raise OptionError(
                f"num_return_sequences must be at least 1, at most num_beams ({beams}), "
                f"got {returned}"
            )
        if not abs(self.length_penalty) <= STEEPEST_PENALTY:
            raise OptionError(
                f"length_penalty must lie in -{STEEPEST_PENALTY}..{STEEPEST_PENALTY}, "
                f"got {self.length_penalty}"
            )
        if self.early_stopping != "never":
            _require("early_stopping", self.early_stopping, bool, 'True, False or "never"')


class DecodingKeywords(TypedDict, total=False):
    """The fields of `DecodingOptions` as keyword arguments; None stands for the default."""

    end_tokens: tuple[int, ...] | None
    max_tokens: int | None
    min_tokens: int | None
    repetition_penalty: float | None
    suppress_tokens: tuple[int, ...] | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: EarlyStopping | None
    num_return_sequences: int | None
    no_repeat_ngram_size: int | None


_Options = TypeVar("_Options", bound=DecodingOptions)


def changed(options: _Options, given: DecodingKeywords) -> _Options:
    """`options` with what is given in place of their own."""
    values = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(options, **values) if values else options  # type: ignore[arg-type]


def _require(name: str, value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise OptionError(f"{name} must be {what}, got {value!r}")


@dataclass
class Hypothesis:
    """A decoded caption: its token ids without the end token, the natural logarithm of its
    probability (including that of the end token, if it was reached), and from a beam search the
    score that it was ranked by."""

    tokens: list[int]
    log_probability: float = 0.0
    score: float | None = None


def greedy(
    decoder: Decoder,
    features: Features,
    options: DecodingOptions,
    prompts: Prompts | None = None,
) -> list[Hypothesis]:
    """Take the likeliest token at every step; in one call, if the decoder can."""
    whole = decoder.greedy(features, options)
    return greedy_by_steps(decoder, features, options, prompts) if whole is None else whole


def greedy_by_steps(
    decoder: Decoder,
    features: Features,
    options: DecodingOptions,
    prompts: Prompts | None = None,
) -> list[Hypothesis]:
    """`greedy`, one step of the decoder at a time; rows that have ended leave the batch."""
    logits, state = decoder.start(features, prompts)
    said, limits = begin(logits, options, prompts)
    hypotheses = [Hypothesis([]) for _ in range(len(logits))]
    running: Sequence[Hypothesis] = hypotheses
    for length in range(1, options.max_tokens + 1):  # every running row has the same length
        adjust(logits, said, options, length)
        tokens, log_probabilities = _likeliest(logits)
        ended = np.isin(tokens, options.end_tokens)
        for hypothesis, token, log_probability, end in zip(
            running, tokens.tolist(), log_probabilities.tolist(), ended.tolist(), strict=True
        ):
            hypothesis.log_probability += log_probability
            if not end:
                hypothesis.tokens.append(token)
        rows = np.flatnonzero(~ended & (length < limits))
        if len(rows) == 0:
            break
        if len(rows) < len(running):
            state = decoder.select(state, rows)
            tokens, said, limits = tokens[rows], said[rows], limits[rows]
            running = [running[row] for row in rows.tolist()]
        said = np.concatenate([said, tokens[:, None]], axis=1)
        logits, state = decoder.step(tokens, state)
    return hypotheses


def begin(
    logits: FloatArray, options: DecodingOptions, prompts: Prompts | None
) -> tuple[TokenArray, TokenArray]:
    """The tokens that count as said in each row before its caption begins, int64 (batch, n), and
    how many tokens each row may have, int64 (batch,).

    Raises:
        OptionError: the options name tokens that have no logits.
    """
    batch, vocabulary = logits.shape
    largest = max((*options.end_tokens, *options.suppress_tokens), default=0)
    if largest >= vocabulary:
        raise OptionError(f"token {largest} lies outside the vocabulary of {vocabulary}")
    limits = np.full(batch, options.max_tokens)
    if prompts is None:
        return np.zeros((batch, 0), np.int64), limits
    return prompts.context, limits if prompts.room is None else np.minimum(limits, prompts.room)


def adjust(logits: FloatArray, said: TokenArray, options: DecodingOptions, length: int) -> None:
    """Change the logits (or log-probabilities) of token number `length` as the options say: tokens
    that must not follow get minus infinity."""
    if options.repetition_penalty != 1:
        scores = np.take_along_axis(logits, said, 1)
        penalty = np.float32(options.repetition_penalty)
        penalised = np.where(scores < 0, scores * penalty, scores / penalty)
        np.put_along_axis(logits, said, penalised, 1)
    if 0 < options.no_repeat_ngram_size <= said.shape[1]:
        grams = sliding_window_view(said, options.no_repeat_ngram_size, axis=1)
        last = said[:, None, said.shape[1] + 1 - options.no_repeat_ngram_size :]
        rows, places = np.nonzero((grams[:, :, :-1] == last).all(axis=2))
        logits[rows, grams[rows, places, -1]] = -np.inf
    if never := excluded(options, length):
        logits[:, never] = -np.inf


def excluded(options: DecodingOptions, length: int) -> tuple[int, ...]:
    """The tokens that no caption may have as its token number `length`."""
    early = length <= options.min_tokens
    return options.suppress_tokens + (options.end_tokens if early else ())


def _likeliest(logits: FloatArray) -> tuple[TokenArray, FloatArray]:
    """The likeliest token of each row (the first of equals) and its log-probability."""
    tokens: TokenArray = logits.argmax(axis=1)
    best = logits[np.arange(len(logits)), tokens]
    if np.isneginf(best).any():
        raise OptionError(NOTHING_LEFT)
    log_sum = np.log(np.exp(logits - best[:, None]).sum(axis=1))
    return tokens, -log_sum
