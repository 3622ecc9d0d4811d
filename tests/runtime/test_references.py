"""Files of human captions as data sets have them; what csv.writer writes is read back."""

import csv
import io
import json
from pathlib import Path

import pytest

from capexport import DatasetError
from capexport.references import CaptionedImage, read_captions, read_references

PLAIN = {"000.jpg": ["A dog runs .", "Two dogs play"], "001.jpg": ["A man sits", "A woman"]}
ROWS = [(name, text) for name, texts in PLAIN.items() for text in texts]


def written(rows, **style) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, **style).writerows(rows)
    return stream.getvalue()


def read(tmp_path: Path, content: str | bytes, name="captions.txt") -> dict[str, list[str]]:
    file = tmp_path / name
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


KARPATHY = {
    "images": [
        {
            "filepath": "val2014",
            "filename": name,
            "imgid": 0,
            "split": "test",
            "sentences": [
                {"tokens": text.lower().split(), "raw": f"{text}\n", "imgid": 0, "sentid": 0}
                for text in (*texts, " ")
            ],
            "sentids": [0, 1, 2],
            "cocoid": 391895,
        }
        for name, texts in PLAIN.items()
    ],
    "dataset": "coco",
}
COCO = {
    "info": {"year": 2017},
    "images": [{"file_name": name, "id": id} for id, name in enumerate(["no.jpg", *PLAIN])],
    "annotations": [
        {"id": 7, "caption": f" {text}", "image_id": [*PLAIN].index(name) + 1}
        for name, text in ROWS
    ],
}
METADATA = [{"file_name": name, "text": text} for name, text in ROWS]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_coco.json", json.dumps(KARPATHY)),
        ("dataset_coco.JSON", "\ufeff" + json.dumps(KARPATHY, indent=1)),
        ("captions_val2017.json", json.dumps(COCO)),
        ("captions_val2017.json", json.dumps(COCO, indent=1)),
        ("metadata.jsonl", lines(METADATA)),
        ("metadata.jsonl", "\ufeff" + lines(METADATA).replace("\n", "\r\n\r\n").rstrip()),
        ("metadata.jsonl", lines({"caption": t, "file_name": n, "width": 1} for n, t in ROWS)),
        ("metadata.jsonl", lines({"file_name": n, "text": t} for n, t in PLAIN.items())),
        (
            "metadata.jsonl",
            lines([*METADATA, *({"file_name": "2.jpg", "text": t} for t in (None, ""))]),
        ),
        ("metadata.jsonl", lines({"file_name": f"./a/{n}", "text": t} for n, t in ROWS)),
        ("metadata.csv", written([("file_name", "text"), *ROWS])),
        ("metadata.csv", written([("text", "file_name"), *((t, n) for n, t in ROWS)])),
    ],
)
def test_json_and_tables(name: str, content: str, tmp_path: Path):
    assert read(tmp_path, content, name) == PLAIN


def test_what_else_a_file_tells(tmp_path: Path):
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps(KARPATHY))
    first = CaptionedImage("val2014/000.jpg", PLAIN["000.jpg"], "test", 391895)
    assert read_captions(file)[0] == first


def karpathy(**changes) -> str:
    return json.dumps({"images": [KARPATHY["images"][0] | changes]})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps(KARPATHY, indent=1)[:-40], "line .*, column .*: damaged JSON: "),
        ("a.json", '{"images": [\n  {"filename": }', "line 2, column 16: damaged JSON: Expecting"),
        ("a.json", "", "line 1, column 1: damaged"),
        ("a.json", "[" * 100_000, "neither Karpathy's JSON nor COCO's"),
        ("a.json", json.dumps(COCO).encode("utf-16"), "line 1: not a caption file in UTF-8"),
        ("a.json", lines([{"image_id": 1, "caption": "a dog"}]), "no list of images"),
        ("a.json", json.dumps([{"image_id": 1, "caption": "a dog"}]), "no list of images"),
        ("a.json", json.dumps({"images": {}}), "no list of images"),
        ("a.json", json.dumps({"images": [{"id": 1}]}), "an image without filename and sentences"),
        (
            "a.json",
            json.dumps({"images": KARPATHY["images"][:1] * 2}),
            "lists val2014/000.jpg twice",
        ),
        ("a.json", karpathy(sentences=[{"tokens": ["a"]}]), "where a caption should be"),
        ("a.json", karpathy(sentences=None), "neither Karpathy's JSON nor COCO's"),
        ("a.json", karpathy(filename=7), "neither Karpathy's JSON nor COCO's"),
        ("a.json", karpathy(filename="../0.jpg"), "leads out of the data folder"),
        ("a.json", karpathy(filepath="/data"), "leads out of the data folder"),
        ("a.json", json.dumps(COCO | {"images": [{"id": 1}]}), "an image without file_name"),
        ("a.json", json.dumps(COCO | {"images": COCO["images"] * 2}), "the same id or file_name"),
        ("a.json", json.dumps(COCO | {"images": COCO["images"][:2]}), "of no image that it lists"),
        ("a.json", json.dumps(COCO | {"annotations": [[1, "a dog"]]}), "of no image that it lists"),
        (
            "a.json",
            json.dumps(COCO | {"annotations": [{"image_id": 1, "bbox": []}]}),
            "no captions",
        ),
        ("a.jsonl", lines(METADATA) + '{"file_name": "0.jpg", "te', "line 5: "),
        (
            "a.jsonl",
            lines([METADATA[0], {"file_name": "0.jpg"}]),
            'line 2: .*"file_name" and "text"',
        ),
        ("a.jsonl", lines([METADATA[0], ["0.jpg", "a dog"]]), 'line 2: .*"file_name" and "text"'),
        ("a.jsonl", lines([{"image": "0.jpg", "text": "a"}]), 'line 1: .*"file_name" and "text"'),
        ("a.jsonl", lines([{"file_name": None, "text": "a"}]), "line 1: None is not a file name"),
        ("a.jsonl", lines([{"file_name": "0.jpg", "text": 7}]), "line 1: 7 where a caption"),
        ("a.jsonl", lines([{"file_name": "a/../../0.jpg", "text": "a"}]), "line 1: .*leads out"),
        ("a.jsonl", lines([{"file_name": f"{x}/0.jpg", "text": "a"} for x in "ab"]), "two images"),
        ("a.csv", "file_name,text\n0.jpg,a\n..\\0.jpg,a\n", "line 3: .*leads out"),
        ("a.csv", "file_name,text,label\n0.jpg,a,b\n", "line 1: unknown columns"),
    ],
)
def test_damaged_json(name: str, content: str | bytes, message: str, tmp_path: Path):
    with pytest.raises(DatasetError, match=rf"{name}.*{message}") as raised:
        read(tmp_path, content, name)
    assert "\n" not in str(raised.value)


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
    # As pandas writes it, and a caption that is empty.
    content = content.replace("| ", ",").rstrip("\n") + ",\n1.jpg,0,a cat\n1.jpg,1,\n"
    assert read(tmp_path, content) == {"0.jpg": ["A dog .", "A dog runs ."], "1.jpg": ["a cat"]}
    assert read(tmp_path, "image,caption\n0.jpg,a dog\n1.jpg,\n") == {"0.jpg": ["a dog"]}


def test_folders_between_backslashes(tmp_path: Path):
    file = tmp_path / "captions.csv"
    file.write_text("image,caption\nImages\\a\\0.jpg,a dog\nImages/a/0.jpg,a cat\n")
    assert read_captions(file) == [CaptionedImage("Images/a/0.jpg", ["a dog", "a cat"])]


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
