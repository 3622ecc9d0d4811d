"""OpenAI's protocol of chat completions.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json
import reprlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from capexport.captioner import Caption
from capexport.serve.requests import (
    MAX_BEAMS,
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


def routes(service: Service) -> list[Route]:
    model = {
        "id": service.settings.name,
        "object": "model",
        "created": int(service.loaded_at.timestamp()),
        "owned_by": "capexport",
    }

    async def models(request: Request) -> Response:
        return Json({"object": "list", "data": [model]})

    async def one(request: Request) -> Response:
        check_model(service, request.path_params["name"])
        return Json(model)

    return [
        Route("/v1/chat/completions", partial(_complete, service), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one),
    ]


def error_object(status: int, reason: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    codes = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
    code = codes.get(status)
    if status == 404 and "does not exist" in reason:  # an unknown path is a 404, too
        code = "model_not_found"
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": reason, "type": kind, "param": None, "code": code}}


def check_model(service: Service, name: str) -> None:
    """Refuse other names than this server's model."""
    if not name:
        refuse("model is required")
    if not service.knows(name):
        refuse(f"the model {name[:100]!r} does not exist: this is {service.settings.name}", 404)


@dataclass(frozen=True)
class Asked:
    """What a request asks for. Temperature, seed and other options of sampling are ignored, since
    captions are not sampled.

    Attributes:
        urls: the images, as http(s) or data URIs.
        prompt: the text of the user's last message.
        format: makes the text of an answer from a caption.
        max_tokens: None for the captioner's own limit.
        stream: whether the answer is server-sent events.
        stops: a caption ends before the first of these texts.
        choices: how many captions of one image.
        include_usage: whether a stream ends with the numbers of tokens.
    """

    urls: list[str]
    prompt: str
    format: Callable[[str], str]
    max_tokens: int | None
    stream: bool
    stops: Sequence[str] = ()
    choices: int = 1
    include_usage: bool = False

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Asked:
        """From the body of a request for chat completions."""
        prompt, urls = prompt_and_images(objects(content, "messages"))
        wanted = value(content, "response_format", dict, {})
        streaming = value(content, "stream_options", dict, {})
        tokens = content.get("max_completion_tokens")
        bound = "max_tokens" if tokens is None else "max_completion_tokens"
        asked = cls(
            urls,
            prompt,
            formatter_of({**value(wanted, "json_schema", dict, {}, "response_format: "), **wanted}),
            value(content, bound, int, None),
            value(content, "stream", bool, False),
            [stop] if isinstance(stop := content.get("stop"), str) else texts(content, "stop"),
            value(content, "n", int, 1),
            value(streaming, "include_usage", bool, False, "stream_options: "),
        )
        if not 1 <= asked.choices <= MAX_BEAMS:
            refuse(f"n must lie in 1..{MAX_BEAMS}, got {asked.choices}")
        if asked.choices > 1 and len(urls) > 1:
            refuse("n above 1 goes with one image, not with several")
        if value(content, "logprobs", bool, False):
            refuse(NO_LOGPROBS)
        check_tools(content)
        return asked


def check_tools(content: Mapping[str, Any]) -> None:
    """Refuse requests that insist on a tool; tools that are only offered are ignored."""
    if content.get("tool_choice") not in (None, "none", "auto"):
        refuse("tool_choice: this model calls no tools; response_format or text.format gives JSON")


def prompt_and_images(messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The text of the last message of a user, and the images of the last message with any.

    Parts of messages are those of chat completions or of responses.
    """
    prompt, urls = "", list[str]()
    for message in messages:
        parts = message.get("content")
        if isinstance(parts, str) or parts is None:
            parts = [{"type": "text", "text": parts}]
        found, said = list[str](), list[str]()
        for part in objects({"content": parts}, "content"):
            kind = part.get("type")
            if kind in ("image_url", "input_image"):
                url = part.get("image_url")
                url = {"url": url} if isinstance(url, str) else value(part, "image_url", dict, {})
                found.append(value(url, "url", str, "", "image_url: "))
            elif kind in ("text", "input_text", "output_text", "refusal"):
                said.append(value(part, "refusal" if kind == "refusal" else "text", str, ""))
            else:
                refuse(
                    f"message parts must be texts or images (image_url), got {reprlib.repr(kind)}"
                )
        urls = found or urls
        if value(message, "role", str, "user") == "user":
            prompt = "\n".join(said)
    return prompt, urls


def formatter_of(wanted: Mapping[str, Any], where: str = "response_format") -> Callable[[str], str]:
    """A function from a caption to the text of an answer, by a `response_format` or `text.format`,
    which is called `where` in a refusal."""
    kind = wanted.get("type", "text")
    if kind == "json_schema":
        return formatter(value(wanted, "schema", dict, {}, f"{where}: "), where)
    if kind not in ("text", "json_object"):
        refuse(f"{where}: type must be text, json_object or json_schema")
    return formatter("json" if kind == "json_object" else "")


@dataclass(frozen=True)
class Answer:
    """Text and finish reason ("stop" or "length") of each choice, and numbers of tokens."""

    choices: list[tuple[str, str]]
    prompt_tokens: int
    completion_tokens: int


async def captioned(service: Service, request: Request, asked: Asked) -> Answer:
    """The captions that are asked for, as texts."""
    if not asked.urls:
        refuse("no image: this model captions images, parts of the type image_url or input_image")
    own = service.captioner.options
    tokens = service.capped(asked.max_tokens)
    prompt = asked.prompt if service.settings.prompts and asked.prompt else None
    captions = await service.captions(
        request,
        await service.images(asked.urls),
        prompt,
        max_tokens=tokens,
        num_beams=max(own.num_beams, asked.choices) if asked.choices > 1 else None,
        num_return_sequences=asked.choices,
    )
    return Answer(
        list(_choices(captions, asked, tokens or own.max_tokens)),
        service.prompt_tokens(prompt) * len(captions),
        sum(len(one.tokens) for each in captions for one in each.alternatives[: asked.choices]),
    )


async def _complete(service: Service, request: Request) -> Response:
    content = await read_json(request)
    check_model(service, value(content, "model", str, ""))
    asked = Asked.read(content)
    answer = await captioned(service, request, asked)
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": content["model"],
    }
    if asked.stream:
        head["object"] = "chat.completion.chunk"
        events = _events(head, answer.choices, usage, asked.include_usage)
        return Response("".join(events), media_type="text/event-stream")
    said = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        for index, (text, reason) in enumerate(answer.choices)
    ]
    return Json({**head, "object": "chat.completion", "choices": said, "usage": usage})


def _choices(captions: list[Caption], asked: Asked, most: int) -> Iterator[tuple[str, str]]:
    """Text and finish reason of each choice: the alternatives of one image, or else one choice with
    the captions of all images, a line each."""
    if len(captions) == 1:
        choices = [[one] for one in captions[0].alternatives[: asked.choices]]
    else:
        choices = [[caption.alternatives[0] for caption in captions]]
    for lines in choices:
        yield answered(lines, asked.format, asked.stops, most)


def _events(
    head: dict[str, Any], choices: list[tuple[str, str]], usage: dict[str, int], counted: bool
) -> Iterator[str]:
    """The answer as server-sent events: of each choice its role, its whole text and its end."""

    def event(index: int, delta: dict[str, str], reason: str | None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**head, "choices": [choice], **({"usage": None} if counted else {})}
        return f"data: {json.dumps(chunk)}\n\n"

    for index, (text, reason) in enumerate(choices):
        yield event(index, {"role": "assistant", "content": ""}, None)
        yield event(index, {"content": text}, None)
        yield event(index, {}, reason)
    if counted:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"
