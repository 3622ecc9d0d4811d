"""The small BLIP-2 models of the tests: real code paths, random weights."""

from pathlib import Path
from typing import Any

from benchmarks.random_blip2 import blip2_config, save_checkpoint

VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
QFORMER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 50,
}  # fmt: skip
QUERIES = 4
POSITIONS = 64
OPT = {
    "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "vocab_size": 340,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 340,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
# End tokens are words that these models often say, so that captions end at different steps.
TEXTS: dict[str, dict[str, Any]] = {
    "opt": {**OPT, "eos_token_id": [1, 207, 333]},
    # As old checkpoints are: a processor that doesn't know its image tokens and pads on the right.
    "opt-old": {**OPT, "tie_word_embeddings": False, "eos_token_id": [1, 123, 47]},
    "t5": {**T5, "eos_token_id": [1, 89, 101]},
    "t5-tied": {
        **T5, "feed_forward_proj": "relu", "tie_word_embeddings": True, "eos_token_id": 212
    },
}  # fmt: skip


def save_small_checkpoint(folder: Path, kind: str) -> Path:
    config = blip2_config(kind.split("-")[0], VISION, QFORMER, TEXTS[kind], QUERIES)
    old = kind == "opt-old"
    return save_checkpoint(
        folder,
        config,
        shard_bytes=200_000,
        num_query_tokens=not old,
        padding_side="right" if old else "left",
    )
