"""`capexport lstm`: a CNN-LSTM checkpoint to `encoder.onnx` and `decoder_step.onnx`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from capexport.artifact import Manifest, new_artifact, record_files
from capexport.captioner import Captioner
from capexport.errors import ParityError
from capexport.export.graph import OPSET, export_graph, versions
from capexport.export.parity import (
    IMAGES,
    TOLERANCE,
    compare_captions,
    compare_outputs,
    seeded_images,
)
from capexport.graphs import require_provider
from capexport.models.checkpoint import Checkpoint
from capexport.models.cnn_lstm import CnnLstm
from capexport.models.torch_captioner import decoding_defaults, torch_captioner
from capexport.preprocessing import ImageSource, preprocess
from capexport.vocabulary import Vocabulary

log = logging.getLogger("capexport")

# Each state input of the step graph, and the output that holds its next value.
STATE = {"hidden": "next_hidden", "cell": "next_cell"}


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
    checkpoint: Checkpoint, out: Path, photos: Sequence[ImageSource] = ()
) -> Manifest:
    """Export `checkpoint` to the new folder `out`, where it appears only if parity holds.

    Args:
        photos: what the captions are compared on, at least 16; seeded colour fields by default.
    Raises:
        OutputExistsError: `out` is there already.
        ParityError: the graphs do not reproduce the model.
    """
    if photos and len(photos) < IMAGES:
        raise ParityError(f"parity takes at least {IMAGES} photos, got {len(photos)}")
    require_provider("cpu")  # parity needs it, at the very end
    model = checkpoint.model.cpu().eval()
    with new_artifact(out) as draft, torch.no_grad():
        log.info("exporting encoder.onnx")
        size = checkpoint.image.crop
        example = torch.zeros(2, 3, size, size)
        export_graph(
            _EncoderGraph(model), [example], ["images"], list(STATE), draft / "encoder.onnx"
        )
        log.info("exporting decoder_step.onnx")
        export_graph(
            _StepGraph(model),
            [torch.zeros(2, dtype=torch.int64), *model.start(example)],
            ["tokens", *STATE],
            ["logits", *STATE.values()],
            draft / "decoder_step.onnx",
        )
        (draft / "vocabulary.json").write_text(
            json.dumps(checkpoint.vocabulary.words, ensure_ascii=False, indent=0), encoding="utf-8"
        )
        decoding = decoding_defaults()
        manifest = Manifest(
            family="cnn-lstm",
            precision="fp32",
            image=checkpoint.image,
            decoding={"start_token": Vocabulary.START, **decoding},
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
        report = _check_parity(checkpoint, Captioner.load(draft), photos)
        manifest = dataclasses.replace(manifest, parity=report)
        manifest.write(draft)
    return manifest


def _check_parity(
    checkpoint: Checkpoint, exported: Captioner, photos: Sequence[ImageSource]
) -> dict[str, Any]:
    model, decoder = checkpoint.model, exported.decoder
    images = list(photos) or list(seeded_images())
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
    return {
        "tolerance": TOLERANCE,
        "max_difference": worst,
        "inputs": "photos" if photos else "seeded images",
        "captions": compare_captions(torch_captioner(checkpoint), exported, images),
    }
