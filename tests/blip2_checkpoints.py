"""Small BLIP-2 checkpoints with random weights and a tokenizer of their own; no download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

TEXT = [
    "a dog runs on the grass", "two cats sit in the snow", "a man with a red ball",
    "a photo of a woman who jumps in the water", "Question: how many cats are there? Answer: two",
]  # fmt: skip
IMAGE_SIZE = 28
QUERIES = 4


def tokenizer(language: str, padding_side: str = "left") -> PreTrainedTokenizerFast:
    """A byte-level BPE, framed as OPT's (`</s>` first) or T5's (`</s>` last)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<pad>", "</s>", "<s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT * 3, trainer)
    frame = "</s> $A" if language == "opt" else "$A </s>"
    bpe.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", padding_side=padding_side, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def processor(
    language: str, num_query_tokens: int | None = QUERIES, **options: str
) -> Blip2Processor:
    images = BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return Blip2Processor(images, tokenizer(language, **options), num_query_tokens)


def model(language: str, seed: int = 0, **text: object) -> Blip2ForConditionalGeneration:
    """Weights are drawn so that captions vary with the image, and end at different lengths."""
    vocabulary = 340
    common = {
        "model_type": language, "vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 1,
        "pad_token_id": 0, "num_attention_heads": 4, "num_hidden_layers": 2, "dropout": 0.0,
    }  # fmt: skip
    if language == "opt":
        common |= {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32,
                   "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
    else:
        common |= {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                   "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
                   "decoder_start_token_id": 0, "dropout_rate": 0.0}  # fmt: skip
    config = Blip2Config(
        vision_config={"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
                       "num_attention_heads": 3, "image_size": IMAGE_SIZE, "patch_size": 7},
        qformer_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "intermediate_size": 32, "encoder_hidden_size": 24, "vocab_size": 50},
        text_config={**common, **text},
        num_query_tokens=QUERIES,
        image_token_index=len(processor(language).tokenizer) - 1,
    )  # fmt: skip
    torch.manual_seed(seed)
    blip2 = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        blip2.query_tokens.normal_()
        for name, weight in blip2.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                fan_in = weight.shape[-1] if weight.ndim == 2 else weight[0].numel()
                if "embed" in name or "shared" in name:
                    weight.normal_(0, 0.6)
                else:
                    weight.normal_(0, 1.6 * fan_in**-0.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
    return blip2


def save(
    folder: Path,
    language: str,
    *,
    num_query_tokens: int | None = QUERIES,
    padding_side: str = "left",
    max_shard_size: str = "200KB",
    **options: object,
) -> Path:
    model(language, **options).save_pretrained(folder, max_shard_size=max_shard_size)
    processor(language, num_query_tokens, padding_side=padding_side).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder
