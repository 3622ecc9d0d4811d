"""The exported folder: a manifest, and files that must match the hashes in it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from capexport.atomic import replace_file, sha256_of
from capexport.decoding import DecodingOptions
from capexport.errors import (
    ArtifactError,
    ArtifactNotFoundError,
    DownloadError,
    OptionError,
)
from capexport.onnx_file import check_graph
from capexport.preprocessing import ImageSpec

FILE_NAME = "manifest.json"
SCHEMA = 1
_ALWAYS_HASHED = 256 * 10**6  # bytes: what takes about a second
_LONGEST_MANIFEST = 10 * 10**6  # bytes
_LARGEST_IMAGE = 2048  # pixels of an edge
_MOST_REGIONS = 256  # along an edge
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
# Fields of older manifests, which nothing reads any more.
_RETIRED = {"PromptSpec": {"padding_side"}}

T = TypeVar("T")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of the artifact."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if self.bytes < 0 or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError("no size and SHA-256 of a file")


@dataclass(frozen=True)
class Decoding(DecodingOptions):
    """The default options of decoding, and the token that begins a caption if there is one."""

    start_token: int | None = None

    @property
    def options(self) -> DecodingOptions:
        names = [item.name for item in dataclasses.fields(DecodingOptions)]
        return DecodingOptions(**{name: getattr(self, name) for name in names})

    def check(self, path: Path, vocabulary_size: int, *more: int) -> None:
        """Check that all tokens, and `more`, lie within the vocabulary.

        Raises:
            ArtifactError: one does not, or none is left for captions.
        """
        start = () if self.start_token is None else (self.start_token,)
        for token in (*start, *self.end_tokens, *self.suppress_tokens, *more):
            if not 0 <= token < vocabulary_size:
                raise ArtifactError(
                    f"{path}: token {token} lies outside the vocabulary of {vocabulary_size}; "
                    "export again"
                )
        if len({*self.end_tokens, *self.suppress_tokens}) >= vocabulary_size:
            raise ArtifactError(f"{path}: suppress_tokens leave nothing to say; export again")


@dataclass(frozen=True)
class PromptSpec:
    """How prompts are framed, as `Blip2Processor` and `generate()` of Transformers do.

    Attributes:
        image_token: the id whose places the image's features take.
        query_tokens: how many such places come before everything else.
        bos_token: what follows them if there is no prompt.
        pad_token: what brings the prompts of a batch to one length.
        start_token: the first id of an encoder-decoder's caption; None for a decoder alone.
        max_positions: the longest prompt and caption together, where the model has a limit.
        clean_up_spaces: whether decoding draws punctuation to the word before it.
    """

    image_token: int
    query_tokens: int
    bos_token: int
    pad_token: int
    start_token: int | None
    max_positions: int | None
    clean_up_spaces: bool

    def __post_init__(self) -> None:
        tokens = (self.image_token, self.bos_token, self.pad_token, self.start_token or 0)
        if min(tokens) < 0 or self.query_tokens < 1:
            raise ValueError("token ids must be at least 0, query_tokens at least 1")
        if self.max_positions is not None and not self.query_tokens < self.max_positions < 1 << 31:
            raise ValueError(f"{self.max_positions} positions hold no image and caption")


@dataclass(frozen=True)
class Provenance:
    """What the artifact was made of and with.

    Attributes:
        checkpoint_sha256: of the checkpoint's weights, by file name if there are several.
        versions: of the packages that took part.
        training, metrics: how the checkpoint was trained and what it scored, as far as it says.
        source, revision, licence: where it was downloaded, and its licence.
        assumed: what the checkpoint's files leave open or contradict, and how they were read.
        calibration_photos: how many photos showed int8 its ranges.
    """

    checkpoint_sha256: str | dict[str, str]
    opset: int
    exporter: str
    versions: dict[str, str]
    training: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    source: str | None = None
    revision: str | None = None
    licence: str | None = None
    assumed: tuple[str, ...] | None = None
    calibration_photos: int | None = None


@dataclass(frozen=True)
class CaptionParity:
    """How captions compare with PyTorch's.

    Attributes:
        identical: how many are the same to the token.
        distinct: how many different ones PyTorch's are: one for all images would prove little.
        images: how many images were captioned; of a BLIP-2, `compared` are the captions, since each
            image gets several.
        max_log_probability_difference: the largest of a caption (CNN-LSTM).
        token_agreement: the share of tokens that are the same (BLIP-2).
        logit_error: the relative error of the first tokens' logits (BLIP-2).
    """

    identical: int
    distinct: int
    images: int | None = None
    compared: int | None = None
    max_log_probability_difference: float | None = None
    token_agreement: float | None = None
    logit_error: float | None = None


@dataclass(frozen=True)
class Parity:
    """What the comparison with PyTorch in float32 found before the artifact was written.

    Attributes:
        inputs: the images that were compared.
        yardstick: what the artifact was compared with.
        tolerance: the largest difference of a graph that passes.
        max_difference: each graph's largest difference of a value.
        relative_error: each graph's root mean square error, as a share of the output's own.
        int8: what 8 bits lose: errors by graph, and the shares of captions and tokens that stay.
        metrics: caption metrics by captioner, where human captions were given.
    """

    inputs: str
    tolerance: float
    captions: CaptionParity
    yardstick: str | None = None
    max_difference: dict[str, float] | None = None
    relative_error: dict[str, float] | None = None
    int8: dict[str, float] | None = None
    metrics: dict[str, dict[str, float | str]] | None = None


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`; artifacts/README.md describes it field by field.

    `regions` are the rows and columns of what an attention decoder looks at. Only a draft has no
    `parity`.
    """

    family: str
    precision: str
    image: ImageSpec
    decoding: Decoding
    state: dict[str, str]
    files: dict[str, FileRecord]
    provenance: Provenance
    parity: Parity | None = None
    prompt: PromptSpec | None = None
    regions: tuple[int, int] | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name in self.files:
            if not _PLAIN_NAME.fullmatch(name):
                raise ValueError(f"{name!r:.80} is not a plain file name")
        if not self.precision.isalnum():
            raise ValueError(f"precision must be one such as int8, got {self.precision!r:.80}")
        if self.regions and not all(0 < count <= _MOST_REGIONS for count in self.regions):
            raise ValueError(f"regions are out of range: {self.regions}")
        image = self.image
        if image.resize > _LARGEST_IMAGE:
            raise ValueError(f"image.resize must be at most {_LARGEST_IMAGE}, got {image.resize}")
        if not all(abs(mean) < 1e3 for mean in image.mean):
            raise ValueError(f"image.mean is out of range: {image.mean}")
        if not all(1e-3 < std < 1e3 for std in image.std):
            raise ValueError(f"image.std is out of range: {image.std}")

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> str:
        return json.dumps(_plain(self), indent=1)

    def write(self, folder: Path) -> None:
        replace_file(folder / FILE_NAME, self.to_json() + "\n")

    @classmethod
    def read(cls, folder: Path, *, thorough: bool = False) -> Manifest:
        """Read the manifest and check each file's presence, size and hash.

        Files of more than 256 MB are hashed only if `thorough`: that reads gigabytes of weights,
        which are otherwise mapped, and read when they are used.

        Raises:
            ArtifactNotFoundError: no manifest, or a file is missing.
            ArtifactError: the schema is unknown to this version, a field is missing or of a wrong
                type or range, or a file was altered.
        """
        path = folder / FILE_NAME
        if not _is_file(path):
            raise ArtifactNotFoundError(
                f"{folder}: no {FILE_NAME} there; pass the folder that a capexport export wrote"
            )
        manifest = cls.parse(path)
        manifest.check_files(folder, thorough)
        return manifest

    @classmethod
    def parse(cls, path: Path) -> Manifest:
        """Read the manifest at `path`, and none of the files that it lists.

        Raises:
            ArtifactError: as for `read`.
        """
        try:
            if path.stat().st_size > _LONGEST_MANIFEST:
                raise ValueError(f"more than {_LONGEST_MANIFEST} bytes")
            document = json.loads(
                path.read_text(encoding="utf-8"),
                parse_constant=_no_number,
                object_pairs_hook=_each_once,
            )
            if not isinstance(document, dict) or document.get("schema") != SCHEMA:
                schema = document.get("schema") if isinstance(document, dict) else None
                raise ArtifactError(
                    f"{path}: schema {reprlib.repr(schema)}, but this capexport reads schema "
                    f"{SCHEMA}; upgrade capexport, or export the model again"
                )
            return typed(cls, document)
        except ArtifactError:
            raise
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}: damaged manifest: {error}; export again") from error

    def file(self, folder: Path, name: str) -> Path:
        """The path of a file that the manifest lists."""
        if name not in self.files:
            raise ArtifactError(f"{folder / FILE_NAME}: lists no {name}; export again")
        return folder / name

    def check_files(self, folder: Path, thorough: bool) -> None:
        """Check the files against their records, and that graphs read no other file."""
        for name, record in self.files.items():
            file = folder / name
            if not _is_file(file):
                raise ArtifactNotFoundError(f"{file}: missing; export or copy the folder again")
            try:
                altered = file.stat().st_size != record.bytes
                if not altered and (thorough or record.bytes <= _ALWAYS_HASHED):
                    altered = sha256_of(file) != record.sha256
            except OSError as error:
                raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from error
            if altered:
                raise ArtifactError(
                    f"{file}: altered or damaged since the export; export or copy it again"
                )
            if file.suffix == ".onnx":
                check_graph(file, self.files)


def _is_file(path: Path) -> bool:
    """Is there a file, or perhaps one, where this process may not look? Opening it tells why."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except PermissionError:
        return True
    except (OSError, ValueError):  # such as a name that no file can have
        return False


def typed(kind: type[T], value: Any, name: str = "") -> T:
    """Turn a value from JSON into a `kind`: a dataclass, or one of the types in its fields.

    Raises:
        ValueError: it names a field that is missing, unknown, of another type or out of range.
    """
    found: T = _typed(kind, value, name)
    return found


def _typed(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _dataclass(kind, value, name)
    if origin in (Union, UnionType):
        simple = [
            choice for choice in arguments if choice is type(value) or _is_literal(choice, value)
        ]
        choices = simple or [choice for choice in arguments if choice is not NoneType]
        return _typed(choices[-1 if isinstance(value, dict) else 0], value, name)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(value) == len(arguments):
            return tuple(map(_typed, arguments, value, [name] * len(value)))
    if kind is float and type(value) is int and abs(value) < 1 << 1000:
        return float(value)
    if kind is Any or type(value) is kind or _is_literal(kind, value):
        return value
    shown = reprlib.repr(value)
    raise ValueError(f"{name or 'it'} is no {getattr(kind, '__name__', kind)}: {shown}")


def _is_literal(kind: Any, value: Any) -> bool:
    return get_origin(kind) is Literal and value in get_args(kind)


def _dataclass(kind: Any, values: dict[str, Any], name: str) -> Any:
    prefix = f"{name}." if name else ""
    hints = get_type_hints(kind)
    values = {k: v for k, v in values.items() if k not in _RETIRED.get(kind.__name__, ())}
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(f"unknown field {prefix}{unknown[0]:.80}")
    for item in dataclasses.fields(kind):
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and item.name not in values:
            raise ValueError(f"{prefix}{item.name} is missing")
    parts = {key: _typed(hints[key], value, prefix + key) for key, value in values.items()}
    try:
        return kind(**parts)
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from error


def _plain(value: Any) -> Any:
    """What `typed` reads back: dataclasses as dicts, without optional fields that are None."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {item.name: (item, getattr(value, item.name)) for item in dataclasses.fields(value)}
    kept = {k: v for k, (item, v) in fields.items() if v is not None or item.default is not None}
    return {
        name: {key: _plain(item) for key, item in v.items()} if isinstance(v, dict) else _plain(v)
        for name, v in kept.items()
    }


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _each_once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that stands there twice, readers take the one or the other."""
    document = dict(fields)
    if len(document) < len(fields):
        raise ValueError("a name stands twice in an object")
    return document


def is_hub_id(name: str) -> bool:
    """Is this `owner/name` on the Hugging Face hub, rather than a mistyped path?"""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)) and not Path(name).parent.exists()


def local_folder(folder: str | os.PathLike[str], revision: str | None = None) -> Path:
    """`folder`, or the local copy of the repository that it names on the Hugging Face hub.

    From a repository only the manifest is downloaded, and then the files that it lists.

    Args:
        revision: branch, tag or commit of a repository; its main branch by default.
    Raises:
        ArtifactNotFoundError: neither a folder, nor a repository that holds an export; or no name.
        ArtifactError: the repository's manifest is damaged.
        DownloadError: it is an id, but cannot be downloaded.
        OptionError: a revision of a folder.
    """
    path = Path(folder)
    name = os.fspath(folder)
    if not name:
        raise ArtifactNotFoundError("an empty name is no model; pass a folder, or an id of the hub")
    if os.path.lexists(path) or not is_hub_id(name):
        if revision is not None:
            raise OptionError(f"{name}: a folder has no revision: pass an id of the hub")
        return path
    try:
        import huggingface_hub as hub
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ArtifactNotFoundError(
            f"{name}: no such folder; if it is a Hugging Face id, first "
            f"`pip install 'capexport[tokenizers]'` ({error})"
        ) from error
    try:
        manifest = Path(hub.hf_hub_download(name, FILE_NAME, revision=revision))
        commit = manifest.parent.name
        for file in Manifest.parse(manifest).files:
            hub.hf_hub_download(name, file, revision=commit)
    except ArtifactError:
        raise
    except Exception as error:  # the client's own, its checks', and those of the HTTP library
        unreachable = isinstance(error, LocalEntryNotFoundError)
        absent = isinstance(error, EntryNotFoundError)
        if absent and _holds_pytorch_blip2(name, revision, local_files_only=unreachable):
            raise ArtifactNotFoundError(
                f"{name}: a PyTorch checkpoint, no export; export it first: "
                f"`capexport blip2 --model {name} --out DIR`, then load DIR"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if absent and not unreachable:
            raise ArtifactNotFoundError(
                f"{name}: that repository is no complete capexport export: {reason}"
            ) from error
        raise DownloadError(
            f"{name}: no such folder, nor one that can be downloaded from the Hugging Face hub: "
            f"{reason}"
        ) from error
    return manifest.parent


def _holds_pytorch_blip2(name: str, revision: str | None, **how: bool) -> bool:
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision, **how))
        return bool(json.loads(config.read_text(encoding="utf-8"))["model_type"] == "blip-2")
    except Exception:  # as in `local_folder`, or whatever else is called config.json
        return False


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file in `folder`."""
    return {
        file.name: FileRecord(file.stat().st_size, sha256_of(file))
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != FILE_NAME
    }
