"""Is an exported captioner the PyTorch one? Graph by graph, then caption by caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from capexport.artifact import CaptionParity
from capexport.captioner import Caption, Captioner
from capexport.decoding import DecodingKeywords, Hypothesis, changed, greedy_by_steps
from capexport.errors import OptionError, ParityError
from capexport.metrics import score, scorers
from capexport.preprocessing import FloatArray, ImageSource, image_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Largest difference of a value in float32. Trained graphs agree to 1e-5 or so; a wrong weight, gate
# or padding is off by 1e-2 and more.
TOLERANCE = 1e-3
IMAGES = 16  # that graphs are compared on


def seeded_images(count: int = IMAGES) -> list[Image.Image]:
    """Soft colour fields, the same on every machine: they move a captioner more than noise does."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize(
            (320, 256), Image.Resampling.BICUBIC
        )
        for _ in range(count)
    ]


def compared_images(photos: Sequence[ImageSource]) -> list[ImageSource]:
    """What captions are compared on: the photos, or `seeded_images` if there are none.

    Raises:
        OptionError: fewer photos than `IMAGES`.
    """
    images = [*photos] or [*seeded_images()]
    if len(images) < IMAGES:
        raise OptionError(f"parity takes at least {IMAGES} photos, got {len(images)}")
    return images


@np.errstate(invalid="ignore")  # an error tells it, without numpy's warnings
def compare_outputs(
    graph: str, expected: Mapping[str, FloatArray], actual: Mapping[str, FloatArray]
) -> float:
    """The largest absolute difference between outputs of the same names.

    Raises:
        ParityError: names, shapes or dtypes differ, or values by more than `TOLERANCE`.
    """
    if set(expected) != set(actual):
        raise ParityError(f"{graph}: outputs {list(actual)} instead of {list(expected)}")
    worst = 0.0
    for name, wanted in expected.items():
        got = actual[name]
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


@np.errstate(invalid="ignore", divide="ignore")
def relative_error(wanted: np.ndarray, got: np.ndarray) -> float:
    """Root mean square of the difference, as a share of that of `wanted`; computed in float32."""
    difference = np.square(wanted - got.astype(np.float32)).mean()
    return float(np.sqrt(difference / np.square(wanted).mean()))


def compare_captions(
    wanted: Sequence[Caption],
    exported: Captioner,
    images: Sequence[ImageSource],
    **options: Unpack[DecodingKeywords],
) -> CaptionParity:
    """Caption `images` with the export in batches; greedily in its loop and step by step.

    Returns:
        How many were compared, how many of their captions are distinct (one caption for all
        would prove little), and the largest difference of log-probabilities.
    Raises:
        ParityError: a caption differs.
    """
    difference = 0.0
    own = changed(exported.options, options)
    made: list[Sequence[Caption | Hypothesis]] = []
    for start in range(0, len(images), 8):
        pixels = np.stack([exported.preprocess(image) for image in images[start : start + 8]])
        ways: list[Sequence[Caption | Hypothesis]] = [exported.caption_pixels(pixels, **options)]
        if own.num_beams == 1:
            ways.append(greedy_by_steps(exported.decoder, exported.encoder(pixels), own))
        made += zip(*ways, strict=True)
    for image, expected, captions in zip(images, wanted, made, strict=True):
        for actual in captions:
            if expected.tokens != tuple(actual.tokens):
                got = exported.text.decode(actual.tokens)
                raise ParityError(
                    f"{image_name(image)}: captioned {got!r}, but by PyTorch {expected.text!r}"
                )
            gap = abs(expected.log_probability - actual.log_probability)
            difference = max(difference, gap)
    return CaptionParity(
        images=len(images),
        identical=len(images),
        distinct=len({caption.tokens for caption in wanted}),
        max_log_probability_difference=difference,
    )


def image_names(
    images: Sequence[ImageSource], references: Mapping[str, Sequence[str]] | None
) -> list[str]:
    """The images' file names, under which `references` must hold their human captions.

    Raises:
        OptionError: an image has none there.
        MissingExtraError: there are references, but pycocoevalcap is not installed.
    """
    names = [Path(image_name(image)).name for image in images]
    if references:
        scorers()
        if missing := [name for name in names if name not in references]:
            raise OptionError(f"{len(missing)} photos without human captions, {missing[0]} for one")
    return names


def scored(
    names: Sequence[str], captions: Sequence[Caption], references: Mapping[str, Sequence[str]]
) -> dict[str, float | str]:
    """`score` of one caption for each of the `names`."""
    return score({n: c.text for n, c in zip(names, captions, strict=True)}, references)


def token_agreement(wanted: Sequence[Caption], got: Sequence[Caption]) -> float:
    """The share of tokens that are the same at the same place, among those of the longer caption of
    each pair."""
    same = longest = 0
    for a, b in zip(wanted, got, strict=True):
        same += sum(x == y for x, y in zip(a.tokens, b.tokens, strict=False))
        longest += max(len(a.tokens), len(b.tokens))
    return same / longest if longest else 1.0
