"""The losses of training: cross-entropy with human captions, and self-critical CIDEr."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from capexport.errors import importing
from capexport.families.cnn_lstm import DECODING, Vocabulary
from capexport.models.cnn_lstm import CnnLstm
from capexport.models.steps import State
from train.config import TrainConfig
from train.data import Example, Examples, Ids

_SAMPLES = 5  # captions drawn of a photo, as many as people wrote


def batch_loss(
    model: CnnLstm, batch: Sequence[Example], features: Tensor, config: TrainConfig | None = None
) -> tuple[Tensor, int]:
    """Mean cross-entropy over the tokens of a batch's captions, and how many those are.

    Args:
        features: what the encoder makes of the photos, (photos, ...).
        config: label smoothing and the attention's regulariser; neither by default.
    """
    captions, lengths = _padded([captions for _, captions in batch])
    captions = captions.to(features.device)
    predicted = model.decoder(features, captions, lengths)
    tokens = int((predicted.targets != Vocabulary.PAD).sum())
    loss = F.cross_entropy(
        predicted.logits.float(),
        predicted.targets,
        ignore_index=Vocabulary.PAD,
        label_smoothing=config.label_smoothing if config else 0,
    )
    if config and config.attention_penalty and predicted.attention is not None:
        steps = predicted.attention.shape[1]
        said = torch.arange(steps) < lengths[:, None] - 1
        looked = (predicted.attention * said[:, :, None].to(features.device)).sum(1)
        looked = looked[captions[:, 0] != Vocabulary.PAD]  # not of captions that a photo lacks
        loss = loss + config.attention_penalty * (1 - looked).square().sum(1).mean()
    return loss, tokens


def _padded(captions: Sequence[Sequence[Ids]]) -> tuple[Tensor, Tensor]:
    """The captions of each photo as int64 (rows, time), padded, and their lengths, int64 (rows,).

    Each photo gets as many rows as the one with the most captions. The rows that it lacks are all
    padding, of length 2, the least that a decoder's `forward` takes.
    """
    each = max(map(len, captions))
    rows = [ids for of_photo in captions for ids in ([*of_photo] + [[]] * each)[:each]]
    lengths = torch.tensor([max(len(caption), 2) for caption in rows])
    padded = torch.full((len(rows), int(lengths.max())), Vocabulary.PAD)
    for row, caption in zip(padded, rows, strict=True):
        row[: len(caption)] = torch.as_tensor(caption)
    return padded, lengths


class CiderReward:
    """CIDEr-D of captions as ids, by pycocoevalcap's scorer (Vedantam et al. 2015).

    How rare a word is, is counted in the references of all photos. The end token counts as a word,
    or captions would learn to break off (Rennie et al. 2017, section 5).
    """

    def __init__(self, examples: Examples) -> None:
        """
        Raises:
            MissingExtraError: pycocoevalcap is not installed.
        """
        with importing("CIDEr needs `pip install 'capexport[eval]'`"):
            from pycocoevalcap.cider import cider_scorer
        self._library = cider_scorer
        self._photos = len(examples)
        self._frequency: Counter[Any] = Counter()
        for _, captions in examples:
            self._frequency.update(set().union(*self._references(captions)))

    def __call__(self, drawn: Sequence[Ids], batch: Sequence[Example]) -> NDArray[Any]:
        """The reward of each of the captions `drawn`, float64 (rows,): equally many for each photo
        of the batch, one photo after the other."""
        photos = self._photos
        each = len(drawn) // len(batch)

        class References(list[Any]):
            def __len__(self) -> int:  # by which the scorer tells how many photos were counted
                return photos

        scorer = self._library.CiderScorer()
        scorer.document_frequency = self._frequency
        scorer.ctest = [self._library.cook_test(_words(caption)) for caption in drawn]
        scorer.crefs = References(
            cooked for _, captions in batch for cooked in [self._references(captions)] * each
        )
        return np.array(scorer.compute_cider())

    def _references(self, captions: Sequence[Ids]) -> Any:
        return self._library.cook_refs([_words(caption) for caption in captions])


def _words(caption: Ids) -> str:
    return " ".join(str(token) for token in caption if token != Vocabulary.START)


def self_critical_loss(
    model: CnnLstm, batch: Sequence[Example], features: Tensor, reward: CiderReward
) -> tuple[Tensor, int]:
    """Likelihood of captions that the model drew, each weighed by how much better it is than the
    photo's others (Rennie et al. 2017; the baseline is Luo's, 2020), and how many tokens they have.
    """
    drawn = _draw(model, model.decoder.start(features))
    photos = [drawn[start : start + _SAMPLES] for start in range(0, len(drawn), _SAMPLES)]
    rewards = torch.tensor(reward(drawn, batch), dtype=torch.float32).view(-1, _SAMPLES)
    others = (rewards.sum(1, keepdim=True) - rewards) / (_SAMPLES - 1)
    advantage = (rewards - others).flatten().to(features.device)
    captions, lengths = _padded(photos)
    predicted = model.decoder(features, captions.to(features.device), lengths)
    chosen = predicted.targets > Vocabulary.START
    logits = _choosable(predicted.logits.float())[chosen]
    surprise = F.cross_entropy(logits, predicted.targets[chosen], reduction="none")
    return (advantage[predicted.rows[chosen]] * surprise).mean(), int(chosen.sum())


@torch.no_grad()
def _draw(model: CnnLstm, state: State) -> list[list[int]]:
    """Sample `_SAMPLES` captions of each photo, one photo after the other, from `<SOS>` to `<EOS>`
    or to the greatest length."""
    state = {name: value.repeat_interleave(_SAMPLES, dim=0) for name, value in state.items()}
    rows = len(state["hidden"])
    tokens = torch.full((rows,), Vocabulary.START, device=state["hidden"].device)
    captions = [tokens]
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    while not ended.all() and len(captions) <= DECODING.max_tokens:
        logits, state = model.decoder.step(tokens, state)
        tokens = torch.multinomial(_choosable(logits.float()).softmax(1), 1)[:, 0]
        tokens = tokens.where(~ended, Vocabulary.PAD)
        captions.append(tokens)
        ended |= tokens == Vocabulary.END
    drawn = torch.stack(captions, dim=1).tolist()
    return [[token for token in caption if token != Vocabulary.PAD] for caption in drawn]


def _choosable(logits: Tensor) -> Tensor:
    """The logits, with minus infinity for the tokens that no caption may hold."""
    never = torch.tensor(DECODING.suppress_tokens, device=logits.device)
    return logits.index_fill(1, never, float("-inf"))
