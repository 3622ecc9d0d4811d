"""Training runs on small data with a random backbone: learning, resuming, and the run folder."""

import csv
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
from conftest import kaggle
from safetensors.torch import load_file, save_file

from capexport import Captioner, DownloadError
from capexport.cli import main as capexport
from capexport.metrics import score
from capexport.models.checkpoint import load_checkpoint
from capexport.models.cnn_lstm import CnnLstm, CnnLstmConfig, ImageEncoder
from capexport.preprocessing import ImageSpec
from train import score as score_module
from train.__main__ import main
from train.features import cached_features, live_features, load_backbone
from train.loop import batch_loss


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
    common = f"--data {data} --backbone-weights {backbone} --cache {cache} --min-count 1"
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
    assert Captioner.load(tmp_path / "artifact").image == ImageSpec()


def test_initial_loss_is_that_of_guessing_and_a_toy_batch_is_learnt():
    torch.manual_seed(0)
    model = CnnLstm(CnnLstmConfig(60, embed_size=32, hidden_size=64))
    rng = np.random.default_rng(0)
    batch = [(Path(), [1, *rng.integers(4, 60, length).tolist(), 2]) for length in (3, 9, 5, 7)]
    pooled = torch.randn(4, 1280)
    loss, tokens = batch_loss(model, batch, pooled)
    assert tokens == 3 + 9 + 5 + 7 + 2 * 4
    assert loss.item() == pytest.approx(math.log(60), rel=0.1)
    optimiser = torch.optim.Adam(model.trainable_parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        loss, _ = batch_loss(model, batch, pooled)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05


def test_padding_changes_neither_loss_nor_gradient():
    torch.manual_seed(0)
    model = CnnLstm(CnnLstmConfig(20, embed_size=8, hidden_size=8)).eval()
    pooled = torch.randn(2, 1280)
    batch = [(Path(), [1, 5, 2]), (Path(), [1, 7, 8, 9, 10, 2])]
    together, _ = batch_loss(model, batch, pooled)
    alone = [batch_loss(model, batch[i : i + 1], pooled[i : i + 1]) for i in range(2)]
    mean = sum(loss * tokens for loss, tokens in alone) / sum(tokens for _, tokens in alone)
    torch.testing.assert_close(together, mean)


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


def test_resuming_a_killed_run_gives_the_unbroken_result(options, tmp_path, capsys):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    steps = ["--epochs", "3", "--patience", "9", "--threads", "1", "--batch-size", "2"]
    threads = torch.get_num_threads()
    assert main([*options, *steps, "--out", str(unbroken)]) == 0
    command = [sys.executable, "-m", "train", *options, *steps, "--out", str(killed)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (killed / "history.json").exists():  # in the second epoch
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
    torch.set_num_threads(threads)


def test_interruption_keeps_the_last_epoch(options, tmp_path, capsys, monkeypatch):
    from train import loop

    run = tmp_path / "run"
    real = loop._pass
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # training and validation are one epoch
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "_pass", interrupted)
    assert main([*options, "--out", str(run)]) == 130
    assert f"--resume {run} goes on" in capsys.readouterr().err
    assert load_checkpoint(run).metrics["epoch"] == 1


def test_features_are_computed_once_and_equal_live_ones(data, backbone, tmp_path, monkeypatch):
    encoder = ImageEncoder(CnnLstmConfig(1)).eval()
    load_backbone(encoder, backbone)
    paths = sorted((data / "Images").iterdir())[:6]
    spec = ImageSpec(72, 64)
    first = cached_features(encoder, paths[:4], spec, tmp_path, "cpu")
    live = live_features(encoder, spec, augment=False, device="cpu")
    with torch.no_grad():
        computed = live(paths[:4], np.random.default_rng(0)).numpy()
    np.testing.assert_allclose(
        np.stack([first[path] for path in paths[:4]]), computed, rtol=1e-4, atol=1e-5
    )
    counted = []
    real = encoder.pooled
    monkeypatch.setattr(encoder, "pooled", lambda x: counted.append(len(x)) or real(x))
    renamed = shutil.copy(paths[0], tmp_path / "renamed.jpg")
    again = cached_features(encoder, [*paths, Path(renamed)], spec, tmp_path, "cpu")
    assert counted == [2], "only the two new photos are encoded"
    np.testing.assert_array_equal(again[Path(renamed)], again[paths[0]])
    [file] = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    cached_features(encoder, paths, spec, tmp_path, "cpu")
    assert counted == [2, 6], "a damaged cache is made anew"
    cached_features(encoder, paths, ImageSpec(80, 64), tmp_path, "cpu")
    assert counted == [2, 6, 6], "other preprocessing, other features"


def test_unreadable_photos_are_listed_and_skipped(data, options, tmp_path):
    broken = shutil.copytree(data, tmp_path / "broken")
    for name in ("007.jpg", "011.jpg"):
        path = broken / "Images" / name
        path.write_bytes(path.read_bytes()[:300])
    options[options.index("--data") + 1] = str(broken)
    for run, extra in (("cached", []), ("live", ["--no-feature-cache"])):
        small = ["--epochs", "1", "--resize", "72", "--crop", "64", "--out", str(tmp_path / run)]
        assert main([*options, *small, *extra]) == 0
        skipped = json.loads((tmp_path / run / "skipped.json").read_text())
        assert skipped == {"unreadable images": ["007.jpg", "011.jpg"]}
        assert load_checkpoint(tmp_path / run).training["photos"]["train"] < 32 + 1


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
    assert "not a MobileNetV2" in capsys.readouterr().err
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
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--keep-articles" in capsys.readouterr().out


def test_scores_with_and_without_java(monkeypatch):
    references = {
        "1": ["A dog runs on the grass .", "a brown dog is running"],
        "2": ["A man's hat , in snow .", "the man wears a hat"],
        "3": ["Two boys play football .", "boys with a ball"],
    }
    perfect = {name: texts[0].lower() for name, texts in references.items()}
    poor = {"1": "a cat", "2": "", "3": "two boys play football"}
    outcomes = [score(perfect, references), score(poor, references)]
    if shutil.which("java"):
        assert outcomes[0]["tokenizer"] == "Penn Treebank"
        assert outcomes[0]["METEOR"] == pytest.approx(100)
    monkeypatch.setenv("PATH", os.devnull)
    outcomes += [score(perfect, references), score(poor, references)]
    assert "METEOR" not in outcomes[2]
    for good, bad in (outcomes[:2], outcomes[2:]):
        assert good["BLEU-4"] == pytest.approx(100)
        assert good["ROUGE-L"] == pytest.approx(100)
        assert bad["BLEU-1"] < 80
        assert bad["CIDEr-D"] < good["CIDEr-D"]
    for name in ("BLEU-1", "ROUGE-L", "CIDEr-D"):
        assert outcomes[0][name] == pytest.approx(outcomes[2][name], abs=0.5)
