"""The README's snippets, word by word, inside the programs that they are for; Ray's are in
test_ray.py."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import README, draw_photo, snippet, snippets

from capexport.captioner import Captioner


def needs(*packages: str) -> None:
    for package in packages:
        remedy = "pip install " + " ".join(packages)
        pytest.importorskip(package.replace("-", "_"), reason=remedy)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder as the snippets expect it."""
    (tmp_path / "photos").mkdir()
    for seed, name in enumerate(("a.jpg", "b.jpg", "photos/c.jpg", "photos/d.jpg", "photos/e.jpg")):
        draw_photo(seed, (400, 300)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def bundled() -> Captioner:
    return Captioner.load(threads=1)


@pytest.fixture
def run(here: Path) -> Iterator:
    """Start a snippet as a program of its own."""
    path = os.pathsep.join([str(README.parent), os.environ.get("PYTHONPATH", "")])
    started = []

    def start(code: str, **environment: str) -> subprocess.Popen:
        (here / "program.py").write_text(code, encoding="utf-8")
        command = [sys.executable, "program.py"]
        environment = {**os.environ, "PYTHONPATH": path, **environment}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def finished(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()[-2000:]


def test_snippets_are_short():
    assert len(snippets()) == 6
    assert all(len(code.splitlines()) <= 20 for code in snippets())


def test_fastapi(here: Path, bundled: Captioner):
    needs("fastapi", "python-multipart", "httpx")
    from fastapi.testclient import TestClient

    names: dict = {}
    exec(snippet("fastapi"), names)
    client = TestClient(names["app"])
    answer = client.post("/caption", files={"photo": Path("a.jpg").read_bytes()})
    caption = bundled.caption("a.jpg")
    assert answer.status_code == 200
    assert answer.json() == {
        "text": caption.text,
        "log_probability": pytest.approx(caption.log_probability),
    }
    assert client.post("/caption", files={"photo": b"no photo"}).status_code == 422
    assert client.post("/caption", data={"photo": "text"}).status_code == 422


def test_gradio(run, bundled: Captioner):
    needs("gradio")
    from gradio_client import Client, handle_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = run(
        snippet("gradio"), GRADIO_SERVER_PORT=str(port), GRADIO_ANALYTICS_ENABLED="False"
    )  # fmt: skip
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    client = Client(f"http://127.0.0.1:{port}", verbose=False)
    answer = client.predict(handle_file("a.jpg"), api_name="/caption")
    assert answer == bundled.caption("a.jpg").text


def test_datasets(run, here: Path, bundled: Captioner):
    needs("datasets")
    finished(run(snippet("datasets"), HF_HOME=str(here / "cache"), HF_HUB_OFFLINE="1"))
    rows = [json.loads(line) for line in Path("captions.jsonl").read_text().splitlines()]
    photos = sorted(Path("photos").iterdir())
    assert rows == [{"text": caption.text} for caption in bundled.caption(photos)]


def test_notebook(here: Path, bundled: Captioner, monkeypatch: pytest.MonkeyPatch):
    needs("nbclient", "ipykernel")
    import nbformat
    from nbclient import NotebookClient

    path = os.pathsep.join([str(README.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("IPYTHONDIR", str(here / "ipython"))
    cell = nbformat.v4.new_code_cell(snippet("IPython"))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": here}}
    ).execute()
    shown = [output["data"] for output in notebook.cells[0].outputs]
    assert ["image/jpeg" in data for data in shown] == [True, False, True, False]
    assert [data["text/plain"] for data in shown[1::2]] == [
        repr(bundled.caption(name).text) for name in ("a.jpg", "b.jpg")
    ]
