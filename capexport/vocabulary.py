"""Words to ids and back, for the CNN-LSTM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar


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
