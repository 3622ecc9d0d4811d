"""BLIP-2 checkpoints with random weights, of any size: nothing is downloaded, and of the weights
one at a time is in memory. The tests use small ones, `blip2_full_size.py` those of real models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2Processor,
    BlipImageProcessor,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
)

from capexport.models.blip2_checkpoint import meta_model

TEXT = [
    "a dog runs on the grass", "two cats sit in the snow", "a man with a red ball",
    "a photo of a woman who jumps in the water", "Question: how many cats are there? Answer: two",
]  # fmt: skip
PAD, END = 0, 1
IMAGE = 330  # the id of <image>, the tokenizer's last


def processor(
    language: str,
    image_size: int,
    num_query_tokens: int | None,
    padding_side: str = "left",
    texts: Iterable[str] = TEXT * 3,
    image_token: int = IMAGE,
) -> Blip2Processor:
    """A byte-level BPE of `texts` that frames text as OPT's (`</s>` first) or T5's does (`</s>`
    last); `image_token` is the id of its last, `<image>`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=image_token, special_tokens=specials, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    frame = "</s> $A" if language == "opt" else "$A </s>"
    bpe.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("</s>", END)])
    bpe.add_special_tokens([AddedToken("<image>", normalized=False)])
    assert bpe.token_to_id("<image>") == image_token
    kind = GPT2TokenizerFast if language == "opt" else PreTrainedTokenizerFast
    tokenizer = kind(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", padding_side=padding_side, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    images = BlipImageProcessor(size={"height": image_size, "width": image_size})
    return Blip2Processor(images, tokenizer, num_query_tokens)


def blip2_config(
    language: str,
    vision: dict[str, Any],
    qformer: dict[str, Any],
    text: dict[str, Any],
    queries: int,
    image_token: int = IMAGE,
) -> Blip2Config:
    tokens = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": PAD}
    if language == "t5":
        tokens["decoder_start_token_id"] = PAD
    return Blip2Config(
        vision_config=vision,
        qformer_config={**qformer, "encoder_hidden_size": vision["hidden_size"]},
        text_config={"model_type": language, **tokens, **text},
        num_query_tokens=queries,
        image_token_index=image_token,
        architectures=["Blip2ForConditionalGeneration"],
    )


def save_checkpoint(
    folder: Path,
    config: Blip2Config,
    *,
    seed: int = 0,
    shard_bytes: int = 2 * 10**9,
    num_query_tokens: bool = True,
    padding_side: str = "left",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write `config`, weights drawn so that captions vary with the image, and a processor.

    `num_query_tokens` says whether the processor knows that number: those of old checkpoints don't.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name)
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in meta_model(config).named_parameters():
        if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
            flush()
        shard[name] = _draw(name, parameter.shape, config, generator).to(dtype)
    flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    queries = config.num_query_tokens if num_query_tokens else None
    size = config.vision_config.image_size
    saved = processor(config.text_config.model_type, size, queries, padding_side)
    saved.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def _draw(name: str, shape: torch.Size, config: Blip2Config, generator: torch.Generator) -> Tensor:
    if "norm" in name.lower() and name.endswith("weight"):
        return torch.ones(shape)
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return values.mul_(0.1)
    if any(part in name for part in ("query_tokens", "class_embedding")):
        return values
    if any(part in name for part in ("embed", "shared")) and "patch" not in name:
        return values.mul_(0.6)
    gain = 1.6 * shape[1:].numel() ** -0.5
    if name.endswith("Attention.q.weight"):  # T5 doesn't scale its products of queries and keys
        gain *= config.text_config.d_kv**-0.5
    if name.startswith("language_projection"):  # the image must be heard
        gain *= 3
    return values.mul_(gain)
