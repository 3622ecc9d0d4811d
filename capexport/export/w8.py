"""8-bit weights, but arithmetic in float32: an int8 graph without the rounding of its activations.

WebAssembly multiplies float32 faster than bytes, and without that rounding a caption is the same on
every kind of processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


def keep_weight_bytes(model: onnx.ModelProto) -> None:
    """Turn an int8 graph, in QDQ format, into one whose weights alone are bytes.

    Activations are no longer rounded, but still clipped to the range of their bytes, which is how
    the int8 graph does ReLU6. Weights are widened by operators that onnxruntime computes once, when
    it loads the graph; it would compute a DequantizeLinear every time.
    """
    graph = model.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    made: dict[str, NDArray[Any]] = {}
    instead: dict[str, str] = {}
    for node in graph.node:
        node.input[:] = [instead.get(name, name) for name in node.input]
        if node.op_type == "QuantizeLinear":
            nodes.append(_clip(node, stored, made))
        elif node.op_type == "DequantizeLinear" and node.input[0] in stored:
            nodes += _widen(node, stored, made)
        elif node.op_type == "DequantizeLinear":
            instead[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    for value in graph.output:
        if value.name in instead:
            nodes.append(helper.make_node("Identity", [instead[value.name]], [value.name]))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in made.items())


def _clip(
    node: onnx.NodeProto,
    stored: Mapping[str, NDArray[Any]],
    made: dict[str, NDArray[Any]],
) -> onnx.NodeProto:
    """To the range of a QuantizeLinear's bytes."""
    value, scale, zero_point = (stored.get(name) for name in node.input)
    assert value is None and scale is not None and zero_point is not None
    bytes_held = np.iinfo(zero_point.dtype)
    names = [f"{node.output[0]}.low", f"{node.output[0]}.high"]
    for name, limit in zip(names, (bytes_held.min, bytes_held.max), strict=True):
        made[name] = (np.float32(limit) - zero_point.astype(np.float32)) * scale
    return helper.make_node("Clip", [node.input[0], *names], list(node.output))


def _widen(
    node: onnx.NodeProto,
    stored: Mapping[str, NDArray[Any]],
    made: dict[str, NDArray[Any]],
) -> list[onnx.NodeProto]:
    """What a DequantizeLinear does with weights."""
    weights, scale, zero_point = (stored[name] for name in node.input)
    shape = [1] * weights.ndim
    if scale.ndim:
        [axis] = [item.i for item in node.attribute if item.name == "axis"] or [1]
        shape[axis] = -1
    [output] = node.output
    numbers, centred, scales = f"{output}.numbers", f"{output}.centred", f"{output}.scale"
    made[scales] = scale.reshape(shape)
    nodes = [helper.make_node("Cast", [node.input[0]], [numbers], to=onnx.TensorProto.FLOAT)]
    if zero_point.any():
        made[f"{output}.zero"] = zero_point.astype(np.float32).reshape(shape)
        nodes.append(helper.make_node("Sub", [numbers, f"{output}.zero"], [centred]))
        numbers = centred
    return [*nodes, helper.make_node("Mul", [numbers, scales], [output])]
