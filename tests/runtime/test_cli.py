"""`capexport caption` and `capexport inspect`, called in-process but for what a kill needs."""

import csv
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import SLOWLY, draw_photo, edit_manifest, key
from PIL import Image

from capexport.bulk.outputs import FileOutput, coco_image_id
from capexport.captioner import Captioner
from capexport.cli import main


def test_text_on_the_terminal(artifact, photos, wanted, capsys):
    assert main(["caption", "-m", str(artifact), *map(str, photos)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{path}\t{text}" for path, text in zip(photos, wanted, strict=True)]


def test_jsonl_is_metadata_of_its_folder(artifact, photos, wanted):
    out = photos[0].parent / "metadata.jsonl"
    folder = str(photos[0].parent)
    assert (
        main(["caption", "-m", str(artifact), folder, "--format", "jsonl", "--out", str(out)]) == 0
    )
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert rows == [
        {"file_name": path.name, "text": text} for path, text in zip(photos, wanted, strict=True)
    ]


def test_csv_and_coco(artifact, photos, wanted, tmp_path, capsys):
    common = ["caption", "-m", str(artifact), *map(str, photos), "--batch-size", "5", "--format"]
    assert main([*common, "csv"]) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["file_name", "text"]
    assert rows == [[str(path), text] for path, text in zip(photos, wanted, strict=True)]
    for out in ([], ["--out", str(tmp_path / "coco.json")]):
        assert main([*common, "coco", *out]) == 0
        text = Path(out[1]).read_text() if out else capsys.readouterr().out
        assert json.loads(text) == [
            {"image_id": path.stem, "caption": caption}
            for path, caption in zip(photos, wanted, strict=True)
        ]


def test_alternatives_stand_in_jsonl(artifact, photos, captioner, tmp_path, capsys):
    command = ["caption", "-m", str(artifact), *map(str, photos), "--prefix", "> "]
    command += ["--num-beams", "3", "--num-return-sequences", "2"]
    options = {"num_beams": 3, "num_return_sequences": 2}
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # the second time, finished rows are read and kept
        assert main([*command, "--out", str(out), "--resume"]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        for row, caption in zip(rows, captioner.caption(photos, **options), strict=True):
            assert row["text"] == f"> {caption.text}"
            assert row["log_probability"] == pytest.approx(caption.log_probability, rel=1e-4)
            best, second = row["alternatives"]
            assert [best["text"], second["text"]] == [f"> {a.text}" for a in caption.alternatives]
            assert best["score"] > second["score"]
            assert best["log_probability"] == row["log_probability"]
    assert main([*command, "--format", "csv"]) == 2
    assert "--num-return-sequences needs --format jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--early-stopping", "maybe"])
    assert "must be true, false or never, got 'maybe'" in capsys.readouterr().err


def test_the_hub_s_client_does_not_chatter():
    """Each of its five attempts would be a paragraph, without a network."""
    if find_spec("huggingface_hub") is None:
        pytest.skip("the extra tokenizers is not installed")
    code = (
        "import logging; from capexport.cli import show_progress; show_progress()\n"
        "import huggingface_hub.utils; log = logging.getLogger('huggingface_hub.utils')\n"
        "log.warning('Retrying'); log.error('an error')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "an error" in done.stderr and "Retrying" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="keeps a folder that is in use")
def test_a_current_folder_that_is_gone(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["caption", "photo.jpg"]) == 2
    assert "the current folder is gone" in capsys.readouterr().err
    assert main(["caption", str(photos[0])]) == 0


def test_coco_image_ids():
    assert coco_image_id("COCO_val2014_000000000042.jpg") == 42
    assert coco_image_id("a/000000397133.jpg") == 397133
    assert coco_image_id("1000268201_693b08cb0e.jpg") == "1000268201_693b08cb0e"


def test_side_cars(artifact, photos, wanted, capsys):
    command = ["caption", "-m", str(artifact), str(photos[0].parent), "--format", "txt"]
    photos[0].with_suffix(".txt").write_text("written by hand")
    assert main(command) == 2
    assert "photo_00.txt: already there, as are 1 of 12" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    texts = [path.with_suffix(".txt").read_text("utf-8") for path in photos]
    assert texts == ["written by hand", *(f"{text}\n" for text in wanted[1:])]


@pytest.mark.skipif(os.name == "nt", reason="has other limits of names")
def test_a_side_car_whose_name_is_too_long(artifact, photos, capsys):
    """Told before anything is captioned, not where every resumed run would end again."""
    folder = photos[0].parent
    long = folder / ("n" * 251 + ".jpg")
    shutil.copy(photos[0], long)
    assert main(["caption", "-m", str(artifact), str(folder), "--extension", "caption"]) == 2
    assert "the name of its side-car file is too long; rename it" in capsys.readouterr().err
    assert not list(folder.glob("*.caption"))
    missing = str(folder / ("m" * 300))
    command = ["caption", "-m", str(artifact), str(folder), missing, "--format", "txt"]
    assert main(command) == 1
    assert long.with_suffix(".txt").read_text()


def test_standard_output_has_its_usual_name(artifact, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["caption", "-m", str(artifact), str(photos[0]), "--out", "-"]) == 0
    assert capsys.readouterr().out.startswith(f"{photos[0]}\t")
    assert not (tmp_path / "-").exists()


def test_side_cars_that_would_collide(artifact, photos, capsys):
    draw_photo(0).save(photos[0].with_suffix(".png"))
    command = ["caption", "-m", str(artifact), str(photos[0].parent), "--format", "txt"]
    assert main(command) == 2
    assert "would share the side-car file" in capsys.readouterr().err


def test_globs_lists_and_repeated_names(artifact, photos, wanted, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos[3]}\n\n{photos[0]}\n"))
    pattern = str(photos[0].parent / "photo_0[01].jpg")
    assert main(["caption", "-m", str(artifact), pattern, "-", str(photos[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{photos[index]}\t{wanted[index]}" for index in (0, 1, 3)]


def test_one_unreadable_image_does_not_stop_the_rest(artifact, photos, wanted, tmp_path, capsys):
    photos[4].write_bytes(b"")
    out = tmp_path / "captions.csv"
    arguments = [*map(str, photos), str(tmp_path / "absent.jpg"), "--format", "csv"]
    assert main(["caption", "-m", str(artifact), *arguments, "--out", str(out)]) == 1
    rows = list(csv.reader(out.open(encoding="utf-8")))[1:]
    assert [text for _, text in rows] == wanted[:4] + wanted[5:]
    errors = capsys.readouterr().err
    assert "photo_04.jpg: cannot read the image" in errors
    assert "absent.jpg: no such image file" in errors
    assert "2 of 13 images could not be read" in errors


def test_what_there_is_of_a_file_that_breaks_off(artifact, photos, captioner, capsys):
    photos[1].write_bytes(photos[1].read_bytes()[:-20])
    command = ["caption", "-m", str(artifact), str(photos[1]), "--format", "jsonl"]
    assert main(command) == 1
    assert "photo_01.jpg" in capsys.readouterr().err
    assert main([*command, "--truncated"]) == 0
    [row] = capsys.readouterr().out.splitlines()
    lenient = pickle.loads(pickle.dumps(captioner))
    lenient.truncated = True
    assert json.loads(row)["text"] == lenient.caption(photos[1]).text
    assert pickle.loads(pickle.dumps(lenient)).truncated
    assert [c.text for c in lenient.caption(photos[:2])][1] == json.loads(row)["text"]


@pytest.mark.skipif(os.name == "nt", reason="has other limits of names")
def test_a_folder_that_cannot_be_searched_is_said(artifact, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    for _ in range(21):  # until its whole name is longer than any system takes
        Path("d" * 200).mkdir()
        monkeypatch.chdir("d" * 200)
    monkeypatch.chdir(tmp_path)
    assert main(["caption", "-m", str(artifact), "--quiet", str(tmp_path)]) == 1
    lines = capsys.readouterr()
    assert lines.out.startswith(f"{tmp_path / 'a.jpg'}\t")
    assert "d: cannot be searched: File name too long\n" in lines.err
    assert main(["caption", "-m", str(artifact), "d" * 200]) == 2
    assert "d: cannot be searched: File name too long\n" in capsys.readouterr().err


def test_unicode_names(artifact, tmp_path, capsys):
    path = tmp_path / "été 犬.jpg"
    draw_photo(1).save(path)
    assert main(["caption", "-m", str(artifact), str(path), "--format", "jsonl"]) == 0
    assert "été 犬.jpg" in capsys.readouterr().out


def test_empty_folders_and_existing_outputs(artifact, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["caption", "-m", str(artifact), str(tmp_path / "empty")]) == 2
    assert "empty: no image files there" in capsys.readouterr().err
    out = tmp_path / "out.csv"
    out.write_text("precious")
    assert main(["caption", "-m", str(artifact), str(photos[0]), "--out", str(out)]) == 2
    assert "already there" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert main(["caption", "-m", str(tmp_path), str(photos[0])]) == 2
    assert "no manifest.json" in capsys.readouterr().err


def test_kill_and_resume(artifact, photos, wanted, tmp_path, capsys):
    out = tmp_path / "captions.jsonl"
    arguments = ["-m", str(artifact), *map(str, photos), "--format", "jsonl", "--out", str(out)]
    command = [sys.executable, "-c", SLOWLY, "caption", *arguments, "--batch-size", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "captions.jsonl.journal"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with journal.open("a") as file:
        file.write('["torn')  # what a full disk or a power cut leaves
    before = journal.read_text().splitlines()[1:-1]

    assert main(["caption", *arguments]) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main(["caption", *arguments, "--max-tokens", "3", "--resume"]) == 2
    assert "another model or other options" in capsys.readouterr().err
    photos[-1].rename(photos[-1].with_suffix(".bak"))
    assert main(["caption", *arguments, "--resume"]) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == wanted[:-1]
    assert len({row["file_name"] for row in rows}) == len(photos) - 1
    assert not journal.exists()
    assert main(["caption", *arguments, "--resume"]) == 1  # one is missing still
    assert "is complete" not in capsys.readouterr().err
    assert main(["caption", *arguments[:-5], *arguments[-4:], "--resume"]) == 0
    assert "captions.jsonl is complete" in capsys.readouterr().err
    assert [json.loads(line)[1] for line in before] == wanted[: len(before)]


@pytest.mark.parametrize(
    ("flag", "option"),
    [
        (["--max-tokens", "3"], {"max_tokens": 3}),
        (["--min-tokens", "30"], {"min_tokens": 30}),
        (["--repetition-penalty", "1.8"], {"repetition_penalty": 1.8}),
        (
            ["--num-beams", "3", "--early-stopping", "true"],
            {"num_beams": 3, "early_stopping": True},
        ),
        (["--no-repeat-ngram-size", "1"], {"no_repeat_ngram_size": 1}),
    ],
)
def test_decoding_flags_reach_captions_and_the_journal(
    flag, option, artifact, photos, wanted, captioner, tmp_path, capsys
):
    command = ["caption", "-m", str(artifact), *map(str, photos), *flag]
    assert main([*command, "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [caption.text for caption in captioner.caption(photos, **option)]
    assert [row["text"] for row in rows] == expected != wanted
    out = tmp_path / "out.jsonl"
    begun = FileOutput(out, "jsonl", photos, key(artifact, str(option)), resume=False)
    begun.write([(photos[0], "begun")])
    begun.close()
    plain = [word for word in command if word not in flag]
    assert main([*plain, "--out", str(out), "--format", "jsonl", "--resume"]) == 2
    assert "another model or other options" in capsys.readouterr().err
    assert main([*command, "--out", str(out), "--format", "jsonl", "--resume"]) == 0
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert texts == ["begun", *expected[1:]]


@pytest.mark.parametrize(
    "flag", [["--max-tokens", "0"], ["--min-tokens", "99"], ["--repetition-penalty", "nan"]]
)
def test_options_out_of_range_write_nothing(flag, artifact, photos, tmp_path, capsys):
    command = ["caption", "-m", str(artifact), str(photos[0]), "--out", str(tmp_path / "x.csv")]
    assert main([*command, *flag]) == 2
    assert flag[0].strip("-").replace("-", "_") in capsys.readouterr().err
    assert not list(tmp_path.glob("x.csv*"))


def test_coco_ids_that_clash(artifact, photos, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    names = photos[0].with_name("42.jpg"), other / "COCO_val2014_000000000042.jpg"
    for name in names:
        draw_photo(1).save(name)
    for out in ([], ["--out", str(tmp_path / "coco.json")]):
        command = ["caption", "-m", str(artifact), *map(str, names), "--format", "coco", *out]
        assert main(command) == 2
        assert "would share the COCO image id 42" in capsys.readouterr().err


def test_inspect(artifact, capsys):
    assert main(["inspect"]) == 0
    words = capsys.readouterr().out
    assert "a cnn-lstm captioner in int8" in words and "9.4 MB" in words and "{" not in words
    assert main(["inspect", str(artifact)]) == 0
    assert "in fp32" in capsys.readouterr().out
    assert main(["inspect", str(artifact), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["family"] == "cnn-lstm"
    graphs = {"encoder.onnx", "decoder_step.onnx", "decoder_loop.onnx"}
    assert set(manifest["files"]) == {*graphs, "decoder.data", "vocabulary.json"}


def test_a_strangers_manifest_does_nothing_to_the_terminal(artifact, tmp_path, capsys):
    folder = shutil.copytree(artifact, tmp_path / "strange")
    document = json.loads((folder / "manifest.json").read_text())
    evil = "\x1b]0;owned\x07\ud800\n"
    document["parity"]["metrics"] = {evil: {evil: 1.0}}
    document["provenance"] |= {"source": evil, "licence": evil, "training": {"command": evil}}
    edit_manifest(folder, **{**document, "family": evil})
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert not set("\x1b\x07\ud800") & set(said) and "\\x1b]0;owned" in said
    assert all(line.startswith((str(folder), "  ")) for line in said.splitlines())


def test_without_a_model_the_bundled_one_captions(photos: list[Path], capsys):
    assert main(["caption", str(photos[0])]) == 0
    [line] = capsys.readouterr().out.splitlines()
    caption = Captioner.load().caption(photos[0])
    assert line == f"{photos[0]}\t{caption.text}"
    assert len(caption.tokens) > 3


@pytest.mark.parametrize("command", [[], ["lstm"], ["caption"], ["inspect"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    if command:
        assert "example" in capsys.readouterr().out


def test_images_that_nothing_here_reads_are_said_at_the_end(artifact, photos, capsys):
    folder = photos[0].parent
    (folder / "IMG_1.DNG").write_bytes(b"II*\0")
    assert main(["caption", "-m", str(artifact), str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("\n") == len(photos)
    [line] = captured.err.splitlines()
    assert "12 captioned, 1 left out (1 .dng), 0 failed in" in line
    assert ".dng: dcraw converts them to TIFF" in line
    assert main(["caption", "-m", str(artifact), str(folder / "IMG_1.DNG")]) == 1
    assert ".dng: dcraw" in capsys.readouterr().err.splitlines()[-1]


def test_heic_is_captioned_with_pillow_heif_and_hinted_at_without(
    artifact, captioner, photos, tmp_path, capsys
):
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "phone" / "IMG_1.HEIC"
    path.parent.mkdir()
    heif.from_pillow(Image.open(photos[0])).save(path)
    assert main(["caption", "-m", str(artifact), str(path.parent)]) == 0
    pixels = np.asarray(heif.open_heif(path))
    assert capsys.readouterr().out == f"{path}\t{captioner.caption(pixels).text}\n"
    without = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from capexport.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", without, "caption", "-m", artifact]
    for given, code in ((path.parent, 2), (path, 1)):
        done = subprocess.run([*command, given], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, "")
        assert "pip install pillow-heif" in done.stderr


def test_a_shell_s_pattern_among_side_cars(artifact, photos, capsys):
    folder = photos[0].parent
    assert main(["caption", "-m", str(artifact), str(folder), "--format", "txt"]) == 0
    (folder / "metadata.jsonl").write_text("{}\n")
    (folder / "texts").mkdir()
    capsys.readouterr()
    assert main(["caption", "-m", str(artifact), *map(str, folder.iterdir())]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == len(photos)
    assert "12 captioned, 14 left out" in said.err and "12 .txt" in said.err


def test_names_and_words_carry_no_escapes_to_the_terminal(artifact, photos, capsys):
    evil = photos[0].with_name("\x1b]0;owned\x07\x9b1m\u202e.jpg")
    evil.write_bytes(b"no image")
    forged = photos[0].rename(photos[0].with_name("a\nforged.jpg\ta caption\n.jpg"))
    for style in ("text", "csv", "jsonl"):
        command = ["caption", "-m", str(artifact), str(evil), str(forged), "--format", style]
        assert main([*command, "--prefix", "\x1b[31m\n"]) == 1
        captured = capsys.readouterr()
        assert not set("\x1b\x07\x9b\u202e") & set(captured.out + captured.err)
        assert captured.out.count("\n") == 1 + (style == "csv")
    assert main(["caption", "-m", str(artifact), "\x1b[31m*"]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--resume", "--overwrite", "--out", "x"], "choose one"),
        (["--overwrite"], "--overwrite needs --out"),
        (["--resume"], "--resume needs --out"),
        (["--format", "csv", "--out-dir", "x"], "go with --format txt"),
        (["-m", ""], "an empty name is no model"),
        (["--out", "x.jsonl", "--extension", ".tag"], "leave out --out"),
        (["--out", "x", "--format", "txt"], "leave out --out"),
        (["--device", "cuda"], "capexport[gpu]"),
        (["--prompt", "a dog"], "takes no prompt"),
        (["--prompt", "\udcff"], "--prompt is no text"),
        (["--extension", ".p", "--suffix", ", \udce9t\udce9"], "--suffix is no text"),
        (["--extension", ".\x1b[31m"], "--extension takes one such as"),
        (["--out", "-", "--resume"], "--resume needs --out"),
    ],
)
def test_options_that_are_refused(
    arguments, message, artifact, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["caption", "-m", str(artifact), str(photos[0]), *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("x.JSONL", "jsonl"),
        ("x.ndjson", "jsonl"),
        ("x.csv", "csv"),
        ("x.json", "coco"),
        ("x", "text"),
    ],
)
def test_the_format_follows_from_the_output_s_name(name, style, artifact, photos, tmp_path):
    command = ["caption", "-m", str(artifact), *map(str, photos)]
    assert main([*command, "--out", str(tmp_path / name)]) == 0
    assert main([*command, "--out", str(tmp_path / "y"), "--format", style]) == 0
    assert (tmp_path / name).read_bytes() == (tmp_path / "y").read_bytes()


def test_attention_is_drawn(attention_artifact, artifact, photos, tmp_path, capsys):
    command = ["caption", "-m", str(attention_artifact), "--max-tokens", "6"]
    out = tmp_path / "new" / "looked.png"
    assert main([*command, str(photos[0]), "--attention", str(out)]) == 0
    sheet = Image.open(out)
    pixels = np.asarray(sheet.convert("L"))
    assert sheet.format == "PNG" and pixels[-1].min() == 255
    assert pixels.std() > 10
    drawn = out.read_bytes()
    capsys.readouterr()
    for arguments, message in (
        ([*command, str(photos[0]), "--attention", str(out)], "already there"),
        ([*command, *map(str, photos[:2]), "--attention", "two.png"], "draws one photo, and 2"),
        (
            ["caption", "-m", str(artifact), str(photos[0]), "--attention", "none.png"],
            "looks at the whole image at once",
        ),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert out.read_bytes() == drawn
