"""The settings of a server, listed once for `capexport serve` and for environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from capexport.decoding import DecodingKeywords
from capexport.errors import OptionError
from capexport.preprocessing import MAX_PIXELS

PREFIX = "CAPEXPORT_"


def _setting(default: Any, metavar: str | None, help: str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": help})


@dataclass(frozen=True)
class Settings:
    """What a server is started with. Fields with a `help` are flags and environment variables.

    Attributes:
        decoding: options of decoding in place of the artifact's own.
        loopback: whether the server listens on a loopback address, which only this machine reaches.

    Raises:
        OptionError: a value is out of range, or cannot be sent in a header.
    """

    model: str | None = _setting(
        None, "DIR", "exported folder, or its id on the hub (default: the bundled captioner)",
    )  # fmt: skip
    name: str = _setting("capexport", "NAME", "what clients call the model (default: capexport)")
    prompts: bool = _setting(
        False, None, "take the text of Ollama's and OpenAI's requests as the prompt that captions "
        "continue (BLIP-2); without this it is ignored",
    )  # fmt: skip
    device: str = _setting(
        "cpu", "NAME", "cpu (default), cuda, cuda:1, or auto: the first that works"
    )
    threads: int | None = _setting(None, "N", "CPU threads (default: all)")
    batch_size: int | None = _setting(
        None, "N", "how many images go through the model together (default: 32, for a BLIP-2 8)"
    )
    queue: int = _setting(
        256,
        "N",
        "how many images may wait or be worked on; requests with more are refused (default: 256)",
    )
    max_body: int = _setting(50, "MB", "largest request, in megabytes (default: 50)")
    max_pixels: int = _setting(
        MAX_PIXELS // 10**6, "N", f"largest image, in megapixels (default: {MAX_PIXELS // 10**6})"
    )
    api_key: str | None = _setting(
        None, "KEY", "what clients must send as `Authorization: Bearer KEY`; safer in "
        f"{PREFIX}API_KEY, since others can see a command line",
    )  # fmt: skip
    allow_urls: bool = _setting(
        False, None, "fetch images that requests name by http(s) URL, from public addresses only"
    )
    allow_origin: tuple[str, ...] = _setting(
        (),
        "ORIGIN",
        "let pages of this origin (https://photos.example) send requests; may be repeated",
    )
    allow_host: tuple[str, ...] = _setting(
        (), "NAME", "accept requests for this host name, as a proxy passes it on; needed where the "
        "server listens on this machine alone and has no key, and may be repeated",
    )  # fmt: skip
    root_path: str = _setting(
        "", "PATH", "path below which a proxy puts the server, whether or not it strips it"
    )
    site: str | None = _setting(
        None, "DIR", "folder of static files to serve at /, to everybody, with a key or without"
    )
    decoding: DecodingKeywords = field(default_factory=DecodingKeywords)
    loopback: bool = False

    @property
    def checks_host(self) -> bool:
        """Whether a request must name this machine as its `Host`: where there is no key, and only
        this machine can connect, a web page could otherwise ask by DNS rebinding."""
        return self.loopback and not self.api_key

    def __post_init__(self) -> None:
        for name in ("threads", "batch_size", "queue", "max_body", "max_pixels"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise OptionError(f"{_flag(name)} must be at least 1, got {value}")
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):
            raise OptionError("an API key takes visible ASCII characters, and no spaces")
        if not re.fullmatch(r"[\w./:-]+", self.name, re.ASCII):
            raise OptionError(f"--name takes letters, digits and . / : - _, got {self.name!r}")
        if self.root_path and not re.fullmatch(r"(/[\w.~-]+)+", self.root_path, re.ASCII):
            raise OptionError(f"--root-path takes a path as /captions, got {self.root_path!r}")
        for origin in self.allow_origin:  # as browsers write them, in lower case
            if origin != "*" and not re.fullmatch(r"[a-z][a-z+.-]*://[^/\sA-Z]+", origin):
                raise OptionError(f"--allow-origin takes one as https://a.example, got {origin!r}")
        for host in self.allow_host:
            if not re.fullmatch(r"[a-z0-9._-]+", host):
                raise OptionError(f"--allow-host takes one as photos.example, got {host!r}")
        if self.site is not None and not Path(self.site).is_dir():
            raise OptionError(f"{self.site}: no such folder; --site takes one with an index.html")

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings in `CAPEXPORT_MODEL`, `CAPEXPORT_API_KEY` and so on; empty ones don't count.

        Raises:
            OptionError: a value is of another type, or out of range.
        """
        return cls(**environment_values())


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _boolean(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "0", "false", "no"):
        raise ValueError
    return text.lower() in ("1", "true", "yes")


# By a field's annotation: what reads it from text, and what to call it in an error.
_TYPES: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number"),
    "int | None": (int, "a whole number"),
    "bool": (_boolean, "1 or 0"),
    "tuple[str, ...]": (lambda text: tuple(text.split()), "words"),
}


def environment_values() -> dict[str, Any]:
    """The settings that environment variables give, by their names in `Settings`."""
    values = {}
    for item in flags():
        if text := os.environ.get(variable := PREFIX + item.name.upper()):
            read, what = _TYPES.get(str(item.type), (str, "text"))
            try:
                values[item.name] = read(text)
            except ValueError as error:
                raise OptionError(f"{variable} must be {what}, got {text!r:.100}") from error
    return values


def flags() -> list[Any]:
    """The fields of `Settings` that are flags."""
    return [item for item in fields(Settings) if "help" in item.metadata]


def add_flags(group: Any) -> None:
    """Add a flag for each setting to a parser. One that isn't given is parsed as None or False."""
    for item in flags():
        how: dict[str, Any] = {"action": "store_true"}
        if item.type != "bool":
            how = {"metavar": item.metadata["metavar"]}
            how |= {"type": int} if str(item.type).startswith("int") else {}
            how |= {"action": "append"} if str(item.type).startswith("tuple") else {}
        names = ["-m"] * (item.name == "model") + [_flag(item.name)]
        group.add_argument(*names, dest=item.name, help=item.metadata["help"], **how)


def given_settings(options: Any) -> dict[str, Any]:
    """The settings that flags give, or else environment variables, by their names."""
    values = environment_values()
    for item in flags():
        value = getattr(options, item.name)
        if value is not None and value is not False:  # 0 is for `Settings` to refuse
            values[item.name] = tuple(value) if isinstance(value, list) else value
    return values
