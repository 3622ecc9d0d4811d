"""Every number of the recipe, with the published one as the default."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capexport.cli import teaching
from capexport.errors import CheckpointError


def option(help: str, **more: Any) -> Any:
    default = more.pop("default", dataclasses.MISSING)
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class TrainConfig:
    """The options of one training run, as `config.json` in the run folder keeps them."""

    data: Path = option("folder of Flickr8k, Flickr30k, COCO or another data set (README.md)")
    out: Path = option("run folder to create", default=Path("runs/cnn-lstm"))
    keep_articles: bool = option(
        'keep single letters, so that captions say "a dog"; the published cleaning drops them '
        "(and two fifths of BLEU-4)",
        default=False,
    )
    min_count: int = option("words that occur less often become <UNK>", default=5)
    validation: float = option(
        "share of photos for validation, where no split files are", default=0.1
    )
    test: float = option("share of photos for the test, where no split files are", default=0.1)
    seed: int = option("seed of the split, the initial weights and the order of batches", default=0)
    backbone_weights: Path | None = option(
        "safetensors file with torchvision's MobileNetV2 `features.*`; without it, torchvision's "
        "ImageNet weights are downloaded",
        default=None,
    )
    resize: int = option("shorter edge of a photo, in pixels", default=256)
    crop: int = option("side of the central square, in pixels", default=224)
    embed_size: int = option("width of the image feature and of word embeddings", default=256)
    hidden_size: int = option("width of the LSTM", default=512)
    batch_size: int = option("captions a batch", default=64)
    learning_rate: float = option("Adam's learning rate", default=1e-3)
    epochs: int = option("epochs at the most", default=10)
    patience: int = option("epochs without a better validation loss before stopping", default=2)
    augment: bool = option(
        "random crops and mirroring; image features can't be cached then", default=False
    )
    train_backbone: bool = option(
        "train MobileNetV2 too; image features can't be cached then", default=False
    )
    no_feature_cache: bool = option(
        "compute image features anew for every batch, to measure what the cache saves",
        default=False,
    )
    cache: Path = option("folder for cached image features", default=Path("~/.cache/capexport"))
    weights_dtype: str = option(
        "how the best checkpoint stores its weights",
        default="float32",
        choices=("float32", "float16"),
    )
    device: str = option("torch device, such as cpu or cuda", default="cpu")
    threads: int | None = option("CPU threads; all cores by default", default=None)

    def __post_init__(self) -> None:
        for name in ("min_count", "embed_size", "hidden_size", "batch_size", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.seed < 0:
            raise ValueError("--seed must be at least 0")
        if self.threads is not None and self.threads < 1:
            raise ValueError("--threads must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError("--learning-rate must be above 0")
        if self.batch_size < 2:
            raise ValueError("--batch-size must be at least 2: batch norm needs a variance")

    @property
    def caches_features(self) -> bool:
        return not (self.augment or self.train_backbone or self.no_feature_cache)

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
                flags += "" if value is True else f" {value}"
        return flags


def parse(argv: list[str] | None) -> tuple[TrainConfig, bool]:
    """The run's options, and whether it goes on with an earlier one."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        **teaching(
            "Train the CNN-LSTM captioner (frozen MobileNetV2, LSTM) on Flickr8k. The defaults "
            "are the published recipe.",
            "python -m train --data flickr8k --out runs/first --keep-articles",
            "python -m train --resume runs/first",
            "capexport lstm runs/first --out artifacts/first   # then, to use the result",
        ),
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        default=argparse.SUPPRESS,
        help="go on with a run that was stopped, with the options that it began with; give no "
        "other option",
    )
    for item in dataclasses.fields(TrainConfig):
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
        return _read(run), True
    if "data" not in given:
        parser.error("--data FOLDER is needed (or --resume RUN)")
    return TrainConfig(**given), False


_TYPES = {
    "Path": Path,
    "Path | None": Path,
    "int": int,
    "int | None": int,
    "float": float,
    "str": str,
}


def _read(run: Path) -> TrainConfig:
    path = run / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, Any] = {
            item.name: document[item.name] for item in dataclasses.fields(TrainConfig)
        }
        for item in dataclasses.fields(TrainConfig):
            if "Path" in str(item.type) and values[item.name] is not None:
                values[item.name] = Path(values[item.name])
        config = TrainConfig(**values)
    except FileNotFoundError:
        raise CheckpointError(
            f"{run}: no config.json there, so no run to resume; begin one with --data and --out"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged: {error!r}; begin a new run with another --out"
        ) from error
    return dataclasses.replace(config, out=run)
