"""BLIP-2 in parts: modules that become graphs, and what Optimum must know of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import torch
from optimum.exporters.onnx import OnnxConfig
from optimum.utils import NormalizedConfig
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from capexport.export.fusion import fuse_skip_connections
from capexport.export.graph import strip_traces

# By name of an input or output, its free axes.
Axes: TypeAlias = dict[str, dict[int, str]]


class VisionEncoder(nn.Module):
    """Pixels through vision transformer, Q-Former and projection to the language model's width."""

    def __init__(self, blip2: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.config = blip2.config.text_config
        self.vision_model = blip2.vision_model
        self.qformer = blip2.qformer
        self.query_tokens = blip2.query_tokens
        self.language_projection = blip2.language_projection
        self._get_image_features = type(blip2).get_image_features

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self._get_image_features(self, pixel_values)


class EmbedTokens(nn.Module):
    """Token ids to embeddings."""

    def __init__(self, blip2: Blip2ForConditionalGeneration, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = blip2.config.text_config
        self.embed_tokens = blip2.get_input_embeddings()
        self.dtype = dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids).to(self.dtype)


class OptDecoder(nn.Module):
    """OPT from embeddings to the logits of the last position.

    Positions are counted as `generate()` counts them (`prepare_inputs_for_generation`): over the
    unmasked tokens, and 1 for a masked one.
    """

    def __init__(self, blip2: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.config = blip2.config.text_config
        self.decoder = blip2.language_model.model.decoder
        self.lm_head = blip2.language_model.lm_head
        self.decoder.embed_tokens = None

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, past_key_values: DynamicCache
    ) -> tuple[Tensor, ...]:
        positions = (attention_mask.cumsum(1) - 1).masked_fill(attention_mask == 0, 1)
        output = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=positions[:, -inputs_embeds.shape[1] :],
            past_key_values=past_key_values,
            use_cache=True,
        )
        logits = self.lm_head(output.last_hidden_state[:, -1]).float()
        present = output.past_key_values.to_legacy_cache()
        return logits, *(tensor for layer in present for tensor in layer)


class T5Encoder(nn.Module):
    """T5's encoder, and the keys and values that its decoder's cross-attention takes from it."""

    def __init__(self, blip2: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.config = blip2.config.text_config
        self.encoder = blip2.language_model.encoder
        self.encoder.embed_tokens = None
        blocks = blip2.language_model.decoder.block
        attentions = [block.layer[1].EncDecAttention for block in blocks]
        self.keys = nn.ModuleList(attention.k for attention in attentions)
        self.values = nn.ModuleList(attention.v for attention in attentions)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        hidden = self.encoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask
        ).last_hidden_state
        heads = (*hidden.shape[:2], self.config.num_heads, self.config.d_kv)
        return tuple(
            projection(hidden).view(heads).transpose(1, 2)
            for layer in zip(self.keys, self.values, strict=True)
            for projection in layer
        )


class T5Decoder(nn.Module):
    """T5's decoder from embeddings to the logits of the last position."""

    def __init__(self, blip2: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.config = blip2.config.text_config
        self.decoder = blip2.language_model.decoder
        self.decoder.embed_tokens = None
        self.lm_head = blip2.language_model.lm_head
        for block in self.decoder.block:  # theirs are computed by T5Encoder
            block.layer[1].EncDecAttention.k = block.layer[1].EncDecAttention.v = None

    def forward(
        self,
        inputs_embeds: Tensor,
        encoder_attention_mask: Tensor,
        past_key_values: EncoderDecoderCache,
    ) -> tuple[Tensor, ...]:
        output = self.decoder(
            inputs_embeds=inputs_embeds,
            # Never read, since the cross-attention's keys are there; but it must not be None.
            encoder_hidden_states=past_key_values.cross_attention_cache.layers[0].keys[:, 0],
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, -1]
        if self.config.tie_word_embeddings:
            hidden = hidden * self.config.d_model**-0.5
        present = output.past_key_values.self_attention_cache.to_legacy_cache()
        return self.lm_head(hidden).float(), *(tensor for layer in present for tensor in layer)


class PartConfig(OnnxConfig):
    """What Optimum's exporter asks about a part: names, dynamic axes and example inputs."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    fused_norms = True  # whether a norm and the sum before it become one node
    use_past = False  # Optimum sets `use_cache` of every submodule to it

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(part.config, float_dtype={torch.float16: "fp16"}.get(dtype, "fp32"))
        self.dtype = dtype

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        """Inputs of the module for a batch, a sequence and a cache of these sizes."""
        raise NotImplementedError

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, Any]:
        # A trace of a cache of length 0 would hold for no other (transformers DynamicLayer).
        return self.examples(2, 6, 3)

    def _floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.dtype)

    @property
    def past_names(self) -> list[str]:
        return [name for name in self.inputs if name.startswith("past_key_values.")]

    def flatten(self, past: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """The cache by the names of the graph's inputs."""
        tensors = [tensor for layer in past for tensor in layer]
        return dict(zip(self.past_names, tensors, strict=True))

    def flatten_output_collection_property(  # type: ignore[override]
        self, name: str, field: Any
    ) -> dict[str, Any]:
        return self.flatten(field)

    def fix_dynamic_axes(self, model_path: Path, **_: Any) -> None:
        """Name the dynamic axes as this configuration does.

        Optimum's own opens a session on the whole part, and freezes the axes that the exporter
        named after a sum of others.
        """
        model = onnx.load(model_path, load_external_data=False)
        if self.fused_norms:
            fuse_skip_connections(model.graph)  # which compares shapes: before their names change
        axes = {**self.inputs, **self.outputs}
        for value in (*model.graph.input, *model.graph.output):
            for axis, name in axes[value.name].items():
                value.type.tensor_type.shape.dim[axis].dim_param = name
        strip_traces(model)
        onnx.save(model, model_path)


class VisionEncoderConfig(PartConfig):
    @property
    def inputs(self) -> Axes:
        return {"pixel_values": {0: "batch_size"}}

    @property
    def outputs(self) -> Axes:
        return {"image_features": {0: "batch_size"}}

    def __init__(self, part: nn.Module, dtype: torch.dtype, image_size: int) -> None:
        super().__init__(part, dtype)
        self.image_size = image_size

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        return {"pixel_values": self._floats(batch, 3, self.image_size, self.image_size).float()}


class EmbedTokensConfig(PartConfig):
    @property
    def inputs(self) -> Axes:
        return {"input_ids": {0: "batch_size", 1: "sequence_length"}}

    @property
    def outputs(self) -> Axes:
        return {"inputs_embeds": {0: "batch_size", 1: "sequence_length"}}

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        ids = torch.arange(batch * length) * 37 % self._config.vocab_size
        return {"input_ids": ids.view(batch, length)}


def _mask(batch: int, length: int) -> Tensor:
    """Ones, but for padding in all rows after the first: behind the image's places, which come
    first in every prompt."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, 1 : 1 + length // 3] = 0
    return mask


class OptDecoderConfig(PartConfig):
    use_past = True

    @property
    def inputs(self) -> Axes:
        return {
            "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
            "attention_mask": {0: "batch_size", 1: "total_length"},
            **_cache_axes("past_key_values", self._config.num_hidden_layers, "past_length"),
        }

    @property
    def outputs(self) -> Axes:
        cache = _cache_axes("present", self._config.num_hidden_layers, "total_length")
        return {"logits": {0: "batch_size"}, **cache}

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        config = self._config
        heads = config.num_attention_heads
        cache = (batch, heads, past, config.hidden_size // heads)
        return {
            "inputs_embeds": self._floats(batch, length, config.word_embed_proj_dim),
            "attention_mask": _mask(batch, past + length),
            "past_key_values": [
                (self._floats(*cache), self._floats(*cache))
                for _ in range(config.num_hidden_layers)
            ],
        }


class T5EncoderConfig(PartConfig):
    @property
    def inputs(self) -> Axes:
        axes = {0: "batch_size", 1: "sequence_length"}
        return {"inputs_embeds": axes, "attention_mask": axes}

    @property
    def outputs(self) -> Axes:
        layers = self._config.num_decoder_layers
        return _cache_axes("past_key_values", layers, "sequence_length", ".encoder")

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        return {
            "inputs_embeds": self._floats(batch, length, self._config.d_model),
            "attention_mask": _mask(batch, length),
        }


class T5DecoderConfig(PartConfig):
    use_past = True

    @property
    def inputs(self) -> Axes:
        layers = self._config.num_decoder_layers
        own = _cache_axes("past_key_values", layers, "past_length", ".decoder")
        cross = _cache_axes("past_key_values", layers, "encoder_length", ".encoder")
        past = {**own, **cross}
        return {
            "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
            "encoder_attention_mask": {0: "batch_size", 1: "encoder_length"},
            # Layer by layer, as Transformers' cache has them.
            **{name: past[name] for name in sorted(past, key=lambda name: int(name.split(".")[1]))},
        }

    @property
    def outputs(self) -> Axes:
        layers = self._config.num_decoder_layers
        cache = _cache_axes("present", layers, "total_length", ".decoder")
        return {"logits": {0: "batch_size"}, **cache}

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        config = self._config
        encoded = past + length + 2
        own, cross = ((batch, config.num_heads, size, config.d_kv) for size in (past, encoded))
        return {
            "inputs_embeds": self._floats(batch, length, config.d_model),
            "encoder_attention_mask": _mask(batch, encoded),
            "past_key_values": [
                tuple(self._floats(*shape) for shape in (own, own, cross, cross))
                for _ in range(config.num_decoder_layers)
            ],
        }


def _cache_axes(prefix: str, layers: int, length: str, owner: str = "") -> Axes:
    """Keys and values of all layers, (batch, heads, length, width) each."""
    return {
        f"{prefix}.{layer}{owner}.{kind}": {0: "batch_size", 2: length}
        for layer in range(layers)
        for kind in ("key", "value")
    }


@dataclass(frozen=True)
class Plan:
    """A part of the model that becomes a graph: its name, module, configuration and weights."""

    name: str
    build: Callable[[Blip2ForConditionalGeneration], nn.Module]
    configure: Callable[[nn.Module], PartConfig]
    dtype: torch.dtype


def plan_parts(config: Blip2Config, precision: str) -> list[Plan]:
    compute = torch.float16 if precision == "fp16" else torch.float32
    # Rows are looked up in this one, never multiplied: half of float32's size costs nothing.
    stored = torch.float32 if precision == "fp32" else torch.float16
    size = config.vision_config.image_size
    language: list[tuple[str, type[nn.Module], type[PartConfig]]]
    if config.text_config.model_type == "opt":
        language = [("decoder_model_merged", OptDecoder, OptDecoderConfig)]
    else:
        language = [
            ("encoder_model", T5Encoder, T5EncoderConfig),
            ("decoder_model_merged", T5Decoder, T5DecoderConfig),
        ]
    return [
        Plan(
            "vision_encoder",
            VisionEncoder,
            lambda part: VisionEncoderConfig(part, compute, size),
            compute,
        ),
        Plan(
            "embed_tokens",
            lambda blip2: EmbedTokens(blip2, compute),
            lambda part: EmbedTokensConfig(part, compute),
            stored,
        ),
        *(
            Plan(name, build, partial(configure, dtype=compute), compute)
            for name, build, configure in language
        ),
    ]
