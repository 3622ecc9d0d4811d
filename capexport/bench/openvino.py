"""OpenVINO in onnxruntime's place: the same `Captioner` over the same ONNX graphs."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capexport.artifact import Manifest
from capexport.captioner import Captioner, open_artifact
from capexport.errors import DeviceError, importing
from capexport.families import find_family
from capexport.preprocessing import preprocess
from capexport.sessions import CPU, Graph, Target, available_cores

_CALIBRATION = 300  # photos, NNCF's own default
_IMAGES = 4  # what a stream takes at a time: of 1 to 16, the least time an image of a MobileNetV2


@dataclass(frozen=True)
class _Node:
    name: str
    shape: Sequence[int | None]
    type: str = "tensor(float)"


class _Session:
    """A compiled graph with the part of `InferenceSession` that `Graph` uses."""

    def __init__(self, model: Any, threads: int | None, hint: str = "LATENCY") -> None:
        """`model`: a file, its content, or a model of OpenVINO's."""
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads or 0,
            "PERFORMANCE_HINT": hint,
            "INFERENCE_PRECISION_HINT": "f32",  # not bfloat16, where the processor has it
        }
        if isinstance(model, (Path, bytes)):
            model = core.read_model(model)
        self._model = core.compile_model(model, "CPU", settings)
        self._request = self._model.create_infer_request()
        self._inputs, self._outputs = (
            [
                _Node(
                    node.node.friendly_name.partition("/")[0],  # the tensor may have several
                    [None if size.is_dynamic else size.get_length() for size in node.partial_shape],
                )
                for node in nodes
            ]
            for nodes in (self._model.inputs, self._model.outputs)
        )

    def get_inputs(self) -> list[_Node]:
        return self._inputs

    def get_outputs(self) -> list[_Node]:
        return self._outputs

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[NDArray[Any]]:
        self._request.infer(dict(feeds), share_inputs=True)
        return [self._request.get_tensor(name).data.copy() for name in outputs]


class _ParallelSession(_Session):
    """One for images, of which each of OpenVINO's streams takes a few at a time."""

    def __init__(self, model: Any, threads: int | None) -> None:
        import openvino

        super().__init__(model, threads, "THROUGHPUT")
        self._threads = threads or available_cores()
        self._queue = openvino.AsyncInferQueue(self._model)
        self._queue.set_callback(self._collect)

    def _collect(self, request: Any, place: tuple[dict[int, list[NDArray[Any]]], int]) -> None:
        parts, start = place
        parts[start] = [tensor.data.copy() for tensor in request.output_tensors]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[NDArray[Any]]:
        [(name, images)] = feeds.items()
        step = min(_IMAGES, -(-len(images) // self._threads))
        parts: dict[int, list[NDArray[Any]]] = {}
        for start in range(0, len(images), step):
            part = images[start : start + step]
            self._queue.start_async({name: part}, (parts, start), share_inputs=True)
        self._queue.wait_all()
        names = [node.name for node in self._outputs]
        ordered = [parts[start] for start in sorted(parts)]
        return [np.concatenate([part[names.index(name)] for part in ordered]) for name in outputs]


@dataclass(frozen=True)
class _OpenVinoTarget(Target):
    """Opens graphs in OpenVINO instead of onnxruntime.

    Attributes:
        images: the graph that images go through, and whether streams share a batch of them.
        replaced: models in place of the artifact's, by the names of their files.
    """

    images: str = ""
    parallel: bool = False
    replaced: Mapping[str, Any] = field(default_factory=dict)

    def open(self, path: Path, **_: Any) -> Graph:
        kind = _ParallelSession if self.parallel and path.name == self.images else _Session
        model = self.replaced.get(path.name)

        def session(file: Path | bytes, threads: int | None = None) -> Any:
            if isinstance(file, bytes):  # what a beam search has of its own
                return self._session(file, threads, mapped=False)
            return kind(file if model is None else model, self.threads)

        return Graph(path, None, session)


def _require_openvino(device: str) -> Any:
    if device != "cpu":
        raise DeviceError(f"OpenVINO has no {device}")
    with importing("OpenVINO needs `pip install 'capexport[peers]'`"):
        import openvino
    return openvino


def openvino_captioners(
    folder: Path, device: str, threads: int, replaced: Mapping[str, Any] | None = None
) -> dict[str, Captioner]:
    """An exported captioner over OpenVINO in several forms: with all its graphs, and without the
    optional ones; if the model is small, each with whole batches of images, and with batches that
    OpenVINO's streams share.

    Args:
        replaced: models of OpenVINO's in place of some of the graphs, by the names of their files.
    Raises:
        MissingExtraError, DeviceError: OpenVINO is not installed, or `device` is not the CPU.
    """
    _require_openvino(device)
    manifest = Manifest.read(folder)
    family = find_family(manifest.family)
    fewer = {name: record for name, record in manifest.files.items() if name not in family.optional}
    forms = {"all graphs": manifest}
    if len(fewer) < len(manifest.files):
        forms["step by step"] = dataclasses.replace(manifest, files=fewer)
    # How many images suit onnxruntime's cores is no measure for OpenVINO's.
    whole = dataclasses.replace(CPU.device, images_per_core=None)
    captioners = {}
    shared = (False, True) if family.small else (False,)
    for (form, wired), parallel in product(forms.items(), shared):
        target = _OpenVinoTarget(
            whole,
            threads=threads,
            images=family.image_graph,
            parallel=parallel,
            replaced=replaced or {},
        )
        name = f"{form}, {'streams' if parallel else 'whole batches'}"
        captioners[name] = open_artifact(folder, wired, target)
    return captioners


def nncf_captioners(
    exact: Path, folder: Path, photos: Sequence[NDArray[np.uint8]], device: str, threads: int
) -> dict[str, Captioner]:
    """The artifact in `folder` over OpenVINO, with the encoder that NNCF's post-training
    quantisation makes of `exact`'s.

    Args:
        exact: the same captioner in fp32.
        photos: uint8 (height, width, 3) each, to calibrate with.
    Raises:
        MissingExtraError, DeviceError: OpenVINO or NNCF is not installed, or `device` is not the
            CPU.
    """
    openvino = _require_openvino(device)
    with importing("NNCF needs `pip install 'capexport[peers]'`"):
        import nncf
    manifest = Manifest.read(exact)
    name = find_family(manifest.family).image_graph
    nncf.set_log_level("ERROR")
    samples = [preprocess(photo, manifest.image)[None] for photo in photos[:_CALIBRATION]]
    model = openvino.Core().read_model(exact / name)
    with contextlib.redirect_stdout(sys.stderr):  # its progress
        quantized = nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples))
    return openvino_captioners(folder, device, threads, {name: quantized})
