"""The exported folder: a manifest, and files that are held to it by their hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from capexport.errors import ArtifactError, ArtifactNotFoundError, OutputExistsError
from capexport.preprocessing import ImageSpec

FILE_NAME = "manifest.json"
SCHEMA = 1
_ALWAYS_HASHED = 256 * 10**6  # bytes: what takes about a second


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of the artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, field by field as artifacts/README.md describes it."""

    family: str
    precision: str
    image: ImageSpec
    decoding: dict[str, Any]
    state: dict[str, str]
    files: dict[str, FileRecord]
    provenance: dict[str, Any]
    parity: dict[str, Any]
    prompt: dict[str, Any] | None = None
    schema: int = SCHEMA

    def write(self, folder: Path) -> None:
        replace_file(folder / FILE_NAME, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path, *, thorough: bool = False) -> Manifest:
        """Read the manifest and check each file's presence, size and hash.

        Files of more than 256 MB are not hashed unless `thorough`: that would read gigabytes of
        weights, which are otherwise mapped and read when they are used.

        Raises:
            ArtifactNotFoundError: no manifest, or a file is missing.
            ArtifactError: a schema that this version doesn't know, or a file was altered.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise ArtifactNotFoundError(
                f"{folder}: no {FILE_NAME} there; pass the folder that a capexport export wrote"
            )
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema"] != SCHEMA:
                raise ArtifactError(
                    f"{path}: schema {document['schema']!r}, but this capexport reads schema "
                    f"{SCHEMA}; upgrade capexport, or export the model again"
                )
            document["image"] = image_spec_from_json(document["image"])
            document["files"] = {
                name: FileRecord(**record) for name, record in document["files"].items()
            }
            manifest = cls(**document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{path}: damaged manifest: {error!r}; export again") from error
        manifest.check_files(folder, thorough)
        return manifest

    def file(self, folder: Path, name: str) -> Path:
        """The path of a file that the manifest vouches for."""
        if name not in self.files:
            raise ArtifactError(f"{folder / FILE_NAME}: lists no {name}; export again")
        return folder / name

    def check_files(self, folder: Path, thorough: bool) -> None:
        for name, record in self.files.items():
            file = folder / name
            if Path(name).name != name:
                raise ArtifactError(f"{folder / FILE_NAME}: {name!r} is not a plain file name")
            if not file.is_file():
                raise ArtifactNotFoundError(f"{file}: missing; export or copy the folder again")
            hashed = thorough or record.bytes <= _ALWAYS_HASHED
            if file.stat().st_size != record.bytes or (hashed and sha256_of(file) != record.sha256):
                raise ArtifactError(
                    f"{file}: altered or damaged since the export; export or copy it again"
                )


@contextmanager
def new_artifact(out: Path) -> Iterator[Path]:
    """A draft folder that becomes `out` when the block ends well, and vanishes when it doesn't.

    Raises:
        OutputExistsError: `out` is there already.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out}: already there; remove it, or pick another --out")
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)  # left behind by an export that was killed
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.replace(out)
    except OSError as error:
        raise _with_name(error, out) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def image_spec_from_json(document: Mapping[str, Any]) -> ImageSpec:
    """An `ImageSpec` from its JSON form, where tuples have become lists."""
    values: dict[str, Any] = dict(document)
    return ImageSpec(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file in `folder`."""
    return {
        file.name: FileRecord(file.stat().st_size, sha256_of(file))
        for file in sorted(folder.iterdir())
        if file.name != FILE_NAME
    }


def replace_file(path: Path, text: str) -> None:
    """Write UTF-8 text so that `path` holds the old or the new content, never part of it."""
    with replacing_file(path) as file:
        file.write(text)


@contextmanager
def replacing_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 stream whose content replaces that of `path` when the block ends well."""
    draft = path.with_name(path.name + ".partial")
    try:
        with draft.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise _with_name(error, path) from error
    finally:
        draft.unlink(missing_ok=True)


def _with_name(error: OSError, path: Path) -> OSError:
    """A full disk is reported without the file that met it."""
    return error if error.filename else OSError(error.errno, error.strerror, str(path))
