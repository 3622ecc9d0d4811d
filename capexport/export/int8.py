"""Static 8-bit quantisation of the CNN-LSTM's graphs.

The quantiser is onnxruntime's own ("Quantize ONNX models" in its documentation, QDQ format):
weights become int8 channel by channel, activations uint8 with ranges found on calibration photos.
The ranges are fixed, so that a photo's caption doesn't depend on the photos beside it; dynamic
quantisation would take them from each batch.

Before that, the weights of a layer are rounded so that their errors cancel, which takes a third off
the error of the image feature. The same photos show which layers must stay in float32. Between
layers, sums, products and activations pass 8 bits on where onnxruntime has kernels for that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from capexport.export.quantize import root_logger_kept
from capexport.sessions import CPU

# A layer stays in float32 if 8-bit inputs would add more noise than this share of the standard
# deviation of its outputs. In MobileNetV2 it is 0.36 for the first depthwise convolution, whose
# channels differ most in range, and at most 0.04 for any other layer.
_LARGEST_NOISE = 0.1
_DAMPING = 0.01  # GPTQ's own: a share of the mean diagonal
_TOGETHER = 64  # columns whose errors are spread to later columns in one product, as in GPTQ

# What holds weights, and what passes 8 bits on from one map to the next.
_WEIGHTED = ("Conv", "MatMul", "Gather", "Gemm")
_ELEMENTWISE = ("Add", "Mul", "Sigmoid")
_FOLLOWING = ("Clip", "MaxPool", "Relu")  # 8 bits where their input has


class _Seen:
    """What calibration shows of a layer's inputs. Of the patches that its weights are multiplied
    with: the sum of squares (groups, n, n), the sum (groups, n), and the number. Of the inputs
    themselves: the number and the range."""

    def __init__(self) -> None:
        self.squares: Any = 0
        self.sums: Any = 0
        self.count = self.size = 0
        self.low = self.high = 0.0

    def add(self, values: NDArray[Any], patches: NDArray[Any]) -> None:
        self.squares += patches @ patches.swapaxes(1, 2)
        self.sums += patches.sum(2)
        self.count += patches.shape[2]
        self.size += values.size
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def noise(self, weights: NDArray[Any]) -> float:
        """What rounding the inputs to 8 bits adds to the outputs, as a share of their standard
        deviation; root mean squares over the channels."""
        means = self.sums.astype(np.float64) / self.count
        covariance = self.squares.astype(np.float64) / self.count
        covariance -= means[:, :, None] * means[:, None, :]
        variance = ((weights @ covariance) * weights).sum()
        step = (self.high - self.low) / 255
        return float(np.sqrt(step**2 / 12 * np.square(weights).sum() / (variance + 1e-12)))


def round_weights(path: Path, inputs: Iterable[Mapping[str, NDArray[np.generic]]]) -> list[str]:
    """Round the weights of the graph at `path` to their int8 values, still stored in float32.

    The weights that are not yet rounded make up for each rounding error, so that the outputs for
    `inputs` change least (GPTQ: Frantar et al. 2022, algorithm 1, on all rows at once).

    Returns:
        The names of the layers that would lose too much in 8 bits, and keep their weights.
    """
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = _layers(model)
    seen = {node.name: _Seen() for node in nodes}
    for values in _values(model, sorted({node.input[0] for node in nodes}), inputs):
        for node in nodes:
            taken = values[node.input[0]]
            seen[node.name].add(taken, _patches(taken, node, weights[node.input[1]].dims))
    kept: set[str] = set()
    for node in nodes:
        rows, sources = _rows(weights[node.input[1]], node), _sources(model, node)
        shown = seen[node.name]
        if shown.noise(rows) > _LARGEST_NOISE:
            kept |= {node.name} | sources
        elif sources and sources <= kept and rows[:, :, 0].size * shown.count < shown.size:
            kept.add(node.name)  # there is less to round behind it than before it
    for node in nodes:
        if node.name not in kept:
            tensor = weights[node.input[1]]
            squares = seen[node.name].squares.astype(np.float64)
            rounded = _round_rows(_rows(tensor, node), squares).astype(np.float32)
            rounded = rounded[0].T if node.op_type == "MatMul" else rounded.reshape(tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    onnx.save(model, path)
    return sorted(kept)


def _sources(model: onnx.ModelProto, node: onnx.NodeProto) -> set[str]:
    """The names of the layers that a layer's input comes from, value by value: a mean over the
    map has little left of their noise."""
    makers = {name: maker for maker in model.graph.node for name in maker.output}
    found, todo, been = set(), [node.input[0]], set()
    while todo:
        name = todo.pop()
        if name in makers and name not in been:
            been.add(name)
            if makers[name].op_type in _WEIGHTED:
                found.add(makers[name].name)
            elif makers[name].op_type != "ReduceMean":
                todo.extend(makers[name].input)
    return found


def _values(
    model: onnx.ModelProto,
    names: Sequence[str],
    inputs: Iterable[Mapping[str, NDArray[np.generic]]],
) -> Iterator[dict[str, NDArray[Any]]]:
    """What tensors inside the graph hold, for each of `inputs`."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "watched.onnx")
        onnx.save(watched, path)
        graph = CPU.open(path)
        for feeds in inputs:
            yield graph.run(feeds, names)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _rows(tensor: onnx.TensorProto, node: onnx.NodeProto) -> NDArray[np.float64]:
    """A layer's weights: (groups, rows, weights a row)."""
    weights = numpy_helper.to_array(tensor).astype(np.float64)
    if node.op_type == "MatMul":
        return weights.T[None]
    groups = _attributes(node)["group"]
    return weights.reshape(groups, len(weights) // groups, -1)


def _patches(values: NDArray[Any], node: onnx.NodeProto, shape: Sequence[int]) -> NDArray[Any]:
    """What a layer's weights are multiplied by: (groups, weights a row, positions)."""
    if node.op_type == "MatMul":
        return values.reshape(1, -1, shape[0]).swapaxes(1, 2)
    attributes = _attributes(node)
    top, left, bottom, right = attributes["pads"]
    rows, columns = attributes["strides"]
    down, across = attributes["dilations"]
    height, width = ((shape[2] - 1) * down + 1, (shape[3] - 1) * across + 1)
    padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)))
    # (batch, channels, output height, output width, kernel height, kernel width)
    windows = sliding_window_view(padded, (height, width), (2, 3))
    windows = windows[:, :, ::rows, ::columns, ::down, ::across]
    patches = windows.transpose(1, 4, 5, 0, 2, 3)
    return patches.reshape(attributes["group"], shape[1] * shape[2] * shape[3], -1)


def _round_rows(weights: NDArray[Any], moments: NDArray[Any]) -> NDArray[Any]:
    """float64 (groups, rows, n) and the inputs' second moments, float64 (groups, n, n)."""
    size = weights.shape[2]
    scale = np.abs(weights).max(2, keepdims=True).clip(1e-9) / 127
    largest = np.abs(weights).argmax(2)[:, :, None]
    kept = np.take_along_axis(weights, largest, 2)
    damping = _DAMPING * np.trace(moments, axis1=1, axis2=2) / size + 1e-12
    inverse = np.linalg.inv(moments + damping[:, None, None] * np.eye(size))
    factor = np.linalg.cholesky(inverse).swapaxes(1, 2)
    weights = weights.copy()
    for start in range(0, size, _TOGETHER):
        end = min(start + _TOGETHER, size)
        errors = np.empty_like(weights[:, :, start:end])
        for i in range(start, end):
            this, near = slice(i, i + 1), slice(i + 1, end)
            rounded = np.round(weights[:, :, this] / scale).clip(-127, 127) * scale
            error = (weights[:, :, this] - rounded) / factor[:, this, this]
            weights[:, :, near] -= error * factor[:, this, near]
            weights[:, :, this] = rounded
            errors[:, :, i - start] = error[:, :, 0]
        weights[:, :, end:] -= errors @ factor[:, start:end, end:]
    # The quantiser takes its scale from the largest weight of a row.
    np.put_along_axis(weights, largest, kept, 2)
    return weights


def quantize_static(
    path: Path,
    inputs: Iterable[Mapping[str, NDArray[np.generic]]],
    kept: Collection[str] = (),
) -> None:
    """Replace the float32 graph at `path` by its 8-bit form.

    Args:
        inputs: what the graph is fed to see the ranges of its activations.
        kept: names of layers that stay in float32.
    """
    with root_logger_kept():
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):
            """`inputs`, one by one."""

            def __init__(self) -> None:
                self._inputs = iter(inputs)

            def get_next(self) -> Mapping[str, NDArray[np.generic]] | None:
                return next(self._inputs, None)

        model = onnx.load(path)
        _separate_tables(model)
        # Shapes with the names of another exporter's axes mislead the quantiser's own inference.
        del model.graph.value_info[:]
        convolutions = any(node.op_type == "Conv" for node in model.graph.node)
        quantization.quantize_static(
            model,
            path,
            Reader(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=[*_WEIGHTED, *_ELEMENTWISE, *_FOLLOWING]
            if convolutions
            else ["Gather", "Gemm"],
            nodes_to_exclude=_in_float(model, kept) if convolutions else [],
            # Gates and logits keep their float32 values: the next token hangs on small differences.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )


def _separate_tables(model: onnx.ModelProto) -> None:
    """Give tables of which rows are taken an initializer of their own: where it is a product's
    weights, too, the quantiser would give it a scale for each row, and the rows but one scale."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = {name for node in model.graph.node if node.op_type == "Gemm" for name in node.input}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in products & weights.keys():
            table = model.graph.initializer.add()
            table.CopyFrom(weights[node.input[0]])
            table.name = node.input[0] = f"{table.name}.rows"


def _in_float(model: onnx.ModelProto, kept: Collection[str]) -> list[str]:
    """The names of `kept`, and of the elementwise operators that would take or give 8 bits for
    themselves alone: behind the last convolution, with a constant, or fed by float32 only."""
    names = list(kept)
    constants = {tensor.name for tensor in model.graph.initializer}
    floats = {value.name for value in model.graph.input}
    last = max(i for i, node in enumerate(model.graph.node) if node.op_type == "Conv")
    for i, node in enumerate(model.graph.node):
        fed_by_floats = set(node.input) <= floats | constants
        if node.op_type in _ELEMENTWISE and (
            fed_by_floats or i > last or constants.intersection(node.input)
        ):
            names.append(node.name)
        if node.name in kept or (fed_by_floats and node.op_type not in _WEIGHTED):
            floats.update(node.output)
    return names


def _layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Convolutions and linear layers over maps: what is worth rounding."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul") and node.input[1] in constants
    ]
