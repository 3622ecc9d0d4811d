"""Where a captioner looked, as a picture: the photo once a word, bright where that word's weights
are (Xu et al. 2015, figure 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from capexport.captioner import Caption, Captioner
from capexport.errors import OptionError
from capexport.preprocessing import FloatArray, ImageSource

_SIDE, _LINE, _GAP, _COLUMNS = 224, 34, 8, 5  # pixels, but for the columns
_DARKEST = 0.25  # share of its light that a region without weight keeps


def draw_attention(captioner: Captioner, image: ImageSource, caption: Caption) -> Image.Image:
    """One tile for the image as the model saw it, and one for each token of the caption.

    Raises:
        OptionError: the caption was made without `attention=True`.
    """
    if caption.attention is None:
        raise OptionError("the caption says nothing of attention: make it with attention=True")
    seen = _pixels(captioner, image)
    words = [captioner.text.decode([token]) for token in caption.tokens]
    tiles = [("", seen)]
    tiles += [(w, _lit(seen, a)) for w, a in zip(words, caption.attention, strict=True)]
    return _sheet(tiles)


def _pixels(captioner: Captioner, image: ImageSource) -> Image.Image:
    """What `preprocess` made of the image, for people."""
    spec = captioner.image
    values = captioner.preprocess(image).transpose(1, 2, 0)
    values = values * np.array(spec.std) + np.array(spec.mean)
    pixels = Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8))
    return pixels.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)


def _lit(seen: Image.Image, weights: FloatArray) -> Image.Image:
    mask = Image.fromarray(weights / weights.max()).resize(seen.size, Image.Resampling.BICUBIC)
    light = _DARKEST + (1 - _DARKEST) * np.asarray(mask).clip(0, 1)
    return Image.fromarray((np.asarray(seen) * light[:, :, None]).astype(np.uint8))


def _sheet(tiles: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    width, height = _SIDE + _GAP, _SIDE + _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(22)
    for place, (word, tile) in enumerate(tiles):
        left, top = _GAP + place % columns * width, _GAP + place // columns * height
        sheet.paste(tile, (left, top + _LINE))
        draw.text((left + _SIDE // 2, top + _LINE // 2), word, "black", font, anchor="mm")
    return sheet
