"""A captioner as a web page: static files that caption photos in the browser.

`page/` holds the page's own files. The others are `captioner.onnx` and onnxruntime-web, the build
that computes in WebAssembly alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from capexport.artifact import Manifest
from capexport.atomic import new_folder, refuse_existing, sha256_of
from capexport.decoding import DecodingKeywords
from capexport.errors import DownloadError, MissingExtraError, OptionError, importing
from capexport.preprocessing import ImageSource

if TYPE_CHECKING:
    from capexport.export.single_file import FileParity

PAGE = Path(__file__).parent / "page"
PACKAGE = "onnxruntime-web@1.30.0"
# Its SHA-512, as the npm registry gives it in `dist.integrity`.
_INTEGRITY = (
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
# Files of the package's `dist`. Each has a name on the page, since many servers send .mjs with a
# wrong type, and its SHA-256: another version might fail only in a visitor's browser.
_RUNTIME_FILES = {
    "ort.wasm.bundle.min.mjs": (
        "onnxruntime.js",
        "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    ),
    "ort-wasm-simd-threaded.wasm": (
        "onnxruntime.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
}
_BY_HAND = f"pass --runtime DIR, the folder `dist` of the npm package {PACKAGE}"


@dataclass(frozen=True)
class Site:
    """A page that was written.

    Attributes:
        parity: what its captioner.onnx was compared on.
        sizes: bytes of each file.
    """

    parity: FileParity
    sizes: dict[str, int]


def write_site(
    artifact: Path,
    out: Path,
    photos: Sequence[ImageSource] = (),
    *,
    runtime: Path | None = None,
    precision: str | None = None,
    decoding: DecodingKeywords | None = None,
) -> Site:
    """Write the page around the artifact as the new folder `out`, ready to be served.

    Args:
        photos: what its captions are compared on, at least 16; seeded colour fields by default.
        runtime: the folder `dist` of the npm package onnxruntime-web; by default npm fetches it.
        precision: "as-is" or "w8", as of `export_file`; by default w8 for an int8 artifact.
        decoding: how it decodes, in place of the artifact's defaults.
    Raises:
        OutputExistsError: `out` is there already.
        OptionError: an artifact that one graph does not hold, or a `runtime` that lacks a file or
            is of another version.
        MissingExtraError: onnx is not installed, or neither npm nor `runtime` is there.
        DownloadError: npm cannot fetch the package, or fetched another one.
        ParityError: the graph does not say what `Captioner` says.
    """
    refuse_existing(out)
    with importing("a page is made with `pip install 'capexport[cpu]' 'onnx>=1.23'`"):
        from capexport.export.single_file import export_file
    if precision is None:
        precision = "w8" if Manifest.read(artifact).precision == "int8" else "as-is"
    with new_folder(out) as folder:
        _add_runtime(folder, runtime)
        graph = folder / "captioner.onnx"
        parity = export_file(artifact, graph, photos, precision=precision, decoding=decoding)
        for file in (*PAGE.iterdir(), *artifact.glob("LICENSE*")):
            shutil.copyfile(file, folder / file.name)
        _fill_in(folder)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    return Site(parity, sizes)


def _add_runtime(folder: Path, runtime: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source = runtime or fetch_runtime(Path(temporary))
        if (source / "dist").is_dir():
            source /= "dist"
        for theirs, (ours, sha256) in _RUNTIME_FILES.items():
            if not (source / theirs).is_file():
                raise OptionError(f"{source}: holds no {theirs}; {_BY_HAND}")
            shutil.copyfile(source / theirs, folder / ours)
            if sha256_of(folder / ours) != sha256:
                raise OptionError(f"{source / theirs}: of another version; {_BY_HAND}")


def fetch_runtime(folder: Path) -> Path:
    """Have npm fetch the pinned package, check it, and put the files that a page needs in `folder`.

    Raises:
        MissingExtraError: there is no npm.
        DownloadError: npm cannot fetch the package, or fetched another one.
    """
    if (npm := shutil.which("npm")) is None:
        raise MissingExtraError(f"npm, which fetches {PACKAGE}, is not installed; {_BY_HAND}")
    command = [npm, "pack", PACKAGE, "--loglevel=error", "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    packed = list(folder.glob("*.tgz"))
    if done.returncode or len(packed) != 1:
        reason = " ".join((done.stderr or done.stdout).split())[:300] or f"exit {done.returncode}"
        raise DownloadError(f"npm cannot fetch {PACKAGE}: {reason}; {_BY_HAND}")
    digest = base64.b64encode(hashlib.sha512(packed[0].read_bytes()).digest()).decode()
    if digest != _INTEGRITY:
        raise DownloadError(f"npm fetched another {PACKAGE} than the known one; {_BY_HAND}")
    with tarfile.open(packed[0]) as archive:
        for name in _RUNTIME_FILES:
            content = archive.extractfile(f"package/dist/{name}")
            assert content is not None  # its hash is known
            with (folder / name).open("wb") as file:
                shutil.copyfileobj(content, file)
    return folder


def _fill_in(folder: Path) -> None:
    """Tell the service worker which files there are, and what is in them."""
    script = folder / "service-worker.js"
    files = {}
    for file in sorted(folder.iterdir()):
        if file != script:
            digest = base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
            files["./" if file.name == "index.html" else file.name] = f"sha256-{digest}"
    listed = json.dumps(files, indent=2)
    version = hashlib.sha256(listed.encode()).hexdigest()[:16]
    text = script.read_text(encoding="utf-8")
    for line, filled in (
        ("const FILES = {};", f"const FILES = {listed};"),
        ('const VERSION = "";', f'const VERSION = "{version}";'),
    ):
        assert line in text
        text = text.replace(line, filled)
    script.write_text(text, encoding="utf-8", newline="\n")
