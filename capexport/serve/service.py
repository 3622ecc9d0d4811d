"""A captioner that answers requests: what all protocols share."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

from capexport.artifact import FILE_NAME, Manifest
from capexport.atomic import sha256_of
from capexport.bulk.run import open_captioner
from capexport.captioner import Caption, model_folder
from capexport.decoding import DecodingKeywords
from capexport.errors import CapexportError, ImageError, OptionError
from capexport.serve.batching import Batcher, Outcome, QueueFullError, Source
from capexport.serve.fetching import Fetcher
from capexport.serve.metrics import Metrics
from capexport.serve.requests import (
    MAX_BEAMS,
    MAX_CHARACTERS,
    MAX_TOKENS,
    data_uri,
    from_base64,
    refuse,
)
from capexport.serve.settings import Settings
from capexport.sessions import available_cores


class Service:
    """The loaded captioner with its queue, and what is counted over all requests.

    Attributes:
        captioner, manifest: what captions the images.
        digest: SHA-256 of the manifest, which holds the hashes of all files.
        loaded_at: when the captioner was loaded.
        body_bytes: size of all request bodies that are being received or worked on.
        stopping_since: when the server was told to stop, by `time.monotonic()`; else infinite.
    """

    batcher: Batcher
    fetcher: Fetcher
    body_bytes = 0
    stopping_since = math.inf

    def __init__(self, settings: Settings) -> None:
        """Load the captioner.

        Raises:
            CapexportError: it cannot be loaded, or the settings don't suit it.
        """
        self.settings = settings
        folder = model_folder(settings.model)
        self.manifest = Manifest.read(folder)
        self.captioner = open_captioner(folder, settings.device, settings.threads)
        self.captioner.options = replace(self.captioner.options, **settings.decoding)  # type: ignore[arg-type]
        self.takes_prompts = self.manifest.prompt is not None
        if settings.prompts and not self.takes_prompts:
            raise OptionError("--prompts needs a model that was trained with prompts, as BLIP-2")
        self.digest = sha256_of(folder / FILE_NAME)
        self.loaded_at = datetime.now(timezone.utc)
        self.metrics = Metrics()

    def start(self) -> None:
        """Start the threads that caption. Call it in the event loop."""
        settings = self.settings
        self.batcher = Batcher(
            self.captioner,
            self.metrics,
            threads=settings.threads or available_cores(),
            batch_size=settings.batch_size or self.captioner.batch_size,
            room=settings.queue,
            max_pixels=settings.max_pixels * 10**6,
        )
        self.fetcher = Fetcher()

    def stop(self) -> None:
        self.batcher.close()
        self.captioner.close()

    def knows(self, name: str) -> bool:
        """Whether a client's name for the model is this server's, with Ollama's tag or without."""
        return name in (self.settings.name, f"{self.settings.name}:latest")

    def path(self, scope: Scope) -> str:
        """A request's path without what an outer application or a proxy has put in front of it."""
        path = str(scope["path"])
        for prefix in (scope.get("root_path", ""), self.settings.root_path):
            if f"{path}/".startswith(f"{prefix}/"):
                path = path.removeprefix(prefix) or "/"
        return path

    async def images(self, texts: Sequence[str], plain: bool = False) -> list[Source]:
        """Images from data URIs, http(s) URLs or, where `plain`, bare base64. URLs are fetched.

        Raises:
            HTTPException: a text is none of these, URLs are not allowed, or there are more texts
                than the queue has places.
            ImageError: a URL cannot be fetched.
        """
        if len(texts) > self.settings.queue:
            refuse(f"at most {self.settings.queue} images a request", 413)
        room = self.settings.max_body * 10**6  # what is fetched is no more than could be sent
        found: list[Source] = []
        for text in map(str.strip, texts):
            if text[:5].lower() == "data:":
                found.append(data_uri(text))
            elif text[:8].lower().startswith(("http://", "https://")):
                if not self.settings.allow_urls:
                    refuse("URLs are not fetched here (--allow-urls): send images as data URIs")
                image = await self.fetcher.fetch(text, room)
                room -= len(image)
                found.append(image)
            elif plain:
                found.append(from_base64(text))
            else:
                refuse("an image must be a data URI or an http URL")
        return found

    def changed_options(self, **options: Any) -> DecodingKeywords:
        """The options of a request that differ from the captioner's own. Only requests with equal
        options are captioned together, so those that change nothing are left out.

        Raises:
            OptionError: they ask for more than a request may, or are out of range.
        """
        own = self.captioner.options
        given: Any = {name: value for name, value in options.items() if value is not None}
        for name, most in (("max_tokens", MAX_TOKENS), ("num_beams", MAX_BEAMS)):
            if given.get(name, 0) > (most := max(most, getattr(own, name))):
                raise OptionError(f"{name} must be at most {most} here, got {given[name]}")
        replace(own, **given)
        changes: Any = {n: value for n, value in given.items() if value != getattr(own, n)}
        return changes  # type: ignore[no-any-return]

    def capped(self, max_tokens: int | None) -> int | None:
        """`max_tokens`, but no more than a request may ask for. Clients of language models ask for
        thousands, which `changed_options` would refuse."""
        most = max(MAX_TOKENS, self.captioner.options.max_tokens)
        return None if max_tokens is None else min(max_tokens, most)

    async def captions(
        self,
        request: Request,
        sources: Sequence[Source],
        prompt: str | None = None,
        **options: Any,
    ) -> list[Caption]:
        """The caption of each image; raises the error of the first that fails."""
        outcomes = await self.outcomes(request, sources, prompt, **options)
        for outcome in outcomes:
            if isinstance(outcome, CapexportError):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Caption)]

    async def outcomes(
        self,
        request: Request,
        sources: Sequence[Source],
        prompt: str | None = None,
        **options: Any,
    ) -> list[Outcome]:
        """The caption of each image, or its error. Stops if the client disconnects."""
        if prompt is not None and not self.takes_prompts:
            raise OptionError("this captioner takes no prompt")
        if len(prompt or "") > MAX_CHARACTERS:
            raise OptionError(f"a prompt may have {MAX_CHARACTERS} characters here")
        changes = self.changed_options(**options)
        work = asyncio.ensure_future(self.batcher.caption(sources, prompt, changes))
        gone = asyncio.ensure_future(_disconnection(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                refuse("the client has gone", 499)
            return work.result()
        except QueueFullError:
            refuse("too many images wait already: try again later", 429, {"Retry-After": "1"})
        finally:
            gone.cancel()
            work.cancel()

    def prompt_tokens(self, prompt: str | None) -> int:
        """How many tokens image and prompt take in the decoder; 0 where they take none."""
        framed = self.captioner.text.frame(None if prompt is None else [prompt], 1, 1)
        return int(framed.mask.sum()) if framed else 0


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def status_of(error: CapexportError) -> int:
    """The HTTP status: 400 if the request is to blame, else 500."""
    return 400 if isinstance(error, ImageError | OptionError) else 500
