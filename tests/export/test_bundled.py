"""The bundled checkpoint: small, documented, and exported exactly."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from capexport import Captioner
from capexport.artifact import CaptionParity, Decoding, Manifest, Parity, PromptSpec, Provenance
from capexport.bench.cli import sample_photos
from capexport.captioner import BUNDLED_ARTIFACT
from capexport.cli import main
from capexport.cli.lstm import bundled_checkpoint
from capexport.export.card import model_card
from capexport.families.cnn_lstm import Vocabulary
from capexport.models.checkpoint import load_checkpoint
from capexport.models.torch_captioner import torch_captioner
from capexport.preprocessing import ImageSpec


def test_it_fits_the_repository_and_its_description():
    folder = bundled_checkpoint()
    assert max(file.stat().st_size for file in folder.iterdir()) < 20e6
    checkpoint = load_checkpoint(folder)
    readme = (folder.parent / "README.md").read_text(encoding="utf-8")
    assert checkpoint.training["command"] in readme
    assert f"{len(checkpoint.vocabulary):,} words" in readme
    for name, value in checkpoint.metrics["test"].items():
        if isinstance(value, float):
            assert f"{name} {value:.1f}" in readme


def test_the_description_of_the_manifest_has_every_field():
    text = (bundled_checkpoint().parent / "README.md").read_text(encoding="utf-8")
    kinds = (Manifest, ImageSpec, Decoding, PromptSpec, Provenance, Parity, CaptionParity)
    names = {item.name for kind in kinds for item in dataclasses.fields(kind)}
    assert names == {name for name in names if f"`{name}`" in text}


def test_it_exports_and_captions_photos_as_pytorch_does(tmp_path: Path, capsys):
    photos = sorted(sample_photos()[0].parent.glob("*.[jp][pn]g"))
    assert len(photos) > 16
    out = tmp_path / "bundled"
    assert main(["lstm", "--out", str(out), "--photos", *map(str, photos)]) == 0
    assert f"{len(photos)} of {len(photos)} captions identical" in capsys.readouterr().out
    parity = json.loads((out / "manifest.json").read_text())["parity"]
    assert parity["captions"]["distinct"] > len(photos) / 2
    assert max(parity["max_difference"].values()) < 1e-4
    exported = Captioner.load(out)
    reference = torch_captioner(load_checkpoint(bundled_checkpoint()))
    for photo in sample_photos():
        caption = exported.caption(photo)
        assert caption.tokens == reference.caption(photo).tokens
        assert 3 < len(caption.tokens) < 30
        assert min(caption.tokens) >= len(Vocabulary.SPECIALS)
        assert caption.text.split()[0] in {"a", "an", "the", "two", "three", "several", "people"}


def test_the_bundled_artifact_is_the_checkpoint_in_int8_and_loses_little():
    manifest = Manifest.read(BUNDLED_ARTIFACT, thorough=True)
    assert manifest.precision == "int8"
    assert manifest.provenance.checkpoint_sha256 == load_checkpoint(bundled_checkpoint()).sha256
    assert manifest.size < 12e6
    metrics = manifest.parity.metrics
    assert metrics["int8"]["BLEU-4"] > metrics["PyTorch"]["BLEU-4"] - 0.8
    assert metrics["int8"]["CIDEr-D"] > metrics["PyTorch"]["CIDEr-D"] - 1.5
    readme = (bundled_checkpoint().parent / "README.md").read_text(encoding="utf-8")
    for name in ("BLEU-4", "CIDEr-D"):
        assert f"{name} {metrics['int8'][name]:.1f}" in readme
    exact = torch_captioner(load_checkpoint(bundled_checkpoint()))
    photos = sorted(sample_photos()[0].parent.glob("*.[jp][pn]g"))
    same = sum(
        token == other
        for one, two in zip(Captioner.load().caption(photos), exact.caption(photos), strict=True)
        for token, other in zip(one.tokens, two.tokens, strict=False)
    )
    assert same > 0.6 * sum(len(caption.tokens) for caption in exact.caption(photos))


def test_model_cards_are_what_the_hub_reads(artifact: Path, blip2_export, tmp_path: Path):
    from huggingface_hub import ModelCard

    for folder, licence in ((artifact, None), (blip2_export("opt"), "mit")):
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == licence
        assert card.data.pipeline_tag == "image-to-text"
        count = Manifest.read(folder).parity.captions
        identical, total = count.identical, count.images or count.compared
        assert f"{identical} of {total} captions are PyTorch's" in card.text
        assert f"# {folder.name}\n" in card.text
    bundled = (BUNDLED_ARTIFACT / "README.md").read_text(encoding="utf-8")
    manifest = Manifest.read(BUNDLED_ARTIFACT)
    _, generated = model_card(manifest, "The Flickr8k captioner of capexport").split("---\n\n")
    assert generated in bundled
    assert ModelCard(bundled).data.license == "other"
    # The card is nobody's input: it can be rewritten.
    edited = shutil.copytree(artifact, tmp_path / "edited")
    (edited / "README.md").write_text("mine")
    assert Captioner.load(edited).caption(sample_photos()[0]).text


def test_where_there_is_none_the_error_says_so(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("capexport.cli.lstm.BUNDLED_CHECKPOINT", tmp_path / "absent")
    assert main(["lstm", "--out", str(tmp_path / "out")]) == 2
    assert "pass a CHECKPOINT folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["capexport", "capbench"])
def test_console_scripts_are_installed(name: str):
    from importlib.metadata import entry_points

    [script] = entry_points(group="console_scripts", name=name)
    assert callable(script.load())
