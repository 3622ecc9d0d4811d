"""Caption metrics against what people wrote.

The scorers are those of the COCO captioning challenge (Chen et al. 2015), from `pycocoevalcap`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from capexport.errors import importing

log = logging.getLogger("capexport")

Texts: TypeAlias = Mapping[str, list[str]]

# Unicode's categories of what belongs to a letter: accents, vowel signs and joiners.
MARKS = ("Mn", "Mc", "Cf")
# METEOR writes its figures with the decimal sign of the user's language.
_ENGLISH = [
    "-Duser.language=en",
    "-Duser.country=US",
    "-Duser.language.format=en",
    "-Duser.country.format=US",
    "-Dfile.encoding=UTF-8",
]
# What Java says on standard error though all is well.
_CHATTER = ("Picked up", "PTBTokenizer tokenized")
# How long to wait for Java; METEOR begins by reading 60 MB.
_SECONDS_TO_START = 20.0
_SECONDS = 120.0
_SECONDS_A_LINE = 0.1


class _JavaError(Exception):
    """Why a Java program gave no answer, in one line."""


def scorers() -> tuple[Any, Any, Any]:
    """pycocoevalcap's classes for BLEU, ROUGE-L and CIDEr.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
    """
    with importing("metrics need `pip install 'capexport[eval]'`"):
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    return Bleu, Rouge, Cider


def score(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float | str]:
    """BLEU-1..4, ROUGE-L and CIDEr-D, times 100, of one caption for each image against its
    references.

    If Java runs, METEOR is computed too, and the Penn Treebank tokenizer splits the captions, as
    for published figures; otherwise a regular expression that comes close does. If Java is there
    but fails, a warning says so, and the other metrics are still computed.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
    """
    Bleu, Rouge, Cider = scorers()  # noqa: N806
    generated, human, java = _tokenized(
        {name: [caption] for name, caption in captions.items()},
        {name: list(references[name]) for name in captions},
    )
    scores: dict[str, float | str] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints its length ratio
        bleu, _ = Bleu(4).compute_score(human, generated)
        scores.update({f"BLEU-{n}": 100 * value for n, value in enumerate(bleu, 1)})
        try:
            if java:
                scores["METEOR"] = 100 * _meteor(java, human, generated)
        except _JavaError as error:
            log.warning("METEOR is left out: %s", error)
        scores["ROUGE-L"] = 100 * float(Rouge().compute_score(human, generated)[0])
        scores["CIDEr-D"] = 100 * float(Cider().compute_score(human, generated)[0])
    scores["tokenizer"] = "Penn Treebank" if java else "regular expression"
    return scores


def cider(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float:
    """The mean of `ciders` over all images.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
    """
    values = ciders(captions, references).values()
    return sum(values) / len(values)


def ciders(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """CIDEr-D of each image's caption, times 100, with words split by the regular expression of
    `score`.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
    """
    _, _, Cider = scorers()  # noqa: N806
    generated = _by_regular_expression({name: [caption] for name, caption in captions.items()})
    human = _by_regular_expression({name: list(references[name]) for name in captions})
    _, values = Cider().compute_score(human, generated)
    return {name: 100 * float(value) for name, value in zip(captions, values, strict=True)}


def _tokenized(generated: Texts, human: Texts) -> tuple[Texts, Texts, str | None]:
    """Both as words separated by spaces, and the Java program that split them, if one did."""
    java = shutil.which("java")
    if java and not (fault := _fault_of(java)):
        try:
            return _by_treebank(java, generated), _by_treebank(java, human), java
        except _JavaError as error:
            fault = str(error)
    if java:
        log.warning("METEOR and the Penn Treebank tokenizer are left out: %s", fault)
    return _by_regular_expression(generated), _by_regular_expression(human), None


@functools.cache
def _fault_of(java: str) -> str:
    """Why this Java doesn't run, in one line; empty if it does."""
    try:
        with _java(java, ["-version"], _SECONDS_TO_START) as process:
            answer = process.communicate()[0].decode(errors="replace")
            if process.returncode:
                raise _JavaError(answer)
    except _JavaError as error:
        return str(error)
    return ""


def _by_treebank(java: str, texts: Texts) -> Texts:
    """As pycocoevalcap's PTBTokenizer, which itself writes into its own folder and may wait for
    ever."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    # The Java program drops empty lines and so would shift captions: a lone period is kept, and
    # removed again as punctuation.
    lines = [" ".join(text.split()) or "." for some in texts.values() for text in some]
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    program = "edu.stanford.nlp.process.PTBTokenizer"
    arguments = ["-cp", str(jar), program, "-preserveLines", "-lowerCase"]
    with _java(java, arguments, _SECONDS + len(lines) * _SECONDS_A_LINE) as process:
        answer = process.communicate("\n".join(lines).encode())[0].decode()
        tokenized = answer.rstrip("\n").split("\n")
        if process.returncode or len(tokenized) != len(lines):
            raise _JavaError(f"{len(tokenized)} lines tokenized of {len(lines)}")
    words = (
        " ".join(word for word in line.split(" ") if word not in ptbtokenizer.PUNCTUATIONS)
        for line in tokenized
    )
    return {name: [next(words) for _ in some] for name, some in texts.items()}


def _by_regular_expression(texts: Texts) -> Texts:
    words = _words()
    return {
        name: [" ".join(words.findall(unicodedata.normalize("NFC", text).lower())) for text in some]
        for name, some in texts.items()
    }


@functools.cache
def _words() -> re.Pattern[str]:
    r"""What a word is. To `\w` the vowel signs of Hindi or Thai are none of it."""
    signs = (chr(code) for code in range(0x300, 0x1F000))
    marks = "".join(sign for sign in signs if unicodedata.category(sign) in MARKS)
    word = rf"\w[\w{re.escape(marks)}]*"
    return re.compile(f"'s|n't|{word}(?:-{word})*")


def _meteor(java: str, human: Texts, generated: Texts) -> float:
    from pycocoevalcap.meteor import meteor

    class Meteor(meteor.Meteor):  # type: ignore[misc]
        """pycocoevalcap's, with a process of ours and without a lock that is never released."""

        def __init__(self, process: subprocess.Popen[bytes]) -> None:
            self.meteor_p = process
            self.lock = threading.RLock()

        def __del__(self) -> None:
            pass

    jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    arguments = ["-jar", "-Xmx2G", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    lines = len(generated) + sum(map(len, human.values()))
    with _java(java, arguments, _SECONDS + lines * _SECONDS_A_LINE) as process:
        return float(Meteor(process).compute_score(human, generated)[0])


@contextlib.contextmanager
def _java(java: str, arguments: list[str], seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """A running Java program, in English and UTF-8 whatever the environment says, for `seconds` at
    most. It ends with the block, and so does all that it started.

    Raises:
        _JavaError: it doesn't start, or the block raised one, OSError or ValueError.
    """
    environment = dict(os.environ)
    if "_JAVA_OPTIONS" in environment:  # it outdoes the command line
        environment["_JAVA_OPTIONS"] += " " + " ".join(_ENGLISH)
    began = time.monotonic()
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(
                [java, *_ENGLISH, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise _JavaError(str(error)) from error
        timer = threading.Timer(seconds, _kill, [process])
        timer.start()
        try:
            yield process
        except (OSError, ValueError, _JavaError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").splitlines()
            said += str(error).splitlines() if isinstance(error, _JavaError) else []
            reasons = [line.strip() for line in said if not line.startswith(_CHATTER)]
            ended = process.poll()
            last = str(error) if ended is None else f"it ended with exit code {ended}"
            reason = next(filter(None, reasons), last)
            if time.monotonic() - began >= seconds:
                reason = f"no answer in {seconds:.0f} s"
            raise _JavaError(f"{java}: {reason}") from error
        finally:
            timer.cancel()
            _kill(process)
            process.wait()
            for stream in filter(None, (process.stdin, process.stdout)):
                with contextlib.suppress(OSError):  # what was not sent can't be
                    stream.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):  # it has ended
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def format_scores(scores: Mapping[str, float | str]) -> str:
    return "  ".join(
        f"{k} {v:.1f}" if isinstance(v, float) else f"({v})" for k, v in scores.items()
    )
