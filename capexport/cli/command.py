"""What all commands share: progress on standard error, errors in one line, help with examples."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from capexport.bulk.names import shown
from capexport.errors import CapexportError


class _Stopped(KeyboardInterrupt):
    """A signal that asks for the end: Ctrl-C's, or another."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _ToStderr(logging.Handler):
    """Writes messages above the progress bars, to the current standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        say("\n".join(map(shown, self.format(record).split("\n"))))


def say(line: str) -> None:
    """Print on standard error, if anybody still listens, above the progress bars."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)  # none before it is imported
    try:
        if bars:
            bars.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)
    except OSError:
        _give_up(sys.stderr)


def show_progress() -> None:
    """Print what the package logs."""
    # Without a network the hub's client warns of every attempt; the error at the end says it once.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it sets its level when it is imported
    log = logging.getLogger("capexport")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(_ToStderr())


def run_command(name: str, command: Callable[[], int]) -> int:
    """Run `command()`; errors that a user can mend become one line on standard error.

    SIGTERM and SIGHUP end it as Ctrl-C does, with 128 and the signal's number as the exit code.
    """
    _open_standard_streams()
    try:
        with _stopped_by("SIGINT", "SIGTERM", "SIGHUP"):
            try:
                code = command()
            except SystemExit:  # of argparse, after `--help`
                _flush_output()
                raise
            _flush_output()
            return code
    except BrokenPipeError:  # as when `| head` has read enough
        code = 141
    except (CapexportError, OSError, ValueError) as error:
        say(f"{name}: {shown(_reason(error))}")
        code = 2
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        by = signal.Signals(number).name
        say(f"{name}: interrupted" if number == signal.SIGINT else f"{name}: stopped by {by}")
        code = 128 + number
    _give_up(sys.stdout)
    return code


def _flush_output() -> None:
    if sys.stdout:
        from capexport.bulk.journal import naming  # by now, what it imports is there

        with naming("standard output"):
            sys.stdout.flush()


def _reason(error: Exception) -> str:
    """What an error says, in plainer words where the system's own would not help."""
    if isinstance(error, FileNotFoundError) and error.errno and error.filename is None:
        return "the current folder is gone; change to another"  # `getcwd` names none
    if isinstance(error, NotADirectoryError | FileExistsError) and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        if file := next((above for above in (path, *path.parents) if above.is_file()), None):
            return f"{file}: a file stands where a folder should be; pick another name"
    return str(error)


def run_parser(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, and `run` what it asks for as `run_command` does."""

    def command() -> int:
        options = parser.parse_args(argv)
        show_progress()
        return run(options)

    return run_command(parser.prog.removeprefix("python -m "), command)


def add_model(parser: argparse.ArgumentParser, kind: str = "exported folder") -> None:
    """Add the positional argument `model`, which `model_folder` reads."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="DIR",
        help=f"{kind}, or its id on the hub (default: the bundled captioner)",
    )


def _open_standard_streams() -> None:
    """Open those that are closed: otherwise the next file to be opened takes their place, and
    messages of C libraries end in it; and `print` writes to standard output instead of to a
    missing standard error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


@contextmanager
def _stopped_by(*names: str) -> Iterator[None]:
    stops: list[int] = []

    def stop(number: int, _: object) -> None:
        stops.append(number)
        raise _Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            # nohup has SIGHUP ignored.
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if stops:  # an import that it breaks off may end in an error of its own
            raise _Stopped(stops[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _give_up(stream: TextIO | None) -> None:
    """If a stream cannot be written to, keep Python from trying again when it exits."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def teaching(description: str, *examples: str) -> dict[str, Any]:
    """Arguments for an `ArgumentParser` whose help ends in examples, a line each."""
    return {
        "description": textwrap.fill(description, 79),
        "epilog": "\n  ".join(["examples:", *examples]),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
