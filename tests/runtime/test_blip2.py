"""BLIP-2 in the runtime. Equality with `generate()` is tested in tests/export."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROMPTS, assert_same, draw_photo, edit_manifest, vouch
from PIL import Image

from capexport import (
    ArtifactError,
    ArtifactNotFoundError,
    Captioner,
    MissingExtraError,
    OptionError,
)
from capexport.cli import main


@pytest.fixture(scope="module")
def blip2(blip2_artifact: Path) -> Captioner:
    return Captioner.load(blip2_artifact, threads=1)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [draw_photo(seed, (60, 50)) for seed in range(3)]


def test_prompts_for_all_and_for_each(blip2: Captioner, images: list[Image.Image]):
    prompts = PROMPTS
    assert not blip2.text.frame(prompts, 3).mask.all()
    single = [
        blip2.caption(image, prompt=prompt) for image, prompt in zip(images, prompts, strict=True)
    ]
    assert len({caption.tokens for caption in single}) == 3
    for batch_size in (1, 2, 3):
        batched = blip2.caption(images, prompt=prompts, batch_size=batch_size)
        assert_same(batched, single, 1e-4)
    same = blip2.caption(images, prompt=prompts[2])
    assert same[2].tokens == single[2].tokens
    assert blip2.caption(images)[0].tokens != same[0].tokens
    timing = single[0].timing
    assert min(timing.preprocess, timing.encode, timing.decode) > 0


def test_rows_with_unlike_masks_that_end_out_of_order(blip2: Captioner):
    images = [draw_photo(seed, (60, 50)) for seed in range(40, 52)]
    prompts = [("x " * number).strip() or "a" for number in (0, 9, 3, 1, 12, 0, 5, 2, 7, 4, 1, 6)]
    for options in ({}, {"repetition_penalty": 1.5, "min_tokens": 2}):
        pairs = zip(images, prompts, strict=True)
        alone = [blip2.caption(image, prompt=prompt, **options) for image, prompt in pairs]
        lengths = [len(caption.tokens) for caption in alone]
        assert len(set(lengths)) > 2
        assert lengths != sorted(lengths), "some row must end before one in front of it"
        for order in (slice(None), slice(None, None, -1)):
            together = blip2.caption(images[order], prompt=prompts[order], batch_size=12, **options)
            assert [c.tokens for c in together] == [c.tokens for c in alone[order]]


def test_a_long_prompt_takes_no_room_from_its_neighbour(blip2: Captioner, images):
    limit = blip2.text.spec.max_positions
    if limit is None:
        pytest.skip("T5 has no limit")
    length = blip2.text.frame(["two"], 1).tokens.shape[1]
    long = "z" * (limit - length - 3)
    room = int(blip2.text.frame([long], 1).room[0])
    assert 0 < room < 12
    free = {"min_tokens": room, "max_tokens": None}
    alone = [blip2.caption(images[0], prompt=p, **free) for p in (long, "two", "a photo of")]
    together = blip2.caption([images[0]] * 3, prompt=[long, "two", "a photo of"], **free)
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert len(together[0].tokens) == room < max(len(c.tokens) for c in together)
    for asked in ({"max_tokens": room + 1}, {"max_tokens": 30, "min_tokens": room + 1}):
        with pytest.raises(OptionError, match=f"leaves room for {room} of the model's {limit}"):
            blip2.caption([images[0]] * 2, prompt=["two", long], **asked)
    with pytest.raises(OptionError, match=f"leaves room for {room}"):
        blip2.caption(images[0], prompt=long, min_tokens=room + 1)


def test_prompts_that_do_not_fit(blip2: Captioner, images: list[Image.Image]):
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        blip2.caption(images, prompt=PROMPTS[:2])
    with pytest.raises(OptionError, match=r"a prompt of \d{4} tokens, .*: shorten it"):
        blip2.caption(images[0], prompt="z" * 2000)  # the memory of longer ones would not be there
    with pytest.raises(ValueError, match="must not contain the image token"):
        blip2.caption(images[0], prompt="a <image> of")


def test_a_cnn_lstm_takes_no_prompt(captioner: Captioner, images: list[Image.Image]):
    with pytest.raises(ValueError, match="takes no prompt"):
        captioner.caption(images[0], prompt="a photo of")


def test_the_cache_stays_with_onnxruntime(blip2: Captioner, images: list[Image.Image]):
    features = blip2.encoder(np.stack([blip2.preprocess(image) for image in images]))
    prompts = blip2.text.frame(None, 3)
    _, state = blip2.decoder.start(features, prompts)
    _, following = blip2.decoder.step(np.array([5, 6, 7]), state)
    masks = {name for name in state if name.endswith("attention_mask")}
    kept = state.keys() - masks
    assert {type(following[name]).__name__ for name in kept} == {"OrtValue"}
    for name in kept:
        before, after = state[name].shape(), following[name].shape()
        assert after[2] == before[2] + (name not in blip2.decoder.constant)
    if blip2.text.spec.start_token is not None:
        constant = {name for name in state if ".encoder." in name}
        assert blip2.decoder.constant == {"encoder_attention_mask", *constant}
    for name in blip2.decoder.constant:
        assert following[name] is state[name]
    chosen = blip2.decoder.select(following, np.array([2, 0]))
    for name in kept:
        np.testing.assert_array_equal(chosen[name].numpy(), following[name].numpy()[[2, 0]])
    for name in masks:
        np.testing.assert_array_equal(chosen[name], following[name][[2, 0]])


@pytest.fixture
def copied(blip2_artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(blip2_artifact, tmp_path / "copied")


def test_truncated_missing_and_altered_files(copied: Path):
    data = copied / "decoder_model_merged.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[:-64])
    with pytest.raises(ArtifactError, match=r"merged\.onnx\.data: altered or damaged"):
        Captioner.load(copied)
    data.unlink()
    with pytest.raises(ArtifactNotFoundError, match=r"merged\.onnx\.data: missing"):
        Captioner.load(copied)
    data.write_bytes(content)
    tokenizer = copied / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("dog", "cat", 1) + " ")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: altered or damaged"):
        Captioner.load(copied)


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Put another file in the place of `name`, hash and all."""
    (folder / name).write_bytes(content)
    vouch(folder, name)


def test_swapped_graphs(copied: Path):
    for name, other in (
        ("vision_encoder.onnx", "embed_tokens.onnx"),
        ("embed_tokens.onnx", "vision_encoder.onnx"),
        ("decoder_model_merged.onnx", "embed_tokens.onnx"),
    ):
        folder = shutil.copytree(copied, copied.with_name(name))
        replace_file(folder, name, (copied / other).read_bytes())
        with pytest.raises(ArtifactError, match=f"{name}: graph of"):
            Captioner.load(folder)


def test_wrong_tokenizers(copied: Path):
    name = "tokenizer.json"
    tokenizer = json.loads((copied / name).read_text())
    replace_file(copied, name, b'{"no": "tokenizer"}')
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a tokenizer"):
        Captioner.load(copied)
    template = tokenizer["added_tokens"][0]
    for extra in range(340, 350):
        tokenizer["added_tokens"].append({**template, "id": extra, "content": f"<{extra}>"})
    replace_file(copied, name, json.dumps(tokenizer).encode())
    with pytest.raises(ArtifactError, match="a tokenizer of 341 tokens, but logits for 340"):
        Captioner.load(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "no prompt section"),
        ({"prompt": {"image_token": 1}}, "prompt.query_tokens is missing"),
        ({"state": {}}, "the manifest wires"),
        ({"image": {"resize": 28, "crop": 28, "resample": "magic"}}, "damaged manifest"),
    ],
)
def test_manifests_that_do_not_fit(copied: Path, changes: dict, message: str):
    edit_manifest(copied, **changes)
    with pytest.raises(ArtifactError, match=message):
        Captioner.load(copied)


def test_a_state_wired_to_an_output_that_is_none(copied: Path):
    state = json.loads((copied / "manifest.json").read_text())["state"]
    edit_manifest(copied, state={**state, next(iter(state)): "present.9.key"})
    with pytest.raises(ArtifactError, match=r"merged\.onnx: graph of"):
        Captioner.load(copied)


def test_without_tokenizers_the_extra_is_named(
    blip2_artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"capexport\[tokenizers\]"):
        Captioner.load(blip2_artifact)


def test_command_line(blip2_artifact: Path, blip2: Captioner, photos: list[Path], capsys, tmp_path):
    command = ["caption", "-m", str(blip2_artifact), *map(str, photos), "--prompt", "two"]
    assert main([*command, "--format", "jsonl", "--batch-size", "5"]) == 0
    rows = [json.loads(line) for line in io.StringIO(capsys.readouterr().out)]
    assert [row["text"] for row in rows] == [c.text for c in blip2.caption(photos, prompt="two")]
    out = tmp_path / "out.csv"
    journal = tmp_path / "out.csv.journal"
    journal.write_text('{"captioner": "another"}\n')
    assert main([*command, "--format", "csv", "--out", str(out), "--resume"]) == 2
    assert "another model or other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "value", "prompt"),
    [
        ("model", {"continuing_subword_prefix": "x" * 9}, None),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
            "two",
        ),
    ],
)
def test_tokenizers_that_panic(copied: Path, part: str, value: dict, prompt: str | None):
    """What Rust's panics become is no Exception."""
    path = copied / "tokenizer.json"
    document = json.loads(path.read_text())
    document[part] = {**(document[part] or {}), **value} if part == "model" else value
    replace_file(copied, "tokenizer.json", json.dumps(document).encode())
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: (not a tokenizer|fails at)"):
        Captioner.load(copied).caption(draw_photo(1), prompt=prompt)


def test_prompts_that_are_no_text(blip2: Captioner):
    for prompt in ("\ud800", "two \udfff", [3], [b"two"], [None]):
        with pytest.raises(OptionError, match="a prompt must be text"):
            blip2.caption([draw_photo(1)], prompt=prompt)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("prompt", "query_tokens", 5, "image_features of shape"),
        ("prompt", "query_tokens", 10**9, "image_features of shape|hold no image"),
        ("prompt", "pad_token", 10**6, "token 1000000 lies outside"),
        ("prompt", "start_token", 10**6, "token 1000000 lies outside|lists no encoder_model"),
        ("image", "crop", 27, "pixel_values of shape"),
    ],
)
def test_the_manifest_is_held_to_the_graphs(
    copied: Path, section: str, name: str, value: int, message: str
):
    document = json.loads((copied / "manifest.json").read_text())
    edit_manifest(copied, **{section: {**document[section], name: value}})
    with pytest.raises(ArtifactError, match=message):
        Captioner.load(copied)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_goes_on(blip2_artifact: Path, photos: list[Path]):
    code = """
import os, sys
from capexport import Captioner
folder, *photos = sys.argv[1:]
captioner = Captioner.load(folder, threads=2)
wanted = [c.tokens for c in captioner.caption(photos, prompt="two")]
child = os.fork()
if child == 0:
    assert [c.tokens for c in captioner.caption(photos, prompt="two")] == wanted
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    command = [sys.executable, "-c", code, str(blip2_artifact), *map(str, photos[:4])]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
    assert "parallelism" not in outcome.stderr, "tokenizers warns of its own threads"
