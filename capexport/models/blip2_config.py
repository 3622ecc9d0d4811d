"""What the small files of a BLIP-2 checkpoint say: `config.json`, those of the image processor and
the tokenizer. What capexport cannot do exactly as Transformers does is refused here, by name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import (
    AddedToken,
    AutoTokenizer,
    Blip2Config,
    Blip2Processor,
    BlipImageProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from capexport.artifact import Decoding
from capexport.errors import CheckpointError, OptionError
from capexport.preprocessing import ImageSpec

CONFIG = "config.json"
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
ADAPTER = "adapter_config.json"
TRAINING = "training.json"  # of `python -m train.blip2`
# All that is read beside the weights.
SMALL_FILES = (
    CONFIG, *IMAGE_FILES, TOKENIZER_CONFIG, ADAPTER, TRAINING, "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model",
    "README.md", "model.safetensors.index.json", "custom_generate/generate.py",
)  # fmt: skip
# Settings of `generate()` on which its likeliest tokens do not depend.
_WITHOUT_EFFECT = {
    "_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "temperature",
    "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "use_cache",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "remove_invalid_values",
}  # fmt: skip
# Those that become the manifest's `decoding`.
_CARRIED = {
    "eos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "min_length",
    "min_new_tokens", "repetition_penalty", "suppress_tokens", "num_beams", "length_penalty",
    "early_stopping", "num_return_sequences", "no_repeat_ngram_size",
}  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and warnings of Transformers: what it would warn of is an error here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: `path` is not there, or holds no JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not there; copy it from where the model comes") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a file of Hugging Face: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: not a file of Hugging Face: no JSON object")
    return document


def read_config(folder: Path) -> Blip2Config:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: none there, or of a model that capexport does not export.
    """
    path = folder / CONFIG
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder / ADAPTER}: an adapter (LoRA), not a model; merge it first: "
            f'`model = PeftModel.from_pretrained(base_model, "{folder}").merge_and_unload()`, then '
            '`model.save_pretrained("merged")`, and export that'
        )
    document = read_json(path)
    _refuse_own_code(folder)
    _refuse_quantised(path, document)
    architectures = document.get("architectures") or ["Blip2ForConditionalGeneration"]
    known = {"Blip2ForConditionalGeneration", "Blip2Model"} & set(architectures)
    language = None
    if known and document.get("model_type", "blip-2") == "blip-2":
        try:
            config = Blip2Config.from_dict(document)
            language = config.text_config.model_type
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a file of Hugging Face: {error!r}") from error
    if language not in ("opt", "t5"):
        raise CheckpointError(
            f"{folder}: {architectures[0]} ({document.get('model_type')}, {language}); supported "
            "is Blip2ForConditionalGeneration with OPT or T5 as its language model, such as "
            "Salesforce/blip2-opt-2.7b and Salesforce/blip2-flan-t5-xl"
        )
    _check_text(path, config.text_config)
    return config


def _check_text(path: Path, text: Any) -> None:
    if text.model_type == "opt" and text.word_embed_proj_dim != text.hidden_size:
        raise CheckpointError(
            f"{path}: image features of {text.hidden_size} numbers, but tokens of "
            f"{text.word_embed_proj_dim} (word_embed_proj_dim); Transformers, too, mixes them up"
        )
    if text.bos_token_id is None:
        raise CheckpointError(
            f"{path}: text_config has no bos_token_id, so nothing begins a caption; set it (2 for "
            "OPT, 1 for Flan-T5)"
        )
    for name in ("bos_token_id", "decoder_start_token_id"):
        token = getattr(text, name, None)
        if token is not None and (not isinstance(token, int) or not 0 <= token < text.vocab_size):
            raise CheckpointError(
                f"{path}: {name} {token} of text_config is none of its {text.vocab_size} tokens"
            )


def _refuse_own_code(folder: Path) -> None:
    for name in (CONFIG, *IMAGE_FILES, TOKENIZER_CONFIG):
        path = folder / name
        if path.is_file() and any(key == "auto_map" for key, _ in _entries(read_json(path))):
            raise CheckpointError(
                f"{path}: wants code of its own to be run (auto_map), which capexport never does; "
                "where Transformers' own classes do, remove auto_map"
            )
    if (path := folder / "custom_generate" / "generate.py").is_file():
        raise CheckpointError(
            f"{path}: wants code of its own to be run, which capexport never does; where "
            "Transformers' generate() does, remove it"
        )


def _entries(document: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of a JSON document, at every depth."""
    if isinstance(document, dict):
        yield from document.items()
    if isinstance(document, dict | list):
        for value in document.values() if isinstance(document, dict) else document:
            yield from _entries(value)


def quantised(where: Path, method: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: quantised by {method}, which capexport does not read; export the float "
        "checkpoint that it was made of (--precision int8 or int4 quantises)"
    )


def _refuse_quantised(path: Path, document: dict[str, Any]) -> None:
    for key, value in _entries(document):
        if key == "quantization_config" and value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            if method is None and any(str(name).startswith("load_in_") for name in value):
                method = "bitsandbytes"
            raise quantised(path, str(method or "an unnamed method"))


def decoding_defaults(folder: Path, config: Blip2Config) -> Decoding:
    """`DecodingOptions` as `generate()` would take them from `text_config`, which alone counts.

    Raises:
        CheckpointError: a setting that capexport cannot keep, by name.
    """
    path, text = folder / CONFIG, config.text_config
    try:
        settings = GenerationConfig.from_model_config(text)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: text_config: {error}") from error
    unusual = set(settings.to_diff_dict()) - _WITHOUT_EFFECT
    # A decoder alone counts the image's places and the prompt, which differ from call to call.
    alone = not text.is_encoder_decoder
    if alone and settings.max_new_tokens is None and settings.max_length != 20:
        raise _refused(path, ["max_length"], "which counts image and prompt; set max_new_tokens")
    image_and_start = config.num_query_tokens + 1
    if alone and settings.min_new_tokens is None and settings.min_length > image_and_start:
        raise _refused(path, ["min_length"], "which counts image and prompt; set min_new_tokens")
    if settings.num_beams == 1:
        unusual.discard("renormalize_logits")  # which changes the sums of beams alone
    if others := sorted(unusual - _CARRIED):
        raise _refused(path, others, "which a captioner cannot keep; remove it")
    longest = settings.max_new_tokens
    if longest is None:  # 20 is a default, and then means new tokens
        longest = settings.max_length - (0 if settings.max_length == 20 else 1)
    shortest = settings.min_new_tokens
    if shortest is None:
        shortest = 0 if alone else max(settings.min_length - 1, 0)
    ends = [] if settings.eos_token_id is None else settings.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends)
    if longest < 1:
        raise _refused(path, ["max_length"], "which leaves room for no token")
    try:
        return Decoding(
            # An id outside the vocabulary, such as -1, means that nothing ends a caption.
            end_tokens=tuple(token for token in ends if 0 <= token < text.vocab_size),
            max_tokens=longest,
            min_tokens=min(shortest, longest),
            repetition_penalty=settings.repetition_penalty,
            suppress_tokens=tuple(settings.suppress_tokens or ()),
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            early_stopping=settings.early_stopping,
            num_return_sequences=settings.num_return_sequences,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
        )
    except OptionError as error:
        raise CheckpointError(f"{path}: text_config: {error}") from error


def _refused(path: Path, names: list[str], why: str) -> CheckpointError:
    return CheckpointError(f"{path}: text_config sets {', '.join(names)}, {why}")


def read_processor(folder: Path, config: Blip2Config) -> tuple[Blip2Processor, list[str]]:
    """The checkpoint's processor, and in words what its files leave open: its slow image processor,
    which rounds as Pillow does, and its tokenizer with the image token, padding on the side that
    the language model needs. A `config` without image_token_index gets it here.

    Raises:
        CheckpointError: it is missing, or does not belong to the model.
    """
    images = _read_images(folder)
    tokenizer = _read_tokenizer(folder)
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder}: no tokenizer.json, nor files that can become one")
    if tokenizer.pad_token is None:
        raise CheckpointError(
            f"{folder / TOKENIZER_CONFIG}: no pad_token, which prompts of a batch need; set one"
        )
    said = _said_queries(folder)
    if said not in (None, config.num_query_tokens):
        raise CheckpointError(
            f"{folder}: the processor puts {said} image tokens before a prompt (num_query_tokens), "
            f"but the model takes {config.num_query_tokens}: this is another model's processor"
        )
    # What pads behind a prompt would stand between it and the caption of a decoder alone.
    tokenizer.padding_side = "right" if config.text_config.is_encoder_decoder else "left"
    # Processors of old checkpoints don't know how many queries there are.
    processor = Blip2Processor(images, tokenizer, config.num_query_tokens)
    if isinstance(processor.image_token, str):  # the tokenizer's own, and Transformers wants it so
        processor.image_token = AddedToken(processor.image_token, normalized=False, special=True)
    return processor, _settle_image_token(folder, config, processor)


def _read_images(folder: Path) -> BlipImageProcessor:
    """Transformers would take the defaults of another model where the file is missing."""
    path = folder / IMAGE_FILES[0]
    if not path.is_file():
        nested = folder / IMAGE_FILES[1]
        if not nested.is_file() or "image_processor" not in read_json(nested):
            raise CheckpointError(
                f"{path}: not there, and it says how images are prepared; copy it from where the "
                "model comes"
            )
    try:
        return BlipImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # Transformers raises many kinds
        raise CheckpointError(f"{path}: no image processor: {first_line(error)}") from error


def _read_tokenizer(folder: Path) -> Any:
    path = folder / TOKENIZER_CONFIG
    settings = read_json(path) if path.is_file() else {}
    changes: dict[str, Any] = {}
    if isinstance(extra := settings.get("extra_special_tokens"), list):  # as Transformers 5 saves
        changes = {"extra_special_tokens": {}, "additional_special_tokens": extra}
    try:
        if settings.get("tokenizer_class") == "TokenizersBackend":  # Transformers 5, too
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **changes)
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **changes
        )
    except Exception as error:  # Transformers and tokenizers raise many kinds, some bare
        if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{folder / 'spiece.model'}: cannot become a tokenizer.json "
                f"({first_line(error)}); `pip install sentencepiece protobuf` reads it"
            ) from error
        raise CheckpointError(
            f"{folder}: no tokenizer can be loaded: {first_line(error)}; copy tokenizer.json and "
            f"{TOKENIZER_CONFIG} from where the model comes"
        ) from error


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _said_queries(folder: Path) -> Any:
    path = folder / IMAGE_FILES[1]
    return read_json(path).get("num_query_tokens") if path.is_file() else None


def _settle_image_token(folder: Path, config: Blip2Config, processor: Blip2Processor) -> list[str]:
    tokenizer, size = processor.tokenizer, config.text_config.vocab_size
    name = processor.image_token.content
    token = tokenizer.convert_tokens_to_ids(name)
    if config.image_token_index is None and len(tokenizer) <= size:
        # As Transformers' guide to checkpoints from before image tokens does.
        config.image_token_index = token
        return [f"image_token_index: {token}, the id of {name}, since {CONFIG} has none"]
    if config.image_token_index is None:
        raise CheckpointError(
            f"{folder / CONFIG}: no image_token_index, and no room for {name} among the "
            f"{size} tokens of the model; make some: `model.resize_token_embeddings("
            f"{len(tokenizer)}, pad_to_multiple_of=64)`, `model.config.image_token_index = "
            f"{token}`, and save model and processor"
        )
    if token != config.image_token_index or len(tokenizer) > size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, {name} as number {token}, but "
            f"the model {size}, {name} as number {config.image_token_index} (image_token_index): "
            "this is another model's tokenizer"
        )
    return []


def image_spec(folder: Path, config: Blip2Config, images: BlipImageProcessor) -> ImageSpec:
    """What `images` does to a photo; scale and mean are folded into `mean` and `std` of one scaled
    to 0..1.

    Raises:
        CheckpointError: it does what `ImageSpec` cannot say, or makes images of another size.
    """
    path = next(path for name in IMAGE_FILES if (path := folder / name).is_file())
    edge, size = config.vision_config.image_size, images.size
    if dict(size) != {"height": edge, "width": edge}:
        raise CheckpointError(
            f"{path}: images of {dict(size)}, but the model takes {edge} x {edge}; set size"
        )
    if not images.do_resize:
        raise CheckpointError(f"{path}: do_resize is off, but photos come in all sizes; set it")
    try:
        resample = Image.Resampling(images.resample).name.lower()
    except ValueError as error:
        raise CheckpointError(f"{path}: resample: {error}; set 2 or 3") from error
    if resample not in ("bilinear", "bicubic"):
        raise CheckpointError(
            f"{path}: resample {images.resample} ({resample}); supported are 2 (bilinear) and 3 "
            "(bicubic)"
        )
    try:
        scale = 255.0 * (images.rescale_factor if images.do_rescale else 1)
        scale = 1.0 if math.isclose(scale, 1) else scale
        normalises = images.do_normalize
        mean = _per_channel(images.image_mean if normalises else 0, scale)
        std = _per_channel(images.image_std if normalises else 1, scale)
        return ImageSpec(edge, edge, mean, std, keep_aspect=False, resample=resample)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path}: rescale_factor {images.rescale_factor}, image_mean {images.image_mean}, "
            f"image_std {images.image_std}: {error}"
        ) from error


def _per_channel(value: Any, scale: float) -> tuple[float, float, float]:
    red, green, blue = [value] * 3 if isinstance(value, int | float) else value
    return red / scale, green / scale, blue / scale
