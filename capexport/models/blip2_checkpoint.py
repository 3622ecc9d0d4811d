"""A Hugging Face checkpoint of BLIP-2: found or downloaded, checked by its small files and the
headers of its weights before anything large is read, and mapped tensor by tensor.

This module decides as Transformers does which file holds a tensor. The export checks the result
against what Transformers itself loads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
from transformers.modeling_utils import no_init_weights

from capexport.artifact import Decoding, is_hub_id
from capexport.atomic import sha256_of
from capexport.errors import CheckpointError, DownloadError
from capexport.models.blip2_config import (
    CONFIG,
    SMALL_FILES,
    TRAINING,
    decoding_defaults,
    first_line,
    image_spec,
    quantised,
    quiet,
    read_config,
    read_json,
    read_processor,
)
from capexport.preprocessing import ImageSpec

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What Transformers, too, keeps in float32 when it loads half precision (`_keep_in_fp32_modules`).
# Without it the Q-Former loses its small differences, and T5's feed-forward layers overflow.
FP32_MODULES = ("query_tokens", "qformer.", ".wo.")
FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16
}  # fmt: skip
# How the last part of a tensor's name betrays what quantised it.
_QUANTISERS = {
    "SCB": "bitsandbytes (8 bits)", "weight_format": "bitsandbytes (8 bits)",
    "absmax": "bitsandbytes (4 bits)", "quant_map": "bitsandbytes (4 bits)",
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "g_idx": "GPTQ",
    "weight_packed": "compressed-tensors", "weight_scale": "scales of its own (fp8, int8)",
    "weight_scale_inv": "scales of its own (fp8)", "input_scale": "scales of its own (fp8)",
}  # fmt: skip


class Header(NamedTuple):
    """What a safetensors file says of a tensor before its data: "F16", say, and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that `read_checkpoint` has found nothing wrong with.

    Attributes:
        image: what the image processor does.
        decoding: the options that `generate()` would take.
        assumed: what the files leave open or contradict, and how they were read.
    """

    folder: Path
    config: Blip2Config
    processor: Blip2Processor
    image: ImageSpec
    decoding: Decoding
    assumed: tuple[str, ...]


def find_checkpoint(model: str, revision: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder of a checkpoint, downloaded from the Hugging Face hub if `model` is an id, and
    where it comes from. Weights are downloaded last, and only what Transformers would read.

    Raises:
        CheckpointError: it is of a kind that capexport does not export.
        DownloadError: it is neither here, nor in the cache, nor to be had.
    """
    if Path(model).is_dir():
        return Path(model), {"source": Path(model).resolve().name}
    if not is_hub_id(model):
        raise CheckpointError(f"{model}: no such folder, nor an id of the Hugging Face hub")
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*SMALL_FILES]))
        commit = folder.name
        config = _read_small(folder).config
        names, headers = _on_the_hub(model, commit, folder)
        if headers:
            check_headers(folder, config, headers)
        snapshot_download(model, revision=commit, allow_patterns=names)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DownloadError(
            f"{model}: cannot be downloaded, and is not in the cache ({first_line(error)}): "
            "connect to the network once, or pass a folder with a copy"
        ) from error
    return folder, {"source": model, "revision": commit}


def _on_the_hub(model: str, commit: str, folder: Path) -> tuple[list[str], dict[str, Header]]:
    """The names of the weights' files, and their tensors' headers; no headers without a network."""
    hub = HfApi()
    try:
        present = hub.list_repo_files(model, revision=commit)
    except OSError:
        present = _names_in(folder)
        if not {WEIGHTS, INDEX} & set(present):
            raise
        return list(weight_files(folder, present)), {}
    files = weight_files(folder, present, model)
    headers = {}
    for file, wanted in files.items():
        try:
            tensors = hub.parse_safetensors_file_metadata(model, file, revision=commit).tensors
        except (OSError, SafetensorsParsingError):
            return list(files), {}
        for name, tensor in tensors.items():
            if wanted is None or name in wanted:
                headers[name] = Header(file, str(tensor.dtype), tuple(tensor.shape))
    return list(files), headers


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def weight_files(
    folder: Path, present: Collection[str], model: str | None = None
) -> dict[str, set[str] | None]:
    """The files that Transformers would read, of those `present`: `model.safetensors`, else what
    the index in `folder` names. With each, the tensors that are looked for in it; None for all.
    `model` is the id on the hub, where the rest of the folder is.

    Raises:
        CheckpointError: neither is there, or not all that the index names.
    """
    if WEIGHTS in present:
        return {WEIGHTS: None}
    if INDEX not in present:
        raise CheckpointError(_without_index(folder, present, model))
    path = folder / INDEX
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and PurePosixPath(file).name == file for file in places.values()
    ):
        raise CheckpointError(f"{path}: no weight_map from tensors to files of this folder")
    files: dict[str, set[str] | None] = {
        file: {name for name, place in places.items() if place == file}
        for file in sorted(set(places.values()))
    }
    if missing := sorted(set(files) - set(present)):
        raise CheckpointError(
            f"{folder}: {', '.join(missing)} not there, but {INDEX} names "
            f"{'it' if len(missing) == 1 else 'them'}; download or copy what is missing"
        )
    return files


def _without_index(folder: Path, present: Collection[str], model: str | None) -> str:
    def ends_with(*endings: str) -> list[str]:
        return sorted(name for name in present if name.endswith(endings))

    if others := ends_with(".safetensors"):
        count: Counter[str] = Counter()
        for name in others:
            if (folder / name).is_file():
                count.update(list(_headers_of(folder / name)))
        twice = [name for name, times in count.items() if times > 1]
        which = f"; {len(twice)} tensors ({twice[0]}, ...) are in several of them" if twice else ""
        return (
            f"{folder}: neither {WEIGHTS} nor {INDEX}, without which nothing says which of "
            f"{', '.join(others)} belong to the model{which}; copy the index from where the model "
            "comes, or name the right file so"
        )
    if ends_with(".bin", ".pt", ".pth", ".ckpt"):
        save = f'`model.save_pretrained("{folder}")`'
        if model:
            processor = f'`Blip2Processor.from_pretrained("{model}").save_pretrained("DIR")`'
            save = f'`model.save_pretrained("DIR")`, and {processor} the rest'
        return (
            f"{model or folder}: no {WEIGHTS}, and capexport reads no pickled weights; two lines "
            f'make it: `model = Blip2ForConditionalGeneration.from_pretrained("{model or folder}", '
            f'dtype="auto")`, {save}'
        )
    return f"{folder}: no safetensors there ({WEIGHTS}); copy them from where the model comes"


def _headers_of(file: Path) -> dict[str, Header]:
    try:
        with safe_open(file, "pt") as stored:
            names = stored.keys()
            parts = {name: stored.get_slice(name) for name in names}
            return {
                name: Header(file.name, part.get_dtype(), tuple(part.get_shape()))
                for name, part in parts.items()
            }
    except (OSError, SafetensorError) as error:
        with file.open("rb") as stream:
            if stream.read(40).startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{file}: a pointer of Git LFS; `git lfs pull`") from error
        raise CheckpointError(f"{file}: damaged: {error}; download it again") from error


def read_headers(folder: Path) -> dict[str, Header]:
    """The headers of all tensors that Transformers would look at, by their names in the files.

    Raises:
        CheckpointError: a file is damaged, or holds other tensors than the index says.
    """
    headers: dict[str, Header] = {}
    for file, wanted in weight_files(folder, _names_in(folder)).items():
        found = _headers_of(folder / file)
        if wanted is not None and (absent := sorted(wanted - set(found))):
            raise CheckpointError(
                f"{folder / file}: no {absent[0]} there, though {INDEX} says so; file and index "
                "are not of one save"
            )
        headers.update({k: v for k, v in found.items() if wanted is None or k in wanted})
    return headers


@quiet()
def _read_small(folder: Path) -> Checkpoint:
    """Everything that can be checked before the weights are there."""
    config = read_config(folder)
    processor, assumed = read_processor(folder, config)
    image = image_spec(folder, config, processor.image_processor)
    decoding = decoding_defaults(folder, config)
    return Checkpoint(folder, config, processor, image, decoding, tuple(assumed))


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint without its weights, after all checks that need no tracing.

    Raises:
        CheckpointError: it is damaged, incomplete, or of a kind that capexport does not export.
    """
    checkpoint = _read_small(folder)
    headers = read_headers(folder)
    corrected = check_headers(folder, checkpoint.config, headers)
    _refuse_two_for_one(folder, checkpoint.config, headers)
    return replace(checkpoint, assumed=(*checkpoint.assumed, *corrected))


def licence_of(folder: Path) -> str | None:
    """What the checkpoint's model card says; None where it says nothing, or cannot be read."""
    try:
        licence = ModelCard.load(folder / "README.md").data.license
    except Exception:  # of YAML, of the card's own rules, of encodings
        return None
    return licence if isinstance(licence, str) else None


def training_of(folder: Path) -> dict[str, Any] | None:
    """What `python -m train.blip2` left there of its training; None where it left nothing."""
    path = folder / TRAINING
    training = read_json(path).get("training") if path.is_file() else None
    return training if isinstance(training, dict) else None


def meta_model(config: Blip2Config) -> Blip2ForConditionalGeneration:
    """The model without the memory of its weights; `Weights.fill` brings them."""
    with no_init_weights(), torch.device("meta"):
        model = Blip2ForConditionalGeneration(config).eval()
    model.tie_weights()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # A tied weight has several names, of which a file may hold any.
        parameter.aliases = [*getattr(parameter, "aliases", ()), name]
    return model


def current_name(name: str) -> str:
    """A tensor's name in the model, where the file has an old one (`gamma` for `weight`)."""
    return str(Blip2ForConditionalGeneration._fix_state_dict_key_on_load(name)[0])


def check_headers(folder: Path, config: Blip2Config, headers: Mapping[str, Header]) -> list[str]:
    """Check names, types and shapes of the weights against the model's. If `config` and the files
    disagree whether T5's embedding is tied, correct `config`.

    Returns:
        What was corrected, in words.
    Raises:
        CheckpointError: a tensor is missing, quantised or of another shape.
    """
    _refuse_unmerged(folder, headers)
    for name, header in headers.items():
        if method := _QUANTISERS.get(name.rpartition(".")[2]):
            raise quantised(folder / header.file, f"{method}, as {name} shows")
    found = {current_name(name): header for name, header in headers.items()}
    assumed = _settle_ties(folder, config, found)
    missing = []
    for parameter in meta_model(config).parameters():
        names = [name for name in parameter.aliases if name in found]
        for name in names:
            file, dtype, shape = found[name]
            if dtype not in FLOATS:
                raise quantised(folder / file, f"a method that stores {dtype}, as {name} is")
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{folder / file}: {name} is {list(shape)}, not {list(parameter.shape)}, as "
                    f"{CONFIG} has it"
                )
        missing += [] if names else [parameter.aliases[0]]
    if missing:
        raise CheckpointError(
            f"{folder}: no weight {', '.join(missing[:3])} there ({len(missing)} missing in all), "
            "which Transformers would fill with random numbers; the files hold such as "
            f"{next(iter(found), 'nothing')}: not all of this model"
        )
    return assumed


def _refuse_unmerged(folder: Path, headers: Mapping[str, Header]) -> None:
    for name, header in headers.items():
        if name.startswith("base_model.model.") or ".lora_" in name or ".base_layer." in name:
            raise CheckpointError(
                f"{folder / header.file}: {name} is of an adapter (LoRA) beside its model; merge "
                'it first: `model = model.merge_and_unload()`, then `model.save_pretrained("merged"'
                ")`, and export that"
            )


def _settle_ties(folder: Path, config: Blip2Config, found: Collection[str]) -> list[str]:
    """Decide whether T5's output layer shares the weights of its embedding. Transformers 5 writes
    `tie_word_embeddings: true` for every T5; there, `scale_decoder_outputs` tells: true for the
    first T5, which shares them, false for T5 1.1 and Flan-T5."""
    text, path = config.text_config, folder / CONFIG
    scaled = getattr(text, "scale_decoder_outputs", None)
    if text.model_type != "t5" or scaled is None or scaled == text.tie_word_embeddings:
        return []
    if scaled or "language_model.lm_head.weight" not in found:
        raise CheckpointError(
            f"{path}: scale_decoder_outputs {scaled} with "
            + ("tie_word_embeddings false" if scaled else "no lm_head of its own")
            + " is a T5 that Transformers 4 cannot build; save it with both alike"
        )
    text.tie_word_embeddings = False
    return ["tie_word_embeddings: false, since scale_decoder_outputs is and there is an lm_head"]


def _refuse_two_for_one(folder: Path, config: Blip2Config, headers: Mapping[str, Header]) -> None:
    """Refuse files with two different matrices for what the configuration calls one: Transformers 4
    would use one of them for both, Transformers 5 each."""
    stored = {current_name(name): name for name in headers}
    for parameter in meta_model(config).parameters():
        names = [stored[name] for name in parameter.aliases if name in stored]
        tensors = [_read(folder / headers[name].file, name) for name in names]
        for name, tensor in zip(names[1:], tensors[1:], strict=True):
            if not torch.equal(tensor, tensors[0]):
                raise CheckpointError(
                    f"{folder / headers[name].file}: {names[0]} and {name} differ, but "
                    f"{CONFIG} says that they are one (tie_word_embeddings of text_config); set "
                    "it to false where they are two, or else remove the wrong one"
                )


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as stored:
        tensor: Tensor = stored.get_tensor(name)
    return tensor


def converted(tensor: Tensor, dtype: torch.dtype, file: Path) -> Tensor:
    """`tensor` as another type, mapped from a new `file` (at once unlinked), so that it needs no
    anonymous memory."""
    mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=dtype)
    file.unlink()  # it lives on as long as the mapping
    return mapped.copy_(tensor.flatten()).view(tensor.shape)


class Weights:
    """The tensors of a checkpoint, left on the disk until they are used.

    Tensors of the wanted type are mapped from the safetensors files; others are converted one by
    one into a file in `scratch` and mapped from there. Neither counts as anonymous memory.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.files = [folder / name for name in weight_files(folder, _names_in(folder))]
        self._folder, self._scratch = folder, scratch
        self._headers = read_headers(folder)
        self._stored = {current_name(name): name for name in self._headers}

    def sha256(self) -> dict[str, str]:
        """Hash by file name."""
        return {file.name: sha256_of(file) for file in self.files}

    def fill(self, part: nn.Module, dtype: torch.dtype) -> int:
        """Give a `meta_model`, or a part of one, its weights, as `dtype`; those of `FP32_MODULES`
        as float32.

        Returns:
            Their bytes.
        Raises:
            CheckpointError: a tensor is missing.
        """
        filled: dict[int, nn.Parameter] = {}
        for module in part.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in filled:
                    aliases = parameter.aliases  # type: ignore[attr-defined]
                    tensor = self._converted(aliases, dtype)
                    filled[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
                module._parameters[leaf] = filled[id(parameter)]
        return sum(tensor.nbytes for tensor in filled.values())

    def stored(self, aliases: Collection[str]) -> tuple[str, Tensor]:
        """A parameter as the files have it, by one of its names, and that name."""
        name = next((name for name in aliases if name in self._stored), None)
        if name is None:
            raise CheckpointError(f"{self._folder}: no weight {next(iter(aliases))} there")
        in_file = self._stored[name]
        return name, _read(self._folder / self._headers[in_file].file, in_file)

    def _converted(self, aliases: Collection[str], dtype: torch.dtype) -> Tensor:
        name, tensor = self.stored(aliases)
        if any(module in f".{name}" for module in FP32_MODULES):
            dtype = torch.float32
        if tensor.dtype == dtype:
            return tensor
        return converted(tensor, dtype, self._scratch / f"{name}.{dtype}")

    def dtype(self) -> torch.dtype:
        """What all weights can be loaded as without a loss; `qformer` and `query_tokens` are
        float32 in a float16 model anyhow."""
        floats = {name: h.dtype for name, h in self._headers.items() if h.dtype in FLOATS}
        always = ("query_tokens", "qformer.")
        others = {dtype for name, dtype in floats.items() if not name.startswith(always)}
        if others == {"F16"} and set(floats.values()) <= {"F16", "F32"}:
            return torch.float16
        return torch.bfloat16 if set(floats.values()) == {"BF16"} else torch.float32
