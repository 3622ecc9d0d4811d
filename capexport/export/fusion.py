"""Operators that are one node in the graph where Transformers' modules would become many.

While a model is traced, this module replaces the arithmetic of its modules. Attention with its
key/value cache becomes onnxruntime's `MultiHeadAttention`; a linear layer becomes a product with
its weight as it is stored; in self-attention, one product gives queries, keys and values.
onnxruntime itself fuses the patterns that it knows (a quantised product and its bias, the parts of
T5's norm) when it loads the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import torch
from onnx import helper
from torch import Tensor, cat, nn
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm


@contextmanager
def fused_modules() -> Iterator[None]:
    """A block in which modules can be exported, but not run: PyTorch cannot compute the new
    operators."""
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


def join_projections(part: nn.Module, scratch: Path) -> None:
    """Give each self-attention one matrix for queries, keys and values, for `fused_modules`; the
    three become parts of it. It is mapped from a file in `scratch`, not held in memory."""
    for module in part.modules():
        if isinstance(module, OPTAttention):
            layers = [module.q_proj, module.k_proj, module.v_proj]
        elif isinstance(module, T5Attention) and module.k is not None:
            layers = [module.q, module.k, module.v]
        else:
            continue
        first = layers[0].weight
        rows = [layer.out_features for layer in layers]
        file = scratch / "joined"
        joined = torch.from_file(
            str(file), shared=True, size=sum(rows) * first.shape[1], dtype=first.dtype
        ).view(sum(rows), -1)
        file.unlink()  # it lives on as long as the mapping
        for layer, block in zip(layers, joined.split(rows), strict=True):
            layer.weight = nn.Parameter(block.copy_(layer.weight), requires_grad=False)
        module.register_parameter("qkv_weight", nn.Parameter(joined, requires_grad=False))


def _linear(self: nn.Linear, inputs: Tensor) -> Tensor:
    product = _product(inputs, self.weight)
    return product if self.bias is None else product + self.bias


def _product(inputs: Tensor, weight: Tensor) -> Tensor:
    # ONNX's own MatMul would need the weight transposed: a copy of all weights.
    shape = (*inputs.shape[:-1], weight.shape[0])
    name, operands = "com.microsoft::FusedMatMul", (inputs, weight)
    return symbolic(name, operands, {"transB": 1}, dtype=inputs.dtype, shape=shape, version=1)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    mask: Tensor | None = None,
    past: tuple[Tensor, ...] = (),
    bias: Tensor | None = None,
) -> list[Tensor]:
    """Context (batch, length, width) and, with a past, keys and values, (batch, heads, total,
    width of a head) each. `query` is (batch, length, width); `key` and `value` are that too, or as
    the cache has them. `mask` is added to the scores, `bias` to query, key and value."""
    shapes: list[Any] = [query.shape]
    for tensor in past:
        batch, _, length, width = tensor.shape
        shapes.append((batch, heads, length + key.shape[1], width))
    return list(
        symbolic_multi_out(
            "com.microsoft::MultiHeadAttention",
            (query, key, value, bias, None, mask, *past),
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
    query, key, value = _product(hidden_states, self.qkv_weight).chunk(3, dim=-1)
    biases = [projection.bias for projection in (self.q_proj, self.k_proj, self.v_proj)]
    context, layer.keys, layer.values = _attention(
        query, key, value, self.num_heads, self.scaling, attention_mask,
        (layer.keys, layer.values), None if biases[0] is None else cat(biases),
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
        query, key, value = self.q(hidden_states), layer.keys, layer.values
    else:
        query, key, value = _product(hidden_states, self.qkv_weight).chunk(3, dim=-1)
        if past_key_values is not None:
            layer = past_key_values.self_attention_cache.layers[self.layer_idx]
            past = layer.keys, layer.values
    if position_bias is None:  # that is, in the first block: it is handed on
        total = key.shape[-2] + (past[0].shape[2] if past else 0)
        position_bias = mask[..., :total].expand(-1, -1, hidden_states.shape[1], -1)
        if self.has_relative_attention_bias:
            device = hidden_states.device
            position_bias = position_bias + self.compute_bias(None, total, device, cache_position)
    context, *present = _attention(query, key, value, self.n_heads, 1.0, position_bias, past)
    if past:
        layer.keys, layer.values = present
    return self.o(context), position_bias


def _t5_layer_norm(self: T5LayerNorm, inputs: Tensor) -> Tensor:
    # onnxruntime knows a norm by its quotient, but the original multiplies by the reciprocal.
    root = (inputs.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
    return self.weight * (inputs / root).to(self.weight.dtype)


def fuse_skip_connections(graph: onnx.GraphProto) -> None:
    """Make one `SkipLayerNormalization` of each sum and the layer norm behind it, and of the bias
    that a linear layer adds before it.

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
    biased = _biased_products(graph)
    for norm in [node for node in graph.node if node.op_type == "LayerNormalization"]:
        if (total := sums.pop(norm.input[0], None)) is None:
            continue
        terms, bias = list(total.input), ""
        for index, name in enumerate(terms):
            if not bias and name in biased:
                terms[index], bias = biased[name].input
                graph.node.remove(biased[name])
        fused = helper.make_node(
            "SkipLayerNormalization",
            [*terms, *norm.input[1:], *([bias] if bias else [])],
            [norm.output[0], "", "", total.output[0]],
            domain="com.microsoft",
            epsilon=helper.get_node_attr_value(norm, "epsilon"),
        )
        total.CopyFrom(fused)
        graph.node.remove(norm)


def _biased_products(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The sums of a matrix product and its bias that one node alone takes, by their names."""
    products = {node.output[0] for node in graph.node if node.op_type == "FusedMatMul"}
    vectors = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
    uses = Counter(name for node in graph.node for name in node.input)
    return {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Add"
        and node.input[0] in products
        and node.input[1] in vectors
        and uses[node.output[0]] == 1
    }
