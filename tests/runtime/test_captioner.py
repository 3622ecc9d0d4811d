"""`Captioner`: what it takes, what it refuses, and where it goes on working."""

import dataclasses
import itertools
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS, edit_manifest, vouch
from PIL import Image

from capexport import (
    ArtifactError,
    ArtifactNotFoundError,
    Captioner,
    DeviceError,
    ImageError,
    MissingExtraError,
    OptionError,
)
from capexport.artifact import Manifest
from capexport.captioner import open_artifact
from capexport.families.cnn_lstm import Vocabulary
from capexport.reading import ImageReader
from capexport.sessions import CPU, Target, targets


def test_one_image_and_a_list(captioner: Captioner, photos: list[Path]):
    caption = captioner.caption(photos[1])
    assert caption.text == " ".join(captioner.text.words[token] for token in caption.tokens)
    assert set(caption.text.split()) <= set(WORDS)
    assert caption.log_probability < 0
    assert caption.timing.images == 1
    assert min(caption.timing.preprocess, caption.timing.encode, caption.timing.decode) > 0
    [same] = captioner.caption([photos[1]])
    assert same.tokens == caption.tokens
    assert captioner.caption([]) == []


def test_a_batch_gives_the_same_captions_as_one_by_one(captioner: Captioner, photos: list[Path]):
    single = [captioner.caption(photo).tokens for photo in photos]
    assert len(set(single)) > 5, "the captions must vary for this test to mean something"
    assert len({len(tokens) for tokens in single}) > 2
    for batch_size in (1, 5, 32):
        batched = captioner.caption(photos, batch_size=batch_size)
        assert [caption.tokens for caption in batched] == single


def test_max_tokens_cuts_a_caption(captioner: Captioner, photos: list[Path]):
    whole = captioner.caption(photos[0]).tokens
    assert len(whole) > 3
    assert captioner.caption(photos[0], max_tokens=3).tokens == whole[:3]


def test_a_bad_image_in_a_list_is_named(captioner: Captioner, photos: list[Path]):
    photos[2].write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"photo_02\.jpg"):
        captioner.caption(photos)


def test_arguments_out_of_range(captioner: Captioner, artifact: Path, photos: list[Path]):
    with pytest.raises(ValueError, match="batch_size"):
        captioner.caption(photos, batch_size=0)
    with pytest.raises(ValueError, match="max_tokens"):
        captioner.caption(photos, max_tokens=0)
    with pytest.raises(ValueError, match="threads"):
        Captioner.load(artifact, threads=0)
    with pytest.raises(OptionError, match="at most 1024"):
        Captioner.load(artifact, threads=5000)
    with pytest.raises(OptionError, match=r"providers takes a list"):
        Captioner.load(artifact, providers="CPUExecutionProvider")
    for device in (None, 0):
        with pytest.raises(DeviceError, match="unknown device"):
            Captioner.load(artifact, device=device)
    for wrong in ({"batch_size": "4"}, {"batch_size": 1.5}, {"prompt": 3}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            captioner.caption(photos, **wrong)


def test_a_copied_artifact_still_works(copied: Path, captioner: Captioner, photos: list[Path]):
    tokens = Captioner.load(copied).caption(photos[0]).tokens
    assert tokens == captioner.caption(photos[0]).tokens


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder_step.onnx", "vocabulary.json"])
def test_tampered_and_missing_files(copied: Path, name: str):
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: altered or damaged"):
        Captioner.load(copied)
    path.unlink()
    with pytest.raises(ArtifactNotFoundError, match=f"{name}: missing"):
        Captioner.load(copied)


def test_swapped_graphs_with_matching_hashes(copied: Path):
    encoder, step = copied / "encoder.onnx", copied / "decoder_step.onnx"
    shutil.copy(step, encoder)
    vouch(copied, "encoder.onnx")
    with pytest.raises(ArtifactError, match=r"encoder\.onnx: graph of"):
        Captioner.load(copied)


def test_a_graph_that_onnxruntime_cannot_read(copied: Path):
    path = copied / "encoder.onnx"
    for content, message in (
        (b"no graph", "no ONNX graph"),
        (b"", "no ONNX graph"),
        (b"\x08\x0a", "cannot load this graph"),  # nothing but a version
    ):
        path.write_bytes(content)
        vouch(copied, "encoder.onnx")
        with pytest.raises(ArtifactError, match=rf"encoder\.onnx.*{message}"):
            Captioner.load(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "schema 99.*upgrade capexport"),
        ({"family": "transformer-9"}, "unknown model family"),
        ({"image": {"resize": 3}}, "damaged manifest"),
        ({"decoding": {}}, "damaged manifest: decoding.end_tokens is missing"),
        ({"files": {"../encoder.onnx": {"bytes": 1, "sha256": "0" * 64}}}, "not a plain file name"),
        ({"files": {}}, r"lists no vocabulary\.json"),
        ({"state": None}, "damaged manifest: state is no dict"),
        ({"unknown_field": 1}, "damaged manifest"),
    ],
)
def test_manifests_that_do_not_fit(copied: Path, changes: dict, message: str):
    edit_manifest(copied, **changes)
    with pytest.raises(ArtifactError, match=message):
        Captioner.load(copied)


def test_a_manifest_that_is_no_json_and_a_folder_without_one(copied: Path, tmp_path: Path):
    (copied / "manifest.json").write_text('{"schema": 1, ')
    with pytest.raises(ArtifactError, match="damaged manifest"):
        Captioner.load(copied)
    with pytest.raises(ArtifactNotFoundError, match=r"no manifest\.json"):
        Captioner.load(tmp_path / "nowhere")


@pytest.mark.parametrize("looped", [False, True])
def test_a_vocabulary_of_another_size(copied: Path, photos: list[Path], looped: bool):
    """Found at load; beside a loop, which has no logits to count, when steps are first taken."""
    words = json.loads((copied / "vocabulary.json").read_text(encoding="utf-8"))
    (copied / "vocabulary.json").write_text(json.dumps([*words, "more"]), encoding="utf-8")
    if not looped:
        (copied / "decoder_loop.onnx").unlink()
    vouch(copied)
    with pytest.raises(ArtifactError, match=f"{len(words)}.*the words want .*{len(words) + 1}"):
        Captioner.load(copied).caption(photos[0], repetition_penalty=1.5)


def test_devices_that_are_not_there(artifact: Path):
    import onnxruntime

    with pytest.raises(DeviceError, match="choose auto, cuda, cpu"):
        Captioner.load(artifact, device="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(DeviceError, match=r"capexport\[gpu\]"):
            Captioner.load(artifact, device="cuda")


def test_cuda_computes_in_float32():
    [target] = targets("cuda:1")
    assert target.device.options["use_tf32"] == "0"
    assert (target.name, target.index) == ("cuda:1", 1)


class Bound(Target):
    """Values stay with onnxruntime, as they do on a GPU."""

    def open(self, path: Path, **how):
        return super().open(path, **{**how, "bound": True})


@pytest.mark.parametrize("changes", [{}, {"repetition_penalty": 1.3}])
def test_a_state_that_stays_on_its_device(
    artifact: Path, captioner: Captioner, photos: list[Path], changes: dict
):
    """What CUDA does, on the device that is here: rows of different length leave the batch."""
    device = dataclasses.replace(CPU.device, images_per_core=None)
    bound = open_artifact(artifact, Manifest.read(artifact), Bound(device, threads=1))
    wanted = captioner.caption(photos, **changes)
    assert len({len(caption.tokens) for caption in wanted}) > 1
    got = bound.caption(photos, **changes)
    assert [c.tokens for c in got] == [c.tokens for c in wanted]


def test_without_onnxruntime_both_extras_are_named(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"capexport\[cpu\].*capexport\[gpu\]"):
        Captioner.load(artifact)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("raise ImportError('libx.so.1: cannot open')", MissingExtraError, "loaded: libx.so.1"),
        ("raise RuntimeError('built for another numpy')", MissingExtraError, "another numpy"),
        ("import surely_not_there", MissingExtraError, "No module named 'surely_not_there'"),
        # What extension modules make of Ctrl-C.
        (
            "try: raise KeyboardInterrupt\n"
            "except KeyboardInterrupt as error: raise ImportError('initialization') from error",
            KeyboardInterrupt,
            "^$",
        ),
    ],
)
def test_an_onnxruntime_that_is_there_but_fails(
    body: str, error: type[BaseException], message: str, artifact: Path, monkeypatch, tmp_path
):
    (tmp_path / "onnxruntime.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(error, match=message):
        Captioner.load(artifact)


def test_importing_capexport_loads_no_heavy_package():
    heavy = ["onnxruntime", "torch", "transformers", "tokenizers", "matplotlib", "scipy"]
    code = f"import sys, capexport; sys.exit(str([m for m in {heavy} if m in sys.modules]))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.stderr.strip() == "[]"


def test_pixels_can_be_handed_in(captioner: Captioner, photos: list[Path]):
    from capexport.preprocessing import preprocess

    pixels = np.stack([preprocess(photo, captioner.image) for photo in photos[:3]])
    wanted = [caption.tokens for caption in captioner.caption(photos[:3])]
    assert [caption.tokens for caption in captioner.caption_pixels(pixels)] == wanted
    assert captioner.caption_pixels(pixels[:0]) == []
    for wrong in (pixels[0], pixels[:, :, 1:], pixels.astype(float), [*pixels], "a.jpg"):
        with pytest.raises(OptionError, match=r"pixels must be float32 \(batch, 3, "):
            captioner.caption_pixels(wrong)
    with pytest.raises(OptionError, match="2 prompts for 3 images"):
        captioner.caption_pixels(pixels, prompts=["a", "b"])


def test_an_image_object_keeps_its_pixels(captioner: Captioner, photos: list[Path]):
    with Image.open(photos[0]) as image:
        before = image.copy().tobytes()
        captioner.caption(image)
        assert image.tobytes() == before


def test_vocabulary_round_trip():
    vocabulary = Vocabulary((*Vocabulary.SPECIALS, "dog", "runs"))
    assert vocabulary.encode(["dog", "flies"]) == [1, 4, 3, 2]
    assert vocabulary.decode([1, 4, 3, 5, 2, 0]) == "dog runs"
    with pytest.raises(ValueError, match="starts with"):
        Vocabulary(("dog",))
    with pytest.raises(ValueError, match="once"):
        Vocabulary((*Vocabulary.SPECIALS, "dog", "dog"))


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """What a new interpreter prints; it must end well, and in time."""
    outcome = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


FORKS = """
import os, sys, threading
from capexport import Captioner
folder, threads, *photos = sys.argv[1:]
captioner = Captioner.load(folder, threads=int(threads))
wanted = [captioner.caption(photo).tokens for photo in photos]
captioner.caption(photos, repetition_penalty=1.5)
captioner.caption(photos[0])
busy = threading.Thread(target=lambda: [captioner.caption(photos) for _ in range(3)])
busy.start()
children = []
for generation in range(3):
    if child := os.fork():
        children.append(child)
    else:
        assert captioner.caption(photos[1]).tokens == wanted[1]
        assert [c.tokens for c in captioner.caption(photos)] == wanted
        captioner.caption(photos[:2], repetition_penalty=1.5)
        if generation == 1:
            del captioner
        sys.exit(0)  # as it comes, objects freed and all
busy.join()
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_goes_on(artifact: Path, photos: list[Path], threads: int):
    """Its parent has captioned one image and several, and is at it while it forks."""
    run_python(FORKS, artifact, threads, *photos[:5])


def test_nothing_reports_home(photos: list[Path], tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    code = """
import os, sys
from capexport import Captioner
print(Captioner.load().caption(sys.argv[1]).text, os.environ["ORT_DISABLE_TELEMETRY"])
"""
    kept = {name: str(home / name) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    said = run_python(code, photos[0], HOME=str(home), USERPROFILE=str(home), **kept)
    assert said.endswith(" 1\n")
    assert list(home.iterdir()) == []
    assert run_python(code, photos[0], ORT_DISABLE_TELEMETRY="0").endswith(" 0\n")
    # Whichever of capexport's modules come after onnxruntime. This process has set it already.
    code = "import os; del os.environ[(name := 'ORT_DISABLE_TELEMETRY')]; import capexport"
    assert run_python(f"{code}; print(os.environ[name])", ORT_DISABLE_TELEMETRY="1") == "1\n"


def test_it_pickles_as_what_it_was_loaded_from(
    artifact: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(artifact.parent)
    captioner = Captioner.load(artifact.name, threads=2)
    captioner.batch_size = 3
    wanted = [caption.tokens for caption in captioner.caption(photos)]
    stored = pickle.dumps(captioner)
    assert len(stored) < 2000
    assert stored == pickle.dumps(captioner)
    monkeypatch.chdir("/")
    again = pickle.loads(stored)
    assert (again.threads, again.batch_size, repr(again)) == (2, 3, repr(captioner))
    assert [caption.tokens for caption in again.caption(photos)] == wanted
    assert pickle.dumps(again) == stored
    opened = open_artifact(artifact, Manifest.read(artifact), CPU)
    with pytest.raises(TypeError, match=r"Captioner\.load did not make"):
        pickle.dumps(opened)


def test_threads_share_a_captioner(artifact: Path, photos: list[Path]):
    captioner = Captioner.load(artifact, threads=2)
    wanted = [captioner.caption(photo).tokens for photo in photos]
    options = [{}, {"repetition_penalty": 1.5}, {"max_tokens": 2}]
    expected = [[c.tokens for c in captioner.caption(photos, **more)] for more in options]
    with ThreadPoolExecutor(8) as pool:
        lists = [pool.submit(captioner.caption, photos, **options[n % 3]) for n in range(24)]
        single = [pool.submit(captioner.caption, photo) for photo in photos]
        for number, future in enumerate(lists):
            assert [caption.tokens for caption in future.result()] == expected[number % 3]
        assert [future.result().tokens for future in single] == wanted


def test_batches_of_all_sizes_use_the_same_memory():
    """What is freed and allocated again, of many sizes, by many threads, makes a process grow."""
    captioner = Captioner.load(threads=1)
    images = [np.full((8, 8, 3), grey, np.uint8) for grey in range(0, 240, 10)]
    whole = captioner.caption(images)
    tracemalloc.start()
    for size in (2, 24, 9):
        again = captioner.caption(images[:size])
        assert [c.tokens for c in again] == [c.tokens for c in whole[:size]]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 * 3 * 224 * 224 * 4  # less than the pixels alone


def test_memory_that_a_thread_may_still_write_is_not_used_again():
    reader = ImageReader(threads=2, room=3)
    seen = []

    def fails(image: object, out: np.ndarray) -> None:
        seen.append(out)
        raise MemoryError

    with pytest.raises(MemoryError), reader.read([b"", b""], 8, fails):
        pass
    for side in (8, 6, 8):
        with reader.read([b"", b""], side, lambda image, out: out.fill(1)) as (pixels, errors):
            assert pixels.shape == (2, 3, side, side)
            assert errors == [None, None]
            assert not np.shares_memory(pixels, seen[0].base)


def test_whatever_gives_images(captioner: Captioner, photos: list[Path]):
    wanted = [caption.tokens for caption in captioner.caption(photos)]
    several = dict(enumerate(photos)).values()
    for images in (iter(photos), several, tuple(photos), (str(photo) for photo in photos)):
        assert [c.tokens for c in captioner.caption(images, batch_size=5)] == wanted
    for kind in (str, object):  # as of scikit-learn and pandas
        paths = np.array(list(map(str, photos)), kind)
        assert [c.tokens for c in captioner.caption(paths)] == wanted
    with photos[0].open("rb") as file:  # its lines are no images
        assert captioner.caption(file).tokens == wanted[0]
    assert captioner.caption(np.asarray(Image.open(photos[0]))).tokens == wanted[0]
    assert captioner.caption(iter([])) == []
    for other in (3, {"bytes": b""}):
        with pytest.raises(ImageError):
            captioner.caption(other)


def test_a_stream_takes_images_as_captions_are_asked_for(captioner: Captioner, photos: list[Path]):
    taken = 0

    def for_ever():
        nonlocal taken
        for photo in itertools.cycle(photos):
            taken += 1
            yield photo

    stream = captioner.stream(for_ever(), batch_size=4)
    assert taken == 0
    results = list(itertools.islice(stream, 6))
    assert taken == 8
    assert [image for image, _ in results] == photos[:6]
    wanted = captioner.caption(photos[:6])
    assert [caption.tokens for _, caption in results] == [caption.tokens for caption in wanted]


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_a_bad_image_in_a_stream(captioner: Captioner, photos: list[Path], batch_size: int):
    wanted = [caption.tokens for caption in captioner.caption(photos)]
    bad = {2, 3, 11}
    for number in bad:
        photos[number].write_bytes(b"no image")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("capexport").addHandler(handler)
    try:
        results = list(captioner.stream(photos, on_error="skip", batch_size=batch_size))
    finally:
        logging.getLogger("capexport").removeHandler(handler)
    good = [number for number in range(12) if number not in bad]
    assert [image for image, _ in results] == [photos[number] for number in good]
    assert [caption.tokens for _, caption in results] == [wanted[number] for number in good]
    assert [any(f"photo_{n:02}.jpg" in m for m in messages) for n in (2, 3, 11, 1)] == [
        True, True, True, False,
    ]  # fmt: skip
    assert list(captioner.stream(photos[2:4], on_error="skip", batch_size=batch_size)) == []

    stream = captioner.stream(photos, batch_size=batch_size)
    assert [next(stream)[1].tokens for _ in range(2)] == wanted[:2]
    with pytest.raises(ImageError, match=r"photo_02\.jpg"):
        next(stream)


def test_arguments_of_a_stream_are_checked_at_once(captioner: Captioner, photos: list[Path]):
    for arguments in ({"on_error": "ignore"}, {"batch_size": 0}, {"max_tokens": 0}):
        with pytest.raises(OptionError, match=next(iter(arguments))):
            captioner.stream(photos, **arguments)


def test_closing(artifact: Path, photos: list[Path]):
    before = threading.active_count()
    with Captioner.load(artifact, threads=4) as captioner:
        captioner.caption(photos)
        stream = captioner.stream(photos, batch_size=2)
        next(stream)
    assert threading.active_count() == before
    for refused in (
        lambda: captioner.caption(photos[0]),
        lambda: captioner.caption(photos),
        lambda: captioner.stream(photos),
        lambda: list(stream),
    ):
        with pytest.raises(OptionError, match="closed"):
            refused()
    captioner.close()
    assert threading.active_count() == before


def test_no_metadata_of_the_package_is_needed(photos: list[Path]):
    """As in an application that was frozen into one file."""
    code = """
import importlib.metadata as metadata, sys
found = metadata.distribution
def frozen(name):
    if name == "capexport":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.distribution = frozen
from capexport.cli import main
assert main(["caption", sys.argv[1]]) == 0
main(["--version"])
"""
    assert run_python(code, photos[0]).splitlines()[1].startswith("capexport ")


@pytest.fixture(scope="module")
def attentive(attention_artifact) -> Captioner:
    return Captioner.load(attention_artifact)


def test_attention_says_where_it_looked(attentive, photos):
    plain = attentive.caption(photos)
    assert all(caption.attention is None for caption in plain)
    rows, columns = attentive.decoder.regions
    together = attentive.caption(photos, attention=True, max_tokens=7)
    for photo, before, caption in zip(photos, plain, together, strict=True):
        assert caption.tokens == before.tokens[:7]
        assert caption.attention.shape == (len(caption.tokens), rows, columns)
        assert caption.attention.dtype == np.float32
        np.testing.assert_allclose(caption.attention.sum((1, 2)), 1, rtol=1e-5)
        alone = attentive.caption(photo, attention=True, max_tokens=7)
        np.testing.assert_allclose(alone.attention, caption.attention, atol=1e-5)
    firsts = [caption.attention[0] for caption in together if caption.tokens]
    assert np.ptp(firsts, axis=0).max() > 1e-3
    streamed = list(attentive.stream(photos[:3], attention=True, num_beams=2))
    assert [caption.attention is not None for _, caption in streamed] == [True] * 3


def test_a_caption_of_no_word_has_no_attention(attentive, photos):
    [end] = attentive.options.end_tokens
    every = tuple(token for token in range(len(attentive.text)) if token != end)
    caption = attentive.caption(photos[0], attention=True, suppress_tokens=every)
    assert caption.tokens == ()
    assert caption.attention.shape == (0, *attentive.decoder.regions)


def test_attention_of_a_captioner_without_regions(captioner, photos):
    for refused in (captioner.caption, captioner.stream):
        with pytest.raises(OptionError, match="looks at the whole image at once"):
            refused(photos[0], attention=True)
