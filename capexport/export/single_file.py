"""`capexport graph`: build the one file, compare it with `Captioner` and with Pillow, write it."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import PIL
from onnx import helper
from tqdm import tqdm

import capexport
from capexport.artifact import CaptionParity, Manifest, record_files
from capexport.atomic import refuse_existing, replacing_binary_file
from capexport.captioner import Caption, Captioner, open_artifact
from capexport.decoding import DecodingKeywords, changed
from capexport.errors import OptionError, ParityError
from capexport.export import single
from capexport.export.head import image_head
from capexport.export.loop import opset_of
from capexport.export.parity import (
    TOLERANCE,
    compared_images,
    image_names,
    relative_error,
    scored,
    seeded_images,
    token_agreement,
)
from capexport.export.w8 import keep_weight_bytes
from capexport.preprocessing import ImageSource, ImageSpec, image_name, load_image, preprocess
from capexport.sessions import CPU, Graph

log = logging.getLogger("capexport")

_W8_TOLERANCE = 0.5  # relative error of the encoder's outputs; that of unrelated ones is 1.4
# Heights and widths that a head can go wrong at: a pixel, a line, odd and even, either axis first,
# smaller than any crop, and enlarged on one axis alone.
_SIZES = (
    (1, 1), (1, 2), (2, 1), (1, 97), (97, 1), (3, 250), (250, 3), (31, 33), (223, 225), (224, 224),
    (256, 256), (257, 255), (300, 400), (400, 300), (375, 500), (500, 333), (640, 100), (100, 640),
    (900, 230), (230, 900), (448, 448), (449, 897), (1024, 683), (683, 1024), (1, 100), (2000, 21),
)  # fmt: skip


@dataclass(frozen=True)
class FileParity:
    """What a finished file was compared on.

    Attributes:
        manifest: of the graphs that it was made of, with the decoding that it does.
        captions: the file's against `Captioner`'s, over graphs of the same precision.
        sizes: how many sizes of images its preprocessing was compared at; all gave the bits of
            `preprocess`.
        kept: for "w8", the shares (0 to 1) of captions and of tokens that are the int8 artifact's.
        metrics: scores against human captions, by precision.
    """

    manifest: Manifest
    captions: CaptionParity
    sizes: int
    kept: tuple[float, float] | None = None
    metrics: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)


def export_file(
    folder: Path,
    out: Path,
    photos: Sequence[ImageSource] = (),
    *,
    precision: str = "as-is",
    references: Mapping[str, Sequence[str]] | None = None,
    decoding: DecodingKeywords | None = None,
) -> FileParity:
    """Write the artifact in `folder` as the new file `out`, which appears only if parity holds.

    Args:
        photos: what the captions are compared on, at least 16; seeded colour fields by default.
        precision: "as-is", or "w8": the 8-bit weights of an int8 artifact, computed in float32.
        references: human captions by the photos' file names, to score the captions with.
        decoding: how the graph decodes, in place of the artifact's defaults.
    Raises:
        OutputExistsError: `out` is there already.
        OptionError: too few photos, photos without references, or an artifact or a way of decoding
            that one graph does not hold.
        ParityError: the file does not say what `Captioner` says.
        MissingExtraError: `references` without pycocoevalcap.
    """
    refuse_existing(out)
    images = compared_images(photos)
    names = image_names(images, references)
    artifact, given = Manifest.read(folder), decoding or {}
    manifest = dataclasses.replace(artifact, decoding=changed(artifact.decoding, given))
    _refuse_unsupported(folder, manifest, precision)
    own = open_artifact(folder, artifact, CPU)
    own.full_size = True  # the graph is given whole photos, too
    wanted = own.caption(images, **given)
    said = {manifest.precision: wanted}
    with tempfile.TemporaryDirectory() as draft:
        parts, captioner, kept = folder, own, None
        if precision == "w8":
            parts = Path(draft, "w8")
            manifest = _write_w8(folder, parts, manifest)
            captioner = open_artifact(parts, manifest, CPU)
            captioner.full_size = True
            said["w8"] = captioner.caption(images, **given)
            kept = _compare_with_int8(own, captioner, wanted, said["w8"])
        model = single.single_graph(parts, manifest)
        parity = FileParity(
            manifest,
            _compare_captions(_save_and_open(model, draft), captioner, images, given),
            _compare_pixels(manifest.image, model, draft),
            kept,
            {name: scored(names, s, references) for name, s in said.items() if references},
        )
    _describe(model, parity)
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_existing(out)
    with replacing_binary_file(out) as file:
        file.write(model.SerializeToString())
    return parity


def _refuse_unsupported(folder: Path, manifest: Manifest, precision: str) -> None:
    """Refuse what one graph does not hold."""
    decoding, trouble = manifest.decoding, ""
    if manifest.family != "cnn-lstm":
        trouble = (
            f"a {manifest.family} captioner is several graphs, with prompts and a tokenizer; one "
            "file holds a CNN-LSTM"
        )
    elif precision == "w8" and manifest.precision != "int8":
        trouble = (
            f"w8 is made of an int8 artifact, and this one is {manifest.precision}: export it "
            "with `capexport lstm --precision int8` first"
        )
    elif decoding.repetition_penalty != 1:
        trouble = "the graph knows no repetition penalty: pass --repetition-penalty 1"
    elif decoding.no_repeat_ngram_size:
        trouble = "the graph lets words come again: pass --no-repeat-ngram-size 0"
    elif decoding.num_return_sequences > 1:
        trouble = "the graph gives one caption: pass --num-return-sequences 1"
    elif len(decoding.end_tokens) != 1:
        trouble = f"the graph ends captions with one token, not {len(decoding.end_tokens)}"
    if trouble:
        raise OptionError(f"{folder}: {trouble}")


def _write_w8(folder: Path, target: Path, manifest: Manifest) -> Manifest:
    """An int8 artifact's graphs as "w8" ones, and the manifest that they want."""
    target.mkdir()
    for name in ("encoder.onnx", "decoder_step.onnx"):
        model = single.read_graph(folder / name)
        keep_weight_bytes(model)
        onnx.save(model, target / name)
    words = (folder / "vocabulary.json").read_bytes()
    (target / "vocabulary.json").write_bytes(words)
    return dataclasses.replace(manifest, precision="w8", files=record_files(target))


def _compare_with_int8(
    own: Captioner, w8: Captioner, wanted: Sequence[Caption], said: Sequence[Caption]
) -> tuple[float, float]:
    """The shares of w8's captions and tokens that are int8's.

    Raises:
        ParityError: the encoder's outputs are far from int8's.
    """
    pixels = np.stack([own.preprocess(image) for image in seeded_images()])
    states = own.encoder(pixels), w8.encoder(pixels)
    error = max(relative_error(states[0][name], states[1][name]) for name in states[0])
    if not error <= _W8_TOLERANCE:
        raise ParityError(
            f"the encoder errs by {error:.2g} from int8 in w8 (at most {_W8_TOLERANCE:g})"
        )
    same = sum(a.tokens == b.tokens for a, b in zip(wanted, said, strict=True))
    return same / len(wanted), token_agreement(wanted, said)


def _save_and_open(model: onnx.ModelProto, folder: str) -> Graph:
    path = Path(folder, "captioner.onnx")
    onnx.save(model, path)
    return CPU.open(path)


def _compare_captions(
    graph: Graph, captioner: Captioner, images: Sequence[ImageSource], given: DecodingKeywords
) -> CaptionParity:
    """Caption each image with the graph and with the captioner.

    Raises:
        ParityError: a caption's tokens or words differ, or its log-probability by too much.
    """
    largest, said = 0.0, set()
    for image in tqdm(images, "comparing captions", leave=False, disable=None):
        wanted = captioner.caption(image, **given)
        got = graph.run({"image": np.asarray(load_image(image))}, list(graph.outputs))
        text = " ".join(got["words"])
        if (tuple(got["tokens"].tolist()), text) != (wanted.tokens, wanted.text):
            raise ParityError(
                f"{image_name(image)}: captioned {text!r}, but by Captioner {wanted.text!r}"
            )
        gap = abs(float(got["log_probability"]) - wanted.log_probability)
        if not gap <= TOLERANCE:
            raise ParityError(
                f"{image_name(image)}: log-probability differs by {gap:.2g} from Captioner's "
                f"(at most {TOLERANCE:g})"
            )
        largest = max(largest, gap)
        said.add(wanted.tokens)
    return CaptionParity(
        images=len(images),
        identical=len(images),
        distinct=len(said),
        max_log_probability_difference=largest,
    )


def _compare_pixels(spec: ImageSpec, model: onnx.ModelProto, folder: str) -> int:
    """The number of sizes at which the graph's own resizing gives the bits of `preprocess`.

    Raises:
        ParityError: at one it doesn't.
    """
    head = image_head(spec, opset_of(model), model.ir_version)
    graph, rng = _save_and_open(head, folder), np.random.default_rng(0)
    for height, width in _SIZES:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        image[rng.random((height, width)) < 0.3] = rng.choice([0, 255])  # where cubics overshoot
        got = graph.run({"image": image}, ["images"])["images"][0]
        if not np.array_equal(got, preprocess(image, spec)):
            raise ParityError(
                f"an image of {width}x{height} pixels comes out of the graph with other values "
                f"than out of Pillow {PIL.__version__}"
            )
    return len(_SIZES)


def _describe(model: onnx.ModelProto, parity: FileParity) -> None:
    """Write into the graph what it is, for whoever meets it without its artifact."""
    manifest, captions = parity.manifest, parity.captions
    provenance = manifest.provenance
    compared = (
        f"Before it was written, its captions were those of capexport's Captioner for "
        f"{captions.images} of {captions.images} images, with log-probabilities that differ by at "
        f"most {captions.max_log_probability_difference:.1g}, and its resizing gave the bits of "
        f"Pillow {PIL.__version__} for {parity.sizes} of {parity.sizes} sizes."
    )
    assert single.__doc__ is not None
    model.doc_string = f"{single.__doc__}\n{textwrap.fill(compared, 100)}\n"
    kept = parity.kept and (
        f"{parity.kept[0]:.1%} of captions and {parity.kept[1]:.1%} of tokens are those of int8"
    )
    model.producer_name, model.producer_version = "capexport", capexport.__version__
    facts = {
        "family": manifest.family,
        "precision": manifest.precision,
        "decoding": json.dumps(dataclasses.asdict(manifest.decoding)),
        "parity": compared,
        "lost": kept,
        "metrics": json.dumps(parity.metrics) if parity.metrics else None,
        "checkpoint_sha256": provenance.checkpoint_sha256,
        "source": provenance.source,
        "licence": provenance.licence,
    }
    helper.set_model_props(
        model, {key: value for key, value in facts.items() if isinstance(value, str)}
    )
