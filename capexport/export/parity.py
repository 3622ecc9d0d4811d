"""Is an exported captioner the PyTorch one? Graph by graph, then caption by caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from capexport.captioner import Captioner
from capexport.errors import ParityError
from capexport.preprocessing import FloatArray, ImageSource, image_name

# Largest difference of a value in float32. Trained graphs agree to 1e-5 or so; a wrong weight, gate
# or padding is off by 1e-2 and more.
TOLERANCE = 1e-3
IMAGES = 16


def seeded_images(count: int = IMAGES) -> list[Image.Image]:
    """Soft colour fields, the same on every machine: they move a captioner more than noise does."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize(
            (320, 256), Image.Resampling.BICUBIC
        )
        for _ in range(count)
    ]


def compare_outputs(
    graph: str, expected: Mapping[str, Tensor], actual: Mapping[str, FloatArray]
) -> float:
    """The largest absolute difference between outputs of the same names.

    Raises:
        ParityError: names, shapes or dtypes differ, or values by more than `TOLERANCE`.
    """
    if list(expected) != list(actual):
        raise ParityError(f"{graph}: outputs {list(actual)} instead of {list(expected)}")
    worst = 0.0
    for name, tensor in expected.items():
        wanted, got = tensor.numpy(), actual[name]
        if (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
            raise ParityError(
                f"{graph}: {name} is {got.dtype} {got.shape}, "
                f"PyTorch's {wanted.dtype} {wanted.shape}"
            )
        difference = float(np.abs(wanted - got).max())
        if not difference <= TOLERANCE:  # also true of NaN
            raise ParityError(
                f"{graph}: {name} differs from PyTorch by {difference:.2g} (at most {TOLERANCE:g})"
            )
        worst = max(worst, difference)
    return worst


def compare_captions(
    reference: Captioner, exported: Captioner, images: Sequence[ImageSource]
) -> dict[str, Any]:
    """Caption `images` one by one with the reference, in batches with the export.

    Returns:
        How many were compared, how many of their captions are distinct (one caption for all
        would prove little), and the largest difference of log-probabilities.
    Raises:
        ParityError: a caption differs.
    """
    difference = 0.0
    captions = exported.caption(list(images), batch_size=8)
    for image, actual in zip(images, captions, strict=True):
        wanted = reference.caption(image)
        if wanted.tokens != actual.tokens:
            raise ParityError(
                f"{image_name(image)}: captioned {actual.text!r}, but by PyTorch {wanted.text!r}"
            )
        difference = max(difference, abs(wanted.log_probability - actual.log_probability))
    return {
        "images": len(images),
        "identical": len(images),
        "distinct": len({caption.tokens for caption in captions}),
        "max_log_probability_difference": difference,
    }
