"""Weight-only quantisation of an exported graph: its `FusedMatMul` nodes become `MatMulNBits`.

The arithmetic is onnxruntime's own (`MatMulNBitsQuantizer`, QOperator format); what is added here
is that one weight at a time is read from the external data and written to the new ones, where
onnxruntime's tool holds the whole model twice.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

# Smaller blocks cost size and speed, larger ones accuracy; 4 bits need the accuracy.
BLOCK_SIZES = {4: 32, 8: 128}
# Activations are quantised to 8 bits block by block: several times the speed of computing in
# float32, for far less of an error than that of 4-bit weights.
ACCURACY_LEVEL = 4
_EXTERNAL = 1024  # bytes from which a tensor is stored in the data file


def quantize_graph(source: Path, target: Path, bits: int) -> None:
    """Write `source` to `target` with the weights of its matrix products in 4 or 8 bits.

    Both keep their tensors in a file of their own beside them, `<name>.data`. The projection to
    the vocabulary stays at 8 bits: it decides between tokens.
    """
    with root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "FusedMatMul"]
    by_weight = {node.input[1]: node for node in products}
    with _external_data(source) as data, _data_file(target).open("wb") as out:
        del graph.initializer[:]
        for name, tensor in stored.items():
            values = _values(tensor, data)
            node = by_weight.get(name)
            if node is None:
                graph.initializer.append(_store(name, values, out, target))
                continue
            assert helper.get_node_attr_value(node, "transB") == 1
            width = 8 if name == "lm_head.weight" else bits
            config = DefaultWeightOnlyQuantConfig(BLOCK_SIZES[width], bits=width)
            quantizer = DefaultWeightOnlyQuantizer(config)
            packed, scales, zeros = quantizer.qbits_block_quant(np.ascontiguousarray(values.T))
            parts = {f"{name}.packed": packed, f"{name}.scales": scales, f"{name}.zeros": zeros}
            for part, array in parts.items():
                graph.initializer.append(_store(part, array, out, target))
            _replace(node, list(parts), values.shape, width)
    if len(by_weight) != len(products):
        raise NotImplementedError(f"{source}: products that share a weight")
    onnx.save(model, target)


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


def _replace(node: onnx.NodeProto, weights: list[str], shape: tuple[int, ...], bits: int) -> None:
    new = helper.make_node(
        "MatMulNBits",
        [node.input[0], *weights],
        list(node.output),
        node.name,
        domain="com.microsoft",
        N=shape[0],
        K=shape[1],
        bits=bits,
        block_size=BLOCK_SIZES[bits],
        accuracy_level=ACCURACY_LEVEL,
    )
    node.CopyFrom(new)


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
