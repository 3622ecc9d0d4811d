"""What a server must withstand: broken and hostile requests, slow clients, foreign pages."""

import base64
import gzip
import io
import json
import logging
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import draw_photo
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
from capexport import captioner as captioning
from capexport.cli import serve
from capexport.serve import gate
from capexport.serve.metrics import Histogram
from capexport.serve.requests import from_base64

__all__ = ["artifact", "captioner"]  # fixtures


@pytest.fixture(scope="module")
def photo() -> bytes:
    buffer = io.BytesIO()
    draw_photo(2).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Running]:
    with running(model=str(artifact), threads=2, max_body=1, max_pixels=1) as found:
        yield found


@pytest.fixture(autouse=True)
def still_well(server: Running, captioner: Captioner, photo: bytes) -> Iterator[None]:
    yield
    answer = server.ask("POST", "/caption", photo)[1]
    assert answer["text"] == captioner.caption(photo).text
    assert server.service.batcher.held == 0


JSON_PATHS = ("/api/generate", "/api/chat", "/api/show", "/v1/chat/completions", "/v1/responses")


@pytest.mark.parametrize("path", JSON_PATHS)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"model"', b"\xff\xfe\x00", b'{"model": NaN}', b"[" * 50_000,
     b'{"a":' * 50_000, b'{"model": 1' + b"0" * 5000 + b"}", b'{"model": []}', b'{"model": ""}',
     b'{"model": {"name": "capexport"}}', b"{}", b'{"model": true}'],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_broken_json(server: Running, path: str, body: bytes):
    status, answer, _ = server.ask("POST", path, body)
    assert status == 400
    error = answer["error"]
    assert isinstance(error["message"] if path.startswith("/v1") else error, str)


@pytest.mark.parametrize("path", JSON_PATHS)
def test_json_of_very_many_values(server: Running, photo: bytes, path: str):
    """They would keep the event loop busy for seconds, and take much memory."""
    for values in (
        "{}," * 300_000,
        "[]," * 300_000,
        '"",' * 300_000,
        ("[" * 900 + "]" * 900) * 500,
    ):
        body = '{"model": "capexport", "messages": [' + values.rstrip(",") + "]}"
        status, answer, _ = server.ask("POST", path, body.encode())
        assert status == 413 and "too many values" in str(answer["error"])
    body = {"model": "capexport", "images": [in_base64(photo)], "prompt": "and, " * 50_000}
    assert server.ask("POST", "/api/generate", body)[0] == 200


def test_json_that_is_nearly_too_deep(server: Running, photo: bytes):
    """It is read, but deeper in Python's stack not all can be done with it."""
    image = {"type": "input_image", "image_url": as_uri(photo)}
    schema = {"properties": {"a": {"type": "string"}}, "deep": "@"}
    body = {
        "model": "capexport",
        "input": [{"content": [image]}],
        "text": {"format": {"type": "json_schema", "schema": schema}},
    }
    for levels in range(900, 1000, 2):
        text = json.dumps(body).replace('"@"', "[" * levels + "]" * levels)
        head = f"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Length: {len(text)}\r\n\r\n"
        answer = talk(server, head.encode() + text.encode())
        assert b"200 OK" in answer[:20] or b"too many levels" in answer, levels


GENERATE = {"images": ["/9j/"], "stream": False}
WRONG = [
    ("/api/generate", {**GENERATE, **change})
    for change in (
        {"images": "text"}, {"images": [1]}, {"images": {"a": 1}}, {"images": [["/9j/"]]},
        {"images": ["???"]}, {"images": [""]}, {"images": ["/9j/"]}, {"images": ["é"]},
        {"images": ["data:image/png,abc"]}, {"images": ["data:"]}, {"images": ["file:///etc/passwd"]},
        {"images": ["http://example.com/a.jpg"]}, {"stream": "yes"}, {"stream": 1}, {"prompt": 5},
        {"options": []}, {"options": {"num_predict": "5"}}, {"options": {"num_predict": True}},
        {"options": {"num_predict": 1e300}}, {"options": {"num_predict": 0.5}},
        {"options": {"stop": "x"}}, {"options": {"stop": [1]}}, {"format": "xml"}, {"format": 1},
        {"format": {"properties": []}}, {"format": {"required": [1]}},
        {"format": {"type": "array"}},
        {"format": {"properties": {"a": 1}}}, {"logprobs": True}, {"prompt": "x", "images": []},
    )
] + [
    ("/api/chat", {"messages": messages})
    for messages in (
        {"role": "user"}, [1], ["x"], [{"role": 1}], [{"content": []}], [{"images": "x"}],
        [{"role": "user", "content": "no image"}], [{"images": [None]}],
    )
] + [
    ("/v1/chat/completions", {"messages": messages})
    for messages in (
        None, [], "x", {"a": 1}, [[]], [{"role": 1}], [{"content": 1}], [{"content": ["x"]}],
        [{"content": [{"type": "image_url"}]}],
        [{"content": [{"type": "image_url", "image_url": 1}]}],
        [{"content": [{"type": "image_url", "image_url": {"url": 1}}]}], [{"content": [{}]}],
        [{"content": [{"type": "image_url", "image_url": {"url": "/9j/"}}]}],
        [{"content": [{"type": "text", "text": {}}]}], [{"content": [{"type": []}]}],
    )
]  # fmt: skip


@pytest.mark.parametrize("path, content", WRONG, ids=lambda value: json.dumps(value)[:60])
def test_wrong_types_everywhere(server: Running, path: str, content: dict):
    status, answer, _ = server.ask("POST", path, {"model": "capexport", **content})
    assert (status, list(answer)) == (400, ["error"])


@pytest.mark.parametrize(
    "change",
    [{"n": "2"}, {"n": 1.5}, {"n": True}, {"n": -1}, {"max_tokens": "9"}, {"stream": "true"},
     {"max_completion_tokens": []}, {"stop": [1]}, {"stop": {}}, {"response_format": "json"},
     {"stream_options": 1}, {"response_format": {"type": "json_schema", "json_schema": 1}}],
    ids=json.dumps,
)  # fmt: skip
def test_wrong_options(server: Running, photo: bytes, change: dict, tmp_path: Path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo)
    content = {"model": "capexport", "messages": question(path), **change}
    status, answer, _ = server.ask("POST", "/v1/chat/completions", content)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(3_100_000)))
        + chunk(b"IEND", b"")
    )


def test_images_that_are_none(server: Running, photo: bytes):
    for image in (b"no image", photo[:300], bomb(60_000, 60_000), bomb(1100, 1000), bomb(5000, 1)):
        status, answer, _ = server.ask("POST", "/caption", image)
        assert status == 400 and "error" in answer
        body = {"model": "capexport", "images": [in_base64(image)]}
        assert server.ask("POST", "/api/generate", body)[0] == 400
    assert server.ask("POST", "/caption", bomb(1000, 1000))[0] == 200  # that many are allowed


PART = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\n'


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/form-data; boundary=x",
             f"multipart/form-data; boundary={'y' * 300}", "multipart/form-data; boundary="],
    ids=lambda kind: kind[-12:],
)  # fmt: skip
@pytest.mark.parametrize(
    "body",
    [b"", b"--x", b"--x--", b"garbage", PART + b"abc", PART + b"abc\r\n--x--\r\n",
     b"--x\r\nfoo\r\n\r\n",
     b'--x\r\nContent-Disposition: form-data; filename="a"\r\n\r\nabc\r\n--x--\r\n',
     (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 200) + b"--x--",
     PART.replace(b"a.jpg", b"a" * 100_000) + b"abc\r\n--x--\r\n"],
    ids=lambda body: repr(body[-20:]),
)  # fmt: skip
def test_broken_forms(server: Running, kind: str, body: bytes):
    status, answer, _ = server.ask("POST", "/caption", body, content_type=kind)
    assert status == 400 and "error" in answer


def test_a_form_that_breaks_off_loses_no_file_silently(server: Running, photo: bytes):
    body = PART + photo + b"\r\n" + PART + photo
    kind = "multipart/form-data; boundary=x"
    status, answer, _ = server.ask("POST", "/caption", body, content_type=kind)
    assert status == 400 and "breaks off" in answer["error"]
    status, answer, _ = server.ask("POST", "/caption", body + b"\r\n--x--", content_type=kind)
    assert status == 200 and len(answer["captions"]) == 2


def talk(server: Running, *parts: bytes, timeout: float = 30) -> bytes:
    """Send bytes as they are; what comes back until the end, or the first whole answer."""
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while data := connection.recv(65536):
            answer += data
            head, end, body = answer.partition(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if b"content-length" in line]
            if end and length and len(body) >= int(length[0].split(b":")[1]):
                break
        return answer


HEAD = b"POST /caption HTTP/1.1\r\nHost: localhost\r\n"


def test_bodies_that_are_compressed(server: Running, photo: bytes):
    for path, body in (("/caption", photo), ("/v1/chat/completions", b"{}")):
        asked = {"content_encoding": "gzip"}
        status, answer, headers = server.ask("POST", path, gzip.compress(body), **asked)
        assert (status, headers["accept-encoding"]) == (415, "identity")
        assert "Content-Encoding" in str(answer["error"])
    assert server.ask("POST", "/caption", photo, content_encoding="Identity")[0] == 200


def test_bodies_that_are_too_large(server: Running):
    for parts in (
        [b"Content-Length: 99999999999\r\n\r\n"],
        [b"Content-Length: 2000000\r\nExpect: 100-continue\r\n\r\n"],
        [b"Content-Length: 2000000\r\n\r\n", *[bytes(100_000)] * 20],
        [b"Transfer-Encoding: chunked\r\n\r\n", *[b"186a0\r\n" + bytes(100_000) + b"\r\n"] * 20,
         b"0\r\n\r\n"],
    ):  # fmt: skip
        assert talk(server, HEAD + parts[0], *parts[1:]).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "parts",
    [(b"\x16\x03\x01\x02\x00\x01\xfc\r\n\r\n",), (b"GET / \r\n\r\n",),
     (HEAD, b"Content-Length: -1\r\n\r\n"), (HEAD, b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
     (HEAD, b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"), (HEAD, b"A: " + b"b" * 100_000)],
    ids=lambda parts: repr(parts[-1][:20]),
)  # fmt: skip
def test_what_is_no_http(server: Running, parts: tuple[bytes, ...]):
    assert talk(server, *parts).startswith(b"HTTP/1.1 400 ")


def test_slow_clients_keep_nobody_waiting(
    server: Running, photo: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gate, "_PAUSE", 0.5)
    results: list[bytes] = []
    head = HEAD + b"Content-Length: 1000\r\n\r\nabc"
    slow = [threading.Thread(target=lambda: results.append(talk(server, head))) for _ in range(20)]
    for thread in slow:
        thread.start()
    assert server.ask("POST", "/caption", photo)[0] == 200
    for thread in slow:
        thread.join()
    assert all(result.startswith(b"HTTP/1.1 408 ") for result in results)


def test_a_body_that_comes_too_slowly_is_refused(server: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "_LONGEST", 0.5)
    host, port = server.address.split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=0.1) as connection:
        connection.sendall(HEAD + b"Content-Length: 60\r\n\r\n")
        while not answer:
            connection.sendall(b"x")
            with suppress(TimeoutError):
                answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "parts",
    [(), (b"GET /health HTTP/1.1\r\nHos",),
     (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /he"),
     (HEAD + b"Content-Length: 99999999999\r\n\r\n", b"abc")],
    ids=["nothing", "half", "and a half", "behind a refusal"],
)  # fmt: skip
def test_who_never_ends_what_he_asks_is_let_go(
    server: Running, parts: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(serve, "_IDLE", 0.2)
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
            if part.endswith(b"\r\n\r\n"):
                assert connection.recv(65536).startswith(b"HTTP/1.1 ")
        with suppress(ConnectionResetError):
            while connection.recv(65536):
                pass


def test_who_takes_no_answer_is_let_go(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "large").write_bytes(bytes(30_000_000))
    monkeypatch.setattr(serve, "_IDLE", 0.2)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with running(model=str(artifact), site=str(tmp_path)) as server:
            host, port = server.address.split(":")
            client.connect((host, int(port)))
            client.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        # The server has ended, though the rest waited.


def test_bodies_together_have_a_limit(server: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "_MAX_BODIES", 2)
    host, port = server.address.split(":")
    held = [socket.create_connection((host, int(port))) for _ in range(2)]
    for connection in held:
        connection.sendall(HEAD + b"Content-Length: 999999\r\n\r\n" + bytes(999_000))
    while server.service.body_bytes < 2 * 999_000:
        time.sleep(0.01)
    status, _, headers = server.ask("POST", "/caption", bytes(500_000))
    assert status == 429 and headers["retry-after"]
    for connection in held:
        connection.close()
    while server.ask("POST", "/caption", bytes(500_000))[0] == 429:
        time.sleep(0.05)


def test_a_large_photo_keeps_nobody_waiting(
    artifact: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch
):
    """While one is decoded, health and other captions are answered."""
    large = photo + b"and more"
    decode, begun, go = captioning.preprocess, threading.Event(), threading.Event()

    def slowly(data: bytes, *args, **options):
        if data == large:
            begun.set()
            assert go.wait(60)
        return decode(data, *args, **options)

    monkeypatch.setattr(captioning, "preprocess", slowly)
    with running(model=str(artifact), threads=2) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, "POST", "/caption", large)
        assert begun.wait(60)
        assert server.ask("GET", "/health")[0] == 200
        assert server.ask("POST", "/caption", photo)[0] == 200
        assert not answer.done()
        go.set()
        assert answer.result()[0] == 200


def test_who_goes_away_takes_no_thread_along(
    artifact: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch
):
    """He goes while his image is read, and nobody else waits."""
    decode, begun, go = captioning.preprocess, threading.Event(), threading.Event()

    def slowly(*args, **options):
        begun.set()
        assert go.wait(60)
        return decode(*args, **options)

    monkeypatch.setattr(captioning, "preprocess", slowly)
    with running(model=str(artifact), threads=1) as server:
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(HEAD + f"Content-Length: {len(photo)}\r\n\r\n".encode() + photo)
            assert begun.wait(60)
        while server.service.batcher.held:
            time.sleep(0.01)
        go.set()
        time.sleep(0.2)  # nobody else waits, still
        assert server.ask("POST", "/caption", photo)[0] == 200


def test_log_lines_and_headers_cannot_be_forged(
    server: Running, photo: bytes, caplog: pytest.LogCaptureFixture
):
    lines: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("capexport")
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(listener)
    try:
        server.ask("POST", "/api/generate", {"model": "x\r\n200 forged\x1b[2J\u202e", "images": []})
        server.ask("GET", "/%0d%0aX-Forged:%20yes/%1b[2J")
        part = PART.replace(b"a.jpg", b"a\xe2\x80\xae\x1b[2J.jpg") + b"no image\r\n--x--\r\n"
        server.ask("POST", "/caption", part, content_type="multipart/form-data; boundary=x")
    finally:
        log.removeHandler(listener)
        log.setLevel(level)
    assert len(lines) >= 2
    assert all(line.isprintable() for line in lines), lines
    answer = talk(server, b"GET /%0d%0aX-Forged:%20yes HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"Forged" not in answer.partition(b"\r\n\r\n")[0]


# Who may ask


def test_the_api_key(artifact: Path, photo: bytes, tmp_path: Path):
    (tmp_path / "index.html").write_text("page")
    with running(model=str(artifact), api_key="secret", site=str(tmp_path)) as server:
        for sent in ("", "Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "Basic secret",
                     "secret", "Bearer Secret", "Bearer s\xe9cret"):  # fmt: skip
            for method, path in [("POST", "/caption"), ("POST", "/v1/chat/completions"),
                                 ("GET", "/api/tags"), ("GET", "/metrics"), ("GET", "/v1/models"),
                                 ("POST", "/nothing")]:  # fmt: skip
                status, _, headers = server.ask(method, path, photo, authorization=sent)
                assert (status, headers["www-authenticate"]) == (401, "Bearer"), (sent, path)
        assert server.ask("GET", "/health")[0] == 200
        assert server.ask("GET", "/")[:2] == (200, "page")
        for sent in ("Bearer secret", "bearer  secret"):
            assert server.ask("POST", "/caption", photo, authorization=sent)[0] == 200


def test_foreign_pages(artifact: Path, photo: bytes):
    origin = "https://photos.example"
    with running(model=str(artifact), allow_origin=(origin,)) as server:
        asked = {"origin": origin, "sec_fetch_site": "cross-site"}
        status, _, headers = server.ask("POST", "/caption", photo, **asked)
        assert (status, headers["access-control-allow-origin"]) == (200, origin)
        preflight = {**asked, "access_control_request_method": "POST"}
        # Those of OpenAI's and Ollama's clients, too, in a page.
        preflight["access_control_request_headers"] = "authorization,user-agent,x-stainless-os"
        assert server.ask("OPTIONS", "/caption", **preflight)[0] == 200
        asked["origin"] = "https://evil.example"
        status, _, headers = server.ask("POST", "/caption", photo, **asked)
        assert status == 403 and "access-control-allow-origin" not in headers


def test_no_page_may_ask_by_default(server: Running, photo: bytes):
    asked = {"origin": "https://evil.example", "sec_fetch_site": "cross-site"}
    status, _, headers = server.ask("POST", "/caption", photo, **asked)
    assert status == 403 and not [name for name in headers if name.startswith("access-control")]
    assert "access-control-allow-origin" not in server.ask("GET", "/health", **asked)[2]
    own = {"origin": f"http://{server.address}", "sec_fetch_site": "same-origin"}
    assert server.ask("POST", "/caption", photo, **own)[0] == 200


def test_names_that_were_made_to_mean_this_machine(artifact: Path, photo: bytes):
    with running(model=str(artifact), loopback=True, allow_host=("photos.example",)) as server:
        for host, status in [("evil.example", 403), ("evil.example:8000", 403), ("localhost", 200),
                             ("127.0.0.1:80", 200), ("[::1]:80", 200), ("a.localhost", 200),
                             ("photos.example", 200), ("localhost.evil.example", 403),
                             ("[", 403)]:  # fmt: skip
            assert server.ask("POST", "/caption", photo, host=host)[0] == status, host
        reason = server.ask("GET", "/health", host="backend:80")[1]["error"]
        assert "'backend:80'" in reason and "--allow-host" in reason


def test_files_of_a_site(artifact: Path, tmp_path: Path, photo: bytes):
    site = tmp_path / "site"
    (site / "in").mkdir(parents=True)
    (site / "index.html").write_text("<p>page")
    (site / "in" / "a.js").write_text("1")
    (tmp_path / "secret").write_text("secret")
    (site / "link").symlink_to(tmp_path / "secret")
    with running(model=str(artifact), site=str(site), root_path="/photos") as server:
        assert server.ask("GET", "/")[1] == "<p>page"
        assert server.ask("GET", "/in/a.js")[1] == "1"
        for path in ("/../secret", "/%2e%2e/secret", "/in/../../secret", "/..%2fsecret",
                     "/%2e%2e%2fsecret", "//secret", "/link", "/in/%00", "/..%5csecret", "/in",
                     str(tmp_path / "secret"), "/" + str(tmp_path / "secret"), "/%ff"):  # fmt: skip
            status, text, _ = server.ask("GET", path)
            assert status in (404, 307) and "secret" not in str(text), path
        assert server.ask("GET", "/photos/in/a.js")[1] == "1"
        status, _, headers = server.ask("GET", "/photos")
        assert (status, headers["location"]) == (307, "/photos/")
        status, answer, _ = server.ask("POST", "/photos/v1/chat/completions", {})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        # Below the path of a proxy that passes it on, and of one that does not.
        assert server.ask("POST", "/photos/caption", photo)[0] == 200
        assert server.ask("POST", "/caption", photo)[0] == 200
        assert 'path="/caption",status="200"} 2' in server.ask("GET", "/photos/metrics")[1]


def test_data_uris(server: Running, photo: bytes, captioner: Captioner):
    wanted = captioner.caption(photo).text
    photo += bytes(-len(photo) % 3) + b"\xfb\xef\xbe\xff\xff\xff\0"  # ++++////AA==
    text = in_base64(photo)
    folded = "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    other = base64.urlsafe_b64encode(photo).decode()
    kinds = ["image/jpeg;base64", ";base64", "image/*; base64", "image/jpeg;name=a.jpg;Base64"]
    uris = [f"data:{kind},{text}" for kind in kinds] + [f"\n DATA:image/jpeg;BASE64,{text}"]
    uris += [f"data:image/jpeg;base64,{quote(text, safe='')}", f"data:;base64, {other.rstrip('=')}"]
    for image in (*uris, text, f" {text}\n", folded, other, text.rstrip("="), other.rstrip("=")):
        body = {"model": "capexport", "images": [image], "stream": False}
        assert server.ask("POST", "/api/generate", body)[1].get("response") == wanted, image[:40]
    for uri in uris:
        part = {"type": "image_url", "image_url": {"url": uri, "detail": "low"}}
        body = {"model": "capexport", "messages": [{"role": "user", "content": [part]}]}
        assert server.ask("POST", "/v1/chat/completions", body)[0] == 200, uri[:40]


def test_base64_takes_no_more_memory_than_a_body():
    hostile = "aa " * 1_000_000  # a million words
    tracemalloc.start()
    from_base64(hostile)()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(hostile)


def test_histograms_count_like_prometheus():
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 3):
        histogram.observe(value)
    assert list(histogram.lines("a")) == [
        'a_bucket{le="1"} 2', 'a_bucket{le="2"} 3', 'a_bucket{le="+Inf"} 4', "a_sum 6.000000",
        "a_count 4",
    ]  # fmt: skip
