"""Servers for tests, in a thread of this process."""

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMITTED

from capexport import Captioner
from capexport.cli.serve import make_server
from capexport.serve import application
from capexport.serve.settings import Settings

for package in ("starlette", "uvicorn", "h11", "python_multipart", "pybase64"):
    pytest.importorskip(package, reason="of the extra serve")
MODEL = COMMITTED / "cnn-lstm"  # what is served is no matter here


@pytest.fixture(scope="module")
def artifact() -> Path:
    return MODEL


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner.load(MODEL, threads=1)


@dataclass
class Running:
    address: str  # with the port
    service: Any

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, JSON (or text) and headers of the answer; a dict is sent as JSON."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.address, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            content = answer.read()
            kind = answer.headers.get("content-type", "")
            text = json.loads(content) if kind == "application/json" else content.decode()
            return answer.status, text, answer.headers
        finally:
            connection.close()


@contextmanager
def running(**settings: Any) -> Iterator[Running]:
    """A server with these settings, on a free port."""
    app = application(Settings(**settings))
    server = make_server(app)
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(f"{host}:{port}", app.state.service)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def in_base64(photo: Path | bytes) -> str:
    content = photo if isinstance(photo, bytes) else photo.read_bytes()
    return base64.b64encode(content).decode()


def as_uri(photo: Path | bytes) -> str:
    return f"data:image/jpeg;base64,{in_base64(photo)}"


def question(*photos: Path, text: str = "What is this?") -> list[dict[str, Any]]:
    """Messages of OpenAI's protocol."""
    parts = [{"type": "image_url", "image_url": {"url": as_uri(photo)}} for photo in photos]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]
