"""Images of every kind, good and bad. Equality with torchvision is tested in tests/export."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_photo
from PIL import Image

from capexport import ImageError, ImageNotFoundError, ImageSpec, OptionError
from capexport.preprocessing import load_image, preprocess


def encoded(image: Image.Image, style: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, style, **options)
    return buffer.getvalue()


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path):
    image = draw_photo(1)
    path = tmp_path / "photo.png"
    image.save(path)
    with path.open("rb") as file:
        sources = [path, str(path), path.read_bytes(), file, image, np.asarray(image)]
        arrays = [preprocess(source, ImageSpec()) for source in sources]
    assert arrays[0].shape == (3, 224, 224)
    assert arrays[0].dtype == np.float32
    for array in arrays[1:]:
        np.testing.assert_array_equal(array, arrays[0])


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(1, 1), (99, 99), (224, 224), (333, 333), (500, 375), (333, 500)])
@pytest.mark.parametrize("crop", [(256, 224), (99, 70), (240, 223)], ids=str)
def test_pixels_are_those_of_the_whole_image_resized_then_cropped(resample, size, crop):
    image = draw_photo(1, size)
    spec = ImageSpec(*crop, resample=resample)
    target = tuple(int(spec.resize * edge / min(size)) for edge in size)
    left, top = (round((edge - spec.crop) / 2) for edge in target)
    resized = image.resize(target, Image.Resampling[resample.upper()])
    pixels = np.asarray(resized.crop((left, top, left + spec.crop, top + spec.crop)))
    wanted = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    wanted -= np.asarray(spec.mean, np.float32)[:, None, None]
    wanted /= np.asarray(spec.std, np.float32)[:, None, None]
    np.testing.assert_array_equal(preprocess(image, spec), wanted)


@pytest.mark.parametrize("keep_aspect", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("size", "scale"),
    [((1023, 1400), 1), ((1024, 1400), 2), ((1400, 1024), 2), ((2050, 2048), 4), ((4100, 4096), 8)],
)
def test_large_jpegs_are_decoded_to_twice_the_size_needed(size, scale, mode, keep_aspect):
    """As Pillow's own `draft` reduces them."""
    spec = ImageSpec(256, 224 if keep_aspect else 256, keep_aspect=keep_aspect)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(draw_photo(1, size).convert(mode), "JPEG", quality=90, exif=exif)
    with Image.open(io.BytesIO(data)) as reduced:
        reduced.draft(None, (size[0] // scale, size[1] // scale))
        assert reduced.width == -(-size[0] // scale)
        wanted = preprocess(reduced, spec)
    pixels, whole = preprocess(data, spec), preprocess(data, spec, full_size=True)
    np.testing.assert_array_equal(pixels, wanted)
    np.testing.assert_array_equal(preprocess(io.BytesIO(data), spec), wanted)
    np.testing.assert_array_equal(whole, preprocess(load_image(data), spec))
    assert (scale == 1) == np.array_equal(pixels, whole)
    assert np.abs(pixels - whole).mean() < 0.05
    broken = preprocess(data[:-300], spec, truncated=True)
    assert np.abs(broken - wanted).mean() < 0.2


def test_pixels_can_go_into_the_row_of_a_batch():
    batch = np.full((2, 3, 224, 224), np.nan, np.float32)
    assert preprocess(draw_photo(1), ImageSpec(), batch[1]) is not None
    np.testing.assert_array_equal(batch[1], preprocess(draw_photo(1), ImageSpec()))
    assert np.isnan(batch[0]).all()


def test_an_image_object_stays_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(encoded(draw_photo(1, (40, 30)), exif=exif))) as image:
        loaded = load_image(image)
        assert (loaded.size, image.size) == ((30, 40), (40, 30))
    image = draw_photo(1)
    assert load_image(image) is not image


def test_exif_rotation_is_applied():
    image = draw_photo(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn off
    turned = load_image(encoded(image.rotate(90, expand=True), exif=exif))
    assert turned.size == image.size
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(image))


@pytest.mark.parametrize("style", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(style: str):
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    loaded = np.asarray(load_image(encoded(Image.fromarray(grey), style)))
    np.testing.assert_array_equal(loaded[:, :, 0], grey >> 8)


def test_grey_and_transparent_arrays():
    grey = np.asarray(draw_photo(1).convert("L"))
    for array in (grey, grey[:, :, None]):
        assert load_image(array).getpixel((3, 4)) == (grey[4, 3],) * 3
    rgba = np.dstack([np.asarray(draw_photo(1)), grey])
    np.testing.assert_array_equal(np.asarray(load_image(rgba)), rgba[:, :, :3])


def test_an_animation_counts_by_its_first_frame(tmp_path: Path):
    frames = [draw_photo(seed).quantize() for seed in range(3)]
    path = tmp_path / "animated.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(
        np.asarray(load_image(path)), np.asarray(frames[0].convert("RGB"))
    )


PNG = encoded(draw_photo(1))
JPEG = encoded(draw_photo(1), "JPEG")


@pytest.mark.parametrize(
    "content",
    [b"", b"this is no image", PNG[: len(PNG) // 2], JPEG[: len(JPEG) // 2], PNG[:60] + bytes(500)],
    ids=["empty", "text", "truncated PNG", "truncated JPEG", "corrupt"],
)
def test_damaged_files_are_named(content: bytes, tmp_path: Path):
    path = tmp_path / "damaged.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"damaged\.jpg: "):
        load_image(path)
    with pytest.raises(ImageError):
        load_image(content)


def test_a_decompression_bomb_is_refused(tmp_path: Path):
    path = tmp_path / "huge.png"
    Image.new("1", (20000, 20000)).save(path)
    with pytest.raises(ImageError, match=r"huge\.png: more pixels than"):
        load_image(path)


def test_a_strip_is_refused_before_it_fills_the_memory():
    with pytest.raises(ImageError, match="1x20000 is too elongated"):
        preprocess(Image.new("RGB", (1, 20000)), ImageSpec())


def test_a_missing_file_and_a_folder(tmp_path: Path):
    with pytest.raises(ImageNotFoundError, match=r"absent\.jpg: no such image file") as caught:
        load_image(tmp_path / "absent.jpg")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(ImageError):
        load_image(tmp_path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros(8, np.uint8),
    ],
    ids=["float", "two channels", "no pixels", "one axis"],
)
def test_arrays_that_are_no_images(array: np.ndarray):
    with pytest.raises(ImageError, match=r"array of shape|no pixels"):
        load_image(array)


def test_an_image_without_pixels():
    with pytest.raises(ImageError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))


def test_an_object_that_is_no_image():
    with pytest.raises(ImageError, match="pass a path, bytes"):
        load_image(42)  # type: ignore[arg-type]


def test_a_crop_larger_than_the_resized_edge_is_refused():
    with pytest.raises(OptionError, match="crop"):
        ImageSpec(resize=200, crop=224)
    for values in ((1.0, 1.0, math.nan), (math.nan, 1.0, 1.0), (1.0, math.inf, 1.0)):
        with pytest.raises(OptionError, match="std"):
            ImageSpec(std=values)
        with pytest.raises(OptionError, match="mean"):
            ImageSpec(mean=values)
