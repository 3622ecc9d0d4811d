"""BLIP-2 in the runtime: prompts and tokenizer, graphs, and how an artifact is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capexport.artifact import Manifest, PromptSpec
from capexport.decoding import Decoder, Likeliest, Prompts, State, TokenArray
from capexport.errors import ArtifactError, OptionError, importing
from capexport.families import Family, Parts
from capexport.preprocessing import FloatArray
from capexport.sessions import Graph, Target, Value

# Tokens, where a model has no limit of its own: twice what Flan-T5 was trained with. An encoder's
# memory grows with the square of them.
_LONGEST_PROMPT = 1024


class PromptTokenizer:
    """A `tokenizer.json`, read by the package tokenizers, and the prompts of a BLIP-2."""

    def __init__(self, path: Path, spec: PromptSpec) -> None:
        """
        Raises:
            MissingExtraError: tokenizers is not installed.
            ArtifactError: `path` is no tokenizer.
        """
        with importing("BLIP-2 needs tokenizers: `pip install 'capexport[tokenizers]'`"):
            from tokenizers import Tokenizer
        self.path = path
        with self._blamed("not a tokenizer"):
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.spec = spec

    @contextmanager
    def _blamed(self, what: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # tokenizers raises bare exceptions, and where Rust panics, what is no Exception.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise ArtifactError(f"{self.path}: {what}: {error!s:.300}; export again") from error
            raise

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def frame(self, prompts: Sequence[str] | None, batch: int, needed: int = 1) -> Prompts:
        """The places of the image, then the ids of the text.

        Shorter rows are padded where it changes nothing. A decoder alone continues behind the last
        token, so its padding goes between image and text. An encoder-decoder counts distances, so
        its padding goes behind the text.
        """
        spec = self.spec
        if prompts is None:
            rows = [[spec.bos_token]] * batch
        else:
            for prompt in prompts:
                if not isinstance(prompt, str) or not _encodable(prompt):
                    raise OptionError(f"a prompt must be text, got {prompt!r:.80}")
            # One by one: for a batch, tokenizers starts threads, which a fork does not survive.
            with self._blamed(f"fails at {prompts!r:.80}"):
                rows = [self._tokenizer.encode(prompt).ids for prompt in prompts]
        longest = max(map(len, rows))
        tokens = np.full((batch, spec.query_tokens + longest), spec.pad_token, np.int64)
        mask = np.zeros_like(tokens)
        tokens[:, : spec.query_tokens] = spec.image_token
        mask[:, : spec.query_tokens] = 1
        for index, row in enumerate(rows):
            left = spec.query_tokens + (longest - len(row) if spec.start_token is None else 0)
            tokens[index, left : left + len(row)] = row
            mask[index, left : left + len(row)] = 1
            if spec.image_token in row:
                raise OptionError(f"a prompt must not contain the image token: {prompts!r}")
        # Padding does not count as said, so a caption doesn't depend on the prompts beside its own.
        context = np.where(mask, tokens, spec.image_token)
        if spec.start_token is not None:
            context = np.full((batch, 1), spec.start_token)
        return Prompts(tokens, mask, context, self._room(mask.sum(axis=1), needed))

    def _room(self, lengths: TokenArray, needed: int) -> TokenArray | None:
        """How many tokens fit after prompts of these lengths."""
        limit = self.spec.max_positions
        if limit is None:
            if lengths.max() > _LONGEST_PROMPT:
                raise OptionError(
                    f"a prompt of {lengths.max()} tokens, the image's included, is longer than the "
                    f"{_LONGEST_PROMPT} that are taken: shorten it"
                )
            return None
        room: TokenArray = limit + 1 - lengths  # the last token is never fed: it needs no position
        if room.min() < needed:
            raise OptionError(
                f"a prompt of {lengths.max()} tokens, the image's included, leaves room for "
                f"{max(int(room.min()), 0)} of the model's {limit}: shorten it, or max_tokens"
            )
        return room

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special ones left out, without surrounding spaces."""
        with self._blamed("fails at a caption"):
            text = str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
        if self.spec.clean_up_spaces:  # as `clean_up_tokenization` of Transformers
            for found in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
                text = text.replace(found, found.strip())
        return text.strip()


def _encodable(text: str) -> bool:
    """Is it without halves of surrogate pairs?"""
    return text == text.encode(errors="replace").decode()


def _only(graph: Graph, output: str, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    array: NDArray[Any] = graph.run(feeds, [output], host=[output])[output]
    return array


class OnnxEncoder:
    """`vision_encoder.onnx`: images to features, (batch, query tokens, width)."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        graph.expect({"pixel_values"}, {"image_features"})

    def __call__(self, images: FloatArray) -> NDArray[Any]:
        return _only(self.graph, "image_features", {"pixel_values": images})


class OnnxDecoder(Decoder):
    """The language model: `embed_tokens.onnx` and `decoder_model_merged.onnx`, with
    `encoder_model.onnx` in front where it is an encoder-decoder.

    The manifest wires each key and value input of the step graph to the output that holds its next
    value. The encoder's keys and values go from the outputs of its graph to the step graph, with
    their mask. All keys and values stay with onnxruntime from step to step.
    """

    def __init__(self, folder: Path, manifest: Manifest, target: Target, spec: PromptSpec) -> None:
        self._next = manifest.state
        self._spec = spec
        open_part = partial(_open_part, folder, manifest, target)
        self._embed = open_part("embed_tokens.onnx", threads=1)
        self._embed.expect({"input_ids"}, {"inputs_embeds"})
        self.step_graph = open_part("decoder_model_merged.onnx", bound=True)
        self._encoder = None
        self._mask = "attention_mask"
        encoded: set[str] = set()
        if spec.start_token is not None:
            self._mask = "encoder_attention_mask"
            self._encoder = open_part("encoder_model.onnx", bound=True)
            encoded = set(self._encoder.outputs)
            self._encoder.expect({"inputs_embeds", "attention_mask"}, encoded)
            self.constant = frozenset({self._mask, *encoded})
        inputs = {"inputs_embeds", self._mask, *self._next, *encoded}
        self.step_graph.expect(inputs, {"logits", *self._next.values()})
        self.vocabulary_size = int(self.step_graph.outputs["logits"].shape[-1])
        self.step_graph.expect_shape("logits", None, self.vocabulary_size)

    def start(self, features: NDArray[Any], prompts: Prompts | None) -> tuple[FloatArray, State]:
        assert prompts is not None
        embeddings = self._embed_tokens(prompts.tokens)
        image = prompts.tokens == self._spec.image_token
        embeddings[image] = features.reshape(-1, features.shape[-1])
        batch = len(prompts.tokens)
        state = {self._mask: prompts.mask}
        state.update({name: self.step_graph.empty(name, batch) for name in self._next})
        if self._encoder is not None:
            feeds = {"inputs_embeds": embeddings, "attention_mask": prompts.mask}
            state.update(self._encoder.run(feeds, self._encoder.outputs))
            start = np.full((batch, 1), self._spec.start_token, np.int64)
            embeddings = self._embed_tokens(start)
        return self._advance(embeddings, state)

    def step(self, tokens: TokenArray, state: State) -> tuple[FloatArray, State]:
        return self._advance(*self._fed(tokens, state))

    def likeliest(
        self, tokens: TokenArray, state: State, excluded: Sequence[int], count: int
    ) -> tuple[Likeliest, State]:
        logits, state = self._advance(*self._fed(tokens, state), on_host=False)
        return self.step_graph.likeliest(logits, excluded, count), state

    def select(self, state: State, rows: NDArray[np.intp]) -> State:
        return self.step_graph.select(state, rows)

    def _embed_tokens(self, tokens: TokenArray) -> NDArray[Any]:
        return _only(self._embed, "inputs_embeds", {"input_ids": tokens})

    def _fed(self, tokens: TokenArray, state: State) -> tuple[NDArray[Any], State]:
        if self._mask not in self.constant:
            seen = np.ones((len(tokens), 1), np.int64)
            state = {**state, self._mask: np.concatenate([state[self._mask], seen], axis=1)}
        return self._embed_tokens(tokens[:, None]), state

    def _advance(
        self, embeddings: NDArray[Any], state: State, on_host: bool = True
    ) -> tuple[Value, State]:
        """The logits, as an array where they must be `on_host`, and the next state."""
        feeds, host = {"inputs_embeds": embeddings, **state}, ["logits"] if on_host else []
        values = self.step_graph.run(feeds, ["logits", *self._next.values()], host)
        moved = {name: values[output] for name, output in self._next.items()}
        return values["logits"], {**state, **moved}


def _open_part(folder: Path, manifest: Manifest, target: Target, name: str, **how: Any) -> Graph:
    # Quantised products are fast only in the layout that onnxruntime packs them into.
    mapped = manifest.precision in ("fp32", "fp16")
    return target.open(manifest.file(folder, name), mapped=mapped, **how)


def open_artifact(folder: Path, manifest: Manifest, target: Target) -> Parts:
    """Open an exported BLIP-2."""
    spec = manifest.prompt
    if spec is None:
        raise ArtifactError(f"{folder}: no prompt section in the manifest; export again")
    text = PromptTokenizer(manifest.file(folder, "tokenizer.json"), spec)
    decoder = OnnxDecoder(folder, manifest, target, spec)
    size = decoder.vocabulary_size
    tokens = spec.image_token, spec.bos_token, spec.pad_token, spec.start_token or 0
    manifest.decoding.check(folder, size, *tokens)
    if len(text) > size:
        raise ArtifactError(
            f"{folder}: a tokenizer of {len(text)} tokens, but logits for {size}; export again"
        )
    encoder = OnnxEncoder(_open_part(folder, manifest, target, "vision_encoder.onnx"))
    encoder.graph.expect_shape("pixel_values", None, 3, manifest.image.crop, manifest.image.crop)
    encoder.graph.expect_shape("image_features", None, spec.query_tokens, None)
    return Parts(encoder, decoder, text)


FAMILY = Family(
    open=open_artifact,
    batch_size=8,
    small=False,
    image_graph="vision_encoder.onnx",
    step_weights="decoder_model_merged.onnx.data",
)
