"""`caption_files` and its outputs, below the command line."""

import copy
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from capexport.bulk.outputs import FileOutput
from capexport.bulk.run import caption_files, open_captioner
from capexport.captioner import Captioner
from capexport.errors import ImageError


class Rows:
    def __init__(self) -> None:
        self.rows: list[tuple[Path, str]] = []
        self.finished = False

    def done(self, path: Path) -> bool:
        return False

    def write(self, rows) -> None:
        self.rows += rows

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(params=[1, 2], ids="captioner of {} threads".format)
def own(request: pytest.FixtureRequest, captioner: Captioner) -> Captioner:
    """A captioner to tamper with; `caption_files` goes by its number of threads."""
    own = copy.copy(captioner)
    own.threads = request.param
    return own


@pytest.mark.parametrize("batch_size", [1, 5, 12, 50])
def test_files_come_in_order(own: Captioner, photos: list[Path], batch_size: int):
    output = Rows()
    steps = list(caption_files(own, photos, output, batch_size=batch_size, workers=3))
    wanted = [caption.text for caption in own.caption(photos)]
    assert output.rows == list(zip(photos, wanted, strict=True))
    assert [count for count, _ in steps] == [
        min(batch_size, len(photos) - start) for start in range(0, len(photos), batch_size)
    ]
    assert output.finished


def test_a_batch_that_overtakes_another_waits_for_it(own: Captioner, photos: list[Path]):
    preprocess = own.preprocess
    overtaken = threading.Event()

    def slow_at_first(path, out):
        if path == photos[0]:
            assert overtaken.wait(60)
        if path == photos[5]:
            overtaken.set()
        return preprocess(path, out)

    own.preprocess = slow_at_first
    output = Rows()
    list(caption_files(own, photos, output, batch_size=2, workers=2))
    assert [path for path, _ in output.rows] == photos


def test_reading_ahead_has_a_limit(own: Captioner, photos: list[Path]):
    preprocess = own.preprocess
    read: list[Path] = []

    def counted(path, out):
        read.append(path)
        return preprocess(path, out)

    own.preprocess = counted
    run = caption_files(own, photos * 10, Rows(), batch_size=2, workers=2)
    for taken in (2, 4):  # nobody asks for more until the workers have nothing left to do
        next(run)
        before = -1
        while before != len(read):
            before = len(read)
            time.sleep(0.3)
        assert len(read) <= taken + 2 * 2 * 2
    run.close()


def test_unreadable_files_are_reported_where_they_come(own: Captioner, photos: list[Path]):
    for index in (2, 4, 5):
        photos[index].write_bytes(b"no image")
    output = Rows()
    steps = list(caption_files(own, photos, output, batch_size=2, workers=2))
    assert [len(errors) for _, errors in steps] == [0, 1, 2, 0, 0, 0]
    assert all(isinstance(error, ImageError) for _, errors in steps for error in errors)
    readable = [path for index, path in enumerate(photos) if index not in (2, 4, 5)]
    wanted = [caption.text for caption in own.caption(readable)]
    assert output.rows == list(zip(readable, wanted, strict=True))


def test_a_failure_ends_the_run(own: Captioner, photos: list[Path]):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    own.caption_pixels = fail
    output = Rows()
    with pytest.raises(RuntimeError, match="out of memory"):
        list(caption_files(own, photos * 10, output, batch_size=2, workers=2))
    assert not output.rows and not output.finished


def test_no_files(own: Captioner):
    output = Rows()
    assert list(caption_files(own, [], output, batch_size=2)) == []
    assert output.finished


def test_a_small_model_gets_a_core_for_each_batch(artifact: Path):
    captioner = open_captioner(artifact, threads=3)
    assert (captioner.threads, captioner.batch_size) == (1, 32)


def test_a_large_model_gets_all_cores_for_one_batch(blip2_artifact: Path):
    captioner = open_captioner(blip2_artifact, threads=3)
    assert (captioner.threads, captioner.batch_size) == (3, 8)


@pytest.mark.parametrize("style", ["text", "jsonl", "csv", "coco"])
def test_captions_are_kept_on_disk_not_in_memory(tmp_path: Path, style: str):
    paths = [tmp_path / f"{number}.jpg" for number in range(1000)]
    output = FileOutput(tmp_path / "out", style, paths, "key", resume=False)
    tracemalloc.start()
    for path in paths:
        output.write([(path, f"caption of {path.name}: " + "word " * 1000)])
    output.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out").read_text().count("caption of ") == 1000
    assert peak < 1_000_000  # a fifth of the captions
