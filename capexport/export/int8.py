"""Static 8-bit quantisation of the CNN-LSTM's graphs.

The quantiser is onnxruntime's own ("Quantize ONNX models" in its documentation, QDQ format):
weights become int8 channel by channel, activations uint8 with ranges seen on calibration photos.
Ranges are fixed, where dynamic quantisation would take them from each batch: a photo's caption
doesn't depend on the photos beside it. Before that, the convolutions' weights are rounded with
regard to each other, which takes a third off the error of the image feature.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from capexport.export.quantize import root_logger_kept
from capexport.sessions import CPU

# The stem and the first block, whose channels differ most in range, stay in float32: quantised,
# they take most of the features' accuracy, and on their large maps they are no faster.
_FLOAT_CONVOLUTIONS = 3
_DAMPING = 0.01  # GPTQ's own: a share of the mean diagonal


def round_convolutions(path: Path, inputs: Iterable[Mapping[str, NDArray[np.generic]]]) -> None:
    """Round the weights of the graph at `path` to their int8 values, stored in float32 still.

    Each weight's rounding error is made up for by those not rounded yet, so that the outputs for
    `inputs` change least (GPTQ: Frantar et al. 2022, algorithm 1, of all rows at once).
    """
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = _convolutions(model)[_FLOAT_CONVOLUTIONS:]
    names = sorted({node.input[0] for node in nodes})
    moments: dict[str, Any] = dict.fromkeys((node.input[1] for node in nodes), 0)
    for values in _values(model, names, inputs):
        for node in nodes:
            patches = _patches(values[node.input[0]], node, weights[node.input[1]].dims)
            moments[node.input[1]] += patches @ patches.swapaxes(1, 2)
    for name, moment in moments.items():
        tensor = weights[name]
        groups = numpy_helper.to_array(tensor).reshape(len(moment), -1, moment.shape[-1])
        rounded = _round_weights(groups.astype(np.float64), moment.astype(np.float64))
        tensor.CopyFrom(
            numpy_helper.from_array(rounded.astype(np.float32).reshape(tensor.dims), name)
        )
    onnx.save(model, path)


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


def _patches(images: NDArray[Any], node: onnx.NodeProto, shape: Sequence[int]) -> NDArray[Any]:
    """What the weights of a convolution are multiplied by: (groups, weights a row, positions)."""
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    top, left, bottom, right = attributes["pads"]
    rows, columns = attributes["strides"]
    padded = np.pad(images, ((0, 0), (0, 0), (top, bottom), (left, right)))
    # (batch, channels, height, width, kernel height, kernel width)
    windows = sliding_window_view(padded, tuple(shape[2:]), (2, 3))[:, :, ::rows, ::columns]
    patches = windows.transpose(1, 4, 5, 0, 2, 3)
    return patches.reshape(attributes["group"], shape[1] * shape[2] * shape[3], -1)


def _round_weights(weights: NDArray[Any], moments: NDArray[Any]) -> NDArray[Any]:
    """float64 (groups, rows, n) and the inputs' second moments, float64 (groups, n, n)."""
    size = weights.shape[2]
    scale = np.abs(weights).max(2, keepdims=True).clip(1e-9) / 127
    largest = np.abs(weights).argmax(2)[:, :, None]
    kept = np.take_along_axis(weights, largest, 2)
    damping = _DAMPING * np.trace(moments, axis1=1, axis2=2) / size + 1e-12
    inverse = np.linalg.inv(moments + damping[:, None, None] * np.eye(size))
    factor = np.linalg.cholesky(inverse).swapaxes(1, 2)
    weights = weights.copy()
    for i in range(size):
        this, rest = slice(i, i + 1), slice(i + 1, None)
        rounded = np.round(weights[:, :, this] / scale).clip(-127, 127) * scale
        error = (weights[:, :, this] - rounded) / factor[:, this, this]
        weights[:, :, rest] -= error * factor[:, this, rest]
        weights[:, :, this] = rounded
    # The quantiser takes its scale from the largest weight of a row.
    np.put_along_axis(weights, largest, kept, 2)
    return weights


def quantize_static(path: Path, inputs: Iterable[Mapping[str, NDArray[np.generic]]]) -> None:
    """Replace the float32 graph at `path` by its 8-bit form.

    Args:
        inputs: what the graph is fed to see the ranges of its activations.
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
        convolutions = [node.name for node in _convolutions(model)]
        quantization.quantize_static(
            model,
            path,
            Reader(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["Add", "Clip", "Conv", "Gather", "Gemm"]
            if convolutions
            else ["Gather", "Gemm"],
            nodes_to_exclude=convolutions[:_FLOAT_CONVOLUTIONS],
            # Gates and logits keep their float32 values: the next token hangs on small differences.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )


def _convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Conv"]


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
