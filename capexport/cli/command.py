"""What every command does: progress on standard error, one line for an error, help that teaches."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from capexport.errors import CapexportError


class _ToStderr(logging.Handler):
    """Messages above the progress bars, on whatever standard error is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def show_progress() -> None:
    """Print what the package logs."""
    log = logging.getLogger("capexport")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(_ToStderr())


def run_command(name: str, command: Callable[[], int]) -> int:
    """`command()`, with the errors a user can mend as one line on standard error."""
    try:
        return command()
    except BrokenPipeError:  # as when `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (CapexportError, OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130


def teaching(description: str, *examples: str) -> dict[str, Any]:
    """Arguments for an `ArgumentParser` whose help ends in examples, a line each."""
    return {
        "description": textwrap.fill(description, 79),
        "epilog": "\n  ".join(["examples:", *examples]),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
