"""OpenAI's protocol of responses, of which nothing is kept from one request to the next.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import json
import reprlib
import secrets
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from capexport.serve.openai import (
    Answer,
    Asked,
    captioned,
    check_model,
    check_tools,
    formatter_of,
    prompt_and_images,
)
from capexport.serve.requests import NO_LOGPROBS, Json, objects, read_json, refuse, texts, value
from capexport.serve.service import Service

_STATEFUL = ("previous_response_id", "conversation", "prompt", "background")


def routes(service: Service) -> list[Route]:
    return [Route("/v1/responses", partial(_respond, service), methods=["POST"])]


async def _respond(service: Service, request: Request) -> Response:
    content = await read_json(request)
    check_model(service, value(content, "model", str, ""))
    form = value(value(content, "text", dict, {}), "format", dict, {"type": "text"}, "text: ")
    asked = _asked(content, form)
    answer = await captioned(service, request, asked)
    response = _response(content, form, answer)
    if asked.stream:
        return Response("".join(_events(response)), media_type="text/event-stream")
    return Json(response)


def _asked(content: Mapping[str, Any], form: Mapping[str, Any]) -> Asked:
    for name in _STATEFUL:
        if content.get(name):
            refuse(f"{name}: nothing is kept from one request to the next; send all of it")
    if content.get("top_logprobs") or any("logprobs" in item for item in texts(content, "include")):
        refuse(NO_LOGPROBS)
    check_tools(content)
    items = content.get("input")
    if isinstance(items, str):
        items = [{"content": items}]
    items = objects({"input": items}, "input")
    for item in items:
        if item.get("type", "message") != "message":
            refuse(f"input: items must be messages, got {reprlib.repr(item['type'])}")
    prompt, urls = prompt_and_images(items)
    return Asked(
        urls,
        prompt,
        formatter_of(form, "text: format"),
        value(content, "max_output_tokens", int, None),
        value(content, "stream", bool, False),
    )


def _response(
    content: Mapping[str, Any], form: Mapping[str, Any], answer: Answer
) -> dict[str, Any]:
    [(text, reason)] = answer.choices
    whole = reason == "stop"
    status = "completed" if whole else "incomplete"
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    message = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [part],
    }
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": None if whole else {"reason": "max_output_tokens"},
        "instructions": None,
        "max_output_tokens": content.get("max_output_tokens"),
        "metadata": {},
        "model": content["model"],
        "output": [message],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": None,
        "text": {"format": form},
        "tool_choice": "none",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "usage": {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
    }


def _events(response: dict[str, Any]) -> Iterator[str]:
    """The response as server-sent events: the beginnings of response, message and text, the whole
    text, and the ends of all three."""
    [message], [part] = response["output"], response["output"][0]["content"]
    begun = {**response, "status": "in_progress", "incomplete_details": None}
    begun |= {"output": [], "usage": None}
    item = {"output_index": 0, "item_id": message["id"], "content_index": 0}
    added = {**message, "status": "in_progress", "content": []}
    ends = f"response.{response['status']}"
    events: list[tuple[str, dict[str, Any]]] = [
        ("response.created", {"response": begun}),
        ("response.in_progress", {"response": begun}),
        ("response.output_item.added", {"output_index": 0, "item": added}),
        ("response.content_part.added", {**item, "part": {**part, "text": ""}}),
        ("response.output_text.delta", {**item, "delta": part["text"], "logprobs": []}),
        ("response.output_text.done", {**item, "text": part["text"], "logprobs": []}),
        ("response.content_part.done", {**item, "part": part}),
        ("response.output_item.done", {"output_index": 0, "item": message}),
        (ends, {"response": response}),
    ]
    for number, (kind, content) in enumerate(events):
        event = {"type": kind, "sequence_number": number, **content}
        yield f"event: {kind}\ndata: {json.dumps(event)}\n\n"
