"""The table of backbones against torchvision's own classifiers."""

import pytest
import torch
from torch import nn
from torchvision import models

from capexport.models.backbones import BACKBONES
from capexport.models.cnn_lstm import CnnLstmConfig, ImageEncoder

FAMILIES = ["mobilenet_v2", "mobilenet_v3_large", "resnet18", "efficientnet_b0", "convnext_tiny"]


def watch_head(classifier: nn.Module) -> list[torch.Tensor]:
    """What the classifier's head will be given."""
    taken: list[torch.Tensor] = []
    head = classifier.fc if hasattr(classifier, "fc") else classifier.classifier
    head.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0].flatten(1)))
    return taken


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pooled_map_is_what_the_classifier_takes(name: str):
    classifier = models.get_model(name, weights=None).eval()
    encoder = ImageEncoder(CnnLstmConfig(9, backbone=name)).eval()
    encoder.backbone.load_state_dict(BACKBONES[name].without_head(classifier.state_dict()))
    taken = watch_head(classifier)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        classifier(images)
        assert torch.equal(encoder.stem(images), taken[0])
        assert encoder.backbone(images).shape[2:] == (2, 2)


@pytest.mark.parametrize("name", BACKBONES)
def test_names_and_channels(name: str):
    with torch.device("meta"):  # shapes without values
        classifier = models.get_model(name, weights=None).eval()
        encoder = ImageEncoder(CnnLstmConfig(9, backbone=name)).eval()
        taken = watch_head(classifier)
        classifier(torch.zeros(1, 3, 64, 64))
        assert encoder.stem(torch.zeros(1, 3, 64, 64)).shape == taken[0].shape
    kept = BACKBONES[name].without_head(classifier.state_dict())
    assert kept.keys() == encoder.backbone.state_dict().keys()


def test_a_backbone_that_is_not_there():
    with pytest.raises(ValueError, match=r"one of mobilenet_v2, .*; got 'vgg16'"):
        CnnLstmConfig(9, backbone="vgg16")
