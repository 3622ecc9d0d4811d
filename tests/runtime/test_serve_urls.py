"""Images behind URLs: what may be fetched, and within which limits."""

import http.server
import ipaddress
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import (
    Running,
    artifact,
    captioner,
    running,
)

from capexport import Captioner
from capexport.serve import fetching

__all__ = ["artifact", "captioner"]  # fixtures


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1",
     "169.254.169.254", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.0.192", "198.18.0.1",
     "168.63.129.16", "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
     "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
     "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::",
     "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str):
    assert not fetching.is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111",
                                     "::ffff:1.1.1.1", "64:ff9b::101:101"])  # fmt: skip
def test_addresses_that_are(address: str):
    assert fetching.is_public(ipaddress.ip_address(address))


class Site(http.server.BaseHTTPRequestHandler):
    photo = b""
    host = ""  # of the last request

    def do_GET(self) -> None:
        path, _, target = self.path.partition("?")
        Site.host = self.headers["Host"]
        if path in ("/photo.jpg", "/%C3%A9%20photo.jpg"):
            self.answer(200, self.photo)
        elif path == "/moved":
            self.answer(302, b"", Location=target)
        elif path == "/moved-in-utf-8":
            self.answer(302, b"", Location="/é photo.jpg".encode().decode("latin-1"))
        elif path == "/most":
            self.answer(200, b"x" * 700_000)
        elif path == "/large":
            self.answer(200, b"x" * 1_200_000)
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(2000):
                self.wfile.write(bytes(1000))
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        else:
            self.answer(404, b"")

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    from io import BytesIO

    from conftest import draw_photo

    buffer = BytesIO()
    draw_photo(5).save(buffer, "JPEG")
    Site.photo = buffer.getvalue()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Running]:
    with running(model=str(artifact), allow_urls=True, max_body=1) as found:
        yield found


def ask(server: Running, url: str) -> tuple[int, str]:
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"model": "capexport", "messages": [{"role": "user", "content": [part]}]}
    status, answer, _ = server.ask("POST", "/v1/chat/completions", body)
    if status == 200:
        return status, answer["choices"][0]["message"]["content"]
    return status, answer["error"]["message"]


def test_what_is_not_fetched(server: Running, site: str):
    port = site.rpartition(":")[2]
    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "0.0.0.0", "[::1]",
             "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"]  # fmt: skip
    for host in hosts:
        status, text = ask(server, f"http://{host}:{port}/photo.jpg")
        assert status == 400 and ("public" in text or "cannot be fetched" in text), host
    for url in ("http://", "http:///a", "http://user:pw@example.com/", "http://[/", "HTTP://\x00", "http://\x1b[2J/",
                "http://a b/", f"{site.replace('http', 'https')}/", "http://example.com:99999/",
                "ftp://example.com/a", "file:///etc/passwd", "gopher://127.0.0.1/"):  # fmt: skip
        status, text = ask(server, url)
        assert status == 400 and text.isprintable(), url


@pytest.mark.parametrize("sign", ["a", "é", "a.", "/é"])
def test_urls_that_are_too_long(server: Running, sign: str):
    status, text = ask(server, "http://" + sign * 100_000)
    assert status == 400 and "characters" in text and len(text) < 400


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine's own addresses one counts as public."""
    one = ipaddress.ip_address("127.0.0.1")
    monkeypatch.setattr(fetching, "is_public", lambda address: address == one)


def test_what_is_fetched(server: Running, site: str, public: None, captioner: Captioner):
    wanted = captioner.caption(Site.photo).text
    for path in ("/photo.jpg", "/photo.jpg?a=b", "/moved?/photo.jpg", f"/moved?{site}/photo.jpg",
                 "/é photo.jpg", "/moved-in-utf-8"):  # fmt: skip
        assert ask(server, site + path) == (200, wanted), path
    assert ask(server, f"{site}/nothing")[0] == 400


def test_nothing_is_fetched_for_a_request_of_too_many_images(
    artifact: Path, site: str, public: None
):
    Site.host = ""
    part = {"type": "image_url", "image_url": {"url": f"{site}/photo.jpg"}}
    body = {"model": "capexport", "messages": [{"role": "user", "content": 3 * [part]}]}
    with running(model=str(artifact), allow_urls=True, queue=2) as server:
        assert server.ask("POST", "/v1/chat/completions", body)[0] == 413
    assert Site.host == ""


def test_redirects_are_checked_too(server: Running, site: str, public: None):
    port = site.rpartition(":")[2]
    for target in (f"http://127.0.0.2:{port}/photo.jpg", f"http://[::1]:{port}/photo.jpg",
                   "file:///etc/passwd", "http://169.254.169.254/"):  # fmt: skip
        status, text = ask(server, f"{site}/moved?{target}")
        assert status == 400 and ("public" in text or "must begin" in text)
    status, text = ask(server, f"{site}/moved?/moved")  # for ever
    assert status == 400
    loop = f"{site}/moved?" + "/moved?" * 7 + "/photo.jpg"
    status, text = ask(server, loop)
    assert status == 400 and "redirects" in text


def test_a_name_is_not_looked_up_twice(
    server: Running, site: str, public: None, monkeypatch: pytest.MonkeyPatch
):
    """What was checked is connected to: the second answer of a name server has no say."""
    port = int(site.rpartition(":")[2])
    asked = []

    async def rebinding(self, host, port, **_):
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return [(2, 1, 6, "", (address, port))]

    monkeypatch.setattr(type(server.service.batcher.loop), "getaddrinfo", rebinding)
    assert ask(server, f"http://rebinding.example:{port}/photo.jpg")[0] == 200
    assert asked == ["rebinding.example"]


def test_host_names_beyond_ascii(
    server: Running, site: str, public: None, monkeypatch: pytest.MonkeyPatch
):
    port = int(site.rpartition(":")[2])

    async def local(self, host, port, **_):
        assert host == "xn--mnchen-3ya.xn--p1ai"
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(type(server.service.batcher.loop), "getaddrinfo", local)
    assert ask(server, f"http://münchen.рф:{port}/photo.jpg")[0] == 200
    assert Site.host == f"xn--mnchen-3ya.xn--p1ai:{port}"


def test_one_private_address_among_public_ones_is_enough(
    server: Running, public: None, monkeypatch: pytest.MonkeyPatch
):
    async def both(self, host, port, **_):
        return [(2, 1, 6, "", (address, port)) for address in ("127.0.0.1", "10.0.0.1")]

    monkeypatch.setattr(type(server.service.batcher.loop), "getaddrinfo", both)
    status, text = ask(server, "http://both.example/photo.jpg")
    assert status == 400 and "public" in text


def test_limits(server: Running, site: str, public: None, monkeypatch: pytest.MonkeyPatch):
    for path in ("/large", "/endless"):
        status, text = ask(server, site + path)
        assert status == 400 and "more than" in text
    part = {"type": "image_url", "image_url": {"url": f"{site}/most"}}
    body = {"model": "capexport", "messages": [{"role": "user", "content": [part, part]}]}
    _, answer, _ = server.ask("POST", "/v1/chat/completions", body)
    assert "more than" in answer["error"]["message"]  # than a whole request may have
    monkeypatch.setattr(fetching, "_SECONDS", 1.0)
    status, text = ask(server, f"{site}/slow")
    assert status == 400 and "longer" in text
