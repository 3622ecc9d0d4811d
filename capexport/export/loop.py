"""Greedy decoding as one graph: the step graph inside an ONNX `Loop`.

A caption then takes two calls of onnxruntime, of the encoder and of the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser

# `Loop` takes a trip count, a condition and the values that are carried from step to step; its body
# gives the condition, the carried values and what is collected (https://onnx.ai/onnx/operators).
# Rows that have ended go on with the others: their log-probability no longer changes, and their
# words behind the end token don't count.
_GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
decoder_loop (int64 max_tokens, int64 min_tokens, {all_states})
    => (int64[steps, batch] words, float[batch] log_probabilities)
{{
    rows = Shape <start = 0, end = 1> ({first_state})
    first_token = Expand (start_token, rows)
    none_ended = Expand (no, rows)
    no_log = Expand (zero, rows)
    last_token, {last_states}, last_ended, log_probabilities, words = Loop <body = step (
        int64 position, bool go_on, int64[batch] tokens, {states}, bool[batch] ended,
        float[batch] log_before
    ) => (
        bool going, int64[batch] next_tokens, {next_states}, bool[batch] next_ended,
        float[batch] log_after, int64[batch] chosen
    ) {{
        early = Less (position, min_tokens)
        excluded = Where (early, not_yet, never)
        scores = Add (logits, excluded)
        next_tokens = ArgMax <axis = 1, keepdims = 0> (scores)
        logs = LogSoftmax <axis = 1> (scores)
        best = ReduceMax <keepdims = 0> (logs, last_axis)
        gain = Where (ended, zero, best)
        log_after = Add (log_before, gain)
        ends = Equal (next_tokens, end_token)
        next_ended = Or (ended, ends)
        running = Not (next_ended)
        going = ReduceMax <keepdims = 0> (running)
        chosen = Identity (next_tokens)
    }}> (max_tokens, yes, first_token, {first_names}, none_ended, no_log)
}}
"""


def loop_graph(
    step: onnx.ModelProto,
    state: Mapping[str, str],
    start_token: int,
    end_token: int,
    suppress_tokens: Sequence[int],
) -> onnx.ModelProto:
    """`greedy` of capexport.decoding over `step`, without a repetition penalty.

    Args:
        step: the step graph; its initializers, external ones too, become the new graph's.
        state: each input of `step` that changes from step to step, and the output that holds its
            next value. Its other inputs, but for `tokens`, are constant: the loop's body takes
            them from outside.
    Returns:
        A graph of `max_tokens` and `min_tokens`, int64 scalars, `first_<name>` of each state, and
        the constant inputs as they are, to `words`, int64 (steps, batch), their token ids, and
        `log_probabilities`, float32 (batch,). A row's words count up to its first `end_token`.
    """
    values = {node.name: node for node in (*step.graph.input, *step.graph.output)}
    constant = [v.name for v in step.graph.input if v.name not in ("tokens", *state)]

    def typed(names: Iterable[str], prefix: str = "") -> list[str]:
        return [typed_value(values[name], prefix + name) for name in names]

    inputs, outputs = list(state), list(state.values())
    constants = {
        "start_token": np.int64(start_token),
        "end_token": np.int64(end_token),
        "zero": np.float32(0),
        "no": np.bool_(False),
        "yes": np.bool_(True),
        "last_axis": np.array([1]),
        **barred(step, suppress_tokens, [end_token]),
    }
    return loop_around(
        step,
        _GRAPH,
        constants,
        all_states=", ".join(typed(inputs, "first_") + typed(constant)),
        first_state=f"first_{inputs[0]}",
        first_names=", ".join(f"first_{name}" for name in inputs),
        last_states=", ".join(f"last_{name}" for name in inputs),
        states=", ".join(typed(inputs)),
        next_states=", ".join(typed(outputs)),
    )


def loop_around(
    step: onnx.ModelProto, text: str, constants: Mapping[str, Any], **parts: str
) -> onnx.ModelProto:
    """The graph that `text` describes, with `step` at the beginning of its loop's body.

    Args:
        text: in the syntax of ONNX's parser, with places for `parts` and the versions of `step`.
        constants: the initializers that `text` names; those of `step` are added.
    """
    model = parser.parse_model(
        text.format(ir_version=step.ir_version, opset=opset_of(step), **parts)
    )
    [body] = [node.attribute[0].g for node in model.graph.node if node.op_type == "Loop"]
    choosing = list(body.node)
    del body.node[:]
    body.node.extend([*step.graph.node, *choosing])
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    )
    model.graph.initializer.extend(step.graph.initializer)
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    return next(item.version for item in model.opset_import if not item.domain)


def vocabulary_size(step: onnx.ModelProto) -> int:
    """How many logits a step has."""
    [logits] = [value for value in step.graph.output if value.name == "logits"]
    return int(logits.type.tensor_type.shape.dim[-1].dim_value)


def barred(
    step: onnx.ModelProto, suppress_tokens: Sequence[int], end_tokens: Sequence[int]
) -> dict[str, Any]:
    """What is added to logits, float32 (vocabulary,): minus infinity for tokens that are `never`
    said; in `not_yet`, which counts before `min_tokens`, for end tokens, too."""
    never = np.zeros(vocabulary_size(step), np.float32)
    never[list(suppress_tokens)] = -np.inf
    not_yet = never.copy()
    not_yet[list(end_tokens)] = -np.inf
    return {"never": never, "not_yet": not_yet}


def typed_value(value: onnx.ValueInfoProto, name: str, batch: str = "batch") -> str:
    """An input or output with its type, in the syntax of ONNX's parser; axis 0 is the batch."""
    tensor = value.type.tensor_type
    axes = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return f"{kind}[{', '.join([batch, *axes[1:]])}] {name}"
