"""The attention decoder: before each word it looks at the regions of the backbone's map.

"Show, Attend and Tell" (Xu et al. 2015, section 3.1): the first state comes from the mean region, a
gate weighs what was seen, and words come from a deep output. Three choices are cheaper than
theirs: attention is a dot product with several heads (Vaswani et al. 2017, section 3.2), so that
the regions are projected to keys and values once a photo; the output layer shares its weights with
the word embedding (Press and Wolf 2017); and in training, all captions of a photo use its keys
together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from capexport.models.backbones import BACKBONES
from capexport.models.steps import Predicted, State, predicted

if TYPE_CHECKING:
    from capexport.models.cnn_lstm import CnnLstmConfig


class AttentionDecoder(nn.Module):
    """Soft attention over regions, word embedding, one LSTM layer, and the deep output.

    Each photo may have several rows, its captions or beams, and all photos have equally many. They
    share what no step changes (`constant`, `shared`): the regions' `keys`, float32 (photos, heads,
    width, regions), and `values`, (photos, heads, regions, width).
    """

    attends = True
    constant = shared = frozenset({"keys", "values"})

    def __init__(self, config: CnnLstmConfig) -> None:
        super().__init__()
        channels = BACKBONES[config.backbone].channels
        width = config.hidden_size
        self.heads = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.key = nn.Linear(channels, width)
        self.value = nn.Linear(channels, width)
        self.first = nn.Linear(width, 2 * width)
        self.query = nn.Linear(width, 2 * width)  # and the gate
        self.embedding = nn.Embedding(config.vocabulary_size, config.embed_size, padding_idx=0)
        self.lstm = nn.LSTM(config.embed_size + width, width, batch_first=True)
        self.deep = nn.Linear(2 * width, config.embed_size)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary_size))
        nn.init.normal_(self.embedding.weight, std=config.embed_size**-0.5)

    def start(self, features: Tensor) -> State:
        """The state before `<SOS>`, from the map, (batch, channels, rows, columns)."""
        regions = self.dropout(features.flatten(2).transpose(1, 2))
        keys, values = self.key(regions), self.value(regions)
        # A pool, since onnxruntime sums a mean over this axis in another order for several photos.
        mean = F.avg_pool1d(values.transpose(1, 2), values.shape[1]).squeeze(2)
        first = self.first(mean)
        hidden, cell = first.tanh().chunk(2, dim=1)
        keys, values = (part.unflatten(2, (self.heads, -1)) for part in (keys, values))
        return {
            "hidden": hidden,
            "cell": cell,
            "keys": keys.permute(0, 2, 3, 1).contiguous(),
            "values": values.transpose(1, 2).contiguous(),
        }

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One word: int64 (batch,) to logits (batch, vocabulary) and the next state, in which
        `attention`, (batch, regions), says where this step looked."""
        words = self.embedding(tokens)
        context, attention = self._look(state)
        state = {**state, **self._advance(words, context, state), "attention": attention}
        return self._logits(words, state["hidden"], context), state

    def _look(self, state: State) -> tuple[Tensor, Tensor]:
        """What is seen, gated, (rows, hidden_size), and the heads' mean attention, (rows, regions).
        All photos have equally many rows."""
        keys, values = state["keys"], state["values"]
        query, gate = self.query(state["hidden"]).chunk(2, dim=1)
        # (photos, heads, rows of a photo, width)
        queries = query.view(keys.shape[0], -1, self.heads, keys.shape[2]).transpose(1, 2)
        weights = (queries @ keys * keys.shape[2] ** -0.5).softmax(-1)
        seen = (weights @ values).transpose(1, 2).reshape(query.shape)
        return seen * gate.sigmoid(), weights.mean(1).flatten(0, 1)

    def _advance(self, words: Tensor, context: Tensor, state: State) -> State:
        inputs = torch.cat([words, context], dim=1)
        before = state["hidden"], state["cell"]
        hidden, cell = torch.lstm_cell(inputs, before, *self.lstm.all_weights[0])
        return {"hidden": hidden, "cell": cell}

    def _logits(self, words: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        deep = (self.deep(torch.cat([hidden, context], dim=-1)) + words).tanh()
        return F.linear(self.dropout(deep), self.embedding.weight, self.bias)

    def forward(self, features: Tensor, captions: Tensor, lengths: Tensor) -> Predicted:
        """All steps, for training.

        Args:
            features: the map of each photo, (photos, channels, rows, columns).
            captions: int64 (rows, time), `<SOS> ... <EOS>`, padded; equally many for each photo,
                one photo after the other.
            lengths: int64 (rows,) on the CPU, the ids of each caption that are not padding.
        Returns:
            What each word but the last predicts.
        """
        state = self.start(features)
        each = len(captions) // len(features)
        for name in ("hidden", "cell"):
            state[name] = state[name].repeat_interleave(each, dim=0)
        words = self.dropout(self.embedding(captions[:, :-1]))
        steps = []
        for word in words.unbind(1):
            context, attention = self._look(state)
            state = {**state, **self._advance(word, context, state)}
            steps.append((state["hidden"], context, attention))
        hidden, context, attention = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
        packed = [
            pack_padded_sequence(part, lengths - 1, batch_first=True, enforce_sorted=False)
            for part in (words, hidden, context)
        ]
        logits = self._logits(*(part.data for part in packed))
        return predicted(logits, captions[:, 1:], lengths - 1, attention)
