"""A table of checkpoint shapes that people have: each is read as Transformers itself reads it, or
refused in the first seconds, with the reason and the remedy."""

import hashlib
import importlib.util
import json
import re
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blip2_models import OPT, QFORMER, QUERIES, T5, VISION
from conftest import PROMPTS, draw_photo
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    BlipImageProcessor,
    GPT2TokenizerFast,
    T5TokenizerFast,
)

from benchmarks.random_blip2 import END, IMAGE, blip2_config, save_checkpoint
from capexport import Captioner, CheckpointError, ParityError
from capexport.cli import main
from capexport.export import blip2
from capexport.export.blip2 import compare_weights, export_blip2
from capexport.models.blip2 import HuggingFaceCaptioner
from capexport.models.blip2_checkpoint import (
    Weights,
    find_checkpoint,
    meta_model,
    read_checkpoint,
)
from capexport.preprocessing import preprocess

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., Path]
Edit = Callable[[Path], object]
IMAGES = [draw_photo(seed, (60, 50)) for seed in range(300, 303)]
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
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


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


not_of_5 = tokenizer("extra_special_tokens", tokenizer_class="PreTrainedTokenizerFast")
# Read, without an export, as Transformers reads it: kind of checkpoint, what is changed in it, and
# what makes Transformers 4 read what is meant where it doesn't.
EQUAL: dict[str, tuple[Any, ...]] = {
    "a Flan-T5 of Transformers 5": (
        "t5", all_of(transformers_5, text(tie_word_embeddings=True, scale_decoder_outputs=False)),
        all_of(not_of_5, text(tie_word_embeddings=False)),
    ),
    "a T5 of Transformers 5": (
        "t5-tied", all_of(transformers_5, text(scale_decoder_outputs=True)), not_of_5
    ),
    "an OPT of Transformers 5": (
        "opt", all_of(
            transformers_5, cast(rest=torch.float16),
            tokenizer(tokenizer_class="GPT2Tokenizer", extra_special_tokens=["<image>"]),
        ), not_of_5,
    ),
    "before image tokens": (
        "opt-old", before_image_tokens, edit_json("config.json", image_token_index=IMAGE)
    ),
    "an image token of its own": ("t5", own_image_token),
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
    kind, edit, *mend = EQUAL[name]
    folder = shape(kind, edit)
    checkpoint, weights = read_checkpoint(folder), Weights(folder, tmp_path)
    assert bool(checkpoint.assumed) == (name in ASSUMED)
    compare_weights(checkpoint, weights)
    model = meta_model(checkpoint.config)
    weights.fill(model, torch.float32)
    all_of(*mend)(folder)
    wanted = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, wanted))
    assert list(ours) == list(theirs)
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    photo = BlipImageProcessor.from_pretrained(folder)(IMAGES[0])["pixel_values"][0]
    pixels = preprocess(IMAGES[0], checkpoint.image)
    np.testing.assert_allclose(pixels, photo, rtol=2e-5, atol=2e-5)
    words = AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        wanted_ids = [wanted.config.image_token_index] * QUERIES + words(prompt)["input_ids"]
        inputs = checkpoint.processor(IMAGES[0], prompt, return_tensors="np")
        assert inputs["input_ids"].tolist() == [wanted_ids]
    side = "right" if kind.startswith("t5") else "left"
    assert checkpoint.processor.tokenizer.padding_side == side


def model_of(language: str, **settings: Any) -> Edit:
    """Another model in the place of the checkpoint's: the small one with other settings."""

    def edit(folder: Path) -> None:
        shutil.rmtree(folder)
        qformer = {**QFORMER, "use_qformer_text_input": settings.pop("qformer_text", False)}
        text = {**LANGUAGES[language], **settings}
        config = blip2_config(language, VISION, qformer, text, QUERIES)
        save_checkpoint(folder, config, padding_side="right")

    return edit


def published_opt(folder: Path) -> None:
    """As Salesforce/blip2-opt-2.7b-coco: its ids, flags and image size, and the newline that ends
    a caption."""
    coco = {**VISION, "image_size": 364, "patch_size": 14}
    ids = {"vocab_size": 50304, "eos_token_id": 50118, "bos_token_id": 2, "pad_token_id": 1}
    shutil.rmtree(folder)
    save_checkpoint(folder, blip2_config("opt", coco, QFORMER, {**OPT, **ids}, QUERIES))
    edit_json("config.json", image_token_index=50265)(folder)
    text("bos_token_id", "pad_token_id", torch_dtype="float16")(folder)
    letters = [x for x in ByteLevel.alphabet() if x != "Ċ"]
    names = ["<s>", "<pad>", "</s>", "<unk>", *sorted(letters)]
    names += [f"word{index}" for index in range(len(names), 50118)]
    names += ["Ċ", *(f"word{index}" for index in range(50119, 50265))]
    bpe = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    bpe.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    save_tokenizer(folder, GPT2TokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    ))  # fmt: skip

    # The newline is a word that this model says.
    def say(tensors: dict[str, torch.Tensor]) -> None:
        rows = tensors[OPT_EMBEDDING]
        tokens = [token for row in said_by_transformers(folder, None) for token in row[2:]]
        word = max(set(tokens), key=tokens.count)
        rows[[word, 50118]] = rows[[50118, word]].clone()

    resave(say)(folder)
    cast(rest=torch.float16)(folder)


def published_flan_t5(folder: Path) -> None:
    """As Salesforce/blip2-flan-t5-xl: its ids and flags."""
    shutil.rmtree(folder)
    settings = {"vocab_size": 32128, "dense_act_fn": "gelu", "is_gated_act": True}
    save_checkpoint(folder, blip2_config("t5", VISION, QFORMER, {**T5, **settings}, QUERIES))
    edit_json("config.json", image_token_index=32100)(folder)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyzQA?:"]
    pieces += [f"piece{index}" for index in range(len(pieces), 32000)]
    unigram = Tokenizer(models.Unigram([(piece, -2.0) for piece in pieces], unk_id=2))
    unigram.pre_tokenizer, unigram.decoder = Metaspace(), MetaspaceDecoder()
    unigram.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    save_tokenizer(folder, T5TokenizerFast(tokenizer_object=unigram))


def save_tokenizer(folder: Path, words: Any) -> None:
    for name in ("special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).unlink()
    words.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    words.save_pretrained(folder)
    assert "padding_side" not in json.loads((folder / "tokenizer_config.json").read_text())


LANGUAGES = {"opt": OPT, "t5": T5}
# Exported, and captioned as Transformers captions: kind of checkpoint, what is changed in it, and
# what makes Transformers 4 load what is meant where it doesn't.
EXPORTED: dict[str, tuple[str, Edit, Edit]] = {
    "blip2-opt-2.7b-coco, from before image tokens": (
        "opt", all_of(published_opt, before_image_tokens),
        edit_json("config.json", image_token_index=50265),
    ),
    "blip2-flan-t5-xl, saved by Transformers 5": (
        "t5", all_of(
            published_flan_t5, images(rescale_factor=1 / 127.5, resample=2), nested_processor,
            text(tie_word_embeddings=True, scale_decoder_outputs=False),
        ), text(tie_word_embeddings=False),
    ),
    "norms behind, no end, image token of its own, pixels up to 255": (
        "opt", all_of(
            model_of("opt", do_layer_norm_before=False, qformer_text=True), own_image_token,
            text(eos_token_id=None), images(do_rescale=False, do_normalize=False),
        ), nothing,
    ),
    "no final norm, no bias, gelu, settings, float16": (
        "opt", all_of(
            model_of("opt", _remove_final_layer_norm=True, enable_bias=False,
                     activation_function="gelu", layer_norm_elementwise_affine=False,
                     repetition_penalty=1.3, min_new_tokens=4, max_new_tokens=9, min_length=5,
                     temperature=0.3, length_penalty=2.0), cast(rest=torch.float16),
        ), nothing,
    ),
    "gelu_new, wide heads, four and three layers, tied, settings": (
        "t5", model_of("t5", feed_forward_proj="gelu_new", d_kv=16, tie_word_embeddings=True,
                       num_layers=4, num_decoder_layers=3, repetition_penalty=1.6, min_length=6,
                       max_length=14, suppress_tokens=[200]), nothing,
    ),
}  # fmt: skip
ASSUMED = {
    "blip2-opt-2.7b-coco, from before image tokens", "blip2-flan-t5-xl, saved by Transformers 5",
    "before image tokens", "a Flan-T5 of Transformers 5",
}  # fmt: skip


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
def test_captions_are_those_of_transformers(name: str, shape, tmp_path: Path, monkeypatch):
    kind, edit, mended = EXPORTED[name]
    folder = shape(kind, edit)
    if not name.startswith("no final norm"):
        monkeypatch.setattr(blip2, "_VALIDATED", 0)  # as if it were large
    manifest = export_blip2(folder, tmp_path / "out")
    assert "from_pretrained" in manifest.parity.yardstick
    assert bool(manifest.provenance.assumed) == (name in ASSUMED)
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
    assert "coco" not in name or min(map(len, found)) < 20, "no newline was said"


def bitsandbytes_8(folder: Path) -> None:
    """As bitsandbytes 0.50 saves it: integers with a scale for each row."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("fc1.weight", "fc2.weight"))]:
            scale = tensors[name].abs().amax(1)
            tensors[name] = (tensors[name] / scale[:, None] * 127).round().to(torch.int8)
            tensors[name.replace("weight", "SCB")] = scale
            tensors[name.replace("weight", "weight_format")] = torch.tensor(0, dtype=torch.uint8)

    resave(change)(folder)


def stored_as(dtype: torch.dtype, *companions: str, instead: bool = False) -> Edit:
    """Matrices of the language model as `dtype`, with companions, or replaced by these."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("fc1.weight")]:
            matrix = tensors.pop(name) if instead else tensors[name]
            if not instead:
                tensors[name] = matrix.to(dtype)
            for companion in companions:
                tensors[name.replace("weight", companion)] = matrix[:, :1].to(dtype).clone()

    return resave(change)


def pickled(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle is ever read")


def peft_save(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"base_model.model.{name}"] = tensors.pop(name)

    resave(change)(folder)


def quantization(**config: Any) -> Edit:
    return edit_json("config.json", quantization_config=config)


def drop(*parts: str) -> Edit:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return resave(change)


def index_names_another_shard(folder: Path) -> None:
    path = folder / INDEX
    document = json.loads(path.read_text())
    places = document["weight_map"]
    first, *_, last = sorted(set(places.values()))
    places.update({name: first if file == last else file for name, file in places.items()})
    path.write_text(json.dumps(document))


two_files_no_index = all_of(beside("zz.safetensors"), remove(INDEX))
auto_map = {"AutoTokenizer": ["custom.Custom", None], "AutoModel": "custom.Custom"}
# Refused in the first seconds: kind of checkpoint, what is changed, and words of the refusal.
REFUSED: dict[str, tuple[str, Edit, str]] = {
    "several files, no index": ("opt", two_files_no_index, r"tensors .* are in several of them"),
    "one file of another name": (
        "opt", all_of(resave(), lambda f: (f / SINGLE).rename(f / "model.fp16.safetensors")),
        r"neither model.safetensors nor .*model\.fp16\.safetensors",
    ),
    "a shard missing": (
        "opt", remove("model-00001.safetensors"), r"model-00001\.safetensors not there, but .*index"
    ),
    "index and shards of two saves": ("opt", index_names_another_shard, "not of one save"),
    "a shard outside": (
        "opt", edit_json(INDEX, weight_map={HEAD: "../other.safetensors"}), "files of this folder"
    ),
    "pickled only": ("opt", pickled, r'from_pretrained\(.*dtype="auto".*save_pretrained'),
    "a weight missing": ("opt", drop("layers.1.fc1.bias"), r"no weight .*layers\.1\.fc1\.bias"),
    "another prefix": ("t5", renamed("language_model.", "llm."), "random numbers"),
    "only the other of a tied pair": (
        "opt", renamed(OPT_EMBEDDING, HEAD), f"what Transformers loads as {HEAD} is not"
    ),
    "bitsandbytes, 8 bits": ("opt", bitsandbytes_8, r"bitsandbytes \(8 bits\).*--precision int8"),
    "bitsandbytes by its configuration": (
        "opt", quantization(load_in_8bit=True), "config.json: quantised by bitsandbytes"
    ),
    "GPTQ": ("opt", quantization(quant_method="gptq", bits=4), "quantised by gptq"),
    "GPTQ, configuration edited": (
        "opt", stored_as(torch.int32, "qweight", "qzeros", "scales", instead=True), "GPTQ or AWQ"
    ),
    "AWQ in a part": ("opt", text(quantization_config={"quant_method": "awq"}), "quantised by awq"),
    "fp8 with scales": ("opt", stored_as(torch.float8_e4m3fn, "weight_scale"), "quantised by"),
    "fp8": ("opt", stored_as(torch.float8_e4m3fn), "F8_E4M3"),
    "bitsandbytes, 4 bits": (
        "opt", stored_as(torch.uint8, "weight.absmax", "weight.quant_map"), r"\(4 bits\)"
    ),
    "integers": ("t5", resave(lambda t: t.update({HEAD: t[HEAD].to(torch.int8)})), "stores I8"),
    "compressed-tensors": (
        "opt", quantization(quant_method="compressed-tensors"), "quantised by compressed-tensors"
    ),
    "OPT, two for one": ("opt", resave(head_of_its_own), "differ, but config.json says"),
    "T5, two for one": ("t5", text(tie_word_embeddings=True), "differ, but config.json says"),
    "T5 of 5, scaled and not tied": ("t5", text(scale_decoder_outputs=True), "cannot build"),
    "T5 of 5, tied and not scaled": ("t5-tied", text(scale_decoder_outputs=False), "cannot build"),
    "an adapter": (
        "opt", lambda f: (pickled(f), (f / "config.json").rename(f / "adapter_config.json")),
        r"merge it first: .*merge_and_unload.*save_pretrained",
    ),
    "an unmerged save": ("opt", peft_save, r"merge it first: .*merge_and_unload.*save_pretrained"),
    "LoRA beside": (
        "opt", resave(lambda t: t.update({f"{LM}x.lora_A.weight": torch.ones(2)})), "merge it first"
    ),
    "groups of beams": (
        "opt", text(num_beam_groups=2, diversity_penalty=0.5, num_beams=4),
        r"text_config sets diversity_penalty, num_beam_groups, which .* cannot keep",
    ),
    "beams made probable again": (
        "t5", text(renormalize_logits=True, num_beams=4), "sets renormalize_logits"
    ),
    "sampling": ("t5", text(do_sample=True), "sets do_sample"),
    "bad words": ("t5", text(bad_words_ids=[[3]]), "sets bad_words_ids"),
    "min_length of OPT": ("opt", text(min_length=9), "sets min_length.*set min_new_tokens"),
    "max_length of OPT": ("opt", text(max_length=30), "sets max_length.*set max_new_tokens"),
    "nearest": ("opt", images(resample=0), r"resample 0 \(nearest\); supported"),
    "no filter at all": ("opt", images(resample=9), "resample: 9"),
    "not resized": ("opt", images(do_resize=False), "do_resize is off"),
    "shortest edge": ("opt", images(size={"shortest_edge": 28}), "shortest_edge.*28 x 28"),
    "another size": ("opt", images(size={"height": 56, "width": 56}), "56.*model takes 28 x 28"),
    "no spread": ("opt", images(image_std=[0, 1, 1]), "image_std .*std above 0"),
    "no image processor": ("opt", remove("preprocessor_config.json"), "preprocessor_config.json"),
    "other queries": (
        "opt", edit_json("processor_config.json", num_query_tokens=3), "another model's processor"
    ),
    "no room for the image token": (
        "opt", all_of(before_image_tokens, model_of("opt", vocab_size=IMAGE),
                      edit_json("config.json", "image_token_index")),
        "no room for <image> .*resize_token_embeddings",
    ),
    "no bos": ("t5", text(bos_token_id=None), "text_config has no bos_token_id"),
    "no pad": (
        "opt", all_of(tokenizer("pad_token"), remove("special_tokens_map.json")), "no pad_token"
    ),
    "narrow embeddings": ("opt", text(word_embed_proj_dim=24), "word_embed_proj_dim"),
    "wider than its weights": ("opt", text(ffn_dim=96), r"is \[64, 32\], not \[96, 32\]"),
    "a tokenizer with code": (
        "opt", tokenizer(auto_map=auto_map, tokenizer_class="Custom"), "tokenizer_config.*auto_map"
    ),
    "a model with code": ("opt", edit_json("config.json", auto_map=auto_map), "config.*auto_map"),
    "an image processor with code": ("opt", images(auto_map=auto_map), "preprocessor.*auto_map"),
    "generate() with code": ("opt", write("custom_generate/generate.py", "1 / 0"), "code of its"),
    "image and text matching": (
        "opt", edit_json("config.json", architectures=["Blip2ForImageTextRetrieval"]),
        "Blip2ForImageTextRetrieval .*supported is",
    ),
    "a start outside the vocabulary": ("t5", text(decoder_start_token_id=340), "none of its 340"),
    "a pointer of Git LFS": (
        "opt", write("model-00001.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "no configuration": ("opt", remove("config.json"), "config.json: not there"),
    "a list for a configuration": ("opt", write("config.json", "[1]"), "config.json: not a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_traced(
    name: str, shape, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    kind, edit, words = REFUSED[name]
    folder = shape(kind, edit)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    monkeypatch.setattr(blip2, "plan_parts", lambda *_: pytest.fail("went on to the graphs"))
    out = tmp_path / "out"
    assert main(["blip2", "--model", str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert re.search(words, error), error
    assert sorted(tmp_path.iterdir()) == [folder]


def test_another_read_than_transformers_is_noticed(shape, blip2_checkpoint: Make, tmp_path: Path):
    changed = shape("opt", resave(lambda t: t[OPT_EMBEDDING][7].neg_()))
    checkpoint = read_checkpoint(blip2_checkpoint("opt"))
    compare_weights(checkpoint, Weights(checkpoint.folder, tmp_path))
    with pytest.raises(ParityError, match=f"loads as {OPT_EMBEDDING} is not"):
        compare_weights(checkpoint, Weights(changed, tmp_path))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("t5", {"max_length": 9, "min_length": 4}),
        ("t5", {"max_new_tokens": 5, "min_length": 30, "max_length": 7}),
        ("t5-tied", {"repetition_penalty": 1.8, "suppress_tokens": [333, 2]}),
        ("opt", {"min_length": 5, "max_new_tokens": 30, "top_k": 3}),
        ("opt", {"min_new_tokens": 12, "repetition_penalty": 0.7, "eos_token_id": [123, 5000, -1]}),
        ("opt", {"max_length": 20, "eos_token_id": None, "use_cache": False}),
        ("opt", {"num_beams": 3, "early_stopping": "never", "no_repeat_ngram_size": 2}),
        ("t5", {"num_beams": 2, "early_stopping": True, "length_penalty": -0.5}),
    ],
)
def test_generation_settings_count_as_in_generate(kind: str, settings, shape, blip2_checkpoint):
    decoding = read_checkpoint(folder := shape(kind, text(**settings))).decoding
    ends = list(decoding.end_tokens)
    carried = {
        "max_new_tokens": decoding.max_tokens, "min_new_tokens": decoding.min_tokens,
        "repetition_penalty": decoding.repetition_penalty, "eos_token_id": ends or None,
        "suppress_tokens": list(decoding.suppress_tokens) or None,
        "num_beams": decoding.num_beams, "early_stopping": decoding.early_stopping,
        "length_penalty": decoding.length_penalty,
        "no_repeat_ngram_size": decoding.no_repeat_ngram_size,
    }  # fmt: skip
    plain = HuggingFaceCaptioner.load(blip2_checkpoint(kind))
    if not ends:
        plain.model.language_model.generation_config.eos_token_id = None
    for prompt in (None, PROMPTS[:2]):
        wanted = HuggingFaceCaptioner.load(folder).caption(IMAGES[:2], prompt=prompt, batch_size=1)
        said = plain.caption(IMAGES[:2], prompt=prompt, batch_size=1, **carried)
        assert [c.tokens for c in said] == [c.tokens for c in wanted]


class Hub(BaseHTTPRequestHandler):
    """The Hugging Face hub with one repository, as its client knows it."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        names = sorted(path.name for path in self.folder.iterdir())
        if "/resolve/" in self.path:
            return self._file(self.folder / self.path.rpartition("/")[2])
        if "/tree/" in self.path:
            answer: Any = [{"type": "file", "path": n, "size": 1, "oid": "0"} for n in names]
        else:
            siblings = [{"rfilename": name} for name in names]
            answer = {"id": "someone/blip2", "sha": COMMIT, "siblings": siblings}
        return self._answer(200, json.dumps(answer).encode())

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._answer(404, b"")
        content = path.read_bytes()
        if asked := self.headers["Range"]:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            return self._answer(206, content[first : last + 1])
        if self.command == "GET":
            self.asked.append(path.name)
        return self._answer(200, content)

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Serve a folder as someone/blip2; returns the names of the files that are then fetched."""
    from huggingface_hub import constants, file_download

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def serve(folder: Path) -> list[str]:
        Hub.folder, Hub.asked = folder, []
        return Hub.asked

    yield serve
    server.shutdown()
    server.server_close()


def test_what_transformers_reads_is_downloaded_and_no_more(shape, hub):
    folder = shape("opt")
    needed = {path.name for path in folder.iterdir()}
    beside("model.fp16.safetensors", 1.0, torch.float16)(folder)
    beside("model-00009.safetensors")(folder)
    write("pytorch_model.bin", b"-")(folder)
    write("training_args.json", "{}")(folder)
    asked = hub(folder)
    found, source = find_checkpoint("someone/blip2")
    assert source == {"source": "someone/blip2", "revision": COMMIT}
    assert sorted(asked) == sorted(needed)
    assert read_checkpoint(found).config.num_query_tokens == QUERIES
    assert list(Weights(found, folder).sha256()) == [
        "model-00001.safetensors", "model-00002.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (bitsandbytes_8, r"bitsandbytes \(8 bits\)"),
        (drop("layers.1.fc1.bias"), "no weight"),
        (all_of(resave(), renamed("fc1.bias", "fc1.b")), "no weight"),
        (pickled, r'two lines make it: .*from_pretrained\("someone/blip2", dtype="auto"\)'),
        (remove("model-00001.safetensors"), r"model-00001\.safetensors not there"),
        (text(bad_words_ids=[[3]]), "text_config sets bad_words_ids"),
    ],
)
def test_weights_that_will_be_refused_are_not_downloaded(edit: Edit, words: str, shape, hub):
    asked = hub(shape("opt", edit))
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint("someone/blip2")
    assert "config.json" in asked
    assert not [name for name in asked if name.endswith((".safetensors", ".bin"))]


def sentencepiece_only(folder: Path) -> None:
    """As T5's checkpoints of old: no tokenizer.json, which sentencepiece and protobuf make."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    pieces = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), *((x, 1) for x in "▁abcdefghijklmno?:")]
    for piece, kind in pieces:
        model.pieces.add(piece=piece, score=-2.0, type=kind)
    model.trainer_spec.unk_id, model.trainer_spec.model_type = 2, 1
    model.trainer_spec.bos_id, model.trainer_spec.eos_id, model.trainer_spec.pad_id = -1, 1, 0
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    remove("tokenizer.json", "special_tokens_map.json")(folder)
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": IMAGE - len(pieces)}
    write("tokenizer_config.json", json.dumps(settings))(folder)


def test_a_sentencepiece_model_names_what_reads_it(shape, monkeypatch):
    folder = shape("t5", sentencepiece_only)
    if importlib.util.find_spec("sentencepiece"):
        words = read_checkpoint(folder).processor.tokenizer
        wanted = AutoTokenizer.from_pretrained(folder)
        for prompt in PROMPTS:
            assert words(prompt)["input_ids"] == wanted(prompt)["input_ids"]
        monkeypatch.setattr("transformers.utils.import_utils._sentencepiece_available", False)
    with pytest.raises(CheckpointError, match=r"spiece\.model.*`pip install sentencepiece"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (b"---\nlicense: mit\n---\n", "mit"),
        (b"---\nlicense: [mit\n---\n", None),
        (
            b"---\nlicense: mit\nmodel-index:\n- name: x\n  results:\n  - task: {type: y}\n---\n",
            None,
        ),
        ("---\nlicense: mit\n---\né".encode("latin-1"), None),
        (b"---\nlicense: no\n---\n", None),
        (b"no metadata", None),
    ],
)
def test_a_card_that_cannot_be_read_costs_the_licence_alone(card: bytes, licence, tmp_path: Path):
    write("README.md", card)(tmp_path)
    assert blip2.licence_of(tmp_path) == licence
