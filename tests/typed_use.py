"""How programs use the package, for mypy; nothing runs it."""

import gzip
import io
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, assert_type

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capexport import Caption, Captioner


def use(captioner: Captioner, pixels: NDArray[np.uint8], opened: IO[bytes]) -> None:
    assert_type(captioner.caption("a.jpg"), Caption)
    assert_type(captioner.caption(b""), Caption)
    assert_type(captioner.caption(pixels), Caption)
    assert_type(captioner.caption(Image.fromarray(pixels)), Caption)
    with zipfile.ZipFile("a.zip") as archive, archive.open("a.jpg") as member:
        assert_type(captioner.caption(member), Caption)
    with tempfile.TemporaryFile() as file, gzip.open("a.jpg.gz") as unpacked:
        for one in (opened, file, unpacked, io.BytesIO()):
            assert_type(captioner.caption(one, num_beams=3), Caption)
    assert_type(captioner.caption(["a.jpg", Path("b.jpg")], prompt=["a", "b"]), list[Caption])
    assert_type(captioner.caption(path for path in Path().iterdir()), list[Caption])
    several: Iterator[IO[bytes]] = iter([opened])
    assert_type(captioner.caption(several, max_tokens=None), list[Caption])
    for image, caption in captioner.stream([pixels], on_error="skip"):
        assert_type((image, caption.text)[1], str)
