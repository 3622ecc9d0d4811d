"""ONNX graphs on a device. No other file imports onnxruntime."""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from capexport.decoding import Likeliest, State
from capexport.errors import ArtifactError, DeviceError, OptionError, importing
from capexport.onnx_file import gather_graph, likeliest_graph, product_graph

if TYPE_CHECKING:
    import onnxruntime

# An array, or onnxruntime's `OrtValue` on the device where a graph left it.
Value: TypeAlias = Any
# As `onnxruntime.InferenceSession` takes them: names, or names with options.
Providers: TypeAlias = Sequence[str | tuple[str, Mapping[str, Any]]]

_MOST_THREADS = 1024  # many more, and onnxruntime takes minutes to start
_SILENT = 4  # onnxruntime raises what it logs as an error, too
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Device:
    """A kind of hardware that onnxruntime computes on.

    Attributes:
        name: what `device=` calls it.
        provider, options: its execution provider, and the options of that.
        extra: the extra of capexport that installs the provider; "" if none does.
        memory: where values stay between graphs, as onnxruntime names it.
        images_per_core: how many images of a batch each core takes through a small encoder at once;
            None if all cores take the whole batch together.
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
    # CUDA's defaults: TensorFloat-32 is faster than float32, but not the same; an exhaustive search
    # for convolutions takes seconds for every new batch size.
    Device(
        "cuda",
        "CUDAExecutionProvider",
        extra="gpu",
        options={"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
        memory="cuda",
    ),
    # The activations of more than two images spill from a core's cache.
    Device(
        "cpu", "CPUExecutionProvider", extra="cpu", images_per_core=2, core_batches=True
    ),
)  # fmt: skip


def _import_onnxruntime() -> Any:
    first = "onnxruntime" not in sys.modules
    with importing(
        "captioning needs onnxruntime: `pip install 'capexport[cpu]'`, or "
        "`pip install 'capexport[gpu]'` for CUDA (never both)"
    ):
        import onnxruntime
    if first:  # otherwise somebody else may have set it
        onnxruntime.set_default_logger_severity(_SILENT)
    return onnxruntime


def runtime_version() -> str:
    """onnxruntime's version, whichever of its packages is installed."""
    return str(_import_onnxruntime().__version__)


def available_cores() -> int:
    """CPU cores that this process may use, within a container's quota."""
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, cpu_quota() or cores)


def cpu_quota(root: Path = Path("/")) -> int | None:
    """CPUs that control groups (version 1 or 2), such as a container's, grant this process: the
    least of its own group and those around it, rounded up. None if nothing is set.

    Source: "CPU Interface Files" in Linux' cgroup-v2.rst, and sched-bwc.rst.
    """
    base = root / "sys/fs/cgroup"
    folders = {base, base / "cpu", base / "cpu,cpuacct"}  # in a container, its own group's
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for line in groups:
        _, controllers, name = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            group = base / controllers / name.strip("/")
            folders.update(folder for folder in (group, *group.parents) if base in folder.parents)
    return min(filter(None, map(_quota_of, folders)), default=None)


def _quota_of(group: Path) -> int | None:
    """CPUs that one control group grants."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None


@cache
def cuts_off_sums() -> bool:
    """Whether onnxruntime's fastest products of 8-bit matrices are wrong here. x86 processors
    without VNNI add two products in 16 bits, and what doesn't fit is lost. onnxruntime's slower
    products are right there, too."""
    onnxruntime = _import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(product_graph(), options, ["CPUExecutionProvider"])
    a, b = np.full((4, 64), 255, np.uint8), np.full((64, 4), 127, np.int8)
    [product] = session.run(None, {"a": a, "b": b})
    return bool((product != 64 * 255 * 127).any())


@cache
def _load_cuda_libraries() -> str:
    """Load the libraries in NVIDIA's packages, from the extra `gpu`; return what could not be
    loaded, in words."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        getattr(_import_onnxruntime(), "preload_dlls", lambda **_: None)(directory="")
    return said.getvalue().strip()


def _cuda_trouble(index: int) -> str | None:
    """Why CUDA cannot compute on a GPU, as far as the driver can tell; None if it can."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed here (a container must be given its GPUs)"
    count = ctypes.c_int()
    if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(ctypes.byref(count))):
        return f"the NVIDIA driver does not work (CUDA error {code}): see what nvidia-smi says"
    if index >= count.value:
        return f"there is no GPU {index}: the NVIDIA driver finds {count.value}"
    return None


@dataclass(frozen=True)
class Target:
    """Where graphs run, and how they are opened.

    Attributes:
        device: the kind of hardware; `index` says which one of several.
        threads: CPU threads of each graph; all cores by default.
        providers, session_options: the caller's own, in place of those in the device's row.
        folded: what happens to float16 weights on a CPU, which computes in float32. If true, they
            are converted once, into twice their size; if false, whenever they are used.
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
        whole = isinstance(self.threads, int) and not isinstance(self.threads, bool)
        if not (whole and 1 <= self.threads <= _MOST_THREADS):
            raise OptionError(
                f"threads must be at least 1, at most {_MOST_THREADS}, got {self.threads!r}"
            )
        if self.session_options is not None:
            raise OptionError("threads are part of session_options: pass one of the two")

    @property
    def name(self) -> str:
        """What `device=` calls it, such as "cpu" or "cuda:1"."""
        return self.device.name if self.index is None else f"{self.device.name}:{self.index}"

    def require_provider(self) -> None:
        """Check that this onnxruntime has the device's provider.

        Raises:
            MissingExtraError, DeviceError: no onnxruntime, or none with this provider.
        """
        if self.device.provider not in _import_onnxruntime().get_available_providers():
            extra = self.device.extra
            package = f"`capexport[{extra}]`" if extra else "the package of onnxruntime that has it"
            raise DeviceError(
                f"this onnxruntime has no {self.device.provider}: install {package}, and no other "
                "package of onnxruntime beside it"
            )

    def open(
        self, path: Path, *, threads: int | None = None, mapped: bool = False, bound: bool = False
    ) -> Graph:
        """Open a graph, and make sure that it really runs here.

        Args:
            threads: in place of the target's own.
            mapped: leave external weights mapped from their file, instead of repacking them into
                this process's memory, which not every machine has twice.
            bound: leave the outputs with onnxruntime, even if they are in the host's memory.
        Raises:
            MissingExtraError, DeviceError: as for `require_provider`; or the provider does not
                start.
            ArtifactError: onnxruntime cannot load the graph.
        """
        self.require_provider()
        on_host = self.device.memory == "cpu" and not bound
        memory = None if on_host else (self.device.memory, self.index or 0)
        return Graph(path, memory, partial(self._session, threads=threads, mapped=mapped))

    def _session(self, model: Path | bytes, threads: int | None, mapped: bool) -> Any:
        cuda = self.device.memory == "cuda"
        unloaded = _load_cuda_libraries() if cuda else ""
        providers = list(self.providers) or [(self.device.provider, self._provider_options())]
        options = self.session_options or self._session_options(threads or self.threads, mapped)
        try:
            # The fallback to the CPU prints, and is of no use if the CPU itself failed.
            session = _import_onnxruntime().InferenceSession(
                model, options, providers, enable_fallback=cuda or bool(self.providers)
            )
        except Exception as error:  # onnxruntime's own exceptions share no narrower base
            if cuda and (trouble := _cuda_trouble(self.index or 0)):
                raise DeviceError(f"{self.device.provider} did not start: {trouble}") from error
            raise ArtifactError(
                f"{model!s}: onnxruntime cannot load this graph: {error}"
            ) from error
        if session.get_providers()[0] != self.device.provider:
            reason = "check its driver and libraries"
            if cuda:
                missing = f" ({unloaded.splitlines()[0]})" if unloaded else ""
                reason = _cuda_trouble(self.index or 0) or (
                    "the NVIDIA driver works, but libraries of CUDA or cuDNN are missing or of "
                    f"another version{missing}: `pip install 'capexport[gpu]'` brings them"
                )
            raise DeviceError(
                f"{self.device.provider} did not start (onnxruntime fell back to "
                f"{session.get_providers()[0]}): {reason}"
            )
        return session

    def _provider_options(self) -> dict[str, str]:
        index = {} if self.index is None else {"device_id": str(self.index)}
        return {**self.device.options, **index}

    def _session_options(self, threads: int | None, mapped: bool) -> onnxruntime.SessionOptions:
        onnxruntime = _import_onnxruntime()
        options = onnxruntime.SessionOptions()
        # onnxruntime does not know of a container's quota.
        options.intra_op_num_threads = threads or (available_cores() if cpu_quota() else 0)
        options.log_severity_level = _SILENT
        if cuts_off_sums():
            options.add_session_config_entry("session.x64quantprecision", "1")
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
    """The targets to try in turn: one, or for "auto" each device whose provider is installed.

    Raises:
        DeviceError: there is no such device.
        OptionError: arguments that contradict each other.
    """
    options: Any = {"threads": threads, "session_options": session_options}
    if providers:
        if device != "cpu":
            raise OptionError("device and providers both say where graphs run: pass one of the two")
        if isinstance(providers, str):
            raise OptionError(f"providers takes a list, such as [{providers!r}]")
        return [_target_of_providers(providers, options)]
    if device == "auto":
        available = _import_onnxruntime().get_available_providers()
        return [Target(row, **options) for row in DEVICES if row.provider in available]
    name, colon, index = str(device).partition(":")
    row = next((row for row in DEVICES if row.name == name), None)
    if row is None or (colon and not (index.isdecimal() and row.memory != "cpu")):
        names = ", ".join(row.name for row in DEVICES)
        raise DeviceError(f"unknown device {device!r}: choose auto, {names}, or one as cuda:1")
    return [Target(row, int(index) if colon else None, **options)]


def _target_of_providers(providers: Providers, options: Any) -> Target:
    """A target for the caller's providers, of which the first must start."""
    first = providers[0]
    name, settings = (first, {}) if isinstance(first, str) else first
    row = next((row for row in DEVICES if row.provider == name), None)
    row = row or Device(name, name, extra="")
    index = int(settings["device_id"]) if "device_id" in settings else None
    return Target(row, index, providers=tuple(providers), **options)


_graphs: WeakSet[Graph] = WeakSet()
_reopening = threading.Lock()


def _leave_sessions_to_the_parent() -> None:
    """In a forked process, a session's memory is there but its threads are not, and freeing it
    would wait for them. So inherited sessions are never freed, and new ones opened when needed."""
    global _reopening
    _reopening = threading.Lock()
    for graph in _graphs:
        graph.abandon_session()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_sessions_to_the_parent)


class Graph:
    """An opened graph, whose outputs come back as arrays, or stay where they were computed.

    Several threads may use it at once, and it keeps working in a forked process.

    Attributes:
        inputs, outputs: shape and element type of each, by name.
    """

    def __init__(
        self,
        path: Path,
        memory: tuple[str, int] | None,
        open_session: Callable[[Path | bytes], Any],
        content: bytes | None = None,
    ) -> None:
        """
        Args:
            memory: the device on which values stay, and its index; None if all are arrays.
            open_session: opens a session from a file or its content; again in a forked process.
            content: the graph's bytes, in place of the file at `path`.
        """
        self.path = path
        self._open = partial(open_session, content or path)
        self._open_session = open_session
        self._session = session = self._open()
        self._gathers: dict[tuple[str, ...], Graph] = {}
        self._ranking: Graph | None = None
        _graphs.add(self)
        self.inputs = {node.name: node for node in session.get_inputs()}
        self.outputs = {node.name: node for node in session.get_outputs()}
        self._memory = memory

    @property
    def session(self) -> Any:
        """onnxruntime's `InferenceSession`, this process's own."""
        if self._session is None:
            with _reopening:
                self._session = self._session or self._open()
        return self._session

    def abandon_session(self) -> None:
        """Forget the session, but never free its memory."""
        if self._session is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))
            self._session = None

    def expect(self, inputs: Collection[str], outputs: Collection[str]) -> None:
        """Check the names of the graph's inputs and outputs.

        Raises:
            ArtifactError: inputs or outputs have other names.
        """
        found = sorted(self.inputs), sorted(self.outputs)
        if found != (sorted(inputs), sorted(outputs)):
            raise ArtifactError(
                f"{self.path}: graph of {found[0]} -> {found[1]}, but the manifest wires "
                f"{sorted(inputs)} -> {sorted(outputs)}; export again"
            )

    def expect_shape(self, name: str, *sizes: int | None) -> None:
        """Check the shape of an input or output; None stands for any size.

        Raises:
            ArtifactError: it has another one.
        """
        shape = (self.inputs.get(name) or self.outputs[name]).shape
        fits = all(size in (None, found) for size, found in zip(sizes, shape, strict=False))
        if len(shape) != len(sizes) or not fits:
            raise ArtifactError(
                f"{self.path}: {name} of shape {_shown(shape)}, but the manifest and the words "
                f"want {_shown(sizes)}; export again"
            )

    def run(
        self, feeds: Mapping[str, Value], outputs: Collection[str], host: Collection[str] = ()
    ) -> dict[str, Value]:
        """Compute `outputs`: those in `host` as arrays, the others left where values stay.

        Raises:
            ArtifactError: onnxruntime fails in the graph, or its outputs are not as declared.
        """
        try:
            if self._memory is None:
                values = self.session.run(list(outputs), feeds)
            else:
                values = self._run_bound(feeds, outputs, host)
        except Exception as error:  # onnxruntime's own exceptions share no narrower base
            raise ArtifactError(f"{self.path}: onnxruntime failed in it: {error}") from error
        for name, value in zip(outputs, values, strict=True):
            if isinstance(value, np.ndarray):
                self._check_output(name, value.shape)
        return dict(zip(outputs, values, strict=True))

    def _check_output(self, name: str, shape: Sequence[int]) -> None:
        declared = self.outputs[name].shape
        fits = len(shape) == len(declared)
        for size, expected in zip(shape, declared, strict=False):
            fits = fits and (size == expected or not isinstance(expected, int))
        if not fits:  # onnxruntime does not check this
            raise ArtifactError(
                f"{self.path}: {name} came out in shape {_shown(shape)}, declared "
                f"{_shown(declared)}; export again"
            )

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
        """The values of these `rows`, in this order; values on a device stay there."""
        arrays = {name: v[rows] for name, v in state.items() if isinstance(v, np.ndarray)}
        others = tuple(name for name in state if name not in arrays)
        if not others:
            return arrays
        if others not in self._gathers:
            kinds = [(state[name].element_type(), len(state[name].shape())) for name in others]
            self._gathers[others] = self._beside(gather_graph(kinds))
        feeds = {f"in{number}": state[name] for number, name in enumerate(others)}
        outputs = [f"out{number}" for number in range(len(others))]
        values = self._gathers[others].run({**feeds, "rows": rows}, outputs)
        return {**arrays, **dict(zip(others, values.values(), strict=True))}

    def likeliest(self, logits: Value, excluded: Sequence[int], count: int) -> Likeliest:
        """As `Decoder.likeliest`, computed where this graph's output `logits` is."""
        shape = _shape(logits)
        self._check_output("logits", shape)
        # Its passes over the logits are too short to wake a thread for.
        self._ranking = self._ranking or self._beside(likeliest_graph(), threads=1)
        bias = np.zeros(shape[1], np.float32)
        bias[list(excluded)] = -np.inf
        feeds = {"logits": logits, "bias": bias, "count": np.array([min(count, len(bias))])}
        outputs = ["values", "places"]
        values = self._ranking.run(feeds, outputs, host=outputs)
        return values["values"], values["places"]

    def _beside(self, content: bytes, **how: Any) -> Graph:
        """Another graph on the same device as this one."""
        return Graph(self.path, self._memory, partial(self._open_session, **how), content)

    def empty(self, name: str, batch: int) -> Value:
        """A first value for an input: its free axes, except the batch, have length 0."""
        node = self.inputs[name]
        shape = [size if isinstance(size, int) else 0 for size in node.shape]
        return self._stay(np.empty([batch, *shape[1:]], _NUMPY_TYPES[node.type]))

    def _stay(self, array: NDArray[Any]) -> Value:
        if self._memory is None:
            return array
        return _import_onnxruntime().OrtValue.ortvalue_from_numpy(array, *self._memory)


def _shown(shape: Sequence[Any]) -> str:
    return "(" + ", ".join(str(size) if isinstance(size, int) else "any" for size in shape) + ")"


def batch_size(state: State) -> int:
    """How many rows a state's values have."""
    return int(_shape(next(iter(state.values())))[0])


def _shape(value: Value) -> Sequence[int]:
    shape: Sequence[int] = value.shape if isinstance(value, np.ndarray) else value.shape()
    return shape
