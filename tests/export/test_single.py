"""A whole captioner as one ONNX file: the bits of Pillow, the captions of `Captioner`."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import COMMITTED, draw_photo
from PIL import Image

from capexport import Captioner
from capexport.artifact import Manifest
from capexport.captioner import BUNDLED_ARTIFACT
from capexport.cli import main
from capexport.errors import OptionError, ParityError
from capexport.export import single_file
from capexport.export.head import image_head
from capexport.export.single import single_graph
from capexport.export.single_file import export_file
from capexport.preprocessing import ImageSpec, preprocess

README = Path(__file__).parents[2] / "README.md"
# As onnxruntime sees a file: no code of capexport's between the session and the test.
QUIET = onnxruntime.SessionOptions()
QUIET.log_severity_level = 4


def opened(model: Path | bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model, QUIET, ["CPUExecutionProvider"])


def said(session: onnxruntime.InferenceSession, image: Image.Image) -> tuple:
    tokens, words, log_probability = session.run(None, {"image": np.asarray(image)})
    assert (tokens.dtype, log_probability.dtype, log_probability.shape) == ("int64", "float32", ())
    return tuple(tokens.tolist()), " ".join(words), float(log_probability)


def agrees(session: onnxruntime.InferenceSession, captioner: Captioner, image, **options) -> None:
    wanted = captioner.caption(image, **options)
    tokens, text, log_probability = said(session, image)
    assert (tokens, text) == (wanted.tokens, wanted.text)
    assert log_probability == pytest.approx(wanted.log_probability, abs=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        ImageSpec(),
        ImageSpec(resize=224, keep_aspect=False),
        ImageSpec(resample="bicubic"),
        ImageSpec(resize=97, crop=64, keep_aspect=False, resample="bicubic"),
        ImageSpec(resize=33, crop=32),
    ],
    ids=str,
)
def test_the_head_has_the_bits_of_preprocess_at_any_size(spec: ImageSpec):
    session, rng = opened(image_head(spec, 20, 10).SerializeToString()), np.random.default_rng(5)
    edges = [1, 2, spec.crop - 1, spec.resize, spec.resize + 1, 2 * spec.resize, 700]
    sizes = [*itertools.product(edges, edges), *rng.integers(1, 900, (30, 2)).tolist()]
    sizes += [(spec.resize + 40, spec.resize + 20), (spec.resize + 41, spec.resize + 20)]
    for height, width in sizes:
        if max(height, width) > 100 * min(height, width):
            continue
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        if rng.random() < 0.5:  # black and white, where a cubic kernel overshoots
            image = (image > 127).astype(np.uint8) * 255
        got = session.run(None, {"image": image})[0]
        np.testing.assert_array_equal(got[0], preprocess(image, spec), f"{height}x{width}")


def test_tall_images_have_the_same_bits_with_any_pillow():
    # Since 13, Pillow shortens what is that tall before it narrows it.
    image = Image.fromarray(np.random.default_rng(6).integers(0, 256, (900, 230, 3), np.uint8))
    spec = ImageSpec(resize=224, keep_aspect=False, mean=(0, 0, 0), std=(1, 1, 1))
    wanted = image.resize((230, 224), Image.Resampling.BILINEAR)
    wanted = wanted.resize((224, 224), Image.Resampling.BILINEAR)
    got = preprocess(image, spec).transpose(1, 2, 0) * 255
    np.testing.assert_array_equal(got.round().astype(np.uint8), np.asarray(wanted))


def test_large_photos_are_never_held_as_anything_wider_than_bytes():
    code = """
import numpy as np, resource
from capexport.export.head import image_head
from capexport.preprocessing import ImageSpec
from test_single import opened
session = opened(image_head(ImageSpec(), 20, 10).SerializeToString())
image = np.full((3000, 4000, 3), 200, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
session.run(None, {"image": image})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / image.nbytes)
"""
    if sys.platform != "linux":
        pytest.skip("peak memory is read in Linux's units")
    here = Path(__file__).parent
    paths = {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4  # of int32, the image alone would be 4 times its bytes


def test_a_greedy_lstm_says_what_captioner_says(artifact: Path, captioner, tmp_path: Path):
    parity = export_file(artifact, out := tmp_path / "new" / "captioner.onnx")
    assert parity.captions.identical == 16 and parity.captions.distinct > 8
    session = opened(out)
    for seed, size in enumerate([(120, 90), (1, 1), (7, 300), (300, 7), (900, 1000)]):
        agrees(session, captioner, draw_photo(50 + seed, size))
    kinds = {node.name: (node.type, node.shape) for node in session.get_outputs()}
    assert kinds["words"][0] == "tensor(string)"
    assert kinds["log_probability"] == ("tensor(float)", [])
    assert session.get_inputs()[0].shape == ["height", "width", 3]
    # The encoder's first step and the loop have the same weights, which are stored once.
    parts = sum((artifact / name).stat().st_size for name in ("encoder.onnx", "decoder.data"))
    lstm = sum(
        tensor.ByteSize()
        for tensor in onnx.load(artifact / "decoder_step.onnx").graph.initializer
        if "lstm.weight" in tensor.name
    )
    assert out.stat().st_size < parts - lstm + 60_000


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "length_penalty": 2.0},
        {"num_beams": 4, "early_stopping": True, "min_tokens": 3},
        {"num_beams": 2, "early_stopping": "never", "length_penalty": 1.5, "max_tokens": 9},
        {"num_beams": 5, "length_penalty": -1.0, "suppress_tokens": ()},
        {"num_beams": 30, "max_tokens": 4},  # more beams than there are words at first
        {"num_beams": 3, "max_tokens": 1},
        {"max_tokens": 5, "min_tokens": 5},
    ],
    ids=str,
)
def test_it_decodes_as_it_is_told(options, tmp_path: Path):
    folder = COMMITTED / "cnn-lstm"
    export_file(folder, out := tmp_path / "captioner.onnx", decoding=options)
    session, captioner = opened(out), Captioner.load(folder, threads=1)
    for seed in range(20, 26):
        agrees(session, captioner, draw_photo(seed), **options)


def test_a_decoder_with_attention_searches_with_beams(attention_artifact: Path, tmp_path: Path):
    options = {"num_beams": 3, "length_penalty": 2.0}
    export_file(attention_artifact, out := tmp_path / "captioner.onnx", decoding=options)
    session, captioner = opened(out), Captioner.load(attention_artifact, threads=1)
    for seed in range(30, 36):
        agrees(session, captioner, draw_photo(seed), **options)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundled") / "captioner.onnx"
    parity = export_file(BUNDLED_ARTIFACT, out)
    assert (parity.manifest.precision, parity.manifest.decoding.num_beams) == ("int8", 3)
    return out


def test_the_bundled_captioner_searches_as_its_manifest_says(bundled: Path):
    session, captioner = opened(bundled), Captioner.load(threads=1)
    for seed in range(60, 64):
        agrees(session, captioner, draw_photo(seed, (320, 256)))


def test_w8_keeps_the_size_of_int8_and_most_of_what_it_says(bundled: Path, tmp_path: Path, capsys):
    w8 = tmp_path / "w8.onnx"
    assert main(["graph", "--precision", "w8", "--out", str(w8)]) == 0
    printed = capsys.readouterr().out
    assert "w8, 3 beams" in printed and "16 of 16 captions identical to Captioner's" in printed
    assert "of captions and" in printed
    assert w8.stat().st_size < bundled.stat().st_size * 1.05
    used = {node.op_type for node in onnx.load(w8).graph.node}
    assert "Clip" in used and not used & {"QuantizeLinear", "DequantizeLinear"}
    sessions, same = (opened(bundled), opened(w8)), 0
    for seed in range(60, 64):
        one, two = (said(session, draw_photo(seed, (320, 256)))[0] for session in sessions)
        same += sum(a == b for a, b in zip(one, two, strict=False))
    assert same > 10
    facts = sessions[1].get_modelmeta().custom_metadata_map
    assert facts["precision"] == "w8" and json.loads(facts["decoding"])["num_beams"] == 3
    assert "16 of 16 images" in onnx.load(w8).doc_string


def test_neither_torch_nor_words_of_capexport_are_needed(tmp_path: Path):
    out = tmp_path / "captioner.onnx"
    code = (
        "import sys; sys.modules['torch'] = None; from capexport.cli import main; "
        f"sys.exit(main(['graph', {str(COMMITTED / 'cnn-lstm')!r}, '--out', {str(out)!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    onnx.checker.check_model(str(out), full_check=True)
    nodes = onnx.load(out).graph.node
    assert {node.domain for node in nodes} == {""}  # what every build of onnxruntime has
    assert all(node.name for node in nodes)
    with pytest.raises(Exception, match="Name:'image/rows'"):
        opened(out).run(None, {"image": np.zeros((0, 5, 3), np.uint8)})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([str(COMMITTED / "opt")], "one file holds a CNN-LSTM"),
        ([str(COMMITTED / "cnn-lstm"), "--precision", "w8"], "made of an int8 artifact"),
        ([str(COMMITTED / "cnn-lstm"), "--repetition-penalty", "1.2"], "no repetition penalty"),
        (["--num-return-sequences", "3"], "gives one caption"),
        ([str(COMMITTED / "cnn-lstm"), "--no-repeat-ngram-size", "2"], "words come again"),
    ],
)
def test_what_one_graph_cannot_do_is_refused(arguments, reason: str, tmp_path: Path, capsys):
    assert main(["graph", *arguments, "--out", str(tmp_path / "captioner.onnx")]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_few_photos_prove_nothing(tmp_path: Path, photos, capsys):
    (tmp_path / "mine.onnx").write_text("mine")
    assert main(["graph", "--out", str(tmp_path / "mine.onnx")]) == 2
    assert "already there" in capsys.readouterr().err
    assert (tmp_path / "mine.onnx").read_text() == "mine"
    with pytest.raises(OptionError, match="at least 16 photos, got 12"):
        export_file(COMMITTED / "cnn-lstm", tmp_path / "few.onnx", photos)


@pytest.mark.parametrize("fault", ["resampling", "words"])
def test_a_file_that_differs_never_appears(fault: str, tmp_path: Path, monkeypatch):
    made = single_file.single.single_graph

    def wrong(folder: Path, manifest) -> onnx.ModelProto:
        model = made(folder, manifest)
        if fault == "words":
            [words] = [t for t in model.graph.initializer if t.name == "vocabulary"]
            words.string_data[4:6] = words.string_data[5:3:-1]
        return model

    def wrong_head(spec: ImageSpec, *versions: int) -> onnx.ModelProto:
        return image_head(ImageSpec(spec.resize, spec.crop, resample="bicubic"), *versions)

    monkeypatch.setattr(single_file.single, "single_graph", wrong)
    if fault == "resampling":
        monkeypatch.setattr(single_file, "image_head", wrong_head)
    with pytest.raises(ParityError, match="captioned" if fault == "words" else "other values"):
        export_file(COMMITTED / "cnn-lstm", tmp_path / "captioner.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_artifact_of_links_is_read(link, artifact: Path, tmp_path: Path):
    """As the hub's cache holds artifacts, and as uv installs packages."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "linked").mkdir()
    for file in artifact.iterdir():
        shutil.copy(file, tmp_path / "cache")
        link(tmp_path / "cache" / file.name, tmp_path / "linked" / file.name)
    own, linked = (single_graph(p, Manifest.read(p)) for p in (artifact, tmp_path / "linked"))
    assert linked.SerializeToString() == own.SerializeToString()


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 5, 4), (5, 5), (1, 20000, 3)])
def test_arrays_that_hold_no_photo_are_errors_and_lines_are_captioned(shape, tmp_path: Path):
    for spec in (ImageSpec(), ImageSpec(resize=224, keep_aspect=False)):
        session = opened(image_head(spec, 20, 10).SerializeToString())
        if shape == (1, 20000, 3):
            assert session.run(None, {"image": np.zeros(shape, np.uint8)})[0].shape[1:] == (
                3, 224, 224,
            )  # fmt: skip
            continue
        with pytest.raises(Exception, match=r"(?i)invalid|reshape"):
            session.run(None, {"image": np.zeros(shape, np.uint8)})


def test_the_readmes_javascript_captions_as_python_does(bundled: Path, tmp_path: Path):
    node = shutil.which("node")
    wanted = "require('onnxruntime-node'); require('sharp')"
    if node is None or subprocess.run([node, "-e", wanted], capture_output=True).returncode:
        pytest.skip("needs node, `npm install onnxruntime-node sharp`, and NODE_PATH set to both")
    [snippet] = re.findall(r"```js\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippet.splitlines()) <= 20
    shutil.copy(bundled, tmp_path / "captioner.onnx")
    (tmp_path / "caption.js").write_text(snippet, encoding="utf-8")
    captioner = Captioner.load(threads=1)
    for seed in range(70, 73):
        draw_photo(seed, (320, 256)).save(tmp_path / "photo.png")
        done = subprocess.run(
            [node, "caption.js", "photo.png"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        caption = captioner.caption(tmp_path / "photo.png")
        text, _, probability = done.stdout.strip().rpartition(" ")
        assert text == caption.text
        assert float(probability) == pytest.approx(np.exp(caption.log_probability), rel=1e-3)


def test_large_jpegs_are_compared_whole(tmp_path: Path):
    """Of which a captioner would decode half the width and height."""
    files = [tmp_path / f"{seed}.jpg" for seed in range(16)]
    for seed, file in enumerate(files):
        noise = np.random.default_rng(seed).integers(0, 256, (120, 130, 3), np.uint8)
        Image.fromarray(noise).resize((1100, 1040)).save(file)
    parity = export_file(COMMITTED / "cnn-lstm", tmp_path / "captioner.onnx", files)
    assert parity.captions.max_log_probability_difference < 1e-5
