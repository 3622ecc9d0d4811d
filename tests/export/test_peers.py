"""What captioners are measured against says the same: other runtimes, on small models."""

from pathlib import Path

import numpy as np
import pytest

from capexport.bench.cli import sample_photos
from capexport.bench.openvino import nncf_captioners, openvino_captioners
from capexport.captioner import BUNDLED_ARTIFACT, Captioner
from capexport.cli.lstm import bundled_checkpoint
from capexport.export.cnn_lstm import export_cnn_lstm
from capexport.export.parity import relative_error
from capexport.models.checkpoint import load_checkpoint
from capexport.preprocessing import load_image


def test_ctranslate2_says_the_same(blip2_checkpoint, blip2_export, tmp_path: Path):
    """Its tokens are those of our decoder, to which the prompt's embeddings are an image's."""
    pytest.importorskip("ctranslate2", reason="needs the extra `peers`")
    from transformers import Blip2ForConditionalGeneration

    from benchmarks.blip2_peers import CTranslate2, TextOnly

    model = Blip2ForConditionalGeneration.from_pretrained(blip2_checkpoint("opt")).language_model
    peer = CTranslate2(model, 1, tmp_path / "converted", 1, "float32")
    prompts = list(np.random.default_rng(0).integers(2, 330, (12, 4)))
    ours = TextOnly(blip2_export("opt"), 1).caption(prompts, batch_size=12, max_tokens=10)
    theirs = peer.caption(prompts, batch_size=12, max_tokens=10, min_tokens=10)
    # CTranslate2 is told of no end here, and goes on.
    assert [c.tokens for c in ours] == [
        other.tokens[: len(own.tokens)] for own, other in zip(ours, theirs, strict=True)
    ]
    assert len({c.tokens for c in ours}) > 6
    assert sum(len(c.tokens) for c in ours) > 60


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("int8", 0.1)])
def test_openvino_runs_blip2(blip2_export, photos: list[Path], precision: str, bound: float):
    """In int8 it rounds other values than onnxruntime: captions may differ, numbers little."""
    pytest.importorskip("openvino", reason="needs the extra `peers`")
    folder = blip2_export("opt", precision)
    wanted = Captioner.load(folder, threads=1)
    pixels = np.stack([wanted.preprocess(photo) for photo in photos[:5]])
    features = wanted.encoder(pixels)
    framed = wanted.text.frame(None, 5, 3)
    tokens = np.arange(5) + 40
    for captioner in openvino_captioners(folder, "cpu", 2).values():
        assert relative_error(features, captioner.encoder(pixels)) < bound
        states = []
        for decoder in (wanted.decoder, captioner.decoder):
            first, state = decoder.start(features, framed)
            states.append((first, decoder.step(tokens, state)[0]))
        for logits, got in zip(*states, strict=True):
            assert relative_error(logits, got) < bound


def test_openvino_and_nncf_on_the_encoder(tmp_path: Path):
    """Of the bundled checkpoint: random layers would have nothing left in 8 bits."""
    pytest.importorskip("openvino", reason="needs the extra `peers`")
    pytest.importorskip("nncf", reason="needs the extra `peers`")
    exact = tmp_path / "fp32"
    export_cnn_lstm(load_checkpoint(bundled_checkpoint()), exact)
    photos = [np.asarray(load_image(photo)) for photo in sample_photos()[:5]]
    exported = Captioner.load(exact, threads=2)
    pixels = np.stack([exported.preprocess(photo) for photo in photos])
    wanted = exported.encoder(pixels)
    whole = openvino_captioners(exact, "cpu", 2)
    assert {name.split(", ")[1] for name in whole} == {"whole batches", "streams"}
    small = nncf_captioners(exact, BUNDLED_ARTIFACT, photos, "cpu", 2)
    for captioners, least, most in ((whole, 0, 1e-3), (small, 1e-2, 0.3)):
        for captioner in captioners.values():
            found = captioner.encoder(pixels)
            assert all(least <= relative_error(wanted[name], found[name]) < most for name in wanted)
