import html
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from capexport import Captioner
from capexport.bench.cli import main, sample_photos
from capexport.models.checkpoint import Checkpoint


def test_a_small_run(artifact: Path, checkpoint: Checkpoint, tmp_path: Path, capsys):
    files = {"--json": tmp_path / "result.json", "--markdown": tmp_path / "table.md"}
    arguments = [checkpoint.training["folder"], "--artifact", str(artifact), "--repeats", "2"]
    for option, file in files.items():
        arguments += [option, str(file)]
    assert main([*arguments, "--device", "cpu", "--threads", "2", "--batch-sizes", "1", "3"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads(files["--json"].read_text()) == result
    assert files["--markdown"].read_text().splitlines() == table
    assert [run["batch_size"] for run in result["runs"]] == [1, 3]
    for run in result["runs"]:
        assert run["identical_captions"] == 1
        for path in run["paths"].values():
            total = path["milliseconds"]["total"]
            parts = [path["milliseconds"][s]["p50"] for s in ("preprocess", "encode", "decode")]
            assert 0 < max(parts) < sum(parts) <= total["p99"] * 1.5
            assert total["p50"] <= total["p90"] <= total["p99"]
            assert path["captions_per_second"] == pytest.approx(
                1000 * run["batch_size"] / total["p50"]
            )
    footprint = result["footprint"]
    assert footprint["torch"]["peak_memory_mb"] > footprint["onnx"]["peak_memory_mb"] > 20
    assert footprint["onnx"]["disk_mb"] == pytest.approx(
        sum(file.stat().st_size for file in artifact.iterdir()) / 1e6
    )
    assert any("| batch 3: decode p50 (ms)" in line for line in table)
    assert "identical captions: 100.0%" in table


def test_refusals(artifact: Path, checkpoint: Checkpoint, tmp_path: Path, capsys, monkeypatch):
    assert main(["--repeats", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    assert main([str(other), "--artifact", str(artifact)]) == 2
    assert "no checkpoint.json" in capsys.readouterr().err
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
    arguments += ["--sheet", str(sheet), "--beside", str(artifact)]
    assert main([*arguments, "--references", str(references)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["model"] == "blip2 opt in fp32"
    assert result["runs"][0]["torch_variant"] == "generate()"
    assert result["runs"][0]["identical_captions"] == 1
    assert "identical captions: 100.0%" in table
    for path in result["runs"][0]["paths"].values():
        assert min(path["milliseconds"][s]["p50"] for s in ("preprocess", "encode", "decode")) > 0
    page = (sheet / "captions.html").read_text(encoding="utf-8")
    assert page.count("<img") == 5
    assert "A &lt;b&gt;dog&lt;/b&gt; , running" in page
    for folder, title in ((blip2_export("opt"), "blip2 fp32"), (artifact, "cnn-lstm fp32")):
        assert f"<th>{title}</th>" in page
        captions = Captioner.load(folder).caption(photos[:5])
        assert all(f"<td>{html.escape(caption.text)}</td>" in page for caption in captions)
    with Image.open(sheet / "captions.png") as image:
        assert image.width > 1000
    assert main([*arguments[:1], "--artifact", str(artifact)]) == 2
    assert "was not exported from" in capsys.readouterr().err
