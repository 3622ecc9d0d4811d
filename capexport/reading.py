"""Several images at once: threads read them, and one that cannot be read costs no other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from capexport.errors import ImageError
from capexport.preprocessing import FloatArray, ImageSource

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class ImageReader:
    """Reads batches of images with `threads` threads; several batches may be read at once."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pools: dict[int, ThreadPoolExecutor] = {}  # by process: a fork takes no thread along

    def read(
        self,
        images: Sequence[ImageSource],
        side: int,
        preprocess: Callable[[ImageSource, FloatArray], object],
    ) -> tuple[FloatArray, list[ImageError | None]]:
        """
        Args:
            preprocess: writes an image's pixels, float32 (3, side, side), into its second argument.
        Returns:
            The pixels of all images, float32 (images, 3, side, side), and for each image its error
            or None; after an error, its pixels mean nothing.
        """
        pixels = np.empty((len(images), 3, side, side), np.float32)

        def read(image: ImageSource, out: FloatArray) -> ImageError | None:
            try:
                preprocess(image, out)
            except ImageError as error:
                return error
            return None

        if len(images) == 1:  # not worth a thread
            return pixels, [read(images[0], pixels[0])]
        process = os.getpid()
        if process not in self._pools:
            self._pools.setdefault(process, ThreadPoolExecutor(self._threads))
        return pixels, list(self._pools[process].map(read, images, pixels))

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
