"""`capexport blip2`: a BLIP-2 checkpoint to ONNX, part by part, through Optimum's exporter."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import onnx
import torch
from huggingface_hub import ModelCard
from optimum.exporters.onnx import OnnxConfig, convert, onnx_export_from_model
from optimum.utils import NormalizedConfig
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from capexport.artifact import Manifest, new_artifact, record_files
from capexport.captioner import Caption, Captioner
from capexport.errors import ParityError
from capexport.export.graph import OPSET, strip_traces, versions
from capexport.export.parity import IMAGES, seeded_images
from capexport.export.quantize import quantize_graph
from capexport.graphs import open_session, require_provider
from capexport.models.blip2 import (
    HuggingFaceCaptioner,
    Weights,
    meta_model,
    read_config,
    read_processor,
)
from capexport.preprocessing import ImageSource, ImageSpec, image_name
from capexport.vocabulary import PromptSpec, PromptTokenizer

log = logging.getLogger("capexport")

Axes: TypeAlias = dict[str, dict[int, str]]

PRECISIONS = ("fp32", "fp16", "int8", "int4")
# Largest error of an output against PyTorch in float32 (`relative_error`). Unrelated numbers would
# err by 1.4, zeros by 1; the random weights of tests lose more in 4 bits than trained ones.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.2, "int4": 0.7}
# Batch, sequence and past lengths that parity is checked at: none is what was traced.
SHAPES = ((1, 5, 0), (3, 1, 4), (2, 9, 2))
_PROMPTS = ("a photo of", "Question: what is in the picture? Answer:")
MAX_TOKENS = 20  # the default of `generate()`
# Optimum's validation copies the weights: it is done where they have fewer bytes than this.
_VALIDATED = 10**9


class VisionEncoder(nn.Module):
    """Pixels through vision transformer, Q-Former and projection to the language model's width."""

    def __init__(self, blip2: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.config = blip2.config.text_config
        self.vision_model = blip2.vision_model
        self.qformer = blip2.qformer
        self.query_tokens = blip2.query_tokens
        self.language_projection = blip2.language_projection
        self._get_image_features = type(blip2).get_image_features

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self._get_image_features(self, pixel_values)


class EmbedTokens(nn.Module):
    """Token ids to embeddings."""

    def __init__(self, blip2: Blip2ForConditionalGeneration, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = blip2.config.text_config
        self.embed_tokens = blip2.get_input_embeddings()
        self.dtype = dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids).to(self.dtype)


class OptDecoder(nn.Module):
    """OPT from embeddings to the logits of the last position.

    Positions are counted as `generate()` counts them (`prepare_inputs_for_generation`): over the
    unmasked tokens, and 1 for a masked one.
    """

    def __init__(self, blip2: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.config = blip2.config.text_config
        self.decoder = blip2.language_model.model.decoder
        self.lm_head = blip2.language_model.lm_head
        self.decoder.embed_tokens = None

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, past_key_values: DynamicCache
    ) -> tuple[Tensor, ...]:
        positions = (attention_mask.cumsum(1) - 1).masked_fill(attention_mask == 0, 1)
        output = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=positions[:, -inputs_embeds.shape[1] :],
            past_key_values=past_key_values,
            use_cache=True,
        )
        logits = self.lm_head(output.last_hidden_state[:, -1]).float()
        present = output.past_key_values.to_legacy_cache()
        return logits, *(tensor for layer in present for tensor in layer)


class T5Encoder(nn.Module):
    """T5's encoder, and the keys and values that its decoder's cross-attention takes from it."""

    def __init__(self, blip2: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.config = blip2.config.text_config
        self.encoder = blip2.language_model.encoder
        self.encoder.embed_tokens = None
        blocks = blip2.language_model.decoder.block
        attentions = [block.layer[1].EncDecAttention for block in blocks]
        self.keys = nn.ModuleList(attention.k for attention in attentions)
        self.values = nn.ModuleList(attention.v for attention in attentions)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        hidden = self.encoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask
        ).last_hidden_state
        heads = (*hidden.shape[:2], self.config.num_heads, self.config.d_kv)
        return tuple(
            projection(hidden).view(heads).transpose(1, 2)
            for layer in zip(self.keys, self.values, strict=True)
            for projection in layer
        )


class T5Decoder(nn.Module):
    """T5's decoder from embeddings to the logits of the last position."""

    def __init__(self, blip2: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.config = blip2.config.text_config
        self.decoder = blip2.language_model.decoder
        self.decoder.embed_tokens = None
        self.lm_head = blip2.language_model.lm_head
        for block in self.decoder.block:  # theirs are computed by T5Encoder
            block.layer[1].EncDecAttention.k = block.layer[1].EncDecAttention.v = None

    def forward(
        self,
        inputs_embeds: Tensor,
        encoder_attention_mask: Tensor,
        past_key_values: EncoderDecoderCache,
    ) -> tuple[Tensor, ...]:
        output = self.decoder(
            inputs_embeds=inputs_embeds,
            # Never read, since the cross-attention's keys are there; but it must not be None.
            encoder_hidden_states=past_key_values.cross_attention_cache.layers[0].keys[:, 0],
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, -1]
        if self.config.tie_word_embeddings:
            hidden = hidden * self.config.d_model**-0.5
        present = output.past_key_values.self_attention_cache.to_legacy_cache()
        return self.lm_head(hidden).float(), *(tensor for layer in present for tensor in layer)


class PartConfig(OnnxConfig):
    """What Optimum's exporter asks about a part: names, dynamic axes and example inputs."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    use_past = False  # Optimum sets `use_cache` of every submodule to it

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(part.config, float_dtype={torch.float16: "fp16"}.get(dtype, "fp32"))
        self.dtype = dtype

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        """Inputs of the module for a batch, a sequence and a cache of these sizes."""
        raise NotImplementedError

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, Any]:
        # A trace of a cache of length 0 would hold for no other (transformers DynamicLayer).
        return self.examples(2, 6, 3)

    def _floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.dtype)

    @property
    def past_names(self) -> list[str]:
        return [name for name in self.inputs if name.startswith("past_key_values.")]

    def flatten(self, past: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """The cache by the names of the graph's inputs."""
        tensors = [tensor for layer in past for tensor in layer]
        return dict(zip(self.past_names, tensors, strict=True))

    def flatten_output_collection_property(  # type: ignore[override]
        self, name: str, field: Any
    ) -> dict[str, Any]:
        return self.flatten(field)

    def fix_dynamic_axes(self, model_path: Path, **_: Any) -> None:
        """Name the dynamic axes as this configuration does.

        Optimum's own opens a session on the whole part, and freezes the axes that the exporter
        named after a sum of others.
        """
        model = onnx.load(model_path, load_external_data=False)
        axes = {**self.inputs, **self.outputs}
        for value in (*model.graph.input, *model.graph.output):
            for axis, name in axes[value.name].items():
                value.type.tensor_type.shape.dim[axis].dim_param = name
        strip_traces(model)
        onnx.save(model, model_path)


class VisionEncoderConfig(PartConfig):
    @property
    def inputs(self) -> Axes:
        return {"pixel_values": {0: "batch_size"}}

    @property
    def outputs(self) -> Axes:
        return {"image_features": {0: "batch_size"}}

    def __init__(self, part: nn.Module, dtype: torch.dtype, image_size: int) -> None:
        super().__init__(part, dtype)
        self.image_size = image_size

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        return {"pixel_values": self._floats(batch, 3, self.image_size, self.image_size).float()}


class EmbedTokensConfig(PartConfig):
    @property
    def inputs(self) -> Axes:
        return {"input_ids": {0: "batch_size", 1: "sequence_length"}}

    @property
    def outputs(self) -> Axes:
        return {"inputs_embeds": {0: "batch_size", 1: "sequence_length"}}

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        ids = torch.arange(batch * length) * 37 % self._config.vocab_size
        return {"input_ids": ids.view(batch, length)}


def _mask(batch: int, length: int) -> Tensor:
    """Ones, but for padding in all rows after the first: behind the image's places, which come
    first in every prompt."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, 1 : 1 + length // 3] = 0
    return mask


class OptDecoderConfig(PartConfig):
    use_past = True

    @property
    def inputs(self) -> Axes:
        return {
            "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
            "attention_mask": {0: "batch_size", 1: "total_length"},
            **_cache_axes("past_key_values", self._config.num_hidden_layers, "past_length"),
        }

    @property
    def outputs(self) -> Axes:
        cache = _cache_axes("present", self._config.num_hidden_layers, "total_length")
        return {"logits": {0: "batch_size"}, **cache}

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        config = self._config
        heads = config.num_attention_heads
        cache = (batch, heads, past, config.hidden_size // heads)
        return {
            "inputs_embeds": self._floats(batch, length, config.word_embed_proj_dim),
            "attention_mask": _mask(batch, past + length),
            "past_key_values": [
                (self._floats(*cache), self._floats(*cache))
                for _ in range(config.num_hidden_layers)
            ],
        }


class T5EncoderConfig(PartConfig):
    @property
    def inputs(self) -> Axes:
        axes = {0: "batch_size", 1: "sequence_length"}
        return {"inputs_embeds": axes, "attention_mask": axes}

    @property
    def outputs(self) -> Axes:
        layers = self._config.num_decoder_layers
        return _cache_axes("past_key_values", layers, "sequence_length", ".encoder")

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        return {
            "inputs_embeds": self._floats(batch, length, self._config.d_model),
            "attention_mask": _mask(batch, length),
        }


class T5DecoderConfig(PartConfig):
    use_past = True

    @property
    def inputs(self) -> Axes:
        layers = self._config.num_decoder_layers
        own = _cache_axes("past_key_values", layers, "past_length", ".decoder")
        cross = _cache_axes("past_key_values", layers, "encoder_length", ".encoder")
        past = {**own, **cross}
        return {
            "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
            "encoder_attention_mask": {0: "batch_size", 1: "encoder_length"},
            # Layer by layer, as Transformers' cache has them.
            **{name: past[name] for name in sorted(past, key=lambda name: int(name.split(".")[1]))},
        }

    @property
    def outputs(self) -> Axes:
        layers = self._config.num_decoder_layers
        cache = _cache_axes("present", layers, "total_length", ".decoder")
        return {"logits": {0: "batch_size"}, **cache}

    def examples(self, batch: int, length: int, past: int) -> dict[str, Any]:
        config = self._config
        encoded = past + length + 2
        own, cross = ((batch, config.num_heads, size, config.d_kv) for size in (past, encoded))
        return {
            "inputs_embeds": self._floats(batch, length, config.d_model),
            "encoder_attention_mask": _mask(batch, encoded),
            "past_key_values": [
                tuple(self._floats(*shape) for shape in (own, own, cross, cross))
                for _ in range(config.num_decoder_layers)
            ],
        }


def _cache_axes(prefix: str, layers: int, length: str, owner: str = "") -> Axes:
    """Keys and values of all layers, (batch, heads, length, width) each."""
    return {
        f"{prefix}.{layer}{owner}.{kind}": {0: "batch_size", 2: length}
        for layer in range(layers)
        for kind in ("key", "value")
    }


def _linear_on_rows(linear: nn.Linear, inputs: Tensor) -> Tensor:
    rows = inputs if inputs.ndim == 2 else inputs.reshape(-1, inputs.shape[-1])
    outputs = nn.functional.linear(rows, linear.weight, linear.bias)
    return outputs if inputs.ndim == 2 else outputs.view(*inputs.shape[:-1], -1)


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
        # A product of three-dimensional inputs is exported with its weights transposed: a copy.
        mock.patch.object(nn.Linear, "forward", _linear_on_rows),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Plan:
    """A part of the model that becomes a graph: its name, module, configuration and weights."""

    name: str
    build: Callable[[Blip2ForConditionalGeneration], nn.Module]
    configure: Callable[[nn.Module], PartConfig]
    dtype: torch.dtype


def _plans(config: Blip2Config, precision: str) -> list[Plan]:
    compute = torch.float16 if precision == "fp16" else torch.float32
    # Rows are looked up in this one, never multiplied: half of float32's size costs nothing.
    stored = torch.float32 if precision == "fp32" else torch.float16
    size = config.vision_config.image_size
    language: list[tuple[str, type[nn.Module], type[PartConfig]]]
    if config.text_config.model_type == "opt":
        language = [("decoder_model_merged", OptDecoder, OptDecoderConfig)]
    else:
        language = [
            ("encoder_model", T5Encoder, T5EncoderConfig),
            ("decoder_model_merged", T5Decoder, T5DecoderConfig),
        ]
    return [
        Plan(
            "vision_encoder",
            VisionEncoder,
            lambda part: VisionEncoderConfig(part, compute, size),
            compute,
        ),
        Plan(
            "embed_tokens",
            lambda blip2: EmbedTokens(blip2, compute),
            lambda part: EmbedTokensConfig(part, compute),
            stored,
        ),
        *(
            Plan(name, build, partial(configure, dtype=compute), compute)
            for name, build, configure in language
        ),
    ]


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
    require_provider("cpu")  # parity needs it, at the very end
    config = read_config(folder)
    processor = read_processor(folder, config)
    with new_artifact(out) as draft, torch.no_grad():
        scratch = draft / "scratch"
        scratch.mkdir()
        weights = Weights(folder, scratch)
        plans = _plans(config, precision)
        errors = {}
        for number, plan in enumerate(plans, 1):
            title = f"[{number}/{len(plans)}] {plan.name}.onnx"
            errors[f"{plan.name}.onnx"] = _export_part(
                config, weights, plan, precision, draft, title
            )
        (draft / "tokenizer.json").write_text(
            processor.tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8"
        )
        log.info("comparing captions with generate()")
        shutil.rmtree(scratch)
        manifest = Manifest(
            family="blip2",
            precision=precision,
            image=_image_spec(processor),
            decoding={
                "end_tokens": np.atleast_1d(config.text_config.eos_token_id).tolist(),
                "max_tokens": MAX_TOKENS,
                "suppress_tokens": (),
            },
            state=_wiring(config, plans),
            files=record_files(draft),
            provenance={
                **(source or {"source": folder.name}),
                "licence": _licence(folder),
                "checkpoint_sha256": weights.sha256(),
                "opset": OPSET,
                "exporter": "optimum.exporters.onnx over torch.onnx.export(dynamo=True)",
                "versions": versions("transformers", "optimum", "optimum-onnx"),
            },
            parity={},
            prompt=dataclasses.asdict(_prompt_spec(config, processor)),
        )
        manifest.write(draft)
        scratch.mkdir()
        captions = _compare_captions(config, processor, weights, draft, precision, photos)
        shutil.rmtree(scratch)
        parity = {
            "tolerance": TOLERANCES[precision],
            "relative_error": errors,
            "inputs": "photos" if photos else "seeded images",
            "captions": captions,
        }
        manifest = dataclasses.replace(manifest, parity=parity)
        manifest.write(draft)
    return manifest


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
    session = open_session(draft / name, "cpu", None, mapped=True)
    return max(
        _compare(name, part, part_config, session, TOLERANCES[precision], *shape)
        for shape in SHAPES
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
    name: str, part: nn.Module, config: PartConfig, session: Any, tolerance: float, *shape: int
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
    results = session.run(list(expected), feeds)
    for (key, wanted), got in zip(expected.items(), results, strict=True):
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


def relative_error(wanted: np.ndarray, got: np.ndarray) -> float:
    """Root mean square of the difference, as a share of that of `wanted`; computed in float32."""
    difference = np.square(wanted - got.astype(np.float32)).mean()
    return float(np.sqrt(difference / np.square(wanted).mean()))


def _compare_captions(
    config: Blip2Config,
    processor: Blip2Processor,
    weights: Weights,
    draft: Path,
    precision: str,
    photos: Sequence[ImageSource],
) -> dict[str, Any]:
    """Captions and answers of the artifact against those of `generate()` in float32.

    Raises:
        ParityError: in fp32 a token differs; otherwise, logits do by more than the tolerance.
    """
    images = list(photos[:IMAGES]) or seeded_images(4)
    prompts = list(itertools.islice(itertools.cycle(_PROMPTS), len(images)))
    model = meta_model(config)
    weights.fill(model, torch.float32)
    reference = HuggingFaceCaptioner(model, processor)
    wanted, wanted_logits = [], []
    for prompt in (None, prompts):
        wanted += reference.caption(images, prompt=prompt)
        wanted_logits.append(reference.first_logits)
    exported = Captioner.load(draft)
    assert isinstance(exported.vocabulary, PromptTokenizer)
    got, got_logits = [], []
    for prompt in (None, prompts):
        got += exported.caption(images, prompt=prompt)
        pixels = np.stack([exported.preprocess(image) for image in images])
        framed = exported.vocabulary.prompts(prompt, len(images))
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
    return {
        "compared": len(same),
        "identical": sum(same),
        "distinct": len({caption.tokens for caption in wanted}),
        "token_agreement": token_agreement(wanted, got),
        "logit_error": error,
    }


def token_agreement(wanted: Sequence[Caption], got: Sequence[Caption]) -> float:
    """The share of tokens that two captioners say at the same place, of the longer captions'."""
    same = longest = 0
    for a, b in zip(wanted, got, strict=True):
        same += sum(x == y for x, y in zip(a.tokens, b.tokens, strict=False))
        longest += max(len(a.tokens), len(b.tokens))
    return same / longest if longest else 1.0


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
        padding_side=tokenizer.padding_side,
        start_token=text.decoder_start_token_id if text.is_encoder_decoder else None,
        # T5 counts distances, not positions.
        max_positions=None if text.is_encoder_decoder else text.max_position_embeddings,
        clean_up_spaces=tokenizer.clean_up_tokenization_spaces,
    )


def _licence(folder: Path) -> str | None:
    """What the checkpoint's model card says."""
    card = folder / "README.md"
    return ModelCard.load(card).data.license if card.is_file() else None
