"""capexport's own protocol: `POST /caption`, an image in the body or several in a form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from capexport.bulk.names import shown
from capexport.captioner import Caption
from capexport.decoding import DecodingOptions
from capexport.serve.batching import Outcome
from capexport.serve.requests import Json, refuse
from capexport.serve.service import Service, status_of

_TYPES = {
    item.name: str(item.type)
    for item in dataclasses.fields(DecodingOptions)
    if "help" in item.metadata
}
_FORM, _FIELDS = "multipart/form-data", "application/x-www-form-urlencoded"


def routes(service: Service) -> list[Route]:
    return [Route("/caption", partial(_caption, service), methods=["POST"])]


async def _caption(service: Service, request: Request) -> Response:
    given = list(request.query_params.multi_items())
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORM:
        return await _caption_form(service, request, given)
    if kind in ("application/json", _FIELDS) and (await request.body())[:1] in b"{[":
        refuse("send an image's bytes as the body, or files as multipart/form-data", 415)
    image = await request.body()
    if not image:
        refuse("no image: send its bytes as the body, or files as multipart/form-data")
    if kind == _FIELDS and not any(byte in image for byte in (b"\0", b"\r", b"\n")):
        refuse("no image: curl's -d leaves bytes out of files, --data-binary sends them all", 415)
    prompt, options = _options(given)
    [caption] = await service.captions(request, [image], prompt, **options)
    return Json(_fields(caption))


async def _caption_form(
    service: Service, request: Request, given: list[tuple[str, str]]
) -> Response:
    """Files, and options as fields; a file that cannot be read has an error for a caption."""
    settings = service.settings
    _check_end(await request.body(), request.headers["content-type"])
    most = {"max_files": settings.queue, "max_fields": 100}
    # A part without a file name may be an image, too, and shall be told so however large it is.
    async with request.form(**most, max_part_size=settings.max_body * 10**6) as form:
        files = [item for _, item in form.multi_items() if isinstance(item, UploadFile)]
        images = [await file.read() for file in files]
        names = [file.filename or "" for file in files]
        fields = [(name, item) for name, item in form.multi_items() if isinstance(item, str)]
    if not images:
        refuse("no image: no part of the form has a file name (filename=)")
    prompt, options = _options([*given, *fields])
    outcomes = await service.outcomes(request, images, prompt, **options)
    rows = [{"file_name": name, **_fields(one)} for name, one in zip(names, outcomes, strict=True)]
    failed = [one for one in outcomes if not isinstance(one, Caption)]
    if len(failed) == len(outcomes):
        error = shown(str(failed[0]))
        return Json({"error": error, "captions": rows}, status_of(failed[0]))
    return Json({"captions": rows})


def _check_end(body: bytes, kind: str) -> None:
    """Refuse a form that breaks off: its last file would be missing, and nobody told."""
    boundary = parse_options_header(kind)[1].get(b"boundary", b"")
    if not body.rstrip().endswith(b"--" + boundary + b"--"):
        refuse("the form breaks off before its last boundary")


def _fields(outcome: Outcome) -> dict[str, Any]:
    if not isinstance(outcome, Caption):
        return {"error": shown(str(outcome))}
    fields: dict[str, Any] = {
        "text": outcome.text,
        "log_probability": outcome.log_probability,
        "tokens": outcome.tokens,
    }
    if len(outcome.alternatives) > 1:
        fields["alternatives"] = [
            {"text": one.text, "log_probability": one.log_probability, "score": one.score}
            for one in outcome.alternatives
        ]
    return fields


def _options(given: Iterable[tuple[str, str]]) -> tuple[str | None, dict[str, Any]]:
    """The prompt, and options of decoding, from texts."""
    prompt, options = None, {}
    for name, text in given:
        if name == "prompt":
            prompt = text
        elif name in _TYPES:
            options[name] = _typed(name, text)
        else:
            refuse(f"unknown option {name[:100]!r}: there are prompt, {', '.join(_TYPES)}")
    return prompt, options


def _typed(name: str, text: str) -> Any:
    early = {"true": True, "false": False, "never": "never"}
    try:
        if _TYPES[name] == "int":
            return int(text)
        return float(text) if _TYPES[name] == "float" else early[text]
    except (ValueError, KeyError):
        refuse(f"{name} cannot be {text[:100]!r}")
