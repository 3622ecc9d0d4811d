"""BLIP-2 (Li et al. 2023) in PyTorch: Hugging Face's checkpoints, mapped part by part, and
`generate()` behind the interface of a captioner, the yardstick of every export."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
)

from capexport.artifact import is_hub_id, sha256_of
from capexport.captioner import Caption, Timing
from capexport.errors import CheckpointError, DownloadError
from capexport.preprocessing import ImageSource, load_image

# What Transformers, too, keeps in float32 when it loads half precision (`_keep_in_fp32_modules`).
# Without it the Q-Former loses its small differences, and T5's feed-forward layers overflow.
FP32_MODULES = ("query_tokens", "qformer.", ".wo.")


def find_checkpoint(model: str, revision: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder of a checkpoint, downloaded from the Hugging Face hub if `model` is an id, and
    where it comes from.

    Raises:
        CheckpointError: it is of a kind that capexport does not export.
        DownloadError: it is neither here, nor in the cache, nor to be had.
    """
    if Path(model).is_dir():
        read_config(Path(model))
        return Path(model), {"source": Path(model).resolve().name}
    if not is_hub_id(model):
        raise CheckpointError(f"{model}: no such folder, nor an id of the Hugging Face hub")
    try:
        # The small file first: it tells whether the large ones are worth it.
        read_config(Path(hf_hub_download(model, "config.json", revision=revision)).parent)
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md"]
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DownloadError(
            f"{model}: cannot be downloaded, and is not in the cache ({reason}): connect to the "
            "network once, or pass a folder with a copy"
        ) from error
    return folder, {"source": model, "revision": folder.name}


def read_config(folder: Path) -> Blip2Config:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: none there, or of a model that capexport does not export.
    """
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        architecture = document["architectures"][0]
        config = Blip2Config.from_dict(document)
        language = config.text_config.model_type
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of Hugging Face: {error!r}") from error
    if architecture != "Blip2ForConditionalGeneration" or language not in ("opt", "t5"):
        raise CheckpointError(
            f"{folder}: {architecture} ({document.get('model_type')}); supported is "
            "Blip2ForConditionalGeneration with OPT or T5 as its language model, such as "
            "Salesforce/blip2-opt-2.7b and Salesforce/blip2-flan-t5-xl"
        )
    if config.text_config.bos_token_id is None:
        raise CheckpointError(f"{path}: without a bos_token_id, nothing begins a caption")
    return config


def read_processor(folder: Path, config: Blip2Config) -> Blip2Processor:
    """The checkpoint's processor: its slow image processor, which rounds as Pillow does, and its
    tokenizer with the image token.

    Raises:
        CheckpointError: it is missing, or does not belong to the model.
    """
    try:
        images = BlipImageProcessor.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # Processors of old checkpoints don't know how many queries there are.
        processor = Blip2Processor(images, tokenizer, config.num_query_tokens)
    except Exception as error:  # Transformers and tokenizers raise many kinds, some bare
        raise CheckpointError(f"{folder}: no processor can be loaded: {error}") from error
    # Where padding changes nothing; most tokenizers say "right", whatever the model needs.
    tokenizer.padding_side = "right" if config.text_config.is_encoder_decoder else "left"
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder}: no tokenizer.json, nor files that can become one")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    if image_token != config.image_token_index or len(tokenizer) > config.text_config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, <image> as number "
            f"{image_token}, but the model {config.text_config.vocab_size}, <image> as number "
            f"{config.image_token_index}: this is another model's tokenizer"
        )
    size = dict(images.size)
    edge = config.vision_config.image_size
    if size != {"height": edge, "width": edge}:
        raise CheckpointError(f"{folder}: images of {size}, but the model takes {edge} x {edge}")
    return processor


def meta_model(config: Blip2Config) -> Blip2ForConditionalGeneration:
    """The model without the memory of its weights; `Weights.fill` brings them."""
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config).eval()
    model.tie_weights()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # A tied weight has several names, of which a file may hold any.
        parameter.aliases = [*getattr(parameter, "aliases", ()), name]
    return model


class Weights:
    """The tensors of a checkpoint, left on the disk until they are used.

    Tensors of the wanted type are mapped from the safetensors files; others are converted one by
    one into a file in `scratch` and mapped from there. Neither counts as anonymous memory.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        self._scratch = scratch
        self._place: dict[str, Path] = {}
        if not self.files:
            raise CheckpointError(
                f"{folder}: no safetensors there; capexport reads no pickled weights"
            )
        for file in self.files:
            try:
                with safe_open(file, "pt") as stored:
                    self._place.update(dict.fromkeys(stored.keys(), file))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: damaged: {error}; download it again") from error

    def sha256(self) -> dict[str, str]:
        """Hash by file name."""
        return {file.name: sha256_of(file) for file in self.files}

    def fill(self, part: nn.Module, dtype: torch.dtype) -> int:
        """Give a `meta_model`, or a part of one, its weights, as `dtype`; those of `FP32_MODULES`
        as float32.

        Returns:
            Their bytes.
        Raises:
            CheckpointError: a tensor is missing or of another shape.
        """
        filled: dict[int, nn.Parameter] = {}
        for module in part.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in filled:
                    tensor = self._tensor(parameter, dtype)
                    filled[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
                module._parameters[leaf] = filled[id(parameter)]
        return sum(tensor.nbytes for tensor in filled.values())

    def _tensor(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        aliases: list[str] = parameter.aliases  # type: ignore[attr-defined]
        shape = parameter.shape
        name = next((name for name in aliases if name in self._place), None)
        if name is None:
            raise CheckpointError(f"{self.files[0].parent}: no weight {aliases[0]} there")
        with safe_open(self._place[name], "pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self._place[name]}: {name} is {list(tensor.shape)}, not {list(shape)}"
            )
        if any(module in f".{name}" for module in FP32_MODULES):
            dtype = torch.float32
        if tensor.dtype == dtype:
            return tensor
        file = self._scratch / f"{name}.{dtype}"
        mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=dtype)
        file.unlink()  # it lives on as long as the mapping
        return mapped.copy_(tensor.flatten()).view(shape)


class HuggingFaceCaptioner:
    """`Blip2ForConditionalGeneration.generate(do_sample=False)` as one would call it."""

    def __init__(
        self, model: Blip2ForConditionalGeneration, processor: Blip2Processor, device: str = "cpu"
    ) -> None:
        self.model = model.to(device).eval()
        self._processor = processor
        self._encoded = 0.0
        self.first_logits = np.zeros((0, 0), np.float32)  # of the last batch's first tokens
        # The image part is over when its last layer is.
        model.language_projection.register_forward_hook(self._stamp)

    @classmethod
    def load(
        cls, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> HuggingFaceCaptioner:
        """The checkpoint in `folder`, loaded by Transformers itself."""
        config = read_config(folder)
        model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return cls(model, read_processor(folder, config), device)

    def _stamp(self, *_: object) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self._encoded = time.perf_counter()

    def caption(
        self,
        images: Sequence[ImageSource],
        *,
        prompt: str | Sequence[str] | None = None,
        max_tokens: int = 20,
        batch_size: int = 32,
        **options: Any,
    ) -> list[Caption]:
        """As `Captioner.caption`, for a list of images; `options` go to `generate`."""
        captions: list[Caption] = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            prompts = prompt if prompt is None or isinstance(prompt, str) else prompt[part]
            captions += self._caption_batch(images[part], prompts, max_tokens, options)
        return captions

    def _caption_batch(
        self,
        images: Sequence[ImageSource],
        prompt: str | Sequence[str] | None,
        max_tokens: int,
        options: dict[str, Any],
    ) -> list[Caption]:
        began = time.perf_counter()
        photos = [load_image(image) for image in images]
        text = [prompt] * len(photos) if isinstance(prompt, str) else prompt
        inputs = self._processor(
            images=photos, text=None if text is None else list(text), padding=True,
            return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        preprocessed = time.perf_counter()
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_tokens,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        rows = output.sequences.cpu()
        done = time.perf_counter()
        timing = Timing(
            len(photos), preprocessed - began, self._encoded - preprocessed, done - self._encoded
        )
        self.first_logits = output.scores[0].float().cpu().numpy()
        logits = torch.stack(output.scores, 1).float().log_softmax(-1)
        tokens = rows[:, -logits.shape[1] :]
        chosen = logits.cpu().gather(2, tokens[:, :, None])[:, :, 0]
        ends = self.model.config.text_config.eos_token_id
        ends = torch.tensor(options.get("eos_token_id", ends)).flatten()
        captions = []
        for row, scores in zip(tokens, chosen, strict=True):
            [ended] = torch.isin(row, ends).nonzero(as_tuple=True)
            length = int(ended[0]) if len(ended) else len(row)
            said = row[:length].tolist()
            text = self._processor.tokenizer.decode(said, skip_special_tokens=True).strip()
            probability = float(scores[: length + 1].sum())
            captions.append(Caption(text, tuple(said), probability, timing))
        return captions
