"""Encoder and decoder over ONNX graphs. The only file that imports onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from capexport.decoding import TokenArray
from capexport.errors import ArtifactError, DeviceError, MissingExtraError
from capexport.preprocessing import FloatArray

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# The decoder's state by the names of the step graph's inputs: float32 (batch, hidden_size) each.
LstmState: TypeAlias = dict[str, FloatArray]


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "onnxruntime is not installed: `pip install 'capexport[cpu]'`, or "
            "`pip install 'capexport[gpu]'` for CUDA (never both)"
        ) from error
    return onnxruntime


def runtime_version() -> str:
    """onnxruntime's version, whichever of its packages is installed."""
    return str(_import_onnxruntime().__version__)


def require_provider(device: str) -> str:
    """The execution provider of `device`.

    Raises:
        MissingExtraError, DeviceError: no onnxruntime, or none with this provider.
    """
    onnxruntime = _import_onnxruntime()
    if device not in PROVIDERS:
        raise DeviceError(f"unknown device {device!r}: choose cpu or cuda")
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise DeviceError(
            f"this onnxruntime has no {PROVIDERS[device]}: install `capexport[gpu]` in place of "
            "`capexport[cpu]`"
        )
    return PROVIDERS[device]


def open_session(path: Path, device: str, threads: int | None) -> onnxruntime.InferenceSession:
    """Open a graph on `device`, and make sure that it really runs there.

    Raises:
        MissingExtraError, DeviceError: as `require_provider`, or the provider does not start.
        ArtifactError: onnxruntime cannot load the graph.
    """
    provider = require_provider(device)
    onnxruntime = _import_onnxruntime()
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, [provider])
    except Exception as error:  # onnxruntime's own exceptions share no narrower base
        raise ArtifactError(f"{path}: onnxruntime cannot load this graph: {error}") from error
    if session.get_providers()[0] != provider:
        raise DeviceError(
            f"{provider} did not start (onnxruntime fell back to {session.get_providers()[0]}): "
            "check the CUDA driver and libraries"
        )
    return session


class OnnxEncoder:
    """`encoder.onnx`: images to the decoder's state after the image."""

    def __init__(
        self, path: Path, state: Mapping[str, str], device: str, threads: int | None
    ) -> None:
        self._session = open_session(path, device, threads)
        self._outputs = list(state)
        _expect_names(path, self._session, {"images"}, set(state))

    def __call__(self, images: FloatArray) -> LstmState:
        return dict(
            zip(self._outputs, self._session.run(self._outputs, {"images": images}), strict=True)
        )


class OnnxLstmDecoder:
    """`decoder_step.onnx`: a token and the state to logits and the next state.

    `state` maps each state input of the graph to the output that holds its next value.
    """

    def __init__(
        self,
        path: Path,
        state: Mapping[str, str],
        start_token: int,
        device: str,
    ) -> None:
        # A step is small, and the idle threads of a second pool would spin on the cores that the
        # encoder and the preprocessing need: with one thread, whole captions are faster.
        self._session = open_session(path, device, threads=1)
        self._state = list(state)
        self._outputs = ["logits", *state.values()]
        self._start_token = start_token
        _expect_names(path, self._session, {"tokens", *state}, set(self._outputs))
        shapes = {node.name: node.shape for node in self._session.get_outputs()}
        self.vocabulary_size = shapes["logits"][-1]

    def start(self, features: LstmState) -> tuple[FloatArray, LstmState]:
        batch = len(features[self._state[0]])
        return self.step(np.full(batch, self._start_token, np.int64), features)

    def step(self, tokens: TokenArray, state: LstmState) -> tuple[FloatArray, LstmState]:
        feeds: dict[str, NDArray[Any]] = {"tokens": tokens, **state}
        logits, *values = self._session.run(self._outputs, feeds)
        return logits, dict(zip(self._state, values, strict=True))

    def select(self, state: LstmState, rows: NDArray[np.intp]) -> LstmState:
        return {name: values[rows] for name, values in state.items()}


def _expect_names(
    path: Path, session: onnxruntime.InferenceSession, inputs: set[str], outputs: set[str]
) -> None:
    found_inputs = {node.name for node in session.get_inputs()}
    found_outputs = {node.name for node in session.get_outputs()}
    if found_inputs != inputs or found_outputs != outputs:
        raise ArtifactError(
            f"{path}: graph of {sorted(found_inputs)} -> {sorted(found_outputs)}, but the manifest "
            f"wires {sorted(inputs)} -> {sorted(outputs)}; export again"
        )
