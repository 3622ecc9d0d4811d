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
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import torch
from optimum.exporters.onnx import convert, onnx_export_from_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Blip2Config

from capexport.artifact import CaptionParity, Manifest, Parity, PromptSpec, Provenance
from capexport.captioner import Captioner
from capexport.errors import ParityError
from capexport.export.blip2_parts import PartConfig, Plan, plan_parts
from capexport.export.draft import draft_artifact
from capexport.export.fusion import fused_modules, join_projections
from capexport.export.graph import OPSET, versions
from capexport.export.parity import (
    IMAGES,
    image_names,
    relative_error,
    scored,
    seeded_images,
    token_agreement,
)
from capexport.export.quantize import quantize_graph
from capexport.models.blip2 import HuggingFaceCaptioner, load_pretrained
from capexport.models.blip2_checkpoint import (
    Checkpoint,
    Weights,
    converted,
    licence_of,
    meta_model,
    read_checkpoint,
    training_of,
)
from capexport.models.blip2_config import quiet
from capexport.preprocessing import ImageSource
from capexport.sessions import CPU, Graph, Target

log = logging.getLogger("capexport")

# Largest error of an output against PyTorch in float32 (`relative_error`). Unrelated numbers would
# err by 1.4, zeros by 1; the random weights of tests lose more in 4 bits than trained ones.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.2, "int4": 0.7}
# Batch, sequence and past lengths that parity is checked at: none is what was traced.
SHAPES = ((1, 5, 0), (3, 1, 4), (2, 9, 2))
_PROMPTS = ("a photo of", "Question: what is in the picture? Answer:")
# Optimum's validation copies the weights: it is done where they have fewer bytes than this.
_VALIDATED = 10**9
YARDSTICK = "from_pretrained() and generate() of Transformers, in float32"
_ALONE = 4  # of the photos, so many are also captioned one by one
# PyTorch's, and the artifact's.
Captioners: TypeAlias = tuple[HuggingFaceCaptioner, Captioner]


@contextlib.contextmanager
def export_patches() -> Iterator[None]:
    """Patches of PyTorch and Optimum that hold while Optimum exports."""
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


@quiet()
def export_blip2(
    folder: Path,
    out: Path,
    precision: str = "fp32",
    *,
    source: Mapping[str, Any] | None = None,
    photos: Sequence[ImageSource] = (),
    references: Mapping[str, Sequence[str]] | None = None,
) -> Manifest:
    """Export the checkpoint in `folder` to the new folder `out`, where it appears only if parity
    holds.

    Args:
        precision: "fp32", "fp16", or "int8" and "int4" for matrices of so many bits.
        source: what the manifest says of where the checkpoint comes from.
        photos: what captions are compared on, 16 at most; seeded colour fields by default.
        references: human captions by the photos' file names: what the captions of all photos score
            is reported, PyTorch's in float32 and the artifact's.
    Raises:
        CheckpointError: a checkpoint that is damaged, or of another kind.
        OutputExistsError: `out` is there already.
        ParityError: the graphs do not reproduce the model.
        OptionError: photos without references.
        MissingExtraError: `references` without pycocoevalcap.
    """
    CPU.require_provider()  # parity needs it, at the very end
    names = image_names(photos, references)
    checkpoint = read_checkpoint(folder)
    for assumption in checkpoint.assumed:
        log.info("%s: %s", folder.name, assumption)
    config = checkpoint.config
    with draft_artifact(out) as draft:
        scratch = draft.folder / "scratch"
        scratch.mkdir()
        weights = Weights(folder, scratch)
        compare_weights(checkpoint, weights)
        plans = plan_parts(config, precision)
        errors = _export_parts(config, weights, plans, precision, draft.folder)
        (draft.folder / "tokenizer.json").write_text(
            checkpoint.processor.tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8"
        )
        log.info("comparing captions with generate()")
        shutil.rmtree(scratch)
        scratch.mkdir()
        draft.manifest = _manifest(checkpoint, weights, plans, precision, source)
        captioners: Captioners = (
            _in_float32(checkpoint, weights, scratch),
            draft.captioner(_target(precision)),
        )
        captioners[1].full_size = True  # as the processor has them
        parity = Parity(
            yardstick=YARDSTICK,
            tolerance=TOLERANCES[precision],
            relative_error=errors,
            inputs="photos" if photos else "seeded images",
            captions=_compare_captions(*captioners, precision, photos),
            metrics=_metrics(captioners, precision, photos, names, references),
        )
        shutil.rmtree(scratch)
        draft.manifest = dataclasses.replace(draft.manifest, parity=parity)
    return draft.manifest


def _manifest(
    checkpoint: Checkpoint,
    weights: Weights,
    plans: Sequence[Plan],
    precision: str,
    source: Mapping[str, Any] | None,
) -> Manifest:
    """The manifest of a draft, before its files and its parity are known."""
    return Manifest(
        family="blip2",
        precision=precision,
        image=checkpoint.image,
        decoding=checkpoint.decoding,
        state=_wiring(checkpoint.config, plans),
        files={},
        provenance=Provenance(
            **(source or {"source": checkpoint.folder.name}),
            licence=licence_of(checkpoint.folder),
            training=training_of(checkpoint.folder),
            checkpoint_sha256=weights.sha256(),
            assumed=checkpoint.assumed,
            opset=OPSET,
            exporter="optimum.exporters.onnx over torch.onnx.export(dynamo=True)",
            versions=versions("transformers", "optimum", "optimum-onnx"),
        ),
        prompt=_prompt_spec(checkpoint),
    )


def compare_weights(checkpoint: Checkpoint, weights: Weights) -> None:
    """Every parameter as `weights` finds it against what Transformers loads by itself.

    Raises:
        ParityError: one differs.
    """
    model = load_pretrained(checkpoint, weights.dtype())
    names = {id(p): list[str]() for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for parameter in model.parameters():
        name, tensor = weights.stored(names[id(parameter)])
        if parameter.is_meta or not _same(tensor.to(parameter.dtype), parameter):
            raise ParityError(
                f"{checkpoint.folder}: what Transformers loads as {name} is not what the files "
                "have under that name; load the model, see that it is right, and save it again"
            )


def _export_parts(
    config: Blip2Config, weights: Weights, plans: Sequence[Plan], precision: str, draft: Path
) -> dict[str, float]:
    """Export all graphs into `draft`; return the error of each."""
    errors = {}
    for number, plan in enumerate(plans, 1):
        name = f"{plan.name}.onnx"
        title = f"[{number}/{len(plans)}] {name}"
        errors[name] = _export_part(config, weights, plan, precision, draft, title)
    return errors


def _export_part(
    config: Blip2Config, weights: Weights, plan: Plan, precision: str, draft: Path, title: str
) -> float:
    """Export one graph into `draft` and compare it with PyTorch in float32."""
    part, size = _filled(config, weights, plan, plan.dtype)
    log.info("%s: %.1f MB of weights", title, size / 1e6)
    part_config = plan.configure(part)
    quantised = precision.startswith("int") and plan.name != "embed_tokens"
    # On CPUs, which int8 and int4 are for, onnxruntime's fused norm is several times slower.
    part_config.fused_norms = not quantised
    name = f"{plan.name}.onnx"
    scratch = draft / "scratch"
    join_projections(part, scratch)
    with export_patches():
        onnx_export_from_model(
            meta_model(config), scratch, task="feature-extraction", opset=OPSET,
            custom_onnx_configs={plan.name: part_config},
            fn_get_submodels=lambda _: {plan.name: part},
            atol=TOLERANCES[precision] * 10, do_validation=size < _VALIDATED, no_post_process=True,
        )  # fmt: skip
    if quantised:
        # The image part is computed once, and what it loses every word loses: 8 bits at least.
        image = plan.name == "vision_encoder"
        bits = 8 if image else int(precision[3:])
        quantize_graph(scratch / name, draft / name, bits, many_rows=image)
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


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit: NaN is equal to itself."""
    bits = {2: torch.int16, 4: torch.int32}[b.element_size()]
    return a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))


def _metrics(
    captioners: Captioners,
    precision: str,
    photos: Sequence[ImageSource],
    names: Sequence[str],
    references: Mapping[str, Sequence[str]] | None,
) -> dict[str, dict[str, float | str]] | None:
    if not references or not photos:
        return None
    captions = [each.caption(photos, batch_size=8) for each in captioners]
    return {
        name: scored(names, said, references)
        for name, said in zip(("PyTorch", precision), captions, strict=True)
    }


def _compare_captions(
    pytorch: HuggingFaceCaptioner,
    exported: Captioner,
    precision: str,
    photos: Sequence[ImageSource],
) -> CaptionParity:
    """Captions and answers of the artifact, in batches, against those of `generate()` in float32,
    in batches and of each image alone.

    Raises:
        ParityError: in fp32 a token differs; otherwise, logits do by more than the tolerance.
    """
    images = list(photos[:IMAGES]) or seeded_images(4)
    prompts = list(itertools.islice(itertools.cycle(_PROMPTS), len(images)))
    wanted, got, wanted_logits, got_logits = [], [], [], []
    for prompt in (None, prompts):
        together = pytorch.caption(images, prompt=prompt)
        wanted_logits.append(pytorch.first_logits)
        captions = exported.caption(images, prompt=prompt)
        wanted += pytorch.caption(images[:_ALONE], prompt=prompt, batch_size=1)
        got += captions[:_ALONE]
        # generate() counts the padding of a batch's prompts as said; ours doesn't.
        options = exported.options
        if prompt is None or (options.repetition_penalty == 1 and not options.no_repeat_ngram_size):
            wanted += together
            got += captions
        pixels = np.stack([exported.preprocess(image) for image in images])
        framed = exported.text.frame(prompt, len(images), 1)
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
            f"captioned {got[index].text!r}, but by PyTorch {wanted[index].text!r}: the same photo "
            "and prompt"
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


def _in_float32(checkpoint: Checkpoint, weights: Weights, scratch: Path) -> HuggingFaceCaptioner:
    """Transformers' model in float32; a large one is widened into mapped files."""
    model = load_pretrained(checkpoint, weights.dtype())
    if sum(parameter.numel() for parameter in model.parameters()) * 4 < _VALIDATED:
        model.float()
    for number, parameter in enumerate(model.parameters()):
        if parameter.dtype != torch.float32:
            parameter.data = converted(parameter.data, torch.float32, scratch / f"{number}")
    return HuggingFaceCaptioner(model, checkpoint.processor)


def _wiring(config: Blip2Config, plans: Sequence[Plan]) -> dict[str, str]:
    """Each key and value input of the decoder, and the output that holds its next value."""
    plan = plans[-1]
    names = plan.configure(plan.build(meta_model(config))).outputs
    return {name.replace("present", "past_key_values"): name for name in names if name != "logits"}


def _prompt_spec(checkpoint: Checkpoint) -> PromptSpec:
    config, tokenizer = checkpoint.config, checkpoint.processor.tokenizer
    text, start = config.text_config, None
    if text.is_encoder_decoder:
        start = text.decoder_start_token_id
        start = text.bos_token_id if start is None else start  # as generate() does
    return PromptSpec(
        image_token=config.image_token_index,
        query_tokens=config.num_query_tokens,
        bos_token=text.bos_token_id,
        pad_token=tokenizer.pad_token_id,
        start_token=start,
        # T5 counts distances, not positions.
        max_positions=None if text.is_encoder_decoder else text.max_position_embeddings,
        clean_up_spaces=tokenizer.clean_up_tokenization_spaces,
    )
