"""What a run folder holds. Whenever a run is killed, each file is whole: the old one or the new.

config.json        the options of the run
skipped.json       photos that were left out, by reason
history.csv/.json  losses and seconds of each epoch
curves.png         the losses, drawn
best/              the checkpoint with the lowest validation loss
last.safetensors   weights, optimiser and history after the last epoch, for --resume
test.json          scores on the test split
samples.png        photos of the test split with references and captions
attention.png      where a decoder with attention looked in some of them

config.json comes first, in one piece: a folder without it holds nothing to resume, and a new run
may take it. Only `*.partial` may be left half-written.
"""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import capexport
from capexport.atomic import replace_file, replacing_binary_file
from capexport.errors import CheckpointError
from train import figures
from train.config import RunOptions
from train.data import Dataset
from train.folder import STATE

History: TypeAlias = list[dict[str, float]]


def origin_of(command: str, dataset: Dataset, config: RunOptions, *packages: str) -> dict[str, Any]:
    """What a result says of its training; `train.score` splits by it."""
    return {
        "command": command + config.to_flags(),
        "split": {
            "validation": config.validation,
            "test": config.test,
            "seed": config.seed,
            "official": dataset.official,
        },
        "photos": {split: len(photos) for split, photos in dataset.splits.items()},
        "versions": {
            "capexport": capexport.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
    }


def start_run(
    out: Path, options: dict[str, Any], skipped: dict[str, list[str]], history: History
) -> None:
    """Write the options of a run and the photos that it leaves out; of a resumed run also the
    history, whose last epoch is not in the folder if the run was killed before it was written."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        # Written beside the folder, which a kill then leaves empty.
        draft = out.resolve().with_name(f".{out.resolve().name}.config.json")
        try:
            write_json(draft, options)
            draft.replace(out / "config.json")
        except OSError:  # the folder is a file system of its own, or its parent is read-only
            draft.unlink(missing_ok=True)
            write_json(out / "config.json", options)
    write_json(out / "skipped.json", skipped)
    for reason, names in skipped.items():
        print(f"left out: {len(names)} {reason} (listed in {out / 'skipped.json'})")
    if history:
        write_history(out, history)


def save_state(
    folder: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    history: History,
    data: Mapping[str, str],
) -> None:
    """Keep what --resume needs; `data` are hashes by which `load_state` notices other data."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors.update({f"optimiser.{index}.{name}": value for name, value in state.items()})
    metadata = {**data, "history": json.dumps(history)}
    with replacing_binary_file(folder / STATE) as file:
        file.write(save(tensors, metadata))


def load_state(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, data: Mapping[str, str]
) -> History:
    """Fill model and optimiser with what `save_state` kept; the history is empty where it didn't.

    Raises:
        CheckpointError: the file is damaged, gone, or of another model or other data.
    """
    file = folder / STATE
    if not file.exists():
        if (folder / "history.json").exists():  # which comes after it
            raise CheckpointError(
                f"{file}: gone, so the run cannot go on; its best checkpoint is still usable"
            )
        return []
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
            if changed := [name for name, digest in data.items() if metadata[name] != digest]:
                raise CheckpointError(
                    f"{file}: the {' and the '.join(changed)} changed since the run began: the "
                    "data folder must be as it was, or begin a new run with another --out"
                )
            history: History = json.loads(metadata["history"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        weights: dict[str, Tensor] = {}
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, name = key.split(".", 1)
            if owner == "model":
                weights[name] = value
            else:
                index, name = name.split(".", 1)
                states.setdefault(int(index), {})[name] = value
        model.load_state_dict(weights)
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": states, "param_groups": groups})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file}: cannot resume from it ({error!r}); were data or options changed? "
            "The best checkpoint is still usable"
        ) from error
    return history


def write_history(folder: Path, history: History) -> None:
    """The losses as a table, as JSON and as a picture."""
    table = io.StringIO()
    writer = csv.DictWriter(table, history[0])
    writer.writeheader()
    writer.writerows(history)
    replace_file(folder / "history.csv", table.getvalue())
    write_json(folder / "history.json", history)
    figures.attempt(folder / "curves.png", lambda path: figures.draw_curves(history, path))


def write_json(path: Path, document: Any) -> None:
    replace_file(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
