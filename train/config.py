"""Every number of the recipe, with the published one as the default."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from capexport.cli import teaching
from capexport.errors import CheckpointError
from capexport.models.backbones import BACKBONES
from capexport.preprocessing import ImageSpec


def option(help: str, **more: Any) -> Any:
    default = more.pop("default", dataclasses.MISSING)
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class RunOptions:
    """The options that every training has; fields are made by `option`."""

    data: Path = option("folder of Flickr8k, Flickr30k, COCO or another data set (train/README.md)")
    out: Path = option("run folder to create")
    validation: float = option(
        "share of photos for validation, if the data set has no split of its own", default=0.1
    )
    test: float = option(
        "share of photos for the test, if the data set has no split of its own", default=0.1
    )
    seed: int = option("seed of the split and of all that is random in training", default=0)
    device: str = option("torch device, such as cpu or cuda", default="cpu")
    threads: int | None = option("CPU threads; all cores by default", default=None)

    @staticmethod
    def _require(name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"--{name.replace('_', '-')} must be {what}")

    def to_json(self) -> dict[str, Any]:
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def to_flags(self) -> str:
        """The options that made the model what it is and differ from the defaults, as they would
        be typed; of paths, the last part alone, since the rest is the machine's own."""
        flags = ""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            value = value.name if isinstance(value, Path) else value
            if value != item.default and item.name not in ("out", "cache", "device", "threads"):
                flags += " --" + item.name.replace("_", "-")
                flags += "" if value is True else f" {shlex.quote(str(value))}"
        return flags


@dataclass(frozen=True)
class TrainConfig(RunOptions):
    """The options of one training run, as `config.json` in the run folder keeps them."""

    out: Path = option("run folder to create", default=Path("runs/cnn-lstm"))
    keep_articles: bool = option(
        'keep single letters, so that captions say "a dog"; the published cleaning drops them '
        "(and two fifths of BLEU-4)",
        default=False,
    )
    min_count: int = option("words that occur less often become <UNK>", default=5)
    backbone: str = option(
        "torchvision's image network", default="mobilenet_v2", choices=tuple(BACKBONES)
    )
    backbone_weights: Path | None = option(
        "safetensors file with the backbone's weights by torchvision's names (`features.*`; of a "
        "ResNet `conv1.*`, `layer1.*`...); without it, torchvision's ImageNet weights are "
        "downloaded",
        default=None,
    )
    resize: int | None = option(
        "shorter edge of a photo, in pixels; by default what torchvision's weights of the backbone "
        "were made for, 256 for mobilenet_v2",
        default=None,
    )
    crop: int | None = option(
        "side of the central square, in pixels; by default as above, 224 for mobilenet_v2",
        default=None,
    )
    squash: bool = option(
        "make both edges --crop long instead, so that nothing of a photo is cut off", default=False
    )
    init: Path | None = option(
        "checkpoint or run folder to start from, with its network, vocabulary and image size",
        default=None,
    )
    decoder: str = option(
        "lstm: one feature of the image is its first input; attention: looks at the regions of "
        "the backbone's map before each word (Xu et al. 2015)",
        default="lstm",
        choices=("lstm", "attention"),
    )
    embed_size: int = option("width of the image feature and of word embeddings", default=256)
    hidden_size: int = option("width of the LSTM", default=512)
    dropout: float = option(
        "share of regions, word embeddings and outputs that the attention decoder leaves out "
        "in training",
        default=0.0,
    )
    attention_penalty: float = option(
        "weight of the doubly stochastic regulariser: a caption looks at each region about once",
        default=0.0,
    )
    objective: str = option(
        "likelihood: that of human captions; cider: the CIDEr-D of captions that the model samples "
        "(self-critical training, Rennie et al. 2017), which starts from --init",
        default="likelihood",
        choices=("likelihood", "cider"),
    )
    label_smoothing: float = option("share of probability that all other words get", default=0.0)
    batch_size: int = option(
        "captions a batch; with the attention decoder or --objective cider, photos a batch, each "
        "with all its captions",
        default=64,
    )
    learning_rate: float = option("AdamW's learning rate", default=1e-3)
    weight_decay: float = option("AdamW's weight decay", default=0.0)
    cosine: bool = option(
        "warm the learning rate up over a twentieth of the training, then let it fall to zero "
        "along a cosine",
        default=False,
    )
    average: float = option(
        "evaluate and keep a moving average of the weights, of which each batch keeps this share",
        default=0.0,
    )
    bfloat16: bool = option("compute the decoder's products in bfloat16", default=False)
    epochs: int = option("number of epochs, at most", default=10)
    patience: int = option("epochs without a better validation before stopping", default=2)
    best_by: str = option(
        "how to find the best epoch: by the loss or by CIDEr-D on the validation split",
        default="loss",
        choices=("loss", "cider"),
    )
    augment: bool = option(
        "random crops and mirroring: --views of each photo are cached, or drawn anew for every "
        "batch where features can't be cached",
        default=False,
    )
    views: int = option("with --augment: the photo, its mirror image, and random crops", default=6)
    train_backbone: bool = option("train the backbone too, from --train-from on", default=False)
    train_from: int = option(
        "first block of the backbone that is trained; what the blocks before it make of a photo is "
        "cached",
        default=0,
    )
    backbone_learning_rate: float | None = option(
        "of the backbone's blocks; --learning-rate by default", default=None
    )
    update_norms: bool = option(
        "let the batch norms of trained blocks update their statistics; otherwise they keep them",
        default=False,
    )
    no_feature_cache: bool = option(
        "compute image features again for every batch, to measure what the cache saves",
        default=False,
    )
    cache: Path = option("folder for cached image features", default=Path("~/.cache/capexport"))
    weights_dtype: str = option(
        "how the best checkpoint stores its weights",
        default="float32",
        choices=("float32", "float16"),
    )

    def __post_init__(self) -> None:
        whole = ("min_count", "embed_size", "hidden_size", "batch_size", "epochs", "patience")
        for name in (*whole, "views"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "train_from", "weight_decay", "attention_penalty"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("dropout", "label_smoothing", "average"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("resize", "crop", "threads"):
            number = getattr(self, name)
            self._require(name, number is None or number >= 1, "at least 1")
        for name in ("learning_rate", "backbone_learning_rate"):
            rate = getattr(self, name)
            self._require(name, rate is None or rate > 0, "above 0")
        self._require("batch_size", self.batch_size >= 2, "at least 2: batch norm needs a variance")
        if self.train_from and not self.train_backbone:
            raise ValueError("--train-from goes with --train-backbone")
        if self.squash and self.resize:
            raise ValueError("--squash goes without --resize: both edges become --crop long")
        if self.objective == "cider" and self.init is None:
            raise ValueError("--objective cider goes on from a trained captioner: pass --init")

    @property
    def caches_features(self) -> bool:
        everything = self.train_backbone and self.train_from == 0
        return not (everything or self.no_feature_cache)

    @property
    def image(self) -> ImageSpec:
        """What the backbone's weights were made for, but for what was given."""
        spec = BACKBONES[self.backbone].image
        crop = self.crop or spec.crop
        resize = crop if self.squash else self.resize or spec.resize
        return dataclasses.replace(spec, resize=resize, crop=crop, keep_aspect=not self.squash)


def parse(argv: list[str] | None) -> tuple[TrainConfig, bool]:
    """The run's options, and whether it goes on with an earlier one."""
    return parse_options(
        TrainConfig,
        argv,
        prog="python -m train",
        **teaching(
            "Train a CNN-LSTM captioner. The defaults are the published recipe: a frozen backbone "
            "and an LSTM.",
            "python -m train --data flickr8k --out runs/first --keep-articles",
            "python -m train --resume runs/first",
            "capexport lstm runs/first --out artifacts/first   # then, to use the result",
        ),
    )


Options = TypeVar("Options", bound=RunOptions)


def parse_options(
    kind: type[Options], argv: list[str] | None, **parser_options: Any
) -> tuple[Options, bool]:
    """As `parse`, for the options of any training."""
    parser = argparse.ArgumentParser(**parser_options)
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        default=argparse.SUPPRESS,
        help="continue a stopped run with the options that it began with; give no other option",
    )
    for item in dataclasses.fields(kind):
        flag = "--" + item.name.replace("_", "-")
        settings: dict[str, Any] = {"help": item.metadata["help"], "default": argparse.SUPPRESS}
        if not any(item.default is none for none in (dataclasses.MISSING, None, False)):
            settings["help"] += f" (default: {item.default})"
        if item.type == "bool":
            settings["action"] = "store_true"
        else:
            settings["type"] = _TYPES[str(item.type)]
            settings["choices"] = item.metadata.get("choices")
        parser.add_argument(flag, **settings)
    given = vars(parser.parse_args(argv))
    run = given.pop("resume", None)
    if run is not None:
        if given:
            parser.error(f"--resume goes without --{next(iter(given)).replace('_', '-')}")
        return _read(kind, run), True
    if "data" not in given:
        parser.error("--data FOLDER is needed (or --resume RUN)")
    return kind(**given), False


_TYPES = {
    "Path": Path,
    "Path | None": Path,
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
    "str": str,
    "str | None": str,
}


def _read(kind: type[Options], run: Path) -> Options:
    path = run / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, Any] = {
            item.name: document[item.name] for item in dataclasses.fields(kind)
        }
        for item in dataclasses.fields(kind):
            if "Path" in str(item.type) and values[item.name] is not None:
                values[item.name] = Path(values[item.name])
        config = kind(**values)
    except FileNotFoundError:
        raise CheckpointError(
            f"{run}: no config.json there, so no run to resume; begin one with --data and --out"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged, or another command's: {error!r}; begin a new run with another --out"
        ) from error
    return dataclasses.replace(config, out=run)
