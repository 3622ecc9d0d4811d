"""Images of many requests, captioned together."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from capexport.captioner import Caption, Captioner
from capexport.decoding import DecodingKeywords
from capexport.errors import CapexportError
from capexport.preprocessing import FloatArray
from capexport.serve.metrics import Metrics

# An image file's bytes, or a function that returns them, called in a thread of the batcher.
Source: TypeAlias = bytes | Callable[[], bytes]
Outcome: TypeAlias = Caption | CapexportError

# Seconds that a batch waits for more images while other work goes on.
_PATIENCE = 0.005


class QueueFullError(Exception):
    """There is no room for more images."""


@dataclass(eq=False)
class _Item:
    """An image, and the future that waits for its caption.

    Attributes:
        pixels: float32 (3, crop, crop), once the image is read.
        ready: when that was, by `time.monotonic()`.
        key: stands for the options; only images with the same key are captioned together.
    """

    source: Source
    prompt: str | None
    options: DecodingKeywords
    future: asyncio.Future[Outcome]
    pixels: FloatArray | None = None
    ready: float = 0.0
    key: Any = field(init=False)

    def __post_init__(self) -> None:
        self.key = (self.prompt is None, *sorted(self.options.items()))


class Batcher:
    """Reads images and captions them in batches, in threads of its own: the event loop stays free.

    Each thread does what is due: if enough images are ready, it captions a batch; otherwise it
    reads the next image. A lone image is captioned at once; only while others are read or captioned
    does it wait some milliseconds for a batch. A bad image or prompt costs no other image its
    caption.

    Attributes:
        room: how many images may be held at once.
        held: how many are held now.
        loop: the event loop in which captions are awaited.
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
        """Start the threads; call it in the event loop. All `threads` read images. If the captioner
        itself uses one thread, they also caption as many batches at once, else one."""
        self.captioner, self.metrics = captioner, metrics
        self.room, self.held = room, 0
        self._batch_size, self._max_pixels = batch_size, max_pixels
        self._at_once = threads if captioner.threads == 1 else 1
        self.loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._unread: deque[_Item] = deque()
        self._ready: list[_Item] = []
        self._reading = self._captioning = 0
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    async def caption(
        self, sources: Sequence[Source], prompt: str | None, options: DecodingKeywords
    ) -> list[Outcome]:
        """The caption of each image, or what is wrong with it.

        Raises:
            QueueFullError: there is no room for so many images now.
        """
        if self.held + len(sources) > self.room:
            raise QueueFullError
        items = [_Item(one, prompt, options, self.loop.create_future()) for one in sources]
        with self._changed:
            self.held += len(items)
            self._unread.extend(items)
            self._changed.notify(len(items))
        try:
            outcomes = await asyncio.gather(*(item.future for item in items))
        finally:
            with self._changed:
                self.held -= len(items)
        for outcome in outcomes:
            self.metrics.images["captioned" if isinstance(outcome, Caption) else "failed"] += 1
        return outcomes

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            if isinstance(job, _Item):
                self._read(job)
            else:
                self._answer(job, self._captions(job))
                with self._changed:
                    self._captioning -= 1
                    self._changed.notify_all()

    def _next_job(self) -> _Item | list[_Item] | None:
        """An image to read, or a batch to caption; None when all is done."""
        with self._changed:
            while True:
                pause = None
                free = self._captioning < self._at_once
                if free and self._ready:
                    pause = self._ready[0].ready + _PATIENCE - time.monotonic()
                    busy = self._reading or self._captioning
                    more_may_come = self._unread or (busy and pause > 0)
                    if not more_may_come or len(self._ready) >= self._fair_share():
                        self._captioning += 1
                        return self._take_batch()
                if self._unread and len(self._ready) < 2 * self._batch_size:
                    self._reading += 1
                    return self._unread.popleft()
                if self._closed and not self._ready:
                    return None
                self._changed.wait(pause)

    def _fair_share(self) -> int:
        """How many images make a batch, so that all threads that caption get equally many. At least
        one: when clients have gone, images may be ready that are no longer held."""
        return max(1, min(self._batch_size, math.ceil(self.held / self._at_once)))

    def _take_batch(self) -> list[_Item]:
        """Remove a batch from those that are ready: the oldest, with the same options."""
        key = self._ready[0].key
        batch = [item for item in self._ready if item.key == key][: self._fair_share()]
        taken = set(map(id, batch))
        self._ready = [item for item in self._ready if id(item) not in taken]
        return batch

    def _read(self, item: _Item) -> None:
        error: Exception | None = None
        if not item.future.cancelled():  # its client may have gone
            try:
                data = item.source if isinstance(item.source, bytes) else item.source()
                item.pixels = self.captioner.preprocess(data, max_pixels=self._max_pixels)
            except Exception as failure:
                error = failure
        item.source, item.ready = b"", time.monotonic()
        with self._changed:
            self._reading -= 1
            if item.pixels is not None:
                self._ready.append(item)
            self._changed.notify_all()
        if error is not None:
            self._answer([item], [error])

    def _captions(self, batch: list[_Item]) -> list[Outcome | Exception]:
        first = batch[0]
        prompts = None if first.prompt is None else [str(item.prompt) for item in batch]
        try:
            pixels = np.stack([item.pixels for item in batch if item.pixels is not None])
            return list(self.captioner.caption_pixels(pixels, prompts=prompts, **first.options))
        except Exception as error:
            if len(batch) > 1:  # so that only the image that is to blame fails
                return [outcome for item in batch for outcome in self._captions([item])]
            return [error]

    def _answer(self, batch: list[_Item], outcomes: Sequence[Outcome | Exception]) -> None:
        with suppress(RuntimeError):  # the loop was ended by force
            self.loop.call_soon_threadsafe(self._settle, batch, outcomes)

    def _settle(self, batch: list[_Item], outcomes: Sequence[Outcome | Exception]) -> None:
        if batch[0].pixels is not None:
            self.metrics.batches.observe(len(batch))
        for item, outcome in zip(batch, outcomes, strict=True):
            if item.future.done():  # cancelled
                continue
            if isinstance(outcome, Caption | CapexportError):
                item.future.set_result(outcome)
            else:
                item.future.set_exception(outcome)

    def close(self) -> None:
        """End the threads, once all waiting images are done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
