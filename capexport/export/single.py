"""A whole captioner as one ONNX file, for any language that has onnxruntime.

Input:
    image: uint8 (height, width, 3), a photo of any size, upright, in RGB.
Outputs:
    tokens: int64 (length,), the caption's token ids, as `Caption.tokens` has them.
    words: string (said,), their words; joined by spaces they are `Caption.text`.
    log_probability: float32 (), as `Caption.log_probability`.

Special tokens are in neither, unless the decoding allows them; then `words`, which leaves them out,
is the shorter one. The graph does all that `Captioner.caption` does with a decoded photo: Pillow's
resizing, the encoder, and the decoding that the artifact's manifest asks for, greedy or with beams.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

from capexport.artifact import Decoding, Manifest
from capexport.export.beam_loop import beam_graph
from capexport.export.head import image_head
from capexport.export.loop import loop_graph, opset_of
from capexport.families.cnn_lstm import Vocabulary, read_vocabulary

_SHARED = 1024  # bytes: larger weights that encoder and decoder both have are stored once


def single_graph(folder: Path, manifest: Manifest) -> onnx.ModelProto:
    """The CNN-LSTM in `folder` as one graph, as this module's docstring describes it.

    `manifest` gives the preprocessing and the decoding, in place of the folder's own.
    """
    encoder, step = (read_graph(folder / name) for name in ("encoder.onnx", "decoder_step.onnx"))
    vocabulary = read_vocabulary(folder / "vocabulary.json")
    decode = beam_graph if manifest.decoding.num_beams > 1 else _greedy_graph
    state = [value.name for value in encoder.graph.output]
    first = {f"first_{name}" if name in manifest.state else name: f"state/{name}" for name in state}
    graph = onnx.GraphProto(name="captioner")
    _add(graph, image_head(manifest.image, opset_of(step), step.ir_version), "image", image="image")
    _add(graph, encoder, "encoder", images="image/images", **{n: f"state/{n}" for n in state})
    ends = {"best_tokens": "tokens", "best_total": "log_probability"}
    _add(graph, decode(step, manifest.state, manifest.decoding), "decoder", **first, **ends)
    _add_words(graph, vocabulary)
    _share_weights(graph)
    graph.input.append(_value("image", np.uint8, "height", "width", 3))
    graph.output.append(_value("tokens", np.int64, "length"))
    graph.output.append(_value("words", np.str_, "said"))
    graph.output.append(_value("log_probability", np.float32))
    return helper.make_model(
        graph, opset_imports=list(step.opset_import), ir_version=step.ir_version
    )


def read_graph(path: Path) -> onnx.ModelProto:
    """A graph with its external weights.

    Their files may be symbolic links, as in the hub's cache. onnx refuses links, so the files are
    copied first.
    """
    model = onnx.load(path, load_external_data=False)
    places = [place for tensor in model.graph.initializer for place in tensor.external_data]
    with tempfile.TemporaryDirectory() as folder:
        for name in {place.value for place in places if place.key == "location"}:
            shutil.copyfile(path.parent / name, Path(folder, name))
        external_data_helper.load_external_data_for_model(model, folder)
    return model


def _value(name: str, kind: type, *axes: str | int) -> onnx.ValueInfoProto:
    element_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    return helper.make_tensor_value_info(name, element_type, axes)


def _greedy_graph(
    step: onnx.ModelProto, state: Mapping[str, str], decoding: Decoding
) -> onnx.ModelProto:
    """`loop_graph` with the inputs, outputs and constants that `beam_graph` has."""
    assert decoding.start_token is not None
    [end_token] = decoding.end_tokens
    model = loop_graph(step, state, decoding.start_token, end_token, decoding.suppress_tokens)
    constants = {
        "max_tokens": np.int64(decoding.max_tokens),
        "min_tokens": np.int64(decoding.min_tokens),
        "flat_shape": np.array([-1]),
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    )
    model.graph.node.extend(
        [
            helper.make_node("Reshape", ["words", "flat_shape"], ["flat_words"]),
            helper.make_node("Equal", ["flat_words", "end_token"], ["is_end"]),
            helper.make_node("Not", ["is_end"], ["is_said"]),
            helper.make_node("Compress", ["flat_words", "is_said"], ["best_tokens"]),
            helper.make_node("Squeeze", ["log_probabilities"], ["best_total"]),
        ]
    )
    return model


def _add_words(graph: onnx.GraphProto, vocabulary: Vocabulary) -> None:
    words = np.array(vocabulary.words, object)
    graph.initializer.append(numpy_helper.from_array(words, "vocabulary"))
    last = np.int64(len(Vocabulary.SPECIALS) - 1)
    graph.initializer.append(numpy_helper.from_array(np.asarray(last), "last_special"))
    graph.node.extend(
        [
            helper.make_node("Greater", ["tokens", "last_special"], ["is_word"], "is_word"),
            helper.make_node("Compress", ["tokens", "is_word"], ["written"], "written"),
            helper.make_node("Gather", ["vocabulary", "written"], ["words"], "words"),
        ]
    )


def _add(graph: onnx.GraphProto, part: onnx.ModelProto, prefix: str, **known: str) -> None:
    """Put the nodes and weights of `part` into `graph`. Names in `known` become those of `graph`;
    all others get `prefix` in front."""
    _rename(part.graph, {"": "", **known}, prefix)
    graph.node.extend(part.graph.node)
    graph.initializer.extend(part.graph.initializer)


def _rename(graph: onnx.GraphProto, known: Mapping[str, str], prefix: str) -> None:
    """Rename everything in a graph, and in the graphs within it."""

    def new(name: str) -> str:
        return known.get(name, f"{prefix}/{name}")

    del graph.value_info[:]  # optional shapes, which are wrong where the batch is one photo
    for item in (*graph.input, *graph.output, *graph.initializer):
        item.name = new(item.name)
    for node in graph.node:
        node.name = new(node.name or node.output[0])  # for onnxruntime's errors
        node.input[:], node.output[:] = map(new, node.input), map(new, node.output)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, known, prefix)


def _share_weights(graph: onnx.GraphProto) -> None:
    """Keep one of all weights that are equal, and let all nodes use it."""
    first: dict[tuple[object, ...], str] = {}
    same: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        same[tensor.name] = tensor.name
        if tensor.ByteSize() > _SHARED and tensor.data_type != onnx.TensorProto.STRING:
            content = numpy_helper.to_array(tensor).tobytes()
            key = (tensor.data_type, *tensor.dims, content)
            same[tensor.name] = first.setdefault(key, tensor.name)
        if same[tensor.name] == tensor.name:
            kept.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    _replace_inputs(graph, same)


def _replace_inputs(graph: onnx.GraphProto, same: Mapping[str, str]) -> None:
    """Rename what nodes take, in the graphs within, too."""
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _replace_inputs(attribute.g, same)
