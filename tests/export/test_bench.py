import html
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from capexport import Captioner
from capexport.bench.cli import main, sample_photos
from capexport.models.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")  # capbench sets it for the whole process


def test_a_small_run(artifact: Path, checkpoint: Checkpoint, tmp_path: Path, capsys):
    files = {"--json": tmp_path / "result.json", "--markdown": tmp_path / "table.md"}
    arguments = [checkpoint.training["folder"], "--artifact", str(artifact), "--repeats", "2"]
    for option, file in files.items():
        arguments += [option, str(file)]
    assert main([*arguments, "--device", "cpu", "--threads", "1", "--batch-sizes", "1", "3"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads(files["--json"].read_text()) == result
    assert files["--markdown"].read_text().splitlines() == table
    assert [run["batch_size"] for run in result["runs"]] == [1, 3]
    for run in result["runs"]:
        assert set(run["paths"]) == {"PyTorch", "ONNX fp32"}
        assert 0 < run["paths"]["ONNX fp32"]["outside_graphs"] < 1
        for path in run["paths"].values():
            assert path["identical_captions"] == 1
            total = path["milliseconds"]["total"]
            parts = [path["milliseconds"][s]["p50"] for s in ("preprocess", "encode", "decode")]
            assert 0 < max(parts) < sum(parts) <= total["p99"] * 1.5
            assert total["p50"] <= total["p90"] <= total["p99"]
            assert path["captions_per_second"] == pytest.approx(
                1000 * run["batch_size"] / total["p50"]
            )
    footprint = result["footprint"]
    onnx = footprint["ONNX fp32"]
    assert footprint["PyTorch"]["peak_memory_mb"] > onnx["peak_memory_mb"] > 20
    assert onnx["disk_mb"] == pytest.approx(
        sum(file.stat().st_size for file in artifact.iterdir()) / 1e6
    )
    assert any(line.startswith("| batch 3: decode (ms)") for line in table)
    [line] = [line for line in table if "batch 3: captions identical" in line]
    assert line.count("100.0%") == 2


def test_peers_metrics_and_the_picture(
    artifact: Path, checkpoint: Checkpoint, photos, tmp_path: Path, capsys, monkeypatch, no_java
):
    """torch.compile takes minutes, so it stands here for a peer that cannot run."""
    import torch

    def fail(*arguments, **options):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    references = tmp_path / "captions.csv"
    rows = [f"{photo.name},two dogs run in the snow" for photo in photos]
    references.write_text("\n".join(["image,caption", *rows]))
    picture = tmp_path / "ratios.png"
    arguments = [checkpoint.training["folder"], "--artifact", str(artifact), "--peers"]
    arguments += ["--photos", *map(str, photos), "--references", str(references)]
    arguments += ["--picture", str(picture), "--repeats", "2", "--batch-sizes", "1"]
    arguments += ["--threads", "1"]
    assert main(arguments) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["unavailable"]["torch.compile"] == "no compiler"
    assert "- torch.compile: no compiler" in table
    paths = result["runs"][0]["paths"]
    assert {"PyTorch", "PyTorch as usual", "ONNX fp32"} <= set(paths)
    if importlib.util.find_spec("openvino"):
        assert paths["OpenVINO fp32"]["identical_captions"] == 1
    else:
        assert "capexport[peers]" in result["unavailable"]["OpenVINO fp32"]
    assert result["metrics"]["PyTorch"] == result["metrics"]["ONNX fp32"]
    with Image.open(picture) as image:
        assert image.width > 1000


def test_refusals(
    artifact: Path, checkpoint: Checkpoint, photos, tmp_path: Path, capsys, monkeypatch
):
    for flag in ("--num-beams", "--repeats", "--threads", "--batch-sizes"):
        assert main([flag, "0"]) == 2
        assert "at least 1" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    assert main([str(other), "--artifact", str(artifact)]) == 2
    assert "no checkpoint.json" in capsys.readouterr().err
    flags = ["--artifact", str(artifact), "--photos", str(photos[0])]
    for flag in ("--json", "--markdown", "--picture"):
        assert main([*flags, flag, str(other)]) == 2
        assert "a folder, not the name of a file" in capsys.readouterr().err
    assert main([*flags, "--sheet", str(artifact / "manifest.json")]) == 2
    assert "a file stands where a folder should be" in capsys.readouterr().err
    humans = tmp_path / "humans.csv"
    humans.write_text(f"image,caption\n{photos[0].name},A dog\n")
    for module, *flag in (
        ("matplotlib.figure", "--sheet", tmp_path / "sheet"),
        ("matplotlib.figure", "--picture", tmp_path / "x.png"),
        ("pycocoevalcap.bleu.bleu", "--references", humans),
    ):
        with monkeypatch.context() as absent:
            absent.setitem(sys.modules, module, None)
            # The checkpoint is none: so this is refused before it is looked at.
            assert main([str(other), *flags, *map(str, flag)]) == 2
            assert "pip install 'capexport[" in capsys.readouterr().err
    assert not (tmp_path / "sheet").exists()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main([checkpoint.training["folder"]]) == 2
    error = capsys.readouterr().err
    assert "capexport[cpu,export]" in error
    assert len(error.splitlines()) == 1


def test_an_artifact_of_another_checkpoint(artifact: Path, capsys):
    """The bundled checkpoint is not what the small artifact came from."""
    assert main(["--artifact", str(artifact)]) == 2
    assert "was not exported from" in capsys.readouterr().err


def test_no_cuda_provider(capsys):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is here")
    assert main(["--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "CUDAExecutionProvider" in error
    assert len(error.splitlines()) == 1


def test_sample_photos_are_there():
    assert len(sample_photos()) >= 3


def test_blip2_against_generate_and_the_sheet(
    blip2_checkpoint, blip2_export, artifact: Path, photos: list[Path], tmp_path: Path, capsys
):
    references = tmp_path / "captions.csv"
    references.write_text(f"image,caption\n{photos[0].name},A <b>dog</b> , running\n")
    sheet = tmp_path / "sheet"
    arguments = [str(blip2_checkpoint("opt")), "--artifact", str(blip2_export("opt"))]
    arguments += ["--photos", *map(str, photos[:5]), "--repeats", "2", "--batch-sizes", "2"]
    arguments += ["--sheet", str(sheet), "--beside", str(artifact), "--threads", "1"]
    decoding = {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never", "min_tokens": 4}
    for name, value in decoding.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    assert main([*arguments, "--references", str(references)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["model"] == "blip2 opt"
    assert result["decoding"] == decoding
    assert "num_beams 3, length_penalty -1.0, early_stopping never, medians" in table[1]
    assert result["runs"][0]["variants"]["PyTorch"] == "generate()"
    assert result["runs"][0]["paths"]["ONNX fp32"]["identical_captions"] == 1
    assert any("- batch 2: PyTorch: generate()" in line for line in table)
    for path in result["runs"][0]["paths"].values():
        assert min(path["milliseconds"][s]["p50"] for s in ("preprocess", "encode", "decode")) > 0
    page = (sheet / "captions.html").read_text(encoding="utf-8")
    assert page.count("<img") == 5
    assert "A &lt;b&gt;dog&lt;/b&gt; , running" in page
    for folder, title in ((blip2_export("opt"), "blip2 fp32"), (artifact, "cnn-lstm fp32")):
        assert f"<th>{title}</th>" in page
        captions = Captioner.load(folder).caption(photos[:5], **decoding)
        assert all(f"<td>{html.escape(caption.text)}</td>" in page for caption in captions)
    with Image.open(sheet / "captions.png") as image:
        assert image.width > 1000
    assert main([*arguments[:1], "--artifact", str(artifact)]) == 2
    assert "was not exported from" in capsys.readouterr().err
    assert main([*arguments, "--num-return-sequences", "4"]) == 2
    assert "at most num_beams (3), got 4" in capsys.readouterr().err
