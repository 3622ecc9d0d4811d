"""Which files are meant: paths, folders, patterns and lists."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from PIL import Image

from capexport.errors import ImageNotFoundError


def find_images(arguments: Sequence[str], stdin: TextIO) -> list[Path]:
    """The files behind paths, folders (searched in depth), glob patterns and `-` (a list, one
    path a line, on `stdin`), each once. A file that doesn't exist stays in: it is reported later.

    Raises:
        ImageNotFoundError: a folder, pattern or list yields no image at all.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            paths = [Path(line.rstrip("\r\n")) for line in stdin if line.strip()]
        elif path.is_dir():
            Image.init()
            paths = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in Image.EXTENSION and file.is_file()
            )
        elif not path.exists() and glob.has_magic(argument):
            paths = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
        else:
            paths = [path]
        if not paths:
            raise ImageNotFoundError(f"{argument}: no image files there")
        found += paths
    return list({os.path.abspath(path): path for path in found}.values())
