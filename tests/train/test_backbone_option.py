"""`python -m train --backbone`: which weights fit, and what comes of them."""

from pathlib import Path

import pytest
import torch
from conftest import kaggle
from safetensors.torch import load_file, save_file
from torchvision import models

from capexport import Captioner
from capexport.cli import main as capexport
from capexport.errors import CheckpointError
from capexport.models.backbones import BACKBONES
from capexport.models.checkpoint import load_checkpoint
from capexport.models.cnn_lstm import CnnLstmConfig, ImageEncoder
from capexport.preprocessing import ImageSpec
from train.__main__ import main
from train.config import parse
from train.features import load_backbone

pytestmark = pytest.mark.usefixtures("no_java", "one_thread")


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's whole state dict, the classifier's `fc.*` among it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("resnet18") / "resnet18.safetensors"
    save_file(models.resnet18(weights=None).state_dict(), path)
    return path


def test_from_photos_to_an_exported_captioner(resnet18: Path, tmp_path: Path):
    run, artifact = tmp_path / "run", tmp_path / "artifact"
    options = f"--data {kaggle(tmp_path / 'data')} --cache {tmp_path / 'cache'} --min-count 1"
    options += f" --backbone resnet18 --backbone-weights {resnet18} --resize 72 --crop 64"
    options += f" --embed-size 16 --hidden-size 24 --epochs 1 --out {run}"
    assert main(options.split()) == 0
    [cache] = (tmp_path / "cache").iterdir()
    assert cache.name.startswith("resnet18-")
    checkpoint = load_checkpoint(run)
    assert checkpoint.model.config.backbone == "resnet18"
    assert "--backbone resnet18" in checkpoint.training["command"]
    backbone = checkpoint.model.encoder.backbone
    assert torch.equal(backbone.state_dict()["conv1.weight"], load_file(resnet18)["conv1.weight"])
    assert capexport(["lstm", str(run), "--out", str(artifact)]) == 0
    assert Captioner.load(artifact).image == ImageSpec(72, 64)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_weights_of_another_backbone(name: str, resnet18: Path):
    encoder = ImageEncoder(CnnLstmConfig(9, backbone=name))
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"resnet18\.safetensors: not the {name} of") as info:
        load_backbone(encoder, resnet18)
    assert "\n" not in str(info.value)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", BACKBONES)
def test_photos_become_what_torchvision_says(name: str):
    config, _ = parse(["--data", "flickr8k", "--backbone", name])
    transforms = models.get_model_weights(name).IMAGENET1K_V1.transforms()
    assert [config.image.resize] == transforms.resize_size
    assert [config.image.crop] == transforms.crop_size
    assert config.image.resample == transforms.interpolation.value
    smaller, _ = parse(["--data", "flickr8k", "--backbone", name, "--crop", "64"])
    assert smaller.image.crop == 64
    assert smaller.image.resize == config.image.resize
