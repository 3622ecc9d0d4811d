"""The training loop: epochs and early stopping; evaluation has its own way to features."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from tqdm import tqdm

import capexport
from capexport.bench.sheet import Entry, draw_sheet
from capexport.errors import DatasetError, MissingExtraError
from capexport.families.cnn_lstm import Vocabulary
from capexport.metrics import format_scores, score
from capexport.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from capexport.models.cnn_lstm import CnnLstm, CnnLstmConfig, ImageEncoder
from capexport.models.torch_captioner import require_torch_device, torch_captioner
from capexport.preprocessing import ImageSpec, load_image
from train import figures
from train.config import TrainConfig
from train.data import Dataset, Photo, build_vocabulary, clean, read_dataset, readable
from train.features import cached_features, live_features, load_backbone
from train.run import load_state, save_state, start_run, write_history, write_json
from train.score import caption_photos

_SAMPLES = 12  # photos on the sheet

# Pooled backbone features of some photos, (batch, 1280); the generator draws augmentations.
Features: TypeAlias = Callable[[Sequence[Path], np.random.Generator], Tensor]
# A photo, and one of its captions as ids.
Example: TypeAlias = tuple[Path, list[int]]


def train(config: TrainConfig) -> tuple[Checkpoint, Dataset]:
    """Train, or go on with what `config.out` holds, which is this process's alone (`run_folder`);
    returns the best checkpoint and the data.

    Raises:
        DatasetError, CheckpointError, DownloadError: data or weights cannot be used.
    """
    require_torch_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    spec = ImageSpec(config.resize, config.crop)
    dataset = read_dataset(config.data, config.validation, config.test, config.seed)
    backbone = ImageEncoder(CnnLstmConfig(1)).to(config.device)
    load_backbone(backbone, config.backbone_weights)
    features = evaluation = _features_of_readable(dataset, backbone, spec, config)

    vocabulary = build_vocabulary(
        (words for words, _ in _cleaned(dataset.splits["train"], config)), config.min_count
    )
    model = CnnLstm(
        CnnLstmConfig(len(vocabulary), config.embed_size, config.hidden_size),
        config.train_backbone,
    )
    model.encoder.backbone.load_state_dict(backbone.backbone.state_dict())
    model.to(config.device)
    if not config.caches_features:
        features = live_features(model.encoder, spec, config.augment, config.device)
        evaluation = live_features(model.encoder, spec, False, config.device)
    best = Checkpoint(model, vocabulary, spec, _origin(dataset, config))
    _run_epochs(best, dataset, features, evaluation, config)
    return load_checkpoint(config.out), dataset


def _origin(dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says of its training."""
    return {
        "command": "python -m train" + config.to_flags(),
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
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }


def finish(checkpoint: Checkpoint, dataset: Dataset, config: TrainConfig) -> None:
    """Caption the test split with the best checkpoint, score it, and draw a sheet of samples."""
    photos = dataset.splits["test"]
    captions = caption_photos(torch_captioner(checkpoint, config.device), photos)
    shown = [
        Entry(photo.path, {"CNN-LSTM": captions[photo.name]}, photo.captions)
        for photo in photos[:_SAMPLES]
    ]
    figures.attempt(config.out / "samples.png", lambda path: draw_sheet(shown, path))
    try:
        scores = score(captions, {photo.name: photo.captions for photo in photos})
    except MissingExtraError as error:
        print(f"not scored: {error}")
        return
    checkpoint.metrics["test"] = {"photos": len(photos), **scores}
    write_json(config.out / "test.json", {**checkpoint.metrics, "captions": captions})
    save_checkpoint(checkpoint, config.out / "best", getattr(torch, config.weights_dtype))
    print(f"test split, {len(photos)} photos: {format_scores(scores)}")


def _features_of_readable(
    dataset: Dataset, backbone: ImageEncoder, spec: ImageSpec, config: TrainConfig
) -> Features:
    """Drop photos that can't be decoded; the cached features of the others."""
    paths = [photo.path for photo in dataset.photos()]
    if config.caches_features:
        cached = cached_features(backbone, paths, spec, config.cache, config.device)
        usable = set(cached)
    else:
        checked = tqdm(readable(paths, load_image), "checking photos", len(paths))
        usable = {path for path, image in checked if image is not None}
    unreadable = (photo.name for photo in dataset.photos() if photo.path not in usable)
    dataset.skip("unreadable images", unreadable)

    def features(batch: Sequence[Path], rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(np.stack([cached[path] for path in batch])).to(config.device)

    return features


def _cleaned(photos: Sequence[Photo], config: TrainConfig) -> Iterator[tuple[list[str], Path]]:
    for photo in photos:
        for caption in photo.captions:
            if words := clean(caption, config.keep_articles):
                yield words, photo.path


def _run_epochs(
    best: Checkpoint,
    dataset: Dataset,
    features: Features,
    evaluation: Features,
    config: TrainConfig,
) -> None:
    """Train on `features` and evaluate on `evaluation`, from the last epoch that `config.out` has;
    `best.model` ends as the last epoch leaves it, the best one is in `best/`."""
    model, out = best.model, config.out
    examples = _examples(dataset, best.vocabulary, config)
    optimiser = torch.optim.Adam(model.trainable_parameters(), config.learning_rate, fused=True)
    data = {"vocabulary": _digest(best.vocabulary.words), "captions or photos": _digest(examples)}
    history = load_state(out, model, optimiser, data)
    start_run(out, config.to_json(), dataset.skipped, history)
    while len(history) < config.epochs:
        losses = [epoch["validation_loss"] for epoch in history]
        if losses and len(losses) - 1 - int(np.argmin(losses)) >= config.patience:
            break
        number = len(history) + 1
        rng = np.random.default_rng((config.seed, number))
        torch.manual_seed(config.seed + number)
        started = time.perf_counter()
        order = rng.permutation(len(examples["train"]))
        shuffled = [examples["train"][index] for index in order]
        title = f"epoch {number}/{config.epochs}"
        model.train()
        train_loss = _pass(model, shuffled, features, config, rng, title, optimiser)
        model.eval()
        with torch.no_grad():
            loss = _pass(model, examples["validation"], evaluation, config, rng, "validation")
        seconds = round(time.perf_counter() - started, 2)
        history.append(
            {"epoch": number, "train_loss": train_loss, "validation_loss": loss, "seconds": seconds}
        )
        improved = not losses or loss < min(losses)
        if improved:
            best.metrics = {"epoch": number, "validation_loss": loss}
            save_checkpoint(best, out / "best", getattr(torch, config.weights_dtype))
        save_state(out, model, optimiser, history, data)
        write_history(out, history)
        print(
            f"epoch {number}: train loss {train_loss:.3f}, validation loss {loss:.3f}, "
            f"{seconds:.0f} s{' (best so far)' if improved else ''}"
        )


def _examples(
    dataset: Dataset, vocabulary: Vocabulary, config: TrainConfig
) -> dict[str, list[Example]]:
    examples = {
        split: [
            (path, vocabulary.encode(words))
            for words, path in _cleaned(dataset.splits[split], config)
        ]
        for split in ("train", "validation")
    }
    for split, found in examples.items():
        if not found:
            raise DatasetError(f"no caption for {split} has a word left after the cleaning")
    print(
        f"{len(dataset.splits['train'])} photos and {len(examples['train'])} captions to train on, "
        f"a vocabulary of {len(vocabulary)}"
    )
    examples["validation"].sort(key=lambda example: len(example[1]))
    return examples


def _digest(data: Any) -> str:
    """A hash of words or examples, the same wherever the photos' folder is."""
    text = json.dumps(data, default=lambda path: path.name)
    return hashlib.sha256(text.encode()).hexdigest()


def _pass(
    model: CnnLstm,
    examples: Sequence[Example],
    features: Features,
    config: TrainConfig,
    rng: np.random.Generator,
    title: str,
    optimiser: torch.optim.Optimizer | None = None,
) -> float:
    """Go through `examples` once, training where there is an optimiser: mean loss a token."""
    total, count = 0.0, 0
    bar = tqdm(range(0, len(examples), config.batch_size), title, leave=False)
    for start in bar:
        batch = examples[start : start + config.batch_size]
        if optimiser and len(batch) == 1:
            continue  # batch norm needs two rows to have a variance
        loss, tokens = batch_loss(model, batch, features([path for path, _ in batch], rng))
        if optimiser:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss of {title} is {loss.item()}: lower --learning-rate")
        total += loss.item() * tokens
        count += tokens
        bar.set_postfix(loss=f"{total / count:.3f}", refresh=False)
    return total / count


def batch_loss(model: CnnLstm, batch: Sequence[Example], pooled: Tensor) -> tuple[Tensor, int]:
    """Mean cross-entropy over the batch's tokens, and how many those are.

    The batch is padded to its own longest caption, and packed, so padding costs nothing.
    """
    lengths = torch.tensor([len(tokens) for _, tokens in batch])
    captions = torch.full((len(batch), int(lengths.max())), Vocabulary.PAD)
    for row, (_, tokens) in zip(captions, batch, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    captions = captions.to(pooled.device)
    logits = model.decoder(model.encoder.project(pooled), captions, lengths)
    targets = pack_padded_sequence(captions, lengths, batch_first=True, enforce_sorted=False)
    loss = F.cross_entropy(logits.data, targets.data, ignore_index=Vocabulary.PAD)
    return loss, int(lengths.sum())
