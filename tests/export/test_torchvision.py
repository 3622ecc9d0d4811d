"""`preprocess` against torchvision's transforms, for images of every mode."""

import io

import numpy as np
import pytest
from conftest import draw_photo
from PIL import Image, ImageOps

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


def opened(image: Image.Image, style: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, style, **options)
    return Image.open(buffer)


def every_mode() -> dict[str, Image.Image]:
    photo = draw_photo(3, (400, 300))
    alpha = draw_photo(4, (400, 300)).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 8
    grey16 = Image.fromarray(np.asarray(alpha).astype(np.uint16) * 257)
    return {
        "1": opened(photo.convert("1"), "PNG"),
        "L": opened(photo.convert("L"), "JPEG"),
        "LA": opened(Image.merge("LA", (photo.convert("L"), alpha)), "PNG"),
        "P": opened(photo.quantize(), "PNG"),
        "RGB": opened(photo, "JPEG"),
        "RGBA": opened(Image.merge("RGBA", (*photo.split(), alpha)), "PNG"),
        "CMYK": opened(photo.convert("CMYK"), "JPEG"),
        "YCbCr": photo.convert("YCbCr"),
        "16-bit": opened(grey16, "PNG"),
        "EXIF": opened(photo, "JPEG", exif=exif),
    }


@pytest.mark.parametrize("mode", every_mode())
def test_modes(mode: str):
    image = every_mode()[mode]
    if mode == "16-bit":
        assert image.mode == "I;16"
        reference = Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    else:
        reference = ImageOps.exif_transpose(image).convert("RGB")
    np.testing.assert_allclose(
        preprocess(image, ImageSpec()),
        torchvision_pixels(reference, ImageSpec()),
        rtol=0,
        atol=1e-6,
    )


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
