"""Quantisation of an exported graph: the weights of its matrix products in 4 or 8 bits.

The arithmetic is onnxruntime's own. A product of one row, as in a decoding step, spends its time on
reading the weights, so they are stored in blocks (`MatMulNBits`, by `MatMulNBitsQuantizer`). A
product of many rows, as in an image encoder, spends it on multiplying, and whole rows and columns
of 8 bits (`MatMulIntegerToFloat`) are nearly twice as fast. A language model would lose too much by
that, since a few of its channels hold by far the largest values. No row's scale depends on another
row's values, so no caption depends on its batch.

Weights are read from the external data and written to the new file one at a time; onnxruntime's
tool would hold the whole model twice.
"""

from __future__ import annotations

import logging
import math
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

# Smaller blocks cost size and speed, larger ones accuracy; 4 bits need the accuracy.
BLOCK_SIZES = {4: 32, 8: 128}
# These keep 8 bits: the projection to the vocabulary, which decides between tokens, and the first
# layer, whose errors reach all others: 4 bits there cost a trained model more than in all the rest.
_SENSITIVE = re.compile(r"lm_head\.weight|.*\.(layers|block)\.0\..*")
# Activations are quantised to 8 bits block by block: several times the speed of computing in
# float32, for far less of an error than that of 4-bit weights.
ACCURACY_LEVEL = 4
# Columns that a product of blocks goes through at once. Where a row no longer fits the cache that
# is nearest to a core, a product of several rows takes a third more time than in two halves.
_COLUMNS = 5120
_EXTERNAL = 1024  # bytes from which a tensor is stored in the data file
_BLOCKS = ("packed", "scales", "zeros")
# Constants of products of whole rows: those multiply unsigned by signed numbers.
_ROWS: dict[str, Any] = {
    "rows.axis": np.array([-1]),
    "rows.smallest": np.float32(1e-30),  # a row of zeros has a scale, too
    "rows.step": np.float32(1 / 127),
    "rows.zero": np.uint8(128),
}


def quantize_graph(source: Path, target: Path, bits: int, many_rows: bool = False) -> None:
    """Write `source` to `target` with the weights of its matrix products in 4 or 8 bits.

    Both keep their tensors in a file of their own beside them, `<name>.data`. The projection to
    the vocabulary and the first layer stay at 8 bits.

    Args:
        many_rows: whether its products, of 8 bits then, have many rows.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "FusedMatMul"]
    by_weight = {node.input[1]: node for node in products}
    if len(by_weight) != len(products):
        raise NotImplementedError(f"{source}: products that share a weight")
    replaced: dict[str, list[onnx.NodeProto]] = {}  # nodes by the output of the one they replace
    with _external_data(source) as data, _data_file(target).open("wb") as out:
        del graph.initializer[:]
        for name, tensor in stored.items():
            values = _values(tensor, data)
            parts = {name: values}
            if node := by_weight.get(name):
                assert helper.get_node_attr_value(node, "transB") == 1
                width = 8 if _SENSITIVE.fullmatch(name) else bits
                replaced[node.output[0]], parts = (
                    _product_of_rows(node, values)
                    if many_rows
                    else _product_of_blocks(node, values, width)
                )
            for part, array in parts.items():
                graph.initializer.append(_store(part, array, out, target))
    if many_rows:
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name) for name, value in _ROWS.items()
        )
    # By their outputs, since products of the same rows bring the same nodes.
    nodes = {
        new.output[0]: new for node in graph.node for new in replaced.get(node.output[0], [node])
    }
    del graph.node[:]
    graph.node.extend(nodes.values())
    onnx.save(model, target)


def _product_of_blocks(
    node: onnx.NodeProto, weight: np.ndarray, bits: int
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """What takes the place of `node`, and of its weight, (columns, rows)."""
    [rows, name], [product] = node.input, node.output
    pieces = math.ceil(weight.shape[1] / _COLUMNS)
    if pieces == 1 or weight.shape[1] % (pieces * BLOCK_SIZES[bits]):
        return _product(rows, name, product, weight, bits)
    cut, sums = ([f"{product}.{kind}{n}" for n in range(pieces)] for kind in ("rows", "sum"))
    nodes = [helper.make_node("Split", [rows], cut, axis=-1, num_outputs=pieces)]
    parts = {}
    for number, piece in enumerate(np.split(weight, pieces, axis=1)):
        made, arrays = _product(cut[number], f"{name}.{number}", sums[number], piece, bits)
        nodes += made
        parts.update(arrays)
    return [*nodes, helper.make_node("Sum", sums, [product])], parts


def _product(
    rows: str, name: str, product: str, weight: np.ndarray, bits: int
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """`MatMulNBits`, and its constants by their names, which begin with `name`."""
    with root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    quantizer = DefaultWeightOnlyQuantizer(
        DefaultWeightOnlyQuantConfig(BLOCK_SIZES[bits], bits=bits)
    )
    arrays = quantizer.qbits_block_quant(np.ascontiguousarray(weight.T))
    parts = {f"{name}.{kind}": a for kind, a in zip(_BLOCKS, arrays, strict=True)}
    node = helper.make_node(
        "MatMulNBits",
        [rows, *parts],
        [product],
        domain="com.microsoft",
        N=weight.shape[0],
        K=weight.shape[1],
        bits=bits,
        block_size=BLOCK_SIZES[bits],
        accuracy_level=ACCURACY_LEVEL,
    )
    return [node], parts


def _product_of_rows(
    node: onnx.NodeProto, weight: np.ndarray
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """As `_product_of_blocks`."""
    [rows, name], [product] = node.input, node.output
    scales = np.abs(weight).max(1).clip(_ROWS["rows.smallest"]) / np.float32(127)
    parts = {
        f"{name}.int8": np.round(weight / scales[:, None]).astype(np.int8).T.copy(),
        f"{name}.scales": scales,
    }
    operands = [f"{rows}.int8", f"{name}.int8", "rows.step", f"{name}.scales", "rows.zero"]
    shares = f"{product}.of_shares"
    return [
        *_quantised_rows(rows),
        helper.make_node("MatMulIntegerToFloat", operands, [shares], domain="com.microsoft"),
        helper.make_node("Mul", [shares, f"{rows}.largest"], [product]),
    ], parts


def _quantised_rows(name: str) -> list[onnx.NodeProto]:
    """Nodes that give each row of a tensor in 8 bits, as shares of its largest value, and that."""
    steps = [
        ("Abs", [name], "size"),
        ("ReduceMax", [f"{name}.size", "rows.axis"], "size_of_row"),
        ("Max", [f"{name}.size_of_row", "rows.smallest"], "largest"),
        ("Div", [name, f"{name}.largest"], "share"),
        ("QuantizeLinear", [f"{name}.share", "rows.step", "rows.zero"], "int8"),
    ]
    return [helper.make_node(kind, taken, [f"{name}.{given}"]) for kind, taken, given in steps]


@contextmanager
def root_logger_kept() -> Iterator[None]:
    """onnxruntime's quantisers configure logging for everybody when they are imported, and advise
    what gains nothing here: a pass over the graph before quantisation."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [logging.NullHandler()]
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _data_file(graph: Path) -> Path:
    return graph.with_name(f"{graph.name}.data")


@contextmanager
def _external_data(graph: Path) -> Iterator[memoryview]:
    with _data_file(graph).open("rb") as file:
        yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _values(tensor: onnx.TensorProto, data: memoryview) -> np.ndarray:
    if not external_data_helper.uses_external_data(tensor):
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place.get("offset", 0)), int(place["length"])
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(data[offset : offset + length], kind).reshape(tensor.dims)


def _store(name: str, values: np.ndarray, out: BinaryIO, graph: Path) -> onnx.TensorProto:
    if values.nbytes < _EXTERNAL:
        return numpy_helper.from_array(values, name)
    out.write(b"\0" * (-out.tell() % 4096))  # aligned, so that it can be mapped
    tensor = onnx.TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
        dims=values.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    place = {"location": _data_file(graph).name, "offset": out.tell(), "length": values.nbytes}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    out.write(values.data if values.flags.c_contiguous else values.tobytes())
    return tensor
