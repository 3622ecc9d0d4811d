"""ONNX graphs on a device: the only file that imports onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from capexport.decoding import State
from capexport.errors import ArtifactError, DeviceError, MissingExtraError, OptionError

if TYPE_CHECKING:
    import onnxruntime

# An array, or onnxruntime's `OrtValue` on the device where a graph left it.
Value: TypeAlias = Any
# As `onnxruntime.InferenceSession` takes them: names, or names with options.
Providers: TypeAlias = Sequence[str | tuple[str, Mapping[str, Any]]]

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Device:
    """A kind of hardware that onnxruntime computes on.

    Attributes:
        name: what `device=` calls it.
        provider, options: its execution provider, and what that is told.
        extra: what installs the provider: the extra of capexport.
        memory: where values stay between graphs, as onnxruntime names it.
        images_per_core: how many images a small encoder takes at once for each core; None for a
            whole batch.
        core_batches: whether each core may take a batch of its own through a small model.
    """

    name: str
    provider: str
    extra: str
    options: Mapping[str, str] = field(default_factory=dict)
    memory: str = "cpu"
    images_per_core: int | None = None
    core_batches: bool = False


# In the order that "auto" tries them in.
DEVICES = (
    # TensorFloat-32, CUDA's default, would be faster than float32 but not the same; an exhaustive
    # search for convolutions, another, takes seconds for every new batch size.
    Device(
        "cuda",
        "CUDAExecutionProvider",
        extra="gpu",
        options={"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
        memory="cuda",
    ),
    # The activations of more images than two a core spill from its cache: a batch of 32 in parts
    # of four takes two cores three quarters of the time that it takes them as a whole.
    Device(
        "cpu", "CPUExecutionProvider", extra="cpu", images_per_core=2, core_batches=True
    ),
)  # fmt: skip


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


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Target:
    """Where graphs run, and how they are opened.

    Attributes:
        device: the kind of hardware; `index` counts several of a kind.
        threads: CPU threads of each graph; all cores by default.
        providers, session_options: the caller's own, in place of what the device's row says.
        folded: a CPU computes float16 in float32: whether the weights are converted once, into
            twice their size, or whenever they are used.
    """

    device: Device
    index: int | None = None
    threads: int | None = None
    providers: Providers = ()
    session_options: onnxruntime.SessionOptions | None = None
    folded: bool = True

    def __post_init__(self) -> None:
        if self.threads is None:
            return
        if not isinstance(self.threads, int) or isinstance(self.threads, bool) or self.threads < 1:
            raise OptionError(f"threads must be at least 1, got {self.threads!r}")
        if self.session_options is not None:
            raise OptionError("threads are part of session_options: pass one of the two")

    @property
    def name(self) -> str:
        """What `device=` calls it, such as "cpu" or "cuda:1"."""
        return self.device.name if self.index is None else f"{self.device.name}:{self.index}"

    def require_provider(self) -> None:
        """
        Raises:
            MissingExtraError, DeviceError: no onnxruntime, or none with this provider.
        """
        if self.device.provider not in _import_onnxruntime().get_available_providers():
            raise DeviceError(
                f"this onnxruntime has no {self.device.provider}: install "
                f"`capexport[{self.device.extra}]`, and no other package of onnxruntime beside it"
            )

    def open(
        self, path: Path, *, threads: int | None = None, mapped: bool = False, bound: bool = False
    ) -> Graph:
        """Open a graph, and make sure that it really runs here.

        Args:
            threads: in place of the target's own.
            mapped: leave external weights where they are mapped, instead of repacking them into
                memory of this process: twice the weights are not to be had everywhere.
            bound: leave what the graph computes with onnxruntime, even in the host's memory.
        Raises:
            MissingExtraError, DeviceError: as `require_provider`, or the provider does not start.
            ArtifactError: onnxruntime cannot load the graph.
        """
        self.require_provider()
        providers = list(self.providers) or [(self.device.provider, self._provider_options())]
        options = self.session_options or self._session_options(threads or self.threads, mapped)
        try:
            session = _import_onnxruntime().InferenceSession(path, options, providers)
        except Exception as error:  # onnxruntime's own exceptions share no narrower base
            raise ArtifactError(f"{path}: onnxruntime cannot load this graph: {error}") from error
        if session.get_providers()[0] != self.device.provider:
            raise DeviceError(
                f"{self.device.provider} did not start (onnxruntime fell back to "
                f"{session.get_providers()[0]}): check its driver and libraries"
            )
        on_host = self.device.memory == "cpu" and not bound
        return Graph(path, session, None if on_host else (self.device.memory, self.index or 0))

    def _provider_options(self) -> dict[str, str]:
        index = {} if self.index is None else {"device_id": str(self.index)}
        return {**self.device.options, **index}

    def _session_options(self, threads: int | None, mapped: bool) -> onnxruntime.SessionOptions:
        onnxruntime = _import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        # Idle threads would spin on the cores that the next graph, or preprocessing, needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if not self.folded:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            # Conversions run right before their use, not all at the start, and leave nothing.
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
            options.enable_mem_pattern = options.enable_cpu_mem_arena = False
        return options


CPU = Target(DEVICES[-1])


def targets(
    device: str = "cpu",
    threads: int | None = None,
    providers: Providers | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
) -> list[Target]:
    """What to try in turn: one target, or for "auto" each device whose provider is installed.

    Raises:
        DeviceError: there is no such device.
        OptionError: arguments that contradict each other.
    """
    options: Any = {"threads": threads, "session_options": session_options}
    if providers:
        if device != "cpu":
            raise OptionError("device and providers both say where graphs run: pass one of the two")
        return [_target_of_providers(providers, options)]
    if device == "auto":
        available = _import_onnxruntime().get_available_providers()
        return [Target(row, **options) for row in DEVICES if row.provider in available]
    name, colon, index = device.partition(":")
    row = next((row for row in DEVICES if row.name == name), None)
    if row is None or (colon and not (index.isdecimal() and row.memory != "cpu")):
        names = ", ".join(row.name for row in DEVICES)
        raise DeviceError(f"unknown device {device!r}: choose auto, {names}, or one as cuda:1")
    return [Target(row, int(index) if colon else None, **options)]


def _target_of_providers(providers: Providers, options: Any) -> Target:
    """The first of the caller's providers is the one that must start."""
    first = providers[0]
    name, settings = (first, {}) if isinstance(first, str) else first
    row = next((row for row in DEVICES if row.provider == name), None)
    row = row or Device(name, name, extra="gpu")
    index = int(settings["device_id"]) if "device_id" in settings else None
    return Target(row, index, providers=tuple(providers), **options)


class Graph:
    """An opened graph, whose outputs come back as arrays, or stay where they were computed.

    Attributes:
        inputs, outputs: shape and element type of each, by name.
    """

    def __init__(self, path: Path, session: Any, memory: tuple[str, int] | None) -> None:
        """`memory`: the device on which values stay, and its index; None if all are arrays."""
        self.path = path
        self.session = session
        self.inputs = {node.name: node for node in session.get_inputs()}
        self.outputs = {node.name: node for node in session.get_outputs()}
        self._memory = memory

    def expect(self, inputs: Collection[str], outputs: Collection[str]) -> None:
        """
        Raises:
            ArtifactError: inputs or outputs have other names.
        """
        found = sorted(self.inputs), sorted(self.outputs)
        if found != (sorted(inputs), sorted(outputs)):
            raise ArtifactError(
                f"{self.path}: graph of {found[0]} -> {found[1]}, but the manifest wires "
                f"{sorted(inputs)} -> {sorted(outputs)}; export again"
            )

    def run(
        self, feeds: Mapping[str, Value], outputs: Collection[str], host: Collection[str] = ()
    ) -> dict[str, Value]:
        """Compute `outputs`, those in `host` as arrays, and the others wherever values stay.

        Raises:
            ArtifactError: onnxruntime fails in the graph.
        """
        try:
            if self._memory is None:
                values = self.session.run(list(outputs), feeds)
            else:
                values = self._run_bound(feeds, outputs, host)
        except Exception as error:  # onnxruntime's own exceptions share no narrower base
            raise ArtifactError(f"{self.path}: onnxruntime failed in it: {error}") from error
        return dict(zip(outputs, values, strict=True))

    def _run_bound(
        self, feeds: Mapping[str, Value], outputs: Collection[str], host: Collection[str]
    ) -> list[Value]:
        binding = self.session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, *(("cpu",) if name in host else self._memory or ()))
        self.session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return [v.numpy() if n in host else v for n, v in zip(outputs, values, strict=True)]

    def select(self, state: State, rows: NDArray[np.intp]) -> State:
        """The values of `rows` alone, in that order.

        Those on a device go through the host, but only when a caption ends.
        """
        return {
            name: value[rows] if isinstance(value, np.ndarray) else self._stay(value.numpy()[rows])
            for name, value in state.items()
        }

    def empty(self, name: str, batch: int) -> Value:
        """A first value for an input: its free axes, but for the batch, have length 0."""
        node = self.inputs[name]
        shape = [size if isinstance(size, int) else 0 for size in node.shape]
        return self._stay(np.empty([batch, *shape[1:]], _NUMPY_TYPES[node.type]))

    def _stay(self, array: NDArray[Any]) -> Value:
        if self._memory is None:
            return array
        return _import_onnxruntime().OrtValue.ortvalue_from_numpy(array, *self._memory)


def batch_size(state: State) -> int:
    """How many rows a state's values have."""
    value = next(iter(state.values()))
    return int(value.shape[0] if isinstance(value, np.ndarray) else value.shape()[0])
