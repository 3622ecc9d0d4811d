"""Models and photos that the tests build themselves; nothing is downloaded."""

import contextlib
import csv
import functools
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

README = Path(__file__).parents[1] / "README.md"
COMMITTED = Path(__file__).parent / "artifacts"  # by make_artifacts.py
PROMPTS = ["a photo of", "Question: how many cats are there? Answer:", "two"]
WORDS = [
    "a",
    "the",
    "dog",
    "cat",
    "man",
    "woman",
    "red",
    "blue",
    "runs",
    "jumps",
    "sits",
    "on",
    "in",
    "grass",
    "snow",
    "water",
    "with",
    "ball",
]


def pytest_collection_finish() -> None:
    """PyTorch's exporter would parse the sources of all its operators again for every graph."""
    if "torch" in sys.modules:
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


def draw_photo(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A soft colour field, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def opened(image: Image.Image, style: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, style, **options)
    return Image.open(buffer)


def every_mode() -> dict[str, tuple[Image.Image, Image.Image]]:
    """By mode: an image as a file holds it, and what its pixels mean, upright and in RGB."""
    photo = draw_photo(3, (400, 300))
    alpha = draw_photo(4, (400, 300)).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 8
    grey16 = Image.fromarray(np.asarray(alpha).astype(np.uint16) * 257)
    images = {
        "1": opened(photo.convert("1"), "PNG"),
        "L": opened(photo.convert("L"), "JPEG"),
        "LA": opened(Image.merge("LA", (photo.convert("L"), alpha)), "PNG"),
        "P": opened(photo.quantize(), "PNG"),
        "RGB": opened(photo, "JPEG"),
        "RGBA": opened(Image.merge("RGBA", (*photo.split(), alpha)), "PNG"),
        "CMYK": opened(photo.convert("CMYK"), "JPEG"),
        "YCbCr": photo.convert("YCbCr"),
        "16-bit": opened(grey16, "PNG"),
        "EXIF": opened(photo, "JPEG", exif=exif),
    }
    assert images["16-bit"].mode == "I;16"
    meant = {mode: ImageOps.exif_transpose(image).convert("RGB") for mode, image in images.items()}
    # Pillow would clip 16 bits to white.
    meant["16-bit"] = Image.fromarray((np.asarray(grey16) // 257).astype(np.uint8)).convert("RGB")
    return {mode: (image, meant[mode]) for mode, image in images.items()}


# `capexport`, but pausing behind every batch that is written: so that a signal meets it running.
SLOWLY = """
import sys, time
from capexport.bulk.outputs import FileOutput
from capexport.cli import main
write = FileOutput.write
FileOutput.write = lambda self, rows: (write(self, rows), time.sleep(1))
sys.exit(main(sys.argv[1:]))
"""


def default_signals() -> None:
    """For a process that is sent signals: under nohup, or behind `&`, it would ignore some."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def vouch(folder: Path, *names: str) -> None:
    """Put the sizes and hashes of these files, or of all that are there, into the manifest."""
    from capexport.atomic import sha256_of

    listed = json.loads((folder / "manifest.json").read_text())["files"] if names else {}
    files = [folder / name for name in names] or [*folder.iterdir()]
    records = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in files
        if file.name != "manifest.json" and file.is_file()
    }
    edit_manifest(folder, files={**listed, **records})


def assert_same(got, wanted, tolerance: float = 1e-3) -> None:
    """Captions, or alternatives, of the same tokens and text, and nearly the same probability."""
    assert [c.tokens for c in got] == [c.tokens for c in wanted]
    assert [c.text for c in got] == [c.text for c in wanted]
    np.testing.assert_allclose(
        [c.log_probability for c in got],
        [c.log_probability for c in wanted],
        rtol=tolerance,
        atol=tolerance,
    )


def shapes(values) -> dict[str, list[int | str]]:
    """Inputs or outputs of an ONNX graph: their axes by name."""
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in values
    }


CAPTIONS = ["A dog runs .", 'Two dogs , "playing" in snow']


def kaggle(folder: Path, count: int = 20) -> Path:
    (folder / "Images").mkdir(parents=True)
    with (folder / "captions.txt").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for index in range(count):
            draw_photo(index, (60, 50)).save(folder / "Images" / f"{index:03}.jpg")
            writer.writerows([f"{index:03}.jpg", caption] for caption in CAPTIONS)
    return folder


def snippets() -> list[str]:
    """Python in the README, of its sections on clusters and other programs."""
    text = README.read_text(encoding="utf-8")
    sections = re.findall(
        r"^## (?:A cluster|Inside other programs)\n(.*?)(?=^## )", text, re.S | re.M
    )
    return re.findall(r"^```python\n(.*?)^```", "".join(sections), re.S | re.M)


def snippet(word: str) -> str:
    """The one with this word."""
    [found] = [code for code in snippets() if re.search(rf"\b{word}\b", code)]
    return found


@pytest.fixture
def no_java() -> Iterator[None]:
    """METEOR takes ten seconds to start; `test_metrics.py` has it."""
    with pytest.MonkeyPatch.context() as patch:  # which a test's own doesn't undo
        patch.setenv("PATH", os.devnull)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that PyTorch's threads would do nothing but wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Twelve JPEG files in a folder `photos`."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"photo_{index:02}.jpg" for index in range(12)]
    for index, path in enumerate(paths):
        draw_photo(index).save(path, quality=95)
    return paths


def small_checkpoint(folder: Path, **sizes):
    """A small CNN-LSTM with random weights whose captions differ from photo to photo."""
    import torch

    from capexport.families.cnn_lstm import Vocabulary
    from capexport.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from capexport.models.cnn_lstm import CnnLstm, CnnLstmConfig
    from capexport.preprocessing import ImageSpec, preprocess

    torch.manual_seed(1)
    vocabulary = Vocabulary((*Vocabulary.SPECIALS, *WORDS))
    model = CnnLstm(CnnLstmConfig(len(vocabulary), embed_size=24, hidden_size=32, **sizes))
    spec = ImageSpec()
    pixels = np.stack([preprocess(draw_photo(seed), spec) for seed in range(16)])
    with torch.no_grad():
        # Batch-norm statistics of these photos, so that the image feature tells them apart.
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = None
        torch.nn.Module.train(model)
        maps = model.encoder(torch.from_numpy(pixels))
        if model.config.decoder == "attention":  # the same for its regions
            regions = maps.movedim(1, -1).flatten(0, 2)
            for layer in (model.decoder.key, model.decoder.value):
                layer.weight.div_(regions.std())
                layer.bias.copy_(-layer.weight @ regions.mean(0))
        louder = {"lstm.weight": 4, "output.weight": 4, "query": 8, "first": 4, "deep": 16}
        for name, weight in model.decoder.named_parameters():
            weight.mul_(next((by for part, by in louder.items() if name.startswith(part)), 1))
    save_checkpoint(Checkpoint(model, vocabulary, spec), folder)
    loaded = load_checkpoint(folder)
    loaded.training["folder"] = str(folder)
    return loaded


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def tiny_checkpoint():
    """A CNN-LSTM that sees patches of mean colour: exported in a fifth of the time."""
    from make_artifacts import small_captioner

    return small_captioner("lstm")


@pytest.fixture(scope="session")
def attention_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return small_checkpoint(tmp_path_factory.mktemp("attention"), decoder="attention")


def _exported(
    request: pytest.FixtureRequest, factory: pytest.TempPathFactory, checkpoint: str, name: str
) -> Path:
    if find_spec("torch") is None:
        return COMMITTED / name
    from capexport.export.cnn_lstm import export_cnn_lstm

    out = factory.mktemp("export") / name
    export_cnn_lstm(request.getfixturevalue(checkpoint), out)
    return out


@pytest.fixture(scope="session")
def attention_artifact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The small model with attention, exported; where torch is not installed, one that is
    committed."""
    return _exported(request, tmp_path_factory, "attention_checkpoint", "attention")


@pytest.fixture(scope="session")
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, exported; where torch is not installed, one that is committed."""
    return _exported(request, tmp_path_factory, "checkpoint", "cnn-lstm")


@pytest.fixture(scope="session")
def captioner(artifact: Path):
    from capexport import Captioner

    return Captioner.load(artifact, threads=1)


@pytest.fixture
def wanted(captioner, photos: list[Path]) -> list[str]:
    """What the small model says of `photos`."""
    return [caption.text for caption in captioner.caption(photos)]


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(artifact, tmp_path / "copied")


def key(artifact: Path, options: str = "{}") -> str:
    """What a journal of `capexport caption` says of the captions in it."""
    from capexport.atomic import sha256_of

    return f"{sha256_of(artifact / 'manifest.json')} {options} prompt=None"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the Hugging Face hub, and no network."""
    from huggingface_hub import constants
    from huggingface_hub.utils import reset_sessions

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    reset_sessions()
    yield tmp_path / "hub"
    reset_sessions()  # it remembers that it was offline


@pytest.fixture(scope="session")
def blip2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small BLIP-2 checkpoint of a kind that `blip2_models.TEXTS` lists."""
    from blip2_models import save_small_checkpoint

    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_small_checkpoint(tmp_path_factory.mktemp("blip2") / kind, kind)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def blip2_export(
    blip2_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Such a checkpoint, exported; `validated` has what Optimum said of its graphs."""
    from optimum.exporters.onnx import convert

    from capexport.export.blip2 import export_blip2

    made: dict[tuple[str, str], Path] = {}
    validate = convert.validate_models_outputs

    def make(kind: str, precision: str = "fp32") -> Path:
        if (kind, precision) not in made:
            out = tmp_path_factory.mktemp("blip2-export") / f"{kind}-{precision}"
            said = make.validated[kind, precision] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    convert,
                    "validate_models_outputs",
                    lambda **given: said.append(validate(**given)),
                )
                export_blip2(blip2_checkpoint(kind), out, precision)
            made[kind, precision] = out
        return made[kind, precision]

    make.validated = {}
    return make


@pytest.fixture(scope="session", params=["opt", "t5"])
def blip2_artifact(request: pytest.FixtureRequest) -> Path:
    """A small BLIP-2 in fp32; where torch is not installed, one that is committed."""
    if find_spec("torch") is None:
        return COMMITTED / request.param
    make: Any = request.getfixturevalue("blip2_export")
    return make(request.param)
