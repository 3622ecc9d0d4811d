"""The manifest, typed to its leaves, and the files that it vouches for."""

import hashlib
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import edit_manifest, vouch

from capexport import (
    ArtifactError,
    ArtifactNotFoundError,
    Captioner,
    DownloadError,
    OptionError,
)
from capexport.artifact import Manifest, PromptSpec, typed
from capexport.captioner import BUNDLED_ARTIFACT
from capexport.cli import main
from capexport.onnx_file import _MESSAGES, check_graph
from capexport.preprocessing import ImageSpec

BLANK = np.zeros((8, 8, 3), np.uint8)
RECORD = {"bytes": 1, "sha256": "0" * 64}


def changed(folder: Path, path: str, value: Any) -> None:
    """Put `value` into the manifest's field at a path such as "image.mean"."""
    document = json.loads((folder / "manifest.json").read_text())
    *parents, leaf = path.split("/")
    part = document
    for name in parents:
        part = part[name]
    part[leaf] = value
    edit_manifest(folder, **document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("family", 3), ("family", None), ("precision", ["fp32"]),
        ("precision", "int8\x1b[31m"), ("precision", ""), ("schema", "1"), ("schema", True),
        ("image", []), ("image/resize", 224.5), ("image/resize", True), ("image/crop", "224"),
        ("image/resize", 10**6), ("image/mean", [1e300, 0, 0]), ("image/std", [1e-300, 1, 1]),
        ("image/std", [1e39, 1, 1]),
        ("image/mean", [0.5, 0.5]), ("image/mean", "abc"), ("image/std", [1, 1, 0]),
        ("image/mean", [float("nan"), 0, 0]), ("image/std", [1, 1, float("inf")]),
        ("image/keep_aspect", 1), ("image/resample", "nearest"), ("image/more", 1),
        ("decoding/end_tokens", 2), ("decoding/end_tokens", [2.0]), ("decoding/end_tokens", [-1]),
        ("decoding/max_tokens", "30"), ("decoding/max_tokens", 0), ("decoding/max_tokens", 10**6),
        ("decoding/max_tokens", True),
        ("decoding/suppress_tokens", {"0": 1}), ("decoding/start_token", [1]),
        ("decoding/repetition_penalty", -1), ("decoding/temperature", 1),
        ("state", ["hidden"]), ("state/hidden", 3),
        ("files/encoder.onnx", 5), ("files/encoder.onnx", {"bytes": 1}),
        ("files/encoder.onnx", {"bytes": "1", "sha256": ""}),
        ("files/encoder.onnx", {"bytes": -1, "sha256": "0" * 64}),
        ("files/encoder.onnx", {"bytes": 1, "sha256": "0"}),
        ("provenance", {}), ("provenance/checkpoint_sha256", 5), ("provenance/opset", "20"),
        ("provenance/versions", {"torch": 2}), ("provenance/training", "long"),
        ("parity/captions", {}), ("parity/tolerance", "small"), ("parity/tolerance", 10**400),
        ("parity/captions/identical", 1.5),
        ("prompt", {"image_token": 1}), ("prompt", 3),
    ],
)  # fmt: skip
def test_every_field_has_a_type_and_a_range(copied: Path, path: str, value: Any):
    changed(copied, path, value)
    with pytest.raises(ArtifactError, match=r"manifest\.json") as caught:
        Captioner.load(copied)
    known = (path.split("/")[-1], "schema", "is no number")
    assert any(word in str(caught.value) for word in known)


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "null", '"schema"', "[" * 100_000, '{"schema": 1, "family": NaN}', "\xff\xfe"],
)
def test_what_is_no_manifest_at_all(copied: Path, text: str):
    (copied / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Captioner.load(copied)


def test_a_field_that_stands_there_twice(copied: Path):
    text = (copied / "manifest.json").read_text()
    (copied / "manifest.json").write_text(text.replace("{", '{"family": "blip2",', 1))
    with pytest.raises(ArtifactError, match=r"manifest\.json: .*twice"):
        Captioner.load(copied)


@pytest.mark.parametrize("name", ["start_token", "end_tokens", "suppress_tokens"])
def test_tokens_are_held_to_the_vocabulary(copied: Path, name: str):
    changed(copied, f"decoding/{name}", 999 if name == "start_token" else [2, 999])
    with pytest.raises(ArtifactError, match="token 999 lies outside the vocabulary"):
        Captioner.load(copied)


def test_a_decoder_that_needs_a_start_token_says_so(copied: Path):
    changed(copied, "decoding/start_token", None)
    with pytest.raises(ArtifactError, match="no start_token"):
        Captioner.load(copied)


@pytest.mark.parametrize(
    "words", [["dog"], {"a": 1}, ["<PAD>", "<SOS>", "<EOS>", 3], "words", ["<PAD>"] * 5]
)
def test_words_that_are_none(copied: Path, words: Any):
    path = copied / "vocabulary.json"
    path.write_text(json.dumps(words))
    vouch(copied, "vocabulary.json")
    with pytest.raises(ArtifactError, match=r"vocabulary\.json: not a list of words"):
        Captioner.load(copied)


def test_what_is_read_is_what_was_written(artifact: Path, tmp_path: Path):
    for folder in (artifact, BUNDLED_ARTIFACT):
        manifest = Manifest.read(folder)
        document = json.loads(manifest.to_json())
        assert typed(Manifest, document) == manifest
        stored = json.loads((folder / "manifest.json").read_text())
        if folder == artifact:
            assert document == stored


def test_a_field_that_nothing_reads_any_more_is_passed_over():
    spec = {
        "image_token": 330, "query_tokens": 4, "bos_token": 1, "pad_token": 0, "start_token": None,
        "max_positions": 64, "clean_up_spaces": False, "padding_side": "right",
    }  # fmt: skip
    assert typed(PromptSpec, spec).max_positions == 64
    for positions in (4, 1 << 31, 10**30):
        with pytest.raises(ValueError, match="hold no image"):
            typed(PromptSpec, {**spec, "max_positions": positions})


def test_integers_become_floats_where_floats_are_meant():
    spec = typed(ImageSpec, {"mean": [0, 0, 0], "std": [1, 1, 1]})
    assert spec.std == (1.0, 1.0, 1.0)
    assert all(isinstance(value, float) for value in spec.std)


def test_large_files_are_held_to_their_size_and_inspect_hashes_them(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr("capexport.artifact._ALWAYS_HASHED", 1000)
    data = copied / "decoder.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    Manifest.read(copied)
    with pytest.raises(ArtifactError, match=r"decoder\.data: altered"):
        Manifest.read(copied, thorough=True)
    assert main(["inspect", str(copied)]) == 2
    assert "decoder.data: altered" in capsys.readouterr().err
    data.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"decoder\.data: altered"):
        Captioner.load(copied)


def replaced(path: Path, old: bytes, new: bytes, count: int = -1) -> None:
    assert len(old) == len(new), "lengths are part of the format"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, count))


def test_weights_that_the_manifest_does_not_list(copied: Path):
    document = json.loads((copied / "manifest.json").read_text())
    del document["files"]["decoder.data"]
    edit_manifest(copied, **document)
    with pytest.raises(ArtifactError, match=r"decoder_\w+\.onnx: reads 'decoder\.data', which"):
        Captioner.load(copied)


@pytest.mark.parametrize("place", ["../away.data", "/proc/x.data", "unlist.data_", "./coder.data"])
@pytest.mark.parametrize("graph", ["decoder_loop.onnx", "decoder_step.onnx"])
def test_weights_elsewhere(copied: Path, place: str, graph: str):
    """Not even where they are a copy of what is listed."""
    if not place.startswith("/"):
        shutil.copy(copied / "decoder.data", copied / place)
    replaced(copied / graph, b"decoder.data", place.encode())
    vouch(copied, graph)
    with pytest.raises(ArtifactError, match=rf"{graph}: reads '{re.escape(place)}', which"):
        Captioner.load(copied)


def test_a_listed_file_may_be_a_link(copied: Path, artifact: Path):
    """As in the cache of the hub."""
    wanted = Captioner.load(artifact).caption(BLANK).tokens
    blobs = copied.parent / "blobs"
    blobs.mkdir()
    for file in list(copied.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    assert Captioner.load(copied).caption(BLANK).tokens == wanted


def test_a_loop_of_a_strangers_own_length(copied: Path):
    """The loop's count is its first input."""
    replaced(copied / "decoder_loop.onnx", b"\x0a\x0amax_tokens", b"\x0a\x0amin_tokens", 1)
    vouch(copied)
    with pytest.raises(ArtifactError, match=r"loop\.onnx: a Loop that max_tokens does not bound"):
        Captioner.load(copied)


def test_loops_and_files_are_found_wherever_they_are(tmp_path: Path):
    """Messages written here field by field, as protobuf's documentation says."""

    def field(number: int, *parts: bytes) -> bytes:
        content = b"".join(parts)
        key, length = number << 3 | 2, len(content)
        return bytes([key & 127 | 128, key >> 7, length & 127 | 128, length >> 7]) + content

    def attribute(number: int, content: bytes) -> bytes:
        return field(1, field(5, field(number, content)))  # of a node

    entry = field(13, field(1, b"location"), field(2, b"x.data"))
    loop = field(1, field(1, b"other"), field(4, b"Loop"))
    known = field(1, field(1, b"max_tokens"), field(4, b"Loop"))
    path = tmp_path / "graph.onnx"
    number = b"\x08\x0a"  # fields of other kinds are passed over
    for graph in (
        field(5, number, entry),
        field(15, field(1, entry)),
        field(15, field(2, entry)),
        attribute(5, entry),
        attribute(10, entry),
        attribute(22, field(1, entry)),
        attribute(6, field(5, entry)),
        attribute(11, attribute(6, field(5, entry))),
        loop,
        attribute(6, loop),
        attribute(6, known),
        field(1, field(1, b"max_tokens"), field(4, b"Scan")),
    ):
        for model in (field(7, number, graph), field(20, field(2, graph))):
            path.write_bytes(number + field(2, b"producer") + model)
            with pytest.raises(ArtifactError, match=r"x\.data|Loop|Scan"):
                check_graph(path, {"decoder.data"})
    path.write_bytes(field(25, field(7, loop.removeprefix(loop[:4]))))
    with pytest.raises(ArtifactError, match="Loop"):
        check_graph(path, ())
    path.write_bytes(field(7, field(5, entry), known, field(8, b"name")))
    check_graph(path, {"x.data"})
    for _ in range(1, path.stat().st_size):
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ArtifactError, match=r"graph\.onnx: "):
            check_graph(path, ())


def test_names_that_no_export_writes(copied: Path):
    for name in ("", "..", "a/b", "a\\b", "a\0b", "x" * 5000, "-x", " x", "é"):
        changed(copied, "files", {name: RECORD})
        with pytest.raises(ArtifactError, match=r"manifest\.json: .* is not a plain file name"):
            Captioner.load(copied)


@pytest.mark.skipif(os.name == "nt", reason="has other permissions")
@pytest.mark.parametrize("name", [".", "manifest.json", "vocabulary.json"])
def test_what_may_not_be_read_is_not_called_damaged(copied: Path, name: str):
    """A folder of somebody else, whose advice would be to export again."""
    (copied / name).chmod(0)
    user = os.geteuid()
    try:
        if not user:
            os.seteuid(65534)  # root may read anything
        with pytest.raises(ArtifactError, match="cannot be read: Permission denied"):
            Manifest.read(copied)
    finally:
        os.seteuid(user)
        (copied / name).chmod(0o700)


def test_folders_that_cannot_be():
    for folder in ("x" * 5000, "a\0b", "", "/" + "b" * 300):
        with pytest.raises(ArtifactNotFoundError):
            Captioner.load(folder)


def test_images_of_another_size_than_the_graphs(copied: Path):
    changed(copied, "image/crop", 200)
    with pytest.raises(ArtifactError, match=r"encoder\.onnx: images of shape \(any, 3, 224, 224\)"):
        Captioner.load(copied)


def test_nothing_left_to_say(copied: Path):
    words = json.loads((copied / "vocabulary.json").read_text())
    changed(copied, "decoding/suppress_tokens", list(range(len(words))))
    with pytest.raises(ArtifactError, match="suppress_tokens leave nothing"):
        Captioner.load(copied)


def test_words_that_the_vocabulary_lacks(copied: Path, photos: list[Path]):
    words = json.loads((copied / "vocabulary.json").read_text())
    (copied / "vocabulary.json").write_text(json.dumps(words[:5]))
    vouch(copied)
    with pytest.raises(ArtifactError, match=r"loop\.onnx: a word outside the vocabulary of 5"):
        Captioner.load(copied).caption(photos)


def test_weights_that_are_no_numbers(copied: Path, capfd):
    data = copied / "decoder.data"
    data.write_bytes(np.full(data.stat().st_size // 4, np.nan, np.float32).tobytes())
    vouch(copied)
    captioner = Captioner.load(copied)
    for options in ({}, {"repetition_penalty": 1.5}, {"num_beams": 3}):
        with pytest.raises(ArtifactError, match="no numbers"):
            captioner.caption(BLANK, **options)
    assert capfd.readouterr().err == ""


class Hub(BaseHTTPRequestHandler):
    """The Hugging Face hub with the repository someone/exported, as far as its client asks."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place, _, name = self.path.partition("/resolve/")
        revision, _, name = name.partition("/")
        known = revision in ("main", "v1", self.COMMIT) and place == "/someone/exported"
        content = self.files.get(name) if known else None
        if content is not None and self.command == "GET":
            self.asked.append(f"{revision}/{name}")
        self.send_response(404 if content is None else 200)
        if known:
            self.send_header("X-Repo-Commit", self.COMMIT)
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("X-Error-Code", "RevisionNotFound")
        self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")


@pytest.fixture
def hub(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants, file_download

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    for module in (constants, file_download):  # in one or the other, as versions go
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Hub.asked = []
    Hub.files = {file.name: file.read_bytes() for file in artifact.iterdir()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Hub
    server.shutdown()
    server.server_close()


def test_what_the_manifest_lists_is_downloaded_and_no_more(hub: type[Hub], artifact: Path):
    listed = sorted(Manifest.read(artifact).files)
    hub.files.update({"pytorch_model.bin": b"-", "README.md": b"-", "code.py": b"-"})
    captioner = Captioner.load("someone/exported", revision="v1")
    assert captioner.caption(BLANK).tokens == Captioner.load(artifact).caption(BLANK).tokens
    assert hub.asked[0] == "v1/manifest.json"
    assert sorted(hub.asked[1:]) == [f"{hub.COMMIT}/{name}" for name in listed]
    again = pickle.loads(pickle.dumps(captioner))  # of that commit, whatever v1 is by then
    assert again.folder == captioner.folder
    assert len(hub.asked) == 1 + len(listed)
    del hub.files["encoder.onnx"]
    shutil.rmtree(captioner.folder.parents[2])
    with pytest.raises(ArtifactNotFoundError, match="no complete capexport export"):
        Captioner.load("someone/exported")


@pytest.mark.parametrize("config", [b'["bert"]', b'{"model_type": "bert"}', b"-", None])
def test_other_models(hub: type[Hub], config: bytes | None):
    hub.files = {"model.safetensors": b"-"} | ({"config.json": config} if config else {})
    with pytest.raises(ArtifactNotFoundError, match="no complete capexport export"):
        Captioner.load("someone/exported", revision="v1")


def test_repositories_that_are_no_export(hub: type[Hub]):
    hub.files = {"config.json": b'{"model_type": "blip-2"}', "model.safetensors": b"-"}
    with pytest.raises(ArtifactNotFoundError) as caught:
        Captioner.load("someone/exported")
    assert "export it first: `capexport blip2 --model someone/exported --out DIR`" in str(
        caught.value
    )
    assert hub.asked == ["main/config.json"]
    hub.files = {"manifest.json": b'{"schema": 1}'}
    with pytest.raises(ArtifactError, match="damaged manifest"):
        Captioner.load("someone/exported")
    for name, revision in (
        ("someone/exported", "v9"), ("someone/else", None), ("a--b/c", None),
        ("a/" + "b" * 200, None), ("-a/b", None),
    ):  # fmt: skip
        with pytest.raises(DownloadError, match=f"^{name}: ") as caught:
            Captioner.load(name, revision=revision)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(OptionError, match="no revision"):
        Captioner.load("somewhere", revision="v1")


def test_field_numbers_are_those_of_onnx():
    onnx = pytest.importorskip("onnx")
    messages = {
        "model": "ModelProto", "training": "TrainingInfoProto", "main graph": "GraphProto",
        "graph": "GraphProto", "function": "FunctionProto", "main node": "NodeProto",
        "node": "NodeProto", "attribute": "AttributeProto", "sparse": "SparseTensorProto",
        "tensor": "TensorProto", "external data": "StringStringEntryProto",
    }  # fmt: skip
    entries = {("TensorProto", "external_data")}  # the only such entries that name files
    for kind, fields in _MESSAGES.items():
        declared = getattr(onnx, messages[kind]).DESCRIPTOR.fields
        leading = {
            field.number: field.message_type.name
            for field in declared
            if field.message_type and field.message_type.name in messages.values()
            if field.message_type.name != "StringStringEntryProto"
            or (messages[kind], field.name) in entries
        }
        assert {number: messages[inner] for number, inner in fields.items()} == leading
    node = onnx.NodeProto.DESCRIPTOR.fields_by_name
    assert (node["input"].number, node["op_type"].number) == (1, 4)
    entry = onnx.StringStringEntryProto.DESCRIPTOR.fields_by_name
    assert (entry["key"].number, entry["value"].number) == (1, 2)
