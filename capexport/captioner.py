"""`Captioner`: images in, captions out. The main path, top to bottom."""

from __future__ import annotations

import logging
import math
import numbers
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from capexport.artifact import Manifest, local_folder
from capexport.beam import beam_search
from capexport.decoding import (
    Decoder,
    DecodingKeywords,
    DecodingOptions,
    Encoder,
    Hypothesis,
    Text,
    changed,
    greedy,
)
from capexport.errors import ArtifactError, CapexportError, OptionError
from capexport.families import MISFIT, find_family
from capexport.preprocessing import MAX_PIXELS, FloatArray, ImageSource, ImageSpec, preprocess
from capexport.reading import ImageReader, is_one_image
from capexport.sessions import Providers, Target, available_cores, targets

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Trained on Flickr8k, in int8; artifacts/README.md says how it was made.
BUNDLED_ARTIFACT = Path(__file__).parent / "default"


def model_folder(model: str | os.PathLike[str] | None, revision: str | None = None) -> Path:
    """The `local_folder` of a model; of the bundled captioner where none is named."""
    return local_folder(BUNDLED_ARTIFACT if model is None else model, revision)


log = logging.getLogger("capexport")


@dataclass(frozen=True)
class Timing:
    """Seconds that a batch of `images` took, stage by stage."""

    images: int
    preprocess: float
    encode: float
    decode: float


@dataclass(frozen=True)
class Alternative:
    """One of an image's best captions.

    Attributes:
        text, tokens, log_probability: as of `Caption`.
        score: what the captions are ranked by. With beams, `log_probability` divided by the
            length (end token included) to the power of `length_penalty`; else `log_probability`.
    """

    text: str
    tokens: tuple[int, ...]
    log_probability: float
    score: float


@dataclass(frozen=True)
class Caption:
    """A caption and where it came from.

    Attributes:
        text: the caption's words.
        tokens: their ids, without start and end tokens.
        log_probability: natural logarithm of the caption's probability given the image. Greedy
            decoding shares out the probability of suppressed tokens among the others; with beams
            it is lost, as in `generate()`, so that the same caption has a little less.
        timing: of the whole batch that the image was captioned in.
        alternatives: the `num_return_sequences` best captions, this one first; fewer where the
            options allow no more.
        attention: where the decoder looked before each token, if you asked for it: weights of the
            image's regions, float32 (tokens, rows, columns), which sum to 1 for each token. The
            regions are an even grid over what `preprocess` leaves of the image.
    """

    text: str
    tokens: tuple[int, ...]
    log_probability: float
    timing: Timing
    alternatives: tuple[Alternative, ...] = ()
    attention: FloatArray | None = field(default=None, repr=False, compare=False)


class Captioner:
    """An encoder, a decoder, their text, and the image preprocessing they were trained with.

    ONNX graphs (`Captioner.load`) and PyTorch modules (`capexport.models.torch_captioner`) go
    through this same class.

    Several threads may use one captioner at once; to answer many requests, load it with
    `threads=1`. It keeps working in a forked process (not on a GPU, which a fork cannot share), and
    pickles as the folder or id that it was loaded from.

    Attributes:
        device: where it runs, such as "cpu" or "cuda:1".
        threads: CPU threads of preprocessing.
        batch_size: how many images of a list go through the model together by default.
        truncated: whether an image file that breaks off is captioned by what there is of it.
        full_size: whether large JPEG files are decoded whole; see `capexport.preprocessing`.
        folder: the artifact that it was opened from, if any.
    """

    folder: Path | None = None
    _reload: partial[Captioner] | None = None
    _closed = False

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
        self.truncated = False
        self.full_size = False
        self._reader = ImageReader(self.threads, batch_size)

    def __repr__(self) -> str:
        return f"<Captioner: {self._title} on {self.device}, {self.threads} threads>"

    @property
    def vocabulary(self) -> Text:
        """The old name of `text`."""
        return self.text

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
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
            revision: branch, tag or commit of an id; its main branch by default.
            device: "cpu", "cuda", "cuda:1" for the second GPU, or "auto": the first that works,
                the CPU last.
            threads: CPU threads for preprocessing and the graphs; all cores by default.
            providers: onnxruntime's execution providers in place of a device, as
                `onnxruntime.InferenceSession` takes them; the first one must start.
            session_options: an `onnxruntime.SessionOptions`, which every graph gets unchanged.
        Raises:
            ArtifactNotFoundError, ArtifactError: the folder is incomplete or altered.
            DeviceError: the device, or its execution provider, is not available.
            MissingExtraError: onnxruntime, or what the model needs, is not installed.
            DownloadError: a Hugging Face id cannot be downloaded.
            OptionError: arguments that contradict each other, or fewer threads than 1.
        """
        settings: Any = {
            "device": device,
            "threads": threads,
            "providers": providers,
            "session_options": session_options,
        }
        candidates = targets(**settings)
        path = model_folder(folder, revision)
        captioner = open_artifact(path, Manifest.read(path), *candidates)
        if folder is not None and path == Path(folder):
            folder = path.absolute()
        elif folder is not None:
            revision = path.name  # the commit, whatever a branch is by then
        captioner._reload = partial(cls.load, folder, revision=revision, **settings)
        return captioner

    def __reduce__(self) -> tuple[Any, ...]:
        if self._reload is None:
            raise TypeError("a captioner that Captioner.load did not make cannot be pickled")
        names = ("options", "batch_size", "truncated", "full_size")
        return self._reload, (), {name: getattr(self, name) for name in names}

    def __enter__(self) -> Captioner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and free the graphs, as the end of a `with` block does. A closed
        captioner raises `OptionError` when it is asked for a caption."""
        self._closed = True
        self._reader.close()
        vars(self).pop("encoder", None)
        vars(self).pop("decoder", None)

    @overload  # a str is iterable too, but counts as one path
    def caption(  # type: ignore[overload-overlap]
        self,
        images: ImageSource,
        *,
        prompt: str | None = None,
        batch_size: int | None = None,
        attention: bool = False,
        **options: Unpack[DecodingKeywords],
    ) -> Caption: ...

    @overload
    def caption(
        self,
        images: Iterable[ImageSource],
        *,
        prompt: str | Iterable[str] | None = None,
        batch_size: int | None = None,
        attention: bool = False,
        **options: Unpack[DecodingKeywords],
    ) -> list[Caption]: ...

    def caption(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        prompt: str | Iterable[str] | None = None,
        batch_size: int | None = None,
        attention: bool = False,
        **options: Unpack[DecodingKeywords],
    ) -> Caption | list[Caption]:
        """Caption one image, or any number of them from a list or another iterable.

        Args:
            images: paths, encoded bytes, binary files, PIL images, or uint8 arrays of shape
                (height, width[, 1, 3 or 4]).
            prompt: text that the caption continues, such as "Question: how many cats are there?
                Answer:". One for all images, or a list with one for each; only a model that was
                trained with prompts takes any.
            batch_size: how many images go through the graphs together; by default what suits the
                model. A caption doesn't depend on it.
            attention: also find out where the decoder looked (`Caption.attention`). For that, it
                goes through its captions a second time.
            options: fields of `DecodingOptions` in place of the artifact's own, such as
                `max_tokens` or `num_beams`.
        Returns:
            One `Caption` for one image, else a list with one for each image, in order.
        Raises:
            ImageNotFoundError, ImageError: an image cannot be read; `stream` can skip it.
            OptionError: an argument is out of range, or doesn't suit the model.
        """
        size = self._checked(batch_size)
        if is_one_image(images):
            return self.caption([images], prompt=prompt, attention=attention, **options)[0]
        images = iter(images)
        prompts: Iterable[str | None] = repeat(None)
        if isinstance(prompt, str):
            prompts = repeat(prompt)
        elif prompt is not None:
            if not isinstance(prompt, Iterable):
                raise OptionError(f"a prompt must be text, got {prompt!r}")
            images, prompts = list(images), list(prompt)
            if len(prompts) != len(images):
                raise OptionError(f"{len(prompts)} prompts for {len(images)} images")
            if not all(isinstance(one, str) for one in prompts):
                raise OptionError("a prompt must be text: pass one for all images, or one for each")
        pairs = zip(images, prompts, strict=False)
        results = self._stream(pairs, size, "raise", attention, options)
        return [caption for _, caption in results]

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        prompt: str | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        batch_size: int | None = None,
        attention: bool = False,
        **options: Unpack[DecodingKeywords],
    ) -> Iterator[tuple[ImageSource, Caption]]:
        """Caption images one batch at a time, as the captions are asked for.

        It holds no more than a batch of them, so `images` may be endless.

        Args:
            on_error: what to do with an image that cannot be read: "raise" its `ImageError`, after
                the captions of the images before it, or "skip" it, with a warning in the log.
            images, batch_size, attention, options: as for `caption`; `prompt` is one for all.
        Yields:
            Each image, as it was given, and its `Caption`, in order.
        """
        size = self._checked(batch_size)
        if on_error not in ("raise", "skip"):
            raise OptionError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        changed(self.options, options)  # refused here, not at the first caption
        self.check_attention(attention)
        images = [images] if is_one_image(images) else images
        return self._stream(zip(images, repeat(prompt)), size, on_error, attention, options)

    def _checked(self, batch_size: int | None) -> int:
        size = self.batch_size if batch_size is None else batch_size
        if not isinstance(size, numbers.Integral) or size < 1:
            raise OptionError(f"batch_size must be at least 1, got {size!r}")
        if self._closed:
            raise OptionError("this captioner is closed")
        return size

    def check_attention(self, wanted: bool = True) -> None:
        """Check that the decoder can say where it looked, if that is wanted.

        Raises:
            OptionError: attention is wanted, but the decoder has none.
        """
        if wanted and self.decoder.regions is None:
            raise OptionError(
                "this captioner looks at the whole image at once: attention=True needs one that "
                "was trained with `--decoder attention`"
            )

    def _stream(
        self,
        pairs: Iterator[tuple[ImageSource, str | None]],
        batch_size: int,
        on_error: str,
        attention: bool,
        options: DecodingKeywords,
    ) -> Iterator[tuple[ImageSource, Caption]]:
        while batch := list(islice(pairs, batch_size)):
            began = time.perf_counter()
            sources = [image for image, _ in batch]
            with self._reader.read(sources, self.image.crop, self.preprocess) as (pixels, errors):
                failed = next((error for error in errors if error), None)
                if failed:
                    kept = [row for row, error in enumerate(errors) if not error]
                    if on_error == "raise":
                        kept = kept[: errors.index(failed)]
                    else:
                        for error in filter(None, errors):
                            log.warning("skipped: %s", error)
                    for place, row in enumerate(kept):
                        pixels[place] = pixels[row]
                    batch, pixels = [batch[row] for row in kept], pixels[: len(kept)]
                prompts = [prompt for _, prompt in batch if prompt is not None]
                captions = batch and self.caption_pixels(
                    pixels,
                    prompts=prompts or None,  # all images have one, or none has
                    preprocess_seconds=time.perf_counter() - began,
                    attention=attention,
                    **options,
                )
            yield from zip((image for image, _ in batch), captions, strict=True)
            if failed and on_error == "raise":
                raise failed

    def preprocess(
        self, image: ImageSource, out: FloatArray | None = None, *, max_pixels: int = MAX_PIXELS
    ) -> FloatArray:
        """Make one image ready for `caption_pixels`: float32 (3, height, width).

        Args:
            out: an array like the result, which is then written there and returned.
            max_pixels: as of `capexport.preprocessing.load_image`.
        Raises:
            ImageNotFoundError, ImageError: the image cannot be read.
        """
        return preprocess(
            image,
            self.image,
            out,
            max_pixels=max_pixels,
            truncated=self.truncated,
            full_size=self.full_size,
        )

    def caption_pixels(
        self,
        pixels: FloatArray,
        *,
        prompts: Sequence[str] | None = None,
        preprocess_seconds: float = 0.0,
        attention: bool = False,
        **options: Unpack[DecodingKeywords],
    ) -> list[Caption]:
        """Caption images that `preprocess` has made ready, as one batch.

        Args:
            pixels: float32 (batch, 3, height, width).
            prompts: one for each image.
            preprocess_seconds: how long preprocessing took, for `Timing`.
            attention, options: as for `caption`.
        Raises:
            OptionError: as for `caption`, or the pixels have another shape or type.
        """
        self._checked(None)
        self.check_attention(attention)
        self._check_pixels(pixels, prompts)
        own = changed(self.options, options)
        # The prompt must leave room for the `max_tokens` that were asked for; the default yields.
        needed = max(1, options.get("max_tokens") or 1, own.min_tokens)
        framed = self.text.frame(prompts, len(pixels), needed)
        if not len(pixels):
            return []
        try:
            with np.errstate(all="ignore"):
                began = time.perf_counter()
                features = self.encoder(pixels)
                encoded = time.perf_counter()
                if own.num_beams > 1:
                    found = beam_search(self.decoder, features, own, framed)
                else:
                    found = [[one] for one in greedy(self.decoder, features, own, framed)]
                decoded = time.perf_counter()
            timing = Timing(len(pixels), preprocess_seconds, encoded - began, decoded - encoded)
            captions = [self._caption(hypotheses, timing) for hypotheses in found]
            if not attention:
                return captions
            looked = self.decoder.attention(features, [caption.tokens for caption in captions])
            return [replace(c, attention=maps) for c, maps in zip(captions, looked, strict=True)]
        except CapexportError:
            raise
        except MISFIT as error:
            raise ArtifactError(
                f"{self.folder or self._title}: the model's parts do not fit together: {error!r}; "
                "export again"
            ) from error

    def _check_pixels(self, pixels: FloatArray, prompts: Sequence[str] | None) -> None:
        shape, side = getattr(pixels, "shape", ()), self.image.crop
        if len(shape) != 4 or shape[1:] != (3, side, side) or pixels.dtype != np.float32:
            raise OptionError(
                f"pixels must be float32 (batch, 3, {side}, {side}), as `preprocess` makes them"
            )
        if prompts is not None and len(prompts) != len(pixels):
            raise OptionError(f"{len(prompts)} prompts for {len(pixels)} images")

    def _caption(self, hypotheses: Sequence[Hypothesis], timing: Timing) -> Caption:
        """The caption of an image: the first of its hypotheses, with all of them as
        alternatives."""
        alternatives = []
        for hypothesis in hypotheses:
            tokens, log_probability = tuple(hypothesis.tokens), hypothesis.log_probability
            if not math.isfinite(log_probability):
                raise ArithmeticError("probabilities that are no numbers")
            score = log_probability if hypothesis.score is None else hypothesis.score
            text = self.text.decode(tokens)
            alternatives.append(Alternative(text, tokens, log_probability, score))
        best = alternatives[0]
        return Caption(best.text, best.tokens, best.log_probability, timing, tuple(alternatives))


def open_artifact(path: Path, manifest: Manifest, *candidates: Target) -> Captioner:
    """Open an artifact on the first of `candidates` that works: what `Captioner.load` does once the
    manifest has been read and the files have been checked."""
    family = find_family(manifest.family)
    parts, target = family.open_on_first(path, manifest, candidates)
    captioner = Captioner(
        *parts,
        manifest.image,
        manifest.decoding.options,
        threads=target.threads,
        batch_size=family.batch_size,
        device=target.name,
        title=f"{manifest.family} {manifest.precision}",
    )
    captioner.folder = path
    return captioner
