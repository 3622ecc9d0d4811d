"""The CNN-LSTM captioner: a backbone's features, projected, are the first input of an LSTM.

The "Show and Tell" arrangement (Vinyals et al. 2015, section 3.1), by default on MobileNetV2
(Sandler et al. 2018): the image feature comes before `<SOS>`, which is therefore the first word
that the network learns to predict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from capexport.models.backbones import BACKBONES

# By name: hidden and cell, float32 (batch, hidden_size) each.
State: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class CnnLstmConfig:
    """Sizes of the network: `embed_size` is the width of image feature and word embedding;
    `backbone` is the name of one of `BACKBONES`."""

    vocabulary_size: int
    embed_size: int = 256
    hidden_size: int = 512
    backbone: str = "mobilenet_v2"

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            known = ", ".join(BACKBONES)
            raise ValueError(f"backbone must be one of {known}; got {self.backbone!r}")


class ImageEncoder(nn.Module):
    """Backbone and average pooling, then linear and batch norm to the image feature."""

    def __init__(self, config: CnnLstmConfig) -> None:
        super().__init__()
        self.architecture = BACKBONES[config.backbone]
        self.backbone = self.architecture.build()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(self.architecture.channels, config.embed_size)
        self.norm = nn.BatchNorm1d(config.embed_size)

    def regions(self, images: Tensor) -> Tensor:
        """float32 (batch, 3, height, width) to the map, (batch, channels, rows, columns)."""
        return self.backbone(images)

    def pooled(self, images: Tensor) -> Tensor:
        """float32 (batch, 3, height, width) to the map's mean, (batch, channels)."""
        return self.pool(self.regions(images)).flatten(1)

    def project(self, pooled: Tensor) -> Tensor:
        """(batch, channels) to the image feature, (batch, embed_size)."""
        return self.norm(self.linear(pooled))

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.pooled(images))


class CaptionDecoder(nn.Module):
    """Word embedding, one LSTM layer, and the projection to the vocabulary.

    `constant` are the names in its state that stay as they are from step to step.
    `step_by_module` takes single steps through `nn.LSTM` instead of the call behind
    `nn.LSTMCell`: the same arithmetic, and on some machines and batch sizes the faster one.
    """

    step_by_module = False
    constant: frozenset[str] = frozenset()

    def __init__(self, config: CnnLstmConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.embedding = nn.Embedding(config.vocabulary_size, config.embed_size, padding_idx=0)
        self.lstm = nn.LSTM(config.embed_size, config.hidden_size, batch_first=True)
        self.output = nn.Linear(config.hidden_size, config.vocabulary_size)

    def start(self, feature: Tensor) -> State:
        """The state after the image feature, (batch, embed_size)."""
        zeros = feature.new_zeros(feature.shape[0], self.hidden_size)
        return self._advance(feature, {"hidden": zeros, "cell": zeros})

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One word: int64 (batch,) to logits (batch, vocabulary) and the next state."""
        state = self._advance(self.embedding(tokens), state)
        return self.output(state["hidden"]), state

    def _advance(self, inputs: Tensor, state: State) -> State:
        before = state["hidden"], state["cell"]
        if self.step_by_module:
            _, after = self.lstm(inputs[:, None], tuple(value[None] for value in before))
            hidden, cell = (value[0] for value in after)
        else:
            # This exports as two Gemm nodes and the gates, nn.LSTM as an LSTM node amid reshapes.
            hidden, cell = torch.lstm_cell(inputs, before, *self.lstm.all_weights[0])
        return {"hidden": hidden, "cell": cell}

    def forward(self, feature: Tensor, captions: Tensor, lengths: Tensor) -> PackedSequence:
        """All steps at once, for training.

        Args:
            feature: image feature, (batch, embed_size).
            captions: int64 (batch, time), `<SOS> ... <EOS>`, padded to the longest.
            lengths: int64 (batch,) on the CPU, the ids of each caption that are not padding.
        Returns:
            Logits that predict `captions`, packed: what the image feature predicts, then what
            each word but the last does.
        """
        inputs = torch.cat([feature[:, None], self.embedding(captions[:, :-1])], dim=1)
        packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = self.lstm(packed)
        return outputs._replace(data=self.output(outputs.data))


class CnnLstm(nn.Module):
    """Encoder and decoder. The backbone stays frozen, batch-norm statistics too, unless
    `train_backbone` is set."""

    def __init__(self, config: CnnLstmConfig, train_backbone: bool = False) -> None:
        super().__init__()
        self.config = config
        self.train_backbone = train_backbone
        self.encoder = ImageEncoder(config)
        self.decoder = CaptionDecoder(config)
        self.encoder.backbone.requires_grad_(train_backbone)

    def train(self, mode: bool = True) -> CnnLstm:
        super().train(mode)
        if not self.train_backbone:
            self.encoder.backbone.eval()
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def start(self, images: Tensor) -> State:
        """float32 (batch, 3, height, width) to the decoder's state before `<SOS>`."""
        return self.decoder.start(self.encoder(images))
