"""Text to token ids and back: the CNN-LSTM's words, and BLIP-2's tokenizer with its prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from capexport.decoding import Prompts
from capexport.errors import ArtifactError, MissingExtraError


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

    def decode(self, tokens: Sequence[int]) -> str:
        """The words of `tokens`, special ones left out, separated by spaces."""
        return " ".join(self.words[token] for token in tokens if token >= len(self.SPECIALS))


@dataclass(frozen=True)
class PromptSpec:
    """How a BLIP-2 frames its prompts, as `Blip2Processor` and `generate()` of Transformers do.

    Attributes:
        image_token: the id whose places the image's features take.
        query_tokens: how many places those are, before everything else.
        bos_token: what follows them where there is no prompt.
        pad_token, padding_side: how prompts of a batch are brought to one length, "left" or
            "right", between the image and the text or behind it.
        start_token: the first id of an encoder-decoder's caption; None for a decoder alone.
        max_positions: the longest prompt and caption together, where the model has a limit.
        clean_up_spaces: whether decoding draws punctuation to the word before it.
    """

    image_token: int
    query_tokens: int
    bos_token: int
    pad_token: int
    padding_side: str
    start_token: int | None
    max_positions: int | None
    clean_up_spaces: bool


class PromptTokenizer:
    """A `tokenizer.json`, read by the package tokenizers, and the prompts of a BLIP-2."""

    def __init__(self, path: Path, spec: PromptSpec) -> None:
        """
        Raises:
            MissingExtraError: tokenizers is not installed.
            ArtifactError: `path` is no tokenizer.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtraError(
                "BLIP-2 needs tokenizers: `pip install 'capexport[tokenizers]'`"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare exceptions
            raise ArtifactError(f"{path}: not a tokenizer: {error}; export again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.spec = spec

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def prompts(self, texts: Sequence[str] | None, batch: int) -> Prompts:
        """Frame one text for each image of a batch, or none for any."""
        spec = self.spec
        if texts is None:
            rows = [[spec.bos_token]] * batch
        else:
            rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        longest = max(map(len, rows))
        tokens = np.full((batch, spec.query_tokens + longest), spec.pad_token, np.int64)
        mask = np.zeros_like(tokens)
        tokens[:, : spec.query_tokens] = spec.image_token
        mask[:, : spec.query_tokens] = 1
        for index, row in enumerate(rows):
            left = spec.query_tokens + (longest - len(row) if spec.padding_side == "left" else 0)
            tokens[index, left : left + len(row)] = row
            mask[index, left : left + len(row)] = 1
            if spec.image_token in row:
                raise ValueError(f"a prompt must not contain the image token: {texts!r}")
        if spec.start_token is None:
            return Prompts(tokens, mask, context=tokens)
        return Prompts(tokens, mask, context=np.full((batch, 1), spec.start_token))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special ones left out, without surrounding spaces."""
        text = str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
        if self.spec.clean_up_spaces:  # as `clean_up_tokenization` of Transformers
            for found in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
                text = text.replace(found, found.strip())
        return text.strip()
