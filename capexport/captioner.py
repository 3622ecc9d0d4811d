"""`Captioner`: images in, captions out. The main path, top to bottom."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from capexport.artifact import Manifest, local_folder
from capexport.decoding import (
    Decoder,
    DecodingKeywords,
    DecodingOptions,
    Encoder,
    Text,
    changed,
    greedy,
)
from capexport.errors import ArtifactError, CapexportError, DeviceError, OptionError
from capexport.families import find_family
from capexport.preprocessing import FloatArray, ImageSource, ImageSpec, preprocess
from capexport.sessions import Providers, Target, available_cores, targets

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Trained on Flickr8k, in int8; artifacts/README.md says how it was made.
BUNDLED_ARTIFACT = Path(__file__).parent / "default"

log = logging.getLogger("capexport")


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


class Captioner:
    """An encoder, a decoder, their words, and the image preprocessing they were trained with.

    ONNX graphs (`Captioner.load`) and PyTorch modules (`capexport.models.torch_captioner`) go
    through this same class.

    Attributes:
        device: where it runs, such as "cpu" or "cuda:1".
        threads: CPU threads of preprocessing.
        batch_size: how many images of a list go through the model together by default.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        text: Text,
        image: ImageSpec,
        options: DecodingOptions,
        *,
        threads: int | None = None,
        batch_size: int = 32,
        device: str = "cpu",
        title: str = "",
    ) -> None:
        """`title` says in `repr` which model it is."""
        self.encoder = encoder
        self.decoder = decoder
        self.text = text
        self.image = image
        self.options = options
        self.threads = threads or available_cores()
        self.batch_size = batch_size
        self.device = device
        self._title = title

    def __repr__(self) -> str:
        return f"<Captioner: {self._title} on {self.device}, {self.threads} threads>"

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str] | None = None,
        *,
        device: str = "cpu",
        threads: int | None = None,
        providers: Providers | None = None,
        session_options: Any = None,
    ) -> Captioner:
        """Load an exported folder.

        Args:
            folder: what an export's `--out` wrote, or the Hugging Face id (`owner/name`) of such
                a folder; by default `BUNDLED_ARTIFACT`, the Flickr8k captioner that comes with
                the package.
            device: "cpu", "cuda", "cuda:1" for the second GPU, or "auto": the first that works,
                the CPU last.
            threads: CPU threads for preprocessing and the graphs; all cores by default.
            providers: onnxruntime's execution providers in place of a device, as
                `onnxruntime.InferenceSession` takes them; the first one must start.
            session_options: an `onnxruntime.SessionOptions` for all graphs, as it is.
        Raises:
            ArtifactNotFoundError, ArtifactError: the folder is incomplete or altered.
            DeviceError: the device, or its execution provider, is not available.
            MissingExtraError: onnxruntime, or what the model needs, is not installed.
            DownloadError: a Hugging Face id cannot be downloaded.
            OptionError: arguments that contradict each other, or fewer threads than 1.
        """
        path = BUNDLED_ARTIFACT if folder is None else local_folder(folder)
        candidates = targets(device, threads, providers, session_options)
        return open_artifact(path, Manifest.read(path), *candidates)

    @overload  # a str is a Sequence too, but counts as one path
    def caption(  # type: ignore[overload-overlap]
        self,
        images: ImageSource,
        *,
        prompt: str | None = None,
        batch_size: int | None = None,
        **options: Unpack[DecodingKeywords],
    ) -> Caption: ...

    @overload
    def caption(
        self,
        images: Sequence[ImageSource],
        *,
        prompt: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        **options: Unpack[DecodingKeywords],
    ) -> list[Caption]: ...

    def caption(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        prompt: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        **options: Unpack[DecodingKeywords],
    ) -> Caption | list[Caption]:
        """Caption one image, or a list or tuple of them.

        Args:
            images: paths, encoded bytes, binary files, PIL images, or uint8 arrays of shape
                (height, width[, 1, 3 or 4]).
            prompt: what the caption goes on from, such as "Question: how many cats are there?
                Answer:": one for all images, or a list with one for each; only a model that
                was trained with prompts takes any.
            batch_size: how many images of a list go through the graphs together; what suits the
                model by default. A caption doesn't depend on it.
            options: fields of `DecodingOptions` in place of the artifact's own: `max_tokens`,
                `min_tokens`, `repetition_penalty`, `end_tokens`, `suppress_tokens`.
        Returns:
            One `Caption`, or as many as images, in their order.
        Raises:
            ImageNotFoundError, ImageError: an image cannot be read.
            OptionError: an argument is out of range, or doesn't suit the model.
        """
        if not isinstance(images, list | tuple):
            return self._caption([images], prompt, 1, options)[0]  # type: ignore[list-item]
        size = self.batch_size if batch_size is None else batch_size
        return self._caption(images, prompt, size, options)

    def _caption(
        self,
        images: Sequence[ImageSource],
        prompt: str | Sequence[str] | None,
        batch_size: int,
        options: DecodingKeywords,
    ) -> list[Caption]:
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, got {batch_size}")
        prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
        if prompts is not None and len(prompts) != len(images):
            raise OptionError(f"{len(prompts)} prompts for {len(images)} images")
        captions: list[Caption] = []
        for start in range(0, len(images), batch_size):
            began = time.perf_counter()
            batch = images[start : start + batch_size]
            pixels = np.empty((len(batch), 3, self.image.crop, self.image.crop), np.float32)
            apply = self._pool.map if len(batch) > 1 else map  # one is not worth a thread
            for _ in apply(self.preprocess, batch, pixels):
                pass
            captions += self.caption_pixels(
                pixels,
                prompts=prompts and prompts[start : start + batch_size],
                preprocess_seconds=time.perf_counter() - began,
                **options,
            )
        return captions

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads)

    def preprocess(self, image: ImageSource, out: FloatArray | None = None) -> FloatArray:
        """One image, made ready for `caption_pixels`: float32 (3, height, width).

        `out`, an array like it, is filled and returned where given.
        """
        return preprocess(image, self.image, out)

    def caption_pixels(
        self,
        pixels: FloatArray,
        *,
        prompts: Sequence[str] | None = None,
        preprocess_seconds: float = 0.0,
        **options: Unpack[DecodingKeywords],
    ) -> list[Caption]:
        """Caption images that `preprocess` has made ready, as one batch.

        Args:
            pixels: float32 (batch, 3, height, width).
            prompts: one for each image.
            preprocess_seconds: what preprocessing took, for `Timing`.
            options: as of `caption`.
        """
        own = changed(self.options, options)
        # A bound that was asked for must fit behind the prompt; the default one yields.
        needed = max(1, options.get("max_tokens") or 1, own.min_tokens)
        framed = self.text.frame(prompts, len(pixels), needed)
        began = time.perf_counter()
        features = self.encoder(pixels)
        encoded = time.perf_counter()
        hypotheses = greedy(self.decoder, features, own, framed)
        decoded = time.perf_counter()
        timing = Timing(len(pixels), preprocess_seconds, encoded - began, decoded - encoded)
        return [
            Caption(
                self.text.decode(hypothesis.tokens),
                tuple(hypothesis.tokens),
                hypothesis.log_probability,
                timing,
            )
            for hypothesis in hypotheses
        ]


def open_artifact(path: Path, manifest: Manifest, *candidates: Target) -> Captioner:
    """What `Captioner.load` does once the manifest has been read, and with it every file hashed:
    open the artifact on the first of `candidates` that works."""
    for target in candidates[:-1]:
        try:
            return _open_on(path, manifest, target)
        except DeviceError as error:
            log.info("%s cannot be used: %s", target.name, error)
    return _open_on(path, manifest, candidates[-1])


def _open_on(path: Path, manifest: Manifest, target: Target) -> Captioner:
    try:
        family = find_family(manifest.family)
        encoder, decoder, text = family.open(path, manifest, target)
    except CapexportError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path}: incomplete artifact: {error!r}; export again") from error
    return Captioner(
        encoder,
        decoder,
        text,
        manifest.image,
        manifest.decoding.options,
        threads=target.threads,
        batch_size=family.batch_size,
        device=target.name,
        title=f"{manifest.family} {manifest.precision}",
    )
