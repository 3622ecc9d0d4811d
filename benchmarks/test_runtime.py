"""Micro-benchmarks of the runtime's stages, on the bundled CNN-LSTM and on a small random BLIP-2:
`pytest benchmarks`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.blip2_full_size import DIMENSIONS
from benchmarks.random_blip2 import blip2_config, save_checkpoint
from capexport import Captioner
from capexport.beam import beam_search
from capexport.bench.cli import sample_photos
from capexport.cli.lstm import bundled_checkpoint
from capexport.decoding import greedy, greedy_by_steps
from capexport.preprocessing import load_image, preprocess


@pytest.fixture(scope="session", params=["fp32", "int8"])
def captioner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    if request.param == "int8":
        return Captioner.load()
    from capexport.export.cnn_lstm import export_cnn_lstm
    from capexport.models.checkpoint import load_checkpoint

    out = tmp_path_factory.mktemp("artifact") / "bundled"
    export_cnn_lstm(load_checkpoint(bundled_checkpoint()), out)
    return Captioner.load(out)


@pytest.fixture(params=[1, 32], ids="batch {}".format)
def pixels(request: pytest.FixtureRequest, captioner: Captioner) -> np.ndarray:
    photos = (sample_photos() * 6)[: request.param]
    return np.stack([captioner.preprocess(photo) for photo in photos])


@pytest.fixture(scope="session")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    from capexport.export.blip2 import export_blip2

    folder = tmp_path_factory.mktemp("blip2")
    save_checkpoint(folder / "checkpoint", blip2_config("opt", queries=32, **DIMENSIONS["small"]))
    export_blip2(folder / "checkpoint", folder / "out", "int8")
    return Captioner.load(folder / "out")


def test_read(benchmark):
    content = Path(sample_photos()[-1]).read_bytes()
    assert benchmark(load_image, content).mode == "RGB"


def test_preprocess(benchmark):
    image = np.asarray(load_image(sample_photos()[-1]))
    assert benchmark(preprocess, image, Captioner.load().image).shape == (3, 224, 224)


def test_encoder(benchmark, captioner: Captioner, pixels: np.ndarray):
    benchmark(captioner.encoder, pixels)


def test_step(benchmark, captioner: Captioner, pixels: np.ndarray):
    state = captioner.encoder(pixels)
    tokens = np.full(len(pixels), 5)
    logits, _ = benchmark(captioner.decoder.step, tokens, state)
    assert logits.shape == (len(pixels), len(captioner.text))


@pytest.mark.parametrize("decode", [greedy, greedy_by_steps], ids=["loop", "steps"])
def test_decode(benchmark, captioner: Captioner, pixels: np.ndarray, decode):
    state = captioner.encoder(pixels)
    hypotheses = benchmark(decode, captioner.decoder, state, captioner.options)
    assert all(hypothesis.tokens for hypothesis in hypotheses)


def test_beams(benchmark, captioner: Captioner, pixels: np.ndarray):
    state, options = captioner.encoder(pixels), replace(captioner.options, num_beams=3)
    found = benchmark(beam_search, captioner.decoder, state, options)
    assert all(best.tokens for [best] in found)


def test_blip2_image(benchmark, blip2: Captioner):
    pixels = blip2.preprocess(sample_photos()[0])[None]
    benchmark(blip2.encoder, pixels)


def test_blip2_step(benchmark, blip2: Captioner):
    features = blip2.encoder(blip2.preprocess(sample_photos()[0])[None])
    _, state = blip2.decoder.start(features, blip2.text.frame(None, 1, 1))
    logits, _ = benchmark(blip2.decoder.step, np.array([5]), state)
    assert logits.shape[0] == 1


def test_blip2_beams(benchmark, blip2: Captioner):
    features = blip2.encoder(blip2.preprocess(sample_photos()[0])[None])
    options = replace(blip2.options, num_beams=5, max_tokens=8)
    framed = blip2.text.frame(None, 1, 1)
    [[best]] = benchmark(beam_search, blip2.decoder, features, options, framed)
    assert best.tokens
