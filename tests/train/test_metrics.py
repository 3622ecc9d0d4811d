"""Scores against pycocoevalcap's own classes, and with a Java that fails in each of its ways."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from capexport.metrics import ciders, score

REFERENCES = {
    "1": ["A dog runs on the grass .", "a brown dog is running"],
    "2": ["A man's hat , in snow .", 'the man wears a "hat"'],
    "3": ["Two boys play football .", "boys with a ball"],
}
PERFECT = {name: texts[0].lower() for name, texts in REFERENCES.items()}
POOR = {"1": "a cat", "2": "", "3": "two boys play football"}
JAVA = shutil.which("java")


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, float | str]]:
    """The scores of `PERFECT` and `POOR`, with the Java that is here, and without one."""
    with pytest.MonkeyPatch.context() as patch:
        scores = [score(PERFECT, REFERENCES), score(POOR, REFERENCES)]
        patch.setenv("PATH", os.devnull)
        return [*scores, score(PERFECT, REFERENCES), score(POOR, REFERENCES)]


def test_scores_with_and_without_java(outcomes):
    if JAVA:
        assert outcomes[0]["tokenizer"] == "Penn Treebank"
        assert outcomes[0]["METEOR"] == pytest.approx(100)
    assert "METEOR" not in outcomes[2]
    for good, bad in (outcomes[:2], outcomes[2:]):
        assert good["BLEU-4"] == pytest.approx(100)
        assert good["ROUGE-L"] == pytest.approx(100)
        assert bad["BLEU-1"] < 80
        assert bad["CIDEr-D"] < good["CIDEr-D"]
    for name in ("BLEU-1", "ROUGE-L", "CIDEr-D"):
        assert outcomes[0][name] == pytest.approx(outcomes[2][name], abs=0.5)


def test_cider_of_each_image_is_by_its_name(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    each = ciders(POOR, REFERENCES)
    assert each["3"] > each["1"] == each["2"] == 0
    assert sum(each.values()) / 3 == pytest.approx(score(POOR, REFERENCES)["CIDEr-D"])
    assert ciders(dict(reversed(POOR.items())), REFERENCES) == pytest.approx(each)


def test_words_of_scripts_with_vowel_signs_are_whole(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    boy, girl = {"1": "लड़का दौड़ रहा है"}, {"1": ["लड़की दौड़ रहा है"]}
    assert score(boy, girl)["BLEU-1"] == pytest.approx(75)
    assert score({"1": "e\u0301te\u0301"}, {"1": ["\u00e9t\u00e9"]})["BLEU-1"] == pytest.approx(100)


@pytest.fixture(scope="module")
def published() -> tuple[dict[str, str], dict[str, float]]:
    """Captions, and what pycocoevalcap alone makes of them."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    said = {**POOR, "2": 'a man\'s "red" hat , café'}
    tokenize = PTBTokenizer().tokenize
    human = tokenize({name: [{"caption": x} for x in texts] for name, texts in REFERENCES.items()})
    generated = tokenize({name: [{"caption": text}] for name, text in said.items()})
    scorers = {"METEOR": Meteor(), "CIDEr-D": Cider()}
    return said, {
        name: 100 * scorer.compute_score(human, generated)[0] for name, scorer in scorers.items()
    }


@pytest.mark.skipif(not JAVA, reason="no Java here")
@pytest.mark.parametrize("variable", ["JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS"])
def test_java_speaks_english_and_scores_as_pycocoevalcap(variable: str, published, monkeypatch):
    said, wanted = published
    monkeypatch.setenv(variable, "-Duser.language=de -Duser.country=DE -Duser.language.format=fr")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    scores = score(said, REFERENCES)
    assert {name: scores[name] for name in wanted} == wanted


SCORE = """
import json, logging, sys
from capexport import metrics
logging.basicConfig(format="%(message)s")
metrics._SECONDS_TO_START = metrics._SECONDS = 2
for _ in range(2):
    print(json.dumps(metrics.score(*json.loads(sys.argv[1]))))
"""
ANSWERS = f'case "$*" in *-version*) exit 0;; *PTBTokenizer*) exec {JAVA} "$@";; esac\n'


@pytest.mark.parametrize(
    ("stub", "said", "tokenizer"),
    [
        ("echo Unable to locate a Java Runtime. >&2; exit 1", "Unable to locate a Java", "regular"),
        ("echo Unable to locate a Java Runtime.; exit 1", "Unable to locate a Java", "regular"),
        ("exit 3", "exit code 3", "regular"),
        ("sleep 987 & echo $! > child; wait", "no answer in", "regular"),
        ('case "$*" in *-version*) exit 0;; esac; echo one; exit 0', "lines tokenized", "regular"),
        (ANSWERS + "echo Could not reserve enough space >&2; exit 1", "Could not reserve", "Penn"),
        (ANSWERS + "read line; echo 1.0 2.0; kill -9 $$", "exit code -9", "Penn"),
        (ANSWERS + "while read line; do echo 0,5; done", "0,5", "Penn"),
        (ANSWERS + "sleep 987 & echo $! > child; wait", "no answer in", "Penn"),
    ],
)
def test_a_java_that_fails_costs_meteor_alone(
    stub, said, tokenizer, outcomes, tmp_path: Path, monkeypatch
):
    if tokenizer == "Penn" and not JAVA:
        pytest.skip("no Java here")
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\ncd {tmp_path}\n{stub}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(
        [sys.executable, "-c", SCORE, json.dumps([POOR, REFERENCES])],
        capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in done.stderr.splitlines():
        assert "left out: " in line
        assert said in line
    assert len(done.stderr.splitlines()) == 2, "one line each time"
    scores = json.loads(done.stdout.splitlines()[-1])
    assert "METEOR" not in scores
    assert scores["tokenizer"].startswith(tokenizer)
    [wanted] = [some for some in outcomes[1::2] if some["tokenizer"] == scores["tokenizer"]]
    assert scores == {name: value for name, value in wanted.items() if name != "METEOR"}
    if (child := tmp_path / "child").exists():
        with contextlib.suppress(psutil.NoSuchProcess):
            assert psutil.Process(int(child.read_text())).status() == psutil.STATUS_ZOMBIE
