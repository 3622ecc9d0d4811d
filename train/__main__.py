"""`python -m train`: train, score on the test split, draw."""

from __future__ import annotations

import sys

from capexport.cli import run_command
from capexport.errors import MissingExtraError
from train.config import parse


def main(argv: list[str] | None = None) -> int:
    return run_command("train", lambda: _train(argv))


def _train(argv: list[str] | None) -> int:
    config, resume = parse(argv)
    try:
        # Importing torch takes long; --help and usage errors need not wait for it.
        from train.loop import finish, train
        from train.run import run_folder
    except ImportError as error:
        raise MissingExtraError(f"training needs `pip install -e '.[train]'` ({error})") from error
    try:
        with run_folder(config.out, resume):
            checkpoint, dataset = train(config)
            finish(checkpoint, dataset, config)
    except KeyboardInterrupt:
        if not (config.out / "last.safetensors").exists():
            raise
        print(
            f"\ntrain: stopped; {config.out}/best is usable, --resume {config.out} goes on",
            file=sys.stderr,
        )
        return 130
    print(f"done: {config.out}; export it with: capexport lstm {config.out} --out DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main())
