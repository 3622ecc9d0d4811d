"""The greedy loop over a decoder whose next words are written down."""

import numpy as np
import pytest

from capexport.decoding import Decoder, DecodingOptions, Prompts, greedy

END = 2


class Scripted(Decoder):
    """Row r says script[r] one token a step; the state is (row, position) pairs."""

    def __init__(self, script: list[list[int]]) -> None:
        self.script = script
        self.batches: list[int] = []

    def logits(self, state: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(state), 10), np.float32)
        for line, (row, position) in zip(logits, state, strict=True):
            line[self.script[row][position]] = 3
        return logits

    def start(self, features: int, prompts=None):
        state = np.stack([np.arange(features), np.zeros(features, int)], axis=1)
        return self.logits(state), state

    def step(self, tokens: np.ndarray, state: np.ndarray):
        said = [self.script[row][position] for row, position in state]
        np.testing.assert_array_equal(tokens, said)
        self.batches.append(len(tokens))
        state = state + np.array([0, 1])
        return self.logits(state), state

    def select(self, state: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return state[rows]


def test_rows_end_one_by_one_and_leave_the_batch():
    decoder = Scripted([[4, 5, END], [END], [6, 7, 8, END], [9, END]])
    hypotheses = greedy(decoder, 4, DecodingOptions((END,)))
    assert [h.tokens for h in hypotheses] == [[4, 5], [], [6, 7, 8], [9]]
    assert decoder.batches == [3, 2, 1]


def test_log_probability_sums_every_token_and_the_end():
    [hypothesis] = greedy(Scripted([[4, 5, END]]), 1, DecodingOptions((END,)))
    each = 3 - np.log(np.exp(3) + 9)
    assert hypothesis.log_probability == pytest.approx(3 * each, rel=1e-6)


def test_max_tokens_bounds_all_rows():
    decoder = Scripted([[4] * 9, [5, END]])
    hypotheses = greedy(decoder, 2, DecodingOptions((END,), max_tokens=3))
    assert [h.tokens for h in hypotheses] == [[4, 4, 4], [5]]
    assert len(decoder.batches) == 2
    with pytest.raises(ValueError, match="max_tokens"):
        DecodingOptions((END,), max_tokens=0)


def test_suppressed_tokens_are_never_chosen_and_have_no_probability():
    decoder = Scripted([[4, END]])
    decoder.logits = lambda state: np.tile(np.arange(10, dtype=np.float32), (len(state), 1))
    [hypothesis] = greedy(decoder, 1, DecodingOptions((7,), suppress_tokens=(8, 9)))
    assert hypothesis.tokens == []
    assert hypothesis.log_probability == pytest.approx(7 - np.log(np.exp(np.arange(8)).sum()))


class Fixed(Scripted):
    """Says nothing of its own: each position has these logits."""

    def __init__(self, *logits: float) -> None:
        super().__init__([[0] * 9])
        self.values = np.array([logits], np.float32)

    def logits(self, state: np.ndarray) -> np.ndarray:
        return self.values.repeat(len(state), 0)

    def step(self, tokens: np.ndarray, state: np.ndarray):
        return self.logits(state), state


def test_no_end_before_min_tokens():
    options = DecodingOptions((0, 1), max_tokens=5, min_tokens=3)
    [hypothesis] = greedy(Fixed(9, 8, 2, 1), 1, options)
    assert hypothesis.tokens == [2, 2, 2]
    free = 2 - np.log(np.exp(2) + np.exp(1))
    end = 9 - np.log(np.exp([9, 8, 2, 1]).sum())
    assert hypothesis.log_probability == pytest.approx(3 * free + end, rel=1e-5)
    for minimum in (-1, 6):
        with pytest.raises(ValueError, match="min_tokens"):
            DecodingOptions((0,), max_tokens=5, min_tokens=minimum)


def test_the_repetition_penalty_counts_prompt_and_caption():
    """Positive logits are divided, negative ones multiplied, once however often a word was said."""
    context = np.array([[2, 2]])
    prompts = Prompts(context, np.ones_like(context), context)
    options = DecodingOptions((9,), max_tokens=4, repetition_penalty=2)
    [hypothesis] = greedy(Fixed(-1, 3, 5, 2.2, -1.5), 1, options, prompts)
    # 2 counts 2.5 from the start, 1 then 1.5, 3 then 1.1: of these the largest each time.
    assert hypothesis.tokens == [1, 2, 2, 2]
    [hypothesis] = greedy(Fixed(-1, 3, 2, 2.2, -1.5), 1, options, prompts)
    assert hypothesis.tokens == [1, 3, 1, 1]
    with pytest.raises(ValueError, match="repetition_penalty"):
        DecodingOptions((9,), repetition_penalty=0)
