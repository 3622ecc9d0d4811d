"""A small BLIP-2 whose captions follow the photo, from random weights and a few thousand photos:

    python benchmarks/train_small_blip2.py --data flickr8k --out small --device cuda

What an export loses with its precision shows on trained weights alone; this makes some (30 million
parameters) where none can be downloaded. 4 minutes on an H100: CIDEr 45.6 on the photos for
validation; what it says of those for testing is scored in benchmarks/README.md.

Two things are learnt: to see, from a convolutional network with ImageNet weights, whose feature
maps the vision model is to give of many views of the photos (Beyer et al. 2022, "Knowledge
distillation: a good teacher is patient and consistent"), and from `CAPTIONS_FROM` of the time on
also to caption. The folder holds the moving average of the weights where its captions of the
validation photos were best.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from transformers import Blip2ForConditionalGeneration

from benchmarks.random_blip2 import blip2_config, processor
from capexport.metrics import cider, scorers
from capexport.models.blip2 import load_pretrained
from capexport.models.blip2_checkpoint import TRAINING, Checkpoint, read_checkpoint
from capexport.models.cnn_lstm import CnnLstmConfig, ImageEncoder
from capexport.preprocessing import load_image
from train.blip2_loop import IGNORED, CaptionInputs
from train.data import Dataset, Photo, clean, read_dataset
from train.features import load_backbone
from train.run import write_json


def _sizes(
    image: int, vision: int, layers: int, asked: int, text_layers: int, words: int, queries: int
) -> dict[str, Any]:
    def width(hidden: int, layers: int, intermediate: str = "intermediate_size") -> dict[str, Any]:
        return {"hidden_size": hidden, intermediate: 4 * hidden, "num_hidden_layers": layers,
                "num_attention_heads": hidden // 64}  # fmt: skip

    return {
        "vision": {**width(vision, layers), "image_size": image, "patch_size": 16},
        "qformer": width(asked, 4),
        "text": {**width(vision, text_layers, "ffn_dim"), "word_embed_proj_dim": vision,
                 "vocab_size": words, "max_position_embeddings": 128, "dropout": 0.2},
        "queries": queries,
    }  # fmt: skip


SIZES = {
    "small": _sizes(192, 384, 10, 256, 4, 3008, 32),
    "tiny": _sizes(64, 128, 2, 64, 2, 1024, 8),  # for trying out on a CPU
}
TEACHER = "mobilenet_v2"
BATCH = 384  # photos
CAPTIONS_FROM = 0.5  # of the time
VALIDATIONS = 6  # from there on
CAPTIONS_A_PHOTO = 2  # in a step, of those that it has
SMALLEST_CROP = (0.15, 0.5)  # area of a view: while only seeing is learnt, and with captions
WORDS_FROM = 20  # photos that a word must describe to be learnt as such
EMA = 0.998
RATE = {"matrices": 1.5e-3, "others": 1e-3}
WEIGHT_DECAY = 0.05
WARMUP = 0.03  # of the time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder, as of `python -m train`")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=4, help="all but the imports (default: 4)")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--teacher", type=Path, help=f"{TEACHER}'s weights (default: torchvision's, downloaded)"
    )
    options = parser.parse_args()
    scorers()
    random.seed(0)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    Run(options, read_dataset(options.data, 0.1, 0.1, 0)).train()


@dataclass
class Split:
    """Photos on the device, uint8 (photos, 3, size, size), and cleaned captions of each."""

    photos: Sequence[Photo]
    pixels: Tensor
    texts: list[list[str]]


def read_split(photos: Sequence[Photo], size: int, device: str) -> Split:
    """Photos resized as `Blip2Processor` does."""

    def pixels(photo: Photo) -> np.ndarray:
        resized = load_image(photo.path).resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(resized).transpose(2, 0, 1)

    cleaned = [[" ".join(clean(c, keep_articles=True)) for c in p.captions] for p in photos]
    with ThreadPoolExecutor() as pool:
        images = torch.from_numpy(np.stack(list(pool.map(pixels, photos))))
    return Split(photos, images.to(device), [list(filter(None, texts)) for texts in cleaned])


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
        self.net = fuse(encoder.backbone.eval()).requires_grad_(False)
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


class Run:
    """One training: data, model, teacher, optimisers, and what has been reached."""

    def __init__(self, options: argparse.Namespace, dataset: Dataset) -> None:
        self.began = time.monotonic()
        self.out, self.device = options.out, options.device
        self.seconds = 60 * options.minutes - (10 if options.minutes > 1 else 0)  # for the end
        size = SIZES[options.size]
        pixels = size["vision"]["image_size"]
        self.learnt, self.held_out = (
            read_split(dataset.splits[name], pixels, self.device)
            for name in ("train", "validation")
        )
        self.checkpoint = new_model(size, chain.from_iterable(self.learnt.texts), self.out)
        split = {"validation": 0.1, "test": 0.1, "seed": 0, "official": dataset.official}
        command = "python benchmarks/train_small_blip2.py"
        origin = {"command": command, "split": split, "prompt": None}
        write_json(self.out / TRAINING, {"training": origin})
        self.inputs = CaptionInputs(self.checkpoint, None)
        self.captions = [self.inputs.encode(texts) for texts in self.learnt.texts]
        self.words = described(self.learnt.texts).to(self.device)
        self.model: Any = load_pretrained(self.checkpoint, torch.float32).to(self.device).train()
        self.average: Any = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.teacher = Teacher(options.teacher, self.device)
        with self.autocast():
            self.teacher.calibrate(views(self.learnt.pixels[:1024], 0.3))
        seen, asked = size["vision"]["hidden_size"], size["qformer"]["hidden_size"]
        self.heads = nn.ModuleDict({  # of use only while learning
            "map": nn.Linear(seen, self.teacher.channels),
            "mean": nn.Linear(asked, self.teacher.channels),
            "words": nn.Linear(asked, self.words.shape[1]),
        }).to(self.device)  # fmt: skip
        self.optimisers = self._optimisers()
        image = self.checkpoint.image
        self.mean = torch.tensor(image.mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(image.std, device=self.device).view(3, 1, 1)
        self.best = -math.inf

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
        return (time.monotonic() - self.began) / self.seconds

    def train(self) -> None:
        """Until the time is over."""
        photos = len(self.learnt.photos)
        size = min(BATCH, photos)
        step, due = 0, CAPTIONS_FROM
        while True:
            order = torch.randperm(photos)
            for start in range(0, photos - size + 1, size):
                progress = self.progress
                if progress >= 1:
                    self.validate()
                    return
                if progress >= due:
                    due += (1 - CAPTIONS_FROM) / VALIDATIONS
                    self.validate()
                losses = self._step(order[start : start + size], step, progress)
                step += 1
                if step % 100 == 0:
                    said = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
                    print(f"{progress:.0%}, step {step}: {said}", flush=True)

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

    def _step(self, rows: Tensor, step: int, progress: float) -> dict[str, Tensor]:
        captioning, on_device = progress >= CAPTIONS_FROM, rows.to(self.device, non_blocking=True)
        with self.autocast():
            images = views(self.learnt.pixels[on_device], SMALLEST_CROP[captioning])
            images = images if captioning else mixed(images)
            seen, answers = self.see(self.model, images)
            maps, means = self.distilled(images, seen, answers)
            losses, loss = {"maps": maps, "means": means}, maps + means
            if captioning:
                words = F.binary_cross_entropy_with_logits(
                    self.heads["words"](answers.mean(1)).float(), self.words[on_device]
                )
                captions = self._caption_loss(rows.tolist(), answers)
                losses |= {"words": words, "captions": captions}
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
        return losses

    def _caption_loss(self, rows: Sequence[int], answers: Tensor) -> Tensor:
        """Of some captions a photo, as the model's own `forward` computes them."""
        model, places = self.model, answers.shape[1]
        drawn = [c for row in rows for c in random.choices(self.captions[row], k=CAPTIONS_A_PHOTO)]
        batch = self.inputs.batch(drawn).items()
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch}
        image = model.language_projection(answers).repeat_interleave(CAPTIONS_A_PHOTO, 0)
        words = model.get_input_embeddings()(inputs["input_ids"][:, places:])
        out = model.language_model(
            inputs_embeds=torch.cat([image.to(words.dtype), words], 1),
            attention_mask=inputs["attention_mask"], use_cache=False,
        )  # fmt: skip
        return F.cross_entropy(
            out.logits[:, places:-1].float().flatten(0, 1),
            inputs["labels"][:, places + 1 :].flatten(),
            ignore_index=IGNORED, label_smoothing=0.1,
        )  # fmt: skip

    @torch.no_grad()
    def validate(self) -> None:
        """Captions of the averaged weights; the best weights are written, in float16, as BLIP-2
        with OPT is published."""
        photos, said = self.held_out.photos, []
        for pixels in self.held_out.pixels.split(BATCH):
            inputs = (pixels.float() / 255 - self.mean) / self.std
            with self.autocast():
                tokens = self.average.generate(
                    pixel_values=inputs, do_sample=False, max_new_tokens=25
                )
            said += self.checkpoint.processor.batch_decode(tokens, skip_special_tokens=True)
        captions = {photo.name: text.strip() for photo, text in zip(photos, said, strict=True)}
        reached = cider(captions, {photo.name: photo.captions for photo in photos})
        print(f"{self.progress:.0%}, validation: CIDEr {reached:.1f}", *said[:5], sep="\n    ")
        if reached > self.best:
            self.best = reached
            copy.deepcopy(self.average).half().save_pretrained(self.out)


def described(texts: Sequence[Sequence[str]]) -> Tensor:
    """The share of each photo's captions that have a word, (photos, words)."""
    photos = [[set(text.split()) for text in each] for each in texts]
    counts = Counter(word for photo in photos for word in set().union(*photo))
    known = sorted(word for word, count in counts.items() if count >= WORDS_FROM)
    places = {word: place for place, word in enumerate(known)}
    shares = np.zeros((len(photos), len(known)), np.float32)
    for row, photo in zip(shares, photos, strict=True):
        for said in photo:
            row[[places[word] for word in said if word in places]] += 1 / len(photo)
    return torch.from_numpy(shares)


def schedule(progress: float) -> float:
    """The share of the peak: up in a line, then down as a cosine to 0."""
    if progress < WARMUP:
        return max(0.0, progress / WARMUP)
    return 0.5 * (1 + math.cos(math.pi * min(1, (progress - WARMUP) / (1 - WARMUP))))


if __name__ == "__main__":
    main()
