"""Checkpoints: a folder with `checkpoint.json` and the safetensors file that it names.

The JSON is written last and replaced in one piece, so a folder holds a whole checkpoint, or the
whole one before it, at every moment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from capexport.artifact import typed
from capexport.atomic import replace_file, replacing_binary_file, sha256_of
from capexport.decoding import DecodingKeywords, changed
from capexport.errors import CheckpointError
from capexport.families.cnn_lstm import DECODING, Vocabulary
from capexport.models.cnn_lstm import CnnLstm, CnnLstmConfig
from capexport.preprocessing import ImageSpec

FILE_NAME = "checkpoint.json"
SCHEMA = 1


@dataclass
class Checkpoint:
    """A trained CNN-LSTM with all that a caption needs.

    Attributes:
        decoding: the default options of its captions, where they are not those of every CNN-LSTM.
        training: how it was made (options, versions).
        metrics: what it scored.
        sha256: of the weights file, known after `save_checkpoint` or `load_checkpoint`.
    """

    model: CnnLstm
    vocabulary: Vocabulary
    image: ImageSpec
    decoding: DecodingKeywords = field(default_factory=DecodingKeywords)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        words, rows = len(self.vocabulary), self.model.config.vocabulary_size
        if words != rows:
            raise ValueError(f"{words} words in the vocabulary of a model of {rows}")


def save_checkpoint(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write `checkpoint` into `folder`, its weights stored as `dtype`; sets its `sha256`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in checkpoint.model.state_dict().items()
    }
    content = save(state)
    checkpoint.sha256 = hashlib.sha256(content).hexdigest()
    weights = f"weights-{checkpoint.sha256[:12]}.safetensors"
    with replacing_binary_file(folder / weights) as file:
        file.write(content)
    document = {
        "schema": SCHEMA,
        "family": "cnn-lstm",
        "weights": {"file": weights, "sha256": checkpoint.sha256},
        "config": dataclasses.asdict(checkpoint.model.config),
        "image": dataclasses.asdict(checkpoint.image),
        **({"decoding": checkpoint.decoding} if checkpoint.decoding else {}),
        "training": checkpoint.training,
        "metrics": checkpoint.metrics,
        "vocabulary": checkpoint.vocabulary.words,
    }
    replace_file(folder / FILE_NAME, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    for stale in folder.glob("weights-*.safetensors"):
        if stale.name != weights:
            stale.unlink()


def find_checkpoint(folder: Path) -> Path:
    """The `checkpoint.json` of a checkpoint folder or of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    for place in (folder, folder / "best"):
        if (place / FILE_NAME).exists():
            return place / FILE_NAME
    if folder.is_file():
        raise CheckpointError(f"{folder}: a file; pass the folder that it lies in")
    raise CheckpointError(
        f"{folder}: no {FILE_NAME} there; pass a checkpoint or run folder of `python -m train`"
    )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder, or a run folder of `python -m train`; the model is in eval mode.

    Weights are computed with in float32, whatever they were stored as.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = find_checkpoint(folder)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA or document["family"] != "cnn-lstm":
            raise CheckpointError(
                f"{path}: {document['family']} checkpoint of schema {document['schema']}; this "
                f"capexport reads cnn-lstm of schema {SCHEMA}"
            )
        weights = path.parent / Path(document["weights"]["file"]).name
        checkpoint = Checkpoint(
            model=CnnLstm(typed(CnnLstmConfig, document["config"], "config")),
            vocabulary=Vocabulary(typed(tuple[str, ...], document["vocabulary"], "vocabulary")),
            image=typed(ImageSpec, document["image"], "image"),
            decoding=document.get("decoding", {}),
            training=document["training"],
            metrics=document["metrics"],
            sha256=document["weights"]["sha256"],
        )
        changed(DECODING, checkpoint.decoding)  # refused here, where the file is known
        if sha256_of(weights) != checkpoint.sha256:
            raise CheckpointError(f"{weights}: not the file that {FILE_NAME} was written with")
        state = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(weights).items()
        }
        checkpoint.model.load_state_dict(state)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        missing = "it says no " if isinstance(error, KeyError) else ""
        raise CheckpointError(f"{path}: damaged checkpoint: {missing}{error}") from error
    checkpoint.model.eval()
    return checkpoint
