"""Beam search where everything can be counted, or is written down."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import COMMITTED, PROMPTS, draw_photo, edit_manifest

from capexport import ArtifactError, Captioner, OptionError
from capexport.artifact import Manifest
from capexport.beam import beam_search
from capexport.captioner import open_artifact
from capexport.decoding import Decoder, DecodingOptions, Prompts
from capexport.sessions import CPU, Target

END = 0


class Chained(Decoder):
    """What follows depends on the image and on all that was said; the image is a constant part of
    the state."""

    constant = frozenset({"image"})

    def __init__(self, vocabulary: int = 4) -> None:
        self.vocabulary = vocabulary
        self.constants_copied: list[int] = []

    def logits(self, image: int, said: tuple[int, ...]) -> np.ndarray:
        seed = [image, *(token + 1 for token in said)]
        return np.random.default_rng(seed).normal(0, 2, self.vocabulary).astype(np.float32)

    def start(self, features: int, prompts=None):
        state = {"image": np.arange(features), "said": np.zeros((features, 0), int)}
        return self._logits(state), state

    def step(self, tokens: np.ndarray, state):
        said = np.concatenate([state["said"], tokens[:, None]], axis=1)
        state = {"image": state["image"], "said": said}
        return self._logits(state), state

    def _logits(self, state) -> np.ndarray:
        rows = zip(state["image"].tolist(), state["said"].tolist(), strict=True)
        return np.stack([self.logits(image, tuple(said)) for image, said in rows])

    def select(self, state, rows: np.ndarray):
        if "image" in state:
            self.constants_copied.append(len(rows))
        return {name: value[rows] for name, value in state.items()}

    def log_probability(self, image: int, tokens: tuple[int, ...]) -> float:
        total = 0.0
        for position, token in enumerate(tokens):
            logits = self.logits(image, tokens[:position]).astype(float)
            total += logits[token] - math.log(np.exp(logits).sum())
        return total


def every_caption(words: range, longest: int) -> list[tuple[int, ...]]:
    """With the end token, where it isn't cut off."""
    whole = [(*c, END) for n in range(longest) for c in itertools.product(words, repeat=n)]
    return whole + list(itertools.product(words, repeat=longest))


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_beams_enough_for_all_find_the_best(length_penalty: float, early_stopping):
    decoder, captions = Chained(), every_caption(range(1, 4), 4)
    options = DecodingOptions(
        (END,), max_tokens=4, num_beams=128, num_return_sequences=128,
        length_penalty=length_penalty, early_stopping=early_stopping,
    )  # fmt: skip
    for image, hypotheses in enumerate(beam_search(decoder, 3, options)):
        scores = {
            caption: decoder.log_probability(image, caption) / len(caption) ** length_penalty
            for caption in captions
        }
        ranked = sorted(captions, key=scores.__getitem__, reverse=True)
        assert len(ranked) == 121
        wanted = [[t for t in caption if t != END] for caption in ranked]
        assert [h.tokens for h in hypotheses] == wanted
        np.testing.assert_allclose(
            [h.score for h in hypotheses], [scores[caption] for caption in ranked], rtol=1e-4
        )
        np.testing.assert_allclose(
            [h.log_probability for h in hypotheses],
            [decoder.log_probability(image, caption) for caption in ranked],
            rtol=1e-4,
        )


def test_a_caption_does_not_depend_on_its_batch():
    decoder = Chained(12)

    class Alone(Chained):
        image = 0

        def logits(self, image: int, said: tuple[int, ...]) -> np.ndarray:
            return super().logits(self.image, said)

    steps = set()
    for early_stopping, penalty in itertools.product((True, False, "never"), (-1.0, 1.0)):
        options = DecodingOptions(
            (END, 5), max_tokens=9, num_beams=3, num_return_sequences=3,
            early_stopping=early_stopping, length_penalty=penalty,
        )  # fmt: skip
        together = beam_search(decoder, 8, options)
        for image, hypotheses in enumerate(together):
            alone = Alone(12)
            alone.image = image
            assert beam_search(alone, 1, options) == [hypotheses]
            steps.add(max(len(h.tokens) for h in hypotheses))
    assert len(steps) > 3, "images must leave the batch at different steps"


def test_constant_parts_are_copied_once_and_when_images_leave():
    decoder = Chained(12)
    options = DecodingOptions((), max_tokens=6, num_beams=3)
    beam_search(decoder, 2, options)
    assert decoder.constants_copied == [6]
    room = np.array([3, 6])
    context = np.zeros((2, 1), np.int64)
    prompts = Prompts(context, context, context[:, :0], room)
    found = beam_search(decoder, 2, options, prompts)
    assert [len(hypotheses[0].tokens) for hypotheses in found] == [3, 6]
    assert decoder.constants_copied == [6, 6, 3]


class Shared(Chained):
    """The same, with an image once for all its beams."""

    shared = Chained.constant

    def _logits(self, state) -> np.ndarray:
        each = len(state["said"]) // len(state["image"])
        return super()._logits({**state, "image": state["image"].repeat(each)})


def test_shared_parts_are_copied_when_images_leave_alone():
    left = []
    for early_stopping, beams in itertools.product((True, False, "never"), (2, 3)):
        decoder = Shared(12)
        options = DecodingOptions(
            (END, 5), max_tokens=9, num_beams=beams, early_stopping=early_stopping
        )
        assert beam_search(decoder, 8, options) == beam_search(Chained(12), 8, options)
        images = [8, *decoder.constants_copied]
        assert images == sorted({*images}, reverse=True)
        left += images[1:]
    assert left


@pytest.mark.parametrize("shared", [True, False])
def test_regions_are_kept_once_an_image(
    attention_artifact: Path, photos, shared: bool, monkeypatch
):
    captioner = Captioner.load(attention_artifact if shared else COMMITTED / "attention", threads=1)
    graph, seen = captioner.decoder.step_graph, set()
    run = graph.run

    def spy(feeds, *arguments):
        seen.add((len(feeds["keys"]), len(feeds["tokens"])))
        return run(feeds, *arguments)

    monkeypatch.setattr(graph, "run", spy)
    images = photos[:5]
    together = captioner.caption(images, num_beams=3, min_tokens=3)
    assert (5, 15) in seen if captioner.decoder.shared else (15, 15) in seen
    alone = [captioner.caption(image, num_beams=3, min_tokens=3) for image in images]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_no_end_before_min_tokens_and_nothing_suppressed():
    options = DecodingOptions(
        (END,), max_tokens=6, min_tokens=3, suppress_tokens=(4, 5), num_beams=4,
        num_return_sequences=4,
    )  # fmt: skip
    for hypotheses in beam_search(Chained(9), 5, options):
        assert len(hypotheses) == 4
        for hypothesis in hypotheses:
            assert len(hypothesis.tokens) >= 3
            assert not {4, 5, END} & set(hypothesis.tokens)


def test_where_the_options_allow_fewer_captions():
    """Of one word and the end, there are but four captions."""
    options = DecodingOptions(
        (END,), max_tokens=3, suppress_tokens=(2, 3), num_beams=9, num_return_sequences=9
    )
    [hypotheses] = beam_search(Chained(), 1, options)
    assert sorted(h.tokens for h in hypotheses) == [[], [1], [1, 1], [1, 1, 1]]
    none = dataclasses.replace(options, min_tokens=3, no_repeat_ngram_size=1)
    with pytest.raises(OptionError, match="leave no token to go on with"):
        beam_search(Chained(), 1, none)


def test_no_sequence_of_tokens_comes_twice():
    options = DecodingOptions((), max_tokens=12, num_beams=3, no_repeat_ngram_size=2)
    context = np.array([[1, 2, 1]])
    prompts = Prompts(context, context, context)
    for each in (None, prompts):
        [[hypothesis]] = beam_search(Chained(5), 1, options, each)
        said = [*(context[0].tolist() if each else []), *hypothesis.tokens]
        pairs = list(itertools.pairwise(said))
        assert len(set(pairs)) == len(pairs)


class Even(Chained):
    """Every word is as likely as every other, and the last is named first."""

    def logits(self, image: int, said: tuple[int, ...]) -> np.ndarray:
        return np.zeros(self.vocabulary, np.float32)

    def likeliest(self, tokens: np.ndarray, state, excluded, count: int):
        logits, state = self.step(tokens, state)
        tokens = np.tile(np.arange(self.vocabulary)[:count][::-1], (len(logits), 1))
        return (np.log(0 * tokens + 0.25).astype(np.float32), tokens), state


@pytest.mark.parametrize("ngram", [0, 9], ids=["likeliest", "step"])
def test_of_equals_the_lowest_go_on(ngram: int):
    options = DecodingOptions(
        (), max_tokens=3, num_beams=3, num_return_sequences=3, no_repeat_ngram_size=ngram
    )
    for hypotheses in beam_search(Even(), 2, options):
        assert [h.tokens for h in hypotheses] == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]


@pytest.mark.parametrize("length", [0, 2])
def test_logits_that_are_no_numbers(length: int):
    class Broken(Chained):
        def logits(self, image: int, said: tuple[int, ...]) -> np.ndarray:
            logits = super().logits(image, said)
            logits[image] = np.nan if len(said) == length else logits[image]
            return logits

    with pytest.raises(ArithmeticError, match="no numbers"):
        beam_search(Broken(), 2, DecodingOptions((), max_tokens=5, num_beams=3))


def test_a_captioner_equals_an_exhaustive_search(captioner: Captioner):
    """Over the real graphs, with three words left to say."""
    words = [4, 5, 6]
    others = tuple(set(range(len(captioner.text))) - {*words, *captioner.options.end_tokens})
    [end] = captioner.options.end_tokens
    image = draw_photo(3)
    caption = captioner.caption(
        image, max_tokens=4, num_beams=128, num_return_sequences=128, suppress_tokens=others
    )
    features = captioner.encoder(captioner.preprocess(image)[None])

    def scores(logits: np.ndarray, state, said: tuple[int, ...], total: float):
        """Of every caption that goes on from there: its log-probability over its length."""
        logs = logits[0] - np.log(np.exp(logits[0].astype(float)).sum())
        for token in (*words, end):
            tokens, sum_ = (*said, token), total + logs[token]
            if token == end or len(tokens) == 4:
                yield tokens, sum_ / len(tokens)
            else:
                following = captioner.decoder.step(np.array([token]), state)
                yield from scores(*following, tokens, sum_)

    found = dict(scores(*captioner.decoder.start(features, None), (), 0.0))
    ranked = sorted(found, key=found.__getitem__, reverse=True)
    assert len(ranked) == 121
    assert [one.tokens for one in caption.alternatives] == [
        tuple(token for token in tokens if token != end) for tokens in ranked
    ]
    np.testing.assert_allclose(
        [one.score for one in caption.alternatives], [found[t] for t in ranked], rtol=1e-4
    )
    assert caption.alternatives[0].text == caption.text
    assert caption.alternatives[0].log_probability == caption.log_probability


def test_one_beam_is_greedy_and_alternatives_are_there(captioner: Captioner, photos: list[Path]):
    for wanted, one in zip(
        captioner.caption(photos), captioner.caption(photos, num_beams=1), strict=True
    ):
        assert one.tokens == wanted.tokens
        [alternative] = wanted.alternatives
        assert alternative.tokens == wanted.tokens
        assert alternative.score == alternative.log_probability == wanted.log_probability


@pytest.mark.parametrize("changes", [{}, {"num_return_sequences": 3, "early_stopping": True}])
def test_a_cnn_lstms_caption_does_not_depend_on_its_batch(
    captioner: Captioner, photos: list[Path], changes: dict
):
    together = captioner.caption(photos, num_beams=4, **changes)
    assert [c.tokens for c in together] != [c.tokens for c in captioner.caption(photos)]
    for photo, caption in zip(photos, together, strict=True):
        alone = captioner.caption(photo, num_beams=4, **changes)
        assert [a.tokens for a in alone.alternatives] == [a.tokens for a in caption.alternatives]


class Bound(Target):
    """Values stay with onnxruntime, as they do on a GPU."""

    def open(self, path: Path, **how):
        return super().open(path, **{**how, "bound": True})


def test_beams_of_a_state_that_stays_on_its_device(
    artifact: Path, captioner: Captioner, photos: list[Path]
):
    device = dataclasses.replace(CPU.device, images_per_core=None)
    bound = open_artifact(artifact, Manifest.read(artifact), Bound(device, threads=1))
    wanted = captioner.caption(photos, num_beams=3)
    got = bound.caption(photos, num_beams=3)
    assert [c.tokens for c in got] == [c.tokens for c in wanted]


class Stepping(Decoder):
    """Of another decoder the single steps alone, whose logits all come to the host."""

    def __init__(self, decoder: Decoder) -> None:
        self.constant = decoder.constant
        self.start, self.step, self.select = decoder.start, decoder.step, decoder.select


@pytest.mark.parametrize("family", ["captioner", "blip2"])
def test_a_decoders_own_choice_is_that_of_its_logits(
    family: str, captioner: Captioner, blip2_artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    import onnxruntime

    if family == "blip2":
        captioner = Captioner.load(blip2_artifact, threads=1)
    pixels = np.stack([captioner.preprocess(draw_photo(seed, (60, 50))) for seed in range(5)])
    features = captioner.encoder(pixels)
    prompts = captioner.text.frame([*PROMPTS, "a", "b"] if family == "blip2" else None, 5, 12)
    came, numpy = [], onnxruntime.OrtValue.numpy
    monkeypatch.setattr(
        onnxruntime.OrtValue, "numpy", lambda value: came.append(value.shape()) or numpy(value)
    )
    for changes in (
        {},
        {"min_tokens": 5, "suppress_tokens": (4, 7, 11), "early_stopping": True},
        {"end_tokens": (2, 5, 9, 12), "length_penalty": -1.0},
        {"end_tokens": (), "early_stopping": "never"},
    ):
        options = dataclasses.replace(
            captioner.options, max_tokens=12, num_beams=4, num_return_sequences=4, **changes
        )
        wanted = beam_search(Stepping(captioner.decoder), features, options, prompts)
        came.clear()
        found = beam_search(captioner.decoder, features, options, prompts)
        if family == "blip2":
            logits = [shape for shape in came if shape[-1] == captioner.decoder.vocabulary_size]
            assert logits == [[5, captioner.decoder.vocabulary_size]], "the first ones alone"
        for ours, theirs in zip(found, wanted, strict=True):
            assert [h.tokens for h in ours] == [h.tokens for h in theirs]
            np.testing.assert_allclose(
                [h.score for h in ours], [h.score for h in theirs], rtol=1e-4
            )


def test_a_blip2s_beams_with_prompts_of_different_length(blip2_artifact: Path):
    blip2 = Captioner.load(blip2_artifact, threads=1)
    images = [draw_photo(seed, (60, 50)) for seed in range(3)]
    said = set()
    for changes in ({}, {"early_stopping": "never", "no_repeat_ngram_size": 2}):
        options = {"num_beams": 3, "num_return_sequences": 2, "max_tokens": 12, **changes}
        together = blip2.caption(images, prompt=PROMPTS, **options)
        for image, prompt, caption in zip(images, PROMPTS, together, strict=True):
            alone = blip2.caption(image, prompt=prompt, **options)
            tokens = [a.tokens for a in caption.alternatives]
            assert [a.tokens for a in alone.alternatives] == tokens
            said.update(tokens)
    assert len(said) > 6


def test_a_long_prompt_takes_no_room_from_its_neighbour(blip2_artifact: Path):
    blip2 = Captioner.load(blip2_artifact, threads=1)
    limit = blip2.text.spec.max_positions
    if limit is None:
        pytest.skip("T5 has no limit")
    length = blip2.text.frame(["two"], 1).tokens.shape[1]
    prompts = ["z" * (limit - length - 3), "two"]
    image = draw_photo(1, (60, 50))
    for early_stopping in (False, "never"):
        options = {"num_beams": 3, "end_tokens": (), "early_stopping": early_stopping}
        together = blip2.caption([image] * 2, prompt=prompts, **options)
        alone = [blip2.caption(image, prompt=prompt, **options) for prompt in prompts]
        assert [c.tokens for c in together] == [c.tokens for c in alone]
        room = int(blip2.text.frame(prompts, 2).room[0])
        assert len(together[0].tokens) == room < len(together[1].tokens)


def test_the_manifest_may_ask_for_beams(artifact: Path, captioner: Captioner, tmp_path: Path):
    copied = shutil.copytree(artifact, tmp_path / "copied")
    decoding = json.loads((copied / "manifest.json").read_text())["decoding"]
    own = {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5}
    edit_manifest(copied, decoding={**decoding, **own})
    image = draw_photo(5)
    wanted = captioner.caption(image, **own)
    assert Captioner.load(copied).caption(image).tokens == wanted.tokens
    greedy = Captioner.load(copied).caption(image, num_beams=1)
    assert greedy.tokens == captioner.caption(image).tokens
    for wrong in ({"early_stopping": "always"}, {"num_beams": 0}, {"num_return_sequences": 2}):
        edit_manifest(copied, decoding={**decoding, **wrong})
        with pytest.raises(ArtifactError, match=next(iter(wrong))):
            Captioner.load(copied)
