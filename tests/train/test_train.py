"""Training runs on small data with a random backbone: learning, resuming, and the run folder."""

import csv
import dataclasses
import errno
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_photo, kaggle
from safetensors.torch import load_file, save_file

from capexport import Captioner, DownloadError
from capexport.bench.sheet import Entry, draw_sheet
from capexport.cli import main as capexport
from capexport.families.cnn_lstm import Vocabulary
from capexport.models.checkpoint import load_checkpoint, save_checkpoint
from capexport.models.cnn_lstm import CnnLstm, CnnLstmConfig, ImageEncoder
from capexport.preprocessing import ImageSpec, preprocess
from train import loop
from train import score as score_module
from train.__main__ import main
from train.config import TrainConfig
from train.data import Examples, Photo, encode_captions, photos_as_trained, read_dataset
from train.features import CachedFeatures, LiveFeatures, load_backbone
from train.folder import run_folder
from train.objective import CiderReward, _draw, batch_loss, self_critical_loss

pytestmark = pytest.mark.usefixtures("no_java", "one_thread")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    state = ImageEncoder(CnnLstmConfig(1)).backbone.state_dict()
    path = tmp_path_factory.mktemp("backbone") / "mobilenet_v2.safetensors"
    save_file({f"features.{name}": value for name, value in state.items()}, path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kaggle(tmp_path_factory.mktemp("flickr8k"), 40)


@pytest.fixture
def options(data: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.getbasetemp() / "feature-cache"
    common = f"--data {data} --backbone-weights {backbone} --cache {cache} --min-count 1 --crop 64"
    return [*common.split(), "--embed-size", "16", "--hidden-size", "24", "--batch-size", "8"]


def same_tensors(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_from_photos_to_an_exported_captioner(options, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*options, "--out", str(run), "--epochs", "2", "--weights-dtype", "float16"]) == 0
    assert "test split, 4 photos: BLEU-1" in capsys.readouterr().out
    assert {path.name for path in run.iterdir()} == {
        "config.json", "skipped.json", "history.csv", "history.json", "curves.png", "best",
        "last.safetensors", "test.json", "samples.png",
    }  # fmt: skip
    history = json.loads((run / "history.json").read_text())
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    rows = list(csv.DictReader((run / "history.csv").open()))
    assert [float(row["validation_loss"]) for row in rows] == [
        epoch["validation_loss"] for epoch in history
    ]
    checkpoint = load_checkpoint(run)
    assert checkpoint.metrics["test"]["photos"] == 4
    assert "--weights-dtype float16" in checkpoint.training["command"]
    assert capexport(["lstm", str(run), "--out", str(tmp_path / "artifact")]) == 0
    capsys.readouterr()
    for captioner in (run, tmp_path / "artifact"):
        data = options[options.index("--data") + 1]
        assert score_module.main([str(captioner), "--data", data]) == 0
        scores = json.loads(capsys.readouterr().out.splitlines()[-1])
        stored = checkpoint.metrics["test"]
        assert scores == {key: value for key, value in stored.items() if key != "photos"}
    assert Captioner.load(tmp_path / "artifact").image == ImageSpec(crop=64)


def test_initial_loss_is_that_of_guessing_and_a_toy_batch_is_learnt():
    torch.manual_seed(0)
    model = CnnLstm(CnnLstmConfig(60, embed_size=32, hidden_size=64))
    rng = np.random.default_rng(0)
    batch = [(Path(), [[1, *rng.integers(4, 60, length).tolist(), 2]]) for length in (3, 9, 5, 7)]
    pooled = torch.randn(4, 1280)
    loss, tokens = batch_loss(model, batch, model.encoder.head(pooled))
    assert tokens == 3 + 9 + 5 + 7 + 2 * 4
    assert loss.item() == pytest.approx(math.log(60), rel=0.1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(trained, 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        loss, _ = batch_loss(model, batch, model.encoder.head(pooled))
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05


def test_padding_changes_neither_loss_nor_gradient():
    torch.manual_seed(0)
    model = CnnLstm(CnnLstmConfig(20, embed_size=8, hidden_size=8)).eval()
    features = model.encoder.head(torch.randn(2, 1280))
    batch = [(Path(), [[1, 5, 2]]), (Path(), [[1, 7, 8, 9, 10, 2]])]
    together, _ = batch_loss(model, batch, features)
    alone = [batch_loss(model, batch[i : i + 1], features[i : i + 1]) for i in range(2)]
    mean = sum(loss * tokens for loss, tokens in alone) / sum(tokens for _, tokens in alone)
    torch.testing.assert_close(together, mean)


def test_captions_that_a_photo_lacks_look_nowhere():
    torch.manual_seed(0)
    config = CnnLstmConfig(20, embed_size=8, hidden_size=8, decoder="attention")
    model, penalised = CnnLstm(config).eval(), TrainConfig(data=Path(), attention_penalty=1)
    features = torch.randn(2, 1280, 2, 2)
    batch = [(Path(), [[1, 5, 6, 2], [1, 7, 2]]), (Path(), [[1, 8, 9, 10, 11, 2]])]

    def penalty(photos: slice) -> float:
        plain, added = (
            batch_loss(model, batch[photos], features[photos], config)[0].item()
            for config in (None, penalised)
        )
        return added - plain

    both, first, second = map(penalty, (slice(2), slice(1), slice(1, 2)))
    assert both == pytest.approx((2 * first + second) / 3, rel=1e-5)
    assert first != pytest.approx(second, rel=1e-2)


def test_the_backbone_stays_frozen_with_its_statistics(options, backbone, tmp_path):
    run = tmp_path / "run"
    assert main([*options, "--out", str(run), "--epochs", "1"]) == 0
    before = load_file(backbone)
    after = load_checkpoint(run).model.encoder.backbone.state_dict()
    for name, value in after.items():
        assert torch.equal(value, before[f"features.{name}"]), name


def test_a_trained_backbone_moves(options, backbone, tmp_path):
    run = tmp_path / "run"
    extra = ["--epochs", "1", "--train-backbone", "--augment", "--resize", "72", "--crop", "64"]
    assert main([*options, "--out", str(run), *extra]) == 0
    name = "0.0.weight"
    after = load_checkpoint(run).model.encoder.backbone.state_dict()[name]
    assert not torch.equal(after, load_file(backbone)[f"features.{name}"])


def test_early_stopping_keeps_the_best(options, tmp_path):
    run = tmp_path / "run"
    extra = ["--epochs", "9", "--patience", "1", "--learning-rate", "1.0"]
    assert main([*options, "--out", str(run), *extra]) == 0
    losses = [epoch["validation_loss"] for epoch in json.loads((run / "history.json").read_text())]
    assert len(losses) < 9
    assert losses[-1] >= min(losses[:-1])
    assert load_checkpoint(run).metrics["validation_loss"] == min(losses)


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_counts_the_epochs_since_the_best(options, tmp_path, monkeypatch, patience):
    """The best is the second; an equal loss later is no better one."""
    losses = iter([3.0, 2.0, 2.0, 2.5, 2.6, 2.7, 2.8])

    monkeypatch.setattr(loop.Trainer, "epoch", lambda self, number: 1.0)
    monkeypatch.setattr(loop.Trainer, "loss", lambda self, examples: next(losses))
    run = tmp_path / "run"
    arguments = ["--out", str(run), "--epochs", "7", "--patience", str(patience)]
    assert main([*options, *arguments]) == 0
    assert len(json.loads((run / "history.json").read_text())) == 2 + patience
    assert load_checkpoint(run).metrics["epoch"] == 2


def test_each_epoch_has_an_order_of_its_own(options, tmp_path, monkeypatch):
    orders: dict[str, list[list]] = {"a": [], "b": []}
    real = loop.Trainer._shuffled
    for name, found in orders.items():

        def recorded(self, rng, found=found):
            found.append(real(self, rng).tolist())
            return np.array(found[-1])

        monkeypatch.setattr(loop.Trainer, "_shuffled", recorded)
        assert main([*options, "--out", str(tmp_path / name), "--epochs", "3"]) == 0
    first, second, third = orders["a"]
    assert first != second != third != first
    assert sorted(first) == sorted(second) == sorted(third)
    assert orders["a"] == orders["b"], "and the same one in every run"


def of_lengths(*captions: tuple[int, ...], whole: bool = True) -> Examples:
    """Photos with captions of so many words."""
    words = "".join(chr(97 + index) * 2 + " " for index in range(26)).split()
    photos = [
        Photo(f"{n}.jpg", Path(f"{n}.jpg"), tuple(" ".join(words[:count]) for count in counts))
        for n, counts in enumerate(captions)
    ]
    return encode_captions(photos, Vocabulary((*Vocabulary.SPECIALS, *words)), True, whole)


class FromMemory:
    """Features of photos by name."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def __call__(self, paths, rng=None):
        return torch.stack([self._values[int(path.stem)] for path in paths])


@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_the_loss_is_a_mean_over_tokens_not_over_batches(decoder):
    torch.manual_seed(0)
    config = CnnLstmConfig(60, embed_size=16, hidden_size=16, decoder=decoder)
    model = CnnLstm(config).eval()
    whole = decoder == "attention"
    lengths = [(2, 9), (3,), (3, 5, 4), (9, 1), (12,)] if whole else [(2,), (3,), (3,), (9,), (12,)]
    examples = of_lengths(*lengths, whole=whole)
    features = FromMemory(torch.randn(5, 1280, 2, 2) if whole else torch.randn(5, 1280))
    means = []
    for size in (2, 3, 5):
        config = TrainConfig(data=Path(), batch_size=size)
        means.append(loop.Trainer(model, features, examples, config).loss(examples))
    assert means == pytest.approx([means[0]] * 3, rel=1e-6)


def test_resuming_a_killed_run_gives_the_unbroken_result(options, tmp_path, capsys):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    steps = ["--epochs", "3", "--patience", "9", "--threads", "1", "--batch-size", "2"]
    assert main([*options, *steps, "--out", str(unbroken)]) == 0
    command = [sys.executable, "-m", "train", *options, *steps, "--out", str(killed)]
    root = Path(__file__).parents[2]
    # As a notebook leaves it to its `!python`; no backend is needed for what is drawn.
    environment = {**os.environ, "MPLBACKEND": "of_a_notebook"}
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (killed / "curves.png").exists():  # in the second epoch
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load_checkpoint(killed).metrics["epoch"] >= 1
    assert main([*options, "--out", str(killed)]) == 2
    assert f"--resume {killed}" in capsys.readouterr().err
    assert main(["--resume", str(killed)]) == 0
    assert same_tensors(unbroken / "last.safetensors", killed / "last.safetensors")
    assert load_checkpoint(unbroken).sha256 == load_checkpoint(killed).sha256
    first, second = (
        json.loads((run / "test.json").read_text())["captions"] for run in (unbroken, killed)
    )
    assert first == second


def test_a_kill_between_the_state_and_the_history_loses_no_epoch(options, tmp_path):
    run = tmp_path / "run"
    assert main([*options, "--out", str(run), "--epochs", "2"]) == 0
    whole = (run / "history.csv").read_text()
    epochs = json.loads((run / "history.json").read_text())
    (run / "history.json").write_text(json.dumps(epochs[:1]))
    (run / "history.csv").write_text("\n".join(whole.splitlines()[:2]) + "\n")
    (run / ".last.safetensors.0123456789abcdef.partial").write_bytes(b"half")
    assert main(["--resume", str(run)]) == 0
    assert json.loads((run / "history.json").read_text()) == epochs
    assert (run / "history.csv").read_text() == whole
    assert not list(run.rglob("*.partial"))


def test_a_run_whose_state_is_gone_keeps_its_best(options, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*options, "--out", str(run), "--epochs", "2"]) == 0
    (run / "last.safetensors").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["--resume", str(run)]) == 2
    assert "last.safetensors: gone, so the run cannot go on" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_killed_while_its_options_are_written_can_begin_anew(options, tmp_path, capsys):
    run = tmp_path / "run"
    killed = (
        "import os, sys; from pathlib import Path; from train.folder import run_folder\n"
        "from train.run import start_run\n"
        "os.fsync = lambda file: os.kill(os.getpid(), 9)\n"
        "with run_folder(Path(sys.argv[1]), False): start_run(Path(sys.argv[1]), {}, {}, [])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", killed, str(run)], cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert list(run.iterdir()) == []
    (run / ".config.json.0123456789abcdef.partial").write_text("{")
    assert main(["--resume", str(run)]) == 2
    assert "no run to resume; begin one" in capsys.readouterr().err
    assert main([*options, "--out", str(run), "--epochs", "1"]) == 0
    assert list(tmp_path.rglob("*.partial")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_folder_may_be_a_file_system_of_its_own(options, tmp_path, monkeypatch):
    real = Path.replace

    def replace(self: Path, target: Path):
        if self.parent.resolve() != Path(target).parent.resolve():
            raise OSError(errno.EXDEV, "cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    assert main([*options, "--out", str(tmp_path / "run"), "--epochs", "1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_folder_is_one_trainings(options, tmp_path, capsys):
    run = tmp_path / "run"
    with run_folder(run, resume=False):
        assert main([*options, "--out", str(run)]) == 2
        assert "another training is writing there" in capsys.readouterr().err
    assert not run.exists(), "nothing was written"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert main([*options, "--out", str(run)]) == 2
    assert "already there, and no run; pick another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: _replace(data / "captions.txt", "snow", "zebra"), "the vocabulary"),
        (
            lambda data: _replace(data / "captions.txt", "000.jpg,A dog", "000.jpg,Two dog"),
            "photos",
        ),
        (lambda data: next((data / "Images").iterdir()).unlink(), "the captions or photos"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(change, message, data, options, tmp_path, capsys):
    options[options.index("--data") + 1] = str(shutil.copytree(data, tmp_path / "data"))
    run = tmp_path / "run"
    assert main([*options, "--out", str(run), "--epochs", "1"]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    change(tmp_path / "data")
    assert main(["--resume", str(run)]) == 2
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("train: ")]
    assert message in line
    assert "changed since the run began" in line
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def _replace(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def test_validation_photos_are_never_augmented(checkpoint, data, options, tmp_path):
    run, weights = tmp_path / "run", tmp_path / "weights.safetensors"
    # A backbone that tells photos apart, and so a photo from part of it.
    state = checkpoint.model.encoder.backbone.state_dict()
    save_file({f"features.{name}": value for name, value in state.items()}, weights)
    options[options.index("--backbone-weights") + 1] = str(weights)
    small = ["--epochs", "1", "--resize", "72", "--crop", "64", "--augment"]
    assert main([*options, "--out", str(run), *small]) == 0
    trained = load_checkpoint(run)
    [epoch] = json.loads((run / "history.json").read_text())
    photos = read_dataset(data, 0.1, 0.1, 0).splits["validation"]
    examples = list(encode_captions(photos, trained.vocabulary, False, whole=False))
    pixels = np.stack([preprocess(path, ImageSpec(72, 64)) for path, _ in examples])
    with torch.no_grad():
        features = trained.model.encoder(torch.from_numpy(pixels))
        loss, _ = batch_loss(trained.model, examples, features)
    assert epoch["validation_loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_scoring_takes_the_split_of_the_run(data, options, tmp_path, capsys):
    broken = shutil.copytree(data, tmp_path / "data")
    dataset = read_dataset(broken, 0.2, 0.3, 7)
    gone = dataset.splits["test"][0]
    gone.path.write_bytes(gone.path.read_bytes()[:300])
    options[options.index("--data") + 1] = str(broken)
    run, file = tmp_path / "run", tmp_path / "new" / "captions.json"
    shares = ["--validation", "0.2", "--test", "0.3", "--seed", "7", "--epochs", "1"]
    assert main([*options, *shares, "--out", str(run)]) == 0
    assert capexport(["lstm", str(run), "--out", str(tmp_path / "artifact")]) == 0
    wanted = {photo.name for photo in dataset.splits["test"]} - {gone.name}
    for captioner in (run, tmp_path / "artifact"):
        asked = [str(captioner), "--data", str(broken), "--captions", str(file)]
        assert score_module.main(asked) == 0
        said = json.loads(file.read_text())
        assert said.keys() == wanted
        assert said == json.loads((run / "test.json").read_text())["captions"]
        assert "does not say" not in capsys.readouterr().err
    assert score_module.main([str(run), "--data", str(broken), "--captions", str(tmp_path)]) == 2
    assert "a folder, not the name of a file" in capsys.readouterr().err


def test_letters_that_the_font_lacks_are_told_once(tmp_path):
    draw_photo(0).save(tmp_path / "0.jpg")
    sheet = tmp_path / "sheet.png"
    with pytest.warns(UserWarning) as told:
        draw_sheet([Entry(tmp_path / "0.jpg", {"CNN-LSTM": "\U00013000\U00013001 dog"})], sheet)
    assert len(told) == 1
    assert f"{sheet}: Glyph" in str(told[0].message)


def test_no_picture_stops_a_training(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = tmp_path / "run"
    assert main([*options, "--out", str(run), "--epochs", "1"]) == 0
    assert "curves.png: not drawn: drawing needs" in capsys.readouterr().err
    assert (run / "test.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    assert main(["--resume", str(run)]) == 0
    assert "samples.png: not drawn: division by zero" in capsys.readouterr().err
    assert not list(run.glob("*.png"))


def test_a_java_that_fails_does_not_cost_the_scores(options, tmp_path, capsys, monkeypatch):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho Unable to locate a Java Runtime. >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*options, "--out", str(tmp_path / "run"), "--epochs", "1"]) == 0
    assert "left out: " + f"{java}: Unable to locate a Java Runtime." in capsys.readouterr().err
    scores = json.loads((tmp_path / "run" / "test.json").read_text())["test"]
    assert "METEOR" not in scores
    assert {"BLEU-4", "ROUGE-L", "CIDEr-D"} < scores.keys()


def interrupt() -> None:
    raise KeyboardInterrupt


def fill_the_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.safetensors")


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (interrupt, 130),
        (functools.partial(signal.raise_signal, signal.SIGTERM), 143),
        (fill_the_disk, 2),
    ],
    ids=["Ctrl-C", "SIGTERM", "full disk"],
)
def test_interruption_keeps_the_last_epoch(stop, code, options, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    real = loop.Trainer.epoch

    def interrupted(self, number):
        if number == 2:
            stop()
        return real(self, number)

    monkeypatch.setattr(loop.Trainer, "epoch", interrupted)
    assert main([*options, "--out", str(run)]) == code
    assert f"--resume {run} goes on" in capsys.readouterr().err
    assert load_checkpoint(run).metrics["epoch"] == 1


@pytest.fixture
def encoder(backbone: Path) -> ImageEncoder:
    encoder = ImageEncoder(CnnLstmConfig(1)).eval()
    load_backbone(encoder, backbone)
    return encoder


@pytest.fixture
def counted(encoder, monkeypatch) -> list[int]:
    """How many images the stem was given, call by call."""
    calls: list[int] = []
    real = encoder.stem
    monkeypatch.setattr(encoder, "stem", lambda x: calls.append(len(x)) or real(x))
    return calls


def test_features_are_computed_once_and_equal_live_ones(data, encoder, counted, tmp_path):
    paths = sorted((data / "Images").iterdir())[:6]
    spec = ImageSpec(72, 64)
    first = CachedFeatures(encoder, paths[:4], spec, tmp_path, "cpu")
    live = LiveFeatures(encoder, spec, augment=False, device="cpu")
    torch.testing.assert_close(
        first(paths[:4]), live(paths[:4], np.random.default_rng(0)), rtol=1e-4, atol=1e-5
    )
    counted.clear()
    renamed = Path(shutil.copy(paths[0], tmp_path / "renamed.jpg"))
    again = CachedFeatures(encoder, [*paths, renamed], spec, tmp_path, "cpu")
    assert counted == [2], "only the two new photos are encoded"
    assert torch.equal(again([renamed]), again(paths[:1]))
    _, file = sorted(tmp_path.glob("*/*.safetensors"), key=os.path.getmtime)
    file.write_bytes(file.read_bytes()[:100])
    CachedFeatures(encoder, paths, spec, tmp_path, "cpu")
    assert counted == [2, 2], "a damaged file is made anew, and only that"
    CachedFeatures(encoder, paths, ImageSpec(80, 64), tmp_path, "cpu")
    assert counted == [2, 2, 6], "other preprocessing, other features"


def test_views_are_cached_and_drawn(data, encoder, counted, tmp_path):
    encoder.train_from = 1
    paths = sorted((data / "Images").iterdir())[:3]
    spec = ImageSpec(64, 64, keep_aspect=False)
    features = CachedFeatures(encoder, paths, spec, tmp_path, "cpu", views=4)
    assert sum(counted) == 3 * 4
    images = torch.from_numpy(np.stack([preprocess(path, spec) for path in paths]))
    with torch.no_grad():
        whole, mirrored = encoder.stem(images), encoder.stem(images.flip(3))
    torch.testing.assert_close(features(paths), whole, rtol=1e-3, atol=1e-3)
    drawn = {
        tuple(features(paths[:1], np.random.default_rng(n)).flatten().tolist()) for n in range(40)
    }
    assert len(drawn) == 4
    nearest = min((torch.tensor(view) - mirrored[0].flatten()).abs().max() for view in drawn)
    assert nearest < 1e-3
    again = CachedFeatures(encoder, paths, spec, tmp_path, "cpu", views=4)
    assert sum(counted) == 3 * 4 + 3 + 3, "nothing but the two batches above"
    assert torch.equal(again(paths), features(paths))


def test_a_cache_that_cannot_be_written_is_tried_first(
    data, options, encoder, tmp_path, capsys, monkeypatch
):
    paths = sorted((data / "Images").iterdir())[:6]
    wanted = CachedFeatures(encoder, paths, ImageSpec(72, 64), tmp_path / "cache", "cpu")
    (tmp_path / "file").write_text("")
    real = encoder.stem
    warned = []
    monkeypatch.setattr(
        encoder, "stem", lambda x: warned.append(capsys.readouterr().err) or real(x)
    )
    got = CachedFeatures(encoder, paths, ImageSpec(72, 64), tmp_path / "file" / "cache", "cpu")
    assert "kept in memory alone" in warned[0], "before the features are made"
    assert torch.equal(got(paths), wanted(paths))
    # A disk that fills up meanwhile.
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    got = CachedFeatures(encoder, paths, ImageSpec(80, 64), tmp_path / "cache", "cpu")
    assert len(got.readable) == 6
    assert "full" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").glob("*/*"))) == 1
    monkeypatch.undo()
    options[options.index("--cache") + 1] = str(tmp_path / "file" / "cache")
    assert main([*options, "--out", str(tmp_path / "run"), "--epochs", "1"]) == 0


def test_trainings_that_share_a_cache_lose_nothing(data, encoder, tmp_path, monkeypatch):
    paths = sorted((data / "Images").iterdir())[:6]
    spec = ImageSpec(72, 64)
    counted = []
    real = encoder.stem

    def stem(images):
        counted.append(len(images))
        if len(counted) == 1:  # another training begins and ends meanwhile
            CachedFeatures(encoder, paths[2:5], spec, tmp_path, "cpu")
        return real(images)

    monkeypatch.setattr(encoder, "stem", stem)
    CachedFeatures(encoder, paths[:2], spec, tmp_path, "cpu")
    assert counted == [2, 3]
    first, second = tmp_path.glob("*/*.safetensors")
    killed = first.parent / f".{first.name}.0123456789abcdef.partial"
    killed.write_bytes(b"of a writer that was killed")
    CachedFeatures(encoder, paths, spec, tmp_path, "cpu")
    assert counted == [2, 3, 1], "only what neither had is encoded"
    assert not killed.exists() and first.exists() and second.exists()


def test_unreadable_photos_are_listed_and_skipped(data, options, tmp_path):
    broken = shutil.copytree(data, tmp_path / "broken")
    for name in ("007.jpg", "011.jpg"):
        path = broken / "Images" / name
        path.write_bytes(path.read_bytes()[:300])
    strip = read_dataset(broken, 0.1, 0.1, 0).splits["test"][0]
    draw_photo(0, (400, 3)).save(strip.path)
    options[options.index("--data") + 1] = str(broken)
    for run, extra in (("cached", []), ("live", ["--no-feature-cache"])):
        small = ["--epochs", "1", "--resize", "72", "--crop", "64", "--out", str(tmp_path / run)]
        assert main([*options, *small, *extra]) == 0
        skipped = json.loads((tmp_path / run / "skipped.json").read_text())
        assert skipped == {"unreadable images": sorted(["007.jpg", "011.jpg", strip.name])}
        photos = load_checkpoint(tmp_path / run).training["photos"]
        assert photos["train"] < 32 + 1
        scored = photos_as_trained(broken, "test", tmp_path / run, None)
        assert len(scored) == photos["test"] == 3


def test_words_that_are_not_learnt_are_told(options, tmp_path, capsys):
    data = shutil.copytree(options[options.index("--data") + 1], tmp_path / "data")
    options[options.index("--data") + 1] = str(data)
    options[options.index("--min-count") + 1] = "5"
    lines = [f"{index:03}.jpg,dog 犬 🐶\n{index:03}.jpg,🐶" for index in range(40)]
    rare = [f"000.jpg,cat rare{'xyz'[index]}" for index in range(3)]
    (data / "captions.txt").write_text("image,caption\n" + "\n".join(lines), encoding="utf-8")
    assert main([*options, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "a vocabulary of 5, without 0.0% of their words, which become <UNK>" in said
    assert "left out: 32 captions without a word left after the cleaning" in said
    (data / "captions.txt").write_text("image,caption\n" + "\n".join(lines[1:40] + rare))
    assert main([*options, "--epochs", "1", "--out", str(tmp_path / "rare")]) == 0
    assert "without 16.2% of their words" in capsys.readouterr().out


def test_captions_without_words_are_refused_first(options, tmp_path, capsys):
    data = kaggle(tmp_path / "data")
    options[options.index("--data") + 1] = str(data)
    options[options.index("--backbone-weights") + 1] = str(tmp_path / "nothing")
    assert main([*options, "--min-count", "1000", "--out", str(tmp_path / "run")]) == 2
    assert "no word is in the captions for train 1000 times" in capsys.readouterr().err


def test_backbone_weights_that_cannot_be_used(tmp_path, monkeypatch, options, capsys):
    encoder = ImageEncoder(CnnLstmConfig(1))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"connect .* or pass --backbone-weights"):
        load_backbone(encoder, None)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"nothing")
    options[options.index("--backbone-weights") + 1] = str(path)
    assert main([*options, "--out", str(tmp_path / "run")]) == 2
    assert "not a safetensors file" in capsys.readouterr().err
    save_file({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, path)
    assert main([*options, "--out", str(tmp_path / "run")]) == 2
    assert "not the mobilenet_v2 of torchvision" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_explodes_is_reported(options, tmp_path, capsys):
    options += ["--out", str(tmp_path / "run"), "--learning-rate", "1e30"]
    assert main(options) == 2
    assert "lower --learning-rate" in capsys.readouterr().err


def test_usage_errors(capsys, options, tmp_path):
    for arguments in ([], ["--resume", str(tmp_path), "--epochs", "3"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert main(["--resume", str(tmp_path)]) == 2
    assert "no run to resume" in capsys.readouterr().err
    for wrong, message in (
        (["--threads", "0"], "--threads"),
        (["--batch-size", "1"], "--batch-size"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--device", "tpu"], "cannot use the device 'tpu'"),
    ):
        assert main([*options, *wrong, "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert score_module.main([str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "no checkpoint.json" in capsys.readouterr().err
    assert score_module.main([str(tmp_path), "--data", str(tmp_path), "--batch-size", "0"]) == 2
    assert "--batch-size must be at least 1" in capsys.readouterr().err
    (tmp_path / "checkpoint.json").touch()
    assert score_module.main([str(tmp_path / "checkpoint.json"), "--data", str(tmp_path)]) == 2
    assert "a file; pass the folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--keep-articles" in capsys.readouterr().out


ATTENTION = [
    "--decoder",
    "attention",
    "--hidden-size",
    "32",
    "--dropout",
    "0.1",
    "--attention-penalty",
    "0.1",
    "--label-smoothing",
    "0.1",
    "--squash",
    "--crop",
    "64",
    "--augment",
    "--views",
    "3",
    "--train-backbone",
    "--train-from",
    "17",
    "--cosine",
    "--average",
    "0.9",
    "--bfloat16",
    "--best-by",
    "cider",
    "--weight-decay",
    "0.01",
    "--backbone-learning-rate",
    "1e-4",
]


def test_attention_is_trained_with_blocks_of_the_backbone(options, backbone, tmp_path, capsys):
    run, more = tmp_path / "run", tmp_path / "more"
    assert main([*options, *ATTENTION, "--out", str(run), "--epochs", "2"]) == 0
    assert "CIDEr-D" in capsys.readouterr().out
    assert (run / "attention.png").read_bytes()[:4] == b"\x89PNG"
    checkpoint = load_checkpoint(run)
    before, after = load_file(backbone), checkpoint.model.encoder.backbone.state_dict()
    moved = {name.split(".")[0] for name in after if not torch.equal(
        after[name], before[f"features.{name}"])}  # fmt: skip
    assert moved == {"17", "18"}
    norms = [name for name in after if "running" in name]
    assert all(torch.equal(after[name], before[f"features.{name}"]) for name in norms)
    assert checkpoint.image == ImageSpec(64, 64, keep_aspect=False)
    assert "--train-from 17" in checkpoint.training["command"]
    # What was begun with likelihood goes on with CIDEr, from the checkpoint's own network.
    going_on = ["--init", str(run), "--objective", "cider", "--best-by", "cider", "--epochs", "1"]
    assert main([*options, *going_on, "--out", str(more)]) == 0
    other = load_checkpoint(more)
    assert other.model.config == dataclasses.replace(checkpoint.model.config, dropout=0.0)
    assert other.vocabulary == checkpoint.vocabulary and other.image == checkpoint.image
    [epoch] = json.loads((more / "history.json").read_text())
    assert other.metrics["validation_cider"] == epoch["validation_cider"]
    artifact = tmp_path / "artifact"
    assert capexport(["lstm", str(more), "--out", str(artifact), "--num-beams", "2"]) == 0
    captioner = Captioner.load(artifact)
    assert captioner.options.num_beams == 2
    assert captioner.decoder.regions == (2, 2)


def test_an_averaged_run_goes_on_as_if_it_had_not_stopped(options, tmp_path, monkeypatch):
    real = loop.Trainer.epoch
    flags = [*ATTENTION, "--epochs", "3", "--patience", "9", "--threads", "1"]
    assert main([*options, *flags, "--out", str(tmp_path / "whole")]) == 0

    def interrupted(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(loop.Trainer, "epoch", interrupted)
    stopped = tmp_path / "stopped"
    assert main([*options, *flags, "--out", str(stopped)]) == 130
    monkeypatch.undo()
    assert main(["--resume", str(stopped)]) == 0
    assert same_tensors(stopped / "last.safetensors", tmp_path / "whole" / "last.safetensors")


@pytest.mark.parametrize(
    ("letters", "flags", "message"),
    [(True, [], "single letters: pass --keep"), (False, ["--keep-articles"], "no single letters")],
)
def test_what_is_begun_with_must_have_been_cleaned_alike(
    letters, flags, message, options, tmp_path, capsys, checkpoint
):
    words = ("a", "dog") if letters else ("dog", "runs")
    vocabulary = Vocabulary((*Vocabulary.SPECIALS, *words))
    model = CnnLstm(CnnLstmConfig(len(vocabulary), embed_size=8, hidden_size=8))
    begun = dataclasses.replace(checkpoint, model=model, vocabulary=vocabulary)
    save_checkpoint(begun, tmp_path / "begun")
    again = [*options, "--init", str(tmp_path / "begun"), *flags, "--out", str(tmp_path / "run")]
    assert main(again) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_single_photo_is_trained_on():
    examples = of_lengths((3, 5))
    model = CnnLstm(CnnLstmConfig(60, embed_size=8, hidden_size=8, decoder="attention"))
    features = FromMemory(torch.randn(1, 1280, 2, 2))
    trainer = loop.Trainer(model, features, examples, TrainConfig(data=Path()))
    assert trainer.epoch(1) > trainer.epoch(2) > 0


def test_captions_of_like_length_come_together_and_each_photo_once():
    examples = of_lengths(*[(length, 2) for length in range(3, 25)] * 5)
    model = CnnLstm(CnnLstmConfig(60, embed_size=8, hidden_size=8, decoder="attention"))
    trainer = loop.Trainer(model, None, examples, TrainConfig(data=Path(), batch_size=4))
    order = trainer._shuffled(np.random.default_rng(0))
    assert sorted(order) == list(range(110))
    lengths = examples.longest[order[:108]].reshape(27, 4)
    assert np.ptp(lengths, axis=1).mean() < 4 < np.ptp(examples.longest)


def test_the_reward_is_that_of_pycocoevalcap():
    """Where the batch is all there is, the scorer's own counts are those of all photos."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    examples = of_lengths((5, 6), (7, 3), (9, 9), (4, 8))
    drawn = [[1, 4, 5, 6, 2], [1, 4, 5, 6, 7, 8, 9, 2], [1, 30, 2], [1, *range(4, 12), 2]]
    wanted = CiderScorer()
    for caption, (_, references) in zip(drawn, examples, strict=True):
        told = [" ".join(map(str, ids[1:])) for ids in (caption, *references)]
        wanted += (told[0], told[1:])
    _, scores = wanted.compute_score()
    reward = CiderReward(examples)
    np.testing.assert_allclose(reward(drawn, list(examples)), scores)
    np.testing.assert_allclose(  # a part of the photos, with two captions each
        reward([d for d in drawn[:2] for _ in range(2)], list(examples)[:2]),
        np.repeat(scores[:2], 2),
    )


def test_self_critical_training_finds_the_words_that_are_rewarded():
    torch.manual_seed(0)
    words = [f"{letter}{letter}" for letter in "abcdefghijklmnopqrst"]
    captions = [" ".join(words[start : start + 5]) for start in (0, 5, 10, 15)]
    photos = [Photo(str(n), Path(str(n)), (caption,) * 2) for n, caption in enumerate(captions)]
    vocabulary = Vocabulary((*Vocabulary.SPECIALS, *words))
    examples = encode_captions(photos, vocabulary, True, whole=True)
    config = CnnLstmConfig(len(vocabulary), embed_size=16, hidden_size=32, decoder="attention")
    model = CnnLstm(config).eval()
    features = torch.randn(4, 1280, 2, 2)
    reward = CiderReward(examples)
    optimiser = torch.optim.Adam(model.decoder.parameters(), 5e-3)
    for _ in range(20):  # likelihood first: words that are never drawn can't be rewarded
        loss, _ = batch_loss(model, list(examples), features)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def drawn() -> float:
        torch.manual_seed(1)
        several = [_draw(model, model.decoder.start(features)) for _ in range(5)]
        return float(np.mean([reward(captions, list(examples)) for captions in several]))

    before = drawn()
    for group in optimiser.param_groups:
        group["lr"] = 2e-3
    for _ in range(80):
        loss, _ = self_critical_loss(model, list(examples), features, reward)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert drawn() > 1.2 * before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-from", "3"], "goes with --train-backbone"),
        (["--train-backbone", "--train-from", "19"], "must lie in 0..18"),
        (["--objective", "cider"], "pass --init"),
        (["--squash", "--resize", "80"], "--squash goes without --resize"),
        (["--dropout", "1"], "below 1"),
        (["--decoder", "attention", "--hidden-size", "30"], "a multiple of its 4 heads"),
    ],
)
def test_options_that_contradict_each_other(flags, message, options, tmp_path, capsys):
    assert main([*options, *flags, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
