r"""File names as text: bytes that are not UTF-8, or would act on a terminal, become `\xHH`,
reversibly.

Different names stay different. In JSON, which has escapes of its own, control characters stay.
"""

from __future__ import annotations

import os
import re

# Control characters, line and paragraph separators, characters that change the direction of
# writing, and surrogates, which stand for bytes that are not UTF-8.
UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# A backslash that would read as the beginning of such an escape.
_AMBIGUOUS = re.compile(rb"\\(?=x[0-9a-f]{2})")


def readable_name(path: str | os.PathLike[str]) -> str:
    r"""The name as valid UTF-8: each byte that isn't is written `\xHH`."""
    return _AMBIGUOUS.sub(rb"\\x5c", os.fsencode(path)).decode("utf-8", "backslashreplace")


def original_name(readable: str) -> str:
    r"""The file name behind `readable_name`, even if `shown` was applied to that."""
    return os.fsdecode(_unescaped(readable.encode("utf-8", "surrogateescape")))


def shown(text: str) -> str:
    r"""`text` on one line; what a terminal would act on is written `\xHH`."""

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        byte = "\udc80" <= character <= "\udcff"
        data = character.encode("utf-8", "surrogateescape" if byte else "surrogatepass")
        return "".join(f"\\x{value:02x}" for value in data)

    return UNSAFE.sub(escape, text)


def escaped(text: str) -> str:
    """A caption as `shown` writes it, so that `unescaped` gives it back."""
    return shown(re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", text))


def unescaped(text: str) -> str:
    return _unescaped(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")


def _unescaped(data: bytes) -> bytes:
    return re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), data)
