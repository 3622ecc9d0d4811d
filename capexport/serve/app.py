"""The application: all protocols, the gate in front of them, and the pages about itself."""

from __future__ import annotations

import html
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import capexport
from capexport.errors import CapexportError
from capexport.serve import ollama, openai, own, responses
from capexport.serve.gate import Gate, error_answer, log_error
from capexport.serve.metrics import CONTENT_TYPE
from capexport.serve.requests import Json
from capexport.serve.service import Service, status_of

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>capexport</title>
<h1>capexport</h1>
<p>This server captions images: <code>{name}</code>, a {family} captioner in {precision}.</p>
<pre>curl --data-binary @photo.jpg http://{host}{root}/caption</pre>
<p>It also speaks Ollama's protocol (<code>/api/generate</code>, <code>/api/chat</code>) and
OpenAI's (<code>/v1/chat/completions</code>, <code>/v1/responses</code>); see
<a href="health">health</a> and <a href="metrics">metrics</a>.</p>
</html>
"""


def build_app(service: Service) -> Starlette:
    """The ASGI application around a service."""
    settings = service.settings
    routes = [
        *own.routes(service),
        *ollama.routes(service),
        *openai.routes(service),
        *responses.routes(service),
        *_status_routes(service),
    ]
    inner: list[BaseRoute] = list(routes)
    if settings.site:
        inner.append(Mount("/", StaticFiles(directory=settings.site, html=True)))
    below = _below(settings.root_path, inner) if settings.root_path else []

    def route_of(scope: Scope) -> str | None:
        """The path of the route that a request matches, as `Route` has it."""
        for route in routes:
            if route.path_regex.match(service.path(scope)):
                return route.path
        # Files of the site are for everybody.
        return "/" if settings.site and scope["method"] in ("GET", "HEAD") else None

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = Starlette(
        routes=[*below, *inner],
        middleware=[
            *_cors(settings.allow_origin),
            Middleware(Gate, service=service, route_of=route_of),
        ],
        exception_handlers={
            HTTPException: _refused,
            CapexportError: _failed,
            ClientDisconnect: _gone,
            RecursionError: _too_deep,
            Exception: _broken,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _below(path: str, routes: list[BaseRoute]) -> list[BaseRoute]:
    """The same routes below a path. Without its last slash, the path is redirected to the one with
    it, to which the page's links are relative."""

    async def add_slash(request: Request) -> Response:
        return RedirectResponse(f"{path}/")

    return [Route(path, add_slash), Mount(path, routes=routes)]


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """The headers that let pages of these origins read answers."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client in a page sends a dozen of its own
        )
    ]


def _status_routes(service: Service) -> list[Route]:
    settings, manifest = service.settings, service.manifest

    async def health(request: Request) -> Response:
        return Json({"status": "ok", "model": settings.name, "version": capexport.__version__})

    async def metrics(request: Request) -> Response:
        gauges = {
            "capexport_queue_images": service.batcher.held,
            "capexport_queue_room_images": settings.queue,
            "capexport_body_bytes": service.body_bytes,
        }
        return Response(service.metrics.text(gauges), media_type=CONTENT_TYPE)

    async def page(request: Request) -> Response:
        host = html.escape(request.headers.get("host", "localhost"))
        text = _PAGE.format(
            name=settings.name,
            family=manifest.family,
            precision=manifest.precision,
            host=host,
            root=request.scope.get("root_path") or settings.root_path,
        )
        return HTMLResponse(text)

    pages = [] if settings.site else [Route("/", page)]
    return [Route("/health", health), Route("/metrics", metrics), *pages]


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answer(request, error.status_code, error.detail, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, CapexportError)
    if (status := status_of(error)) < 500:
        return _answer(request, status, str(error))
    log_error(request.scope["path"], status, str(error))  # it names files here
    return await _broken(request, error)


async def _gone(request: Request, error: Exception) -> Response:
    return _answer(request, 499, "the client has gone")


async def _too_deep(request: Request, error: Exception) -> Response:
    """JSON of too many levels, whether it was being read, shown in an error, or answered."""
    return _answer(request, 400, "the body is JSON of too many levels")


async def _broken(request: Request, error: Exception) -> Response:
    return _answer(request, 500, "the server failed; its log says why")


def _answer(request: Request, status: int, reason: str, headers: object = None) -> Response:
    path = request.app.state.service.path(request.scope)
    log_error(path, status, reason)
    return error_answer(path, status, reason, headers)
