"""Models and photos that the tests build themselves; nothing is downloaded."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def draw_photo(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A soft colour field, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


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


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Twelve JPEG files in a folder `photos`."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"photo_{index:02}.jpg" for index in range(12)]
    for index, path in enumerate(paths):
        draw_photo(index).save(path, quality=95)
    return paths


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """A small CNN-LSTM with random weights whose captions differ from photo to photo."""
    import torch

    from capexport.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from capexport.models.cnn_lstm import CnnLstm, CnnLstmConfig
    from capexport.preprocessing import ImageSpec, preprocess
    from capexport.vocabulary import Vocabulary

    torch.manual_seed(1)
    vocabulary = Vocabulary((*Vocabulary.SPECIALS, *WORDS))
    model = CnnLstm(CnnLstmConfig(len(vocabulary), embed_size=24, hidden_size=32))
    spec = ImageSpec()
    pixels = np.stack([preprocess(draw_photo(seed), spec) for seed in range(16)])
    with torch.no_grad():
        # Batch-norm statistics of these photos, so that the image feature tells them apart.
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = None
        torch.nn.Module.train(model)
        model.encoder(torch.from_numpy(pixels))
        for name, weight in model.decoder.named_parameters():
            weight.mul_(4 if name.startswith(("lstm.weight", "output.weight")) else 1)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(Checkpoint(model, vocabulary, spec), folder)
    loaded = load_checkpoint(folder)
    loaded.training["folder"] = str(folder)
    return loaded


@pytest.fixture(scope="session")
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, exported. CAPEXPORT_TEST_ARTIFACT names one made before, so that the
    runtime's tests can run where torch cannot be imported."""
    if ready := os.environ.get("CAPEXPORT_TEST_ARTIFACT"):
        return Path(ready)
    from capexport.export.cnn_lstm import export_cnn_lstm

    out = tmp_path_factory.mktemp("export") / "small"
    export_cnn_lstm(request.getfixturevalue("checkpoint"), out)
    return out


@pytest.fixture(scope="session")
def captioner(artifact: Path):
    from capexport import Captioner

    return Captioner.load(artifact, threads=1)
