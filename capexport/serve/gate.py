"""What every request passes: who may ask, how much it may send, and how it is counted."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from capexport.bulk.names import shown
from capexport.serve.openai import error_object
from capexport.serve.requests import Json, refuse
from capexport.serve.service import Service

_OPEN_PATHS = ("/health", "/")  # for everybody, without a key
# Seconds to wait for the next part of a body, for the whole body, and for the rest of it once the
# server is stopping.
_PAUSE, _LONGEST, _GRACE = 10.0, 300.0, 10.0
_MAX_BODIES = 8  # of the largest size: all bodies together take no more memory

log = logging.getLogger("capexport")


def error_answer(path: str, status: int, reason: str, headers: object = None) -> Json:
    """An error in the form of the path's protocol; control characters in `reason` are escaped."""
    reason = shown(reason)
    content = error_object(status, reason) if path.startswith("/v1/") else {"error": reason}
    return Json(content, status, headers)


class Gate:
    """ASGI middleware that checks and counts every request.

    `route_of` gives the path of the route that a request matches, or None. Requests are counted
    under it, since a counter for each path that a client makes up would fill the memory.
    """

    def __init__(
        self, app: ASGIApp, service: Service, route_of: Callable[[Scope], str | None]
    ) -> None:
        self._app, self._service, self._route_of = app, service, route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 500
        path = self._route_of(scope)
        body = _Body(self, receive, self._service)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(Headers(scope=scope), path)
            except HTTPException as error:
                asked, status = self._service.path(scope), error.status_code
                log_error(asked, status, error.detail)
                answer = error_answer(asked, status, error.detail, error.headers)
                return await answer(scope, receive, noted)
            await self._app(scope, body.receive, noted)
        finally:
            self._service.body_bytes -= body.size
            self._service.metrics.answered(path or "other", status, time.monotonic() - began)

    def _check(self, headers: Headers, path: str | None) -> None:
        """Refuse clients that may not ask, and bodies that are announced as too large."""
        settings = self._service.settings
        if path not in _OPEN_PATHS and settings.api_key and not _has_key(headers, settings.api_key):
            refuse("this server wants its API key: `Authorization: Bearer KEY`", 401,
                   {"WWW-Authenticate": "Bearer"})  # fmt: skip
        # Browsers send this header with requests from pages; other clients don't.
        foreign = headers.get("sec-fetch-site") == "cross-site"
        origins = settings.allow_origin
        if foreign and path not in _OPEN_PATHS and not {"*", headers.get("origin")} & {*origins}:
            refuse("pages of other origins may not ask here (--allow-origin)", 403)
        host = headers.get("host", "")
        if settings.checks_host and not _is_own_name(host, settings.allow_host):
            # DNS rebinding: a page whose host name resolves to this machine has the same origin.
            refuse(f"this server doesn't go by the name of {host!r:.100} (--allow-host)", 403)
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            refuse("bodies are taken as they are: send them without Content-Encoding", 415,
                   {"Accept-Encoding": "identity"})  # fmt: skip
        with suppress(ValueError):
            if int(headers.get("content-length", "0")) > settings.max_body * 10**6:
                self.refuse_size()

    def refuse_size(self) -> None:
        refuse(f"a request may have {self._service.settings.max_body} MB (--max-body)", 413)

    def reserve(self, size: int) -> None:
        """Count bytes of a body that has to stay in memory, or refuse them."""
        if self._service.body_bytes + size > _MAX_BODIES * self._service.settings.max_body * 10**6:
            refuse("too much is being sent already: try again later", 429, {"Retry-After": "1"})
        self._service.body_bytes += size


class _Body:
    """A request's body as it arrives, within the limits of time and size."""

    def __init__(self, gate: Gate, receive: Receive, service: Service) -> None:
        self._gate, self._receive, self._service = gate, receive, service
        self._most = service.settings.max_body * 10**6
        self._until = time.monotonic() + _LONGEST
        self._more = True
        self.size = 0

    async def receive(self) -> Message:
        if not self._more:
            return await self._receive()
        now = time.monotonic()
        until = min(self._until, self._service.stopping_since + _GRACE, now + _PAUSE)
        try:
            with anyio.fail_after(max(0, until - now)):  # cheaper than a task each time
                message = await self._receive()
        except TimeoutError:
            refuse("the rest of the body doesn't come", 408, {"Connection": "close"})
        self._more = message.get("more_body", False)
        size = len(message.get("body", b""))
        if self.size + size > self._most:
            self._gate.refuse_size()
        self._gate.reserve(size)
        self.size += size
        return message


def _has_key(headers: Headers, key: str) -> bool:
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(sent.strip().encode(), key.encode())
    return same and scheme.lower() == "bearer"


def _is_own_name(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a `Host` header is an IP address, localhost, or one of `allowed`."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name in ("localhost", "", *allowed) or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def log_error(path: str, status: int, reason: str) -> None:
    """Log one line, with control characters escaped: clients choose the path."""
    log.info("%s", shown(f"{status} {path:.100}: {reason:.300}"))
