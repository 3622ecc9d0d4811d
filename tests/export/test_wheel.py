"""The wheel alone, in an environment without torch, transformers, optimum and onnx."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from capexport import Captioner
from capexport.captioner import BUNDLED_ARTIFACT
from capexport.web import PAGE

ROOT = Path(__file__).parents[2]
# What mypy must find no fault with, and would if a keyword of `caption` were misspelt.
USER_SCRIPT = """
import sys
from capexport import Caption, Captioner, CapexportError
captioner = Captioner.load(device="auto", threads=1)
try:
    many: list[Caption] = captioner.caption(sys.argv[1:], batch_size=2, min_tokens=0)
    one: Caption = captioner.caption(sys.argv[1], max_tokens=30, repetition_penalty=1.0)
except CapexportError as error:
    sys.exit(str(error))
if not one.text:
    captioner.caption(sys.argv[1], max_token=3)  # type: ignore[call-overload]
assert many[0].tokens == one.tokens
print(one.text)
"""


def run(*command: object, **options) -> str:
    outcome = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_holds_capexport_alone(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "capexport",
        f"capexport-{wheel.name.split('-')[1]}.dist-info",
    }
    assert {f"capexport/default/{file.name}" for file in BUNDLED_ARTIFACT.iterdir()} <= set(names)
    assert {f"capexport/web/page/{file.name}" for file in PAGE.iterdir()} <= set(names)
    assert wheel.stat().st_size < 10e6


def test_the_description_needs_no_repository(wheel: Path):
    """A package index shows it alone: links and pictures within the repository lead nowhere."""
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith("METADATA")]
        text = archive.read(metadata).decode()
    assert "# capexport" in text
    links = re.findall(
        r"""\]\(([^)]+)\)|^\[[^]]+\]:\s*(\S+)|(?:src|href)=["']([^"']+)""", text, re.M
    )
    assert [link for link in map("".join, links) if not link.startswith("https://")] == []


def interpreter(version: str) -> str | None:
    """A Python of that version: on the path, or as pyenv or uv keep theirs."""
    places = [Path.home(), Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))]
    kept = [
        *places[1].glob(f"versions/{version}.*/bin/python"),
        *places[0].glob(f".local/share/uv/python/cpython-{version}.*/bin/python{version}"),
    ]
    for python in filter(None, (shutil.which(f"python{version}"), *map(str, kept))):
        tried = subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True)
        if tried.returncode == 0:  # a shim of pyenv's may stand for nothing
            return python
    return None


@pytest.mark.parametrize("version", ["3.10", "3.13"])  # the others lie between
def test_it_captions_on_every_python(version: str, wheel: Path, photos: list[Path], tmp_path: Path):
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        pytest.skip("what the other tests run on")
    if (base := interpreter(version)) is None:
        pytest.skip(f"no Python {version} here")
    run(base, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "-q", "--no-compile", f"{wheel}[cpu]")
    artifact = ROOT / "tests" / "artifacts" / "cnn-lstm"
    command = [python, "-W", "error", "-m", "capexport", "caption", "-m", artifact, *photos]
    captions = Captioner.load(artifact).caption(photos)
    wanted = [f"{p}\t{c.text}" for p, c in zip(photos, captions, strict=True)]
    assert run(*command, cwd=tmp_path).splitlines() == wanted


def test_it_captions_in_a_small_environment_of_its_own(
    wheel: Path, artifact: Path, blip2_export, photos: list[Path], captioner, tmp_path: Path
):
    venv = tmp_path / "venv"
    # Without pip's and setuptools' own 23 MB, which come with some Pythons and not with others.
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python"]
    run(*pip, "install", "-q", f"{wheel}[cpu]")
    installed = json.loads(run(*pip, "list", "--format", "json"))
    names = {package["name"].lower() for package in installed}
    assert not names & {"torch", "torchvision", "transformers", "optimum", "onnx", "safetensors"}
    size = sum(file.lstat().st_size for file in venv.rglob("*") if file.is_file())
    assert size < 200e6, f"{size / 1e6:.0f} MB"
    command = [venv / "bin" / "capexport", "caption", "-m", artifact, *photos]
    wanted = [f"{p}\t{c.text}" for p, c in zip(photos, captioner.caption(photos), strict=True)]
    assert run(*command, cwd=tmp_path).splitlines() == wanted
    # With nothing but a photo, the captioner in the wheel captions it.
    bundled = Captioner.load().caption(photos[0]).text
    lines = run(command[0], "caption", photos[0], cwd=tmp_path).splitlines()
    assert lines == [f"{photos[0]}\t{bundled}"]
    by_module = [venv / "bin" / "python", "-m", "capexport", *command[1:]]
    assert run(*by_module, cwd=tmp_path).splitlines() == wanted
    script = tmp_path / "app.py"
    script.write_text(USER_SCRIPT)
    checked = [sys.executable, "-m", "mypy", "--strict", "--python-executable"]
    python = venv / "bin" / "python"
    run(*checked, python, "--cache-dir", tmp_path / "cache", script, cwd=tmp_path)
    assert run(python, script, photos[0], cwd=tmp_path) == f"{bundled}\n"
    # BLIP-2 takes one package more.
    command[command.index(artifact)] = blip2_export("opt")
    outcome = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert outcome.returncode == 2
    assert "capexport[tokenizers]" in outcome.stderr
    run(*pip, "install", "-q", f"{wheel}[cpu,tokenizers]")
    exported = Captioner.load(blip2_export("opt"))
    rows = run(*command, "--format", "jsonl", cwd=tmp_path).splitlines()
    wanted = [caption.text for caption in exported.caption(photos)]
    assert [json.loads(row)["text"] for row in rows] == wanted
    # Exporting from here must say what to install.
    lstm = [venv / "bin" / "capexport", "lstm", "--out", tmp_path / "out"]
    outcome = subprocess.run([str(part) for part in lstm], capture_output=True, text=True)
    assert outcome.returncode == 2
    assert "capexport[cpu,export]" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the oldest numpy is older than that")
def test_the_runtime_passes_its_tests_on_the_oldest_versions(wheel: Path, tmp_path: Path):
    project = (ROOT / "pyproject.toml").read_text()
    floors = {
        name: re.search(rf'"{name}>=([0-9.]+)"', project)[1]
        for name in ("numpy", "pillow", "tqdm", "onnxruntime", "tokenizers")
    }
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    oldest = [f"{name}=={version}" for name, version in floors.items()]
    wheel_and_more = ["--no-compile", f"{wheel}[cpu,tokenizers]", *oldest, "pytest"]
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", *wheel_and_more)
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copy(ROOT / "README.md", tmp_path)
    outcome = subprocess.run(
        [python, "-m", "pytest", "tests/runtime", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout[-5000:]
