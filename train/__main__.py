"""`python -m train`: train, score on the test split, draw."""

from __future__ import annotations

import sys

from capexport.errors import CapexportError
from train.config import parse


def main(argv: list[str] | None = None) -> int:
    config, resume = parse(argv)
    try:
        # Importing torch takes long; --help and usage errors need not wait for it.
        from train.loop import finish, train

        checkpoint, dataset = train(config, resume)
        finish(checkpoint, dataset, config)
    except CapexportError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if (config.out / "last.safetensors").exists():
            print(
                f"\ntrain: stopped; {config.out}/best is usable, --resume {config.out} goes on",
                file=sys.stderr,
            )
        else:
            print("\ntrain: stopped before the first epoch ended", file=sys.stderr)
        return 130
    print(f"done: {config.out}; export it with: capexport lstm {config.out} --out DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main())
