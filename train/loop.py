"""The training loop: epochs, evaluation and early stopping."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from capexport.bench.sheet import Entry, draw_sheet
from capexport.decoding import greedy
from capexport.errors import DatasetError, MissingExtraError
from capexport.families.cnn_lstm import DECODING, Vocabulary
from capexport.metrics import cider, format_scores, score, scorers
from capexport.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from capexport.models.cnn_lstm import CnnLstm, CnnLstmConfig, ImageEncoder
from capexport.models.torch_captioner import TorchDecoder, require_torch_device, torch_captioner
from capexport.preprocessing import ImageSpec
from train import figures
from train.config import TrainConfig
from train.data import (
    Dataset,
    Examples,
    Photo,
    build_vocabulary,
    check_photo,
    clean,
    encode_captions,
    read_dataset,
    readable,
)
from train.features import CachedFeatures, LiveFeatures, load_backbone
from train.objective import CiderReward, batch_loss, self_critical_loss
from train.run import load_state, origin_of, save_state, start_run, write_history, write_json
from train.score import caption_photos

_SAMPLES = 12  # photos on the sheet
_LOOKED_AT = 4  # of them, with the attention for each word
_WARM_UP = 0.05  # of all steps, with --cosine
_POOL = 16  # batches that are sorted by length together

Features: TypeAlias = CachedFeatures | LiveFeatures


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
    if "cider" in (config.objective, config.best_by):
        scorers()
    dataset = read_dataset(config.data, config.validation, config.test, config.seed)
    begun = _begun(config.init, config.keep_articles) if config.init else None
    if not begun:
        _vocabulary(dataset, config)  # refused now, not after a download and the image features
    network = begun.model.config if begun else _network(config)
    encoder = begun.model.encoder if begun else ImageEncoder(network)
    if not begun:
        load_backbone(encoder, config.backbone_weights)
    encoder.train_from = _first_trained(encoder, config)
    encoder.to(config.device)
    spec = begun.image if begun else config.image
    features = _features_of_readable(dataset, encoder, spec, config)

    vocabulary = begun.vocabulary if begun else _vocabulary(dataset, config)
    network = dataclasses.replace(network, vocabulary_size=len(vocabulary), dropout=config.dropout)
    model = CnnLstm(network, encoder.train_from, config.update_norms)
    if begun:
        model.load_state_dict(begun.model.state_dict())
    else:
        model.encoder.backbone.load_state_dict(encoder.backbone.state_dict())
    model.to(config.device)
    origin = origin_of("python -m train", dataset, config, "torch", "torchvision")
    best = Checkpoint(model, vocabulary, spec, training=origin)
    if begun:
        best.decoding = begun.decoding
    _run_epochs(best, dataset, features, config)
    return load_checkpoint(config.out), dataset


def _begun(init: Path, keep_articles: bool) -> Checkpoint:
    """The checkpoint of --init. It must have learnt from captions that were cleaned in the same
    way."""
    begun = load_checkpoint(init)
    letters = any(len(word) == 1 for word in begun.vocabulary.words)
    if letters != keep_articles:
        has, remedy = ("", "pass") if letters else ("no ", "leave out")
        raise ValueError(
            f"--init {init}: its words have {has}single letters: {remedy} --keep-articles"
        )
    return begun


def _network(config: TrainConfig) -> CnnLstmConfig:
    return CnnLstmConfig(
        vocabulary_size=1,  # its words are not counted yet
        embed_size=config.embed_size,
        hidden_size=config.hidden_size,
        backbone=config.backbone,
        decoder=config.decoder,
    )


def _vocabulary(dataset: Dataset, config: TrainConfig) -> Vocabulary:
    photos = dataset.splits["train"]
    captions = (clean(c, config.keep_articles) for photo in photos for c in photo.captions)
    vocabulary = build_vocabulary(captions, config.min_count)
    if len(vocabulary) == len(Vocabulary.SPECIALS):
        raise DatasetError(
            f"{config.data}: no word is in the captions for train {config.min_count} times (a word "
            "is what stands between spaces, all letters): pass a lower --min-count"
        )
    return vocabulary


def _first_trained(encoder: ImageEncoder, config: TrainConfig) -> int:
    blocks = len(encoder.backbone)
    if not config.train_backbone:
        return blocks
    if config.train_from >= blocks:
        raise ValueError(f"--train-from must lie in 0..{blocks - 1}: the backbone's blocks")
    return config.train_from


def finish(checkpoint: Checkpoint, dataset: Dataset, config: TrainConfig) -> None:
    """Caption the test split with the best checkpoint, score it, and draw a sheet of samples."""
    photos = dataset.splits["test"]
    captioner = torch_captioner(checkpoint, config.device)
    captions = caption_photos(captioner, photos)
    shown = [
        Entry(photo.path, {"CNN-LSTM": captions[photo.name]}, photo.captions)
        for photo in photos[:_SAMPLES]
    ]
    figures.attempt(config.out / "samples.png", lambda path: draw_sheet(shown, path))
    if captioner.decoder.regions:
        few = [photo.path for photo in photos[:_LOOKED_AT]]
        draw = partial(figures.draw_attentions, captioner, few)
        figures.attempt(config.out / "attention.png", draw)
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
    dataset: Dataset, encoder: ImageEncoder, spec: ImageSpec, config: TrainConfig
) -> Features:
    """Drop photos that can't be decoded; the features of the others."""
    features: Features
    paths = [photo.path for photo in dataset.photos()]
    if config.caches_features:
        views = config.views if config.augment else 1
        cached = CachedFeatures(encoder, paths, spec, config.cache, config.device, views)
        features, usable = cached, set(cached.readable)
    else:
        features = LiveFeatures(encoder, spec, config.augment, config.device)
        checked = tqdm(readable(paths, check_photo), "checking photos", len(paths))
        usable = {path for path, good in checked if good}
    unreadable = (photo.name for photo in dataset.photos() if photo.path not in usable)
    dataset.skip("unreadable images", unreadable)
    return features


def _run_epochs(
    best: Checkpoint, dataset: Dataset, features: Features, config: TrainConfig
) -> None:
    """Train from the last epoch that `config.out` has; `best.model` ends as the last epoch leaves
    it, the best one is in `best/`."""
    out = config.out
    whole = _takes_whole_photos(best.model, config)
    examples = _examples(dataset, best.vocabulary, config, whole)
    trainer = Trainer(best.model, features, examples["train"], config)
    data = {
        "vocabulary": _digest(best.vocabulary.words),
        "captions or photos": _digest(
            [
                ([photo.name for photo in dataset.splits[split]], found.digest())
                for split, found in examples.items()
            ]
        ),
    }
    history = load_state(out, trainer.kept, trainer.optimiser, data)
    start_run(out, config.to_json(), dataset.skipped, history)
    while len(history) < config.epochs:
        worths = [_worth(epoch, config) for epoch in history]
        if worths and len(worths) - 1 - int(np.argmax(worths)) >= config.patience:
            break
        number = len(history) + 1
        started = time.perf_counter()
        epoch = {"epoch": number, "train_loss": trainer.epoch(number)}
        epoch["validation_loss"] = trainer.loss(examples["validation"])
        if config.best_by == "cider":
            photos = dataset.splits["validation"]
            epoch["validation_cider"] = trainer.cider(photos, best.vocabulary)
        epoch["seconds"] = round(time.perf_counter() - started, 2)
        history.append(epoch)
        improved = not worths or _worth(epoch, config) > max(worths)
        if improved:
            best.metrics = {k: v for k, v in epoch.items() if k not in ("train_loss", "seconds")}
            kept = dataclasses.replace(best, model=trainer.evaluated)
            save_checkpoint(kept, out / "best", getattr(torch, config.weights_dtype))
        save_state(out, trainer.kept, trainer.optimiser, history, data)
        write_history(out, history)
        print(_line(epoch) + (" (best so far)" if improved else ""))


def _takes_whole_photos(model: CnnLstm, config: TrainConfig) -> bool:
    """Whether an example is a photo with all of its captions."""
    return model.config.decoder == "attention" or config.objective == "cider"


def _worth(epoch: Mapping[str, float], config: TrainConfig) -> float:
    """How good an epoch is by --best-by: the more, the better."""
    return epoch["validation_cider"] if config.best_by == "cider" else -epoch["validation_loss"]


def _line(epoch: Mapping[str, float]) -> str:
    cider = f", CIDEr-D {epoch['validation_cider']:.1f}" if "validation_cider" in epoch else ""
    return (
        f"epoch {epoch['epoch']}: train loss {epoch['train_loss']:.3f}, validation loss "
        f"{epoch['validation_loss']:.3f}{cider}, {epoch['seconds']:.0f} s"
    )


def _examples(
    dataset: Dataset, vocabulary: Vocabulary, config: TrainConfig, whole: bool
) -> dict[str, Examples]:
    """Photos with all their captions, if `whole`, or with one each."""
    examples = {
        split: encode_captions(dataset.splits[split], vocabulary, config.keep_articles, whole)
        for split in ("train", "validation")
    }
    for split, found in examples.items():
        if not len(found):
            raise DatasetError(f"no caption for {split} has a word left after the cleaning")
    photos, learnt = dataset.splits["train"], examples["train"]
    captions = len(learnt.places)
    words = len(learnt.ids) - 2 * captions  # without <SOS> and <EOS>
    unknown = int((learnt.ids == Vocabulary.UNKNOWN).sum())
    print(
        f"{len(photos)} photos and {captions} captions to train on, a vocabulary of "
        f"{len(vocabulary)}, without {unknown / words:.1%} of their words, which become <UNK>"
    )
    if empty := sum(len(photo.captions) for photo in photos) - captions:
        print(f"left out: {empty} captions without a word left after the cleaning")
    return examples


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


class Trainer:
    """A model, its optimiser, and the moving average of its weights.

    Attributes:
        evaluated: the average where one is wanted, else the model.
        kept: what a resumed run needs besides the optimiser.
    """

    def __init__(
        self, model: CnnLstm, features: Features, examples: Examples, config: TrainConfig
    ) -> None:
        self._model = model
        self._features = features
        self._examples = examples
        self._config = config
        self._whole = _takes_whole_photos(model, config)
        self._batches = -(-len(examples) // config.batch_size)
        self.optimiser = _optimiser(model, config)
        self._average: AveragedModel | None = None
        self.evaluated, self.kept = model, cast(nn.Module, model)
        if config.average:
            self._average = AveragedModel(model, multi_avg_fn=partial(_average, config.average))
            self.evaluated = cast(CnnLstm, self._average.module)
            self.kept = nn.ModuleDict({"model": model, "average": self._average})
        self._loss = partial(batch_loss, config=config)
        if config.objective == "cider":
            self._loss = partial(self_critical_loss, reward=CiderReward(examples))

    def epoch(self, number: int) -> float:
        """Train on all examples once, in an order of its own: mean loss a token."""
        config = self._config
        rng = np.random.default_rng((config.seed, number))
        torch.manual_seed(config.seed + number)
        self._model.train(config.objective == "likelihood")  # a caption is drawn without dropout
        total, count = 0.0, 0
        title = f"epoch {number}/{config.epochs}"
        kind = torch.device(config.device).type
        for index, chosen in enumerate(bar := self._bar(self._shuffled(rng), title)):
            if len(chosen) == 1 and self._batches > 1:
                continue  # batch norm needs two rows to have a variance
            batch = [self._examples[one] for one in chosen]
            self._set_rates((number - 1) * self._batches + index)
            values = self._features([path for path, _ in batch], rng)
            features = self._model.encoder.head(values)
            with torch.autocast(kind, torch.bfloat16, enabled=config.bfloat16):
                loss, tokens = self._loss(self._model, batch, features)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            if self._average:
                self._average.update_parameters(self._model)
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss of {title} is {loss.item()}: lower --learning-rate")
            total += loss.item() * tokens
            count += tokens
            bar.set_postfix(loss=f"{total / count:.3f}", refresh=False)
        return total / count

    def _shuffled(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """The examples' numbers in random order. Photos with all their captions are batched with
        others whose longest caption is about as long, since every caption of a batch takes as many
        steps as the longest."""
        order = rng.permutation(len(self._examples))
        if not self._whole:
            return order
        size, longest = self._config.batch_size, self._examples.longest
        pools = [
            order[start : start + _POOL * size] for start in range(0, len(order), _POOL * size)
        ]
        order = np.concatenate([pool[longest[pool].argsort(kind="stable")] for pool in pools])
        full = len(order) // size
        batches = order[: full * size].reshape(full, size)
        return np.concatenate([rng.permutation(batches).flatten(), order[full * size :]])

    @torch.no_grad()
    def loss(self, examples: Examples) -> float:
        """Mean cross-entropy a token, without label smoothing or any other addition."""
        self.evaluated.eval()
        total, count = 0.0, 0
        for chosen in self._bar(examples.longest.argsort(kind="stable"), "validation"):
            batch = [examples[one] for one in chosen]
            values = self._features([path for path, _ in batch])
            features = self.evaluated.encoder.head(values)
            loss, tokens = batch_loss(self.evaluated, batch, features)
            total += loss.item() * tokens
            count += tokens
        return total / count

    @torch.no_grad()
    def cider(self, photos: Sequence[Photo], vocabulary: Vocabulary) -> float:
        """CIDEr-D of greedy captions."""
        self.evaluated.eval()
        decoder = TorchDecoder(self.evaluated, self._config.device)
        captions: dict[str, str] = {}
        for batch in self._bar(photos, "captions"):
            values = self._features([photo.path for photo in batch])
            state = self.evaluated.decoder.start(self.evaluated.encoder.head(values))
            for photo, found in zip(batch, greedy(decoder, state, DECODING.options), strict=True):
                captions[photo.name] = vocabulary.decode(found.tokens)
        return cider(captions, {photo.name: photo.captions for photo in photos})

    def _bar(self, items: Sequence[Any] | NDArray[np.int64], title: str) -> Any:
        """Batches of `items`, with a progress bar."""
        size = self._config.batch_size
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        return tqdm(batches, title, leave=False)

    def _set_rates(self, step: int) -> None:
        if not self._config.cosine:
            return
        steps = self._config.epochs * self._batches
        warm_up = max(1, round(_WARM_UP * steps))
        factor = min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * factor


def _average(
    share: float, average: list[Tensor], weights: list[Tensor], updates: Tensor | int
) -> None:
    """Keep `share` of the average; less in the first steps, which begin with random weights."""
    share = min(share, (1 + int(updates)) / (10 + int(updates)))
    torch._foreach_lerp_(average, weights, 1 - share)


def _optimiser(model: CnnLstm, config: TrainConfig) -> torch.optim.Optimizer:
    backbone = [p for p in model.encoder.backbone.parameters() if p.requires_grad]
    known = {id(parameter) for parameter in model.encoder.backbone.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in known]},
        {"params": backbone, "lr": config.backbone_learning_rate or config.learning_rate},
    ]
    optimiser = torch.optim.AdamW(
        groups, config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return optimiser
