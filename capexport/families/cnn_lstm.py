"""The CNN-LSTM in the runtime: vocabulary, graphs, and how an artifact is opened."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from capexport.artifact import Decoding, Manifest, typed
from capexport.decoding import (
    Decoder,
    DecodingOptions,
    Hypothesis,
    Likeliest,
    Prompts,
    Regions,
    State,
    TokenArray,
)
from capexport.errors import ArtifactError, OptionError
from capexport.families import Family, Parts
from capexport.preprocessing import FloatArray
from capexport.sessions import (
    Graph,
    Target,
    Value,
    available_cores,
    batch_size,
    cuts_off_sums,
)


@dataclass(frozen=True)
class Vocabulary:
    """The words of a captioner; a word's id is its place in `words`.

    The four special words come first: `<PAD>` fills batches, `<SOS>` and `<EOS>` wrap a caption,
    `<UNK>` stands for every word that is not in the vocabulary.
    """

    SPECIALS: ClassVar[tuple[str, ...]] = ("<PAD>", "<SOS>", "<EOS>", "<UNK>")
    PAD: ClassVar[int] = 0
    START: ClassVar[int] = 1
    END: ClassVar[int] = 2
    UNKNOWN: ClassVar[int] = 3

    words: tuple[str, ...]
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {word: index for index, word in enumerate(self.words)})
        if self.words[:4] != self.SPECIALS:
            raise ValueError(f"a vocabulary starts with {', '.join(self.SPECIALS)}")
        if len(self._ids) != len(self.words):
            raise ValueError("a vocabulary holds each word once")

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """The ids of a caption's words, wrapped in `<SOS>` and `<EOS>`."""
        ids = (self._ids.get(word, self.UNKNOWN) for word in words)
        return [self.START, *ids, self.END]

    def frame(self, prompts: Sequence[str] | None, batch: int, needed: int) -> Prompts | None:
        if prompts is not None:
            raise OptionError("this captioner takes no prompt")
        return None

    def decode(self, tokens: Sequence[int]) -> str:
        """The words of `tokens`, special ones left out, separated by spaces."""
        return " ".join(self.words[token] for token in tokens if token >= len(self.SPECIALS))


# How every CNN-LSTM decodes, unless its checkpoint or its artifact says otherwise.
DECODING = Decoding(
    end_tokens=(Vocabulary.END,),
    max_tokens=30,  # Flickr8k's longest captions but for one in a thousand
    suppress_tokens=(Vocabulary.PAD, Vocabulary.START, Vocabulary.UNKNOWN),
    start_token=Vocabulary.START,
)
ATTENTION = "attention"  # the step graph's output that says where it looked


class AttentiveDecoder(Protocol):
    """A decoder that looks at the regions of an image."""

    regions: Regions | None

    def attend(self, tokens: TokenArray, state: Any) -> tuple[FloatArray, Any]:
        """As `Decoder.step`, but return where the step looked instead of logits: float32 (batch,
        regions)."""


def replay(
    decoder: AttentiveDecoder, features: State, captions: Sequence[Sequence[int]]
) -> list[FloatArray]:
    """What `Decoder.attention` returns, found by feeding the captions to the decoder again."""
    assert decoder.regions is not None
    steps = max(map(len, captions))
    fed = np.full((len(captions), steps + 1), Vocabulary.PAD, np.int64)
    fed[:, 0] = Vocabulary.START
    for row, caption in zip(fed, captions, strict=True):
        row[1 : len(caption) + 1] = caption
    looked = np.empty((len(captions), steps, *decoder.regions), np.float32)
    state = features
    for step in range(steps):
        weights, state = decoder.attend(fed[:, step], state)
        looked[:, step] = weights.reshape(len(captions), *decoder.regions)
    return [weights[: len(caption)] for weights, caption in zip(looked, captions, strict=True)]


class OnnxEncoder:
    """`encoder.onnx`: images to the decoder's state after the image.

    All cores work on a single image together. Of several images each core takes a few, so that no
    core waits for the others at every layer.
    """

    def __init__(self, path: Path, target: Target) -> None:
        self.graph = target.open(path)
        self._path, self._target = path, target
        own = target.session_options is not None  # which say how many threads there are
        self._cores = 1 if own else target.threads or available_cores()

    @cached_property
    def _one_core(self) -> Graph:
        return self._target.open(self._path, threads=1)

    def __call__(self, images: FloatArray) -> State:
        most = self._target.device.images_per_core
        if most is None or len(images) == 1:
            return self._run(self.graph, images)
        step = min(most, math.ceil(len(images) / self._cores))
        split = [images[start : start + step] for start in range(0, len(images), step)]
        if self._cores == 1:
            parts = [self._run(self.graph, part) for part in split]
        else:
            with ThreadPoolExecutor(self._cores) as pool:
                parts = list(pool.map(partial(self._run, self._one_core), split))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, graph: Graph, images: FloatArray) -> State:
        return graph.run({"images": images}, graph.outputs)


class OnnxDecoder(Decoder):
    """`decoder_step.onnx`, a token and the state to logits and the next state, and
    `decoder_loop.onnx`, the state after the image to whole captions.

    Where there is a loop, the step graph is opened only when options need it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        target: Target,
        constant: Collection[str],
        words: int,
    ) -> None:
        """
        Args:
            constant: names of the encoder's outputs that no step changes.
            words: the size of the vocabulary.
        """
        self.constant = frozenset(constant)
        # Within a loop, onnxruntime has no way around processors that cut off 8-bit sums.
        exact = manifest.precision != "int8" or not cuts_off_sums()
        self.looped = exact and "decoder_loop.onnx" in manifest.files
        self._step_path = manifest.file(folder, "decoder_step.onnx")
        self._loop_path = folder / "decoder_loop.onnx"
        self._target = target
        self._next = manifest.state
        self.regions = manifest.regions
        self._decoding = manifest.decoding
        self._words = words
        _ = self.loop if self.looped else self.step_graph

    @cached_property
    def step_graph(self) -> Graph:
        graph = self._target.open(self._step_path)
        inputs = {"tokens", *self._next, *self.constant}
        looks = {ATTENTION} if self.regions else set()
        graph.expect(inputs, {"logits", *self._next.values(), *looks})
        graph.expect_shape("logits", None, self._words)
        if self.regions:
            graph.expect_shape(ATTENTION, None, self.regions[0] * self.regions[1])
        return graph

    @cached_property
    def shared(self) -> frozenset[str]:  # type: ignore[override]
        """All constant values; none of them in older exports, whose graphs take them for each
        row."""
        inputs = self.step_graph.inputs
        rows = inputs["tokens"].shape
        return frozenset(name for name in self.constant if inputs[name].shape[:1] != rows)

    @cached_property
    def loop(self) -> Graph:
        graph = self._target.open(self._loop_path)
        states = {*(f"first_{name}" for name in self._next), *self.constant}
        graph.expect({"max_tokens", "min_tokens", *states}, {"words", "log_probabilities"})
        graph.expect_shape("words", None, None)
        graph.expect_shape("log_probabilities", None)
        return graph

    def start(self, features: State, prompts: object = None) -> tuple[FloatArray, State]:
        tokens = np.full(batch_size(features), self._decoding.start_token, np.int64)
        return self.step(tokens, features)

    def step(self, tokens: TokenArray, state: State) -> tuple[FloatArray, State]:
        return self._run("logits", tokens, state)

    def likeliest(
        self, tokens: TokenArray, state: State, excluded: Sequence[int], count: int
    ) -> tuple[Likeliest, State]:
        logits, state = self._run("logits", tokens, state, on_host=False)
        return self.step_graph.likeliest(logits, excluded, count), state

    def attend(self, tokens: TokenArray, state: State) -> tuple[FloatArray, State]:
        return self._run(ATTENTION, tokens, state)

    def _run(
        self, wanted: str, tokens: TokenArray, state: State, on_host: bool = True
    ) -> tuple[Value, State]:
        """One output, as an array if it must be `on_host`, and the next state."""
        feeds, host = {"tokens": tokens, **state}, [wanted] if on_host else []
        values = self.step_graph.run(feeds, [wanted, *self._next.values()], host)
        moved = {name: values[output] for name, output in self._next.items()}
        return values[wanted], {**state, **moved}

    def attention(self, features: State, captions: Sequence[Sequence[int]]) -> list[FloatArray]:
        return replay(self, features, captions)

    def select(self, state: State, rows: NDArray[np.intp]) -> State:
        return self.step_graph.select(state, rows)

    def greedy(self, features: State, options: DecodingOptions) -> list[Hypothesis] | None:
        built = self._decoding
        fixed = (options.end_tokens, options.suppress_tokens)
        other = fixed != (built.end_tokens, built.suppress_tokens)
        other = other or options.repetition_penalty != 1 or options.no_repeat_ngram_size > 0
        if not self.looped or other:
            return None
        feeds = {n if n in self.constant else f"first_{n}": v for n, v in features.items()}
        feeds["max_tokens"] = np.array(options.max_tokens, np.int64)
        feeds["min_tokens"] = np.array(options.min_tokens, np.int64)
        outputs = ["words", "log_probabilities"]
        values = self.loop.run(feeds, outputs, host=outputs)
        words, batch = values["words"], batch_size(features)
        if words.shape[1] != batch or len(words) > options.max_tokens:
            raise ArtifactError(f"{self.loop.path}: captions of shape {words.shape} for {batch}")
        if words.size and not 0 <= words.min() <= words.max() < self._words:
            raise ArtifactError(
                f"{self.loop.path}: a word outside the vocabulary of {self._words}; export again"
            )
        [end] = options.end_tokens
        hypotheses = []
        for row, log_probability in zip(
            words.T.tolist(), values["log_probabilities"].tolist(), strict=True
        ):
            length = row.index(end) if end in row else len(row)
            hypotheses.append(Hypothesis(row[:length], log_probability))
        return hypotheses


def open_artifact(folder: Path, manifest: Manifest, target: Target) -> Parts:
    """Open an exported CNN-LSTM."""
    vocabulary = read_vocabulary(manifest.file(folder, "vocabulary.json"))
    if manifest.decoding.start_token is None:
        raise ArtifactError(f"{folder}: no start_token in the manifest; export again")
    manifest.decoding.check(folder, len(vocabulary))
    encoder = OnnxEncoder(manifest.file(folder, "encoder.onnx"), target)
    constant = encoder.graph.outputs.keys() - manifest.state.keys()
    encoder.graph.expect({"images"}, {*manifest.state, *constant})
    encoder.graph.expect_shape("images", None, 3, manifest.image.crop, manifest.image.crop)
    return Parts(
        encoder,
        OnnxDecoder(folder, manifest, target, constant, len(vocabulary)),
        vocabulary,
    )


def read_vocabulary(path: Path) -> Vocabulary:
    try:
        return Vocabulary(typed(tuple[str, ...], json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a list of words: {error}; export again") from error


FAMILY = Family(
    open=open_artifact,
    batch_size=32,
    small=True,
    image_graph="encoder.onnx",
    step_weights="decoder.data",
    optional=("decoder_loop.onnx",),
)
