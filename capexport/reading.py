"""Several images at once: threads read them, and one that cannot be read costs no other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from capexport.errors import ImageError
from capexport.preprocessing import FloatArray, ImageSource

if TYPE_CHECKING:
    from typing_extensions import TypeIs


_SPARE = 8  # arrays that are kept for later batches


class ImageReader:
    """Reads batches of images with `threads` threads; several batches may be read at once.

    The arrays of batches of up to `room` images are used again. If they were freed, the C library
    would scatter what it keeps of them, and a process that captions batches of all sizes at once
    would grow for hours.
    """

    def __init__(self, threads: int, room: int) -> None:
        self._threads, self._room = threads, room
        self._spare: list[FloatArray] = []
        self._pools: dict[int, ThreadPoolExecutor] = {}  # by process: a fork takes no thread along

    @contextmanager
    def read(
        self,
        images: Sequence[ImageSource],
        side: int,
        preprocess: Callable[[ImageSource, FloatArray], object],
    ) -> Iterator[tuple[FloatArray, list[ImageError | None]]]:
        """
        Args:
            preprocess: writes an image's pixels, float32 (3, side, side), into its second argument.
        Yields:
            The pixels of all images, float32 (images, 3, side, side), which are overwritten after
            the `with` block, and for each image its error or None; after an error, its pixels mean
            nothing.
        """
        if not 1 < len(images) <= self._room:
            pixels = np.empty((len(images), 3, side, side), np.float32)
            yield pixels, self._fill(pixels, images, preprocess)
            return
        shape = self._room, 3, side, side
        try:
            array = self._spare.pop().reshape(shape)
        except (IndexError, ValueError):  # there is none, or it was for another side
            array = np.empty(shape, np.float32)
        pixels = array[: len(images)]
        errors = self._fill(pixels, images, preprocess)
        # Not if that failed: a thread may still be writing.
        try:
            yield pixels, errors
        finally:
            if len(self._spare) < _SPARE:
                self._spare.append(array)

    def _fill(
        self,
        pixels: FloatArray,
        images: Sequence[ImageSource],
        preprocess: Callable[[ImageSource, FloatArray], object],
    ) -> list[ImageError | None]:

        def read(image: ImageSource, out: FloatArray) -> ImageError | None:
            try:
                preprocess(image, out)
            except ImageError as error:
                return error
            return None

        if len(images) == 1:  # not worth a thread
            return [read(images[0], pixels[0])]
        process = os.getpid()
        if process not in self._pools:
            self._pools.setdefault(process, ThreadPoolExecutor(self._threads))
        return list(self._pools[process].map(read, images, pixels))

    def close(self) -> None:
        """End this process's threads, and free the arrays; a later `read` makes others."""
        self._spare.clear()
        if pool := self._pools.pop(os.getpid(), None):
            pool.shutdown()


def is_one_image(images: Any) -> TypeIs[ImageSource]:
    """Is it one image, or meant as one? Bytes, files and arrays can be iterated over, too."""
    one = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Image.Image, Mapping)
    if isinstance(images, np.ndarray) and images.ndim and images.dtype.kind in "OU":
        return False  # of paths, as pandas and scikit-learn give them
    return isinstance(images, one) or hasattr(images, "read") or not isinstance(images, Iterable)
