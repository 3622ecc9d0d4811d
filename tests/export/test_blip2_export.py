"""`capexport blip2`: graphs, parity with `generate()`, and what stays behind on failure."""

import copy
import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from blip2_models import POSITIONS, QUERIES, TEXTS, VISION
from conftest import PROMPTS, assert_same, draw_photo, every_mode, shapes
from onnx import helper
from optimum.exporters.onnx import convert
from safetensors.torch import load_file, save_file
from transformers import Blip2Processor

from benchmarks.random_blip2 import processor as random_processor
from capexport import (
    ArtifactNotFoundError,
    Captioner,
    CheckpointError,
    DownloadError,
    OutputExistsError,
    ParityError,
)
from capexport.cli import main
from capexport.export import blip2, quantize
from capexport.export.blip2 import (
    export_blip2,
    export_patches,
    relative_error,
    token_agreement,
)
from capexport.metrics import score
from capexport.models.blip2 import HuggingFaceCaptioner
from capexport.models.blip2_checkpoint import (
    Weights,
    find_checkpoint,
    meta_model,
    read_checkpoint,
)
from capexport.sessions import CPU

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., Path]
KINDS = list(TEXTS)
LANGUAGES = ["opt", "t5"]
IMAGES = [draw_photo(seed, (60, 50)) for seed in range(200, 206)]


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_those_of_generate(kind: str, blip2_checkpoint: Make, blip2_export: Make):
    wanted, exported = (
        HuggingFaceCaptioner.load(blip2_checkpoint(kind)),
        Captioner.load(blip2_export(kind)),
    )
    settings = [
        ({}, {}),
        ({"max_tokens": 7}, {}),
        ({"min_tokens": 9}, {"min_new_tokens": 9}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    ]
    said, lengths = set(), set()
    for batch, prompt, (ours, theirs) in itertools.product(
        (1, 3), (None, "a photo of", PROMPTS), settings
    ):
        prompts = prompt[:batch] if isinstance(prompt, list) else prompt
        for start in range(0, 2 * batch, batch):
            images = IMAGES[start : start + batch]
            limit = ours.get("max_tokens")
            # In a batch generate() counts the padding of its neighbours' prompts as said.
            size = 1 if "repetition_penalty" in theirs else batch
            expected = wanted.caption(
                images, prompt=prompts, max_tokens=limit, batch_size=size, **theirs
            )
            captions = exported.caption(images, prompt=prompts, **ours)
            assert_same(captions, expected)
            said.update(c.tokens for c in captions)
            lengths.update(len(c.tokens) for c in captions)
    assert len(said) > 15, "the captions must vary for this test to mean something"
    assert len(lengths) > 4, "and end at different steps"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_image_decides(language: str, blip2_export: Make):
    captions = Captioner.load(blip2_export(language)).caption(IMAGES, prompt="a photo of")
    assert len({caption.tokens for caption in captions}) >= 4


def test_up_to_the_position_limit(blip2_checkpoint: Make, blip2_export: Make):
    wanted = HuggingFaceCaptioner.load(blip2_checkpoint("opt"))
    exported = Captioner.load(blip2_export("opt"))
    length = exported.text.frame(["two"], 1).tokens.shape[1]
    room = POSITIONS + 1 - length  # the last token is never fed
    options = {"prompt": "two", "max_tokens": room}
    [expected] = wanted.caption(IMAGES[:1], **options, min_new_tokens=room)
    [caption] = exported.caption(IMAGES[:1], **options, min_tokens=room)
    assert caption.tokens == expected.tokens
    assert len(caption.tokens) == room
    with pytest.raises(ValueError, match=f"leaves room for {room} of the model's {POSITIONS}"):
        exported.caption(IMAGES[0], prompt="two", max_tokens=room + 1)
    with pytest.raises(ValueError, match="leaves room for 0"):
        exported.caption(IMAGES[0], prompt="z" * POSITIONS)
    # The default bound yields to the limit, as it does in generate().
    long = "z" * (POSITIONS - QUERIES - 6)
    assert len(exported.caption(IMAGES[0], prompt=long).tokens) <= 6


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_framed_as_the_processor_does(
    kind: str, blip2_checkpoint: Make, blip2_export: Make
):
    exported = Captioner.load(blip2_export(kind))
    folder = blip2_checkpoint(kind)
    stored = Blip2Processor.from_pretrained(folder)
    assert stored.num_query_tokens == (None if kind == "opt-old" else QUERIES)
    processor = read_checkpoint(folder).processor
    texts = [*PROMPTS, "", " spaces  and été 犬 ", "ends in a line\n"]
    inputs = processor(images=[IMAGES[0]] * 6, text=texts, padding=True, return_tensors="np")
    prompts = exported.text.frame(texts, 6)
    np.testing.assert_array_equal(prompts.tokens, inputs["input_ids"])
    np.testing.assert_array_equal(prompts.mask, inputs["attention_mask"])
    for row in prompts.tokens:
        [text] = processor.batch_decode(row[None], skip_special_tokens=True)
        assert exported.text.decode(row.tolist()) == text.strip()


def test_decoding_cleans_up_spaces_where_the_tokenizer_does(blip2_export: Make):
    from dataclasses import replace

    tokenizer = Captioner.load(blip2_export("opt")).text
    text = "it 's a dog , isn 't it ? we 've seen the dogs ' tails ."
    tokens = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokens) == text
    tokenizer.spec = replace(tokenizer.spec, clean_up_spaces=True)
    folder_tokenizer = random_processor("opt", 28, QUERIES).tokenizer
    wanted = folder_tokenizer.decode(tokens, clean_up_tokenization_spaces=True)
    assert tokenizer.decode(tokens) == wanted.strip() != text


@pytest.mark.parametrize("mode", every_mode())
def test_pixels_are_those_of_the_processor(mode: str, blip2_checkpoint: Make, blip2_export: Make):
    image, meant = every_mode()[mode]
    folder = blip2_checkpoint("opt")
    processor = read_checkpoint(folder).processor
    pixels = Captioner.load(blip2_export("opt")).preprocess(image)
    wanted = processor(images=meant, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(pixels, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("language", LANGUAGES)
def test_graphs_have_the_documented_inputs_and_outputs(language: str, blip2_export: Make):
    folder = blip2_export(language)
    graphs = {path.stem: onnx.load(path).graph for path in folder.glob("*.onnx")}
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
        assert {
            entry.value
            for tensor in onnx.load(path, load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        } == {f"{path.name}.data"}
    size, hidden, heads, width = VISION["image_size"], 32, 4, 8
    sequence = ["batch_size", "sequence_length"]
    vision = graphs.pop("vision_encoder")
    assert shapes(vision.input) == {"pixel_values": ["batch_size", 3, size, size]}
    assert shapes(vision.output) == {"image_features": ["batch_size", QUERIES, hidden]}
    embed = graphs.pop("embed_tokens")
    assert shapes(embed.input) == {"input_ids": sequence}
    assert shapes(embed.output) == {"inputs_embeds": [*sequence, hidden]}
    step = graphs.pop("decoder_model_merged")
    owner = ".decoder" if language == "t5" else ""
    layers = [f"{i}{owner}.{kind}" for i in range(2) for kind in ("key", "value")]
    past = {f"past_key_values.{x}": ["batch_size", heads, "past_length", width] for x in layers}
    encoded = ["batch_size", heads, "encoder_length", width]
    mask = {"attention_mask": ["batch_size", "total_length"]}
    if language == "t5":
        cross = [x.replace("decoder", "encoder") for x in layers]
        past |= {f"past_key_values.{x}": encoded for x in cross}
        mask = {"encoder_attention_mask": ["batch_size", "encoder_length"]}
        encoder = graphs.pop("encoder_model")
        assert shapes(encoder.input) == {
            "inputs_embeds": [*sequence, hidden], "attention_mask": sequence
        }  # fmt: skip
        assert shapes(encoder.output) == {
            f"past_key_values.{x}": ["batch_size", heads, "sequence_length", width] for x in cross
        }
    assert shapes(step.input) == {"inputs_embeds": [*sequence, hidden], **mask, **past}
    assert shapes(step.output) == {
        "logits": ["batch_size", 340],
        **{f"present.{x}": ["batch_size", heads, "total_length", width] for x in layers},
    }
    assert not graphs
    names = {tensor.name for tensor in step.initializer}
    layer = "block.0.layer.0.SelfAttention" if language == "t5" else "layers.0.self_attn"
    assert {f"decoder.{layer}.qkv_weight", "lm_head.weight"} <= names
    content = b"".join(path.read_bytes() for path in folder.glob("*.onnx"))
    assert b"site-packages" not in content


@pytest.mark.parametrize("kind", ["opt", "opt-old", "t5", "t5-tied"])
def test_attention_norms_and_activations_are_one_node_each(kind: str, blip2_export: Make):
    def count(name: str) -> Counter[str]:
        graph = onnx.load(blip2_export(kind) / f"{name}.onnx", load_external_data=False).graph
        return Counter(node.op_type for node in graph.node)

    vision, step = count("vision_encoder"), count("decoder_model_merged")
    assert vision["MultiHeadAttention"] == 2
    assert vision["SkipLayerNormalization"] >= 2 * 2
    assert (
        vision["Softmax"] == 3
    )  # the Q-Former's, of 4 queries: two layers, one of cross-attention
    assert vision["Gelu"] == 4
    graphs = [step]
    if kind.startswith("opt"):
        assert step["MultiHeadAttention"] == 2
        assert step["SkipLayerNormalization"] == 4
        assert step["LayerNormalization"] == 1  # behind the sum with the positions
        # Of each layer: queries, keys and values together; attention's output; two of the rest.
        assert step["FusedMatMul"] == 2 * 4 + 1
    else:
        assert step["MultiHeadAttention"] == 4  # of itself and of the encoder
        assert step["FusedMatMul"] == 2 * (2 + 2 + (2 if kind == "t5-tied" else 3)) + 1
        graphs.append(count("encoder_model"))
        assert graphs[1]["MultiHeadAttention"] == 2
    for counts in graphs:
        assert not {"Softmax", "Gemm", "Tanh", "Reciprocal"} & set(counts)
        # Keys and values are neither transposed nor joined to the past outside of the attention.
        assert counts["Concat"] + counts["Transpose"] < 8


def test_every_weight_is_stored_once(blip2_export: Make, blip2_checkpoint: Make):
    """But for OPT's embedding, which is also its projection to the vocabulary."""
    for language, twice in (("opt", 340 * 32 * 4), ("t5", 0)):
        folder, checkpoint = blip2_export(language), blip2_checkpoint(language)
        stored = sum(file.stat().st_size for file in folder.glob("*.data"))
        weights = sum(
            t.nbytes for f in checkpoint.glob("*.safetensors") for t in load_file(f).values()
        )
        assert stored <= weights + twice + 4096


PATCHED = [
    (torch.onnx, "export"), (torch.nn.Linear, "forward"),
    (convert, "check_model_uses_external_data"), (convert, "maybe_save_preprocessors"),
]  # fmt: skip
BEFORE = [getattr(owner, name) for owner, name in PATCHED]


def test_optimum_validates_and_nothing_stays_patched(blip2_export: Make):
    blip2_export("t5")
    assert blip2_export.validated["t5", "fp32"] == [None] * 4  # what it finds wrong it raises
    assert [getattr(owner, name) for owner, name in PATCHED] == BEFORE
    with pytest.raises(RuntimeError, match="in between"), export_patches():
        raise RuntimeError("in between")
    assert [getattr(owner, name) for owner, name in PATCHED] == BEFORE


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_smaller_precisions_say_what_they_lose(
    language: str, precision: str, blip2_checkpoint: Make, blip2_export: Make
):
    exact, folder = Captioner.load(blip2_export(language)), blip2_export(language, precision)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["precision"] == precision
    parity = manifest["parity"]
    assert max(parity["relative_error"].values()) < parity["tolerance"]
    captions = parity["captions"]
    assert 0 < captions["logit_error"] < {"fp16": 0.02, "int8": 0.2, "int4": 0.6}[precision]
    assert 0 <= captions["token_agreement"] <= 1
    smaller = Captioner.load(folder)
    pixels = np.stack([exact.preprocess(image) for image in IMAGES])
    prompts = exact.text.frame(None, len(IMAGES))
    logits = [c.decoder.start(c.encoder(pixels), prompts)[0] for c in (exact, smaller)]
    assert relative_error(*logits) < 0.7 / {"fp16": 35, "int8": 3.5, "int4": 1}[precision]
    if precision == "fp16":
        agreement = token_agreement(exact.caption(IMAGES), smaller.caption(IMAGES))
        assert agreement > 0.7


def test_quantised_graphs_hold_what_their_precision_says(blip2_export: Make):
    for precision, bits in (("int8", 8), ("int4", 4)):
        folder = blip2_export("opt", precision)
        nodes = {
            name: onnx.load(folder / f"{name}.onnx", load_external_data=False).graph.node
            for name in ("vision_encoder", "decoder_model_merged")
        }
        kinds = {name: {node.op_type for node in found} for name, found in nodes.items()}
        assert not any("FusedMatMul" in found for found in kinds.values())
        assert "MatMulIntegerToFloat" in kinds["vision_encoder"]
        assert "MatMulNBits" not in kinds["vision_encoder"]
        assert not any("SkipLayerNormalization" in found for found in kinds.values())
        widths = {
            node.input[1].removesuffix(".packed"): helper.get_node_attr_value(node, "bits")
            for node in nodes["decoder_model_merged"]
            if node.op_type == "MatMulNBits"
        }
        assert widths.pop("lm_head.weight") == 8
        first = {name for name in widths if name.startswith("decoder.layers.0.")}
        assert len(first) == 4  # two products of the attention, two behind it
        assert {widths.pop(name) for name in first} == {8}
        assert set(widths.values()) == {bits}


def test_whole_rows_are_quantised_each_for_itself(blip2_export: Make, tmp_path: Path):
    source, target = blip2_export("opt") / "vision_encoder.onnx", tmp_path / "rows.onnx"
    quantize.quantize_graph(source, target, 8, many_rows=True)
    exact, rows = CPU.open(source), CPU.open(target)
    size = exact.inputs["pixel_values"].shape[-1]
    image = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    loud = np.concatenate([image, 1000 * image])  # of which one scale for all would tell nothing
    alone, beside, wanted = (
        graph.run({"pixel_values": images}, ["image_features"])["image_features"][0]
        for graph, images in ((rows, image), (rows, loud), (exact, image))
    )
    assert relative_error(alone, beside) < 1e-5
    assert 1e-5 < relative_error(wanted, alone) < 0.05
    black = rows.run({"pixel_values": np.zeros_like(image)}, ["image_features"])["image_features"]
    assert np.isfinite(black).all()


def test_a_product_of_a_product_is_quantised(tmp_path: Path):
    """Names of what belongs to one's output and to the other's input don't clash."""
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(16, 16)).astype(np.float32) for _ in range(2))
    make = onnx.helper.make_node
    nodes = [
        make("FusedMatMul", ["x", "first"], ["y"], domain="com.microsoft", transB=1),
        make("FusedMatMul", ["y", "second"], ["z"], domain="com.microsoft", transB=1),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, 1, ["rows", 16]) for n in "xz"]
    weights = [onnx.numpy_helper.from_array(first, "first")]
    weights.append(onnx.numpy_helper.from_array(second, "second"))
    graph = onnx.helper.make_graph(nodes, "twice", ends[:1], ends[1:], weights)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    external = {"save_as_external_data": True, "location": "x.onnx.data", "size_threshold": 0}
    onnx.save(model, tmp_path / "x.onnx", **external)
    quantize.quantize_graph(tmp_path / "x.onnx", tmp_path / "q.onnx", 8, many_rows=True)
    x = rng.normal(size=(3, 16)).astype(np.float32)
    [z] = CPU.open(tmp_path / "q.onnx").run({"x": x}, ["z"]).values()
    assert relative_error(x @ first.T @ second.T, z) < 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_near_the_exact_ones(bits: int, blip2_export: Make, tmp_path: Path):
    source = blip2_export("opt") / "decoder_model_merged.onnx"
    target = tmp_path / "quantised.onnx"
    quantize.quantize_graph(source, target, bits)
    exact = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    parts = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(target).graph.initializer}
    name = "decoder.layers.1.fc2.weight"  # 32 x 64: two blocks of 32, half a block of 128
    packed, scales, zeros = (parts[f"{name}.{kind}"] for kind in ("packed", "scales", "zeros"))
    if bits == 4:
        packed, zeros = (
            np.stack([half & 15, half >> 4], -1).reshape(*half.shape[:-1], -1)
            for half in (packed, zeros)
        )
    blocks = (packed.astype(np.float32) - zeros[:, :, None]) * scales[:, :, None]
    restored = blocks.reshape(32, -1)[:, :64]
    assert np.abs(restored - exact[name]).max() <= scales.max() * 0.51
    untouched = "decoder.final_layer_norm.bias"
    np.testing.assert_array_equal(parts[untouched], exact[untouched])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_with_long_rows_comes_in_pieces_and_says_the_same(
    bits: int, blip2_export: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = blip2_export("opt") / "decoder_model_merged.onnx"
    monkeypatch.setattr(quantize, "BLOCK_SIZES", {4: 16, 8: 16})
    results, products = [], []
    for columns in (64, 32, 20):  # rows have 32 or, behind the activation, 64
        monkeypatch.setattr(quantize, "_COLUMNS", columns)
        quantize.quantize_graph(source, target := tmp_path / f"{columns}.onnx", bits)
        graph = CPU.open(target)
        batch = {name: graph.empty(name, 2) for name in graph.inputs if "past" in name}
        embeds = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
        mask = np.ones((2, 5), np.int64)
        feeds = {**batch, "inputs_embeds": embeds, "attention_mask": mask}
        results.append(graph.run(feeds, ["logits"])["logits"])
        nodes = onnx.load(target, load_external_data=False).graph.node
        products.append(sum(node.op_type == "MatMulNBits" for node in nodes))
    assert products == [9, 7 + 2 * 2, 7 * 2 + 2 * 4]
    for result in results[1:]:
        assert relative_error(results[0], result) < 1e-5


def test_fp16_survives_what_overflows_a_naive_cast(blip2_checkpoint: Make, tmp_path: Path):
    """T5's feed-forward outputs grow beyond 65504 in trained models (HF issue 4586)."""
    folder = shutil.copytree(blip2_checkpoint("t5"), tmp_path / "large")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if re.search(r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wo\.weight", name):
                tensors[name] *= 50_000
        save_file(tensors, file)
    model = meta_model(read_checkpoint(folder).config)
    Weights(folder, tmp_path).fill(model, torch.float32)
    encoder = model.language_model.encoder
    inputs = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    largest = []
    encoder.block[0].register_forward_hook(lambda *call: largest.append(call[2][0].abs().max()))
    with torch.no_grad():
        exact = encoder(inputs_embeds=inputs).last_hidden_state
        naive = copy.deepcopy(encoder).half()(inputs_embeds=inputs.half()).last_hidden_state
    assert largest[0] > torch.finfo(torch.float16).max
    assert not relative_error(exact.numpy(), naive.float().numpy()) < 0.1
    manifest = export_blip2(folder, tmp_path / "out", "fp16")
    assert manifest.parity.relative_error["encoder_model.onnx"] < 0.02
    graph = onnx.load(tmp_path / "out" / "encoder_model.onnx").graph
    kept = {t.name: t.data_type for t in graph.initializer if ".wo.weight" in t.name}
    assert len(kept) == 2
    assert set(kept.values()) == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("wrong", ["vision_encoder", "decoder_model_merged", "generate"])
def test_a_broken_export_leaves_nothing(wrong: str, blip2_checkpoint: Make, tmp_path: Path):
    real = Weights.fill

    # What misreads the weights fills the graph and what the graph is compared with.
    def fill_wrongly(self, part, dtype):
        size = real(self, part, dtype)
        for name, parameter in part.named_parameters():
            if name.endswith(("fc1.bias", "lm_head.weight")):
                parameter.data = parameter.data.roll(1, 0)
        return size

    # The graph is right, and what it is compared with is another model's.
    def compare_wrongly(name, part, *rest):
        for parameter in part.parameters():
            if parameter.ndim == 2 and wrong in name:
                parameter.data = parameter.data.roll(1, 0)
        return compare(name, part, *rest)

    compare = blip2._compare
    folder = blip2_checkpoint("opt")
    with (
        mock.patch.object(Weights, "fill", fill_wrongly)
        if wrong == "generate"
        else mock.patch.object(blip2, "_compare", compare_wrongly),
        pytest.raises(ParityError, match=r"differs? from PyTorch"),
    ):
        export_blip2(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_command_line(
    blip2_checkpoint: Make, photos: list[Path], tmp_path: Path, capsys, monkeypatch, no_java
):
    folder, out = str(blip2_checkpoint("opt")), tmp_path / "out"
    humans = tmp_path / "humans.csv"
    rows = [f"{photo.name},a dog and a dog run in the snow" for photo in photos]
    humans.write_text("\n".join(["image,caption", *rows[1:]]))
    scored = ["--photos", *map(str, photos), "--references", str(humans)]
    for module in [name for name in sys.modules if name.startswith("onnxruntime.quantization")]:
        monkeypatch.delitem(sys.modules, module)
    command = ["blip2", "--model", folder, "--out", str(out), "--precision", "int8"]
    assert main([*command, *scored]) == 2
    assert f"1 photos without human captions, {photos[0].name}" in capsys.readouterr().err
    assert main([*command, *scored[-2:]]) == 2
    assert "--references are human captions of --photos" in capsys.readouterr().err
    humans.write_text("\n".join(["image,caption", *rows]))
    assert main([*command, *scored]) == 0
    output = capsys.readouterr()
    assert [line.split(":")[0] for line in output.out.splitlines()][1:] == ["PyTorch", "int8"]
    metrics = json.loads((out / "manifest.json").read_text())["parity"]["metrics"]
    said = HuggingFaceCaptioner.load(Path(folder)).caption(photos)
    human = {photo.name: ["a dog and a dog run in the snow"] for photo in photos}
    texts = {photo.name: caption.text for photo, caption in zip(photos, said, strict=True)}
    assert metrics["PyTorch"] == score(texts, human)
    assert metrics["int8"].keys() == metrics["PyTorch"].keys()
    assert "captions identical to generate()'s" in output.out
    assert [line.split(":")[0] for line in output.err.splitlines()] == [
        "[1/3] vision_encoder.onnx", "[2/3] embed_tokens.onnx", "[3/3] decoder_model_merged.onnx",
        "comparing captions with generate()",
    ]  # fmt: skip
    provenance = json.loads((out / "manifest.json").read_text())["provenance"]
    assert provenance["source"] == "opt"
    assert provenance["licence"] == "mit"
    assert set(provenance["checkpoint_sha256"]) == {
        file.name for file in Path(folder).glob("*.safetensors")
    }
    assert main(["blip2", "--model", folder, "--out", str(out)]) == 2
    assert "already there" in capsys.readouterr().err
    assert main(["inspect", str(out)]) == 0
    capsys.readouterr()
    with (out / "decoder_model_merged.onnx.data").open("r+b") as file:
        file.seek(5000)
        file.write(b"\0\1")
    assert main(["inspect", str(out)]) == 2
    assert "decoder_model_merged.onnx.data: altered" in capsys.readouterr().err


@pytest.fixture
def copied(blip2_checkpoint: Make, tmp_path: Path) -> Path:
    return shutil.copytree(blip2_checkpoint("opt"), tmp_path / "copied")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "architectures": ["InstructBlipForConditionalGeneration"],
                "model_type": "instructblip",
            },
            "InstructBlipForConditionalGeneration .*supported is",
        ),
        ({"architectures": ["Blip2ForImageTextRetrieval"]}, "Blip2ForImageTextRetrieval .*support"),
        ({"text_config": {"model_type": "gpt2"}}, "supported is"),
        ({"image_token_index": 7}, "another model's tokenizer"),
        ({"num_query_tokens": QUERIES + 1}, "another model's processor"),
    ],
)
def test_checkpoints_of_other_kinds_are_refused(copied: Path, changes, message: str, tmp_path):
    edit_config(copied, **changes)
    with pytest.raises(CheckpointError, match=message):
        export_blip2(copied, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [copied]


def test_damaged_checkpoints_are_refused(copied: Path, tmp_path: Path):
    files = sorted(copied.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"00001\.safetensors: damaged"):
        export_blip2(copied, tmp_path / "out")
    files[0].unlink()
    with pytest.raises(CheckpointError, match=r"00001\.safetensors not there, but .* names it"):
        export_blip2(copied, tmp_path / "out")
    (copied / "model.safetensors.index.json").unlink()
    files[1].unlink()
    with pytest.raises(CheckpointError, match="no safetensors there"):
        export_blip2(copied, tmp_path / "out")
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer can be loaded"):
        export_blip2(copied, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [copied]


def test_a_full_disk_in_mid_export(blip2_checkpoint: Make, tmp_path: Path):
    """A limit on file sizes stands for the disk: the embedding still fits, the decoder doesn't."""
    command = [sys.executable, "-m", "capexport", "blip2", "--model", blip2_checkpoint("t5")]
    outcome = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000)),
    )
    assert outcome.returncode == 2, outcome.stderr
    assert re.search(r"^capexport: .*out.*File too large|File too large.*out", outcome.stderr, re.M)
    assert "Traceback" not in outcome.stderr
    assert list(tmp_path.iterdir()) == []


def in_cache(hub: Path, model: str, folder: Path) -> str:
    """Put `folder` where a download of `model` would have."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    place = hub / f"models--{model.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    return revision


def test_offline_from_the_cache(
    hub: Path, blip2_checkpoint: Make, blip2_export: Make, capsys, monkeypatch
):
    assert main(["blip2", "--model", "someone/blip2-opt", "--out", str(hub / "out")]) == 2
    error = capsys.readouterr().err
    assert "someone/blip2-opt: cannot be downloaded, and is not in the cache" in error
    assert len(error.splitlines()) == 1
    for slip in ("not an id", f"{hub}/not-there"):
        with pytest.raises(CheckpointError, match="no such folder"):
            find_checkpoint(slip)
    monkeypatch.chdir(hub.parent)
    Path("artifacts").mkdir()
    with pytest.raises(ArtifactNotFoundError, match=r"no manifest\.json there"):
        Captioner.load("artifacts/slip")
    revision = in_cache(hub, "someone/blip2-opt", blip2_checkpoint("opt"))
    folder, source = find_checkpoint("someone/blip2-opt")
    assert source == {"source": "someone/blip2-opt", "revision": revision}
    assert read_checkpoint(folder).config.num_query_tokens == QUERIES

    with pytest.raises(DownloadError, match="someone/exported: no such folder, nor one"):
        Captioner.load("someone/exported")
    in_cache(hub, "someone/exported", blip2_export("opt"))
    tokens = Captioner.load("someone/exported").caption(IMAGES[0]).tokens
    assert tokens == Captioner.load(blip2_export("opt")).caption(IMAGES[0]).tokens


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    for module in ("optimum.exporters.onnx", "capexport.export.blip2"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    assert main(["blip2", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "capexport[cpu,export,blip2]" in error
    assert len(error.splitlines()) == 1


def test_an_existing_output_is_kept(blip2_checkpoint: Make, tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    with pytest.raises(OutputExistsError):
        export_blip2(blip2_checkpoint("opt"), tmp_path)
    assert list(tmp_path.iterdir()) == [precious]
