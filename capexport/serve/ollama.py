"""Ollama's protocol, as its clients and PhotoPrism speak it.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import capexport
from capexport.captioner import Caption
from capexport.serve.requests import (
    NO_LOGPROBS,
    Json,
    answered,
    formatter,
    objects,
    read_json,
    refuse,
    texts,
    value,
)
from capexport.serve.service import Service

NDJSON = "application/x-ndjson"


def routes(service: Service) -> list[Route]:
    async def tags(request: Request) -> Response:
        return Json({"models": [_model(service)]})

    async def version(request: Request) -> Response:
        return Json({"version": capexport.__version__})

    async def show(request: Request) -> Response:
        content = await read_json(request)
        _check_model(service, content.get("model") or content.get("name"))
        return Json(_description(service))

    return [
        Route("/api/generate", partial(_generate, service), methods=["POST"]),
        Route("/api/chat", partial(_chat, service), methods=["POST"]),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/tags", tags),
        Route("/api/ps", tags),
        Route("/api/version", version),
    ]


async def _generate(service: Service, request: Request) -> Response:
    content = await read_json(request)
    prompt = value(content, "prompt", str, "")
    images = texts(content, "images")
    loads = not prompt and not images

    def said(text: str) -> dict[str, Any]:
        return {"response": text}

    return await _answer(service, request, content, images, prompt, said, loads)


async def _chat(service: Service, request: Request) -> Response:
    """Caption what the last message with images shows."""
    content = await read_json(request)
    messages = objects(content, "messages")
    prompt, images = "", list[str]()
    for message in messages:
        if value(message, "role", str, "user") == "user":
            prompt = value(message, "content", str, "")
        images = texts(message, "images") or images

    def said(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    return await _answer(service, request, content, images, prompt, said, not messages)


async def _answer(
    service: Service,
    request: Request,
    content: Mapping[str, Any],
    images: list[str],
    prompt: str,
    said: Callable[[str], dict[str, Any]],
    loads: bool,
) -> Response:
    """Answer either endpoint.

    Args:
        said: a text, as the fields in which the endpoint answers.
        loads: whether the request has neither image nor text: clients send it to load a model.
    """
    began = time.monotonic()
    _check_model(service, content.get("model"))
    streams = value(content, "stream", bool, True)
    form = formatter(content.get("format"))
    options = value(content, "options", dict, {})
    stops = texts(options, "stop", "options: ")
    tokens = value(options, "num_predict", int, -1, "options: ")
    if value(content, "logprobs", bool, False):
        refuse(NO_LOGPROBS)
    head = {"model": content["model"], "created_at": _timestamp(datetime.now(timezone.utc))}
    if loads:
        return Json({**head, **said(""), "done": True, "done_reason": "load"})
    if not images:
        refuse("no images: this model captions images, a list of base64 texts")
    wanted = service.capped(tokens if tokens > 0 else None)  # 0, too, is no bound
    sources = await service.images(images, plain=True)
    own_prompt = prompt if service.settings.prompts and prompt else None
    captions = await service.captions(request, sources, own_prompt, max_tokens=wanted)
    most = wanted or service.captioner.options.max_tokens
    text, reason = answered(captions, form, stops, most)
    counts = {
        "done": True,
        "done_reason": reason,
        **_durations(captions, began),
        "prompt_eval_count": service.prompt_tokens(own_prompt) * len(captions),
        "eval_count": sum(len(caption.tokens) for caption in captions),
    }
    if not streams:
        return Json({**head, **said(text), **counts})
    lines = [{**head, **said(text), "done": False}, {**head, **said(""), **counts}]
    return Response("".join(f"{json.dumps(line)}\n" for line in lines), media_type=NDJSON)


def _durations(captions: list[Caption], began: float) -> dict[str, int]:
    timing = captions[-1].timing
    return {
        "total_duration": _nanoseconds(time.monotonic() - began),
        "load_duration": 0,
        "prompt_eval_duration": _nanoseconds(timing.encode),
        "eval_duration": _nanoseconds(timing.decode),
    }


def _nanoseconds(seconds: float) -> int:
    return math.ceil(seconds * 1e9)


def _check_model(service: Service, name: Any) -> None:
    if not isinstance(name, str) or not name:
        refuse("model is required")
    if not service.knows(name):
        refuse(f"model {name[:100]!r} not found: this is {service.settings.name}", 404)


def _timestamp(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _details(service: Service) -> dict[str, Any]:
    family = service.manifest.family
    return {
        "parent_model": "",
        "format": "onnx",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": service.manifest.precision,
    }


def _model(service: Service) -> dict[str, Any]:
    name = f"{service.settings.name}:latest"
    return {
        "name": name,
        "model": name,
        "modified_at": _timestamp(service.loaded_at),
        "size": service.manifest.size,
        "digest": service.digest,
        "details": _details(service),
    }


def _description(service: Service) -> dict[str, Any]:
    provenance = service.manifest.provenance
    return {
        "license": provenance.licence or "",
        "modelfile": "",
        "parameters": f"num_predict {service.captioner.options.max_tokens}",
        "template": "{{ .Prompt }}" if service.settings.prompts else "",
        "details": _details(service),
        "model_info": {"general.architecture": service.manifest.family},
        "capabilities": ["completion", "vision"],
        "modified_at": _timestamp(service.loaded_at),
    }
