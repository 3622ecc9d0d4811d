"""Captions in parts, in a folder that many machines write: each part is complete, or not there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from capexport.atomic import remove_dead_drafts, replacing_binary_file
from capexport.bulk.rows import to_json
from capexport.errors import OptionError, OutputExistsError

FORMATS = ("parquet", "jsonl")
# A row has either `error`, for an image that cannot be read, or the two columns before it. The
# others are null; in JSON, an empty text.
SCHEMA = pa.schema(
    {
        "file_name": pa.string(),
        "text": pa.string(),
        "log_probability": pa.float64(),
        "error": pa.string(),
    }
)
# Hidden, so that tools which read the folder as one table skip it.
RECORD = ".capexport.json"
_TEXTS = ("text", "error")
_READERS = 16  # requests at a time, to an object store say


@dataclass(frozen=True)
class Parts:
    """A folder of captions, as one run sees it.

    Attributes:
        made_with: what must be the same for a later run to resume.
        run: this run's own number. The last run to begin owns the folder: an earlier run that still
            works, on any machine, writes nothing more.
    """

    filesystem: FileSystem
    folder: str
    format: str
    made_with: dict[str, Any]
    run: str

    @classmethod
    def begin(
        cls,
        filesystem: FileSystem,
        folder: str,
        format: str,
        made_with: dict[str, Any],
        resume: bool,
    ) -> tuple[Parts, set[str]]:
        """Take the folder over.

        Returns:
            The parts, and the names of the files that have a caption there. Rows with errors are
            removed from the parts, so that their files are tried again.
        Raises:
            OutputExistsError: something is there, and `resume` is off; or it was made with other
                options, with another captioner, or by something else.
        """
        made_with = json.loads(to_json(made_with))  # as it comes back
        parts = cls(filesystem, folder.rstrip("/"), format, made_with, secrets.token_hex(8))
        entries = parts._entries()
        record = parts._record()
        visible = [entry for entry in entries if not entry.base_name.startswith(".")]
        if visible and not resume:
            raise OutputExistsError(
                f"{folder}: not empty; resume=True adds what is missing, else pick another"
            )
        if visible and record is None:
            raise OutputExistsError(f"{folder}: holds files that are not capexport's; pick another")
        if visible and record is not None and {**record, "run": None} != {**made_with, "run": None}:
            raise OutputExistsError(
                f"{folder}: was made with another captioner or other options; pick another"
            )
        filesystem.create_dir(parts.folder)
        parts._replace(RECORD, (to_json({**made_with, "run": parts.run}) + "\n").encode())
        parts._remove_drafts(entries)
        return parts, set(parts._captioned(entries))

    def write(self, rows: pa.Table) -> None:
        """Write a part. Its name depends on its files, so that a part written twice is there once.

        Raises:
            OutputExistsError: another run has taken over.
            OptionError: the folder is not there: this machine does not see it, or it was removed.
        """
        record = self._record()
        if record is None:
            raise OptionError(
                f"{self.folder}: not there any more, or not for the process {os.getpid()} on "
                f"{socket.gethostname()}; all that write to it must see the same folder"
            )
        if record.get("run") != self.run:
            raise OutputExistsError(f"{self.folder}: another run has taken over")
        names = "\0".join(rows["file_name"].to_pylist())
        name = f"part-{hashlib.sha256(names.encode()).hexdigest()[:16]}.{self.format}"
        self._replace(name, self._encoded(rows))

    def _encoded(self, rows: pa.Table) -> bytes:
        if self.format == "jsonl":
            # Readers of JSON take a column's type from its first rows, and null has none.
            for name in _TEXTS:
                rows = rows.set_column(
                    rows.column_names.index(name), name, pc.fill_null(rows[name], "")
                )
            return b"".join(to_json(row).encode() + b"\n" for row in rows.to_pylist())
        stream = io.BytesIO()
        pq.write_table(rows, stream, compression="zstd")
        return stream.getvalue()

    def _captioned(self, entries: Sequence[FileInfo]) -> Iterator[str]:
        paths = [e.path for e in entries if e.base_name.startswith("part-")]
        with ThreadPoolExecutor(_READERS) as pool:
            for names in pool.map(self._without_errors, paths):
                yield from names

    def _without_errors(self, path: str) -> list[str]:
        """Remove the errors from a part; return the names that are left."""
        try:
            with self.filesystem.open_input_file(path) as file:
                if self.format == "parquet":
                    rows = pq.read_table(file).cast(SCHEMA)
                else:
                    documents = [json.loads(line) for line in file.read().splitlines()]
                    rows = pa.Table.from_pylist(documents, SCHEMA)
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise OutputExistsError(f"{path}: damaged ({error}); remove it") from error
        good = rows.filter(pc.equal(pc.fill_null(rows["error"], ""), ""))
        if not len(good):
            self.filesystem.delete_file(path)
        elif len(good) < len(rows):
            self._replace(path.rpartition("/")[2], self._encoded(good))
        names: list[str] = good["file_name"].to_pylist()
        return names

    def _entries(self) -> list[FileInfo]:
        entries: list[FileInfo] = self.filesystem.get_file_info(
            FileSelector(self.folder, allow_not_found=True)
        )
        return entries

    def _record(self) -> dict[str, Any] | None:
        path = f"{self.folder}/{RECORD}"
        if self.filesystem.get_file_info(path).type != FileType.File:
            return None
        with self.filesystem.open_input_stream(path) as file:
            try:
                document = json.loads(file.read())
            except ValueError:
                document = None
        return document if isinstance(document, dict) else {}

    def _replace(self, name: str, data: bytes) -> None:
        """Write a file so that it has the old or the new content, on any file system."""
        if isinstance(self.filesystem, LocalFileSystem):
            with replacing_binary_file(Path(self.folder, name)) as local:
                local.write(data)
            return
        draft = f"{self.folder}/.{name}.{secrets.token_hex(8)}.partial"
        with self.filesystem.open_output_stream(draft) as file:
            file.write(data)
        self.filesystem.move(draft, f"{self.folder}/{name}")

    def _remove_drafts(self, entries: Sequence[FileInfo]) -> None:
        """What killed runs left behind."""
        if isinstance(self.filesystem, LocalFileSystem):
            remove_dead_drafts(Path(self.folder))
            return
        for entry in entries:
            if entry.base_name.startswith(".") and entry.base_name.endswith(".partial"):
                self.filesystem.delete_file(entry.path)
