"""Micro-benchmarks of the runtime's stages: `pytest benchmarks`, on the bundled captioner."""

from pathlib import Path

import numpy as np
import pytest

from capexport import Captioner
from capexport.bench.cli import sample_photos
from capexport.cli import bundled_checkpoint
from capexport.decoding import greedy
from capexport.preprocessing import preprocess


@pytest.fixture(scope="session")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    from capexport.export.cnn_lstm import export_cnn_lstm
    from capexport.models.checkpoint import load_checkpoint

    out = tmp_path_factory.mktemp("artifact") / "bundled"
    export_cnn_lstm(load_checkpoint(bundled_checkpoint()), out)
    return Captioner.load(out)


@pytest.fixture(params=[1, 8], ids="batch {}".format)
def pixels(request: pytest.FixtureRequest, captioner: Captioner) -> np.ndarray:
    photos = (sample_photos() * 2)[: request.param]
    return np.stack([preprocess(photo, captioner.image) for photo in photos])


def test_preprocess(benchmark, captioner: Captioner):
    content = Path(sample_photos()[-1]).read_bytes()
    assert benchmark(preprocess, content, captioner.image).shape == (3, 224, 224)


def test_encoder(benchmark, captioner: Captioner, pixels: np.ndarray):
    benchmark(captioner.encoder, pixels)


def test_step(benchmark, captioner: Captioner, pixels: np.ndarray):
    state = captioner.encoder(pixels)
    tokens = np.full(len(pixels), 5)
    logits, _ = benchmark(captioner.decoder.step, tokens, state)
    assert logits.shape == (len(pixels), len(captioner.vocabulary))


def test_loop(benchmark, captioner: Captioner, pixels: np.ndarray):
    state = captioner.encoder(pixels)
    hypotheses = benchmark(greedy, captioner.decoder, state, captioner.options)
    assert all(hypothesis.tokens for hypothesis in hypotheses)
