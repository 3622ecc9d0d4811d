"""`capexport lstm`: the graphs, their parity with PyTorch, and what stays behind on failure."""

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import assert_same, draw_photo, shapes

from capexport import Captioner, CheckpointError, OutputExistsError, ParityError
from capexport.beam import beam_search
from capexport.cli import main
from capexport.decoding import greedy_by_steps
from capexport.export import parity
from capexport.export.cnn_lstm import export_cnn_lstm
from capexport.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from capexport.models.torch_captioner import torch_captioner
from capexport.onnx_file import gather_graph, likeliest_graph
from capexport.preprocessing import ImageSpec
from capexport.sessions import CPU


def test_graphs_have_the_documented_inputs_and_outputs(artifact: Path, checkpoint: Checkpoint):
    hidden = ["batch", checkpoint.model.config.hidden_size]
    encoder = onnx.load(artifact / "encoder.onnx")
    onnx.checker.check_model(encoder, full_check=True)
    assert shapes(encoder.graph.input) == {"images": ["batch", 3, 224, 224]}
    assert shapes(encoder.graph.output) == {"hidden": hidden, "cell": hidden}
    step = onnx.load(artifact / "decoder_step.onnx")
    onnx.checker.check_model(step, full_check=True)
    assert shapes(step.graph.input) == {"tokens": ["batch"], "hidden": hidden, "cell": hidden}
    assert shapes(step.graph.output) == {
        "logits": ["batch", len(checkpoint.vocabulary)],
        "next_hidden": hidden,
        "next_cell": hidden,
    }
    loop = onnx.load(artifact / "decoder_loop.onnx")
    onnx.checker.check_model(loop, full_check=True)
    states = {"first_hidden": hidden, "first_cell": hidden}
    assert shapes(loop.graph.input) == {"max_tokens": [], "min_tokens": [], **states}
    assert shapes(loop.graph.output) == {
        "words": ["steps", "batch"],
        "log_probabilities": ["batch"],
    }


def test_the_graph_that_reorders_a_state():
    model = onnx.load_from_string(gather_graph([(1, 4), (10, 2), (7, 1)] * 60))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Gather"] * 180


def test_the_graph_that_takes_the_likeliest_tokens():
    model = onnx.load_from_string(likeliest_graph())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["LogSoftmax", "Add", "TopK"]


def test_step_and_loop_share_their_weights(artifact: Path):
    graphs = [artifact / f"decoder_{name}.onnx" for name in ("step", "loop")]
    weights = (artifact / "decoder.data").stat().st_size
    assert sum(graph.stat().st_size for graph in graphs) < 0.5 * weights + 30_000


def test_captions_equal_pytorch_on_images_the_export_did_not_see(
    artifact: Path, checkpoint: Checkpoint
):
    images = [draw_photo(seed) for seed in range(100, 140)]
    exported = Captioner.load(artifact)
    batched = [exported.caption(images, batch_size=size) for size in (1, 7)]
    forms = [{"encoder": form, "channels_last": False} for form in ("folded", "frozen")]
    for variant in ({}, {"channels_last": False}, {"step_by_module": True}, *forms):
        wanted = torch_captioner(copy.deepcopy(checkpoint), **variant).caption(images)
        assert len({caption.tokens for caption in wanted}) > 10
        for captions in batched:
            assert_same(captions, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2}, {"num_beams": 3, "early_stopping": True, "num_return_sequences": 3},
        {"num_beams": 5, "early_stopping": "never", "length_penalty": 0.3, "min_tokens": 4},
        {
            "num_beams": 3, "length_penalty": -1.0, "no_repeat_ngram_size": 2, "max_tokens": 9,
            "min_tokens": 2, "num_return_sequences": 2,
        },
    ],
)  # fmt: skip
def test_beams_equal_pytorchs(artifact: Path, checkpoint: Checkpoint, options: dict):
    images = [draw_photo(seed) for seed in range(100, 112)]
    wanted = torch_captioner(checkpoint).caption(images, **options)
    captions = Captioner.load(artifact).caption(images, batch_size=5, **options)
    assert len({a.tokens for caption in wanted for a in caption.alternatives}) > 4
    for one, other in zip(captions, wanted, strict=True):
        assert [a.tokens for a in one.alternatives] == [a.tokens for a in other.alternatives]
        np.testing.assert_allclose(
            [a.score for a in one.alternatives],
            [a.score for a in other.alternatives],
            rtol=1e-3, atol=1e-3,
        )  # fmt: skip


def by_row_and_step(predicted, targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The logits of all captions, (rows, steps, vocabulary), zeros for padding."""
    logits = torch.zeros(*targets.shape, predicted.logits.shape[1])
    for row in range(len(targets)):
        mine = predicted.rows == row
        assert predicted.targets[mine].tolist() == targets[row, : lengths[row]].tolist()
        logits[row, : lengths[row]] = predicted.logits[mine]
    return logits


def test_training_with_attention_takes_the_same_steps(attention_checkpoint: Checkpoint):
    """Two captions of each photo at once, against `start` and `step` of each alone."""
    model = attention_checkpoint.model
    captions = torch.tensor([[1, 5, 6, 7, 2], [1, 9, 2, 0, 0], [1, 4, 8, 2, 0], [0] * 5])
    lengths = torch.tensor([5, 3, 4, 2])
    maps = torch.randn(2, 1280, 3, 4)
    with torch.no_grad():
        predicted = model.decoder(maps, captions, lengths)
        logits = by_row_and_step(predicted, captions[:, 1:], lengths - 1)
        state = model.decoder.start(maps.repeat_interleave(2, dim=0))
        for position in range(4):
            stepped, state = model.decoder.step(captions[:, position], state)
            alive = lengths > position + 1
            torch.testing.assert_close(stepped[alive], logits[alive, position])
            torch.testing.assert_close(
                state["attention"][alive], predicted.attention[alive, position]
            )


def test_attention_is_that_of_pytorch(attention_checkpoint: Checkpoint):
    """One step against `scaled_dot_product_attention` of the projected regions."""
    model = attention_checkpoint.model
    decoder, heads = model.decoder, model.config.heads
    maps = torch.randn(3, 1280, 2, 5)
    regions = maps.flatten(2).transpose(1, 2)
    with torch.no_grad():
        state = decoder.start(maps)
        query, gate = decoder.query(state["hidden"]).chunk(2, dim=1)
        parts = (query[:, None], decoder.key(regions), decoder.value(regions))
        parts = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts]
        seen = torch.nn.functional.scaled_dot_product_attention(*parts).flatten(1)
        one_each = torch.eye(10).expand(3, heads, 10, 10)
        weights = torch.nn.functional.scaled_dot_product_attention(*parts[:2], one_each)
        context, attention = decoder._look(state)
    torch.testing.assert_close(context, seen * gate.sigmoid())
    torch.testing.assert_close(attention, weights.mean(1)[:, 0])


def test_an_exported_captioner_looks_where_pytorch_does(
    attention_checkpoint: Checkpoint, attention_artifact: Path, photos
):
    manifest = json.loads((attention_artifact / "manifest.json").read_text())
    assert manifest["regions"] == [7, 7]
    assert manifest["parity"]["captions"]["distinct"] > 5
    exported = Captioner.load(attention_artifact)
    assert exported.decoder.constant == {"keys", "values"}
    loop = onnx.load(attention_artifact / "decoder_loop.onnx").graph
    [node] = [node for node in loop.node if node.op_type == "Loop"]
    assert not [name for name in node.input if "keys" in name or "values" in name]
    for options in ({}, {"num_beams": 3}):
        wanted = torch_captioner(attention_checkpoint).caption(photos, attention=True, **options)
        for one, other in zip(
            exported.caption(photos, attention=True, **options), wanted, strict=True
        ):
            assert one.tokens == other.tokens
            np.testing.assert_allclose(one.attention, other.attention, atol=2e-3)


def test_attention_in_8_bits(
    attention_checkpoint: Checkpoint, attention_artifact: Path, tmp_path: Path
):
    """The step graph alone: random weights of 50 convolutions leave little of an image."""
    from capexport.export import int8

    for name in ("decoder_step.onnx", "decoder.data"):
        shutil.copy(attention_artifact / name, tmp_path)
    state = json.loads((attention_artifact / "manifest.json").read_text())["state"]
    with torch.no_grad():
        features = attention_checkpoint.model.start(torch.randn(4, 3, 224, 224))
    feeds = {name: value.numpy() for name, value in features.items()}
    path = tmp_path / "decoder_step.onnx"
    tokens = np.array([1, 5, 9, 13])
    outputs = ["logits", "attention", *state.values()]
    wanted = CPU.open(path).run({"tokens": tokens, **feeds}, outputs)
    int8.quantize_static(path, [{"tokens": tokens, **feeds}])
    got = CPU.open(path).run({"tokens": tokens, **feeds}, outputs)
    for name, value in wanted.items():
        assert parity.relative_error(value, got[name]) < 0.2, name
    kinds = {t.name: t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) == 2}
    assert set(kinds.values()) <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    assert any(name.startswith("decoder.embedding.weight.rows") for name in kinds)


def test_training_takes_the_same_steps(checkpoint: Checkpoint):
    """`forward` (packed, for training) against `start` and `step`, logits by logits."""
    model = checkpoint.model
    captions = torch.tensor([[1, 5, 6, 7, 2], [1, 9, 2, 0, 0], [1, 4, 8, 2, 0]])
    lengths = torch.tensor([5, 3, 4])
    with torch.no_grad():
        feature = torch.randn(3, model.config.embed_size)
        predicted = model.decoder(feature, captions, lengths)
        logits = by_row_and_step(predicted, captions, lengths)
        for by_module in (False, True):
            model.decoder.step_by_module = by_module
            state = model.decoder.start(feature)
            torch.testing.assert_close(model.decoder.output(state["hidden"]), logits[:, 0])
            for position in range(4):
                stepped, state = model.decoder.step(captions[:, position], state)
                alive = lengths > position + 1
                torch.testing.assert_close(stepped[alive], logits[alive, position + 1])
        model.decoder.step_by_module = False


def test_the_manifest_reports_parity_and_provenance(artifact: Path, checkpoint: Checkpoint):
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["parity"]["captions"]["images"] == 16
    assert manifest["parity"]["captions"]["identical"] == 16
    assert manifest["parity"]["captions"]["distinct"] > 5
    assert set(manifest["parity"]["max_difference"]) == {"encoder.onnx", "decoder_step.onnx"}
    assert manifest["provenance"]["checkpoint_sha256"] == checkpoint.sha256
    assert (
        manifest["provenance"]["opset"]
        == onnx.load(artifact / "encoder.onnx").opset_import[0].version
    )
    assert torch.__version__.startswith(manifest["provenance"]["versions"]["torch"])


@pytest.mark.parametrize("broken", ["encoder", "decoder", "preprocessing"])
def test_a_broken_export_leaves_nothing(
    broken: str, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The graph of a slightly different model, or other pixels, must be found out."""
    from capexport.export import cnn_lstm

    wrong = copy.deepcopy(tiny_checkpoint.model)
    if broken == "encoder":
        wrong.encoder.linear.weight.data *= 1.05
    else:
        wrong.decoder.lstm.bias_hh_l0.data[5] += 0.05
    real = cnn_lstm.export_graph

    def export_wrong_graph(module, inputs, input_names, output_names, path):
        if broken == "encoder" and path.name == "encoder.onnx":
            module = cnn_lstm._EncoderGraph(wrong)
        if broken == "decoder" and path.name == "decoder_step.onnx":
            module = cnn_lstm._StepGraph(wrong)
        if broken == "preprocessing" and path.name == "encoder.onnx":
            module = torch.nn.Sequential(torch.nn.Upsample(scale_factor=1), module)
            module[0].forward = lambda images: images.flip(1)
        real(module, inputs, input_names, output_names, path)

    monkeypatch.setattr(cnn_lstm, "export_graph", export_wrong_graph)
    with pytest.raises(ParityError, match=r"\.onnx: .* differs from PyTorch by"):
        export_cnn_lstm(tiny_checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_captions_are_compared_too(artifact: Path, checkpoint: Checkpoint):
    exported = Captioner.load(artifact)
    images = parity.seeded_images()
    wanted = torch_captioner(checkpoint).caption(images)
    report = parity.compare_captions(wanted, exported, images)
    assert report.identical == 16
    limit = wanted[0].tokens
    exported.options = type(exported.options)(
        **{**vars(exported.options), "max_tokens": len(limit) - 1}
    )
    with pytest.raises(ParityError, match="by PyTorch"):
        parity.compare_captions(wanted, exported, images)


@pytest.mark.parametrize(
    "changes", [{}, {"max_tokens": 3}, {"min_tokens": 7}, {"max_tokens": 9, "min_tokens": 9}]
)
def test_the_loop_is_the_steps_in_one_graph(artifact: Path, checkpoint: Checkpoint, changes: dict):
    exported = Captioner.load(artifact)
    options = dataclasses.replace(exported.options, **changes)
    pixels = np.stack([exported.preprocess(draw_photo(seed)) for seed in range(20, 31)])
    features = exported.encoder(pixels)
    looped = exported.decoder.greedy(features, options)
    stepped = greedy_by_steps(exported.decoder, features, options)
    assert [h.tokens for h in looped] == [h.tokens for h in stepped]
    assert len({len(h.tokens) for h in looped}) > 1 or "max_tokens" in changes
    np.testing.assert_allclose(
        [h.log_probability for h in looped], [h.log_probability for h in stepped], rtol=1e-4
    )
    # What the loop was not built for goes step by step.
    for other in (
        {"repetition_penalty": 1.5}, {"suppress_tokens": (0, 1, 3, 4)}, {"no_repeat_ngram_size": 3}
    ):  # fmt: skip
        assert exported.decoder.greedy(features, dataclasses.replace(options, **other)) is None


class Looking(torch.nn.Module):
    """A captioner whose state has other names, ranks and types than the CNN-LSTM's: a part of it,
    the image's regions, stays as it is from step to step."""

    constant, shared = frozenset({"regions"}), frozenset()
    attends = False

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(words, 16)
        self.mix = torch.nn.Linear(48, 16)
        self.output = torch.nn.Linear(16, words)

    encoder = decoder = property(lambda self: self)

    def start(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        regions = images.flatten(1).unflatten(1, (6, 32))[:, :, :16]
        age = torch.zeros_like(images[:, 0, 0, 0], dtype=torch.int64)
        return {"query": regions.mean(1), "regions": regions, "age": age}

    def step(self, tokens: torch.Tensor, state: dict[str, torch.Tensor]):
        query, regions, age = state["query"], state["regions"], state["age"]
        weights = (regions @ query[:, :, None]).softmax(1)
        context = (weights * regions).sum(1)
        query = torch.cat([query, context, self.embedding(tokens)], 1)
        query = torch.tanh(3 * self.mix(query)) * torch.cos(age.float())[:, None]
        return 4 * self.output(query), {"query": query, "regions": regions, "age": age + 1}


def test_a_state_is_whatever_tensors_a_decoder_names(checkpoint: Checkpoint, tmp_path: Path):
    from capexport.artifact import record_files
    from capexport.captioner import open_artifact
    from capexport.export import cnn_lstm

    torch.manual_seed(3)
    other = copy.copy(checkpoint)
    other.image = ImageSpec(resize=8, crop=8)
    other.model = Looking(len(checkpoint.vocabulary)).eval()
    with torch.no_grad():
        state = cnn_lstm._export_graphs(other, tmp_path)
    assert state == {"query": "next_query", "age": "next_age"}
    words = json.dumps(checkpoint.vocabulary.words)
    (tmp_path / "vocabulary.json").write_text(words)
    manifest = cnn_lstm._manifest(other, state)
    manifest = dataclasses.replace(manifest, files=record_files(tmp_path))
    exported = open_artifact(tmp_path, manifest, CPU)
    assert exported.decoder.constant == {"regions"}
    pixels = np.random.default_rng(0).normal(size=(12, 3, 8, 8)).astype(np.float32)
    features = exported.encoder(pixels)
    reference = torch_captioner(other)
    wanted = greedy_by_steps(reference.decoder, reference.encoder(pixels), exported.options)
    looped = exported.decoder.greedy(features, exported.options)
    stepped = greedy_by_steps(exported.decoder, features, exported.options)
    assert [h.tokens for h in looped] == [h.tokens for h in wanted]
    assert [h.tokens for h in stepped] == [h.tokens for h in wanted]
    assert len({len(h.tokens) for h in wanted}) > 3
    beams = dataclasses.replace(exported.options, num_beams=3, num_return_sequences=2)
    found = beam_search(exported.decoder, features, beams)
    wanted = beam_search(reference.decoder, reference.encoder(pixels), beams)
    assert [[h.tokens for h in each] for each in found] == [
        [h.tokens for h in each] for each in wanted
    ]
    loop = onnx.load(tmp_path / "decoder_loop.onnx").graph
    [node] = [node for node in loop.node if node.op_type == "Loop"]
    assert len(node.input) == 2 + 5  # trip count, condition; tokens, query, age, ended, log


@pytest.mark.parametrize("threads", [1, 2])
def test_what_the_encoder_says_of_an_image_does_not_depend_on_its_batch(
    artifact: Path, attention_artifact: Path, threads: int
):
    """To the bit: in 8 bits, the last one may tip a step."""
    for folder in (artifact, attention_artifact):
        encoder = Captioner.load(folder, threads=threads).encoder
        size = encoder.graph.inputs["images"].shape[2]
        images = np.random.default_rng(0).normal(size=(7, 3, size, size)).astype(np.float32)
        together = encoder(images)
        for number in range(len(images)):
            for name, values in encoder(images[number : number + 1]).items():
                np.testing.assert_array_equal(values[0], together[name][number], name)


def test_the_checkpoint_stays_as_it_is(checkpoint: Checkpoint):
    def describe() -> list[object]:
        model = checkpoint.model
        return [
            model.training, model.decoder.step_by_module, model.start, model.decoder.step,
            *((n, t.stride(), t.device, t.data_ptr()) for n, t in model.state_dict().items()),
        ]  # fmt: skip

    checkpoint.model.train()
    before = describe()
    try:
        captioner = torch_captioner(checkpoint, step_by_module=True, channels_last=True)
        captioner.caption(draw_photo(1))
        assert describe() == before
    finally:
        checkpoint.model.eval()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parity_takes_no_nan(value: float):
    wanted = {"logits": np.ones((2, 3), np.float32)}
    got = {"logits": np.array([[1, 1, 1], [1, 1, value]], np.float32)}
    for one, other in ((wanted, got), (got, wanted), (got, got)):
        with pytest.raises(ParityError, match="differs from PyTorch"):
            parity.compare_outputs("step.onnx", one, other)
        assert not parity.relative_error(one["logits"], other["logits"]) <= 1


def test_command_line(checkpoint: Checkpoint, photos: list[Path], tmp_path: Path, capsys):
    folder = checkpoint.training["folder"]
    out = tmp_path / "out"
    more = [tmp_path / f"more_{seed}.png" for seed in range(4)]
    for seed, path in enumerate(more):
        draw_photo(50 + seed).save(path)
    paths = [str(path) for path in (*photos, *more)]
    assert main(["lstm", folder, "--out", str(out), "--photos", *paths]) == 0
    assert "16 of 16 captions identical" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["parity"]["inputs"] == "photos"
    before = sorted(path.stat().st_mtime_ns for path in out.iterdir())
    assert main(["lstm", folder, "--out", str(out)]) == 2
    assert "already there" in capsys.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in out.iterdir()) == before
    assert main(["lstm", folder, "--out", str(tmp_path / "x"), "--photos", *paths[:3]]) == 2
    assert "at least 16 photos" in capsys.readouterr().err
    assert main(["lstm", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "no checkpoint.json" in capsys.readouterr().err


def test_without_onnxruntime_nothing_is_begun(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["lstm", checkpoint.training["folder"], "--out", str(tmp_path / "out")]) == 2
    assert "capexport[cpu]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_kill_in_mid_export(checkpoint: Checkpoint, tiny_checkpoint: Checkpoint, tmp_path: Path):
    out = tmp_path / "out"
    folder = checkpoint.training["folder"]
    command = [sys.executable, "-m", "capexport", "lstm", folder, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.*.partial/encoder.onnx")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    export_cnn_lstm(tiny_checkpoint, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputExistsError):
        export_cnn_lstm(tiny_checkpoint, out)


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(copy.copy(checkpoint), tmp_path / "saved")
    return tmp_path / "saved"


def test_checkpoints_round_trip_and_are_replaced_whole(saved: Path, checkpoint: Checkpoint):
    again = load_checkpoint(saved)
    assert again.vocabulary == checkpoint.vocabulary
    assert again.image == checkpoint.image
    for name, value in checkpoint.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=0, atol=0)
    save_checkpoint(again, saved, torch.float16)
    assert len(list(saved.iterdir())) == 2
    halved = load_checkpoint(saved)
    weight = halved.model.decoder.output.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, again.model.decoder.output.weight.half().float())


@pytest.mark.parametrize("decoding", [{"num_beams": 0}, {"beams": 3}])
def test_a_checkpoints_decoding_is_checked_when_it_is_read(decoding, saved: Path):
    path = saved / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoding": decoding}))
    with pytest.raises(CheckpointError, match=f"{path}: damaged checkpoint: .*beams"):
        load_checkpoint(saved)


def test_damaged_checkpoints_are_refused(saved: Path):
    [weights] = saved.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="not the file"):
        load_checkpoint(saved)
    weights.unlink()
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        load_checkpoint(saved)
    path = saved / "checkpoint.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "schema": 7}))
    with pytest.raises(CheckpointError, match="schema 7"):
        load_checkpoint(saved)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document["vocabulary"].pop(), "words in the vocabulary of a model of"),
        (lambda document: document["vocabulary"].__setitem__(5, 7), "vocabulary"),
        (lambda document: document["config"].update(hidden_size="24"), "config.hidden_size"),
        (lambda document: document["config"].update(hidden_size=25), "hidden_size must be"),
        (lambda document: document["config"].update(layers=2), "layers"),
        (lambda document: document.pop("metrics"), "it says no 'metrics'"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(change, message: str, saved: Path):
    path = saved / "checkpoint.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=f"{path}: damaged checkpoint: .*{message}"):
        load_checkpoint(saved)


@pytest.mark.parametrize("operator", ["ReduceMax", "Reduce\udcff"])
def test_a_hostile_graph_is_refused_without_a_word(operator: str, tmp_path: Path):
    """Too much memory is wanted, and an operator's name is no UTF-8."""
    shape = onnx.numpy_helper.from_array(np.array([1 << 62]), "shape")
    nodes = [
        onnx.helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        onnx.helper.make_node("ReduceMax", ["zeros"], ["y"], keepdims=0),
    ]
    outputs = [onnx.helper.make_tensor_value_info("y", 1, [])]
    graph = onnx.helper.make_graph(nodes, "bomb", [], outputs, [shape])
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    name = operator.ljust(9, "x").encode(errors="surrogateescape")
    path = tmp_path / "bomb.onnx"
    path.write_bytes(model.SerializeToString().replace(b"ReduceMax", name))
    code = (
        "import sys; from pathlib import Path; from capexport.sessions import CPU, ArtifactError\n"
        "try: CPU.open(Path(sys.argv[1])).run({}, ['y'])\n"
        "except ArtifactError as error: sys.exit(0 if sys.argv[1] in str(error) else 'unnamed')\n"
        "sys.exit('not refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_runtime_captions_where_torch_cannot_be_imported():
    """All of its tests pass in an environment without torch: test_wheel.py."""
    tests = [f"tests/runtime/test_{name}.py" for name in ("captioner", "blip2", "beam")]
    blocked = [
        "torch", "torchvision", "transformers", "optimum", "onnx", "onnxscript", "safetensors"
    ]  # fmt: skip
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); import pytest; "
        f"sys.exit(pytest.main([*{tests}, '-p', 'no:cacheprovider']))"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout
    assert " passed" in outcome.stdout
