"""Operators that are one node in the graph where Transformers' modules would become many.

While a model is traced its modules' own arithmetic is replaced: attention, its key/value cache
included, becomes onnxruntime's `MultiHeadAttention`, and a linear layer a product with its weight
as it is stored. Patterns that onnxruntime knows (a quantised product and its bias, the parts of
T5's norm) it fuses by itself when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import onnx
from onnx import helper
from torch import Tensor, nn
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm


@contextmanager
def fused_modules() -> Iterator[None]:
    """Within it modules can be exported, but not run: the new operators have no values here."""
    forwards = {
        nn.Linear: _linear,
        Blip2Attention: _vision_attention,
        OPTAttention: _opt_attention,
        OPTDecoderLayer: _opt_layer,
        T5Attention: _t5_attention,
        T5LayerNorm: _t5_layer_norm,
        NewGELUActivation: lambda _, inputs: nn.functional.gelu(inputs, approximate="tanh"),
    }
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.enter_context(mock.patch.object(module, "forward", forward))
        yield


def _linear(self: nn.Linear, inputs: Tensor) -> Tensor:
    # ONNX's own MatMul would need the weight transposed: a copy of all weights.
    shape = (*inputs.shape[:-1], self.out_features)
    name, operands = "com.microsoft::FusedMatMul", (inputs, self.weight)
    product = symbolic(name, operands, {"transB": 1}, dtype=inputs.dtype, shape=shape, version=1)
    return product if self.bias is None else product + self.bias


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    bias: Tensor | None = None,
    past: tuple[Tensor, ...] = (),
) -> list[Tensor]:
    """Context (batch, length, width) and, with a past, keys and values, (batch, heads, total,
    width of a head) each. `query` is (batch, length, width); `key` and `value` are that too, or as
    the cache has them."""
    shapes: list[Any] = [query.shape]
    for tensor in past:
        batch, _, length, width = tensor.shape
        shapes.append((batch, heads, length + key.shape[1], width))
    return list(
        symbolic_multi_out(
            "com.microsoft::MultiHeadAttention",
            (query, key, value, None, None, bias, *past),
            {"num_heads": heads, "scale": scale},
            dtypes=[query.dtype] * len(shapes),
            shapes=shapes,
            version=1,
        )
    )


def _vision_attention(self: Blip2Attention, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
    [context] = _attention(query, key, value, self.num_heads, self.scale)
    return self.projection(context), None


def _opt_attention(
    self: OPTAttention,
    hidden_states: Tensor,
    past_key_values: Cache,
    attention_mask: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    layer = past_key_values.layers[self.layer_idx]
    context, layer.keys, layer.values = _attention(
        self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states),
        self.num_heads, self.scaling, attention_mask, (layer.keys, layer.values),
    )  # fmt: skip
    return self.out_proj(context), None


def _opt_layer(self: OPTDecoderLayer, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor]:
    """As the original, which flattens batch and sequence into one axis and back, in any shape."""
    first, second = self.self_attn_layer_norm, self.final_layer_norm
    before = self.do_layer_norm_before
    hidden = first(hidden_states) if before else hidden_states
    hidden = hidden_states + self.self_attn(hidden, **inputs)[0]
    hidden = hidden if before else first(hidden)
    wide = self.activation_fn(self.fc1(second(hidden) if before else hidden))
    hidden = hidden + self.fc2(wide)
    return (hidden if before else second(hidden),)


def _t5_attention(
    self: T5Attention,
    hidden_states: Tensor,
    mask: Tensor,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    cache_position: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    past: tuple[Tensor, ...] = ()
    if key_value_states is not None:  # cross-attention
        layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
        key, value = layer.keys, layer.values
    else:
        key, value = self.k(hidden_states), self.v(hidden_states)
        if past_key_values is not None:
            layer = past_key_values.self_attention_cache.layers[self.layer_idx]
            past = layer.keys, layer.values
    if position_bias is None:  # that is, in the first block: it is handed on
        total = key.shape[-2] + (past[0].shape[2] if past else 0)
        position_bias = mask[..., :total].expand(-1, -1, hidden_states.shape[1], -1)
        if self.has_relative_attention_bias:
            device = hidden_states.device
            position_bias = position_bias + self.compute_bias(None, total, device, cache_position)
    context, *present = _attention(
        self.q(hidden_states), key, value, self.n_heads, 1.0, position_bias, past
    )
    if past:
        layer.keys, layer.values = present
    return self.o(context), position_bias


def _t5_layer_norm(self: T5LayerNorm, inputs: Tensor) -> Tensor:
    # onnxruntime knows a norm by its quotient, but the original multiplies by the reciprocal.
    root = (inputs.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
    return self.weight * (inputs / root).to(self.weight.dtype)


def fuse_skip_connections(graph: onnx.GraphProto) -> None:
    """Make one `SkipLayerNormalization` of each sum and the layer norm behind it.

    onnxruntime, when it loads a graph, does so only where nothing else takes the sum.
    """
    shapes = {value.name: value.type.tensor_type.shape for value in graph.value_info}
    shapes.update({value.name: value.type.tensor_type.shape for value in graph.input})
    sums = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Add"
        and all(name in shapes and shapes[name] == shapes[node.input[0]] for name in node.input)
    }
    for norm in [node for node in graph.node if node.op_type == "LayerNormalization"]:
        if (total := sums.pop(norm.input[0], None)) is None:
            continue
        fused = helper.make_node(
            "SkipLayerNormalization",
            [*total.input, *norm.input[1:]],
            [norm.output[0], "", "", total.output[0]],
            domain="com.microsoft",
            epsilon=helper.get_node_attr_value(norm, "epsilon"),
        )
        total.CopyFrom(fused)
        graph.node.remove(norm)
