"""`capexport serve` and the clients that it is for."""

import asyncio
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import default_signals, draw_photo
from serving import (
    Running,
    artifact,
    as_uri,
    captioner,
    in_base64,
    question,
    running,
)

from capexport import Captioner
from capexport.cli import main
from capexport.errors import ArtifactError, OptionError
from capexport.serve import application
from capexport.serve.settings import Settings

ollama = pytest.importorskip("ollama", reason="a client of the extra dev")
openai = pytest.importorskip("openai", reason="a client of the extra dev")

__all__ = ["artifact", "captioner"]  # fixtures


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    draw_photo(1).save(path, quality=95)
    return path


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Running]:
    with running(model=str(artifact), threads=2) as found:
        yield found


@pytest.fixture(scope="module")
def wanted(captioner: Captioner, photo: Path):
    return captioner.caption(photo)


@pytest.fixture
def ollamas(server: Running) -> Any:
    return ollama.Client(f"http://{server.address}")


@pytest.fixture
def openais(server: Running) -> Any:
    return openai.OpenAI(base_url=f"http://{server.address}/v1", api_key="none", max_retries=0)


# Ollama


def test_ollama_generates(ollamas, photo: Path, wanted):
    answer = ollamas.generate("capexport", "Describe this image.", images=[str(photo)])
    assert answer.response == wanted.text
    assert answer.done and answer.done_reason in ("stop", "length")
    assert answer.eval_count == len(wanted.tokens)
    assert answer.total_duration >= answer.eval_duration > 0


def test_ollama_streams_by_default(server: Running, ollamas, photo: Path, wanted):
    parts = list(ollamas.generate("capexport:latest", images=[photo.read_bytes()], stream=True))
    assert "".join(part.response for part in parts) == wanted.text
    assert [part.done for part in parts] == [False, True]
    body = {"model": "capexport", "images": [in_base64(photo)]}
    status, text, headers = server.ask("POST", "/api/generate", body)
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    assert [json.loads(line)["done"] for line in text.splitlines()] == [False, True]


def test_ollama_chats(ollamas, photo: Path, wanted):
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "What is this?", "images": [str(photo)]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "Are you sure?"},
    ]
    answer = ollamas.chat("capexport", messages)
    assert (answer.message.role, answer.message.content) == ("assistant", wanted.text)
    parts = list(ollamas.chat("capexport", messages, stream=True))
    assert "".join(part.message.content for part in parts) == wanted.text


def test_ollama_options(ollamas, captioner: Captioner, photo: Path, wanted):
    short = ollamas.generate("capexport", images=[photo], options={"num_predict": 2, "seed": 3})
    assert short.response == captioner.caption(photo, max_tokens=2).text
    assert short.done_reason == "length"
    for endless in (0, -1, -2):
        answer = ollamas.generate("capexport", images=[photo], options={"num_predict": endless})
        assert answer.response == wanted.text
    word = wanted.text.split()[2]
    stopped = ollamas.generate("capexport", images=[photo], options={"stop": [word]})
    assert stopped.response == wanted.text[: wanted.text.index(word)]
    options = {"stop": [word], "num_predict": 4}  # it ends before the limit is reached
    assert ollamas.generate("capexport", images=[photo], options=options).done_reason == "stop"


def test_ollama_formats(ollamas, photo: Path, wanted):
    answer = ollamas.generate("capexport", images=[photo], format="json")
    assert json.loads(answer.response) == {"caption": wanted.text}
    schema = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    answer = ollamas.generate("capexport", images=[photo], format=schema)
    assert json.loads(answer.response) == {"title": wanted.text}
    schema["properties"]["title"]["type"] = "integer"
    with pytest.raises(ollama.ResponseError, match="schema") as caught:
        ollamas.generate("capexport", images=[photo], format=schema)
    assert caught.value.status_code == 400


def test_ollama_lists_and_shows(server: Running, ollamas):
    [model] = ollamas.list().models
    assert model.model == "capexport:latest"
    assert model.size > 0 and re.fullmatch("[0-9a-f]{64}", model.digest)
    assert ollamas.ps().models[0].model == model.model
    shown = ollamas.show("capexport")
    assert shown.capabilities == ["completion", "vision"]
    assert shown.details.family == "cnn-lstm"
    assert server.ask("GET", "/api/version")[1]["version"]


def test_ollama_loads_a_model_without_an_image(ollamas):
    answer = ollamas.generate("capexport")
    assert (answer.response, answer.done, answer.done_reason) == ("", True, "load")
    assert ollamas.chat("capexport", []).done_reason == "load"


def test_ollama_knows_no_other_model(ollamas, photo: Path):
    for ask in (ollamas.generate, ollamas.chat, ollamas.show):
        with pytest.raises(ollama.ResponseError, match="not found") as caught:
            ask("llava")
        assert caught.value.status_code == 404


def test_photoprism(server: Running, photo: Path, wanted):
    """What its vision service sends: the fields of its `ApiRequest`, in its order."""
    body = {
        "id": "5a4b0f4c-8d5d-4b0f-8f0f-2a3c0a1f5a4b",
        "model": "capexport:latest",
        "prompt": "Create a caption with exactly one sentence in the active voice.",
        "suffix": "",
        "options": {"temperature": 0.1, "top_p": 0.9, "stop": ["\n\n"]},
        "stream": False,
        "images": [in_base64(photo)],
    }
    status, answer, _ = server.ask("POST", "/api/generate", body)
    assert status == 200
    assert answer["response"] == wanted.text
    assert re.fullmatch(r"[0-9-]+T[0-9:.]+Z", answer["created_at"])
    assert all(isinstance(answer[name], int) for name in answer if name.endswith("duration"))


# OpenAI


def test_openai_completes(openais, photo: Path, wanted):
    answer = openais.chat.completions.create(model="capexport", messages=question(photo))
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens == len(wanted.tokens) == answer.usage.total_tokens


def test_openai_streams(openais, photo: Path, wanted):
    events = list(
        openais.chat.completions.create(
            model="capexport",
            messages=question(photo),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    said = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(said) == wanted.text
    assert events[-1].usage.completion_tokens == len(wanted.tokens)
    assert events[-2].choices[0].finish_reason


def test_openai_options(openais, captioner: Captioner, photo: Path, wanted):
    def ask(**options):
        return openais.chat.completions.create(
            model="capexport", messages=question(photo), **options
        )

    short = captioner.caption(photo, max_tokens=2).text
    for option in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        [choice] = ask(**option, temperature=0.7).choices
        assert (choice.message.content, choice.finish_reason) == (short, "length")
    [choice] = ask(max_tokens=4, stop=wanted.text.split()[2]).choices
    assert (len(choice.message.content.split()), choice.finish_reason) == (2, "stop")
    assert ask(max_tokens=4096, seed=1).choices[0].message.content == wanted.text
    beams = captioner.caption(photo, num_beams=3, num_return_sequences=3)
    texts = [choice.message.content for choice in ask(n=3).choices]
    assert texts == [one.text for one in beams.alternatives]
    answer = ask(response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content) == {"caption": wanted.text}


def test_openai_parses_into_a_class(openais, photo: Path, wanted):
    from pydantic import BaseModel

    class Described(BaseModel):
        description: str

    answer = openais.chat.completions.parse(
        model="capexport", messages=question(photo), response_format=Described
    )
    assert answer.choices[0].message.parsed == Described(description=wanted.text)


def test_several_images_give_a_line_each(openais, ollamas, captioner, photos: list[Path]):
    text = "\n".join(caption.text for caption in captioner.caption(photos[:3]))
    answer = openais.chat.completions.create(model="capexport", messages=question(*photos[:3]))
    assert answer.choices[0].message.content == text
    assert ollamas.generate("capexport", images=photos[:3]).response == text


def test_openai_errors(openais, photo: Path):
    def ask(model="capexport", messages=None, **options):
        openais.chat.completions.create(
            model=model, messages=messages or question(photo), **options
        )

    with pytest.raises(openai.NotFoundError) as caught:
        ask(model="gpt-4o")
    assert (caught.value.code, caught.value.type) == ("model_not_found", "invalid_request_error")
    refused = [
        {"messages": question()},
        {"n": 0},
        {"n": 99},
        {"max_tokens": 0},
        {"logprobs": True},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "describe"}}},
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "does not exist"}]}]},
        {"response_format": {"type": "xml"}},
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}]}]},
    ]  # fmt: skip
    for options in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(**options)
        assert caught.value.code is None
    with pytest.raises(openai.NotFoundError):
        openais.models.retrieve("gpt-4o")


def test_openai_lists(openais):
    assert [model.id for model in openais.models.list()] == ["capexport"]
    assert openais.models.retrieve("capexport").id == "capexport"


def asked_of_responses(*photos: Path, **options: Any) -> dict[str, Any]:
    parts = [{"type": "input_image", "image_url": as_uri(photo)} for photo in photos]
    content = [{"type": "input_text", "text": "What is this?"}, *parts]
    return {"model": "capexport", "input": [{"role": "user", "content": content}], **options}


def test_openai_responds(openais, captioner: Captioner, photo: Path, photos, wanted):
    answer = openais.responses.create(**asked_of_responses(photo))
    assert (answer.output_text, answer.status) == (wanted.text, "completed")
    assert answer.usage.output_tokens == len(wanted.tokens) == answer.usage.total_tokens
    short = openais.responses.create(**asked_of_responses(photo, max_output_tokens=2))
    assert short.output_text == captioner.caption(photo, max_tokens=2).text
    assert short.incomplete_details.reason == "max_output_tokens"
    several = openais.responses.create(**asked_of_responses(*photos[:2]))
    assert several.output_text == "\n".join(one.text for one in captioner.caption(photos[:2]))
    turns = asked_of_responses(photo)["input"]
    turns += answer.to_dict()["output"] + [{"role": "user", "content": "Are you sure?"}]
    assert openais.responses.create(model="capexport", input=turns).output_text == wanted.text


def test_openai_streams_responses(openais, photo: Path, wanted):
    for limit, status in ((None, "completed"), (2, "incomplete")):
        with openais.responses.stream(
            **asked_of_responses(photo, max_output_tokens=limit)
        ) as stream:
            events = list(stream)
        whole = events[-1].response
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].type == f"response.{status}"
        said = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(said) == whole.output_text
        assert wanted.text.startswith(whole.output_text) and whole.output_text


def test_openai_parses_responses_into_a_class(openais, photo: Path, wanted):
    from pydantic import BaseModel

    class Described(BaseModel):
        description: str

    answer = openais.responses.parse(**asked_of_responses(photo), text_format=Described)
    assert answer.output_parsed == Described(description=wanted.text)


def test_openai_refuses_responses(openais, photo: Path):
    refused = [
        {"input": "no image"}, {"input": None}, {"input": [1]}, {"input": {}},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": [{"content": [{"type": "input_file", "file_id": "a"}]}]},
        {"input": [{"content": [{"type": "input_image", "file_id": "a"}]}]},
        {"input": [{"type": []}]}, {"previous_response_id": "resp_1"}, {"background": True},
        {"max_output_tokens": "9"}, {"max_output_tokens": 0}, {"tool_choice": "required"},
        {"include": ["message.output_text.logprobs"]}, {"include": [1]}, {"top_logprobs": 2},
        {"text": 1}, {"text": {"format": 1}}, {"text": {"format": {"type": "json_schema"}}},
        {"text": {"format": {"type": []}}}, {"stream": "yes"},
    ]  # fmt: skip
    for options in refused:
        with pytest.raises(openai.BadRequestError):
            openais.responses.create(**{**asked_of_responses(photo), **options})
    with pytest.raises(openai.NotFoundError):
        openais.responses.create(**asked_of_responses(photo, model="gpt-5"))


# Its own protocol


def test_a_raw_image(server: Running, photo: Path, captioner: Captioner, wanted):
    status, answer, _ = server.ask("POST", "/caption", photo.read_bytes())
    assert status == 200
    assert answer["text"] == wanted.text
    assert answer["tokens"] == list(wanted.tokens)
    assert answer["log_probability"] == pytest.approx(wanted.log_probability, abs=1e-4)
    beams = captioner.caption(photo, num_beams=3, num_return_sequences=2, max_tokens=5)
    path = "/caption?num_beams=3&num_return_sequences=2&max_tokens=5"
    answer = server.ask("POST", path, photo.read_bytes(), content_type="image/jpeg")[1]
    assert [one["text"] for one in answer["alternatives"]] == [o.text for o in beams.alternatives]


def form(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, str]:
    """A multipart body, and its content type."""
    lines = []
    for name, file, content in parts:
        named = f'; filename="{file}"' if file is not None else ""
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        lines += [head.encode(), content, b"\r\n"]
    return b"".join(lines) + b"--x--\r\n", "multipart/form-data; boundary=x"


def test_files_of_a_form(server: Running, captioner: Captioner, photos: list[Path]):
    parts = [("file", path.name, path.read_bytes()) for path in photos]
    parts.insert(2, ("file", "bad\n.jpg", b"no image"))
    body, kind = form(("max_tokens", None, b"3"), *parts)
    status, answer, _ = server.ask("POST", "/caption", body, content_type=kind)
    assert status == 200
    [bad] = [row for row in answer["captions"] if "error" in row]
    assert answer["captions"].index(bad) == 2
    good = [(row["file_name"], row["text"]) for row in answer["captions"] if row is not bad]
    captions = captioner.caption(photos, max_tokens=3)
    assert good == [(p.name, c.text) for p, c in zip(photos, captions, strict=True)]
    body, kind = form(("file", "a.jpg", b"no image"), ("file", "b.jpg", b""))
    status, answer, _ = server.ask("POST", "/caption", body, content_type=kind)
    assert status == 400 and len(answer["captions"]) == 2 and answer["error"]


def test_what_a_caption_cannot_be_asked(server: Running, photo: Path):
    image = photo.read_bytes()
    for query in ("max_tokens=0", "max_tokens=x", "num_beams=17", "max_tokens=9999", "beams=2",
                  "prompt=a", "early_stopping=maybe", "repetition_penalty=nan"):  # fmt: skip
        status, answer, _ = server.ask("POST", f"/caption?{query}", image)
        assert (status, list(answer)) == (400, ["error"]), query
    assert server.ask("POST", "/caption", b"")[0] == 400
    assert server.ask("POST", "/caption", {"image": "x"}, content_type="application/json")[0] == 415
    body, kind = form(("max_tokens", None, b"3"))
    assert server.ask("POST", "/caption", body, content_type=kind)[0] == 400
    stripped = image.translate(None, b"\0\r\n")  # as `curl -d @photo.jpg` sends a file
    kind = "application/x-www-form-urlencoded"
    status, answer, _ = server.ask("POST", "/caption", stripped, content_type=kind)
    assert status == 415 and "--data-binary" in answer["error"]
    assert server.ask("POST", "/caption", image, content_type=kind)[0] == 200
    body, kind = form(("file", None, image + bytes(2_000_000)))
    status, answer, _ = server.ask("POST", "/caption", body, content_type=kind)
    assert status == 400 and "filename" in answer["error"]
    assert server.ask("GET", "/caption")[0] == 405
    assert server.ask("POST", "/nothing", image)[0] == 404


def test_health_and_metrics(server: Running, photo: Path):
    assert server.ask("GET", "/health")[1]["status"] == "ok"
    server.ask("POST", "/caption", photo.read_bytes())
    server.ask("GET", "/made/up")
    status, text, headers = server.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(samples['capexport_requests_total{path="/caption",status="200"}']) > 0
    assert int(samples['capexport_requests_total{path="other",status="404"}']) > 0
    assert samples["capexport_queue_images"] == "0"
    for path in ("/caption", "/metrics"):
        last = f'capexport_request_seconds_bucket{{path="{path}",le="+Inf"}}'
        count = f'capexport_request_seconds_count{{path="{path}"}}'
        assert samples.get(last) == samples.get(count)
    assert "/made/up" not in text


def test_the_page(server: Running):
    status, text, headers = server.ask("GET", "/", host="localhost")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "http://localhost/caption" in text


# Prompts


@pytest.fixture(scope="module")
def blip2() -> str:
    pytest.importorskip("tokenizers")
    from conftest import COMMITTED

    return str(COMMITTED / "opt")


def test_prompts_are_ignored_unless_asked_for(blip2: str, photo: Path):
    captioner = Captioner.load(blip2)
    text = "a dog"
    plain, prompted = captioner.caption(photo), captioner.caption(photo, prompt=text)
    assert plain.tokens != prompted.tokens
    for prompts in (False, True):
        with running(model=blip2, prompts=prompts) as server:
            body = {"model": "capexport", "messages": question(photo, text=text)}
            status, answer, _ = server.ask("POST", "/v1/chat/completions", body)
            caption = prompted if prompts else plain
            assert status == 200
            assert answer["choices"][0]["message"]["content"] == caption.text
            framed = captioner.text.frame([text] if prompts else None, 1, 1)
            assert answer["usage"]["prompt_tokens"] == framed.mask.sum()
            body = {"model": "capexport", "prompt": text, "images": [in_base64(photo)]}
            answer = server.ask("POST", "/api/generate", {**body, "stream": False})[1]
            assert answer["response"] == caption.text
            # The question of a request in capexport's own protocol is always meant.
            answer = server.ask("POST", "/caption?prompt=a+dog", photo.read_bytes())[1]
            assert answer["text"] == prompted.text


def test_a_prompt_that_is_too_long_costs_no_other_one(blip2: str, photos: list[Path]):
    captioner = Captioner.load(blip2)
    prompts = ["a dog", "the cat " * 500, "a man", "in \ud800", "on snow"]
    with running(model=blip2, prompts=True) as server, ThreadPoolExecutor(5) as pool:
        bodies = [
            {"model": "capexport", "prompt": prompt, "images": [in_base64(path)], "stream": False}
            for prompt, path in zip(prompts, photos, strict=False)
        ]
        ask = lambda body: server.ask("POST", "/api/generate", body)  # noqa: E731
        answers = list(pool.map(ask, bodies))
    assert [status for status, *_ in answers] == [200, 400, 200, 400, 200]
    for index in (0, 2, 4):
        caption = captioner.caption(photos[index], prompt=prompts[index])
        assert answers[index][1]["response"] == caption.text


def test_prompts_of_megabytes_are_not_made_into_tokens(blip2: str, photo: Path):
    with running(model=blip2, prompts=True) as server:
        server.service.captioner.text = None  # type: ignore[assignment]
        long = "dog " * 5_000_000
        body = {"model": "capexport", "messages": question(photo, text=long)}
        status, answer, _ = server.ask("POST", "/v1/chat/completions", body)
        assert status == 400 and "characters" in answer["error"]["message"]
        body, kind = form(("prompt", None, long.encode()), ("file", "a.jpg", photo.read_bytes()))
        assert server.ask("POST", "/caption", body, content_type=kind)[0] == 400


def test_prompts_need_a_model_for_them(artifact: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "-m", str(artifact), "--prompts", "--port", "0"]) == 2
    assert "--prompts" in capsys.readouterr().err


# Many at once


def test_many_clients_of_all_kinds(artifact: Path, captioner: Captioner, photos: list[Path]):
    wanted = [caption.text for caption in captioner.caption(photos)]
    short = [caption.text for caption in captioner.caption(photos, max_tokens=2)]

    def ask(number: int) -> bool:
        index, kind = number % len(photos), number % 5
        photo = photos[index]
        if kind == 0:
            status, answer, _ = server.ask("POST", "/caption", photo.read_bytes())
            return (status, answer["text"]) == (200, wanted[index])
        if kind == 1:
            body = {"model": "capexport", "images": [in_base64(photo)], "stream": False}
            body["options"] = {"num_predict": 2}
            status, answer, _ = server.ask("POST", "/api/generate", body)
            return (status, answer["response"]) == (200, short[index])
        if kind == 2:
            body = {"model": "capexport", "messages": question(photo)}
            status, answer, _ = server.ask("POST", "/v1/chat/completions", body)
            return (status, answer["choices"][0]["message"]["content"]) == (200, wanted[index])
        if kind == 3:
            return server.ask("POST", "/caption", photo.read_bytes()[:200])[0] == 400
        body = {"model": "capexport", "images": ["!" + in_base64(photo)]}
        return server.ask("POST", "/api/generate", body)[0] == 400

    with running(model=str(artifact), threads=2) as server, ThreadPoolExecutor(32) as pool:
        assert all(pool.map(ask, range(320)))
        assert server.service.batcher.held == 0


@pytest.fixture
def held(
    artifact: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Running, threading.Event, threading.Event]]:
    """A server with two places, whose captions wait: it, that one has begun, and what lets go."""
    with running(model=str(artifact), queue=getattr(request, "param", 2), threads=1) as server:
        captioner = server.service.captioner
        caption = captioner.caption_pixels
        begun, go = threading.Event(), threading.Event()

        def slowly(*args, **options):
            begun.set()
            assert go.wait(60)
            return caption(*args, **options)

        captioner.caption_pixels = slowly
        yield server, begun, go
        go.set()


@pytest.mark.parametrize("held", [100], indirect=True)
def test_requests_that_wait_are_captioned_together(held, captioner, photos: list[Path]):
    server, begun, go = held

    def ask(number: int) -> str:
        """Whatever the protocol is."""
        photo = photos[number % 12]
        body = {"model": "capexport", "stream": False, "images": [in_base64(photo)]}
        if number % 3 == 0:
            return server.ask("POST", "/caption", photo.read_bytes())[1]["text"]
        if number % 3 == 1:
            return server.ask("POST", "/api/generate", body)[1]["response"]
        body["messages"] = question(photo)
        answer = server.ask("POST", "/v1/chat/completions", body)[1]
        return answer["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(25) as pool:
        answers = [pool.submit(ask, number) for number in range(24)]
        short = pool.submit(server.ask, "POST", "/caption?max_tokens=2", photos[0].read_bytes())
        assert begun.wait(60)
        while server.service.batcher.held < 25:
            time.sleep(0.01)
        go.set()
        texts = [answer.result() for answer in answers]
    assert texts == [caption.text for caption in captioner.caption(photos * 2)]
    assert short.result()[1]["text"] == captioner.caption(photos[0], max_tokens=2).text
    text = server.ask("GET", "/metrics")[1]
    assert int(re.search(r"^capexport_batch_images_count (\d+)$", text, re.M)[1]) <= 4


def test_a_full_queue(held, photo: Path, wanted):
    server, begun, go = held
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.ask, "POST", "/caption", photo.read_bytes())
        assert begun.wait(60)
        second = pool.submit(server.ask, "POST", "/caption", photo.read_bytes())
        while server.service.batcher.held < 2:
            time.sleep(0.01)
        status, answer, headers = server.ask("POST", "/caption", photo.read_bytes())
        assert status == 429 and int(headers["retry-after"]) > 0 and "later" in answer["error"]
        status, answer, _ = server.ask(
            "POST", "/v1/chat/completions", {"model": "capexport", "messages": question(photo)}
        )
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        # The rest goes on.
        assert server.ask("GET", "/health")[0] == 200
        assert "capexport_queue_images 2" in server.ask("GET", "/metrics")[1]
        body, kind = form(*[("file", "a.jpg", photo.read_bytes())] * 3)
        assert server.ask("POST", "/caption", body, content_type=kind)[0] in (400, 413)
        go.set()
        for answer in (first, second):
            assert answer.result()[1]["text"] == wanted.text


def test_a_client_that_leaves(held, photo: Path, wanted):
    import http.client

    server, begun, go = held
    leaving = [http.client.HTTPConnection(server.address) for _ in range(2)]
    for connection in leaving:
        connection.request("POST", "/caption", photo.read_bytes())
    assert begun.wait(60)
    while server.service.batcher.held < 2:
        time.sleep(0.01)
    for connection in leaving:
        connection.close()
    while server.service.batcher.held:  # their places are free, though one is still captioned
        time.sleep(0.01)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, "POST", "/caption", photo.read_bytes())
        go.set()
        assert answer.result()[1]["text"] == wanted.text
    assert 'status="499"} 2' in server.ask("GET", "/metrics")[1]


def test_a_failure_in_the_model_is_the_servers(artifact: Path, photo: Path, wanted):
    with running(model=str(artifact), threads=1) as server:
        captioner = server.service.captioner
        caption = captioner.caption_pixels

        def fail(*_, **__):
            captioner.caption_pixels = caption
            raise MemoryError

        def fail_in_a_file(*_, **__):
            captioner.caption_pixels = caption
            raise ArtifactError("/secret/encoder.onnx: onnxruntime failed in it")

        captioner.caption_pixels = fail
        status, answer, _ = server.ask("POST", "/caption", photo.read_bytes())
        assert status == 500 and "error" in answer
        captioner.caption_pixels = fail_in_a_file
        status, answer, _ = server.ask("POST", "/caption", photo.read_bytes())
        assert status == 500 and "secret" not in answer["error"]
        assert server.ask("POST", "/caption", photo.read_bytes())[1]["text"] == wanted.text


# Starting and ending


def start(*arguments: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """The command in a process of its own, and its address."""
    import os

    process = subprocess.Popen(
        [sys.executable, "-m", "capexport", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=default_signals,
    )
    for line in process.stderr:
        if found := re.search(r"serving \S+ on http://(\S+)", line):
            return process, found[1]
    raise AssertionError(f"it ended with {process.wait()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_when_all_is_answered(artifact: Path, captioner, photos, number: int):
    process, address = start("-m", str(artifact), "--threads", "1")
    server = Running(address, None)
    wanted = {caption.text for caption in captioner.caption(photos, num_beams=16)}
    parts = [("file", path.name, path.read_bytes()) for path in photos * 2]
    body, kind = form(("num_beams", None, b"16"), *parts)
    with ThreadPoolExecutor(4) as pool:
        waiting = [
            pool.submit(server.ask, "POST", "/caption", body, content_type=kind) for _ in range(4)
        ]
        while "capexport_queue_images 96" not in server.ask("GET", "/metrics")[1]:
            assert not all(answer.done() for answer in waiting), "too fast to be met at work"
            time.sleep(0.005)
        process.send_signal(number)
        answers = [answer.result() for answer in waiting]
    assert process.wait(60) == 0
    assert process.stderr.read() == ""
    for status, answer, _ in answers:
        assert status == 200
        assert {row["text"] for row in answer["captions"]} == wanted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_as_soon_as_it_serves(artifact: Path, number: int):
    process, _ = start("-m", str(artifact))
    process.send_signal(number)
    assert (process.wait(60), process.stderr.read()) == (0, "")


def test_the_environment_says_what_flags_say(artifact: Path, photo: Path, wanted):
    process, address = start(
        CAPEXPORT_MODEL=str(artifact), CAPEXPORT_API_KEY="secret", CAPEXPORT_NAME="mine"
    )
    try:
        server = Running(address, None)
        assert server.ask("GET", "/health")[1]["model"] == "mine"
        assert server.ask("POST", "/caption", photo.read_bytes())[0] == 401
        key = "Bearer secret"
        answer = server.ask("POST", "/caption", photo.read_bytes(), authorization=key)[1]
        assert answer["text"] == wanted.text
    finally:
        process.terminate()
        process.communicate()


def test_other_asgi_servers(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CAPEXPORT_MODEL", str(artifact))
    monkeypatch.setenv("CAPEXPORT_QUEUE", "5")
    service = application().state.service
    assert service.captioner.folder == artifact
    assert service.settings.queue == 5
    for name, value in [("QUEUE", "many"), ("ALLOW_URLS", "perhaps"), ("MAX_BODY", "0")]:
        with monkeypatch.context() as own:
            own.setenv(f"CAPEXPORT_{name}", value)
            with pytest.raises(OptionError):
                Settings.from_environment()


@pytest.mark.parametrize("root_path", ["", "/photos"])
def test_below_another_application(artifact: Path, root_path: str):
    app = application(Settings(model=str(artifact), api_key="secret", root_path=root_path))

    def ask(path: str) -> tuple[int, bytes]:
        answers: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            answers.append(message)

        scope = {"type": "http", "method": "GET", "query_string": b"", "headers": []}
        asyncio.run(app({**scope, "path": path, "root_path": "/outer"}, receive, send))
        return answers[0]["status"], answers[1]["body"]

    assert ask(f"/outer{root_path}/health")[0] == 200
    assert f"/outer{root_path}/caption".encode() in ask(f"/outer{root_path}/")[1]
    status, answer = ask(f"/outer{root_path}/v1/models")
    assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")
    assert 'path="/health"' in app.state.service.metrics.text({})


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--port", "99999"], "99999"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--queue", "0"], "--queue"),
        (["--api-key", "with space"], "API key"),
        (["--site", "missing"], "missing"),
        (["--root-path", "no-slash"], "--root-path"),
        (["--allow-origin", "nonsense"], "--allow-origin"),
        (["--allow-origin", "https://Photos.example"], "--allow-origin"),
        (["--allow-host", "Photos.example"], "--allow-host"),
        (["--allow-host", "photos.example:8000"], "--allow-host"),
        (["-m", "missing"], "missing"),
        (["--num-beams", "0"], "num_beams"),
        (["--name", "a b"], "--name"),
    ],
)
def test_what_is_refused_at_the_start(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--port", "0", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("capexport: ") and said in line


def test_a_port_that_is_taken(server: Running, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "--port", server.address.rpartition(":")[2]]) == 2
    assert "in use" in capsys.readouterr().err


def test_the_extra_is_named(tmp_path: Path, artifact: Path):
    code = (
        "import sys; sys.modules.update(uvicorn=None)\n"
        "from capexport.cli import main; sys.exit(main(['serve']))"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 2
    assert "capexport[cpu,serve]" in outcome.stderr


def test_decoding_of_the_server(artifact: Path, captioner: Captioner, photo: Path):
    with running(model=str(artifact), decoding={"max_tokens": 3}) as server:
        answer = server.ask("POST", "/caption", photo.read_bytes())[1]
        assert answer["text"] == captioner.caption(photo, max_tokens=3).text
        answer = server.ask("POST", "/caption?max_tokens=4", photo.read_bytes())[1]
        assert answer["text"] == captioner.caption(photo, max_tokens=4).text


def readme_section() -> str:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    return text.partition("\n## A server\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("number, most", [(0, 30), (1, 20)])
def test_python_in_the_readme(
    number: int, most: int, server: Running, photo: Path, captioner: Captioner, capsys, monkeypatch
):
    monkeypatch.chdir(photo.parent)
    code = re.findall(r"^```python\n(.*?)^```$", readme_section(), re.M | re.S)[number]
    exec(code.replace("127.0.0.1:8000", server.address), {})
    assert capsys.readouterr().out == f"{captioner.caption(photo, max_tokens=most).text}\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_commands_in_the_readme(server: Running, photo: Path, captioner: Captioner, wanted):
    commands = [line for line in readme_section().splitlines() if line.startswith("curl")]
    answers = [
        json.loads(
            subprocess.run(
                shlex.split(command.replace("127.0.0.1:8000", server.address)),
                capture_output=True,
                check=True,
                cwd=photo.parent,
            ).stdout
        )
        for command in commands
    ]
    assert answers[0]["text"] == wanted.text
    texts = [row["text"] for row in answers[1]["captions"]]
    assert texts == [captioner.caption(photo, max_tokens=12).text] * 2
