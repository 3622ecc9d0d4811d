import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS, edit_manifest
from PIL import Image

from capexport import (
    ArtifactError,
    ArtifactNotFoundError,
    Captioner,
    DeviceError,
    ImageError,
    MissingExtraError,
)
from capexport.artifact import Manifest, sha256_of
from capexport.captioner import open_artifact
from capexport.families.cnn_lstm import Vocabulary
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


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(artifact, tmp_path / "copied")


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
    files = json.loads((copied / "manifest.json").read_text())["files"]
    edit_manifest(copied, files={**files, "encoder.onnx": files["decoder_step.onnx"]})
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
        files = json.loads((copied / "manifest.json").read_text())["files"]
        files["encoder.onnx"] = {"bytes": len(content), "sha256": sha256_of(path)}
        edit_manifest(copied, files=files)
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
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in copied.iterdir()
        if file.name != "manifest.json"
    }
    edit_manifest(copied, files=files)
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
