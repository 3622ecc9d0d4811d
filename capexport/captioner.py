"""`Captioner`: images in, captions out. The main path, top to bottom."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from capexport.artifact import Manifest
from capexport.decoding import Decoder, DecodingOptions, Encoder, Prompts, greedy
from capexport.errors import ArtifactError, ArtifactNotFoundError, DownloadError
from capexport.preprocessing import FloatArray, ImageSource, ImageSpec, preprocess
from capexport.vocabulary import PromptSpec, PromptTokenizer, Vocabulary

if TYPE_CHECKING:
    from capexport.graphs import OpenGraph

# A CNN-LSTM for Flickr8k in int8; artifacts/README.md says how it was made.
BUNDLED_ARTIFACT = Path(__file__).parent / "default"


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
        vocabulary: Vocabulary | PromptTokenizer,
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
        cls,
        folder: str | os.PathLike[str] | None = None,
        *,
        device: str = "cpu",
        threads: int | None = None,
    ) -> Captioner:
        """Load an exported folder.

        Args:
            folder: what `capexport lstm --out` or `capexport blip2 --out` wrote, or the Hugging
                Face id (`owner/name`) of such a folder; by default `BUNDLED_ARTIFACT`, the
                Flickr8k captioner that comes with the package.
            device: "cpu" or "cuda".
            threads: CPU threads for preprocessing and the graphs; all cores by default.
        Raises:
            ArtifactNotFoundError, ArtifactError: the folder is incomplete or altered.
            DeviceError: the device, or its execution provider, is not available.
            MissingExtraError: onnxruntime, or what BLIP-2 needs, is not installed.
            DownloadError: a Hugging Face id cannot be downloaded.
        """
        path = BUNDLED_ARTIFACT if folder is None else local_folder(folder)
        return open_artifact(path, Manifest.read(path), device, threads)

    @overload  # a str is a Sequence too, but counts as one path
    def caption(  # type: ignore[overload-overlap]
        self,
        images: ImageSource,
        *,
        prompt: str | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        repetition_penalty: float | None = None,
        batch_size: int = 32,
    ) -> Caption: ...

    @overload
    def caption(
        self,
        images: Sequence[ImageSource],
        *,
        prompt: str | Sequence[str] | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        repetition_penalty: float | None = None,
        batch_size: int = 32,
    ) -> list[Caption]: ...

    def caption(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        prompt: str | Sequence[str] | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        repetition_penalty: float | None = None,
        batch_size: int = 32,
    ) -> Caption | list[Caption]:
        """Caption one image, or a list or tuple of them.

        Args:
            images: paths, encoded bytes, binary files, PIL images, or uint8 arrays of shape
                (height, width[, 1, 3 or 4]).
            prompt: what the caption goes on from, such as "Question: how many cats are there?
                Answer:": one for all images, or a list with one for each. BLIP-2 alone takes any.
                Prompts of different lengths in a batch are padded as Transformers pads them, which
                changes what a Flan-T5, which counts distances, says.
            max_tokens: longest caption, in tokens; the artifact's own bound by default.
            min_tokens, repetition_penalty: as in `DecodingOptions`.
            batch_size: how many images of a list go through the graphs together.
        Returns:
            One `Caption`, or as many as images, in their order.
        Raises:
            ImageNotFoundError, ImageError: an image cannot be read.
            ValueError: an argument is out of range, or doesn't suit the model.
        """
        given = {
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
            "repetition_penalty": repetition_penalty,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        if not isinstance(images, list | tuple):
            return self._caption([images], prompt, changes, 1)[0]  # type: ignore[list-item]
        return self._caption(images, prompt, changes, batch_size)

    def _caption(
        self,
        images: Sequence[ImageSource],
        prompt: str | Sequence[str] | None,
        changes: dict[str, float],
        batch_size: int,
    ) -> list[Caption]:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
        if prompts is not None and len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
        captions: list[Caption] = []
        for start in range(0, len(images), batch_size):
            began = time.perf_counter()
            batch = images[start : start + batch_size]
            pixels = np.empty((len(batch), 3, self.image.crop, self.image.crop), np.float32)
            apply = self._pool.map if len(batch) > 1 else map  # one is not worth a thread
            for _ in apply(self.preprocess, batch, pixels):
                pass
            seconds = time.perf_counter() - began
            captions += self.caption_pixels(
                pixels,
                prompts=prompts and prompts[start : start + batch_size],
                changes=changes,
                preprocess_seconds=seconds,
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
        changes: Mapping[str, float] | None = None,
        preprocess_seconds: float = 0.0,
    ) -> list[Caption]:
        """Caption images that `preprocess` has made ready, as one batch.

        Args:
            pixels: float32 (batch, 3, height, width).
            prompts: one for each image.
            changes: fields of `DecodingOptions` that differ from the artifact's own.
            preprocess_seconds: what preprocessing took, for `Timing`.
        """
        framed, options = self._frame(prompts, len(pixels), changes or {})
        began = time.perf_counter()
        features = self.encoder(pixels)
        encoded = time.perf_counter()
        hypotheses = greedy(self.decoder, features, options, framed)
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

    def _frame(
        self, prompts: Sequence[str] | None, batch: int, changes: Mapping[str, float]
    ) -> tuple[Prompts | None, DecodingOptions]:
        """The prompts as ids, and the options of this call, held to the room behind them."""
        options = self.options
        if changes:
            options = dataclasses.replace(options, **changes)  # type: ignore[arg-type]
        if isinstance(self.vocabulary, Vocabulary):
            if prompts is not None:
                raise ValueError("a CNN-LSTM takes no prompt")
            return None, options
        framed = self.vocabulary.prompts(prompts, batch)
        limit = self.vocabulary.spec.max_positions
        if limit is not None:
            # The last token is never fed, so it needs no position.
            room = limit + 1 - framed.tokens.shape[1]
            if room < max(1, changes.get("max_tokens", 1), options.min_tokens):
                raise ValueError(
                    f"a prompt of {framed.tokens.shape[1]} tokens, the image's included, leaves "
                    f"room for {max(room, 0)} of the model's {limit}: shorten it, or max_tokens"
                )
            options = dataclasses.replace(options, max_tokens=min(options.max_tokens, room))
        return framed, options


def is_hub_id(name: str) -> bool:
    """Can this be `owner/name` on the Hugging Face hub, and not a slip in a path?"""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).parent.exists()


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """`folder`, or the local copy of what it names on the Hugging Face hub."""
    path = Path(folder)
    if path.exists() or not is_hub_id(os.fspath(folder)):
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ArtifactNotFoundError(
            f"{folder}: no such folder; if it is a Hugging Face id, first "
            "`pip install 'capexport[tokenizers]'`"
        ) from error
    try:
        return Path(snapshot_download(os.fspath(folder)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(
            f"{folder}: no such folder, nor one that can be downloaded from the Hugging Face hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


def open_artifact(path: Path, manifest: Manifest, device: str, threads: int | None) -> Captioner:
    """What `Captioner.load` does once the manifest has been read, and with it every file hashed."""
    try:
        if manifest.family == "cnn-lstm":
            return load_cnn_lstm(path, manifest, device, threads)
        if manifest.family == "blip2":
            return load_blip2(path, manifest, device, threads)
        raise ArtifactError(f"{path}: unknown model family {manifest.family!r}")
    except (ArtifactError, FileNotFoundError):
        raise
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: incomplete artifact: {error!r}; export again") from error


def load_cnn_lstm(
    path: Path,
    manifest: Manifest,
    device: str,
    threads: int | None,
    open_graph: OpenGraph | None = None,
) -> Captioner:
    """A CNN-LSTM's captioner; `open_graph` stands in for onnxruntime's own session."""
    from capexport.graphs import OnnxEncoder, OnnxLstmDecoder, open_session

    open_graph = open_graph or partial(open_session, device=device, threads=threads)
    words = json.loads(manifest.file(path, "vocabulary.json").read_text("utf-8"))
    vocabulary = Vocabulary(tuple(words))
    state = dict(manifest.state)
    start_token = int(manifest.decoding["start_token"])
    options = _decoding_options(path, manifest, len(vocabulary), [start_token])
    # The activations of more images than two a core spill from its cache: a batch of 32 in parts
    # of four takes two cores three quarters of the time that it takes them as a whole.
    at_once = 2 * (threads or available_cores()) if device == "cpu" else None
    bound_to = None if device == "cpu" else device
    graph = manifest.file(path, "encoder.onnx")
    encoder = OnnxEncoder(graph, state, open_graph, at_once=at_once, bound_to=bound_to)
    step = manifest.file(path, "decoder_step.onnx")
    loop = path / "decoder_loop.onnx" if "decoder_loop.onnx" in manifest.files else None
    decoder = OnnxLstmDecoder(
        step, loop, state, start_token, len(vocabulary), options, open_graph, bound_to
    )
    return Captioner(encoder, decoder, vocabulary, manifest.image, options, threads)


def load_blip2(
    path: Path, manifest: Manifest, device: str, threads: int | None, *, folded: bool = True
) -> Captioner:
    """A BLIP-2's captioner; `folded` as in `open_session`."""
    from capexport.graphs import OnnxCacheDecoder, OnnxImageEncoder

    spec = PromptSpec(**(manifest.prompt or {}))
    tokenizer = PromptTokenizer(manifest.file(path, "tokenizer.json"), spec)
    graphs = ["embed_tokens.onnx", "decoder_model_merged.onnx"]
    if spec.start_token is not None:
        graphs.append("encoder_model.onnx")
    # Quantised products are fast only in the layout that onnxruntime packs them into.
    mapped = manifest.precision in ("fp32", "fp16")
    decoder = OnnxCacheDecoder(
        {name: manifest.file(path, name) for name in graphs},
        manifest.state,
        spec.image_token,
        spec.start_token,
        device,
        threads,
        mapped=mapped,
        folded=folded,
    )
    size = decoder.vocabulary_size
    options = _decoding_options(path, manifest, size, [spec.image_token, spec.bos_token])
    if len(tokenizer) > size:
        raise ArtifactError(
            f"{path}: a tokenizer of {len(tokenizer)} tokens, but logits for {size}; export again"
        )
    vision = manifest.file(path, "vision_encoder.onnx")
    encoder = OnnxImageEncoder(vision, device, threads, mapped=mapped, folded=folded)
    return Captioner(encoder, decoder, tokenizer, manifest.image, options, threads)


def _decoding_options(
    path: Path, manifest: Manifest, vocabulary_size: int, tokens: Sequence[int]
) -> DecodingOptions:
    fields = {item.name for item in dataclasses.fields(DecodingOptions)}
    given = {name: value for name, value in manifest.decoding.items() if name in fields}
    for name in ("end_tokens", "suppress_tokens"):
        given[name] = tuple(given[name])
    options = DecodingOptions(**given)
    if not all(0 <= t < vocabulary_size for t in (*tokens, *options.suppress_tokens)):
        raise ArtifactError(f"{path}: tokens outside the vocabulary; export again")
    return options
