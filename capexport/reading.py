"""Several images at once: read by threads, and one that cannot be read costs no other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from capexport.errors import ImageError
from capexport.preprocessing import FloatArray, ImageSource, ImageSpec, preprocess

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class ImageReader:
    """Reads batches of images with `threads` threads; several may be read at the same time."""

    def __init__(self, spec: ImageSpec, threads: int) -> None:
        self.spec = spec
        self.threads = threads
        self._pools: dict[int, ThreadPoolExecutor] = {}  # by process: a fork takes no thread along

    def read(
        self, images: Sequence[ImageSource], truncated: bool = False, full_size: bool = False
    ) -> tuple[FloatArray, list[ImageError | None]]:
        """
        Args:
            truncated, full_size: as of `preprocess`.
        Returns:
            Pixels, float32 (images, 3, height, width), and for each image what is wrong with it;
            its pixels then mean nothing.
        """
        pixels = np.empty((len(images), 3, self.spec.crop, self.spec.crop), np.float32)
        if len(images) == 1:  # not worth a thread
            return pixels, [self._read(images[0], pixels[0], truncated, full_size)]
        process = os.getpid()
        if process not in self._pools:
            self._pools.setdefault(process, ThreadPoolExecutor(self.threads))
        options = repeat(truncated), repeat(full_size)
        read = self._pools[process].map(self._read, images, pixels, *options)
        return pixels, list(read)

    def _read(
        self, image: ImageSource, out: FloatArray, truncated: bool, full_size: bool
    ) -> ImageError | None:
        try:
            preprocess(image, self.spec, out, truncated=truncated, full_size=full_size)
        except ImageError as error:
            return error
        return None

    def close(self) -> None:
        """End this process's threads; a later `read` starts others."""
        if pool := self._pools.pop(os.getpid(), None):
            pool.shutdown()


def is_one_image(images: Any) -> TypeIs[ImageSource]:
    """Is it one image, or meant as one? Bytes, files and arrays can be iterated over, too."""
    one = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Image.Image, Mapping)
    if isinstance(images, np.ndarray) and images.ndim and images.dtype.kind in "OU":
        return False  # of paths, as pandas and scikit-learn give them
    return isinstance(images, one) or hasattr(images, "read") or not isinstance(images, Iterable)
