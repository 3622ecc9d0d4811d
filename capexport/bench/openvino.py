"""OpenVINO in onnxruntime's place: the same `Captioner` over the same ONNX graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from capexport.artifact import Manifest
from capexport.captioner import Captioner, load_cnn_lstm
from capexport.errors import DeviceError, MissingExtraError


@dataclass(frozen=True)
class _Node:
    name: str
    shape: Sequence[int | None]


class _Session:
    """A compiled graph with the part of `InferenceSession` that a CNN-LSTM's captioner uses."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
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


def openvino_captioner(folder: Path, device: str, threads: int, *, loop: bool) -> Captioner:
    """An exported CNN-LSTM over OpenVINO, its decoder as one graph or step by step.

    Raises:
        MissingExtraError, DeviceError: OpenVINO is not installed, or `device` is not the CPU.
    """
    if device != "cpu":
        raise DeviceError(f"OpenVINO has no {device}")
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("OpenVINO needs `pip install 'capexport[peers]'`") from error
    manifest = Manifest.read(folder)
    if not loop:
        manifest.files.pop("decoder_loop.onnx", None)
    return load_cnn_lstm(folder, manifest, device, threads, lambda path: _Session(path, threads))
