"""BLIP-2 (Li et al. 2023) in PyTorch, as Transformers itself loads and runs it: `generate()` behind
the interface of a captioner, the yardstick of every export."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from capexport.captioner import Alternative, Caption, Timing
from capexport.errors import CheckpointError
from capexport.models.blip2_checkpoint import Checkpoint, read_checkpoint
from capexport.models.blip2_config import first_line, quiet
from capexport.preprocessing import ImageSource, load_image


@quiet()
def load_pretrained(checkpoint: Checkpoint, dtype: torch.dtype) -> Blip2ForConditionalGeneration:
    """What Transformers itself loads from the folder. Only if `checkpoint.assumed` names
    corrections is it given another configuration than the file's.

    Raises:
        CheckpointError: it cannot, or not all.
    """
    config = {"config": checkpoint.config} if checkpoint.assumed else {}
    try:
        model, loaded = Blip2ForConditionalGeneration.from_pretrained(
            checkpoint.folder, dtype=dtype, output_loading_info=True, trust_remote_code=False,
            local_files_only=True, use_safetensors=True, **config,
        )  # fmt: skip
    except Exception as error:  # Transformers raises many kinds
        raise CheckpointError(
            f"{checkpoint.folder}: Transformers cannot load it: {first_line(error)}"
        ) from error
    if missing := loaded["missing_keys"]:
        raise CheckpointError(f"{checkpoint.folder}: Transformers finds no {', '.join(missing)}")
    return model.eval()


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
        checkpoint = read_checkpoint(folder)
        return cls(load_pretrained(checkpoint, dtype), checkpoint.processor, device)

    def compile(self) -> None:
        """Run the vision model, the Q-Former and the language model through `torch.compile`."""
        for part in (self.model.vision_model, self.model.qformer, self.model.language_model):
            part.compile(dynamic=True)

    def _stamp(self, *_: object) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self._encoded = time.perf_counter()

    def caption(
        self,
        images: Sequence[ImageSource],
        *,
        prompt: str | Sequence[str] | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> list[Caption]:
        """As `Captioner.caption`, for a list of images. `options` go to `generate()`; so do its own
        defaults where `max_tokens` and `min_tokens` are None."""
        bounds = {"max_new_tokens": max_tokens, "min_new_tokens": min_tokens}
        options |= {name: bound for name, bound in bounds.items() if bound is not None}
        captions: list[Caption] = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            prompts = prompt if prompt is None or isinstance(prompt, str) else prompt[part]
            captions += self._caption_batch(images[part], prompts, options)
        return captions

    def _caption_batch(
        self,
        images: Sequence[ImageSource],
        prompt: str | Sequence[str] | None,
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
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **options,
        )
        output.sequences.cpu()  # which waits for a GPU
        done = time.perf_counter()
        timing = Timing(
            len(photos), preprocessed - began, self._encoded - preprocessed, done - self._encoded
        )
        beams = len(output.logits[0]) // len(photos)
        self.first_logits = output.logits[0][::beams].float().cpu().numpy()
        alternatives = self._alternatives(output, options, beams > 1)
        each = len(alternatives) // len(photos)
        groups = [alternatives[row : row + each] for row in range(0, len(alternatives), each)]
        return [
            Caption(group[0].text, group[0].tokens, group[0].log_probability, timing, tuple(group))
            for group in groups
        ]

    def _alternatives(
        self, output: Any, options: dict[str, Any], searched: bool
    ) -> list[Alternative]:
        """The rows that `generate()` returned."""
        chosen = self.model.language_model.compute_transition_scores(
            output.sequences, output.scores, output.beam_indices if searched else None,
            normalize_logits=not searched,
        ).cpu()  # fmt: skip
        tokens = output.sequences.cpu()[:, -chosen.shape[1] :]
        ends = options.get("eos_token_id", self.model.config.text_config.eos_token_id)
        ends = torch.tensor([] if ends is None else ends).flatten()
        alternatives = []
        for number, (row, scores) in enumerate(zip(tokens, chosen, strict=True)):
            [ended] = torch.isin(row, ends).nonzero(as_tuple=True)
            length = int(ended[0]) if len(ended) else len(row)
            said = row[:length].tolist()
            text = self._processor.tokenizer.decode(said, skip_special_tokens=True).strip()
            probability = float(scores[: length + 1].sum())
            score = float(output.sequences_scores[number]) if searched else probability
            alternatives.append(Alternative(text, tuple(said), probability, score))
        return alternatives
