"""`capexport lstm`: a CNN-LSTM checkpoint to ONNX, in float32 or 8 bits."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from capexport.artifact import Manifest, Parity, Provenance
from capexport.captioner import Caption, Captioner
from capexport.decoding import DecodingKeywords, changed, greedy
from capexport.errors import OptionError, ParityError
from capexport.export.draft import Draft, draft_artifact
from capexport.export.graph import OPSET, export_graph, versions
from capexport.export.int8 import quantize_static, round_weights
from capexport.export.loop import loop_graph
from capexport.export.parity import (
    IMAGES,
    TOLERANCE,
    compare_captions,
    compare_outputs,
    compared_images,
    image_names,
    relative_error,
    scored,
    token_agreement,
)
from capexport.families.cnn_lstm import ATTENTION, DECODING, AttentiveDecoder
from capexport.models.checkpoint import Checkpoint
from capexport.models.cnn_lstm import CnnLstm, ImageEncoder
from capexport.models.steps import State
from capexport.models.torch_captioner import regions_of, torch_captioner
from capexport.preprocessing import ImageSource
from capexport.sessions import CPU

log = logging.getLogger("capexport")

# Largest error of an 8-bit graph's outputs. Unrelated numbers would err by 1.4, zeros by 1.
INT8_TOLERANCE = 0.5


class _EncoderGraph(nn.Module):
    """Images to the state after the image: encoder and first LSTM step."""

    def __init__(self, model: CnnLstm) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> State:
        return self.model.start(images)


class _StepGraph(nn.Module):
    """A token and the state to logits and the new values of the state; with attention also to where
    the step looked."""

    def __init__(self, model: CnnLstm) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        logits, state = self.decoder.step(tokens, state)
        return logits, {k: v for k, v in state.items() if k not in self.decoder.constant}


def export_cnn_lstm(
    checkpoint: Checkpoint,
    out: Path,
    photos: Sequence[ImageSource] = (),
    *,
    precision: str = "fp32",
    calibration: Sequence[ImageSource] = (),
    references: Mapping[str, Sequence[str]] | None = None,
    decoding: DecodingKeywords | None = None,
) -> Manifest:
    """Export `checkpoint` to the new folder `out`, where it appears only if parity holds.

    Args:
        photos: what the captions are compared on, at least 16; seeded colour fields by default.
        precision: "fp32", or "int8" for graphs quantised after their parity in fp32 was shown.
        calibration: photos that show int8 the ranges of its activations; a hundred of what the
            model was trained on will do.
        references: human captions by the photos' file names: what the captions score is reported.
        decoding: the artifact's default options, in place of the checkpoint's.
    Raises:
        OutputExistsError: `out` is there already.
        ParityError: the graphs do not reproduce the model.
        OptionError: calibration photos without int8 or the reverse, too few photos, or photos
            without references.
        MissingExtraError: `references` without pycocoevalcap.
    """
    images = compared_images(photos)
    names = image_names(images, references)
    if (precision == "int8") != bool(calibration):
        raise OptionError("int8, and int8 alone, needs calibration photos: a hundred or so")
    CPU.require_provider()  # parity needs it, at the very end
    both: Any = {**checkpoint.decoding, **(decoding or {})}
    checkpoint = dataclasses.replace(checkpoint, decoding=both)
    pytorch = torch_captioner(checkpoint)
    with draft_artifact(out) as draft:
        state = _export_graphs(checkpoint, draft.folder)
        words = json.dumps(checkpoint.vocabulary.words, ensure_ascii=False, indent=0)
        (draft.folder / "vocabulary.json").write_text(words, encoding="utf-8")
        draft.manifest = _manifest(checkpoint, state)
        log.info("checking parity with PyTorch")
        exported = made = draft.captioner()
        wanted = pytorch.caption(images)
        parity = Parity(
            inputs="photos" if photos else "seeded images",
            tolerance=TOLERANCE,
            max_difference=_compare_graphs(pytorch, exported, images),
            captions=compare_captions(wanted, exported, images),
        )
        if pytorch.options.num_beams > 1:  # loop and steps are compared all the same
            alone: DecodingKeywords = {"num_beams": 1, "num_return_sequences": 1}
            compare_captions(pytorch.caption(images, **alone), exported, images, **alone)
        if precision == "int8":
            made = _quantized(draft, state, exported, calibration)
            lost = _compare_quantized(exported, made, wanted, images)
            parity = dataclasses.replace(parity, int8=lost)
        if references:
            said = {"PyTorch": wanted, precision: made.caption(images)}
            metrics = {k: scored(names, captions, references) for k, captions in said.items()}
            parity = dataclasses.replace(parity, metrics=metrics)
        draft.manifest = dataclasses.replace(draft.manifest, parity=parity)
    return draft.manifest


def _manifest(checkpoint: Checkpoint, state: Mapping[str, str]) -> Manifest:
    return Manifest(
        family="cnn-lstm",
        precision="fp32",
        image=checkpoint.image,
        decoding=changed(DECODING, checkpoint.decoding),
        state=dict(state),
        regions=regions_of(checkpoint),
        files={},
        provenance=Provenance(
            checkpoint_sha256=checkpoint.sha256,
            training=checkpoint.training,
            metrics=checkpoint.metrics,
            opset=OPSET,
            exporter="torch.onnx.export(dynamo=True)",
            versions=versions(),
        ),
    )


def _export_graphs(checkpoint: Checkpoint, draft: Path) -> dict[str, str]:
    """Write the graphs.

    Returns:
        Each state input of the step graph that changes, and the output that holds its next value.
    """
    model = checkpoint.model.cpu().eval()
    log.info("exporting encoder.onnx")
    size = checkpoint.image.crop
    example = torch.zeros(2, 3, size, size)
    names = list(state := model.start(example))
    encoder = _EncoderGraph(_folded(model))
    export_graph(encoder, [example], ["images"], names, draft / "encoder.onnx")
    log.info("exporting decoder_step.onnx and decoder_loop.onnx")
    following = {name: f"next_{name}" for name in names if name not in model.decoder.constant}
    looks = [ATTENTION] if regions_of(checkpoint) else []
    beams = {
        n: v if n in model.decoder.shared else v.repeat_interleave(2, 0) for n, v in state.items()
    }
    export_graph(
        _StepGraph(model),
        [torch.zeros(4, dtype=torch.int64), beams],
        ["tokens", *names],
        ["logits", *following.values(), *looks],
        draft / "decoder_step.onnx",
    )
    _add_loop(draft, following)
    return following


def _folded(model: CnnLstm) -> CnnLstm:
    """A copy with the batch norms of its backbone folded into the convolutions, and no activation
    in place. The exporter would do the same, to the bit, but takes three times as long."""
    if not isinstance(model.encoder, ImageEncoder):
        return model
    model = copy.deepcopy(model)
    model.encoder.backbone = nn.Sequential(fuse(model.encoder.backbone))
    model.encoder.train_from = 1  # all of it is the stem
    for module in model.encoder.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return model


def _add_loop(draft: Path, state: Mapping[str, str]) -> None:
    """`decoder_loop.onnx` beside the step graph, and the weights of both in `decoder.data`."""
    path = draft / "decoder_step.onnx"
    step = onnx.load(path)
    (draft / "decoder.data").unlink(missing_ok=True)  # onnx would append to it
    onnx.save(step, path, save_as_external_data=True, location="decoder.data")
    (draft / "decoder.data").chmod(path.stat().st_mode)  # onnx lets nobody else read it
    step = onnx.load(path, load_external_data=False)
    assert DECODING.start_token is not None
    [end_token] = DECODING.end_tokens
    loop = loop_graph(step, state, DECODING.start_token, end_token, DECODING.suppress_tokens)
    onnx.save(loop, draft / "decoder_loop.onnx")


def _quantized(
    draft: Draft, state: Mapping[str, str], exported: Captioner, calibration: Sequence[ImageSource]
) -> Captioner:
    """Turn the draft's graphs, which `exported` runs in float32, into 8-bit ones, and open them."""
    log.info("quantising, calibrated on %d photos", len(calibration))
    _quantize(draft.folder, state, exported, calibration)
    provenance = dataclasses.replace(draft.manifest.provenance, calibration_photos=len(calibration))
    draft.manifest = dataclasses.replace(draft.manifest, precision="int8", provenance=provenance)
    return draft.captioner()


def _quantize(
    folder: Path, state: Mapping[str, str], exported: Captioner, calibration: Sequence[ImageSource]
) -> None:
    images = [{"images": exported.preprocess(image)[None]} for image in calibration]

    def steps() -> Iterator[dict[str, np.ndarray]]:
        for feeds in images:
            state = exported.encoder(**feeds)
            [hypothesis] = greedy(exported.decoder, state, exported.options)
            for token in (DECODING.start_token, *hypothesis.tokens):
                tokens = np.array([token], np.int64)
                yield {"tokens": tokens, **state}
                _, state = exported.decoder.step(tokens, state)

    encoder = folder / "encoder.onnx"
    kept = round_weights(encoder, tqdm(images, "rounding weights", leave=False, disable=None))
    log.info("%d layers of the encoder stay in float32", len(kept))
    quantize_static(encoder, images, kept)
    quantize_static(folder / "decoder_step.onnx", steps())
    _add_loop(folder, state)


def _compare_graphs(
    pytorch: Captioner, exported: Captioner, images: Sequence[ImageSource]
) -> dict[str, float]:
    """The largest difference of a value from PyTorch's, by graph."""
    pixels = np.stack([pytorch.preprocess(image) for image in images[:IMAGES]])
    rng = np.random.default_rng(0)
    worst = {"encoder.onnx": 0.0, "decoder_step.onnx": 0.0}
    for batch in (1, 3, IMAGES):
        wanted = _arrays(pytorch.encoder(pixels[:batch]))
        difference = compare_outputs("encoder.onnx", wanted, exported.encoder(pixels[:batch]))
        worst["encoder.onnx"] = max(worst["encoder.onnx"], difference)
        # Both steps start from PyTorch's state, so the second graph is judged alone.
        tokens = rng.integers(len(pytorch.text), size=2 * batch)  # two beams of each image
        shared = pytorch.decoder.shared
        wanted = {n: v if n in shared else np.repeat(v, 2, axis=0) for n, v in wanted.items()}
        tensors = {name: torch.from_numpy(value) for name, value in wanted.items()}
        logits, following = pytorch.decoder.step(tokens, tensors)
        actual, state = exported.decoder.step(tokens, wanted)
        got = {"logits": actual, **state}
        if exported.decoder.regions:
            got[ATTENTION], _ = cast(AttentiveDecoder, exported.decoder).attend(tokens, wanted)
        difference = compare_outputs(
            "decoder_step.onnx", {"logits": logits, **_arrays(following)}, got
        )
        worst["decoder_step.onnx"] = max(worst["decoder_step.onnx"], difference)
    return worst


def _arrays(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in state.items()}


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
    errs = quantized.encoder(pixels)
    errors = {
        "encoder.onnx": max(relative_error(values, errs[name]) for name, values in state.items()),
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
