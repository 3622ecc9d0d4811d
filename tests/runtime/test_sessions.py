"""Devices, the caller's own sessions, and what a graph raises."""

import ctypes
import json
import logging
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from capexport import ArtifactError, Captioner, DeviceError, OptionError
from capexport.sessions import CPU, DEVICES, available_cores, cpu_quota, targets


def test_threads_reach_the_sessions(artifact: Path):
    captioner = Captioner.load(artifact, threads=3)
    captioner.caption(np.zeros((8, 8, 3), np.uint8), repetition_penalty=1.1)  # takes single steps
    decoder = captioner.decoder
    for graph in (captioner.encoder.graph, decoder.loop, decoder.step_graph):
        assert graph.session.get_session_options().intra_op_num_threads == 3
    assert captioner.threads == 3
    assert repr(captioner) == "<Captioner: cnn-lstm fp32 on cpu, 3 threads>"


CAPTIONS = """
import json
import numpy as np
from capexport import Captioner
noise = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8)
noise = noise.repeat(40, 1).repeat(40, 2)
captions = Captioner.load(threads=1).caption(list(noise), num_beams=1)
print(json.dumps([(caption.tokens, caption.log_probability) for caption in captions]))
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("qemu-x86_64"),
    reason="needs QEMU, as Debian's qemu-user has it, to be an x86 processor of 2013",
)
def test_an_older_processor_captions_the_same():
    """Without VNNI, what onnxruntime takes by itself lets sums of 8-bit products saturate."""
    command = [sys.executable, "-c", CAPTIONS]
    here, there = (
        json.loads(subprocess.run([*prefix, *command], check=True, capture_output=True).stdout)
        for prefix in ([], ["qemu-x86_64", "-cpu", "Haswell"])
    )
    for (tokens, log_probability), (other_tokens, other) in zip(here, there, strict=True):
        assert tokens == other_tokens
        assert log_probability == pytest.approx(other, abs=1e-3)


def test_a_provider_that_does_not_start_is_noticed(artifact: Path, monkeypatch, capfd):
    """onnxruntime itself then falls back to the CPU."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is here")
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    with pytest.raises(DeviceError, match="CUDAExecutionProvider did not start"):
        Captioner.load(artifact, device="cuda")
    with pytest.raises(DeviceError, match="CUDAExecutionProvider did not start"):
        Captioner.load(artifact, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    messages = []
    monkeypatch.setattr(logging.getLogger("capexport"), "info", lambda *said: messages.append(said))
    captioner = Captioner.load(artifact, device="auto", threads=1)
    assert captioner.device == "cpu"
    assert messages[0][1] == "cuda"


def test_auto_takes_the_cpu_last():
    assert DEVICES[-1].name == "cpu"
    assert [target.name for target in targets("auto")][-1] == "cpu"


@pytest.mark.parametrize("device", ["tpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "", "CPU", ":1"])
def test_devices_that_are_none(device: str):
    with pytest.raises(DeviceError, match="choose auto, cuda, cpu, or one as cuda:1"):
        targets(device)


def test_one_of_several_gpus():
    [target] = targets("cuda:1", threads=2)
    assert target.name == "cuda:1"
    assert target._provider_options()["device_id"] == "1"
    [first] = targets("cuda")
    assert "device_id" not in first._provider_options()
    settings = {"device_id": 2}
    [own] = targets(providers=[("CUDAExecutionProvider", settings), "CPUExecutionProvider"])
    assert (own.name, own.device.memory) == ("cuda:2", "cuda")
    assert own.providers[0] == ("CUDAExecutionProvider", settings)


def test_the_callers_own_session_options_and_providers(artifact: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    image = np.zeros((8, 8, 3), np.uint8)
    wanted = Captioner.load(artifact).caption(image).tokens
    own = Captioner.load(artifact, providers=["CPUExecutionProvider"], session_options=options)
    with pytest.warns(UserWarning, match="NoExecutionProvider"):  # onnxruntime's own
        Captioner.load(artifact, providers=["CPUExecutionProvider", "NoExecutionProvider"])
    used = own.encoder.graph.session.get_session_options()
    assert used.graph_optimization_level == options.graph_optimization_level
    assert own.caption(image).tokens == wanted
    with pytest.raises(DeviceError, match="has no NoExecutionProvider: install the package"):
        Captioner.load(artifact, providers=["NoExecutionProvider"])
    with pytest.raises(OptionError, match="pass one of the two"):
        Captioner.load(artifact, device="cuda", providers=["CPUExecutionProvider"])
    with pytest.raises(OptionError, match="pass one of the two"):
        Captioner.load(artifact, threads=2, session_options=options)


def test_values_are_reordered_where_they_are(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    import onnxruntime

    graph = CPU.open(artifact / "encoder.onnx", bound=True)
    rng = np.random.default_rng(0)
    shapes = [(3,), (3, 2), (3, 4, 0, 5), (3, 2, 6, 7)]
    arrays = {
        f"{kind.__name__} {number}": rng.normal(0, 9, shapes[number % 4]).astype(kind)
        for kind in (np.float32, np.float16, np.int64)
        for number in range(40)
    }
    state = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a) for n, a in arrays.items()}
    rows = np.array([2, 0, 0, 1, 2])
    with monkeypatch.context() as patch:
        patch.delattr(onnxruntime.OrtValue, "numpy")
        patch.delattr(onnxruntime.OrtValue, "ortvalue_from_numpy")
        chosen = graph.select({**state, "on the host": np.arange(3)}, rows)
    np.testing.assert_array_equal(chosen.pop("on the host"), rows)
    assert chosen.keys() == arrays.keys()
    for name, value in chosen.items():
        np.testing.assert_array_equal(value.numpy(), arrays[name][rows])
        assert value.numpy().dtype == arrays[name].dtype


@pytest.mark.parametrize("bound", [False, True])
def test_the_likeliest_tokens_are_taken_where_the_logits_are(artifact: Path, bound: bool):
    import onnxruntime

    graph = CPU.open(artifact / "decoder_step.onnx", bound=bound)
    words = graph.outputs["logits"].shape[1]
    logits = np.random.default_rng(0).normal(0, 4, (7, words)).astype(np.float32)
    logits[1] = logits[1].round()  # many equals
    logits[2] = 5
    logits[3, 1::2] = -np.inf
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    there = onnxruntime.OrtValue.ortvalue_from_numpy(logits) if bound else logits
    for excluded, count in (((), 6), ((0, 3, words - 1), 1), ((2,), words), ((5,), words + 1)):
        wanted = exact.copy()
        wanted[:, list(excluded)] = -np.inf
        ranked = np.argsort(-wanted, axis=1, kind="stable")[:, :count]
        values, tokens = graph.likeliest(there, excluded, count)
        np.testing.assert_array_equal(tokens, ranked)
        np.testing.assert_allclose(values, np.take_along_axis(wanted, ranked, 1), rtol=1e-5)
        assert values.dtype == np.float32
    with pytest.raises(ArtifactError, match=r"step\.onnx: logits came out in shape \(7, "):
        graph.likeliest(logits[:, 1:], (), 3)


def test_of_logits_that_are_no_numbers_none_is_the_likeliest(artifact: Path):
    graph = CPU.open(artifact / "decoder_step.onnx")
    words = graph.outputs["logits"].shape[1]
    for place, value in ((0, np.nan), (words // 2, np.nan), (words - 1, np.nan), (3, np.inf)):
        logits = np.random.default_rng(0).normal(0, 4, (3, words)).astype(np.float32)
        logits[1, place] = value
        values, _ = graph.likeliest(logits, (place,), 4)
        np.testing.assert_array_equal(np.isnan(values).all(axis=1), [False, True, False])


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_threads_that_are_none(artifact: Path, threads):
    with pytest.raises(OptionError, match="threads must be at least 1"):
        Captioner.load(artifact, threads=threads)


@pytest.mark.parametrize("bound", [False, True])
def test_what_a_session_raises_names_the_graph(artifact: Path, bound: bool):
    graph = CPU.open(artifact / "encoder.onnx", bound=bound)
    for feeds in ({"images": np.zeros((1, 3, 50, 50), np.float32)}, {"pictures": np.zeros(1)}, {}):
        with pytest.raises(ArtifactError, match=r"encoder\.onnx: onnxruntime failed"):
            graph.run(feeds, graph.outputs)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "rubbish"}, None),
        (  # the group itself has no bound, one around it has
            {
                "proc/self/cgroup": "0::/machine/pod/box\n",
                "sys/fs/cgroup/machine/pod/box/cpu.max": "max 100000\n",
                "sys/fs/cgroup/machine/pod/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/machine/cpu.max": "800000 100000\n",
            },
            3,
        ),
        (  # version 1, in a container
            {
                "proc/self/cgroup": "3:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (  # version 1, a service on its host
            {
                "proc/self/cgroup": "4:cpu:/system.slice/captions.service\n0::/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/system.slice/captions.service/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/system.slice/captions.service/cpu.cfs_period_us": "10000\n",
            },
            5,
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100\n"}, None),
    ],
)
def test_quotas_of_containers(tmp_path: Path, files: dict[str, str], cores: int | None):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cpu_quota(tmp_path) == cores


def test_a_quota_counts(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("capexport.sessions.cpu_quota", lambda: 1)
    assert available_cores() == 1
    captioner = Captioner.load(artifact)
    assert captioner.threads == 1
    options = captioner.encoder.graph.session.get_session_options()
    assert options.intra_op_num_threads == 1


def test_without_an_nvidia_driver_that_is_said(artifact: Path, monkeypatch, capfd):
    import onnxruntime

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
        with pytest.raises(DeviceError, match="no NVIDIA driver"):
            Captioner.load(artifact, device="cuda")
    else:
        pytest.skip("a driver is here")


def test_outputs_are_held_to_what_the_graph_declares(artifact: Path):
    graph = CPU.open(artifact / "encoder.onnx")
    width = graph.outputs["hidden"].shape[1]
    graph.expect_shape("hidden", None, width)
    for sizes in ((None, width + 1), (None,), (None, width, None), (1, width)):
        with pytest.raises(ArtifactError, match=r"encoder\.onnx: hidden of shape \(any, "):
            graph.expect_shape("hidden", *sizes)

    class Declared:
        name, shape = "hidden", ["batch", width + 1]

    graph.outputs["hidden"] = Declared()
    with pytest.raises(ArtifactError, match=r"encoder\.onnx: hidden came out in shape \(1, "):
        graph.run({"images": np.zeros((1, 3, 224, 224), np.float32)}, graph.outputs)
