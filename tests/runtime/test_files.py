"""Which files arguments mean."""

import io
import os
from pathlib import Path

import pytest
from conftest import draw_photo

from capexport.bulk.files import READERS, STDIN, find_images, search
from capexport.errors import ImageNotFoundError
from capexport.preprocessing import image_suffixes


class Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def names(folder: Path, *arguments: str, **options) -> list[str]:
    given = [str(folder / argument) for argument in arguments]
    return [str(path.relative_to(folder)) for path in search(given, None, **options).paths]


def test_a_search_leaves_out_what_is_hidden_or_a_thumbnail(tmp_path: Path):
    make(tmp_path, "b/1.JPG", "a.webp", "a.txt", ".hidden.jpg", "._a.jpg", ".git/x.png")
    make(tmp_path, "@eaDir/a.jpg/thumb.jpg", "b/__MACOSX/b.jpg", "c.jpg/d.png")
    assert names(tmp_path, ".") == ["a.webp", "b/1.JPG", "c.jpg/d.png"]
    assert names(tmp_path, ".", recursive=False) == ["a.webp"]
    assert names(tmp_path, ".git") == [".git/x.png"]  # named, it is meant


def test_linked_folders_are_entered_once_under_their_real_names(tmp_path: Path):
    make(tmp_path, "in/z/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "in/a").symlink_to("z")
    (tmp_path / "in/up").symlink_to("..")
    (tmp_path / "in/far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/loop.jpg").symlink_to("loop.jpg")
    assert names(tmp_path, "in") == ["in/far/2.jpg", "in/loop.jpg", "in/z/1.jpg"]
    assert names(tmp_path, "in/a", "in/z", "in/a/1.jpg") == ["in/a/1.jpg"]


def test_nothing_but_files_is_found_and_nothing_is_opened(tmp_path: Path):
    make(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    assert names(tmp_path, ".") == ["a.jpg"]
    assert names(tmp_path, "a.jpg", "b.jpg") == ["a.jpg", "b.jpg"]  # reading reports it


def test_side_cars_and_films_beside_images_are_no_images(tmp_path: Path):
    make(tmp_path, "a.jpg", "a.txt", "a.caption", "metadata.jsonl", "b.pdf", "c.mp4", "._a.jpg")
    make(tmp_path, "odd.jpg_large", "@eaDir/a.jpg", "empty/x.txt", "a.jpg.pp3", "a.pt")
    every = sorted(path.name for path in tmp_path.iterdir())
    found = search([str(tmp_path / name) for name in [*every, "absent.txt"]], None)
    assert [path.name for path in found.paths] == ["a.jpg", "odd.jpg_large", "absent.txt"]
    assert found.ignored.total() == 10
    assert names(tmp_path, "*") == ["a.jpg", "odd.jpg_large"]
    with pytest.raises(ImageNotFoundError, match=r"a\.txt: no image files there"):
        names(tmp_path, "a.txt")


def test_patterns_search_the_folders_that_they_match(tmp_path: Path):
    make(tmp_path, "x1/deep/a.jpg", "x2/b.jpg", "x2/b.txt", "y/c.jpg", "x[1].jpg")
    assert names(tmp_path, "x*[12]") == ["x1/deep/a.jpg", "x2/b.jpg"]
    assert names(tmp_path, "x[1].jpg") == ["x[1].jpg"]  # a file of that name comes first
    with pytest.raises(ImageNotFoundError, match="q"):
        names(tmp_path, "x1", "q*")


@pytest.mark.parametrize("argument", ["", " "])
def test_an_empty_argument_is_not_the_current_folder(argument, tmp_path, monkeypatch):
    make(tmp_path, "a.jpg")
    monkeypatch.chdir(tmp_path)
    if argument:
        assert find_images([argument], None) == [Path(" ")]
    else:
        with pytest.raises(ImageNotFoundError, match="empty argument"):
            find_images([argument], None)


def test_images_of_other_formats_are_counted(tmp_path: Path):
    make(tmp_path, "a.jpg", "b.HEIC", "c.heic", "d/e.dng", "f.jxl", "g.NRW")
    found = search([str(tmp_path)], None)
    unread = READERS.keys() - image_suffixes()
    assert ".dng" in unread
    wanted = {".heic": 2, ".dng": 1, ".jxl": 1, ".nrw": 1}
    assert found.unreadable() == {key: n for key, n in wanted.items() if key in unread}
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ImageNotFoundError, match=r"1 \.dng: dcraw"):
        names(tmp_path, "d")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="opens any folder")
def test_a_folder_that_cannot_be_opened_is_told(tmp_path: Path):
    make(tmp_path, "a.jpg", "b/c.jpg")
    (tmp_path / "b").chmod(0)
    found = search([str(tmp_path)], None)
    (tmp_path / "b").chmod(0o700)
    assert [line for line in found.problems if "b: cannot be searched" in line]


LISTED = "été/1 2.jpg\nb.jpg\n"


@pytest.mark.parametrize(
    "data",
    [
        LISTED.encode(),
        LISTED.encode("utf-8-sig"),
        LISTED.replace("\n", "\r\n").encode("utf-16"),
        b"\xfe\xff" + LISTED.encode("utf-16-be"),
        LISTED.replace("\n", "\0").encode(),
        ("\n" + LISTED + "\n\n").encode(),
        LISTED.encode("utf-32"),
        LISTED.replace("\n", "\r\n").encode("utf-16-le"),
        LISTED.encode("utf-16-be"),
    ],
)
def test_lists(data: bytes):
    assert find_images(["-"], Stdin(data)) == [Path("été/1 2.jpg"), Path("b.jpg")]


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(256)) * 9,
        b"\xff\x0a\xfa\x7f" + bytes(range(256)) * 9,
        b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj\n/\n" + bytes(range(256)),
        b"<svg xmlns='http://www.w3.org/2000/svg'>\n/\n</svg>\n",
        b"PK\3\4" + bytes(range(1, 256)) + b"\0/\0",
        bytes(500),
    ],
    ids=["HEIC", "JPEG XL", "PDF", "SVG", "zip", "zeros"],
)
def test_what_is_neither_a_list_nor_an_image_names_no_files(data: bytes):
    """A NUL or a line's end before and behind a slash would be the whole file system."""
    found = search(["-"], Stdin(data))
    assert found.content == {STDIN: data} and found.paths == [STDIN]


def test_lists_hold_odd_names_where_the_first_is_there(tmp_path: Path):
    make(tmp_path, "a\1\n.jpg", "b")
    names = [tmp_path / "a\1\n.jpg", tmp_path / "\nc", tmp_path / "b"]
    assert find_images(["-"], Stdin(b"\0".join(map(os.fsencode, names)))) == names


def test_lists_of_short_utf_16_are_no_single_letters():
    for text in ("a/b.jpg", "/x.jpg", "写真/日本.jpg\r\n"):
        for encoding in ("utf-16-le", "utf-16-be"):
            assert find_images(["-"], Stdin(text.encode(encoding))) == [Path(text.rstrip())]


def test_lists_hold_names_of_any_bytes(tmp_path: Path):
    assert find_images(["-"], Stdin(b"a\xff.jpg\0b\n.jpg\0")) == [
        Path(os.fsdecode(b"a\xff.jpg")),
        Path("b\n.jpg"),
    ]
    # Cameras and programs name files as some formats begin.
    for name in ("P1010001.JPG", "BM1.jpg", "GIF89a.gif", "RIFF.webp", "II.tif", "MM.tif"):
        assert find_images(["-"], Stdin(f"{name}\nb.jpg\n".encode()))[0] == Path(name)


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_lists_that_name_nothing(data: bytes):
    with pytest.raises(ImageNotFoundError, match="-: no image files there"):
        find_images(["-"], Stdin(data))
    with pytest.raises(ImageNotFoundError, match="standard input is closed"):
        find_images(["-"], None)


@pytest.mark.parametrize("style", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_an_image_on_standard_input(style: str):
    buffer = io.BytesIO()
    draw_photo(1).save(buffer, style)
    for data in (buffer.getvalue(), buffer.getvalue()[:-20]):
        found = search(["-"], Stdin(data))
        assert found.content == {STDIN: data} and found.paths == [STDIN]
    with pytest.raises(ImageNotFoundError, match="an image, where a list"):
        find_images(["-"], Stdin(data))


def test_subfolders_as_seen_from_the_search(tmp_path: Path):
    make(tmp_path, "p/a/1.jpg", "q/1.jpg")
    found = search([str(tmp_path / "p"), str(tmp_path / "q/1.jpg")], None)
    assert list(map(found.below, found.paths)) == [Path("a/1.jpg"), Path("1.jpg")]
