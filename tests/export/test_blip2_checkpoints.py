"""A table of checkpoint shapes that people have: each is read as Transformers itself reads it, or
refused in the first seconds, with the reason and the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blip2_models import OPT, QFORMER, QUERIES, T5, VISION
from conftest import draw_photo
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks.random_blip2 import END, IMAGE, blip2_config, save_checkpoint
from capexport import Captioner, CheckpointError, ParityError
from capexport.cli import main
from capexport.export import blip2
from capexport.export.blip2 import compare_weights, export_blip2
from capexport.models.blip2 import HuggingFaceCaptioner
from capexport.models.blip2_checkpoint import Weights, meta_model, read_checkpoint
from capexport.preprocessing import preprocess

Make = Callable[..., Path]
Edit = Callable[[Path], object]
IMAGES = [draw_photo(seed, (60, 50)) for seed in range(300, 303)]
PROMPTS = ["a photo of", "Question: how many cats are there? Answer:", "two"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LM = "language_model."
OPT_EMBEDDING, T5_EMBEDDING = f"{LM}model.decoder.embed_tokens.weight", f"{LM}shared.weight"
HEAD = f"{LM}lm_head.weight"


def edit_json(name: str, *removed: str, part: str | None = None, **changes: Any) -> Edit:
    """Change a JSON file, or the object `part` of it."""

    def edit(folder: Path) -> None:
        path = folder / name
        document = json.loads(path.read_text())
        values = document[part] if part else document
        values.update(changes)
        for key in removed:
            values.pop(key, None)
        path.write_text(json.dumps(document))

    return edit


def text(*removed: str, **changes: Any) -> Edit:
    return edit_json("config.json", *removed, part="text_config", **changes)


def images(**changes: Any) -> Edit:
    return edit_json("preprocessor_config.json", **changes)


def tokenizer(*removed: str, **changes: Any) -> Edit:
    return edit_json("tokenizer_config.json", *removed, **changes)


def nothing(folder: Path) -> None:
    pass


def remove(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: str | bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def resave(change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None) -> Edit:
    """All tensors in one file, changed in place."""

    def edit(folder: Path) -> None:
        tensors = weights_of(folder)
        change(tensors)
        for file in (*folder.glob("*.safetensors"), folder / INDEX):
            file.unlink(missing_ok=True)
        save_file(tensors, folder / SINGLE, {"format": "pt"})

    return edit


def beside(name: str, factor: float = 1.5, dtype: torch.dtype = torch.float32) -> Edit:
    """Another file with tensors of the same names."""

    def edit(folder: Path) -> None:
        others = {k: (v * factor).to(dtype) for k, v in weights_of(folder).items()}
        save_file(others, folder / name, {"format": "pt"})

    return edit


def all_of(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def cast(**dtypes: torch.dtype) -> Edit:
    """By the first letters of their names, the rest as `rest`."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            start = next((start for start in dtypes if name.startswith(start)), "rest")
            tensors[name] = tensor.to(dtypes[start])

    return resave(change)


def renamed(old: str, new: str) -> Edit:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return resave(change)


def nested_processor(folder: Path) -> None:
    """As Transformers 5 saves it."""
    path = folder / "preprocessor_config.json"
    nested = {"image_processor": json.loads(path.read_text()), "num_query_tokens": QUERIES}
    path.unlink()
    (folder / "processor_config.json").write_text(json.dumps(nested))


transformers_5 = all_of(
    nested_processor,
    remove("special_tokens_map.json"),
    tokenizer("added_tokens_decoder", tokenizer_class="TokenizersBackend", backend="tokenizers"),
    edit_json("config.json", "torch_dtype", dtype="float32"),
    text("torch_dtype", dtype="float32"),
)
before_image_tokens = all_of(
    edit_json("config.json", "image_token_index"),
    edit_json("processor_config.json", "num_query_tokens"),
)


def own_image_token(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<image>", "<picture>"))
    tokenizer(extra_special_tokens={"image_token": "<picture>"}, image_token="<picture>")(folder)


def head_of_its_own(tensors: dict[str, torch.Tensor]) -> None:
    embedding = tensors[OPT_EMBEDDING if OPT_EMBEDDING in tensors else T5_EMBEDDING]
    tensors[HEAD] = embedding.roll(1, 0).clone()


# Read, without an export, as Transformers reads it: kind of checkpoint, and what is changed in it.
EQUAL: dict[str, tuple[str, Edit]] = {
    "one file": ("opt", resave()),
    "one file and the index of another save": ("opt", beside(SINGLE)),
    "a stale shard": ("opt", beside("model-00009-of-00009.safetensors")),
    "a variant in fp16": ("t5", beside("model.fp16.safetensors", 1.01, torch.float16)),
    "another model's file": (
        "opt", lambda folder: save_file({HEAD: torch.ones(340, 32)}, folder / "zz.safetensors"),
    ),
    "float16": ("opt", cast(rest=torch.float16)),
    "float16 with a Q-Former in float32": (
        "t5", cast(qformer=torch.float32, query=torch.float32, rest=torch.float16)
    ),
    "bfloat16": ("t5", cast(rest=torch.bfloat16)),
    "mixed types": ("opt", cast(vision=torch.bfloat16, rest=torch.float16)),
    "float64": ("opt", cast(rest=torch.float64)),
    "names of old": (
        "opt", all_of(renamed("LayerNorm.weight", "LayerNorm.gamma"),
                      renamed("LayerNorm.bias", "LayerNorm.beta")),
    ),
    "tensors too many": (
        "opt", resave(lambda tensors: tensors.update(
            {"qformer.embeddings.position_ids": torch.arange(9), "itm_head.weight": torch.ones(2)}
        )),
    ),
    "both of a tied pair": (
        "opt", resave(lambda t: t.update({HEAD: t[OPT_EMBEDDING].clone()}))
    ),
    "no architectures": ("opt", edit_json("config.json", "architectures")),
    "Blip2Model": ("t5", edit_json("config.json", architectures=["Blip2Model"])),
    "size as a number": ("opt", images(size=28)),
    "a crop that nobody reads": ("opt", images(crop_size=20, do_center_crop=True)),
    "a fast image processor": ("opt", images(image_processor_type="BlipImageProcessorFast")),
    "nothing but do_rescale": ("opt", images(do_normalize=False)),
    "one mean and one std": ("opt", images(image_mean=0.5, image_std=0.25)),
    "rescaled to 0..2": ("opt", images(rescale_factor=1 / 127.5, image_mean=[1.0] * 3)),
    "a model card that is none": ("opt", write("README.md", b"---\na: [\n---\n\xff\xfe")),
}  # fmt: skip


@pytest.fixture
def shape(blip2_checkpoint: Make, tmp_path: Path) -> Callable[[str, Edit], Path]:
    """A copy of a small checkpoint, edited."""

    def make(kind: str, edit: Edit = nothing) -> Path:
        folder = shutil.copytree(blip2_checkpoint(kind), tmp_path / "checkpoint")
        edit(folder)
        return folder

    return make


@pytest.mark.parametrize("name", EQUAL)
def test_read_as_transformers_reads_it(name: str, shape, tmp_path: Path):
    folder = shape(*EQUAL[name])
    checkpoint, weights = read_checkpoint(folder), Weights(folder, tmp_path)
    model = meta_model(checkpoint.config)
    weights.fill(model, torch.float32)
    wanted = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, wanted))
    assert list(ours) == list(theirs)
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    compare_weights(checkpoint, weights)
    pixels = BlipImageProcessor.from_pretrained(folder)(IMAGES[0])["pixel_values"][0]
    np.testing.assert_allclose(
        preprocess(IMAGES[0], checkpoint.image), pixels, rtol=2e-5, atol=2e-5
    )
    assert checkpoint.assumed == ()


def model_of(language: str, **settings: Any) -> Edit:
    """Another model in the place of the checkpoint's: the small one with other settings."""

    def edit(folder: Path) -> None:
        shutil.rmtree(folder)
        qformer = {**QFORMER, "use_qformer_text_input": settings.pop("qformer_text", False)}
        config = blip2_config(language, VISION, qformer, {**LANGUAGES[language], **settings}, QUERIES)
        save_checkpoint(folder, config, padding_side="right")

    return edit


LANGUAGES = {"opt": OPT, "t5": T5}
not_of_5 = tokenizer("extra_special_tokens", tokenizer_class="PreTrainedTokenizerFast")
# Exported, and captioned as Transformers captions: kind of checkpoint, what is changed in it, and
# what makes Transformers 4 load what is meant where it doesn't.
EXPORTED: dict[str, tuple[str, Edit, Edit]] = {
    "a Flan-T5 of Transformers 5": (
        "t5", all_of(transformers_5, text(tie_word_embeddings=True, scale_decoder_outputs=False)),
        all_of(not_of_5, text(tie_word_embeddings=False)),
    ),
    "an OPT of Transformers 5, no end token": (
        "opt", all_of(
            transformers_5, text(eos_token_id=None), cast(rest=torch.float16),
            tokenizer(tokenizer_class="GPT2Tokenizer", extra_special_tokens=["<image>"]),
        ), not_of_5,
    ),
    "before image tokens, pixels up to 255": (
        "opt-old", all_of(before_image_tokens, images(do_rescale=False, do_normalize=False)),
        edit_json("config.json", image_token_index=IMAGE),
    ),
    "norms behind, image token of its own": (
        "opt", all_of(model_of("opt", do_layer_norm_before=False, qformer_text=True),
                      own_image_token), nothing,
    ),
    "no final norm, no bias, gelu": (
        "opt", model_of("opt", _remove_final_layer_norm=True, enable_bias=False,
                        activation_function="gelu", layer_norm_elementwise_affine=False,
                        repetition_penalty=1.3, min_new_tokens=4, max_new_tokens=9, min_length=5,
                        temperature=0.3, length_penalty=2.0), nothing,
    ),
    "exact gated GELU, four and three layers": (
        "t5", all_of(model_of("t5", dense_act_fn="gelu", num_layers=4, num_decoder_layers=3),
                     images(rescale_factor=1 / 127.5, resample=2)), nothing,
    ),
    "gelu_new, wide heads, tied, settings": (
        "t5", model_of("t5", feed_forward_proj="gelu_new", d_kv=16, tie_word_embeddings=True,
                       repetition_penalty=1.6, min_length=6, max_length=14,
                       suppress_tokens=[200]), nothing,
    ),
}  # fmt: skip
ASSUMED = {"a Flan-T5 of Transformers 5", "before image tokens, pixels up to 255"}


def said_by_transformers(folder: Path, prompts: list[str] | None) -> list[list[int]]:
    """The new tokens of `generate()`, image by image, its input put together from the parts that
    Transformers loads."""
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    pixels = BlipImageProcessor.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    said = []
    for index, image in enumerate(IMAGES):
        inputs = {"pixel_values": torch.from_numpy(pixels(image)["pixel_values"][0])[None]}
        if prompts:
            ids = [model.config.image_token_index] * QUERIES + words(prompts[index])["input_ids"]
            inputs |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        row = model.generate(**inputs, do_sample=False)[0].tolist()
        given = 1 if model.config.is_encoder_decoder else QUERIES + 1
        if prompts and given > 1:
            given = len(ids)
        said.append(row[given:])
    return said


def without_end(tokens: list[int], ends: Any) -> tuple[int, ...]:
    ends = ends if isinstance(ends, list) else [ends]
    cut = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:cut])


@pytest.mark.parametrize("name", EXPORTED)
def test_captions_are_those_of_transformers(name: str, shape, tmp_path: Path):
    kind, edit, mended = EXPORTED[name]
    folder = shape(kind, edit)
    manifest = export_blip2(folder, tmp_path / "out")
    assert "from_pretrained" in manifest.parity["yardstick"]
    assert bool(manifest.provenance["assumed"]) == (name in ASSUMED)
    mended(folder)
    exported = Captioner.load(tmp_path / "out")
    ends = json.loads((folder / "config.json").read_text())["text_config"].get("eos_token_id", END)
    found = set()
    for prompts in (None, PROMPTS):
        wanted = said_by_transformers(folder, prompts)
        captions = exported.caption(IMAGES, prompt=prompts)
        assert [c.tokens for c in captions] == [without_end(row, ends) for row in wanted]
        found.update(c.tokens for c in captions)
    assert len(found) > 1
