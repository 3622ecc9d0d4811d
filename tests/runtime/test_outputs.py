"""What captions are written to, and how runs go on: nothing lost, nothing of others touched."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SLOWLY, default_signals, draw_photo, key
from PIL import Image

import capexport
from capexport.atomic import new_folder, remove_dead_drafts, replace_file, replacing_file
from capexport.bulk.outputs import FileOutput, SideCars
from capexport.cli import main
from capexport.errors import OutputExistsError

STYLES = ["text", "jsonl", "csv", "coco"]


@pytest.fixture
def folder(photos: list[Path]) -> Path:
    return photos[0].parent


def caption(artifact: Path, *arguments: object) -> int:
    return main(["caption", "-m", str(artifact), *map(str, arguments)])


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in (".partial", ".journal")]


# ------------------------------------------------------------------ going on


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("interrupted", [False, True])
def test_resume_means_what_is_missing(style, interrupted, artifact, folder, photos, capsys):
    out, new = folder.parent / "out", folder.parent / "new"
    photos[3].write_bytes(b"broken")
    photos[5].rename(folder / "old_name.jpg")
    if interrupted:
        paths = sorted(folder.iterdir())
        begun = FileOutput(out, style, paths, key(artifact), resume=False)
        begun.write([(path, "begun") for path in [*paths[:3], *paths[9:]]])
        begun.close()
    else:
        assert caption(artifact, folder, "--format", style, "--out", out) == 1
    photos[1].unlink()
    draw_photo(3).save(photos[3], quality=95)  # mended
    (folder / "old_name.jpg").rename(folder / "another.jpg")
    draw_photo(77).save(folder / "a_new_one.jpg")

    assert caption(artifact, folder, "--format", style, "--out", out, "--resume") == 0
    assert "is complete" not in capsys.readouterr().err
    assert caption(artifact, folder, "--format", style, "--out", new) == 0
    wanted = new.read_text("utf-8-sig")
    if not interrupted:
        assert out.read_text("utf-8-sig") == wanted
    else:
        got = out.read_text("utf-8-sig")
        assert got.count("begun") == 4 and got.count("\n") == wanted.count("\n")
    assert caption(artifact, folder, "--format", style, "--out", out, "--resume") == 0
    assert "out is complete: 0 captioned, 12 left out (12 there already)" in capsys.readouterr().err
    assert not litter(folder.parent)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        ["--max-tokens", "3"],
        ["--prefix", "x"],
        ["--suffix", "x"],
        ["--scores"],
        ["--format", "csv"],
        ["--prompt", "x"],
    ],
)
def test_other_options_are_refused_in_every_state(
    other, finished, artifact, folder, photos, capsys
):
    out = folder / "metadata.jsonl"
    if finished:
        assert caption(artifact, folder, "--out", out) == 0
    else:
        begun = FileOutput(out, "jsonl", photos, key(artifact), resume=False)
        begun.write([(photos[0], "begun")])
        begun.close()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert caption(artifact, folder, "--out", out, "--resume", *other) == 2
    assert "another model or other options" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert caption(artifact, folder, "--out", out, "--resume") == 0


def test_images_that_are_there_but_not_named_are_not_dropped(artifact, photos, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert caption(artifact, *photos[:6], "--out", out) == 0
    before = out.read_bytes()
    other = tmp_path / "other" / photos[0].name  # has the id of one that is captioned
    other.parent.mkdir()
    draw_photo(50).save(other)
    for more in ([other], photos[2:4]):
        assert caption(artifact, *more, "--out", out, "--resume") == 2
        assert "are there but not among those named now" in capsys.readouterr().err
        assert out.read_bytes() == before
    assert caption(artifact, *photos[:6], other, "--out", out, "--resume") == 2
    assert "would share the COCO image id" in capsys.readouterr().err
    assert not litter(tmp_path)


def test_the_order_is_the_list_s_of_today(artifact, photos, tmp_path):
    out = tmp_path / "out.jsonl"
    assert caption(artifact, *photos[::2], "--out", out) == 0
    assert caption(artifact, *photos[::-1], "--out", out, "--resume") == 0
    names = [json.loads(line)["file_name"] for line in out.read_text().splitlines()]
    assert names == [f"photos/{path.name}" for path in photos[::-1]]


def test_limit_takes_some_more_each_time(artifact, photos, wanted, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    for count, left in ((5, "7 for later"), (10, "5 there already, 2 for later"), (12, "10 there")):
        assert caption(artifact, *photos, "--out", out, "--resume", "--limit", 5) == 0
        said = capsys.readouterr().err
        assert left in said and "is complete" not in said
        rows = [json.loads(line)["text"] for line in out.read_text().splitlines()]
        assert rows == wanted[:count]


def test_corrections_by_hand_stay(artifact, folder, photos, capsys):
    for style, old, new in (("jsonl", '"text": "', '"text": "mine: '), ("csv", ",", ",mine: ")):
        out = folder.parent / f"out.{style}"
        assert caption(artifact, *photos[:3], "--out", out) == 0
        lines = out.read_text("utf-8").splitlines(keepends=True)
        lines[-1] = lines[-1].replace(old, new, 1)
        out.write_text("".join(lines), "utf-8")
        assert caption(artifact, *photos[:5], "--out", out, "--resume") == 0
        assert out.read_text("utf-8").startswith("".join(lines))
        out.write_text(out.read_text("utf-8") + "what, no row?\nor three\tof, them,all")
        before = out.read_bytes()
        assert caption(artifact, *photos, "--out", out, "--resume") == 2
        assert "was edited so that its rows cannot be read" in capsys.readouterr().err
        assert out.read_bytes() == before


@pytest.mark.parametrize("style", ["jsonl", "csv", "text"])
def test_empty_lines_of_an_editor_are_no_rows(style, artifact, folder, photos):
    out = folder.parent / f"out.{style}"
    assert caption(artifact, *photos[:3], "--out", out) == 0
    before = out.read_bytes()
    out.write_bytes(before.replace(b"\n", b"\r\n\r\n") + b"\n")
    assert caption(artifact, *photos[:3], "--out", out, "--resume") == 0
    assert out.read_bytes() == before


def test_overwrite_begins_anew_even_if_it_is_interrupted(artifact, photos, wanted, tmp_path):
    out = tmp_path / "out.jsonl"
    assert caption(artifact, *photos[:5], "--out", out, "--prefix", "old ") == 0
    made = FileOutput(out, "jsonl", photos, key(artifact), resume=False, overwrite=True)
    made.write([(photos[0], "begun")])
    made.close()
    assert caption(artifact, *photos, "--out", out, "--resume") == 0
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert texts == ["begun", *wanted[1:]]
    assert caption(artifact, *photos, "--out", out) == 2
    assert caption(artifact, *photos, "--out", out, "--overwrite") == 0
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == wanted


def test_folders_devices_and_images_are_no_output(artifact, photos, tmp_path, capsys):
    for out, message in (
        (tmp_path, "takes the name of a file"),
        (Path(os.devnull), "already there"),
        (photos[0], "one of the images"),
    ):
        for flag in ("--resume", "--overwrite"):
            assert caption(artifact, photos[0], "--format", "jsonl", "--out", out, flag) == 2
            assert message in capsys.readouterr().err
    assert not litter(tmp_path) and Path(os.devnull).is_char_device()


# ------------------------------------------------------------------ two at once


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]])
def test_a_second_run_is_told(flags, artifact, photos, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    first = FileOutput(out, "jsonl", photos, key(artifact), resume=False)
    first.write([(photos[0], "kept")])
    assert caption(artifact, *photos, "--out", out, *flags) == 2
    assert "another run is writing it" in capsys.readouterr().err
    first.finish()
    first.close()
    assert json.loads(out.read_text())["text"] == "kept"

    cars = SideCars(photos, resume=False)
    assert caption(artifact, *photos, "--format", "txt", *flags) == 2
    assert "another run is writing side-car files" in capsys.readouterr().err
    cars.close()
    assert caption(artifact, *photos, "--format", "txt", *flags) == 0


def test_a_journal_that_was_removed_empties_no_output(photos, tmp_path):
    out = tmp_path / "out.jsonl"
    run = FileOutput(out, "jsonl", photos, "key", resume=False)
    run.write([(photos[0], "one")])
    (tmp_path / "out.jsonl.journal").unlink()
    out.write_text("precious")
    with pytest.raises(OutputExistsError, match="was removed during the run"):
        run.finish()
    assert out.read_text() == "precious"
    out.unlink()
    run.finish()  # what is still in hand is not thrown away
    assert json.loads(out.read_text())["text"] == "one"


def test_two_exports_to_one_place(tmp_path):
    out = tmp_path / "export"
    with new_folder(out) as first:
        (first / "file").write_text("whole")
        with (
            pytest.raises(OutputExistsError, match="another export is making it"),
            new_folder(out),
        ):
            pass
        with new_folder(tmp_path / "other"):
            pass
    assert [path.name for path in out.iterdir()] == ["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "other"]
    with pytest.raises(OutputExistsError, match="already there"), new_folder(out):
        pass


def test_two_processes_replace_one_file(tmp_path):
    code = (
        "import sys; from pathlib import Path; from capexport.atomic import replace_file\n"
        "for _ in range(200): replace_file(Path(sys.argv[1]), sys.argv[2] * 9999)"
    )
    file = tmp_path / "file"
    both = [subprocess.Popen([sys.executable, "-c", code, str(file), which]) for which in "ab"]
    while any(process.poll() is None for process in both):
        if file.exists():
            assert len(file.read_text()) == 9999
    assert [process.returncode for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------ others' files


def test_drafts_are_new_files_of_unpredictable_names(tmp_path):
    target = tmp_path / "file"
    names = set()
    for _ in range(3):
        with replacing_file(target) as file:
            file.write("x")
            [draft] = tmp_path.glob(".file.*.partial")
            names.add(draft.name)
            assert remove_dead_drafts(tmp_path) == {draft.name}
    assert len(names) == 3
    with pytest.raises(ValueError, match="half"), replacing_file(target) as file:
        file.write("half")
        raise ValueError("half")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and target.read_text() == "x"
    with pytest.raises(FileNotFoundError) as caught:
        replace_file(tmp_path / "absent" / "file", "x")
    assert caught.value.filename == str(tmp_path / "absent" / "file")  # not the draft's name


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path, artifact, photos):
    draft = ".metadata.jsonl.0123456789abcdef.partial"
    for folder in (tmp_path, photos[0].parent):
        (folder / draft).write_text("half")
        (folder / "mine.partial").write_text("mine")
        (folder / ".export.0123456789abcdef.partial").symlink_to(photos[0])
    assert caption(artifact, *photos, "--out", tmp_path / "out.csv") == 0
    assert caption(artifact, *photos, "--format", "txt") == 0
    for folder in (tmp_path, photos[0].parent):
        assert not (folder / draft).exists()
        assert (folder / "mine.partial").read_text() == "mine"
        assert (folder / ".export.0123456789abcdef.partial").is_symlink()
    assert photos[0].exists()


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]])
@pytest.mark.parametrize("planted", ["journal", ".capexport"])
@pytest.mark.parametrize("how", ["file", "link", "dangling", "fifo"])
def test_files_of_others_in_the_way(how, planted, flags, artifact, photos, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    name = "out.jsonl.journal" if planted == "journal" else ".out.jsonl.capexport"
    victim = tmp_path / "victim"
    if how == "file":
        (tmp_path / name).write_text("Dear diary")
    elif how == "fifo":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to(victim)
        if how == "link":
            victim.write_text("precious")
    assert caption(artifact, photos[0], "--out", out, *flags) == 2
    assert name in capsys.readouterr().err
    assert os.path.lexists(tmp_path / name) and not out.exists()
    if how == "file":
        assert (tmp_path / name).read_text() == "Dear diary"
    assert not victim.exists() if how != "link" else victim.read_text() == "precious"


def test_errors_name_what_was_to_be_made_not_its_draft(tmp_path: Path):
    (tmp_path / "from").write_text("x")
    for out in tmp_path / "first", tmp_path / "second":
        with pytest.raises(FileNotFoundError) as raised, new_folder(out) as draft:
            if out.name == "first":
                replace_file(draft / "none" / "file", "x")
            (tmp_path / "from").rename(draft / "none" / "file")
        assert (raised.value.filename, raised.value.filename2) == (str(out), None)
    assert (tmp_path / "from").exists()


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_the_umask_holds(artifact, folder, photos, tmp_path):
    before = os.umask(0o027)
    try:
        assert caption(artifact, folder, "--out", tmp_path / "out.jsonl") == 0
        assert caption(artifact, folder, "--out-dir", tmp_path / "texts") == 0
        with new_folder(tmp_path / "export") as draft:
            replace_file(draft / "file", "x")
    finally:
        os.umask(before)
    made = [tmp_path / "out.jsonl", *(tmp_path / "texts").iterdir(), tmp_path / "export/file"]
    assert {oct(path.stat().st_mode & 0o777) for path in made} == {"0o640"}
    assert (tmp_path / "export").stat().st_mode & 0o777 == 0o750


# ------------------------------------------------------------------ side-car files


def test_side_cars_elsewhere_with_another_ending(artifact, folder, photos, wanted, tmp_path):
    sub = folder / "sub"
    sub.mkdir()
    draw_photo(0).save(sub / "photo_00.jpg", quality=95)
    texts = tmp_path / "a" / "texts"
    command = [folder, "--out-dir", texts, "--extension", "caption"]
    assert caption(artifact, *command) == 0
    assert (texts / "photo_11.caption").read_text() == wanted[11] + "\n"
    assert (texts / "sub" / "photo_00.caption").read_text() == wanted[0] + "\n"
    assert len(list(folder.rglob("*.caption"))) == 0
    (texts / "photo_01.caption").unlink()
    (texts / "photo_02.caption").write_text("by hand")
    assert caption(artifact, *command) == 2
    assert caption(artifact, *command, "--skip-existing") == 0
    assert (texts / "photo_01.caption").read_text() == wanted[1] + "\n"
    assert (texts / "photo_02.caption").read_text() == "by hand"
    assert caption(artifact, *command, "--overwrite") == 0
    assert (texts / "photo_02.caption").read_text() == wanted[2] + "\n"


def test_side_cars_through_two_spellings_of_a_folder(artifact, photos, wanted, tmp_path):
    (tmp_path / "link").symlink_to(photos[0].parent)
    linked = tmp_path / "link" / photos[0].name
    assert caption(artifact, photos[0], linked, tmp_path / "link", "--format", "txt") == 0
    assert photos[0].with_suffix(".txt").read_text() == wanted[0] + "\n"
    draw_photo(5).save(photos[0].with_suffix(".png"))
    for text in photos[0].parent.glob("*.txt"):
        text.unlink()
    linked = tmp_path / "link" / "photo_00.png"
    assert caption(artifact, photos[0], linked, "--format", "txt") == 2
    assert not list(photos[0].parent.glob("*.txt"))


def test_an_empty_folder_name_is_not_the_current_folder(artifact, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos[0].parent)
    with pytest.raises(SystemExit, match="2"):
        caption(artifact, photos[0], "--out-dir", "")
    assert "--out-dir: an empty name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [("--out-dir", "texts"), ("--out-dir", "texts/deeper"), ("--out", "texts/it.jsonl")]
)
def test_a_file_where_a_folder_should_be_is_told(
    flags: tuple[str, str], artifact: Path, photos: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    (tmp_path / "texts").write_text("mine")
    assert caption(artifact, photos[0], flags[0], tmp_path / flags[1]) == 2
    told = f"{tmp_path / 'texts'}: a file stands where a folder should be"
    assert told in capsys.readouterr().err
    assert (tmp_path / "texts").read_text() == "mine"
    assert not list(Path().glob("*.txt"))


@pytest.mark.parametrize("extension", [".jpg", ".HEIC", "", ".", "a/b", ".a.b", "..", "\0"])
def test_no_extension_can_replace_an_image(extension, artifact, photos, capsys):
    before = photos[0].read_bytes()
    command = [photos[0], "--extension", extension, "--overwrite"]
    assert caption(artifact, *command) == 2
    assert "--extension" in capsys.readouterr().err
    odd = photos[0].rename(photos[0].with_suffix(".odd"))
    assert caption(artifact, odd, "--extension", ".odd", "--overwrite") == 2
    assert odd.read_bytes() == before


def test_a_side_car_made_during_the_run_is_not_overwritten(photos):
    cars = SideCars(photos, resume=False)
    photos[1].with_suffix(".txt").write_text("by hand")
    with pytest.raises(OutputExistsError, match="was made while this run was on"):
        cars.write([(photos[0], "a"), (photos[1], "b")])
    cars.close()
    assert photos[0].with_suffix(".txt").read_text() == "a\n"
    assert photos[1].with_suffix(".txt").read_text() == "by hand"


# ------------------------------------------------------------------ formats


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere take UTF-8 alone")
@pytest.mark.parametrize("style", [*STYLES, "txt"])
def test_names_of_any_bytes_stay_two(style, artifact, photos, wanted, tmp_path, capsys):
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [
        b"\\xff.jpg",
        b"\xfe.jpg",
        b"\xff.jpg",
        b"\\x5cxff.jpg",
        b"a\nb.jpg",
        b"a\tb\x1b[1m.jpg",
    ]
    for index, name in enumerate(sorted(names)):
        (folder / os.fsdecode(name)).write_bytes(photos[index].read_bytes())
    texts = wanted[: len(names)]
    if style == "txt":
        assert caption(artifact, folder, "--format", "txt") == 0
        texts = [path.read_text() for path in sorted(folder.glob("*.txt"), key=os.fsencode)]
        assert texts == [f"{text}\n" for text in wanted[: len(names)]]
        return
    out = folder / "out"
    assert caption(artifact, folder, "--format", style, "--out", out, "--limit", 3) == 0
    assert caption(artifact, folder, "--format", style, "--out", out, "--resume") == 0
    said = capsys.readouterr().err
    assert "3 captioned, 3 left out (3 there already)" in said
    found = rows(out, style)
    assert [text for _, text in found] == texts
    assert len({name for name, _ in found}) == len(names)
    if style == "jsonl":
        original = [name.replace("\\x", "%").encode() for name, _ in found]
        assert original[0] == b"%5cx5cxff.jpg" and original[-1] == b"%ff.jpg"
    assert caption(artifact, folder, "--format", style) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert style != "text" or printed.count("\n") == len(names)


def rows(out: Path, style: str) -> list[tuple[str, str]]:
    with out.open(encoding="utf-8-sig", newline="") as file:
        if style == "csv":
            return [(name, text) for name, text in csv.reader(file)][1:]
        if style == "coco":
            return [(str(item["image_id"]), item["caption"]) for item in json.load(file)]
        if style == "jsonl":
            return [tuple(json.loads(line).values()) for line in file]
        return [tuple(line.rstrip("\n").split("\t")) for line in file]


def test_a_spreadsheet_runs_nothing(artifact, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos[0].parent)
    for name in ("=1+1.jpg", "@x.jpg", "+1.jpg"):
        photos[0].with_name(name).write_bytes(photos[0].read_bytes())
    names = ["--", "./=1+1.jpg", "@x.jpg", "+1.jpg"]
    command = ["--format", "csv", "--prefix", "=HYPERLINK(1)"]
    assert caption(artifact, *command, *names) == 0
    for line in capsys.readouterr().out.splitlines()[1:]:
        for cell in next(csv.reader([line])):
            assert cell[0] not in "=+-@"
    out = photos[0].parent / "out.csv"
    assert caption(artifact, *command, "--out", out, photos[0].parent, "--limit", 2) == 0
    assert out.read_bytes().startswith(b"\xef\xbb\xbffile_name,text\n")
    first = rows(out, "csv")
    assert first[0][0] == "./+1.jpg" and first[0][1].startswith("'=HYPERLINK(1)")
    assert caption(artifact, *command, "--out", out, photos[0].parent, "--resume") == 0
    assert rows(out, "csv")[:2] == first


def test_scores(artifact, photos, captioner, tmp_path, capsys):
    wanted = [(each.text, each.log_probability) for each in captioner.caption(photos)]
    for style in ("jsonl", "csv"):
        out = tmp_path / f"out.{style}"
        assert caption(artifact, *photos, "--scores", "--out", out, "--limit", 7) == 0
        assert caption(artifact, *photos, "--scores", "--out", out, "--resume") == 0
        if style == "csv":
            found = list(csv.DictReader(out.open(encoding="utf-8-sig")))
        else:
            found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["text"] for row in found] == [text for text, _ in wanted]
        assert [float(row["log_probability"]) for row in found] == pytest.approx(
            [score for _, score in wanted], rel=1e-5
        )
    assert caption(artifact, photos[0], "--scores") == 2
    assert "--scores needs --format jsonl or csv" in capsys.readouterr().err


def test_prefix_and_suffix_stand_as_they_are(artifact, photos, wanted, tmp_path):
    command = [*photos, "--prefix", "xyz style, ", "--suffix", " !", "--out"]
    assert caption(artifact, *command, tmp_path / "out.jsonl") == 0
    assert [text for _, text in rows(tmp_path / "out.jsonl", "jsonl")] == [
        f"xyz style, {text} !" for text in wanted
    ]


# ------------------------------------------------------------------ streams and signals


def run(*arguments: object, shell: str = "", **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "capexport", "caption", *map(str, arguments)]
    line = ["bash", "-c", f'exec "$@" {shell}', "bash", *command]
    options = {"stdin": subprocess.DEVNULL, **options}
    return subprocess.run(line, text=True, capture_output=True, timeout=100, **options)


@pytest.mark.skipif(os.name == "nt", reason="redirections of a POSIX shell")
@pytest.mark.parametrize(
    ("shell", "more", "code", "message"),
    [
        (">&-", [], 2, "standard output is closed"),
        (">&-", ["--out", "OUT"], 0, "1 captioned"),
        ("2>&-", ["absent.jpg"], 1, ""),
        ("<&-", ["-"], 2, "standard input is closed"),
        ("<&- >&- 2>&-", ["--out", "OUT"], 0, ""),
        (">/dev/full", [], 2, "No space left on device: 'standard output'"),
        ("2>/dev/full", ["--out", "OUT"], 0, ""),
        (">/dev/full", ["--help"], 2, "No space left on device: 'standard output'"),
        (">/dev/full", ["--format", "coco"], 2, "No space left on device: 'standard output'"),
    ],
)
def test_streams_that_are_closed_or_full(
    shell, more, code, message, artifact, photos, tmp_path, monkeypatch
):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # argparse would hide the error
    out = tmp_path / "out.jsonl"
    arguments = [out if word == "OUT" else word for word in more]
    done = run("-m", artifact, photos[0], *arguments, shell=shell)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (message != "")
    if "OUT" in more:
        assert len(out.read_text().splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_a_run_that_can_be_gone_on_with(number, artifact, photos, wanted, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ["-m", str(artifact), *map(str, photos), "--out", str(out)]
    command = [sys.executable, "-c", SLOWLY, "caption", *arguments, "--batch-size", "1"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=default_signals
    )
    journal = tmp_path / "out.jsonl.journal"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "go on with --resume" in said and "Traceback" not in said
    assert len(said.splitlines()) == 2
    assert main(["caption", *arguments, "--resume"]) == 0
    assert [text for _, text in rows(out, "jsonl")] == wanted


def test_ctrl_c_while_libraries_load():
    """numpy makes an error of its own of it, while it imports datetime."""
    code = (
        "import os, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == sys.argv[1]:\n"
        "            sys.meta_path.remove(self); os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "name = sys.argv[1]; sys.argv[1:] = ['caption', 'x']; sys.argv.insert(1, name)\n"
        "from capexport.__main__ import main; sys.exit(main(['caption', 'x.jpg']))"
    )
    for library in ("argparse", "numpy", "datetime", "PIL", "capexport.captioner"):
        command = [sys.executable, "-c", code, library]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, preexec_fn=default_signals
        )
        assert (done.returncode, done.stderr) == (130, "capexport: interrupted\n")


def test_an_image_piped_in(artifact, photos, wanted, tmp_path, monkeypatch, capsys):
    def pipe(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    pipe(photos[2].read_bytes())
    assert caption(artifact, "-", photos[0]) == 0
    assert capsys.readouterr().out == f"-\t{wanted[2]}\n{photos[0]}\t{wanted[0]}\n"
    pipe(photos[2].read_bytes()[:300])
    assert caption(artifact, "-") == 1
    assert "1 failed" in capsys.readouterr().err
    pipe(photos[2].read_bytes())
    assert caption(artifact, "-", "--format", "txt") == 2


def test_quiet_says_what_went_wrong_alone(artifact, photos, capsys):
    assert caption(artifact, photos[0], "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert caption(artifact, photos[0], "absent.jpg", "--quiet") == 1
    assert capsys.readouterr().err == "capexport: absent.jpg: no such image file\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lstm", "--out", "there"], "already there"),
        (["lstm", "--out", "new", "--precision", "int8"], "needs --calibration"),
        (["lstm", "--out", "new", "--photos", "absent*"], "no image files there"),
        (
            ["lstm", "--out", "new", "--photos", "x.jpg", "--references", "humans.csv"],
            "capexport[eval]",
        ),
        *(
            ([command, "--out", "new", "--references", "humans.csv"], "pass both")
            for command in ("lstm", "blip2", "graph")
        ),
        (["lstm", "--out", "new", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["graph", "--out", "new", "--num-beams", "0"], "num_beams must be at least 1"),
        (["blip2", "--out", "there"], "already there"),
        *(
            ([command, "--out", "there/new"], "there: a file stands where a folder should be")
            for command in ("lstm", "blip2", "graph", "web")
        ),
        (["caption", "-m", "owner/model", "x.jpg", "--out", "there"], "already there"),
    ],
)
def test_what_arguments_tell_needs_no_torch(arguments, message, tmp_path):
    (tmp_path / "there").write_text("precious")
    (tmp_path / "humans.csv").write_text("image,caption\nx.jpg,A dog\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    code = (
        "import sys; sys.modules['pycocoevalcap'] = None\n"
        "from capexport.cli import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys(); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *arguments]
    root = Path(capexport.__file__).parents[1]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("style", ["jsonl", "txt"])
@pytest.mark.parametrize("room", [0, 60, 800])
def test_a_file_that_finds_no_room_is_named(room, style, artifact, photos, wanted, tmp_path):
    """A limit on file sizes fails as a full disk does: somewhere in a write, and without a name."""
    import resource

    out = tmp_path / "out.jsonl"
    arguments = ["-m", artifact, *photos, "--batch-size", 1]
    arguments += ["--format", "txt", "--suffix", "!" * 900] if style == "txt" else ["--out", out]
    full = run(
        *arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    )
    assert full.returncode == 2 and "Traceback" not in full.stderr
    [line] = full.stderr.splitlines()
    assert "File too large" in line and ("photo_00.txt'" if style == "txt" else "out.jsonl") in line
    assert not out.exists() and not list(photos[0].parent.glob("*.txt"))
    assert main(["caption", *map(str, arguments), "--resume"]) == 0
    if style == "jsonl":
        assert [text for _, text in rows(out, "jsonl")] == wanted
    assert not litter(tmp_path)
