"""The greedy loop over a decoder whose next words are written down."""

import numpy as np
import pytest

from capexport.decoding import DecodingOptions, greedy

END = 2


class Scripted:
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
