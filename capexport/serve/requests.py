"""What every protocol needs: JSON bodies and their fields, images in base64, refusals, and forms
of captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, TypeVar

import pybase64
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from capexport.captioner import Alternative, Caption
from capexport.errors import ImageError
from capexport.serve.batching import Source

MAX_TOKENS, MAX_BEAMS = 256, 16  # of one request, unless the model's own are more
MAX_CHARACTERS = 30_000  # of a prompt: more than models take, and tokenized at once
NO_LOGPROBS = "logprobs: captions come without the probabilities of their tokens"
_LARGE = 2_000_000  # bytes of JSON: more are parsed in a thread, since the event loop would wait
# Values of JSON in a body. Parsing holds the interpreter's lock, in a thread as well, and a value
# takes many times the memory of its text.
_MAX_VALUES = 100_000
_ESCAPES = (("+", "%2B"), ("/", "%2F"), ("=", "%3D"))
_TO_STANDARD = str.maketrans("-_", "+/", " \t\r\n\f")  # from base64url, without white space
_KINDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    list: "a list",
    dict: "an object",
}

T = TypeVar("T")
D = TypeVar("D")


class Json(Response):
    """A JSON answer. All beyond ASCII is escaped, as text of the client may be no valid UTF-8."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Any = None) -> None:
        super().__init__(json.dumps(content).encode(), status, headers)


def refuse(reason: str, status: int = 400, headers: Mapping[str, str] | None = None) -> NoReturn:
    """Answer the request with an error, in the form that its protocol has."""
    raise HTTPException(status, reason, headers)


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in the body, whatever content type the client declares."""
    body = await request.body()
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_VALUES:  # base64 has none of them
        refuse("the body is JSON of too many values: an image is one text, in base64", 413)
    try:
        large = len(body) > _LARGE
        content = await run_in_threadpool(_parse, body) if large else _parse(body)
    except ValueError as error:
        refuse(f"the body is not JSON: {error!s:.200}")
    return content if isinstance(content, dict) else refuse("the body must be a JSON object")


def _parse(body: bytes) -> Any:
    return json.loads(body, parse_constant=_no_constant)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def value(
    content: Mapping[str, Any], name: str, kind: type[T], default: D, where: str = ""
) -> T | D:
    """A field of a JSON object, or its default where it is missing or null. One of another type is
    refused; `where` is put in front of the field's name then. 3.0 is a whole number, too."""
    found = content.get(name)
    if found is None:
        return default
    if kind is int and isinstance(found, float) and found.is_integer():
        found = int(found)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        refuse(f"{where}{name} must be {_KINDS[kind]}")
    return found


def objects(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A field that is a list of objects; empty where it is missing."""
    found: list[Any] = value(content, name, list, [])
    if not all(isinstance(item, dict) for item in found):
        refuse(f"{name} must be a list of objects")
    return found


def texts(content: Mapping[str, Any], name: str, where: str = "") -> list[str]:
    """A field that is a list of texts; empty where it is missing."""
    found: list[Any] = value(content, name, list, [], where)
    if not all(isinstance(item, str) for item in found):
        refuse(f"{where}{name} must be a list of texts")
    return found


def data_uri(uri: str) -> Source:
    """The image in `data:image/jpeg;base64,...`."""
    head, comma, data = uri.partition(",")
    _, semicolon, coding = head.rpartition(";")
    if not comma or not semicolon or coding.strip().lower() != "base64":
        refuse("a data URI must be one as data:image/jpeg;base64,...")
    return from_base64(data)


def from_base64(text: str) -> Source:
    """A function that decodes the text, for a thread of the batcher. It raises `ImageError` if that
    is no base64."""
    return partial(_decode, text)


def _decode(text: str) -> bytes:
    """Base64 as browsers accept it in data URIs: white space, percent-escapes and missing padding
    are allowed; and base64url (RFC 4648, section 5)."""
    with suppress(ValueError):  # the usual case, without copies
        return pybase64.b64decode(text, validate=True)
    for sign, escape in _ESCAPES:
        text = text.replace(escape, sign).replace(escape.lower(), sign)
    plain = text.translate(_TO_STANDARD).rstrip("=")
    try:
        return pybase64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except ValueError as error:
        raise ImageError(f"an image is not base64: {error}") from error


def formatter(wanted: Any, where: str = "format") -> Callable[[str], str]:
    """A function from a caption to the text of an answer.

    Args:
        wanted: nothing for the caption itself, "json" for `{"caption": ...}`, or a JSON schema
            with one required field, a text.
        where: what to call `wanted` in a refusal.
    """
    if wanted in (None, ""):
        return str
    if wanted == "json":
        return partial(_as_object, "caption")
    if not isinstance(wanted, dict):
        refuse(f"{where} must be json or a JSON schema")
    properties = value(wanted, "properties", dict, {}, f"{where}: ")
    names = texts(wanted, "required", f"{where}: ") or list(properties)
    kinds = [properties[name] for name in names if isinstance(properties.get(name), dict)]
    if len(names) != 1 or [kind.get("type") for kind in kinds] != ["string"] or "enum" in kinds[0]:
        refuse(f"{where}: a caption fills a schema whose only required field is a text, no other")
    return partial(_as_object, names[0])


def _as_object(name: str, caption: str) -> str:
    return json.dumps({name: caption}, ensure_ascii=False)


def answered(
    captions: Sequence[Caption | Alternative],
    form: Callable[[str], str],
    stops: Sequence[str],
    max_tokens: int,
) -> tuple[str, str]:
    """The text of an answer, a line for each caption, and the reason of its end.

    Each caption ends before the first of `stops` in it, then `form` makes its line. The reason is
    "length" if `max_tokens` ended a caption, else "stop".
    """
    lines, reason = [], "stop"
    for caption in captions:
        text = caption.text
        for stop in filter(None, stops):
            text = text.partition(stop)[0]
        if text == caption.text and len(caption.tokens) >= max_tokens:
            reason = "length"
        lines.append(form(text))
    return "\n".join(lines), reason
