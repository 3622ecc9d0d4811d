"""`Captioner`: images in, captions out. The main path, top to bottom."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from capexport.artifact import Manifest
from capexport.decoding import Decoder, DecodingOptions, Encoder, greedy
from capexport.errors import ArtifactError
from capexport.preprocessing import FloatArray, ImageSource, ImageSpec, preprocess
from capexport.vocabulary import Vocabulary


@dataclass(frozen=True)
class Timing:
    """Seconds that a batch of `images` took, stage by stage."""

    images: int
    preprocess: float
    encode: float
    decode: float


@dataclass(frozen=True)
class Caption:
    """A caption and where it came from.

    Attributes:
        text: the caption's words.
        tokens: their ids, without start and end tokens.
        log_probability: natural logarithm of the caption's probability given the image.
        timing: of the whole batch that the image was captioned in.
    """

    text: str
    tokens: tuple[int, ...]
    log_probability: float
    timing: Timing


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Captioner:
    """An encoder, a decoder, a vocabulary, and the image preprocessing they were trained with.

    ONNX graphs (`Captioner.load`) and PyTorch modules (`capexport.models.torch_captioner`) go
    through this same class.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        vocabulary: Vocabulary,
        image: ImageSpec,
        options: DecodingOptions,
        threads: int | None = None,
    ) -> None:
        self.threads = threads or available_cores()
        self.encoder = encoder
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.image = image
        self.options = options

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, device: str = "cpu", threads: int | None = None
    ) -> Captioner:
        """Load an exported folder.

        Args:
            folder: what `capexport lstm --out` wrote.
            device: "cpu" or "cuda".
            threads: CPU threads for preprocessing and the encoder; all cores by default.
                Decoding takes one.
        Raises:
            ArtifactNotFoundError, ArtifactError: the folder is incomplete or altered.
            DeviceError: the device, or its execution provider, is not available.
            MissingExtraError: onnxruntime is not installed.
        """
        from capexport.graphs import OnnxEncoder, OnnxLstmDecoder

        path = Path(folder)
        manifest = Manifest.read(path)
        if manifest.family != "cnn-lstm":
            raise ArtifactError(f"{path}: unknown model family {manifest.family!r}")
        words = manifest.file(path, "vocabulary.json")
        try:
            vocabulary = Vocabulary(tuple(json.loads(words.read_text("utf-8"))))
            state = dict(manifest.state)
            decoding = dict(manifest.decoding)
            start_token = int(decoding.pop("start_token"))
            decoding["suppress_tokens"] = tuple(decoding["suppress_tokens"])
            options = DecodingOptions(**decoding)
            tokens = (start_token, *options.suppress_tokens)
            if not all(0 <= token < len(vocabulary) for token in tokens):
                raise ValueError("tokens outside the vocabulary")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: incomplete artifact: {error!r}; export again") from error
        encoder = OnnxEncoder(manifest.file(path, "encoder.onnx"), state, device, threads)
        step = manifest.file(path, "decoder_step.onnx")
        decoder = OnnxLstmDecoder(step, state, start_token, device)
        if decoder.vocabulary_size != len(vocabulary):
            raise ArtifactError(
                f"{path}: {len(vocabulary)} words, but logits for {decoder.vocabulary_size}; "
                "export again"
            )
        return cls(encoder, decoder, vocabulary, manifest.image, options, threads)

    @overload  # a str is a Sequence too, but counts as one path
    def caption(  # type: ignore[overload-overlap]
        self, images: ImageSource, *, max_tokens: int | None = None, batch_size: int = 32
    ) -> Caption: ...

    @overload
    def caption(
        self, images: Sequence[ImageSource], *, max_tokens: int | None = None, batch_size: int = 32
    ) -> list[Caption]: ...

    def caption(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        max_tokens: int | None = None,
        batch_size: int = 32,
    ) -> Caption | list[Caption]:
        """Caption one image, or a list or tuple of them.

        Args:
            images: paths, encoded bytes, binary files, PIL images, or uint8 arrays of shape
                (height, width[, 1, 3 or 4]).
            max_tokens: longest caption, in tokens; the artifact's own bound by default.
            batch_size: how many images of a list go through the graphs together.
        Returns:
            One `Caption`, or as many as images, in their order.
        Raises:
            ImageNotFoundError, ImageError: an image cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self.caption([images], max_tokens=max_tokens)[0]  # type: ignore[list-item]
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        captions: list[Caption] = []
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(images), batch_size):
                began = time.perf_counter()
                batch = images[start : start + batch_size]
                apply = pool.map if len(batch) > 1 else map  # one image is not worth a thread
                pixels = np.stack(list(apply(self.preprocess, batch)))
                seconds = time.perf_counter() - began
                captions += self.caption_pixels(
                    pixels, max_tokens=max_tokens, preprocess_seconds=seconds
                )
        return captions

    def preprocess(self, image: ImageSource) -> FloatArray:
        """One image, made ready for `caption_pixels`: float32 (3, height, width)."""
        return preprocess(image, self.image)

    def caption_pixels(
        self, pixels: FloatArray, *, max_tokens: int | None = None, preprocess_seconds: float = 0.0
    ) -> list[Caption]:
        """Caption images that `preprocess` has made ready, as one batch.

        Args:
            pixels: float32 (batch, 3, height, width).
            max_tokens: as for `caption`.
            preprocess_seconds: what preprocessing took, for `Timing`.
        """
        options = self.options
        if max_tokens is not None:
            options = dataclasses.replace(options, max_tokens=max_tokens)
        began = time.perf_counter()
        features = self.encoder(pixels)
        encoded = time.perf_counter()
        hypotheses = greedy(self.decoder, features, options)
        decoded = time.perf_counter()
        timing = Timing(len(pixels), preprocess_seconds, encoded - began, decoded - encoded)
        return [
            Caption(
                self.vocabulary.decode(hypothesis.tokens),
                tuple(hypothesis.tokens),
                hypothesis.log_probability,
                timing,
            )
            for hypothesis in hypotheses
        ]
