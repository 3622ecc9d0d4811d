"""Files of human captions as data sets have them; what csv.writer writes is read back."""

import csv
import io
from pathlib import Path

import pytest

from capexport.errors import DatasetError
from capexport.references import read_references

PLAIN = {"000.jpg": ["A dog runs .", "Two dogs play"], "001.jpg": ["A man sits", "A woman"]}
ROWS = [(name, text) for name, texts in PLAIN.items() for text in texts]


def written(rows, **style) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, **style).writerows(rows)
    return stream.getvalue()


def read(tmp_path: Path, content: str | bytes) -> dict[str, list[str]]:
    file = tmp_path / "captions.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_references(file)


KAGGLE = written([("image", "caption"), *ROWS])
NUMBERED = [(name, str(index % 2), text) for index, (name, text) in enumerate(ROWS)]
FLICKR30K = written([("image_name", "comment_number", "comment"), *NUMBERED])


@pytest.mark.parametrize(
    "content",
    [
        KAGGLE,
        KAGGLE.replace("\r\n", "\n"),
        KAGGLE.replace("\r\n", "\r"),
        KAGGLE.replace("\r\n", "\n\n") + "\n \n",
        "\ufeff" + KAGGLE,
        "\ufeff" + written(ROWS),
        written(ROWS),
        "\n" + written(ROWS),
        KAGGLE.replace("image,caption", "Image, Caption "),
        FLICKR30K,
        FLICKR30K.replace(",", "| "),
        written([("comment", "image_name"), *((text, name) for name, text in ROWS)]),
        *(written([("image", "caption"), *ROWS], delimiter=sign) for sign in "\t;|"),
        *(written(ROWS, delimiter=sign, quoting=csv.QUOTE_ALL) for sign in ",\t;|"),
        "".join(f"{name}#{number}\t{text}\n" for name, number, text in NUMBERED),
    ],
)
def test_layouts(content: str, tmp_path: Path):
    assert read(tmp_path, content) == PLAIN


@pytest.mark.parametrize("sign", ",;|\t")
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_csv_writes_is_read(sign: str, quoting: int, tmp_path: Path):
    texts = ['a "big" dog , a cat', '"Big" dogs', "one; two | three\tfour", 'a 6" pipe', "dé", '"']
    content = written([("image", "caption"), *(("0.jpg", text) for text in texts)],
                      delimiter=sign, quoting=quoting)  # fmt: skip
    assert read(tmp_path, content) == {"0.jpg": texts}


def test_what_people_write_without_quoting(tmp_path: Path):
    content = 'image,caption\n0.jpg,a dog , a cat, a bird\n0.jpg,a 6" pipe\n0.jpg,A "big" dog\n'
    assert read(tmp_path, content)["0.jpg"] == ["a dog , a cat, a bird", 'a 6" pipe', 'A "big" dog']
    # A quoted word and more: as Python's csv.
    assert read(tmp_path, 'image,caption\n0.jpg,"Big" dog runs\n') == {"0.jpg": ["Big dog runs"]}
    # In Flickr8k.token.txt nothing is quoted.
    assert read(tmp_path, '0.jpg#0\t"Big" dog , a\n0.jpg#1\t"a\n')["0.jpg"] == [
        '"Big" dog , a',
        '"a',
    ]


def test_odd_lines_of_the_real_files(tmp_path: Path):
    name = "2258277193_586949ec62.jpg.1"
    assert read(tmp_path, f"0.jpg#0\ta dog\n{name}#0\tpeople\n") == {
        "0.jpg": ["a dog"], name: ["people"]
    }  # fmt: skip
    content = "image_name| comment_number| comment\n0.jpg| 3| A dog .\n0.jpg| 4   A dog runs .\n"
    assert read(tmp_path, content) == {"0.jpg": ["A dog .", "A dog runs ."]}
    assert read(tmp_path, "image,caption\n0.jpg,a dog\n1.jpg,\n") == {"0.jpg": ["a dog"]}


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ('image,caption\n0.jpg,a\n0.jpg,"A man .\n1.jpg,b\n1.jpg,c\n', 3, "quotation mark"),
        ('image,caption\n0.jpg,a\n0.jpg,"A man .\n1.jpg,b\n1.jpg,"c\n', 3, "quotation mark"),
        ('0.jpg,"A man\nruns"\n', 1, "quotation mark"),
        ("image,caption\n0.jpg,A man\nruns\n", 3, "line breaks"),
        ("image,caption\n0.jpg,A man\nruns , fast\n", 3, "line breaks"),
        ("0.jpg#0\tA man\nruns\tfast\n", 2, "file name, #"),
        ("image,caption\n0.jpg,a dog\n1.jpg,A man 0.jpg,a cat\n", 3, "holds the file name 0.jpg"),
        ("0.jpg#0\tA man .0.jpg#1\ta cat\n", 1, "holds the file name 0.jpg"),
        ("name,text\n0.jpg,a dog\n", 1, "unknown columns 'name,text'"),
        ("image,caption,split\n0.jpg,a dog,train\n", 1, "unknown columns"),
        ("image,caption,caption\n0.jpg,a dog,a cat\n", 1, "unknown columns"),
        ("image,image_name,caption\n0.jpg,0.jpg,a cat\n", 1, "unknown columns"),
        ("image\n0.jpg\n", 1, "unknown columns"),
        ("0.jpg\n1.jpg\n", 1, "unknown columns"),
        ('{"images": [{"file_name": "0.jpg"}]}', 1, "unknown columns"),
        ("0.jpg,0,a dog\n0.jpg,1,a cat\n", 1, "a number stands before the caption"),
        ("image,caption\n0.jpg,0,a dog\n", 2, "a number stands before the caption"),
        ("image_name,comment_number,comment\n0.jpg,a dog,runs\n", 2, "not the number"),
        ("image_name,comment_number,comment\n0.jpg,0\n", 2, "2 columns where 3"),
        ("caption,image\na dog , a cat,0.jpg\n", 2, "3 columns where 2"),
        ("image,caption\n0,a dog\n", 2, "'0' is not the file name of an image"),
        ("image,caption\n,a dog\n", 2, "'' is not the file name"),
        ("image,caption\n0.jpg,a dog\n0.jpg,caf\u00e9\n".encode("latin-1"), 3, "UTF-8"),
        ("image,caption\n0.jpg,a dog\n".encode("utf-16"), 1, "UTF-8"),
        ("image,caption\n0.jpg,a dog\n".encode("utf-16-le"), 1, "UTF-8"),
        ("image,caption\n0.jpg,a\0 dog\n", 2, "UTF-8"),
        ("image,caption\n0.jpg," + "a" * 200_000, 2, "field limit"),
    ],
)
def test_what_cannot_be_read_names_file_and_line(content, line, message, tmp_path: Path):
    with pytest.raises(DatasetError, match=rf"captions.txt, line {line}: .*{message}"):
        read(tmp_path, content)


@pytest.mark.parametrize("content", ["", "\n\n", "image,caption\n", "\ufeff", "0.jpg,\n"])
def test_no_captions(content: str, tmp_path: Path):
    with pytest.raises(DatasetError, match=r"captions.txt: no captions in it"):
        read(tmp_path, content)
