"""`capexport blip2`: a BLIP-2 checkpoint to ONNX, part by part, through Optimum's exporter."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from huggingface_hub import ModelCard
from optimum.exporters.onnx import convert, onnx_export_from_model
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Blip2Config, Blip2Processor

from capexport.artifact import (
    CaptionParity,
    Decoding,
    Manifest,
    Parity,
    PromptSpec,
    Provenance,
)
from capexport.errors import ParityError
from capexport.export.blip2_parts import PartConfig, Plan, plan_parts
from capexport.export.draft import Draft, draft_artifact
from capexport.export.fusion import fused_modules
from capexport.export.graph import OPSET, versions
from capexport.export.parity import IMAGES, relative_error, seeded_images, token_agreement
from capexport.export.quantize import quantize_graph
from capexport.models.blip2 import (
    HuggingFaceCaptioner,
    Weights,
    meta_model,
    read_config,
    read_processor,
)
from capexport.preprocessing import ImageSource, ImageSpec, image_name
from capexport.sessions import CPU, Graph, Target

log = logging.getLogger("capexport")

# Largest error of an output against PyTorch in float32 (`relative_error`). Unrelated numbers would
# err by 1.4, zeros by 1; the random weights of tests lose more in 4 bits than trained ones.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.2, "int4": 0.7}
# Batch, sequence and past lengths that parity is checked at: none is what was traced.
SHAPES = ((1, 5, 0), (3, 1, 4), (2, 9, 2))
_PROMPTS = ("a photo of", "Question: what is in the picture? Answer:")
MAX_TOKENS = 20  # the default of `generate()`
# Optimum's validation copies the weights: it is done where they have fewer bytes than this.
_VALIDATED = 10**9


@contextlib.contextmanager
def export_patches() -> Iterator[None]:
    """What must be otherwise while Optimum exports, and is as before afterwards."""
    export = torch.onnx.export

    def export_by_dynamo(model: nn.Module, args: Any, f: str, **options: Any) -> None:
        [inputs] = args
        axes, free = options["dynamic_axes"], torch.export.Dim.DYNAMIC
        dynamic = {
            name: dict.fromkeys(axes[name], free)
            if isinstance(value, Tensor)
            else tree_map(lambda _: {0: free, 2: free}, value)  # the cache
            for name, value in inputs.items()
        }
        with fused_modules():
            export(
                model, (), f, kwargs=inputs, input_names=options["input_names"],
                output_names=options["output_names"], opset_version=options["opset_version"],
                dynamic_shapes=dynamic, dynamo=True, external_data=True, verbose=False,
            )  # fmt: skip

    with (
        # Optimum asks for the TorchScript exporter, which holds the weights two to four times.
        mock.patch.object(torch.onnx, "export", export_by_dynamo),
        # Optimum would read all external data into memory, and delete the file it has written.
        mock.patch.object(convert, "check_model_uses_external_data", lambda model: False),
        # It would look for a tokenizer and the like, and copy them.
        mock.patch.object(convert, "maybe_save_preprocessors", lambda *_, **__: None),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def export_blip2(
    folder: Path,
    out: Path,
    precision: str = "fp32",
    *,
    source: Mapping[str, Any] | None = None,
    photos: Sequence[ImageSource] = (),
) -> Manifest:
    """Export the checkpoint in `folder` to the new folder `out`, where it appears only if parity
    holds.

    Args:
        precision: "fp32", "fp16", or "int8" and "int4" for matrices of so many bits.
        source: what the manifest says of where the checkpoint comes from.
        photos: what captions are compared on, 16 at most; seeded colour fields by default.
    Raises:
        CheckpointError: a checkpoint that is damaged, or of another kind.
        OutputExistsError: `out` is there already.
        ParityError: the graphs do not reproduce the model.
    """
    CPU.require_provider()  # parity needs it, at the very end
    config = read_config(folder)
    processor = read_processor(folder, config)
    with draft_artifact(out) as draft:
        scratch = draft.folder / "scratch"
        scratch.mkdir()
        weights = Weights(folder, scratch)
        plans = plan_parts(config, precision)
        errors = {}
        for number, plan in enumerate(plans, 1):
            title = f"[{number}/{len(plans)}] {plan.name}.onnx"
            errors[f"{plan.name}.onnx"] = _export_part(
                config, weights, plan, precision, draft.folder, title
            )
        (draft.folder / "tokenizer.json").write_text(
            processor.tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8"
        )
        provenance = Provenance(
            **(source or {"source": folder.name}),
            licence=_licence(folder),
            checkpoint_sha256=weights.sha256(),
            opset=OPSET,
            exporter="optimum.exporters.onnx over torch.onnx.export(dynamo=True)",
            versions=versions("transformers", "optimum", "optimum-onnx"),
        )
        draft.manifest = _manifest(config, processor, plans, precision, provenance)
        log.info("comparing captions with generate()")
        shutil.rmtree(scratch)
        scratch.mkdir()
        captions = _compare_captions(config, processor, weights, draft, photos)
        shutil.rmtree(scratch)
        parity = Parity(
            inputs="photos" if photos else "seeded images",
            tolerance=TOLERANCES[precision],
            relative_error=errors,
            captions=captions,
        )
        draft.manifest = dataclasses.replace(draft.manifest, parity=parity)
    return draft.manifest


def _export_part(
    config: Blip2Config, weights: Weights, plan: Plan, precision: str, draft: Path, title: str
) -> float:
    """Export one graph into `draft` and compare it with PyTorch in float32."""
    part, size = _filled(config, weights, plan, plan.dtype)
    log.info("%s: %.1f MB of weights", title, size / 1e6)
    part_config = plan.configure(part)
    name = f"{plan.name}.onnx"
    scratch = draft / "scratch"
    with export_patches():
        onnx_export_from_model(
            meta_model(config), scratch, task="feature-extraction", opset=OPSET,
            custom_onnx_configs={plan.name: part_config},
            fn_get_submodels=lambda _: {plan.name: part},
            atol=TOLERANCES[precision] * 10, do_validation=size < _VALIDATED, no_post_process=True,
        )  # fmt: skip
    if precision.startswith("int") and plan.name != "embed_tokens":
        # The image part is computed once, and what it loses every word loses: 8 bits at least.
        bits = 8 if plan.name == "vision_encoder" else int(precision[3:])
        quantize_graph(scratch / name, draft / name, bits)
        (scratch / f"{name}.data").unlink()
    else:
        for file in (name, f"{name}.data"):
            (scratch / file).replace(draft / file)
    if plan.dtype != torch.float32:
        part, _ = _filled(config, weights, plan, torch.float32)
    graph = _target(precision).open(draft / name, mapped=True)
    return max(
        _compare(name, part, part_config, graph, TOLERANCES[precision], *shape) for shape in SHAPES
    )


def _filled(
    config: Blip2Config, weights: Weights, plan: Plan, dtype: torch.dtype
) -> tuple[nn.Module, int]:
    part = plan.build(meta_model(config)).eval()
    size = weights.fill(part, dtype)
    unfilled = [name for name, buffer in part.named_buffers() if buffer.is_meta]
    if unfilled:
        raise NotImplementedError(f"{plan.name}: buffers without values: {unfilled}")
    return part, size


def _compare(
    name: str, part: nn.Module, config: PartConfig, graph: Graph, tolerance: float, *shape: int
) -> float:
    """The largest `relative_error` of an output."""
    inputs = config.examples(*shape)
    feeds = {}
    for key, value in inputs.items():
        tensors = {key: value} if isinstance(value, Tensor) else config.flatten(value)
        feeds.update({key: tensor.numpy() for key, tensor in tensors.items()})
    inputs = tree_map(lambda x: x.float() if x.is_floating_point() else x, inputs)
    with config.patch_model_for_export(part):
        expected = part(**inputs)
    worst = 0.0
    results = graph.run(feeds, expected)
    for key, wanted in expected.items():
        got = results[key]
        if tuple(wanted.shape) != got.shape:
            raise ParityError(f"{name}: {key} is {got.shape}, PyTorch's {tuple(wanted.shape)}")
        error = relative_error(wanted.numpy(), got)
        worst = max(worst, error)
        if not error <= tolerance:  # also true of NaN
            raise ParityError(
                f"{name}: {key} differs from PyTorch by {error:.2g} of its size (at most "
                f"{tolerance:g}), at batch, length and past {shape}"
            )
    return worst


def _compare_captions(
    config: Blip2Config,
    processor: Blip2Processor,
    weights: Weights,
    draft: Draft,
    photos: Sequence[ImageSource],
) -> CaptionParity:
    """Captions and answers of the artifact against those of `generate()` in float32.

    Raises:
        ParityError: in fp32 a token differs; otherwise, logits do by more than the tolerance.
    """
    precision = draft.manifest.precision
    images = list(photos[:IMAGES]) or seeded_images(4)
    prompts = list(itertools.islice(itertools.cycle(_PROMPTS), len(images)))
    model = meta_model(config)
    weights.fill(model, torch.float32)
    reference = HuggingFaceCaptioner(model, processor)
    wanted, wanted_logits = [], []
    for prompt in (None, prompts):
        wanted += reference.caption(images, prompt=prompt)
        wanted_logits.append(reference.first_logits)
    exported = draft.captioner(_target(precision))
    got, got_logits = [], []
    for prompt in (None, prompts):
        got += exported.caption(images, prompt=prompt)
        pixels = np.stack([exported.preprocess(image) for image in images])
        framed = exported.text.frame(prompt and prompts, len(images), 1)
        got_logits.append(exported.decoder.start(exported.encoder(pixels), framed)[0])
    expected, actual = np.concatenate(wanted_logits), np.concatenate(got_logits)
    error = relative_error(expected, actual)
    tolerance = min(2 * TOLERANCES[precision], 1)  # all graphs' errors meet in them
    if not error <= tolerance:
        raise ParityError(
            f"logits differ from PyTorch's by {error:.2g} of their size (at most {tolerance:g})"
        )
    same = [a.tokens == b.tokens for a, b in zip(wanted, got, strict=True)]
    if precision == "fp32" and not all(same):
        index = same.index(False)
        raise ParityError(
            f"{image_name(images[index % len(images)])}: captioned {got[index].text!r}, but by "
            f"PyTorch {wanted[index].text!r}"
        )
    return CaptionParity(
        compared=len(same),
        identical=sum(same),
        distinct=len({caption.tokens for caption in wanted}),
        token_agreement=token_agreement(wanted, got),
        logit_error=error,
    )


def _target(precision: str) -> Target:
    """A CPU, without the memory for float16 weights in float32."""
    return dataclasses.replace(CPU, folded=precision != "fp16")


def _manifest(
    config: Blip2Config,
    processor: Blip2Processor,
    plans: Sequence[Plan],
    precision: str,
    provenance: Provenance,
) -> Manifest:
    return Manifest(
        family="blip2",
        precision=precision,
        image=_image_spec(processor),
        decoding=Decoding(
            end_tokens=tuple(np.atleast_1d(config.text_config.eos_token_id).tolist()),
            max_tokens=MAX_TOKENS,
        ),
        state=_wiring(config, plans),
        files={},
        provenance=provenance,
        prompt=_prompt_spec(config, processor),
    )


def _wiring(config: Blip2Config, plans: Sequence[Plan]) -> dict[str, str]:
    """Each key and value input of the decoder, and the output that holds its next value."""
    plan = plans[-1]
    names = plan.configure(plan.build(meta_model(config))).outputs
    return {name.replace("present", "past_key_values"): name for name in names if name != "logits"}


def _image_spec(processor: Blip2Processor) -> ImageSpec:
    images = processor.image_processor
    edge = images.size["height"]
    resample = Image.Resampling(images.resample).name.lower()
    mean, std = tuple(images.image_mean), tuple(images.image_std)
    return ImageSpec(edge, edge, mean, std, keep_aspect=False, resample=resample)


def _prompt_spec(config: Blip2Config, processor: Blip2Processor) -> PromptSpec:
    text, tokenizer = config.text_config, processor.tokenizer
    return PromptSpec(
        image_token=config.image_token_index,
        query_tokens=config.num_query_tokens,
        bos_token=text.bos_token_id,
        pad_token=tokenizer.pad_token_id,
        start_token=text.decoder_start_token_id if text.is_encoder_decoder else None,
        # T5 counts distances, not positions.
        max_positions=None if text.is_encoder_decoder else text.max_position_embeddings,
        clean_up_spaces=tokenizer.clean_up_tokenization_spaces,
    )


def _licence(folder: Path) -> str | None:
    """What the checkpoint's model card says."""
    card = folder / "README.md"
    return ModelCard.load(card).data.license if card.is_file() else None
