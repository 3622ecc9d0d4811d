"""A small BLIP-2 whose captions follow the photo, from random weights and a few thousand photos:

    python benchmarks/train_small_blip2.py --data flickr8k --out small --device cuda --minutes 5

What an export loses with its precision shows on trained weights alone; this makes some (30 million
parameters) where none can be downloaded. Two things are learnt, in the time that is given: to see,
from a convolutional network with ImageNet weights, whose feature maps the vision model is to give
of many views of the photos (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient
and consistent"), and from `CAPTIONS_FROM` of the time on also to caption. The folder holds the
moving average of the weights where its captions of the validation photos were best.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import Blip2ForConditionalGeneration

from benchmarks.random_blip2 import blip2_config, processor
from capexport.errors import MissingExtraError
from capexport.metrics import cider
from capexport.models.blip2 import load_pretrained
from capexport.models.blip2_checkpoint import TRAINING, Checkpoint, read_checkpoint
from capexport.models.cnn_lstm import CnnLstmConfig, ImageEncoder
from capexport.preprocessing import load_image
from train.blip2_loop import IGNORED, CaptionInputs
from train.data import Dataset, Photo, clean, read_dataset, readable
from train.features import load_backbone
from train.run import write_json

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "vision": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 10,
                   "num_attention_heads": 6, "image_size": 192, "patch_size": 16},
        "qformer": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
                    "num_attention_heads": 4},
        "text": {"hidden_size": 384, "ffn_dim": 1536, "num_hidden_layers": 4,
                 "num_attention_heads": 6, "word_embed_proj_dim": 384, "vocab_size": 3008,
                 "max_position_embeddings": 128, "dropout": 0.2},
        "queries": 32,
    },
    "tiny": {  # for trying out on a CPU
        "vision": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "image_size": 64, "patch_size": 16},
        "qformer": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                    "num_attention_heads": 2},
        "text": {"hidden_size": 96, "ffn_dim": 192, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "word_embed_proj_dim": 96, "vocab_size": 1024,
                 "max_position_embeddings": 128, "dropout": 0.1},
        "queries": 8,
    },
}  # fmt: skip
TEACHER = "mobilenet_v2"
CAPTIONS_FROM = 0.5  # of the time
VALIDATIONS = 6  # from there on
CAPTIONS_A_PHOTO = 2  # in a step, of those that it has
SMALLEST_CROP = (0.15, 0.5)  # area of a view: while only seeing is learnt, and with captions
WORDS_FROM = 20  # photos that a word must describe to be learnt as such
EMA = 0.998
RATE = {"matrices": 1.5e-3, "others": 1e-3}
WEIGHT_DECAY = 0.05
WARMUP = 0.03  # of the time


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder, as of `python -m train`")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=5, help="all but the imports (default: 5)")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch-size", type=int, default=384, help="photos (default: 384)")
    parser.add_argument(
        "--teacher", type=Path, help=f"{TEACHER}'s weights (default: torchvision's, downloaded)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dataset = read_dataset(options.data, 0.1, 0.1, 0)
    Run(options, dataset).train()


@dataclass
class Split:
    """Photos on the device, uint8 (photos, 3, size, size), and cleaned captions of each as ids."""

    photos: list[Photo]
    pixels: Tensor
    captions: list[list[list[int]]]


def decoded(photos: Sequence[Photo], size: int, device: str) -> Tensor:
    """uint8 (photos, 3, size, size), resized as `Blip2Processor` does."""

    def pixels(path: Path) -> np.ndarray:
        resized = load_image(path).resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(resized).transpose(2, 0, 1)

    read = [image for _, image in readable([photo.path for photo in photos], pixels)]
    kept = np.stack([image for image in read if image is not None])
    if len(kept) < len(photos):
        raise SystemExit(f"{len(photos) - len(kept)} photos cannot be read")
    return torch.from_numpy(kept).to(device)


def views(pixels: Tensor, smallest: float) -> Tensor:
    """A random crop of each photo of at least that share of its area, mirrored half of the time,
    with other brightness, contrast and saturation: float32, 0 to 1, as large as the photo."""
    count, device = len(pixels), pixels.device

    def drawn(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1, device=device).uniform_(low, high)

    area, aspect = drawn(smallest, 1).flatten(), drawn(-0.3, 0.3).flatten().exp()
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    mirrored = torch.where(drawn(-1, 1).flatten() < 0, -1.0, 1.0)
    nothing = torch.zeros_like(width)
    across = torch.stack([width * mirrored, nothing, (1 - width) * drawn(-1, 1).flatten()], 1)
    down = torch.stack([nothing, height, (1 - height) * drawn(-1, 1).flatten()], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(pixels.shape), align_corners=False)
    images = F.grid_sample(
        pixels.float() / 255, grid, padding_mode="reflection", align_corners=False
    )
    images = images * drawn(0.7, 1.3)
    grey = images.mean((1, 2, 3), keepdim=True)
    images = grey + (images - grey) * drawn(0.7, 1.3)
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * drawn(0.6, 1.4)).clamp_(0, 1)


def mixed(images: Tensor) -> Tensor:
    """Half of the images with another one shining through."""
    share = torch.rand(len(images), 1, 1, 1, device=images.device).mul_(2).clamp_(max=1)
    return images * share + images.flip(0) * (1 - share)


class Teacher(nn.Module):
    """The convolutional network's feature maps, each channel with mean 0 and variance 1."""

    def __init__(self, weights: Path | None, device: str) -> None:
        super().__init__()
        encoder = ImageEncoder(CnnLstmConfig(1, backbone=TEACHER, decoder="attention"))
        load_backbone(encoder, weights)
        image = encoder.architecture.image
        self.net = _without_batch_norm(encoder.backbone.eval()).requires_grad_(False)
        self.channels: int = encoder.architecture.channels
        self.register_buffer("mean", torch.tensor(image.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(image.std).view(3, 1, 1))
        self.register_buffer("level", torch.zeros(1))
        self.register_buffer("spread", torch.ones(1))
        self.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Of images 0 to 1: (batch, rows, columns, channels)."""
        pixels = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return (self.net(pixels).permute(0, 2, 3, 1).float() - self.level) / self.spread

    def calibrate(self, images: Tensor) -> None:
        maps = self(images).flatten(0, 2)
        self.level, self.spread = maps.mean(0), maps.std(0).clamp_min_(0.05)


def _without_batch_norm(module: nn.Module) -> nn.Module:
    """The same function with each norm inside of the convolution before it."""
    children = list(module.named_children())
    for (_, first), (name, second) in itertools.pairwise(children):
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
            position = next(key for key, child in children if child is first)
            setattr(module, position, fuse_conv_bn_eval(first, second))
            setattr(module, name, nn.Identity())
    for _, child in children:
        _without_batch_norm(child)
    return module


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are added (Jordan et al. 2024), at
    AdamW's scale (Liu et al. 2025); matrices of one shape are done together."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            shapes[parameter.shape].append(parameter)
        super().__init__([{"params": same} for same in shapes.values()], {"lr": lr})
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not same:
                continue
            gradients = torch.stack([parameter.grad for parameter in same])
            state = self.state[same[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            momentum = state["momentum"].lerp_(gradients, 0.05)
            update = _orthogonal(gradients.lerp(momentum, 0.95))
            scale = 0.2 * math.sqrt(max(update.shape[-2:]))
            torch._foreach_mul_(same, 1 - group["lr"] * self._weight_decay)
            torch._foreach_add_(same, list(update.float()), alpha=-group["lr"] * scale)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration of fifth order, by Keller Jordan's coefficients."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def new_model(size: dict[str, Any], captions: Iterable[str], folder: Path) -> Checkpoint:
    """Write a BLIP-2 with random weights and a tokenizer of these captions."""
    image_token = size["text"]["vocab_size"] - 1
    config = blip2_config("opt", **size, image_token=image_token)
    for part in (config, config.vision_config, config.qformer_config):
        part.initializer_range = 0.02
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.5)
    _place_patches(model.vision_model.embeddings)
    model.save_pretrained(folder)
    pixels = config.vision_config.image_size
    saved = processor("opt", pixels, size["queries"], texts=captions, image_token=image_token)
    saved.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return read_checkpoint(folder)


def _place_patches(embeddings: nn.Module) -> None:
    """Sines and cosines of a patch's row and column, to be learnt on: few photos teach places."""
    width = embeddings.position_embedding.shape[-1]
    side = embeddings.image_size // embeddings.patch_size
    rates = side ** -torch.linspace(0, 1, width // 4) * math.pi
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], 1)
    with torch.no_grad():
        embeddings.position_embedding[0, 1:] = 0.3 * grid


def caption_logits(model: Any, queries: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Of several captions a photo, as the model's own `forward` computes them."""
    each = len(inputs["input_ids"]) // len(queries)
    places = queries.shape[1]
    image = model.language_projection(queries).repeat_interleave(each, 0)
    words = model.get_input_embeddings()(inputs["input_ids"][:, places:])
    embedded = torch.cat([image.to(words.dtype), words], 1)
    out = model.language_model(
        inputs_embeds=embedded, attention_mask=inputs["attention_mask"], use_cache=False
    )
    logits: Tensor = out.logits[:, places:-1]
    return logits


class Run:
    """One training: data, model, teacher, optimisers, and what has been reached."""

    def __init__(self, options: argparse.Namespace, dataset: Dataset) -> None:
        self.began = time.monotonic()
        self.options, self.device = options, options.device
        self.seconds = 60 * options.minutes - (10 if options.minutes > 1 else 0)  # for the end
        size = SIZES[options.size]
        texts = {
            photo.name: [text for text in map(_cleaned, photo.captions) if text]
            for photo in dataset.photos()
        }
        learnt = [text for photo in dataset.splits["train"] for text in texts[photo.name]]
        self.checkpoint = new_model(size, learnt, options.out)
        self.inputs = CaptionInputs(self.checkpoint, None)
        self.image_size: int = size["vision"]["image_size"]
        self.split = {name: self._split(dataset, name, texts) for name in ("train", "validation")}
        self.words = self._words(texts)
        model = load_pretrained(self.checkpoint, torch.float32)
        self.model: Any = model.to(self.device).train()
        self.average: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.teacher = Teacher(options.teacher, self.device)
        with self.autocast():
            self.teacher.calibrate(views(self.split["train"].pixels[:1024], 0.3))
        self.heads = self._heads(size).to(self.device)
        self.optimisers = self._optimisers()
        normalise = self.checkpoint.processor.image_processor
        self.mean = torch.tensor(normalise.image_mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(normalise.image_std, device=self.device).view(3, 1, 1)
        self.best = -math.inf
        write_json(options.out / TRAINING, {"training": _origin(dataset)})

    def _split(self, dataset: Dataset, name: str, texts: dict[str, list[str]]) -> Split:
        photos = [photo for photo in dataset.splits[name] if texts[photo.name]]
        pixels = decoded(photos, self.image_size, self.device)
        return Split(photos, pixels, [self.inputs.encode(texts[photo.name]) for photo in photos])

    def _words(self, texts: dict[str, list[str]]) -> Tensor:
        """The share of each photo's captions that have a word, (photos of train, words)."""
        photos = [[set(t.split()) for t in texts[p.name]] for p in self.split["train"].photos]
        counts = Counter(word for photo in photos for word in set().union(*photo))
        known = sorted(word for word, count in counts.items() if count >= WORDS_FROM)
        places = {word: place for place, word in enumerate(known)}
        shares = np.zeros((len(photos), len(known)), np.float32)
        for row, photo in zip(shares, photos, strict=True):
            for said in photo:
                row[[places[word] for word in said if word in places]] += 1 / len(photo)
        return torch.from_numpy(shares).to(self.device)

    def _heads(self, size: dict[str, Any]) -> nn.ModuleDict:
        """What is of use only while learning."""
        channels = self.teacher.channels
        seen, asked = size["vision"]["hidden_size"], size["qformer"]["hidden_size"]
        return nn.ModuleDict({
            "map": nn.Linear(seen, channels),
            "mean": nn.Linear(asked, channels),
            "words": nn.Linear(asked, self.words.shape[1]),
        })  # fmt: skip

    def _optimisers(self) -> list[tuple[torch.optim.Optimizer, float, float]]:
        """Each with its peak rate, and the time from which it learns."""
        model, made = self.model, []
        seeing = [model.vision_model, model.qformer]
        speaking = [model.language_projection, model.language_model]
        for parts, start in ((seeing, 0.0), (speaking, CAPTIONS_FROM)):
            named = [pair for part in parts for pair in part.named_parameters()]
            if not start:
                named.append(("query_tokens", model.query_tokens))
            matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
            chosen = set(matrices)
            others = [p for _, p in named if p not in chosen]
            others += [] if start else self.heads.parameters()
            made.append((Muon(matrices, 0.0, WEIGHT_DECAY), RATE["matrices"], start))
            adam = torch.optim.AdamW(others, 0.0, (0.9, 0.98), weight_decay=0.0, fused=True)
            made.append((adam, RATE["others"], start))
        return made

    def autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")

    @property
    def progress(self) -> float:
        return self.seconds_gone / self.seconds

    @property
    def seconds_gone(self) -> float:
        return time.monotonic() - self.began

    def train(self) -> None:
        """Until the time is over."""
        photos = len(self.split["train"].photos)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        print(
            f"{parameters / 1e6:.1f} million parameters, {photos} photos, {self.words.shape[1]} "
            f"words, {self.seconds_gone:.0f} s until here",
            flush=True,
        )
        self.validate()  # what guessing reaches
        size = min(self.options.batch_size, photos)
        step, due, told = 0, CAPTIONS_FROM, time.monotonic()
        while self.progress < 1:
            for start in range(0, photos - size + 1, size):
                if not start:
                    order = torch.randperm(photos)
                self._step(order[start : start + size], step, self.progress)
                step += 1
                if step % 20 == 0 and self.device != "cpu":
                    torch.cuda.synchronize()
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    self._tell(step)
                if due <= self.progress < 1:
                    due += (1 - CAPTIONS_FROM) / VALIDATIONS
                    self.validate()
                if self.progress >= 1:
                    break
        self.validate()

    def _tell(self, step: int) -> None:
        losses = {name: value.item() for name, value in self.losses.items()}
        if not all(map(math.isfinite, losses.values())):
            raise SystemExit(f"step {step}: {losses}")
        said = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        print(f"{self.seconds_gone:.0f} s, step {step}: {said}", flush=True)

    def see(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of images 0 to 1, the vision model's patches and the Q-Former's answers."""
        pixels = (images - self.mean) / self.std
        seen = model.vision_model(pixel_values=pixels).last_hidden_state
        queries = model.query_tokens.expand(len(images), -1, -1)
        answers = model.qformer(query_embeds=queries, encoder_hidden_states=seen)
        return seen, answers.last_hidden_state

    def distilled(self, images: Tensor, seen: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error of the teacher's maps and their means, which guessing makes 1."""
        maps = self.teacher(images)
        side = int(math.sqrt(seen.shape[1] - 1))
        patches = seen[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(patches, maps.shape[1:3]).permute(0, 2, 3, 1)
        means = maps.mean((1, 2))
        guessed = self.heads["mean"](answers.mean(1)).float()
        of_means = F.mse_loss(guessed, means) / means.var(0).mean()
        return F.mse_loss(self.heads["map"](pooled).float(), maps), of_means

    def _step(self, rows: Tensor, step: int, progress: float) -> None:
        captioning = progress >= CAPTIONS_FROM
        split, on_device = self.split["train"], rows.to(self.device, non_blocking=True)
        with self.autocast():
            images = views(split.pixels[on_device], SMALLEST_CROP[captioning])
            images = images if captioning else mixed(images)
            seen, answers = self.see(self.model, images)
            maps, means = self.distilled(images, seen, answers)
            self.losses = {"maps": maps, "means": means}
            loss = maps + means
            if captioning:
                words = F.binary_cross_entropy_with_logits(
                    self.heads["words"](answers.mean(1)).float(), self.words[on_device]
                )
                captions = self._caption_loss(split, rows.tolist(), answers)
                self.losses |= {"words": words, "captions": captions}
                loss = 0.5 * loss + 10 * words + captions
        loss.backward()
        for optimiser, peak, start in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * schedule((progress - start) / (1 - start))
            optimiser.step()
            optimiser.zero_grad()
        share = 1 - min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), share
            )

    def _caption_loss(self, split: Split, rows: Sequence[int], answers: Tensor) -> Tensor:
        drawn = [
            caption
            for row in rows
            for caption in random.choices(split.captions[row], k=CAPTIONS_A_PHOTO)
        ]
        return self._loss(self.model, drawn, answers, 0.1)

    def _loss(
        self, model: Any, captions: list[list[int]], answers: Tensor, smoothing: float = 0
    ) -> Tensor:
        batch = self.inputs.batch(captions).items()
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch}
        logits = caption_logits(model, answers, inputs).float()
        labels = inputs["labels"][:, answers.shape[1] + 1 :]
        return F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing
        )

    @torch.no_grad()
    def validate(self) -> None:
        """Loss and captions of the averaged weights; the best are written."""
        split, model = self.split["validation"], self.average
        sums: dict[str, float] = Counter()
        captions: dict[str, str] = {}
        for start in range(0, len(split.photos), self.options.batch_size):
            part = slice(start, start + self.options.batch_size)
            images = split.pixels[part].float() / 255
            with self.autocast():
                seen, answers = self.see(model, images)
                maps, means = self.distilled(images, seen, answers)
                each = [row for rows in split.captions[part] for row in (rows * 5)[:5]]
                loss = self._loss(model, each, answers)
                pixels = (images - self.mean) / self.std
                tokens = model.generate(pixel_values=pixels, do_sample=False, max_new_tokens=25)
            for name, value in (("maps", maps), ("means", means), ("captions", loss)):
                sums[name] += value.item() * len(images) / len(split.photos)
            said = self.checkpoint.processor.batch_decode(tokens, skip_special_tokens=True)
            names = [photo.name for photo in split.photos[part]]
            captions |= dict(zip(names, map(str.strip, said), strict=True))
        self._keep_best(sums, captions)

    def _keep_best(self, sums: dict[str, float], captions: dict[str, str]) -> None:
        photos = self.split["validation"].photos
        with contextlib.suppress(MissingExtraError):
            sums["CIDEr"] = cider(captions, {photo.name: photo.captions for photo in photos})
        reached = sums.get("CIDEr", -sums["captions"])
        better = " (best so far)" if reached > self.best else ""
        said = ", ".join(f"{name} {value:.3f}" for name, value in sums.items())
        print(f"{self.seconds_gone:.0f} s, validation: {said}{better}")
        print(*(f"    {captions[photo.name]}" for photo in photos[:5]), sep="\n", flush=True)
        if better:
            self.best = reached
            self._save()

    def _save(self) -> None:
        """In float16, as BLIP-2 with OPT is published."""
        copy.deepcopy(self.average).half().save_pretrained(self.options.out)


def schedule(progress: float) -> float:
    """The share of the peak: up in a line, then down as a cosine to 0."""
    if progress <= 0:
        return 0.0
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1, (progress - WARMUP) / (1 - WARMUP))))


def _cleaned(caption: str) -> str:
    return " ".join(clean(caption, keep_articles=True))


def _origin(dataset: Dataset) -> dict[str, Any]:
    split = {"validation": 0.1, "test": 0.1, "seed": 0, "official": dataset.official}
    return {"command": "python benchmarks/train_small_blip2.py", "split": split, "prompt": None}


if __name__ == "__main__":
    main()
