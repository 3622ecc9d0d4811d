"""Beam search, as `generate(num_beams=...)` of Transformers searches: of each image the likeliest
captions so far, side by side.

Source: `GenerationMixin._beam_search` of Transformers 4.57, whose captions these are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from capexport.decoding import (
    NOTHING_LEFT,
    Decoder,
    DecodingOptions,
    Features,
    Hypothesis,
    Prompts,
    State,
    TokenArray,
    adjust,
    begin,
)
from capexport.errors import OptionError
from capexport.preprocessing import FloatArray


def beam_search(
    decoder: Decoder,
    features: Features,
    options: DecodingOptions,
    prompts: Prompts | None = None,
) -> list[list[Hypothesis]]:
    """Of each image the `num_return_sequences` best captions, the best first; fewer where the
    options allow no more.

    Log-probabilities are what `generate()` adds up: where the options forbid tokens or make them
    less likely, those of the others are as before.

    Raises:
        OptionError: the options leave an image no caption.
        ArithmeticError: the decoder's logits are no numbers.
    """
    logits, state = decoder.start(features, prompts)
    said, limits = begin(logits, options, prompts)
    context = said.shape[1]
    ended = [_Ended(options) for _ in range(len(logits))]
    images = np.arange(len(logits))  # those whose beams go on
    sums = np.zeros((len(logits), 1), np.float32)  # log-probability of each beam, the best first
    for length in range(1, options.max_tokens + 1):
        width = sums.shape[1]
        log_probabilities = _log_softmax(logits)
        adjust(log_probabilities, said, options, length)
        rows, tokens, sums = _continuations(log_probabilities, sums, options)
        ends = np.isin(tokens, options.end_tokens)
        stops = ends | (limits == length)[:, None]
        for at, rank in np.argwhere(stops[:, : options.num_beams]).tolist():
            last = [] if ends[at, rank] else [int(tokens[at, rank])]
            words = said[rows[at, rank], context:].tolist() + last
            ended[images[at]].add(words, sums[at, rank], length)
        kept = np.argsort(stops, axis=1, kind="stable")[:, : options.num_beams]
        sums[stops] = -np.inf  # where few are left, some that stop are among those kept
        rows = np.take_along_axis(rows, kept, axis=1)
        tokens = np.take_along_axis(tokens, kept, axis=1)
        sums = np.take_along_axis(sums, kept, axis=1)
        worst = np.array([ended[image].worst for image in images], np.float32)
        going = _may_improve(sums[:, 0], worst, length, limits, options)
        if not going.any():
            break
        aligned = sums.shape[1] == width and bool(going.all())
        images, limits, sums = images[going], limits[going], sums[going]
        rows, tokens = rows[going].ravel(), tokens[going].ravel()
        state = _select(decoder, state, rows, aligned)
        said = np.concatenate([said[rows], tokens[:, None]], axis=1)
        logits, state = decoder.step(tokens, state)
    return [each.best() for each in ended]


class _Ended:
    """The captions of an image that have ended: the `num_beams` best of them, the best first."""

    def __init__(self, options: DecodingOptions) -> None:
        self._options = options
        self._captions: list[Hypothesis] = []

    def add(self, tokens: list[int], log_probability: np.float32, length: int) -> None:
        """`length` counts the end token."""
        if np.isneginf(log_probability):
            return
        score = float(log_probability / _divisor(length, self._options))
        self._captions.append(Hypothesis(tokens, float(log_probability), score))
        self._captions.sort(key=_score, reverse=True)  # of equals, the earlier stays before
        del self._captions[self._options.num_beams :]

    @property
    def worst(self) -> float:
        """The score that another caption must exceed; minus infinity while there is room."""
        full = len(self._captions) == self._options.num_beams
        return _score(self._captions[-1]) if full else -np.inf

    def best(self) -> list[Hypothesis]:
        if not self._captions:
            raise OptionError(NOTHING_LEFT)
        return self._captions[: self._options.num_return_sequences]


def _score(hypothesis: Hypothesis) -> float:
    assert hypothesis.score is not None
    return hypothesis.score


def _divisor(length: TokenArray | int, options: DecodingOptions) -> FloatArray:
    """What log-probabilities of captions of that length are divided by to compare them."""
    return (np.asarray(length, np.float64) ** options.length_penalty).astype(np.float32)


def _log_softmax(logits: FloatArray) -> FloatArray:
    """Of each row, in place."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def _continuations(
    log_probabilities: FloatArray, sums: FloatArray, options: DecodingOptions
) -> tuple[TokenArray, TokenArray, FloatArray]:
    """The likeliest next tokens of an image's beams together, the likeliest first: the rows that
    they continue, the tokens, and the log-probabilities of the whole; each (images, n), and so
    many that `num_beams` go on whichever of them end."""
    (images, beams), vocabulary = sums.shape, log_probabilities.shape[1]
    log_probabilities += sums.reshape(-1, 1)
    together = log_probabilities.reshape(images, -1)
    count = (1 + max(1, len(options.end_tokens))) * options.num_beams
    count = min(count, together.shape[1])
    places = np.argpartition(together, -count, axis=1)[:, -count:]
    places.sort(axis=1)  # of equals, the first comes first
    found = np.take_along_axis(together, places, axis=1)
    order = np.argsort(-found, axis=1, kind="stable")
    places = np.take_along_axis(places, order, axis=1)
    found = np.take_along_axis(found, order, axis=1)
    if np.isnan(found).any():
        raise ArithmeticError("probabilities that are no numbers")
    parents, tokens = np.divmod(places, vocabulary)
    return parents + beams * np.arange(images)[:, None], tokens, found


def _may_improve(
    best: FloatArray, worst: FloatArray, length: int, limits: TokenArray, options: DecodingOptions
) -> NDArray[np.bool_]:
    """Of each image, whether a beam as good as `best` may yet become a caption that is better than
    the `worst` of `num_beams`, as far as `early_stopping` wants to know."""
    any_length = options.early_stopping == "never" and options.length_penalty > 0
    may = best / _divisor(limits if any_length else length, options) > worst
    if options.early_stopping is True:
        may &= np.isneginf(worst)
    return may & (length < limits)


def _select(decoder: Decoder, state: State, rows: NDArray[np.intp], aligned: bool) -> State:
    """The state of `rows`. Where they are `aligned`, each row is one of the same image as before,
    and what an image's rows have in common stays where it is."""
    if not aligned:
        return decoder.select(state, rows)
    if np.array_equal(rows, np.arange(len(rows))):
        return state
    changing = {name: value for name, value in state.items() if name not in decoder.constant}
    return {**state, **decoder.select(changing, rows)}
