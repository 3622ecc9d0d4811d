"""Images of many requests, captioned together."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from capexport.captioner import Caption, Captioner
from capexport.decoding import DecodingKeywords
from capexport.errors import CapexportError
from capexport.preprocessing import FloatArray, preprocess
from capexport.serve.metrics import Metrics

# An encoded image, or what gives one: it is called where it keeps nobody waiting.
Source: TypeAlias = bytes | Callable[[], bytes]
Outcome: TypeAlias = Caption | CapexportError

# Seconds that a batch waits for images that are being read at the moment.
PATIENCE = 0.005

log = logging.getLogger("capexport")


class QueueFullError(Exception):
    """There is no room for more images."""


@dataclass(eq=False)
class _Item:
    """An image that is ready, and who waits for its caption.

    Only images of the same `key`, their options, are captioned together.
    """

    pixels: FloatArray
    prompt: str | None
    options: DecodingKeywords
    future: asyncio.Future[Outcome]
    key: Any = field(init=False)

    def __post_init__(self) -> None:
        self.key = (self.prompt is None, *sorted(self.options.items()))


class Batcher:
    """Reads images in parallel, and captions those that are ready together, in threads of its own,
    so that the event loop stays free.

    A lone image is captioned at once; a batch is only waited for while others are being read. What
    is wrong with an image, or with its prompt, costs no other one its caption.

    Attributes:
        room: how many images may be held at once.
        held: how many are.
    """

    def __init__(
        self,
        captioner: Captioner,
        metrics: Metrics,
        *,
        threads: int,
        batch_size: int,
        room: int,
        max_pixels: int,
    ) -> None:
        """`threads` read images; as many caption them where the captioner is of one thread, else
        one does. To be called in the event loop."""
        self.captioner, self.metrics = captioner, metrics
        self.room, self.held = room, 0
        self._batch_size, self._max_pixels = batch_size, max_pixels
        self._loop = asyncio.get_running_loop()
        self._readers = ThreadPoolExecutor(threads, "reading")
        self._changed = threading.Condition()
        self._waiting: list[_Item] = []
        self._reading = 0
        self._closed = False
        workers = threads if captioner.threads == 1 else 1
        self._workers = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    async def caption(
        self, sources: Sequence[Source], prompt: str | None, options: DecodingKeywords
    ) -> list[Outcome]:
        """The caption of each image, or what is wrong with it.

        Raises:
            QueueFullError: there is no room for so many images now.
        """
        if self.held + len(sources) > self.room:
            raise QueueFullError
        self.held += len(sources)
        try:
            each = (self._caption_one(source, prompt, options) for source in sources)
            outcomes = await asyncio.gather(*each)
        finally:
            self.held -= len(sources)
        for outcome in outcomes:
            self.metrics.images["captioned" if isinstance(outcome, Caption) else "failed"] += 1
        return outcomes

    async def _caption_one(
        self, source: Source, prompt: str | None, options: DecodingKeywords
    ) -> Outcome:
        self._reading += 1
        try:
            pixels = await self._loop.run_in_executor(self._readers, self._read, source)
        except CapexportError as error:
            return error
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()
        future: asyncio.Future[Outcome] = self._loop.create_future()
        with self._changed:
            self._waiting.append(_Item(pixels, prompt, options, future))
            self._changed.notify_all()
        return await future

    def _read(self, source: Source) -> FloatArray:
        data = source if isinstance(source, bytes) else source()
        truncated = self.captioner.truncated
        return preprocess(
            data, self.captioner.image, max_pixels=self._max_pixels, truncated=truncated
        )

    def _work(self) -> None:
        while batch := self._next_batch():
            outcomes = self._captions(batch)
            with suppress(RuntimeError):  # the loop was ended by force
                self._loop.call_soon_threadsafe(self._settle, batch, outcomes)

    def _next_batch(self) -> list[_Item]:
        """The longest waiting images that go together; none when all is done."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                until = time.monotonic() + PATIENCE
                while self._reading and len(self._waiting) < self._batch_size:
                    if not self._changed.wait(until - time.monotonic()):
                        break
                # Their clients may have gone.
                self._waiting = [item for item in self._waiting if not item.future.cancelled()]
                if self._waiting:
                    break
                if self._closed:
                    return []
            key = self._waiting[0].key
            alike = [item for item in self._waiting if item.key == key]
            batch = alike[: self._fair_share(len(alike))]
            taken = set(map(id, batch))
            self._waiting = [item for item in self._waiting if id(item) not in taken]
            return batch

    def _fair_share(self, ready: int) -> int:
        """So many that other workers have as much to do, but no small batches."""
        return min(self._batch_size, max(8, math.ceil(ready / len(self._workers))))

    def _captions(self, batch: list[_Item]) -> list[Outcome | Exception]:
        first = batch[0]
        prompts = None if first.prompt is None else [str(item.prompt) for item in batch]
        try:
            pixels = np.stack([item.pixels for item in batch])
            captions = self.captioner.caption_pixels(pixels, prompts=prompts, **first.options)
            return list(captions)
        except Exception as error:
            if len(batch) > 1:  # one of them may be to blame, and pays alone
                return [outcome for item in batch for outcome in self._captions([item])]
            return [error]

    def _settle(self, batch: list[_Item], outcomes: list[Outcome | Exception]) -> None:
        self.metrics.batches.observe(len(batch))
        for item, outcome in zip(batch, outcomes, strict=True):
            if item.future.done():  # cancelled
                continue
            if isinstance(outcome, Caption | CapexportError):
                item.future.set_result(outcome)
            else:
                item.future.set_exception(outcome)

    def close(self) -> None:
        """End the threads, once what waits is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._readers.shutdown()
        for worker in self._workers:
            worker.join()
