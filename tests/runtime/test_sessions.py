"""Devices, the caller's own sessions, and what a graph raises."""

import logging
from pathlib import Path

import numpy as np
import pytest

from capexport import ArtifactError, Captioner, DeviceError, OptionError
from capexport.sessions import DEVICES, targets


def test_threads_reach_the_sessions(artifact: Path):
    captioner = Captioner.load(artifact, threads=3)
    captioner.caption(np.zeros((8, 8, 3), np.uint8), repetition_penalty=1.1)  # takes single steps
    decoder = captioner.decoder
    for graph in (captioner.encoder.graph, decoder.loop, decoder.step_graph):
        assert graph.session.get_session_options().intra_op_num_threads == 3
    assert captioner.threads == 3
    assert repr(captioner) == "<Captioner: cnn-lstm fp32 on cpu, 3 threads>"


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
    with pytest.raises(DeviceError, match="has no NoExecutionProvider"):
        Captioner.load(artifact, providers=["NoExecutionProvider"])
    with pytest.raises(OptionError, match="pass one of the two"):
        Captioner.load(artifact, device="cuda", providers=["CPUExecutionProvider"])
    with pytest.raises(OptionError, match="pass one of the two"):
        Captioner.load(artifact, threads=2, session_options=options)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_threads_that_are_none(artifact: Path, threads):
    with pytest.raises(OptionError, match="threads must be at least 1"):
        Captioner.load(artifact, threads=threads)


@pytest.mark.parametrize("bound", [False, True])
def test_what_a_session_raises_names_the_graph(artifact: Path, bound: bool):
    from capexport.sessions import CPU

    graph = CPU.open(artifact / "encoder.onnx", bound=bound)
    for feeds in ({"images": np.zeros((1, 3, 50, 50), np.float32)}, {"pictures": np.zeros(1)}, {}):
        with pytest.raises(ArtifactError, match=r"encoder\.onnx: onnxruntime failed"):
            graph.run(feeds, graph.outputs)
