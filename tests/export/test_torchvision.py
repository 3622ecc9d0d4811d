"""`preprocess` against torchvision's transforms, for images of every mode."""

import numpy as np
import pytest
from conftest import draw_photo, every_mode
from PIL import Image

from capexport.models.backbones import BACKBONES
from capexport.preprocessing import ImageSpec, preprocess


def torchvision_pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    from torchvision import transforms

    steps = [
        transforms.Resize(spec.resize),
        transforms.CenterCrop(spec.crop),
        transforms.ToTensor(),
        transforms.Normalize(spec.mean, spec.std),
    ]
    return transforms.Compose(steps)(image).numpy()


SIZES = [(500, 375), (375, 500), (300, 301), (224, 224), (64, 1000), (37, 23), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spec", [ImageSpec(), ImageSpec(99, 70, (0.5, 0.4, 0.3), (0.1, 1.0, 2.0))])
def test_sizes(size: tuple[int, int], spec: ImageSpec):
    image = draw_photo(1, size)
    np.testing.assert_allclose(
        preprocess(image, spec), torchvision_pixels(image, spec), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("mode", every_mode())
def test_modes(mode: str):
    image, meant = every_mode()[mode]
    np.testing.assert_allclose(
        preprocess(image, ImageSpec()),
        torchvision_pixels(meant, ImageSpec()),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_what_a_backbone_was_made_for(name: str):
    """Against the transforms that come with its weights, which resize in bilinear or bicubic."""
    from torchvision.models import get_model_weights

    transforms = get_model_weights(name)["IMAGENET1K_V1"].transforms()
    for size in SIZES:
        image = draw_photo(2, size)
        pixels = preprocess(image, BACKBONES[name].image)
        np.testing.assert_allclose(pixels, transforms(image).numpy(), rtol=0, atol=1e-6)


def test_real_photos():
    skimage = pytest.importorskip("skimage.data")
    for name in ("astronaut", "chelsea", "coffee", "camera", "rocket"):
        image = Image.fromarray(getattr(skimage, name)())
        np.testing.assert_allclose(
            preprocess(image, ImageSpec()),
            torchvision_pixels(image.convert("RGB"), ImageSpec()),
            rtol=0,
            atol=1e-6,
        )
