"""A BLIP-2's beams against `generate(num_beams=...)`: every caption, in order, with its score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROMPTS, assert_same, draw_photo

from capexport import Captioner
from capexport.models.blip2 import HuggingFaceCaptioner

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., Path]
IMAGES = [draw_photo(seed, (60, 50)) for seed in range(200, 203)]
# Ours; generate() has the same names but for those in NAMES, and max_new_tokens.
SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
    {"num_beams": 5, "num_return_sequences": 4, "early_stopping": "never"},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "end_tokens": (168, 132, 7)},
    {"num_beams": 5, "length_penalty": -2.0, "max_tokens": 7, "min_tokens": 2},
    {
        "num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.5, "early_stopping": "never",
        "max_tokens": 12, "end_tokens": (284, 290),
    },
    {"num_beams": 3, "repetition_penalty": 1.7, "min_tokens": 4, "early_stopping": True},
    {"num_beams": 5, "num_return_sequences": 5, "no_repeat_ngram_size": 2, "length_penalty": 0.6},
    {
        "num_beams": 3, "num_return_sequences": 3, "no_repeat_ngram_size": 1, "max_tokens": 8,
        "suppress_tokens": (284, 132, 267), "early_stopping": "never", "length_penalty": -0.5,
    },
    {"num_beams": 3, "max_tokens": 1, "num_return_sequences": 3},
    {"num_beams": 1, "no_repeat_ngram_size": 2},
    {"num_beams": 2, "repetition_penalty": 0.8, "end_tokens": (3,), "max_tokens": 5},
]  # fmt: skip
NAMES = {"min_tokens": "min_new_tokens", "end_tokens": "eos_token_id"}


@pytest.mark.parametrize("kind", ["opt", "t5", "t5-tied"])
def test_beams_are_those_of_generate(kind: str, blip2_checkpoint: Make, blip2_export: Make):
    wanted = HuggingFaceCaptioner.load(blip2_checkpoint(kind))
    exported = Captioner.load(blip2_export(kind), threads=1)
    said, lengths = set(), set()
    for number, options in enumerate(SETTINGS):
        theirs = {
            NAMES.get(name, name): list(value) if isinstance(value, tuple) else value
            for name, value in options.items()
        }
        prompt = (None, PROMPTS, "a photo of")[number % 3]
        # In a batch generate() counts the padding of its neighbours' prompts as said.
        counts = {"repetition_penalty", "no_repeat_ngram_size"} & options.keys()
        expected = wanted.caption(IMAGES, prompt=prompt, batch_size=1 if counts else 3, **theirs)
        for batch_size in (1, 3):
            captions = exported.caption(IMAGES, prompt=prompt, batch_size=batch_size, **options)
            for one, other in zip(captions, expected, strict=True):
                ours, others = one.alternatives, other.alternatives
                assert_same(ours, others)
                scores = [a.score for a in others]
                assert [a.score for a in ours] == pytest.approx(scores, rel=1e-3, abs=1e-3)
                said.update(a.tokens for a in ours)
                lengths.update(len(a.tokens) for a in ours)
    assert len(said) > 40, "the captions must vary for this test to mean something"
    assert len(lengths) > 6, "and end at different steps"
