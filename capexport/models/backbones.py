"""The image networks that a CNN-LSTM can see with: torchvision's classifiers without their heads.

A backbone makes a map of the image, float32 (batch, channels, rows, columns), which is what its
classifier would pool. Its weights have torchvision's names, without the `features.` that most of
them begin with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capexport.preprocessing import ImageSpec

if TYPE_CHECKING:  # the table's names are wanted before torch, which takes long
    from torch import Tensor, nn
    from torchvision.models import WeightsEnum


@dataclass(frozen=True)
class Backbone:
    """A row of the table.

    `name` is torchvision's, `channels` the depth of the map, and `layers` are the classifier's
    modules that make it, one after another.
    """

    name: str
    channels: int
    layers: tuple[str, ...] = ("features",)

    def build(self) -> nn.Sequential:
        """The layers, with random weights."""
        from torch import nn
        from torchvision.models import get_model

        model = get_model(self.name, weights=None)
        if self.layers == ("features",):
            return model.features
        return nn.Sequential(OrderedDict((name, getattr(model, name)) for name in self.layers))

    @property
    def weights(self) -> WeightsEnum:
        """torchvision's first ImageNet weights; naming them downloads nothing."""
        from torchvision.models import get_model_weights

        return get_model_weights(self.name)["IMAGENET1K_V1"]

    @property
    def image(self) -> ImageSpec:
        """The preprocessing that those weights were trained with."""
        transforms = self.weights.transforms()
        return ImageSpec(
            resize=transforms.resize_size[0],
            crop=transforms.crop_size[0],
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            resample=transforms.interpolation.value,
        )

    def without_head(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The backbone's part of a classifier's weights, by its own names."""
        kept = {key: value for key, value in state.items() if key.split(".")[0] in self.layers}
        return {key.removeprefix("features."): value for key, value in kept.items()}


_RESNET = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")

BACKBONES = {
    row.name: row
    for row in (
        Backbone("mobilenet_v2", 1280),
        Backbone("mobilenet_v3_large", 960),
        Backbone("resnet18", 512, _RESNET),
        Backbone("resnet50", 2048, _RESNET),
        Backbone("resnet101", 2048, _RESNET),
        Backbone("efficientnet_b0", 1280),
        Backbone("efficientnet_b1", 1280),
        Backbone("efficientnet_b2", 1408),
        Backbone("efficientnet_b3", 1536),
        Backbone("efficientnet_b4", 1792),
        Backbone("efficientnet_v2_s", 1280),
        Backbone("convnext_tiny", 768),
    )
}
