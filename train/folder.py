"""The run folder, held by one training at a time."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from capexport.atomic import lock, remove_dead_drafts
from capexport.errors import OutputExistsError

STATE = "last.safetensors"  # what --resume goes on from


@contextlib.contextmanager
def run_folder(out: Path, resume: bool) -> Iterator[None]:
    """Hold `out`, made if need be; it vanishes again if nothing was written there. A run that is
    stopped says how to go on.

    Raises:
        OutputExistsError: another training holds it, or a new run would overwrite something.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out) as held:
        if not held:
            raise OutputExistsError(
                f"{out}: another training is writing there; wait for its end, or pick another --out"
            )
        try:
            finished = [path for path in out.iterdir() if path.suffix != ".partial"]
            if not resume and (out / "config.json").exists():
                raise OutputExistsError(
                    f"{out}: already there; go on with --resume {out}, or pick another --out"
                )
            if not resume and finished:
                raise OutputExistsError(f"{out}: already there, and no run; pick another --out")
            for folder in (out, out / "best"):
                with contextlib.suppress(OSError):
                    remove_dead_drafts(folder)
            tempfile.TemporaryFile(dir=out).close()  # now, not after the image features
            try:
                yield
            except (KeyboardInterrupt, OSError):  # such as a full disk
                if (out / STATE).exists():
                    print(f"\n{out}/best is usable; --resume {out} goes on", file=sys.stderr)
                raise
        finally:
            with contextlib.suppress(OSError):
                out.rmdir()  # where it is empty


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder until the block or the process ends; False where another process holds it.
    Systems and file systems without such locks hold nothing."""
    if sys.platform == "win32":  # no folder can be opened there
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield lock(descriptor) is not False
    finally:
        os.close(descriptor)
