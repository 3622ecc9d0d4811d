"""OpenVINO in onnxruntime's place: the same `Captioner` over the same ONNX graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from capexport.artifact import Manifest
from capexport.captioner import Captioner, open_artifact
from capexport.errors import DeviceError, importing
from capexport.families import find_family
from capexport.sessions import CPU, Graph, Target


@dataclass(frozen=True)
class _Node:
    name: str
    shape: Sequence[int | None]
    type: str = "tensor(float)"


class _Session:
    """A compiled graph with the part of `InferenceSession` that `Graph` uses."""

    def __init__(self, path: Path | bytes, threads: int | None) -> None:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads or 0,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # not bfloat16, where the processor has it
        }
        model = core.compile_model(core.read_model(path), "CPU", settings)
        self._request = model.create_infer_request()
        self._inputs, self._outputs = (
            [
                _Node(
                    node.any_name,
                    [None if size.is_dynamic else size.get_length() for size in node.partial_shape],
                )
                for node in nodes
            ]
            for nodes in (model.inputs, model.outputs)
        )

    def get_inputs(self) -> list[_Node]:
        return self._inputs

    def get_outputs(self) -> list[_Node]:
        return self._outputs

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[NDArray[Any]]:
        self._request.infer(dict(feeds), share_inputs=True)
        return [self._request.get_tensor(name).data.copy() for name in outputs]


class _OpenVinoTarget(Target):
    def open(self, path: Path, **_: Any) -> Graph:
        return Graph(path, None, partial(_Session, threads=self.threads))


def openvino_captioners(folder: Path, device: str, threads: int) -> dict[str, Captioner]:
    """An exported captioner over OpenVINO: with all its graphs, and with the indispensable ones.

    Raises:
        MissingExtraError, DeviceError: OpenVINO is not installed, or `device` is not the CPU.
    """
    if device != "cpu":
        raise DeviceError(f"OpenVINO has no {device}")
    with importing("OpenVINO needs `pip install 'capexport[peers]'`"):
        import openvino  # noqa: F401
    manifest = Manifest.read(folder)
    target = _OpenVinoTarget(CPU.device, threads=threads)
    captioners = {"all graphs": open_artifact(folder, manifest, target)}
    optional = find_family(manifest.family).optional
    fewer = {name: record for name, record in manifest.files.items() if name not in optional}
    if len(fewer) < len(manifest.files):
        manifest = dataclasses.replace(manifest, files=fewer)
        captioners["step by step"] = open_artifact(folder, manifest, target)
    return captioners
