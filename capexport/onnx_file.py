"""ONNX files without the package onnx: check which files and loops a graph names before onnxruntime
acts on it, and write a few small graphs.

The check unpacks only the messages that lead to those names. Source: onnx.proto (onnx/onnx), and
"Protocol Buffers: Encoding" (protobuf.dev).
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from capexport.errors import ArtifactError

# Which fields of a message hold which messages, by number.
_SUBGRAPH = {1: "node", 5: "tensor", 15: "sparse"}
_MESSAGES = {
    "model": {7: "main graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "main graph": {**_SUBGRAPH, 1: "main node"},
    "graph": _SUBGRAPH,
    "function": {7: "node", 11: "attribute"},
    "main node": {5: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external data"},
}
_LOOPS = {b"Loop", b"Scan", b"SequenceMap"}
_BOUNDED_LOOP = (b"Loop", "main node", b"max_tokens")  # operator, place, and first input: the count
_FLOAT32, _UINT8, _INT8, _INT32, _INT64 = 1, 2, 3, 6, 7  # element types


def check_graph(path: Path, files: Collection[str]) -> None:
    """Check that a graph reads no external weights but `files`, and that its only loops are some of
    the main graph that count to the graph's input `max_tokens`.

    Raises:
        ArtifactError: it names another file, loops without that bound, or is not an ONNX graph.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            trouble = next(_troubles(data, files), None)
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{path}: no ONNX graph: {error}; export again") from error
    if trouble:
        raise ArtifactError(f"{path}: {trouble}; export again")


def _troubles(data: mmap.mmap, files: Collection[str]) -> Iterator[str]:
    waiting = [("model", 0, len(data))]
    while waiting:
        kind, start, end = waiting.pop()
        inside = _MESSAGES.get(kind, {})
        fields = list(_fields(data, start, end))
        waiting += [(inside[number], a, z) for number, a, z in fields if number in inside]
        if kind == "external data":  # a key and its value
            values = {number: data[a:z] for number, a, z in fields}
            name = values.get(2, b"").decode(errors="replace")
            if values.get(1) == b"location" and name not in files:
                yield f"reads {name!r}, which is none of the files that the manifest lists"
        if kind in ("node", "main node"):
            operator = next((data[a:z] for number, a, z in reversed(fields) if number == 4), b"")
            count = next((data[a:z] for number, a, z in fields if number == 1), b"")
            if operator in _LOOPS and (operator, kind, count) != _BOUNDED_LOOP:
                yield f"a {operator.decode()} that max_tokens does not bound"


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of a message's length-delimited fields; the others are skipped."""
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            length, at = _varint(data, at)
            yield tag >> 3, at, at + length
            at += length
        else:
            raise ValueError(f"wire type {wire}")
    if at != end:
        raise ValueError("a field goes beyond its message")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number in seven bits a byte, and where it ends."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number of more than ten bytes")


def gather_graph(kinds: Sequence[tuple[int, int]]) -> bytes:
    """An ONNX file that gathers `rows`, int64 (n,), from several tensors at once, along axis 0:
    from `in0` to `out0`, and so on. `kinds` are the tensors' element types, as onnx.proto numbers
    them, and how many axes they have."""
    graph = _value(11, "rows", (_INT64, 1))
    for number, kind in enumerate(kinds):
        before, after = f"in{number}", f"out{number}"
        graph += _node("Gather", [before, "rows"], [after])
        graph += _value(11, before, kind) + _value(12, after, kind)
    return _model("gather", graph)


def likeliest_graph() -> bytes:
    """An ONNX file that finds the `count`, int64 (1,), likeliest of each row of `logits`, float32
    (rows, n). `values` are their log-probabilities, to which `bias`, float32 (n,), has been added;
    `places` are their places in the row."""
    graph = _value(11, "logits", (_FLOAT32, 2)) + _value(11, "bias", (_FLOAT32, 1))
    graph += _value(11, "count", (_INT64, 1))
    graph += _node("LogSoftmax", ["logits"], ["logs"])
    graph += _node("Add", ["logs", "bias"], ["sums"])
    graph += _node("TopK", ["sums", "count"], ["values", "places"])
    graph += _value(12, "values", (_FLOAT32, 2)) + _value(12, "places", (_INT64, 2))
    return _model("likeliest", graph)


def product_graph() -> bytes:
    """An ONNX file that multiplies the matrices `a`, uint8, and `b`, int8, to `product`, int32."""
    graph = _node("MatMulInteger", ["a", "b"], ["product"])
    graph += _value(11, "a", (_UINT8, 2)) + _value(11, "b", (_INT8, 2))
    return _model("product", graph + _value(12, "product", (_INT32, 2)))


def _model(name: str, graph: bytes) -> bytes:
    graph = _field(2, name) + graph
    return _field(1, 8) + _field(7, graph) + _field(8, _field(2, 17))  # IR version, graph, opset


def _node(operator: str, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    names = [_field(1, name) for name in inputs] + [_field(2, name) for name in outputs]
    return _field(1, b"".join(names) + _field(4, operator))


def _value(number: int, name: str, kind: tuple[int, int]) -> bytes:
    """An input or output, the sizes of its axes left open."""
    element_type, axes = kind
    tensor = _field(1, element_type) + _field(2, _field(1, b"") * axes)
    return _field(number, _field(1, name) + _field(2, _field(1, tensor)))


def _field(number: int, content: bytes | str | int) -> bytes:
    if isinstance(content, int):
        return _encoded(number << 3) + _encoded(content)
    data = content.encode() if isinstance(content, str) else content
    return _encoded(number << 3 | 2) + _encoded(len(data)) + data


def _encoded(value: int) -> bytes:
    """What `_varint` reads."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
