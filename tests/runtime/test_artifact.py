"""The manifest, typed to its leaves, and the files that it vouches for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_manifest

from capexport import ArtifactError, Captioner
from capexport.artifact import Manifest, PromptSpec, sha256_of, typed
from capexport.captioner import BUNDLED_ARTIFACT
from capexport.cli import main
from capexport.preprocessing import ImageSpec


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(artifact, tmp_path / "copied")


def changed(folder: Path, path: str, value: Any) -> None:
    """Put `value` into the manifest's field at a path such as "image.mean"."""
    document = json.loads((folder / "manifest.json").read_text())
    *parents, leaf = path.split("/")
    part = document
    for name in parents:
        part = part[name]
    part[leaf] = value
    edit_manifest(folder, **document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("family", 3), ("family", None), ("precision", ["fp32"]), ("schema", "1"), ("schema", True),
        ("image", []), ("image/resize", 224.5), ("image/resize", True), ("image/crop", "224"),
        ("image/mean", [0.5, 0.5]), ("image/mean", "abc"), ("image/std", [1, 1, 0]),
        ("image/mean", [float("nan"), 0, 0]), ("image/std", [1, 1, float("inf")]),
        ("image/keep_aspect", 1), ("image/resample", "nearest"), ("image/more", 1),
        ("decoding/end_tokens", 2), ("decoding/end_tokens", [2.0]), ("decoding/end_tokens", [-1]),
        ("decoding/max_tokens", "30"), ("decoding/max_tokens", 0), ("decoding/max_tokens", True),
        ("decoding/suppress_tokens", {"0": 1}), ("decoding/start_token", [1]),
        ("decoding/repetition_penalty", -1), ("decoding/temperature", 1),
        ("state", ["hidden"]), ("state/hidden", 3),
        ("files/encoder.onnx", 5), ("files/encoder.onnx", {"bytes": 1}),
        ("files/encoder.onnx", {"bytes": "1", "sha256": ""}),
        ("provenance", {}), ("provenance/checkpoint_sha256", 5), ("provenance/opset", "20"),
        ("provenance/versions", {"torch": 2}), ("provenance/training", "long"),
        ("parity/captions", {}), ("parity/tolerance", "small"), ("parity/captions/identical", 1.5),
        ("prompt", {"image_token": 1}), ("prompt", 3),
    ],
)  # fmt: skip
def test_every_field_has_a_type_and_a_range(copied: Path, path: str, value: Any):
    changed(copied, path, value)
    with pytest.raises(ArtifactError, match=r"manifest\.json") as caught:
        Captioner.load(copied)
    known = (path.split("/")[-1], "schema", "is no number")
    assert any(word in str(caught.value) for word in known)


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "null", '"schema"', "[" * 100_000, '{"schema": 1, "family": NaN}', "\xff\xfe"],
)
def test_what_is_no_manifest_at_all(copied: Path, text: str):
    (copied / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Captioner.load(copied)


@pytest.mark.parametrize("name", ["start_token", "end_tokens", "suppress_tokens"])
def test_tokens_are_held_to_the_vocabulary(copied: Path, name: str):
    changed(copied, f"decoding/{name}", 999 if name == "start_token" else [2, 999])
    with pytest.raises(ArtifactError, match="token 999 lies outside the vocabulary"):
        Captioner.load(copied)


def test_a_decoder_that_needs_a_start_token_says_so(copied: Path):
    changed(copied, "decoding/start_token", None)
    with pytest.raises(ArtifactError, match="no start_token"):
        Captioner.load(copied)


@pytest.mark.parametrize(
    "words", [["dog"], {"a": 1}, ["<PAD>", "<SOS>", "<EOS>", 3], "words", ["<PAD>"] * 5]
)
def test_words_that_are_none(copied: Path, words: Any):
    path = copied / "vocabulary.json"
    path.write_text(json.dumps(words))
    record = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    changed(copied, "files/vocabulary.json", record)
    with pytest.raises(ArtifactError, match=r"vocabulary\.json: not a list of words"):
        Captioner.load(copied)


def test_what_is_read_is_what_was_written(artifact: Path, tmp_path: Path):
    for folder in (artifact, BUNDLED_ARTIFACT):
        manifest = Manifest.read(folder)
        document = json.loads(manifest.to_json())
        assert typed(Manifest, document) == manifest
        stored = json.loads((folder / "manifest.json").read_text())
        if folder == artifact:
            assert document == stored


def test_a_field_that_nothing_reads_any_more_is_passed_over():
    spec = {
        "image_token": 330, "query_tokens": 4, "bos_token": 1, "pad_token": 0, "start_token": None,
        "max_positions": 64, "clean_up_spaces": False, "padding_side": "right",
    }  # fmt: skip
    assert typed(PromptSpec, spec).max_positions == 64
    with pytest.raises(ValueError, match="hold no image"):
        typed(PromptSpec, {**spec, "max_positions": 4})


def test_integers_become_floats_where_floats_are_meant():
    spec = typed(ImageSpec, {"mean": [0, 0, 0], "std": [1, 1, 1]})
    assert spec.std == (1.0, 1.0, 1.0)
    assert all(isinstance(value, float) for value in spec.std)


def test_large_files_are_held_to_their_size_and_inspect_hashes_them(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr("capexport.artifact._ALWAYS_HASHED", 1000)
    data = copied / "decoder.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    Manifest.read(copied)
    with pytest.raises(ArtifactError, match=r"decoder\.data: altered"):
        Manifest.read(copied, thorough=True)
    assert main(["inspect", str(copied)]) == 2
    assert "decoder.data: altered" in capsys.readouterr().err
    data.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"decoder\.data: altered"):
        Captioner.load(copied)
