"""What a fine-tuned BLIP-2 becomes: a folder as Hugging Face has it, for `from_pretrained` and for
`capexport blip2`.

model-frozen-*.safetensors   what is not trained, bit for bit as in the files of the model it was
model-trained.safetensors    what is trained, in float32: all that is written anew by an epoch
model.safetensors.index.json, config.json, processor and tokenizer
training.json                command, split, versions; `capexport blip2` hands it on
README.md                    the model card
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from capexport.artifact import is_hub_id
from capexport.atomic import new_folder, replace_file, replacing_binary_file
from capexport.errors import CheckpointError
from capexport.metrics import format_scores
from capexport.models.blip2_checkpoint import (
    INDEX,
    Checkpoint,
    current_name,
    licence_of,
    weight_files,
)
from capexport.models.blip2_config import TRAINING, quiet
from train.run import write_json

TRAINED = "model-trained.safetensors"


@quiet()
def new_model_folder(
    folder: Path, checkpoint: Checkpoint, trained: Mapping[str, Tensor], training: Mapping[str, Any]
) -> None:
    """Write the whole folder, which appears when it is complete.

    Args:
        trained: float32 tensors by their names in the model, which stand for the checkpoint's.
    """
    source = checkpoint.folder
    with new_folder(folder) as draft:
        write_trained(draft, trained)
        places = dict.fromkeys(trained, TRAINED)
        size = sum(tensor.nbytes for tensor in trained.values())
        present = [path.name for path in source.iterdir()]
        for number, (file, wanted) in enumerate(weight_files(source, present).items(), 1):
            with safe_open(source / file, "pt") as stored:
                tensors = {
                    name: stored.get_tensor(name)
                    for name in (stored.keys() if wanted is None else sorted(wanted))
                    if current_name(name) not in trained
                }
            if tensors:
                shard = f"model-frozen-{number:05}.safetensors"
                save_file(tensors, draft / shard, {"format": "pt"})
                # Some versions of safetensors write for the owner alone.
                (draft / shard).chmod((draft / TRAINED).stat().st_mode)
                places.update(dict.fromkeys(tensors, shard))
                size += sum(tensor.nbytes for tensor in tensors.values())
        write_json(draft / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
        checkpoint.config.architectures = ["Blip2ForConditionalGeneration"]
        checkpoint.config.save_pretrained(draft)
        checkpoint.processor.save_pretrained(draft)
        write_json(draft / TRAINING, {"training": training})


def write_trained(folder: Path, trained: Mapping[str, Tensor]) -> None:
    """Write, or replace in one piece, what is trained."""
    with replacing_binary_file(folder / TRAINED) as file:
        file.write(save({k: v.contiguous() for k, v in trained.items()}, {"format": "pt"}))


def read_trained(folder: Path) -> dict[str, Tensor]:
    """The tensors that `write_trained` wrote.

    Raises:
        CheckpointError: what `write_trained` wrote is gone, or damaged.
    """
    try:
        return load_file(folder / TRAINED)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / TRAINED}: cannot be read: {error}") from error


def write_card(
    folder: Path,
    checkpoint: Checkpoint,
    base: str,
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """The model card: Markdown with the hub's metadata (huggingface.co/docs/hub/model-cards).

    Args:
        base: id or name of the model that was fine-tuned.
        metrics: "epoch", "validation_loss" and, once it is scored, "test".
    """
    fields = {
        "license": licence_of(checkpoint.folder),
        "library_name": "transformers",
        "pipeline_tag": "image-to-text",
        "tags": ["image-captioning", "blip-2"],
        "base_model": base if is_hub_id(base) else None,
    }
    metadata = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]
    prompt, scores = training["prompt"], metrics.get("test")
    text = f"text={json.dumps(prompt)}, " if prompt else ""
    flag = f", prompt={json.dumps(prompt)}" if prompt else ""
    lines = [
        "---", *metadata, "---", "",
        "# BLIP-2, fine-tuned", "",
        f"{base} with its Q-Former, query tokens and language projection trained by "
        f"`{training['command']}`. Vision model and language model are those of {base}, bit for "
        "bit.", "",
        "```python",
        "from PIL import Image",
        "from transformers import Blip2ForConditionalGeneration, Blip2Processor", "",
        'model = Blip2ForConditionalGeneration.from_pretrained("FOLDER or OWNER/NAME")',
        'processor = Blip2Processor.from_pretrained("FOLDER or OWNER/NAME")',
        f'inputs = processor(images=Image.open("photo.jpg"), {text}return_tensors="pt")',
        "print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True).strip())",
        "```", "",
        "As ONNX, without PyTorch: `capexport blip2 --model FOLDER --out DIR`, then "
        f'`Captioner.load("DIR").caption("photo.jpg"{flag})`.',
        "",
        f"- best epoch {metrics['epoch']}, validation loss {metrics['validation_loss']:.3f} nats "
        "a token",
    ]  # fmt: skip
    if scores:
        photos, scores = scores["photos"], {k: v for k, v in scores.items() if k != "photos"}
        lines.append(f"- test split, {photos} photos: {format_scores(scores)}")
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    replace_file(folder / "README.md", "\n".join([*lines, f"- {versions}"]) + "\n")
