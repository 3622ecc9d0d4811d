"""Beam search: follow the likeliest captions of each image side by side.

Source: `GenerationMixin._beam_search` of Transformers 4.57, and the captions are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from capexport.decoding import (
    NOTHING_LEFT,
    Decoder,
    DecodingOptions,
    Features,
    Hypothesis,
    Likeliest,
    Prompts,
    State,
    TokenArray,
    adjust,
    begin,
    excluded,
)
from capexport.errors import OptionError
from capexport.preprocessing import FloatArray


def beam_search(
    decoder: Decoder,
    features: Features,
    options: DecodingOptions,
    prompts: Prompts | None = None,
) -> list[list[Hypothesis]]:
    """The `num_return_sequences` best captions of each image, the best first; fewer where the
    options allow no more.

    Log-probabilities are those that `generate()` adds up: options that forbid a token, or make it
    less likely, do not change those of the other tokens.

    Raises:
        OptionError: the options leave an image no caption.
        ArithmeticError: the decoder's logits are no numbers.
    """
    logits, state = decoder.start(features, prompts)
    said, limits = begin(logits, options, prompts)
    searches = [_Search(options, limit) for limit in limits.tolist()]
    running, width = searches, 1  # images whose search goes on, and the beams of each
    sums = np.zeros(len(logits), np.float32)
    found = _likeliest(logits, said, options, 1)
    for length in range(1, options.max_tokens + 1):
        each = _candidates(found, sums, len(running), options)
        kept = [
            (number, search.advance(candidates, length))
            for number, (search, candidates) in enumerate(zip(running, each, strict=True))
        ]
        kept = [(number, beams) for number, beams in kept if beams]
        if not kept:
            break
        images = [number for number, _ in kept]
        rows = [n * width + beam.parent for n, beams in kept for beam in beams]
        tokens = np.array([beam.token for _, beams in kept for beam in beams], np.int64)
        sums = np.array([beam.total for _, beams in kept for beam in beams], np.float32)
        left, widened = len(kept) < len(running), len(rows) != len(said)
        state = _select(decoder, state, rows, images if left else None, widened)
        running, width = [running[number] for number in images], len(rows) // len(kept)
        said = np.concatenate([said[rows], tokens[:, None]], axis=1)
        found, state = _step(decoder, tokens, state, said, options, length + 1)
    return [search.best() for search in searches]


class _Beam(NamedTuple):
    """A caption so far: the log-probability of the whole, the beam that it continues, and its last
    token."""

    total: float
    parent: int
    token: int


class _Search:
    """The search of one image."""

    def __init__(self, options: DecodingOptions, limit: int) -> None:
        """`limit`: how many tokens a caption may have."""
        self._options, self._limit = options, limit
        self._captions: list[list[int]] = [[]]  # of each beam
        # At most `num_beams`, the best first, each with its score.
        self._ended: list[tuple[float, Hypothesis]] = []

    def advance(self, candidates: list[_Beam], length: int) -> list[_Beam]:
        """Keep those of the `candidates` (the likeliest first) that end, and return the next beams:
        none once the search is over. `length` counts a candidate's tokens, end token included."""
        options = self._options
        going: list[_Beam] = []
        over: list[_Beam] = []
        for rank, beam in enumerate(candidates):
            end = beam.token in options.end_tokens
            if not end and length < self._limit:
                going.append(beam)
                continue
            over.append(beam._replace(total=-math.inf))
            if rank < options.num_beams and beam.total > -math.inf:
                caption = self._captions[beam.parent]
                self._end(caption if end else [*caption, beam.token], beam.total, length)
        # Every image keeps as many beams: where too few go on, some that are over fill the places.
        going = (going + over)[: options.num_beams]
        if not self._may_improve(going[0].total, length):
            return []
        self._captions = [[*self._captions[beam.parent], beam.token] for beam in going]
        return going

    def _end(self, caption: list[int], total: float, length: int) -> None:
        score = _score(total, length, self._options)
        self._ended.append((score, Hypothesis(caption, total, score)))
        self._ended.sort(key=lambda one: -one[0])  # of equals, the earlier stays before
        del self._ended[self._options.num_beams :]

    def _may_improve(self, total: float, length: int) -> bool:
        """Whether the likeliest beam, of log-probability `total`, may yet become one of the best
        captions, as `early_stopping` judges it."""
        options = self._options
        if length == self._limit or total == -math.inf:
            return False
        if len(self._ended) < options.num_beams:
            return True
        if options.early_stopping is True:
            return False
        any_length = options.early_stopping == "never" and options.length_penalty > 0
        reached = _score(total, self._limit if any_length else length, options)
        return reached > self._ended[-1][0]

    def best(self) -> list[Hypothesis]:
        if not self._ended:
            raise OptionError(NOTHING_LEFT)
        return [one for _, one in self._ended[: self._options.num_return_sequences]]


def _score(total: float, length: int, options: DecodingOptions) -> float:
    """What captions are ranked by, in float32 as in Transformers."""
    return float(np.float32(total) / np.float32(length**options.length_penalty))


def _step(
    decoder: Decoder,
    tokens: TokenArray,
    state: State,
    said: TokenArray,
    options: DecodingOptions,
    length: int,
) -> tuple[Likeliest, State]:
    """The likeliest tokens number `length` of each row, and the state after `tokens`."""
    if options.repetition_penalty == 1 and not options.no_repeat_ngram_size:
        never = excluded(options, length)
        chosen = decoder.likeliest(tokens, state, never, _continuations(options))
        if chosen is not None:
            return chosen
    logits, state = decoder.step(tokens, state)
    return _likeliest(logits, said, options, length), state


def _continuations(options: DecodingOptions) -> int:
    """How many candidates an image needs so that `num_beams` go on, whichever of them end."""
    return (1 + max(1, len(options.end_tokens))) * options.num_beams


def _likeliest(
    logits: FloatArray, said: TokenArray, options: DecodingOptions, length: int
) -> Likeliest:
    """The likeliest continuations of each row, in any order. Overwrites `logits`."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    adjust(logits, said, options, length)
    count = min(_continuations(options), logits.shape[1])
    tokens = np.argpartition(logits, -count, axis=1)[:, -count:]
    return np.take_along_axis(logits, tokens, 1), tokens


def _candidates(
    found: Likeliest, sums: FloatArray, images: int, options: DecodingOptions
) -> Iterator[list[_Beam]]:
    """The likeliest continuations of all beams of each image, the likeliest first; of equals, that
    of the earlier beam, then the lower token. `sums` are the beams' log-probabilities so far,
    float32 (rows,)."""
    logs, tokens = found
    if np.isnan(logs).any():
        raise ArithmeticError("probabilities that are no numbers")
    each, totals = logs.shape[1], (logs + sums[:, None]).reshape(images, -1)
    tokens = tokens.reshape(totals.shape)
    rows = np.arange(totals.size).reshape(totals.shape) // each
    ranked = np.lexsort((tokens, rows, -totals))[:, : _continuations(options)]
    of_images = ranked.tolist(), totals.tolist(), tokens.tolist()
    for places, total, token in zip(*of_images, strict=True):
        yield [_Beam(total[place], place // each, token[place]) for place in places]


def _select(
    decoder: Decoder, state: State, rows: list[int], images: list[int] | None, widened: bool
) -> State:
    """The state of `rows`, without copying what stays the same.

    Args:
        images: the images whose search goes on; None if all do.
        widened: whether each image now has more beams than before.
    """
    aligned = images is None and not widened
    if aligned and rows == list(range(len(rows))):
        return state
    same = decoder.constant if aligned else decoder.shared
    chosen = {name: value for name, value in state.items() if name not in same}
    after = {**state, **decoder.select(chosen, np.array(rows, np.intp))}
    if images is not None:
        shared = {name: value for name, value in state.items() if name in decoder.shared}
        after |= decoder.select(shared, np.array(images, np.intp))
    return after
