"""`capexport serve`"""

from __future__ import annotations

import argparse
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from typing import Any

from capexport.cli.command import say, teaching
from capexport.cli.decoding import add_decoding, given_decoding
from capexport.errors import OptionError, importing
from capexport.serve import EXTRA, application
from capexport.serve.settings import Settings, add_flags, given_settings

_IDLE = 20.0  # seconds after which a client that sends and takes nothing is disconnected


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="caption images for other programs, over HTTP",
        **teaching(
            "Caption images over HTTP. POST /caption takes an image, or several in a form. "
            "Programs written for Ollama (POST /api/generate) or OpenAI "
            "(POST /v1/chat/completions) can use this server instead. Images that arrive "
            "together are captioned together. After SIGTERM or Ctrl-C, the server answers what it "
            "has accepted, then exits. Flags may also be given as environment variables: "
            "CAPEXPORT_MODEL, CAPEXPORT_API_KEY and so on.",
            "capexport serve                                   # on http://127.0.0.1:8000",
            "capexport serve -m artifacts/first --port 11434   # where Ollama's clients look",
            "CAPEXPORT_API_KEY=secret capexport serve --host 0.0.0.0",
            "curl --data-binary @photo.jpg http://127.0.0.1:8000/caption",
        ),
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: "
        "127.0.0.1, for this machine alone); 0.0.0.0 is for everybody who reaches this machine",
    )  # fmt: skip
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="default: 8000; 0 takes any that is free",
    )
    add_flags(parser)
    add_decoding(parser.add_argument_group("how captions are decoded, unless a request says it"))
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with importing(EXTRA):
        import uvicorn  # noqa: F401
    listener = _bind(options.host, options.port)
    host, port = listener.getsockname()[:2]
    settings = Settings(
        **given_settings(options),
        decoding=given_decoding(options),
        loopback=ipaddress.ip_address(host.partition("%")[0]).is_loopback,
    )
    app = application(settings)
    if not settings.loopback and not settings.api_key:
        say(f"capexport: whoever reaches {host} can ask: CAPEXPORT_API_KEY sets a key")
    shown = f"[{host}]" if ":" in host else host
    listener.listen(2048)  # before it says that it serves: another one may have come first
    server = make_server(app, f"serving {settings.name} on http://{shown}:{port} (Ctrl-C ends)")
    # The event loop takes the interpreter back from captioning threads many times a request.
    sys.setswitchinterval(0.001)
    gc.freeze()  # what is loaded stays
    _end_when_hung_up()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # or SIGTERM: uvicorn has answered everything, and passes it on
        return 130 if server.force_exit else 0
    return 0


def _end_when_hung_up() -> None:
    """A terminal that is closed ends the server as SIGTERM does, which uvicorn knows; the exception
    that SIGHUP raises in other commands would strike its event loop anywhere."""
    hangup = getattr(signal, "SIGHUP", None)
    if hangup and callable(signal.getsignal(hangup)):  # nohup has it ignored
        signal.signal(hangup, lambda *_: signal.raise_signal(signal.SIGTERM))


def make_server(app: Any, greeting: str = "") -> Any:
    """uvicorn around an application, silent but for what fails and, once it takes requests and
    signals, a greeting."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        pauses = 0  # how often its client was slower than the answer: changes while it still reads

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.check_progress()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.pauses += 1

        def check_progress(self, before: Any = None) -> None:
            """Every `_IDLE` seconds, close the connection if nothing has happened since `before`:
            its client sends no request, or no end of one, or takes nothing of its answer. uvicorn
            would keep such a connection for ever, and wait for it when it stops."""
            asked = self.cycle and not self.cycle.response_complete
            idle = not asked and self.timeout_keep_alive_task is None
            untaken = self.transport.get_write_buffer_size()
            state = (idle, untaken, self.pauses, self.cycle)
            if untaken and state == before:
                self.transport.abort()
            elif idle and state == before:
                self.transport.close()
            if self in self.connections:
                self.loop.call_later(_IDLE, self.check_progress, state)

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if greeting:
                say(f"capexport: {greeting}")

        async def shutdown(self, sockets: Any = None) -> None:
            app.state.service.stopping_since = time.monotonic()
            await super().shutdown(sockets)

    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it names no request
    # Connections are kept for above a minute, as long as proxies keep theirs.
    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, timeout_keep_alive=75,
        lifespan="on", ws="none", http=Protocol,
    )  # fmt: skip
    return Server(config)


def _bind(host: str, port: int) -> socket.socket:
    """A socket that doesn't listen yet.

    Raises:
        OptionError: there is no such address here, or somebody else has the port.
    """
    if not 0 <= port < 1 << 16:
        raise OptionError(f"--port must lie in 0..65535, got {port}")
    try:
        [(family, kind, *_, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind)
        if os.name == "posix":  # elsewhere it means something else
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"cannot serve on {host}, port {port}: {reason}") from error
    return listener
