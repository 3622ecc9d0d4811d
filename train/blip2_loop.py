"""Fine-tuning BLIP-2: what is trained, the loss of captions, epochs and early stopping."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from capexport.bench.measure import peak_memory
from capexport.bench.sheet import Entry, draw_sheet
from capexport.errors import (
    CheckpointError,
    DatasetError,
    ImageError,
    MissingExtraError,
    OptionError,
)
from capexport.metrics import format_scores, score
from capexport.models.blip2 import HuggingFaceCaptioner, load_pretrained
from capexport.models.blip2_checkpoint import (
    Checkpoint,
    Weights,
    find_checkpoint,
    read_checkpoint,
)
from capexport.models.torch_captioner import require_torch_device
from capexport.preprocessing import ImageSpec, preprocess
from train import figures
from train.blip2 import Blip2TrainConfig
from train.blip2_folder import new_model_folder, read_trained, write_card, write_trained
from train.data import (
    Dataset,
    Example,
    Examples,
    Ids,
    Photo,
    check_photo,
    pack,
    read_dataset,
    readable,
)
from train.run import (
    History,
    load_state,
    origin_of,
    save_state,
    start_run,
    write_history,
    write_json,
)
from train.score import caption_photos

_SAMPLES = 12  # photos on the sheet
IGNORED = -100  # the label of what is not learnt
_TOKENIZED = 1024  # captions at once: a tokenizer's result takes a hundred times the ids' memory


class TrainedParts(nn.Module):
    """The parts of a model that are trained, shared with it, under the names that it has for
    them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.query_tokens = model.query_tokens
        self.qformer = model.qformer
        self.language_projection = model.language_projection


class CaptionInputs:
    """Turns captions into inputs of the model. Before a caption stands what `generate()` and an
    exported captioner put there; behind it the end token, which is learnt, too.

    Attributes:
        frame: the ids before a caption: a token for each of the image's features, then the prompt,
            or without one the token that begins a caption.
    """

    def __init__(self, checkpoint: Checkpoint, prompt: str | None) -> None:
        """
        Raises:
            CheckpointError: nothing ends the model's captions.
            OptionError: a prompt with the image token.
        """
        config, text = checkpoint.config, checkpoint.config.text_config
        if not checkpoint.decoding.end_tokens:
            raise CheckpointError(
                f"{checkpoint.folder}: text_config has no eos_token_id, so nothing ends a caption; "
                "set it"
            )
        self._tokenizer = checkpoint.processor.tokenizer
        self._encoder_decoder: bool = text.is_encoder_decoder
        self._end = checkpoint.decoding.end_tokens[0]
        self._room = text.max_position_embeddings if text.model_type == "opt" else None
        framed = self._tokenizer(prompt).input_ids if prompt else [text.bos_token_id]
        if config.image_token_index in framed:
            raise OptionError(f"--prompt must not contain the image token: {prompt!r}")
        self.frame = [config.image_token_index] * config.num_query_tokens + framed
        # A decoder alone reads prompt and caption as one text, which needs a space between them.
        joined = self._encoder_decoder or not prompt or prompt[-1].isspace()
        self._between = "" if joined else " "

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """The ids of each caption. White space is normalised, nothing else is cleaned; what looks
        like a special token counts as text."""
        texts = [self._between + " ".join(caption.split()) for caption in captions]
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        rows: list[list[int]] = self._tokenizer(texts, **options).input_ids if texts else []
        longest = max(rows, key=len, default=[])
        if self._room is not None and len(self.frame) + len(longest) + 1 > self._room:
            raise DatasetError(
                f"a caption of {len(longest)} tokens, the image and --prompt of {len(self.frame)} "
                f"and an end have no room in the model's {self._room} places; shorten "
                f"{captions[rows.index(longest)]!r:.80}"
            )
        return rows

    def batch(self, captions: Sequence[Ids]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels` for the model's own `forward`, int64 (batch,
        length) each; all but captions and their end is `IGNORED`.

        Of an encoder-decoder the encoder gets the frame, and the labels are the decoder's.
        """
        rows = [torch.tensor([*map(int, caption), self._end]) for caption in captions]
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        tokens = torch.tensor(self.frame).repeat(len(rows), 1)
        mask = torch.ones_like(tokens)
        if not self._encoder_decoder:
            said = labels != IGNORED
            labels = torch.cat([torch.full_like(tokens, IGNORED), labels], 1)
            padding = self._tokenizer.pad_token_id
            tokens = torch.cat([tokens, labels[:, tokens.shape[1] :].where(said, padding)], 1)
            mask = torch.cat([mask, said.long()], 1)
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@dataclass
class FineTuning:
    """A model that is being trained, and all that goes with it."""

    config: Blip2TrainConfig
    source: dict[str, Any]  # where the model comes from
    dataset: Dataset
    checkpoint: Checkpoint
    inputs: CaptionInputs
    model: Any
    parts: TrainedParts

    def autocast(self) -> torch.autocast:
        """Products in bfloat16, where that is wanted."""
        kind = torch.device(self.config.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.config.dtype == "bf16")

    def training(self) -> dict[str, Any]:
        """What the result says of its training."""
        config, dataset = replace(self.config, model=self.source["source"]), self.dataset
        origin = origin_of("python -m train.blip2", dataset, config, "torch", "transformers")
        return {**origin, "prompt": config.prompt}


def train(config: Blip2TrainConfig) -> FineTuning:
    """Train, or go on with what `config.out` holds, which is this process's alone (`run_folder`).

    Raises:
        DatasetError, CheckpointError, DownloadError, OptionError: data, model or prompt cannot be
            used.
    """
    require_torch_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    dataset = read_dataset(config.data, config.validation, config.test, config.seed)
    folder, source = find_checkpoint(config.model, config.revision)
    # What a branch names today: a resumed run must find the same.
    config = replace(config, revision=source.get("revision"))
    checkpoint = read_checkpoint(folder)
    inputs = CaptionInputs(checkpoint, config.prompt)
    _examples(dataset, inputs)  # whose errors need not wait for the photos and the model
    names = {photo.path: photo.name for photo in dataset.photos()}
    checked = tqdm(readable(list(names), check_photo), "checking photos", len(names))
    dataset.skip("unreadable images", [names[path] for path, good in checked if not good])
    model = load_pretrained(checkpoint, _frozen_dtype(config)).requires_grad_(False)
    parts = TrainedParts(model).float().requires_grad_(True)
    parts.load_state_dict(stored_parts(checkpoint, parts))
    model.to(config.device)
    tuning = FineTuning(config, source, dataset, checkpoint, inputs, model, parts)
    _run_epochs(tuning)
    return tuning


def _frozen_dtype(config: Blip2TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def stored_parts(checkpoint: Checkpoint, parts: nn.Module) -> dict[str, Tensor]:
    """The weights of `parts` in float32, from the checkpoint's files: a model that was loaded in
    bfloat16 has them rounded."""
    weights = Weights(checkpoint.folder, checkpoint.folder)
    return {name: weights.stored([name])[1].float() for name in parts.state_dict()}


def _examples(dataset: Dataset, inputs: CaptionInputs) -> dict[str, Examples]:
    """Photos with one of their captions each."""
    examples = {}
    for split in ("train", "validation"):
        photos = dataset.splits[split]
        examples[split] = pack(photos, _tokenized(photos, inputs))
        if not len(examples[split]):
            raise DatasetError(f"no caption for {split} has any text")
    return examples


def _tokenized(photos: Sequence[Photo], inputs: CaptionInputs) -> Iterator[tuple[int, list[int]]]:
    """The ids of each caption, behind the place of its photo."""
    captions = (
        (place, caption)
        for place, photo in enumerate(photos)
        for caption in photo.captions
        if caption.strip()
    )
    while some := list(islice(captions, _TOKENIZED)):
        rows = inputs.encode([caption for _, caption in some])
        yield from ((place, row) for (place, _), row in zip(some, rows, strict=True) if row)


def _optimiser(parts: nn.Module, config: Blip2TrainConfig) -> torch.optim.AdamW:
    """As BLIP-2's own training has it: biases and norms don't decay."""
    parameters = list(parts.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.learning_rate, fused=True)


def learning_rate(step: int, steps: int, config: Blip2TrainConfig) -> float:
    """The rate of a step, of which 0 is the first: up in a line, then down as a cosine."""
    warmup = round(steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def _run_epochs(tuning: FineTuning) -> None:
    """Train from the last epoch that the run folder has. The best weights are in its `best/`, which
    holds the model as it was until the first epoch has ended."""
    config, parts, out = tuning.config, tuning.parts, tuning.config.out
    examples = _examples(tuning.dataset, tuning.inputs)
    optimiser = _optimiser(parts, config)
    captions = (
        part.encode()
        for found in examples.values()
        for part in (json.dumps([path.name for path in found.paths]), found.digest())
    )
    weights = (tensor.cpu().numpy().tobytes() for tensor in parts.state_dict().values())
    data = {"model": _digest(weights), "captions or photos": _digest(captions)}
    history = load_state(out, parts, optimiser, data)
    start_run(out, config.to_json(), tuning.dataset.skipped, history)
    if not (out / "best").exists():
        new_model_folder(out / "best", tuning.checkpoint, parts.state_dict(), tuning.training())
    _announce(tuning, len(examples["train"]))
    while len(history) < config.epochs:
        losses = [epoch["validation_loss"] for epoch in history]
        if losses and len(losses) - 1 - int(np.argmin(losses)) >= config.patience:
            break
        history.append(_epoch(tuning, examples, optimiser, len(history) + 1))
        loss = history[-1]["validation_loss"]
        improved = not losses or loss < min(losses)
        if improved:
            write_trained(out / "best", parts.state_dict())
            _write_card(tuning, history[-1])
        save_state(out, parts, optimiser, history, data)
        write_history(out, history)
        print(
            "epoch {epoch}: train loss {train_loss:.3f}, validation loss {validation_loss:.3f}, "
            "{seconds:.0f} s, {seconds_a_step:.3g} s a step, peak memory {peak_memory_gb:.1f} GB"
            .format(**history[-1]) + (" (best so far)" if improved else "")
        )  # fmt: skip


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _announce(tuning: FineTuning, captions: int) -> None:
    config = tuning.config
    trained = sum(parameter.numel() for parameter in tuning.parts.parameters())
    together = sum(parameter.numel() for parameter in tuning.model.parameters())
    a_step = config.batch_size * config.gradient_accumulation_steps
    print(
        f"{trained / 1e6:.1f} of {together / 1e6:.1f} million parameters are trained, on "
        f"{config.device}, {config.dtype}; {len(tuning.dataset.splits['train'])} photos and "
        f"{captions} captions to train on, {a_step} a step, {-(-captions // a_step)} steps an epoch"
    )


def _epoch(
    tuning: FineTuning,
    examples: dict[str, Examples],
    optimiser: torch.optim.AdamW,
    number: int,
) -> dict[str, float]:
    """Train through all captions once, and validate: a row of the history."""
    config = tuning.config
    # By the number alone, so that a resumed run draws what an unbroken one does.
    torch.manual_seed(config.seed + number)
    order = np.random.default_rng((config.seed, number)).permutation(len(examples["train"]))
    title = f"epoch {number}/{config.epochs}"
    tuning.model.eval()
    tuning.parts.train()  # dropout is for what is trained
    started = time.perf_counter()
    train_loss, steps = _pass(tuning, examples["train"], order, title, optimiser, number - 1)
    trained = time.perf_counter()
    tuning.model.eval()
    with torch.no_grad():
        order = np.arange(len(examples["validation"]))
        loss, _ = _pass(tuning, examples["validation"], order, "validation")
    return {
        "epoch": number,
        "train_loss": train_loss,
        "validation_loss": loss,
        "seconds": round(time.perf_counter() - started, 2),
        "seconds_a_step": round((trained - started) / steps, 4),
        "peak_memory_gb": round(_peak_memory(config.device), 3),
    }


def _peak_memory(device: str) -> float:
    """GB: of a GPU what PyTorch has held, else of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_memory() / 1e3


def _pass(
    tuning: FineTuning,
    examples: Examples | Sequence[Example],
    order: NDArray[np.int64],
    title: str,
    optimiser: torch.optim.AdamW | None = None,
    epochs_done: int = 0,
) -> tuple[float, int]:
    """Go through `examples` in `order`, training where there is an optimiser: mean loss a token,
    and the number of steps."""
    config, image = tuning.config, tuning.checkpoint.image
    a_step = config.batch_size * config.gradient_accumulation_steps
    steps = -(-len(order) // a_step)
    total, count = 0.0, 0
    pixels = _pixels([examples[index][0] for index in order], image)
    with closing(pixels), tqdm(range(steps), title, leave=False) as bar:
        for step in bar:
            chosen = order[step * a_step : (step + 1) * a_step]
            together = [caption for index in chosen for caption in examples[index][1]]
            tokens = sum(len(caption) + 1 for caption in together)
            for start in range(0, len(together), config.batch_size):
                batch = together[start : start + config.batch_size]
                images = np.stack([next(pixels) for _ in batch])
                loss = batch_loss(tuning, images, batch)
                said = sum(len(caption) + 1 for caption in batch)
                if not math.isfinite(loss.item()):
                    raise ValueError(f"the loss of {title} is {loss.item()}: lower --learning-rate")
                if optimiser:
                    (loss * (said / tokens)).backward()
                total += loss.item() * said
            if optimiser:
                rate = learning_rate(epochs_done * steps + step, config.epochs * steps, config)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                optimiser.step()
                optimiser.zero_grad()
            count += tokens
            memory = f"{_peak_memory(config.device):.1f} GB"
            bar.set_postfix(loss=f"{total / count:.3f}", memory=memory, refresh=False)
    return total / count, steps


def _pixels(paths: Sequence[Path], image: ImageSpec) -> Generator[np.ndarray, None, None]:
    """Each photo as the vision model takes it, float32 (3, height, width), read ahead."""
    with closing(readable(paths, lambda path: preprocess(path, image))) as photos:
        for path, pixels in photos:
            if pixels is None:
                raise ImageError(f"{path}: cannot be read any more; put it back, then --resume")
            yield pixels


def batch_loss(tuning: FineTuning, pixels: np.ndarray, captions: Sequence[Ids]) -> Tensor:
    """Mean cross-entropy over the tokens of captions and their ends, by the model's own `forward`.

    Args:
        pixels: float32 (batch, 3, height, width).
    """
    device = tuning.config.device
    inputs = {name: value.to(device) for name, value in tuning.inputs.batch(captions).items()}
    with tuning.autocast():
        images = torch.from_numpy(pixels).to(device)
        loss: Tensor = tuning.model(pixel_values=images, **inputs, use_cache=False).loss
    return loss


def _write_card(tuning: FineTuning, metrics: dict[str, Any]) -> None:
    folder, base = tuning.config.out / "best", tuning.source["source"]
    write_card(folder, tuning.checkpoint, base, tuning.training(), metrics)


def finish(tuning: FineTuning) -> None:
    """Caption the test split with the best weights, score it, and draw a sheet of samples, with
    what the model said before."""
    config, photos = tuning.config, tuning.dataset.splits["test"]
    captioner = HuggingFaceCaptioner(tuning.model, tuning.checkpoint.processor, config.device)
    options: dict[str, Any] = {"prompt": config.prompt, "batch_size": config.batch_size}
    samples = photos[:_SAMPLES]
    with tuning.autocast():
        tuning.parts.load_state_dict(stored_parts(tuning.checkpoint, tuning.parts))
        before = caption_photos(captioner, samples, **options)
        tuning.parts.load_state_dict(read_trained(config.out / "best"))
        captions = caption_photos(captioner, photos, **options)
    shown = [
        Entry(
            photo.path,
            {"before": before[photo.name], "after": captions[photo.name]},
            photo.captions,
        )
        for photo in samples
    ]
    figures.attempt(config.out / "samples.png", lambda path: draw_sheet(shown, path))
    history: History = json.loads((config.out / "history.json").read_text(encoding="utf-8"))
    metrics: dict[str, Any] = min(history, key=lambda epoch: epoch["validation_loss"])
    metrics = {key: metrics[key] for key in ("epoch", "validation_loss")}
    try:
        scores = score(captions, {photo.name: photo.captions for photo in photos})
    except MissingExtraError as error:
        print(f"not scored: {error}")
    else:
        metrics["test"] = {"photos": len(photos), **scores}
        print(f"test split, {len(photos)} photos: {format_scores(scores)}")
    write_json(config.out / "test.json", {**metrics, "captions": captions})
    _write_card(tuning, metrics)
