"""`python -m train.blip2`: fine-tune a BLIP-2 on photos and captions of one's own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from capexport.cli import run_command, show_progress, teaching
from capexport.errors import importing
from train.config import RunOptions, option, parse_options
from train.folder import run_folder


@dataclass(frozen=True)
class Blip2TrainConfig(RunOptions):
    """The options of one fine-tuning, as `config.json` in the run folder keeps them.

    Learning rate, schedule and weight decay are those of BLIP-2's own fine-tuning to captions (Li
    et al. 2023, appendix; LAVIS, caption_coco_ft.yaml), with a warm-up that suits short runs too.
    """

    out: Path = option("run folder to create", default=Path("runs/blip2"))
    model: str = option(
        "Hugging Face id, or a local folder, of a BLIP-2 with OPT or Flan-T5",
        default="Salesforce/blip2-opt-2.7b",
    )
    revision: str | None = option("branch, tag or commit of the id", default=None)
    prompt: str | None = option(
        "text before every caption that is not learnt, such as 'a photo of'; give the result the "
        "same prompt",
        default=None,
    )
    dtype: str = option(
        "bf16: frozen models and products in bfloat16 (half the memory); fp32: all in float32. "
        "What is trained is kept in float32 either way",
        default="bf16",
        choices=("bf16", "fp32"),
    )
    batch_size: int = option("captions in memory at once", default=16)
    gradient_accumulation_steps: int = option(
        "batches whose gradients make one step: with more of them, a smaller --batch-size learns "
        "the same in less memory",
        default=1,
    )
    learning_rate: float = option("AdamW's learning rate at its peak", default=1e-5)
    warmup_ratio: float = option(
        "share of all steps in which the rate rises to its peak; then it falls to 0 as a cosine",
        default=0.05,
    )
    weight_decay: float = option("AdamW's weight decay, of matrices alone", default=0.05)
    epochs: int = option("number of epochs, at most", default=5)
    patience: int = option("epochs without a better validation loss before stopping", default=2)
    seed: int = option("seed of the split, the order of captions and of dropout", default=0)

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "epochs", "patience", "threads"):
            number = getattr(self, name)
            self._require(name, number is None or number >= 1, "at least 1")
        for name in ("seed", "weight_decay"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("learning_rate", self.learning_rate > 0, "above 0")
        self._require("warmup_ratio", 0 <= self.warmup_ratio <= 1, "between 0 and 1")


def main(argv: list[str] | None = None) -> int:
    return run_command("train.blip2", lambda: _train(argv))


def _train(argv: list[str] | None) -> int:
    config, resume = parse_options(
        Blip2TrainConfig,
        argv,
        prog="python -m train.blip2",
        **teaching(
            "Fine-tune a BLIP-2: the Q-Former, its query tokens and the projection into the "
            "language model are trained, the vision model and the language model stay as they are "
            "(the second stage of Li et al. 2023). Seconds a step and the peak of memory are "
            "printed after each epoch. RUN/best is a Hugging Face folder at any time, as large as "
            "the model.",
            "python -m train.blip2 --data flickr8k --out runs/blip2 --device cuda",
            "python -m train.blip2 --model Salesforce/blip2-flan-t5-xl --data flickr8k \\",
            "    --batch-size 4 --gradient-accumulation-steps 4 --device cuda",
            "python -m train.blip2 --resume runs/blip2",
            "capexport blip2 --model runs/blip2/best --out artifacts/mine   # then, to use it",
        ),
    )
    show_progress()  # before the hub's client is imported, whose retries it silences
    # Importing torch takes long; --help and usage errors need not wait for it.
    with importing("training BLIP-2 needs `pip install -e '.[train,blip2]'`"):
        from train.blip2_loop import finish, train
    with run_folder(config.out, resume):
        finish(train(config))
    print(
        f"done: {config.out}; export it with: capexport blip2 --model {config.out}/best --out DIR"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
