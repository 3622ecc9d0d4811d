"""`capexport lstm --precision int8`: what is quantised, what it loses, and what it never does."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import draw_photo, shapes
from onnx import numpy_helper

from capexport import Captioner, ParityError
from capexport.bench.cli import sample_photos
from capexport.cli import main
from capexport.export import cnn_lstm, int8
from capexport.export.cnn_lstm import export_cnn_lstm
from capexport.export.graph import export_graph
from capexport.export.parity import relative_error
from capexport.models.checkpoint import Checkpoint
from capexport.preprocessing import ImageSpec, preprocess
from capexport.sessions import CPU


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The bundled checkpoint in int8, and what the command printed. Random weights would not do:
    in 50 random layers 8-bit errors grow until nothing is left to compare."""
    folder = tmp_path_factory.mktemp("int8")
    photos = sorted(sample_photos()[0].parent.glob("*.[jp][pn]g"))[:16]
    rows = [f"{photo.name},{caption}" for photo in photos for caption in ("a dog", "a man sits")]
    references = folder / "captions.txt"
    references.write_text("\n".join(["image,caption", *rows]))
    arguments = ["lstm", "--out", str(folder / "out"), "--precision", "int8"]
    arguments += ["--calibration", *map(str, photos[::2]), "--photos", *map(str, photos)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.devnull)  # no Java, as in `no_java`
        assert main([*arguments, "--references", str(references)]) == 0
    return folder / "out", printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def quantized(exported: tuple[Path, list[str]]) -> Path:
    return exported[0]


def test_the_graphs_hold_their_weights_in_8_bits(quantized: Path, attention_artifact: Path):
    for name in ("encoder.onnx", "decoder_step.onnx"):
        exact, small = onnx.load(attention_artifact / name), onnx.load(quantized / name)
        onnx.checker.check_model(small, full_check=True)
        assert shapes(small.graph.input).keys() == shapes(exact.graph.input).keys()
        assert shapes(small.graph.output).keys() == shapes(exact.graph.output).keys()
        kinds = {item.data_type for item in small.graph.initializer if len(item.dims) >= 2}
        kinds.discard(onnx.TensorProto.INT64)  # shapes
        allowed = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
        if name == "encoder.onnx":
            allowed.add(onnx.TensorProto.FLOAT)  # the first convolutions
        assert onnx.TensorProto.INT8 in kinds <= allowed
        # Measured: the stem and the depthwise convolution behind it, and what makes their map less.
        floats = [t for t in small.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        convolutions = sum(len(tensor.dims) == 4 for tensor in floats)
        assert convolutions == (3 if name == "encoder.onnx" else 0)
    assert sum(file.stat().st_size for file in quantized.iterdir()) < 12e6


def test_a_caption_does_not_depend_on_the_photos_beside_it(quantized: Path):
    captioner = Captioner.load(quantized)
    images = sorted(sample_photos()[0].parent.glob("*.[jp][pn]g"))[-12:]
    together = captioner.caption(images)
    assert len({caption.tokens for caption in together}) > 4
    for batch_size in (1, 5):
        apart = captioner.caption(images, batch_size=batch_size)
        assert [c.tokens for c in apart] == [c.tokens for c in together]


def test_the_manifest_says_what_is_lost(quantized: Path):
    manifest = json.loads((quantized / "manifest.json").read_text())
    assert manifest["precision"] == "int8"
    assert manifest["provenance"]["calibration_photos"] == 8
    assert manifest["parity"]["captions"]["identical"] == 16  # in fp32, before
    lost = manifest["parity"]["int8"]
    assert 0 < lost["encoder.onnx"] < cnn_lstm.INT8_TOLERANCE
    assert 0 < lost["decoder_step.onnx"] < cnn_lstm.INT8_TOLERANCE
    assert 0 <= lost["identical_captions"] <= lost["token_agreement"] <= 1


def test_rounding_with_regard_to_each_other_errs_less():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 12, 4)) @ rng.normal(size=(2, 4, 500))  # correlated
    inputs += 0.1 * rng.normal(size=inputs.shape)
    weights = rng.normal(size=(2, 6, 12))
    rounded = int8._round_rows(weights, inputs @ inputs.transpose(0, 2, 1))
    scale = np.abs(weights).max(2, keepdims=True) / 127
    np.testing.assert_allclose(rounded / scale, np.round(rounded / scale), atol=1e-9)
    np.testing.assert_allclose(np.abs(rounded).max(2, keepdims=True), 127 * scale)
    nearest = np.round(weights / scale) * scale
    errors = [np.square((w - weights) @ inputs).mean() for w in (rounded, nearest)]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize(
    ("groups", "stride", "dilation", "pads"),
    [
        (1, 1, 1, (1, 1, 1, 1)),
        (4, 2, 1, (1, 1, 1, 1)),
        (2, 1, 2, (2, 0, 1, 3)),
        (1, 2, 1, (0,) * 4),
    ],
)
def test_patches_times_weights_are_the_convolution(
    groups: int, stride: int, dilation: int, pads: tuple[int, ...]
):
    import torch
    import torch.nn.functional as F

    images = torch.randn(2, 4, 7, 8)
    weights = torch.randn(8, 4 // groups, 3, 3)
    node = onnx.helper.make_node(
        "Conv", ["x", "w"], ["y"], group=groups, strides=[stride] * 2, dilations=[dilation] * 2,
        pads=pads,
    )  # fmt: skip
    patches = int8._patches(images.numpy(), node, weights.shape)
    rows = int8._rows(numpy_helper.from_array(weights.numpy()), node)
    top, left, bottom, right = pads
    padded = F.pad(images, (left, right, top, bottom))
    wanted = F.conv2d(padded, weights, stride=stride, dilation=dilation, groups=groups)
    got = (rows @ patches).reshape(8, 2, *wanted.shape[2:]).swapaxes(0, 1)
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)


def test_patches_times_weights_are_the_linear_layer():
    rng = np.random.default_rng(0)
    maps, weights = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(5, 6))
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    patches = int8._patches(maps, node, weights.shape)
    got = int8._rows(numpy_helper.from_array(weights), node) @ patches
    np.testing.assert_allclose(got[0].T.reshape(2, 3, 4, 6), maps @ weights)


def blocks(name: str):
    """Three blocks of a backbone, narrow, behind a stem."""
    from functools import partial

    from torch import nn
    from torchvision.models import convnext, efficientnet, mobilenetv3, resnet

    def stem(activation: type[nn.Module]) -> list[nn.Module]:
        return [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), activation()]

    if name == "ResNet":
        down = nn.Sequential(nn.Conv2d(16, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
        return [
            *stem(nn.ReLU), nn.MaxPool2d(3, 2, 1), resnet.BasicBlock(16, 16),
            resnet.BasicBlock(16, 24, 2, down), resnet.BasicBlock(24, 24),
        ]  # fmt: skip
    if name == "MobileNetV3":
        config = partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
        return stem(nn.Hardswish) + [
            mobilenetv3.InvertedResidual(config(*sizes), nn.BatchNorm2d)
            for sizes in [
                (16, 3, 48, 16, True, "RE", 1), (16, 5, 48, 24, True, "HS", 2),
                (24, 3, 64, 24, False, "HS", 1),
            ]
        ]  # fmt: skip
    if name == "EfficientNet":
        return stem(nn.SiLU) + [
            efficientnet.MBConv(efficientnet.MBConvConfig(*sizes, 1), 0.0, nn.BatchNorm2d)
            for sizes in [(1, 3, 1, 16, 16), (4, 5, 2, 16, 24), (4, 3, 1, 24, 24)]
        ]
    return [nn.Conv2d(3, 16, 4, 4)] + [convnext.CNBlock(16, 1.0, 0.0) for _ in range(3)]


@pytest.mark.parametrize("name", ["ResNet", "MobileNetV3", "EfficientNet", "ConvNeXt"])
def test_blocks_of_every_backbone(name: str, tmp_path: Path):
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(*blocks(name), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.from_numpy(
        np.stack([preprocess(draw_photo(seed), ImageSpec(48, 48)) for seed in range(24)])
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(images)  # for statistics that are not those of noise
        wanted = network.eval()(images).numpy()
    path = tmp_path / "encoder.onnx"
    export_graph(network, [images[:2]], ["images"], ["features"], path)
    exact = onnx.load(path)
    calibration = [{"images": image[None]} for image in images[:16].numpy()]
    kept = int8.round_weights(path, calibration)
    int8.quantize_static(path, calibration, kept)
    graph = CPU.open(path)
    together = graph.run({"images": images[16:].numpy()}, ["features"])["features"]
    [alone] = graph.run({"images": images[16:17].numpy()}, ["features"])["features"]
    np.testing.assert_array_equal(alone, together[0])
    # Of what tells the photos apart, not of what they share.
    centred = wanted[16:] - wanted[16:].mean(0)
    assert relative_error(centred, together - wanted[16:].mean(0)) < 0.3
    layers = len(int8._layers(exact))
    small = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sum(len(tensor.dims) >= 2 for tensor in small) == layers - len(kept)
    assert len(kept) < layers / 3


def test_wrong_8_bits_leave_nothing(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    few = {"precision": "int8", "calibration": [draw_photo(1)] * 2}
    monkeypatch.setattr(cnn_lstm, "round_weights", lambda path, inputs: [])  # it has no layers
    export_cnn_lstm(tiny_checkpoint, tmp_path / "right", **few)
    real = cnn_lstm.quantize_static

    def quantize_wrongly(path, inputs, kept=()):
        real(path, inputs, kept)
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2:
                values = numpy_helper.to_array(tensor)[::-1]
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
        onnx.save(model, path)

    monkeypatch.setattr(cnn_lstm, "quantize_static", quantize_wrongly)
    with pytest.raises(ParityError, match=r"\.onnx: errs by .* in int8"):
        export_cnn_lstm(tiny_checkpoint, tmp_path / "out", **few)
    assert list(tmp_path.iterdir()) == [tmp_path / "right"]


def test_what_the_command_says(exported: tuple[Path, list[str]]):
    folder, printed = exported
    assert "16 of 16 captions identical to PyTorch's in fp32" in printed[0]
    assert printed[1].startswith("int8: ")
    assert [line.split(":")[0] for line in printed[2:]] == ["PyTorch", "int8"]
    metrics = json.loads((folder / "manifest.json").read_text())["parity"]["metrics"]
    assert set(metrics) == {"PyTorch", "int8"}
    assert all(
        f"BLEU-1 {metrics[name]['BLEU-1']:.1f}" in line
        for name, line in zip(metrics, printed[2:], strict=True)
    )


def test_calibration_goes_with_int8_alone(checkpoint: Checkpoint, tmp_path: Path, capsys):
    arguments = ["lstm", checkpoint.training["folder"], "--out", str(tmp_path / "out")]
    assert main([*arguments, "--precision", "int8"]) == 2
    assert "calibration photos" in capsys.readouterr().err
    photo = tmp_path / "photo.png"
    draw_photo(0).save(photo)
    assert main([*arguments, "--calibration", str(photo)]) == 2
    assert "int8 alone" in capsys.readouterr().err


def test_every_photo_needs_its_human_captions(checkpoint: Checkpoint, tmp_path: Path, capsys):
    references = tmp_path / "captions.txt"
    references.write_text("image,caption\n0.png,a dog\n")
    photos = [tmp_path / f"{seed}.png" for seed in range(16)]
    for seed, photo in enumerate(photos):
        draw_photo(seed).save(photo)
    arguments = ["lstm", checkpoint.training["folder"], "--out", str(tmp_path / "out")]
    arguments += ["--photos", *map(str, photos), "--references", str(references)]
    assert main(arguments) == 2
    assert "15 photos without human captions, 1.png for one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
