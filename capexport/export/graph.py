"""One call around PyTorch's ONNX exporter, the same for every graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

import capexport
from capexport.sessions import runtime_version

OPSET = 20


def versions(*more: str) -> dict[str, str]:
    """What an artifact's provenance says of the packages that made it."""
    names = ("torch", "onnxscript", "onnx", *more)
    return {
        "capexport": capexport.__version__,
        **{name: metadata.version(name) for name in names},
        "onnxruntime": runtime_version(),
    }


def strip_traces(model: onnx.ModelProto) -> None:
    """Remove the exporter's stack traces: they name files of this machine, and triple the size."""
    for item in (model.graph, *model.graph.node, *model.graph.value_info):
        del item.metadata_props[:]


def export_graph(
    module: nn.Module,
    inputs: Sequence[Tensor | Mapping[str, Tensor]],
    input_names: Sequence[str],
    output_names: Sequence[str],
    path: Path,
) -> None:
    """Export `module` with axis 0 of every input a free batch size.

    `input_names` and `output_names` count the tensors in a dict one by one.
    `inputs` are examples with a batch of two or more: the exporter would take a batch of one for a
    constant (torch.export documentation, "0/1 specialization").
    Those of a smaller batch than the first have a batch size of their own, which divides its.
    """
    rows = len(inputs[0])
    batch, images = ({0: torch.export.Dim(name)} for name in ("batch", "images"))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            (*inputs, {}),  # a dict in the last place is taken for keyword arguments
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=[
                batch
                if isinstance(value, Tensor)
                else {k: batch if len(v) == rows else images for k, v in value.items()}
                for value in inputs
            ],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    strip_traces(model)
    onnx.save(model, path)
