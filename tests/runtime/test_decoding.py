"""The greedy loop over a decoder whose next words are written down."""

import dataclasses

import numpy as np
import pytest

from capexport import Captioner, OptionError
from capexport.decoding import Decoder, DecodingKeywords, DecodingOptions, Prompts, greedy

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


def test_no_sequence_of_tokens_comes_twice():
    decoder, options = Fixed(9, 8, 2, 1), DecodingOptions((), max_tokens=7)
    twos = dataclasses.replace(options, no_repeat_ngram_size=2)
    [hypothesis] = greedy(decoder, 1, twos)
    assert hypothesis.tokens == [0, 0, 1, 0, 2, 0, 3]
    said = np.array([[3, 0, 0, 1]])
    [hypothesis] = greedy(decoder, 1, twos, Prompts(said, said, said))
    assert hypothesis.tokens == [0, 2, 0, 3, 1, 1, 2], "what the prompt says counts"
    ones = dataclasses.replace(options, max_tokens=4, no_repeat_ngram_size=1)
    [hypothesis] = greedy(decoder, 1, ones)
    assert hypothesis.tokens == [0, 1, 2, 3]
    with pytest.raises(OptionError, match="leave no token to go on with"):
        greedy(decoder, 1, dataclasses.replace(ones, max_tokens=5))


def test_the_repetition_penalty_counts_prompt_and_caption():
    """Positive logits are divided, negative ones multiplied, once however often a word was said."""
    context = np.array([[2, 2]])
    prompts = Prompts(context, np.ones_like(context), context)
    options = DecodingOptions((), max_tokens=4, repetition_penalty=2)
    [hypothesis] = greedy(Fixed(-1, 3, 5, 2.2, -1.5), 1, options, prompts)
    # 2 counts 2.5 from the start, 1 then 1.5, 3 then 1.1: of these the largest each time.
    assert hypothesis.tokens == [1, 2, 2, 2]
    [hypothesis] = greedy(Fixed(-1, 3, 2, 2.2, -1.5), 1, options, prompts)
    assert hypothesis.tokens == [1, 3, 1, 1]
    said = Prompts(context * 0, context, context * 0)
    [hypothesis] = greedy(Fixed(-1, -1.5, -9), 1, dataclasses.replace(options, max_tokens=1), said)
    assert hypothesis.tokens == [1], "-1 counts -2, and not -0.5"


def test_the_penalty_follows_its_row_when_others_leave():
    """Each row says its own words twice, unless it is penalised for its own, not another's."""
    script = [[4, END], [5, 5, 5, END], [6, END], [7, 7, 7, END]]
    decoder = Scripted(script)
    logits = decoder.logits

    # The next best word after 5 is 8, after 7 it is 9.
    def with_second_choice(state: np.ndarray) -> np.ndarray:
        values = logits(state)
        for line, (row, _) in zip(values, state, strict=True):
            line[{1: 8, 3: 9}.get(row, 1)] = 2
        return values

    decoder.logits = with_second_choice
    move = np.array([0, 1])
    decoder.step = lambda tokens, state: (decoder.logits(state + move), state + move)
    options = DecodingOptions((END,), repetition_penalty=2, suppress_tokens=(1,))
    hypotheses = greedy(decoder, 4, options)
    assert [h.tokens for h in hypotheses] == [[4], [5, 8, 5], [6], [7, 9, 7]]


def test_room_is_a_rows_own():
    decoder = Scripted([[4, 4, 4, 4, END], [5, 5, 5, 5, 5, END], [6, END]])
    context = np.zeros((3, 1), np.int64)
    prompts = Prompts(context, context, context[:, :0], room=np.array([2, 9, 3]))
    hypotheses = greedy(decoder, 3, DecodingOptions((END,), max_tokens=4), prompts)
    assert [h.tokens for h in hypotheses] == [[4, 4], [5, 5, 5, 5], [6]]


def test_without_an_end_token_a_caption_runs_to_its_limit():
    [hypothesis] = greedy(Scripted([[4] * 9]), 1, DecodingOptions((), max_tokens=5))
    assert hypothesis.tokens == [4] * 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 2.7}, {"max_tokens": "5"}, {"max_tokens": True}, {"max_tokens": 0},
        {"min_tokens": 1.0}, {"min_tokens": -1}, {"min_tokens": 31}, {"min_tokens": "1"},
        {"repetition_penalty": "1"}, {"repetition_penalty": 0}, {"repetition_penalty": True},
        {"repetition_penalty": float("nan")}, {"repetition_penalty": float("inf")},
        {"end_tokens": 2}, {"end_tokens": (2.0,)}, {"end_tokens": [2]}, {"end_tokens": (-1,)},
        {"suppress_tokens": ("a",)},
        {"num_beams": 0}, {"num_beams": 2.0}, {"num_beams": 10**9}, {"num_beams": True},
        {"num_return_sequences": 2}, {"num_return_sequences": 0}, {"length_penalty": "1"},
        {"length_penalty": float("nan")}, {"length_penalty": float("inf")},
        {"early_stopping": "always"}, {"early_stopping": 1}, {"no_repeat_ngram_size": -1},
        {"no_repeat_ngram_size": 1.5},
    ],
)  # fmt: skip
def test_options_of_a_wrong_type_or_out_of_range(wrong: dict, captioner: Captioner):
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(OptionError, match=next(iter(wrong))):
        captioner.caption(image, **wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DecodingOptions(**{"end_tokens": (END,), **wrong})


@pytest.mark.parametrize("name", ["end_tokens", "suppress_tokens"])
def test_tokens_outside_the_vocabulary(name: str, captioner: Captioner):
    with pytest.raises(OptionError, match="token 999 lies outside the vocabulary"):
        captioner.caption(np.zeros((8, 8, 3), np.uint8), **{name: (2, 999)})


def test_numpy_numbers_are_numbers_and_none_is_the_default(captioner: Captioner):
    image = np.zeros((8, 8, 3), np.uint8)
    wanted = captioner.caption(image, max_tokens=3)
    got = captioner.caption(image, max_tokens=np.int64(3), min_tokens=None)
    assert got.tokens == wanted.tokens
    with pytest.raises(TypeError, match="max_length"):
        captioner.caption(image, max_length=3)


def test_keywords_and_flags_are_the_options():
    fields = {item.name: item for item in dataclasses.fields(DecodingOptions)}
    assert DecodingKeywords.__annotations__.keys() == fields.keys()
    from capexport.cli.decoding import DECODING_FLAGS

    no_lists = {name for name, item in fields.items() if not item.type.startswith("tuple")}
    assert {item.name for item in DECODING_FLAGS} == no_lists
