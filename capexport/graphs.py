"""Encoder and decoder over ONNX graphs. The only file that imports onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from capexport.decoding import Decoder, DecodingOptions, Hypothesis, Prompts, TokenArray
from capexport.errors import ArtifactError, DeviceError, MissingExtraError
from capexport.preprocessing import FloatArray

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TensorFloat-32, CUDA's default, would be faster than float32 but not the same; an exhaustive
# search for convolutions, another, takes seconds for every new batch size.
PROVIDER_OPTIONS = {
    "cpu": {},
    "cuda": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
}

# The decoder's state by the names of the step graph's inputs, float32 (batch, hidden_size) each:
# arrays, or on a GPU onnxruntime's own values.
LstmState: TypeAlias = dict[str, Any]
OpenGraph: TypeAlias = "Callable[[Path], onnxruntime.InferenceSession]"


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


def open_session(
    path: Path,
    device: str,
    threads: int | None,
    *,
    mapped: bool = False,
    folded: bool = True,
) -> onnxruntime.InferenceSession:
    """Open a graph on `device`, and make sure that it really runs there.

    `mapped` leaves a CPU graph's external weights where they are mapped, instead of repacking them
    into memory of this process: twice the weights are not to be had everywhere. A CPU computes
    float16 in float32; `folded` converts the weights once, into twice their size, and otherwise
    they are converted whenever they are used.

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
    # Idle threads would spin on the cores that the next graph, or preprocessing, needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not folded:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # Conversions run right before their use, not all at the start, and leave nothing behind.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = options.enable_cpu_mem_arena = False
    try:
        session = onnxruntime.InferenceSession(
            path, options, [(provider, PROVIDER_OPTIONS[device])]
        )
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
        self,
        path: Path,
        state: Mapping[str, str],
        open_graph: OpenGraph,
        *,
        at_once: int | None = None,
        bound_to: str | None = None,
    ) -> None:
        """`at_once`: how many images the graph is given together, all by default; `bound_to`: the
        device on which the state stays, by default none, and the state is arrays."""
        self._session = open_graph(path)
        self._outputs = list(state)
        self._at_once = at_once
        self._bound_to = bound_to
        _expect_names(path, self._session, {"images"}, set(state))

    def __call__(self, images: FloatArray) -> LstmState:
        if self._bound_to:
            outputs = dict.fromkeys(self._outputs, self._bound_to)
            return _run_bound(self._session, {"images": images}, {}, outputs)
        step = self._at_once or len(images)
        parts = [
            self._session.run(self._outputs, {"images": images[start : start + step]})
            for start in range(0, len(images), step)
        ]
        values = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return dict(zip(self._outputs, values, strict=True))


class OnnxLstmDecoder(Decoder):
    """`decoder_step.onnx`, a token and the state to logits and the next state, and
    `decoder_loop.onnx`, the state after the image to whole captions.

    `state` maps each state input of the step graph to the output that holds its next value;
    `options` are those that the loop was built with. Where there is a loop, the step graph is
    opened only when options need it.
    """

    def __init__(
        self,
        step: Path,
        loop: Path | None,
        state: Mapping[str, str],
        start_token: int,
        vocabulary_size: int,
        options: DecodingOptions,
        open_graph: OpenGraph,
        bound_to: str | None = None,
    ) -> None:
        self._bound_to = bound_to
        self._step_path, self._loop_path = step, loop
        self._state = list(state)
        self._outputs = ["logits", *state.values()]
        self._start_token = start_token
        self._vocabulary_size = vocabulary_size
        self._fixed = (options.end_tokens, options.suppress_tokens)
        self._open = open_graph
        _ = self._loop if loop else self._step

    @cached_property
    def _step(self) -> onnxruntime.InferenceSession:
        session = self._open(self._step_path)
        _expect_names(self._step_path, session, {"tokens", *self._state}, set(self._outputs))
        width = {node.name: node.shape for node in session.get_outputs()}["logits"][-1]
        if width != self._vocabulary_size:
            raise ArtifactError(
                f"{self._step_path}: {self._vocabulary_size} words, but logits for {width}; "
                "export again"
            )
        return session

    @cached_property
    def _loop(self) -> onnxruntime.InferenceSession:
        assert self._loop_path is not None
        session = self._open(self._loop_path)
        inputs = {"max_tokens", "min_tokens", *(f"first_{name}" for name in self._state)}
        _expect_names(self._loop_path, session, inputs, {"words", "log_probabilities"})
        return session

    def start(self, features: LstmState, prompts: object = None) -> tuple[FloatArray, LstmState]:
        state = features[self._state[0]]
        batch = state.shape()[0] if self._bound_to else len(state)
        return self.step(np.full(batch, self._start_token, np.int64), features)

    def step(self, tokens: TokenArray, state: LstmState) -> tuple[FloatArray, LstmState]:
        if self._bound_to:
            places = dict.fromkeys(self._outputs, self._bound_to) | {"logits": "cpu"}
            logits, *values = _run_bound(self._step, {"tokens": tokens}, state, places).values()
            return logits.numpy(), dict(zip(self._state, values, strict=True))
        logits, *values = self._step.run(self._outputs, {"tokens": tokens, **state})
        return logits, dict(zip(self._state, values, strict=True))

    def select(self, state: LstmState, rows: NDArray[np.intp]) -> LstmState:
        if device := self._bound_to:
            return {name: _on_device(v.numpy()[rows], device) for name, v in state.items()}
        return {name: values[rows] for name, values in state.items()}

    def greedy(self, features: LstmState, options: DecodingOptions) -> list[Hypothesis] | None:
        fixed = (options.end_tokens, options.suppress_tokens)
        if self._loop_path is None or options.repetition_penalty != 1 or fixed != self._fixed:
            return None
        states = {f"first_{name}": features[name] for name in self._state}
        limits = {
            "max_tokens": np.array(options.max_tokens, np.int64),
            "min_tokens": np.array(options.min_tokens, np.int64),
        }
        outputs = ["words", "log_probabilities"]
        if self._bound_to:
            values = _run_bound(self._loop, limits, states, dict.fromkeys(outputs, "cpu"))
            words, log_probabilities = (value.numpy() for value in values.values())
        else:
            words, log_probabilities = self._loop.run(outputs, {**limits, **states})
        [end] = options.end_tokens
        hypotheses = []
        for row, log_probability in zip(words.T.tolist(), log_probabilities.tolist(), strict=True):
            length = row.index(end) if end in row else len(row)
            hypotheses.append(Hypothesis(row[:length], log_probability))
        return hypotheses


class OnnxImageEncoder:
    """BLIP-2's `vision_encoder.onnx`: images to features, (batch, query tokens, width)."""

    def __init__(
        self, path: Path, device: str, threads: int | None, *, mapped: bool, folded: bool
    ) -> None:
        self._session = open_session(path, device, threads, mapped=mapped, folded=folded)
        _expect_names(path, self._session, {"pixel_values"}, {"image_features"})

    def __call__(self, images: FloatArray) -> NDArray[Any]:
        features: NDArray[Any] = self._session.run(None, {"pixel_values": images})[0]
        return features


@dataclass
class CacheState:
    """Keys and values by input name, kept on the device, and the mask of what they stand for."""

    cache: dict[str, onnxruntime.OrtValue]
    mask: TokenArray


class OnnxCacheDecoder(Decoder):
    """BLIP-2's language model: `embed_tokens.onnx` and `decoder_model_merged.onnx`, with
    `encoder_model.onnx` in front where it is an encoder-decoder.

    `cache` maps each key and value input of the decoder to the output that holds its next value.
    Keys and values of the encoder, of the same names with "encoder" in place of "decoder", are
    outputs of its graph and stay as they are from step to step.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        cache: Mapping[str, str],
        image_token: int,
        start_token: int | None,
        device: str,
        threads: int | None,
        *,
        mapped: bool,
        folded: bool,
    ) -> None:
        open_part = partial(open_session, device=device, mapped=mapped, folded=folded)
        self._embed = open_part(files["embed_tokens.onnx"], threads=1)
        _expect_names(files["embed_tokens.onnx"], self._embed, {"input_ids"}, {"inputs_embeds"})
        step = files["decoder_model_merged.onnx"]
        self._step = open_part(step, threads=threads)
        self._cache = dict(cache)
        self._encoded: list[str] = []
        self._encoder = None
        self._mask_input = "attention_mask"
        if start_token is not None:
            self._mask_input = "encoder_attention_mask"
            self._encoded = [name.replace(".decoder.", ".encoder.") for name in cache]
            path = files["encoder_model.onnx"]
            self._encoder = open_part(path, threads=threads)
            inputs = {"inputs_embeds", "attention_mask"}
            _expect_names(path, self._encoder, inputs, set(self._encoded))
        inputs = {"inputs_embeds", self._mask_input, *cache, *self._encoded}
        _expect_names(step, self._step, inputs, {"logits", *cache.values()})
        self._inputs = {node.name: node for node in self._step.get_inputs()}
        self.vocabulary_size = self._step.get_outputs()[0].shape[-1]
        self._image_token = image_token
        self._start_token = start_token
        self._device = device

    def start(
        self, features: NDArray[Any], prompts: Prompts | None
    ) -> tuple[FloatArray, CacheState]:
        assert prompts is not None
        embeddings = self._embed_tokens(prompts.tokens)
        embeddings[prompts.tokens == self._image_token] = features.reshape(-1, features.shape[-1])
        state = CacheState({}, prompts.mask)
        batch = len(prompts.tokens)
        if self._encoder is not None:
            inputs = {"inputs_embeds": embeddings, "attention_mask": prompts.mask}
            places = dict.fromkeys(self._encoded, self._device)
            state.cache = _run_bound(self._encoder, inputs, {}, places)
            embeddings = self._embed_tokens(np.full((batch, 1), self._start_token, np.int64))
        for name in self._cache:
            _, heads, _, width = self._inputs[name].shape
            kind = np.float16 if self._inputs[name].type == "tensor(float16)" else np.float32
            state.cache[name] = _on_device(np.empty((batch, heads, 0, width), kind), self._device)
        return self._advance(embeddings, state)

    def step(self, tokens: TokenArray, state: CacheState) -> tuple[FloatArray, CacheState]:
        mask = state.mask
        if self._encoder is None:
            mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
        return self._advance(self._embed_tokens(tokens[:, None]), CacheState(state.cache, mask))

    def select(self, state: CacheState, rows: NDArray[np.intp]) -> CacheState:
        # Through the host, but only when a caption ends: steps leave the cache where it is.
        device = self._device
        cache = {name: _on_device(v.numpy()[rows], device) for name, v in state.cache.items()}
        return CacheState(cache, state.mask[rows])

    def _embed_tokens(self, tokens: TokenArray) -> NDArray[Any]:
        embeddings: NDArray[Any] = self._embed.run(None, {"input_ids": tokens})[0]
        return embeddings

    def _advance(
        self, embeddings: NDArray[Any], state: CacheState
    ) -> tuple[FloatArray, CacheState]:
        inputs = {"inputs_embeds": embeddings, self._mask_input: state.mask}
        places = {"logits": "cpu", **dict.fromkeys(self._cache.values(), self._device)}
        logits, *values = _run_bound(self._step, inputs, state.cache, places).values()
        moved = dict(zip(self._cache, values, strict=True))
        return logits.numpy(), CacheState({**state.cache, **moved}, state.mask)


def _run_bound(
    session: onnxruntime.InferenceSession,
    arrays: Mapping[str, NDArray[Any]],
    values: Mapping[str, onnxruntime.OrtValue],
    outputs: Mapping[str, str],
) -> dict[str, onnxruntime.OrtValue]:
    """Run a graph whose outputs stay on the devices that `outputs` names."""
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, device in outputs.items():
        binding.bind_output(name, device)
    session.run_with_iobinding(binding)
    return dict(zip(outputs, binding.get_outputs(), strict=True))


def _on_device(array: NDArray[Any], device: str) -> onnxruntime.OrtValue:
    return _import_onnxruntime().OrtValue.ortvalue_from_numpy(array, device)


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
