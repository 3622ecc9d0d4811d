"""`capexport lstm`: a CNN-LSTM checkpoint to ONNX, in float32 or 8 bits."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from tqdm import tqdm

from capexport.artifact import Manifest, new_artifact, record_files
from capexport.captioner import Caption, Captioner
from capexport.decoding import greedy
from capexport.errors import ParityError
from capexport.export.graph import OPSET, export_graph, versions
from capexport.export.int8 import quantize_static, round_convolutions
from capexport.export.loop import loop_graph
from capexport.export.metrics import score
from capexport.export.parity import (
    IMAGES,
    TOLERANCE,
    compare_captions,
    compare_outputs,
    relative_error,
    seeded_images,
    token_agreement,
)
from capexport.graphs import require_provider
from capexport.models.checkpoint import Checkpoint
from capexport.models.cnn_lstm import CnnLstm
from capexport.models.torch_captioner import decoding_defaults, torch_captioner
from capexport.preprocessing import ImageSource, image_name, preprocess
from capexport.vocabulary import Vocabulary

log = logging.getLogger("capexport")

# Each state input of the step graph, and the output that holds its next value.
STATE = {"hidden": "next_hidden", "cell": "next_cell"}
# Largest error of an 8-bit graph's outputs. Unrelated numbers would err by 1.4, zeros by 1.
INT8_TOLERANCE = 0.5


class _EncoderGraph(nn.Module):
    """Images to the state after the image: encoder and first LSTM step."""

    def __init__(self, model: CnnLstm) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.start(images)


class _StepGraph(nn.Module):
    """A token and the state to logits and the next state."""

    def __init__(self, model: CnnLstm) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, tokens: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, (hidden, cell) = self.decoder.step(tokens, (hidden, cell))
        return logits, hidden, cell


def export_cnn_lstm(
    checkpoint: Checkpoint,
    out: Path,
    photos: Sequence[ImageSource] = (),
    *,
    precision: str = "fp32",
    calibration: Sequence[ImageSource] = (),
    references: Mapping[str, Sequence[str]] | None = None,
) -> Manifest:
    """Export `checkpoint` to the new folder `out`, where it appears only if parity holds.

    Args:
        photos: what the captions are compared on, at least 16; seeded colour fields by default.
        precision: "fp32", or "int8" for graphs quantised after their parity in fp32 was shown.
        calibration: photos that show int8 the ranges of its activations; a hundred of what the
            model was trained on will do.
        references: human captions by the photos' file names: what the captions score is reported.
    Raises:
        OutputExistsError: `out` is there already.
        ParityError: the graphs do not reproduce the model.
        ValueError: calibration photos without int8 or the reverse, or photos without references.
        MissingExtraError: `references` without pycocoevalcap.
    """
    if photos and len(photos) < IMAGES:
        raise ParityError(f"parity takes at least {IMAGES} photos, got {len(photos)}")
    if (precision == "int8") != bool(calibration):
        raise ValueError("int8, and int8 alone, needs calibration photos: a hundred or so")
    require_provider("cpu")  # parity needs it, at the very end
    images = list(photos) or list(seeded_images())
    names = [Path(image_name(image)).name for image in images]
    if missing := [name for name in names if references and name not in references]:
        raise ValueError(f"{len(missing)} photos without human captions, {missing[0]} for one")
    reference = torch_captioner(checkpoint)
    with new_artifact(out) as draft, torch.no_grad():
        _export_graphs(checkpoint, draft)
        (draft / "vocabulary.json").write_text(
            json.dumps(checkpoint.vocabulary.words, ensure_ascii=False, indent=0), encoding="utf-8"
        )
        manifest = Manifest(
            family="cnn-lstm",
            precision="fp32",
            image=checkpoint.image,
            decoding={"start_token": Vocabulary.START, **decoding_defaults()},
            state=STATE,
            files=record_files(draft),
            provenance={
                "checkpoint_sha256": checkpoint.sha256,
                "training": checkpoint.training,
                "metrics": checkpoint.metrics,
                "opset": OPSET,
                "exporter": "torch.onnx.export(dynamo=True)",
                "versions": versions(),
            },
            parity={},
        )
        manifest.write(draft)
        log.info("checking parity with PyTorch")
        exported = made = Captioner.load(draft)
        wanted = reference.caption(images)
        parity = {
            "inputs": "photos" if photos else "seeded images",
            "tolerance": TOLERANCE,
            "max_difference": _compare_graphs(checkpoint, exported, images),
            "captions": compare_captions(wanted, exported, images),
        }
        if precision == "int8":
            log.info("quantising, calibrated on %d photos", len(calibration))
            _quantize(draft, exported, calibration)
            manifest = dataclasses.replace(
                manifest,
                precision=precision,
                files=record_files(draft),
                provenance={**manifest.provenance, "calibration_photos": len(calibration)},
            )
            manifest.write(draft)
            made = Captioner.load(draft)
            parity["int8"] = _compare_quantized(exported, made, wanted, images)
        if references:
            said = {"PyTorch": wanted, precision: made.caption(images)}
            parity["metrics"] = {
                name: score(
                    {photo: caption.text for photo, caption in zip(names, captions, strict=True)},
                    references,
                )
                for name, captions in said.items()
            }
        manifest = dataclasses.replace(manifest, parity=parity)
        manifest.write(draft)
    return manifest


def _export_graphs(checkpoint: Checkpoint, draft: Path) -> None:
    model = checkpoint.model.cpu().eval()
    log.info("exporting encoder.onnx")
    size = checkpoint.image.crop
    example = torch.zeros(2, 3, size, size)
    export_graph(_EncoderGraph(model), [example], ["images"], list(STATE), draft / "encoder.onnx")
    log.info("exporting decoder_step.onnx and decoder_loop.onnx")
    export_graph(
        _StepGraph(model),
        [torch.zeros(2, dtype=torch.int64), *model.start(example)],
        ["tokens", *STATE],
        ["logits", *STATE.values()],
        draft / "decoder_step.onnx",
    )
    _add_loop(draft)


def _add_loop(draft: Path) -> None:
    """`decoder_loop.onnx` beside the step graph, and the weights of both in `decoder.data`."""
    path = draft / "decoder_step.onnx"
    step = onnx.load(path)
    (draft / "decoder.data").unlink(missing_ok=True)  # onnx would append to it
    onnx.save(step, path, save_as_external_data=True, location="decoder.data")
    (draft / "decoder.data").chmod(path.stat().st_mode)  # onnx lets nobody else read it
    step = onnx.load(path, load_external_data=False)
    defaults = decoding_defaults()
    [end_token] = defaults["end_tokens"]
    loop = loop_graph(step, STATE, Vocabulary.START, end_token, defaults["suppress_tokens"])
    onnx.save(loop, draft / "decoder_loop.onnx")


def _quantize(draft: Path, exported: Captioner, calibration: Sequence[ImageSource]) -> None:
    """Turn the graphs of `draft`, which `exported` runs in float32, into 8-bit ones."""
    images = [{"images": exported.preprocess(image)[None]} for image in calibration]

    def steps() -> Iterator[dict[str, np.ndarray]]:
        for feeds in images:
            state = exported.encoder(**feeds)
            [hypothesis] = greedy(exported.decoder, state, exported.options)
            for token in (Vocabulary.START, *hypothesis.tokens):
                tokens = np.array([token], np.int64)
                yield {"tokens": tokens, **state}
                _, state = exported.decoder.step(tokens, state)

    encoder = draft / "encoder.onnx"
    round_convolutions(encoder, tqdm(images, "rounding weights", leave=False, disable=None))
    quantize_static(encoder, images)
    quantize_static(draft / "decoder_step.onnx", steps())
    _add_loop(draft)


def _compare_graphs(
    checkpoint: Checkpoint, exported: Captioner, images: Sequence[ImageSource]
) -> dict[str, float]:
    """The largest difference of a value from PyTorch's, by graph."""
    model, decoder = checkpoint.model, exported.decoder
    pixels = np.stack([preprocess(image, checkpoint.image) for image in images[:IMAGES]])
    rng = np.random.default_rng(0)
    worst = {"encoder.onnx": 0.0, "decoder_step.onnx": 0.0}
    for batch in (1, 3, IMAGES):
        hidden, cell = model.start(torch.from_numpy(pixels[:batch]))
        state = exported.encoder(pixels[:batch])
        expected = dict(zip(STATE, (hidden, cell), strict=True))
        difference = compare_outputs("encoder.onnx", expected, state)
        worst["encoder.onnx"] = max(worst["encoder.onnx"], difference)
        # Both steps start from PyTorch's state, so the second graph is judged alone.
        tokens = rng.integers(len(checkpoint.vocabulary), size=batch)
        logits, (hidden, cell) = model.decoder.step(torch.from_numpy(tokens), (hidden, cell))
        actual, state = decoder.step(tokens, {k: v.numpy() for k, v in expected.items()})
        difference = compare_outputs(
            "decoder_step.onnx",
            {"logits": logits, "hidden": hidden, "cell": cell},
            {"logits": actual, **state},
        )
        worst["decoder_step.onnx"] = max(worst["decoder_step.onnx"], difference)
    return worst


def _compare_quantized(
    exact: Captioner, quantized: Captioner, wanted: Sequence[Caption], images: Sequence[ImageSource]
) -> dict[str, float]:
    """What 8 bits lose.

    Returns:
        The error of the state after the image and of the first logits, as in `relative_error`, and
        the shares of captions and of tokens that are PyTorch's.
    Raises:
        ParityError: an error is larger than `INT8_TOLERANCE`.
    """
    pixels = np.stack([exact.preprocess(image) for image in images[:IMAGES]])
    state = exact.encoder(pixels)
    logits, _ = exact.decoder.start(state, None)
    errors = {
        "encoder.onnx": relative_error(state["hidden"], quantized.encoder(pixels)["hidden"]),
        "decoder_step.onnx": relative_error(logits, quantized.decoder.start(state, None)[0]),
    }
    for graph, error in errors.items():
        if not error <= INT8_TOLERANCE:
            raise ParityError(f"{graph}: errs by {error:.2g} in int8 (at most {INT8_TOLERANCE:g})")
    captions = quantized.caption(images)
    same = [a.tokens == b.tokens for a, b in zip(wanted, captions, strict=True)]
    return {
        **errors,
        "identical_captions": sum(same) / len(same),
        "token_agreement": token_agreement(wanted, captions),
    }
