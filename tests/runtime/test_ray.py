"""Ray: a real cluster of this machine's, whose workers are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_photo, snippet

from capexport.captioner import Captioner
from capexport.errors import (
    ArtifactNotFoundError,
    DeviceError,
    ImageNotFoundError,
    OptionError,
    OutputExistsError,
)

ray = pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'capexport[ray]'")
psutil = pytest.importorskip("psutil")

import pyarrow.dataset  # noqa: E402
from fsspec.implementations.local import LocalFileSystem as LocalFiles  # noqa: E402
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem  # noqa: E402
from ray.exceptions import ActorDiedError  # noqa: E402

from capexport.bulk.parts import RECORD, SCHEMA, Parts  # noqa: E402
from capexport.bulk.places import locate  # noqa: E402
from capexport.ray import _actors, _cut, _next, caption_dataset, caption_files  # noqa: E402

MANY = 256


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """A cluster of two CPUs; its address."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # its workers', too
        yield ray.init("local", num_cpus=2, log_to_driver=False).address_info["address"]
        ray.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough files that something can happen meanwhile; of 16 kinds."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(16):
        draw_photo(number, (300, 200)).save(folder / f"{number:03}.jpg")
    for number in range(16, MANY):
        os.link(folder / f"{number % 16:03}.jpg", folder / f"{number:03}.jpg")
    return folder


def rows(out: Path, format: str = "parquet") -> dict[str, dict]:
    """By file name, as a library reads the folder; every name is there once."""
    reader = "json" if format == "jsonl" else format
    found = pyarrow.dataset.dataset(out, format=reader).to_table().to_pylist()
    if format == "jsonl":
        found = [
            {name: None if value == "" else value for name, value in row.items()} for row in found
        ]
    by_name = {row["file_name"]: row for row in found}
    assert len(by_name) == len(found)
    return by_name


def hostile(folder: Path) -> dict[str, Path]:
    """Files that are captioned, or fail, by their name in the rows."""
    names = ["a.jpg", "A.jpg", "b c.JPG", "b%20c.jpg", "d\nü.png", r"\x41.jpg", "deep/er/e.webp"]
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        style = {".png": "PNG", ".webp": "WEBP"}.get(Path(name).suffix, "JPEG")
        draw_photo(seed).save(folder / name, style)
    for name in (".hidden.jpg", ".trash/x.jpg", "@eaDir/x.jpg", "notes.txt", "film.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "a.jpg").read_bytes())
    (folder / "nothing.jpg").touch()
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "empty").mkdir()
    shown = {r"\x41.jpg": r"\x5cx41.jpg"}
    wanted = {
        shown.get(name, name): folder / name for name in [*names, "nothing.jpg", "broken.jpg"]
    }
    if sys.platform == "linux":
        draw_photo(9).save(os.fsencode(folder) + b"/\xff.jpg", "JPEG")
        wanted[r"\xff.jpg"] = Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jpg"))
    return {f"{folder.as_posix()}/{name}": path for name, path in wanted.items()}


DRIVER = """
import json, sys
from capexport.ray import caption_files
caption_files(json.loads(sys.argv[1]), *sys.argv[2:])
"""


def kill_in_the_middle(cluster: str, photos: list[Path], out: Path, model: Path) -> None:
    places = json.dumps(list(map(str, photos)))
    command = [sys.executable, "-c", DRIVER, places, str(out), str(model)]
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None and not list(out.glob("part-*")):
            time.sleep(0.02)
        driver.kill()


def test_a_job_goes_on_after_its_driver_was_killed(
    cluster: str, tmp_path: Path, many: Path, artifact: Path, captioner: Captioner
):
    photos, out = tmp_path / "photos", tmp_path / "out"
    wanted = hostile(photos)
    places = [photos, many]
    kill_in_the_middle(cluster, places, out, artifact)
    before = rows(out)
    kept = {name for name, row in before.items() if not row["error"]}
    assert 0 < len(kept) < MANY
    with pytest.raises(OutputExistsError, match="not empty"):
        caption_files(places, out, artifact)
    for options in ({"max_tokens": 8}, {"format": "jsonl"}):
        with pytest.raises(OutputExistsError, match="other options"):
            caption_files(places, out, artifact, resume=True, **options)
    assert rows(out) == before
    (out / ".part-x.parquet.0123456789abcdef.partial").write_bytes(b"half")

    for name in ("nothing.jpg", "new.jpg"):
        draw_photo(20).save(photos / name)
    wanted[f"{photos}/new.jpg"] = photos / "new.jpg"
    wanted |= {str(path): path for path in many.iterdir()}
    job = caption_files(places, out, artifact, resume=True)
    assert (job.captioned, job.failed) == (len(wanted) - 1 - len(kept), 1)
    assert job.left_out == len(kept)  # none was captioned twice
    assert not list(out.glob(".*.partial"))
    found = rows(out)
    assert found.keys() == wanted.keys()
    broken = found.pop(f"{photos}/broken.jpg")
    assert broken["text"] is broken["log_probability"] is None
    assert broken["error"].startswith(f"{photos}/broken.jpg: ")
    for (name, row), caption in zip(
        found.items(), captioner.caption(map(wanted.get, found)), strict=True
    ):
        assert (name, row["text"], row["error"]) == (name, caption.text, None)
        assert row["log_probability"] == pytest.approx(caption.log_probability, abs=1e-4)


class Deadly(FSSpecHandler):
    """Files as another file system has them; one of them ends the process that opens it."""

    def open_input_stream(self, path: str):
        if path.endswith("deadly.jpg"):
            os._exit(11)
        return super().open_input_stream(path)


def kill_a_worker(out: Path) -> None:
    while not list(out.glob("part-*")):
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        if "_PartWriter" in " ".join(process.cmdline()):
            process.kill()
            return


def test_killed_workers_and_a_photo_that_kills(tmp_path: Path, many: Path, artifact: Path):
    (many / "000 deadly.jpg").touch()
    killer = threading.Thread(target=kill_a_worker, args=[tmp_path / "out"], daemon=True)
    killer.start()
    system = PyFileSystem(Deadly(LocalFiles()))
    try:
        job = caption_files(
            str(many), str(tmp_path / "out"), artifact, filesystem=system, format="jsonl"
        )
    finally:
        (many / "000 deadly.jpg").unlink()
    assert not killer.is_alive()
    assert (job.captioned, job.failed, job.left_out) == (MANY, 1, 0)
    found = rows(tmp_path / "out", "jsonl")
    assert len(found) == MANY + 1
    [error] = [row["error"] for row in found.values() if row["error"]]
    assert error == f"{many}/000 deadly.jpg: ends the process that reads it"


class Fatal(FSSpecHandler):
    """Files that no other process can be told of."""

    def __reduce__(self):
        return os._exit, (11,)


def test_workers_that_always_end(tmp_path: Path, photos: list[Path], artifact: Path):
    system = PyFileSystem(Fatal(LocalFiles()))
    places = str(photos[0].parent), str(tmp_path / "out")
    with pytest.raises(ActorDiedError):
        caption_files(*places, artifact, filesystem=system, workers=1)
    assert caption_files(*places, artifact, resume=True).failed == 0


def test_a_cluster_without_machines(monkeypatch: pytest.MonkeyPatch):
    import ray

    never = ray.remote(num_cpus=64)(lambda: None).remote()
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": False}])
    monkeypatch.setattr("capexport.ray._PATIENCE", 0.01)
    with pytest.raises(DeviceError, match="no machine"):
        _next([never])


@pytest.mark.parametrize(("count", "workers"), [(1, 3), (64, 1), (65, 2), (100_001, 7)])
def test_parts_become_smaller(count: int, workers: int):
    names = [str(number) for number in range(count)]
    cut = list(_cut(names, workers, 32))
    sizes = list(map(len, cut))
    assert [name for part in cut for name in part] == names
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= 1000 and sizes[-1] <= 32


def test_the_readme(tmp_path: Path, photos: list[Path]):
    def absolute(code: str) -> str:  # its workers are in another current folder
        return re.sub(r'"(\w[\w.]*/)"', lambda match: repr(f"{tmp_path}/{match[1]}"), code)

    exec(absolute(snippet("caption_files")), {})
    exec(absolute(snippet("caption_dataset")), {})
    captions = Captioner.load(threads=1).caption(photos)
    wanted = {str(photo): c.text for photo, c in zip(photos, captions, strict=True)}
    assert {name: row["text"] for name, row in rows(tmp_path / "captions").items()} == wanted
    lines = [line for part in (tmp_path / "captions.json").iterdir() for line in part.open()]
    assert {row["path"]: row["text"] for row in map(json.loads, lines)} == wanted


def test_a_dataset_of_arrays(artifact: Path, captioner: Captioner):
    from ray.data import from_items

    images = [np.asarray(draw_photo(seed, (90 + seed, 80))) for seed in range(5)]
    items = [{"image": image, "number": n} for n, image in enumerate(images)]
    found = caption_dataset(from_items(items), "image", artifact, max_tokens=5).take_all()
    wanted = [caption.text for caption in captioner.caption(images, max_tokens=5)]
    assert [row["text"] for row in sorted(found, key=lambda row: row["number"])] == wanted
    assert all(row["error"] is None and row["log_probability"] < 0 for row in found)


def test_a_dataset_as_hugging_face_has_them(artifact: Path, captioner: Captioner, photos):
    from ray.data import from_arrow

    contents = [
        {"bytes": photos[0].read_bytes(), "path": "a.jpg"},
        {"bytes": None, "path": str(photos[1])},
        {"bytes": b"no photo", "path": None},
        None,
    ]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    column, boxes = pyarrow.array(contents, kind), [[{"label": 1}], [], [], None]
    dataset = from_arrow(pyarrow.table({"image": column, "objects": boxes, "row": range(4)}))
    found = caption_dataset(dataset, "image", artifact).take_all()
    found.sort(key=lambda row: row["row"])
    wanted = [caption.text for caption in captioner.caption(photos[:2])]
    assert [row["text"] for row in found] == [*wanted, None, None]
    assert [bool(row["error"]) for row in found] == [False, False, True, True]
    assert [row["image"] for row in found] == contents


def test_columns_that_do_not_suit(artifact: Path):
    from ray.data import from_items

    dataset = from_items([{"image": b"", "text": "mine"}])
    for column, message in (
        ("picture", "no column 'picture', but image, text"),
        ("image", "'text'"),
    ):
        with pytest.raises(Exception, match=message):
            caption_dataset(dataset, column, artifact, workers=1).take_all()


def test_arrows_own_tensors(artifact: Path, captioner: Captioner):
    from ray.data import from_arrow

    images = np.stack([np.asarray(draw_photo(seed)) for seed in range(3)])
    table = pyarrow.table({"image": pyarrow.FixedShapeTensorArray.from_numpy_ndarray(images)})
    found = caption_dataset(from_arrow(table), "image", artifact).take_all()
    assert [row["text"] for row in found] == [one.text for one in captioner.caption(list(images))]


def test_cores_of_machines_without_a_gpu_are_not_counted(monkeypatch: pytest.MonkeyPatch):
    cluster = [{"CPU": 64.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 9.0, "GPU": 2.0}]
    nodes = [{"Alive": True, "Resources": resources} for resources in cluster]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert _actors("cuda", None, None, True) == (6, 4)
    assert _actors("cpu", None, None, True) == (89, 1)


def test_refused_before_anything_starts(tmp_path: Path, photos: list[Path], artifact: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    folder, other = photos[0].parent, PyFileSystem(FSSpecHandler(LocalFiles()))
    wrong = [
        (ImageNotFoundError, "no image files", {"photos": tmp_path / "empty"}),
        (ImageNotFoundError, "no image files", {"photos": f"{tmp_path}/e", "filesystem": other}),
        (ImageNotFoundError, "no image", {"photos": f"{tmp_path}/e", "filesystem": LocalFiles()}),
        (ImageNotFoundError, "no such", {"photos": [folder, tmp_path / "nowhere"]}),
        (OptionError, "at least one", {"photos": []}),
        (OptionError, "empty path", {"photos": ""}),
        (OptionError, "empty path", {"out": ""}),
        (OptionError, "format", {"format": "csv"}),
        (OptionError, "device", {"device": "cuda:1"}),
        (DeviceError, "a GPU", {"device": "cuda"}),
        (DeviceError, "64 cores", {"threads": 64}),
        (OptionError, "workers", {"workers": 0}),
        (OptionError, "max_tokens", {"max_tokens": 0}),
        (OptionError, "one caption", {"num_beams": 2, "num_return_sequences": 2}),
        (OptionError, "file system", {"photos": "nosuch://bucket/photos"}),
        (ArtifactNotFoundError, "manifest.json", {"model": tmp_path}),
        (OutputExistsError, "not capexport's", {"out": tmp_path / "mine", "resume": True}),
    ]
    for error, message, changes in wrong:
        arguments = {"photos": folder, "out": tmp_path / "out", "model": artifact, **changes}
        with pytest.raises(error, match=message):
            caption_files(**arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="takes no prompt"):  # what a worker says
        caption_files(folder, tmp_path / "out", artifact, prompt="a photo of")
    Parts.begin(LocalFileSystem(), str(tmp_path / "out"), "parquet", {}, False)  # it left nothing
    memory = MemoryFileSystem()
    memory.pipe("/photos/a.jpg", b"")
    memory.mkdir("/empty")
    with pytest.raises(ImageNotFoundError, match="lost: no image files"):
        caption_files(["/photos", "/lost"], "/out", artifact, filesystem=memory)
    with pytest.raises(OptionError, match="must see the same folder"):
        caption_files(["/empty", "/photos"], "/out", artifact, filesystem=memory)


@pytest.fixture(params=["local", "another"])
def system(request: pytest.FixtureRequest):
    return LocalFileSystem() if request.param == "local" else PyFileSystem(Deadly(LocalFiles()))


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_parts(tmp_path: Path, system, format: str):
    def table(*names: str, error: str | None = None):
        part = [{"file_name": n, "text": "a\u2028dog", "error": error} for n in names]
        return pyarrow.Table.from_pylist(part, SCHEMA)

    out = tmp_path / "out"

    def begin(resume: bool = True, **made_with) -> tuple[Parts, set[str]]:
        return Parts.begin(system, f"{out}/", format, {"captioner": ("x",), **made_with}, resume)

    first, there = begin(resume=False)
    assert there == set()
    for part in (table("a", "A"), table("a", "A"), table("b"), table("c", error="no")):
        first.write(part)
    first.write(pyarrow.concat_tables([table("d"), table("e", error="no")]))
    second, there = begin()
    assert there == {"a", "A", "b", "d"}
    assert {name: row["text"] for name, row in rows(out, format).items()} == dict.fromkeys(
        there, "a\u2028dog"
    )
    with pytest.raises(OutputExistsError, match="taken over"):
        first.write(table("f"))
    with pytest.raises(OutputExistsError, match="other options"):
        begin(prompt="y")
    second.write(table("c", "e"))  # whose run goes on
    assert len(rows(out, format)) == 6
    next(out.glob("part-*")).write_bytes(b'{"file')
    with pytest.raises(OutputExistsError, match=r"part-\w+\.\w+: damaged"):
        begin()
    assert not list(out.glob("*.partial"))
    assert json.loads((out / RECORD).read_text())["captioner"] == ["x"]


def test_places(tmp_path: Path):
    assert locate("a", LocalFiles()) == (PyFileSystem(FSSpecHandler(LocalFiles())), "a")
    assert locate("file:///a%20b", None)[1] == "/a b"
    assert locate(tmp_path / "a%20b", None)[1] == f"{tmp_path}/a%20b"
    options = "?region=us-east-1&endpoint_override=localhost:1"
    for key in ("a%20b.jpg", "a b/ü.jpg", "a?b.jpg", "A.jpg", "a//b\n.jpg"):
        assert locate(f"s3://bucket/{key}{options}", None)[1] == f"bucket/{key}"
