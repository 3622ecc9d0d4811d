"""`python -m train`: train, score on the test split, draw."""

from __future__ import annotations

import sys

from capexport.cli import run_command
from capexport.errors import MissingExtraError, importing
from capexport.metrics import scorers
from train.config import parse
from train.folder import run_folder


def main(argv: list[str] | None = None) -> int:
    return run_command("train", lambda: _train(argv))


def _train(argv: list[str] | None) -> int:
    config, resume = parse(argv)
    try:
        scorers()
    except MissingExtraError as error:
        print(f"train: {error}; until then the test split cannot be scored", file=sys.stderr)
    with run_folder(config.out, resume):
        with importing("training needs `pip install -e '.[train]'`"):
            # Importing torch takes long; what is refused before need not wait for it.
            from train.loop import finish, train
        checkpoint, dataset = train(config)
        finish(checkpoint, dataset, config)
    print(f"done: {config.out}; export it with: capexport lstm {config.out} --out DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main())
