"""The CNN-LSTM captioner: a backbone's features, projected, are the first input of an LSTM.

The "Show and Tell" arrangement (Vinyals et al. 2015, section 3.1), by default on MobileNetV2
(Sandler et al. 2018): the image feature comes before `<SOS>`, which is therefore the first word
that the network learns to predict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from capexport.models.attention import AttentionDecoder
from capexport.models.backbones import BACKBONES
from capexport.models.steps import Predicted, State, predicted


@dataclass(frozen=True)
class CnnLstmConfig:
    """Sizes of the network.

    Attributes:
        embed_size: width of word embeddings, and of the image feature of the "lstm" decoder.
        backbone: the name of one of `BACKBONES`.
        decoder: "lstm", which is fed one feature of the image, or "attention", which looks at the
            regions of its map with so many `heads`.
        dropout: share of the "attention" decoder's values that training leaves out.
    """

    vocabulary_size: int
    embed_size: int = 256
    hidden_size: int = 512
    backbone: str = "mobilenet_v2"
    decoder: str = "lstm"
    heads: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("backbone", BACKBONES), ("decoder", DECODERS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}"
                )
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size must be a multiple of its {self.heads} heads, got {self.hidden_size}"
            )


class ImageEncoder(nn.Module):
    """The backbone, and for the "lstm" decoder pooling, linear and batch norm to the image feature.

    Blocks of the backbone from `train_from` on are trained. Those before it are frozen, so what
    they make of an image, `stem`, never changes and can be cached.
    """

    def __init__(self, config: CnnLstmConfig, train_from: int | None = None) -> None:
        super().__init__()
        self.architecture = BACKBONES[config.backbone]
        self.backbone = self.architecture.build()
        self.train_from = len(self.backbone) if train_from is None else train_from
        self.backbone[: self.train_from].requires_grad_(False)
        self.pools = config.decoder == "lstm"
        if self.pools:
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.linear = nn.Linear(self.architecture.channels, config.embed_size)
            self.norm = nn.BatchNorm1d(config.embed_size)

    def stem(self, images: Tensor) -> Tensor:
        """The frozen part: float32 (batch, 3, height, width) to the map after the last frozen
        block, (batch, channels, rows, columns); pooled, (batch, channels), if that is all that the
        rest needs."""
        values = self.backbone[: self.train_from](images)
        if self.pools and self.train_from == len(self.backbone):
            return self.pool(values).flatten(1)
        return values

    def head(self, values: Tensor) -> Tensor:
        """What `stem` made to the image feature, (batch, embed_size), or the whole map."""
        if self.train_from < len(self.backbone):
            values = self.backbone[self.train_from :](values)
            if self.pools:
                values = self.pool(values).flatten(1)
        return self.norm(self.linear(values)) if self.pools else values

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stem(images))


class CaptionDecoder(nn.Module):
    """Word embedding, one LSTM layer, and the projection to the vocabulary.

    Each step changes all of its state, so `constant` and `shared` (as of `capexport.decoding`) are
    empty. `step_by_module` takes single steps through `nn.LSTM` instead of the call behind
    `nn.LSTMCell`: the same arithmetic, and on some machines and batch sizes the faster one.
    """

    step_by_module = False
    attends = False
    constant: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()

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

    def forward(self, feature: Tensor, captions: Tensor, lengths: Tensor) -> Predicted:
        """All steps at once, for training.

        Args:
            feature: image feature of each photo, (photos, embed_size).
            captions: int64 (rows, time), `<SOS> ... <EOS>`, padded; equally many for each photo,
                one photo after the other.
            lengths: int64 (rows,) on the CPU, the ids of each caption that are not padding.
        Returns:
            What the image feature predicts, which is `<SOS>`, then what each word but the last
            does.
        """
        feature = feature.repeat_interleave(len(captions) // len(feature), dim=0)
        inputs = torch.cat([feature[:, None], self.embedding(captions[:, :-1])], dim=1)
        packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = self.lstm(packed)
        return predicted(self.output(outputs.data), captions, lengths)


DECODERS: dict[str, type[CaptionDecoder] | type[AttentionDecoder]] = {
    "lstm": CaptionDecoder,
    "attention": AttentionDecoder,
}


class CnnLstm(nn.Module):
    """Encoder and decoder.

    The backbone's blocks before `train_from` are frozen, by default all of them. Batch norms of the
    backbone keep their statistics; with `update_norms`, only those of frozen blocks do.
    """

    def __init__(
        self, config: CnnLstmConfig, train_from: int | None = None, update_norms: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.update_norms = update_norms
        self.encoder = ImageEncoder(config, train_from)
        self.decoder: CaptionDecoder | AttentionDecoder = DECODERS[config.decoder](config)

    def train(self, mode: bool = True) -> CnnLstm:
        super().train(mode)
        kept = self.encoder.train_from if self.update_norms else len(self.encoder.backbone)
        self.encoder.backbone[:kept].eval()
        return self

    def start(self, images: Tensor) -> State:
        """float32 (batch, 3, height, width) to the decoder's state before `<SOS>`."""
        return self.decoder.start(self.encoder(images))
