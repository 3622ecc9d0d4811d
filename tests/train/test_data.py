"""Data sets as they are published, splits, cleaning, vocabulary, and what is left out."""

import csv
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CAPTIONS, draw_photo, kaggle

from capexport import DatasetError
from capexport.families.cnn_lstm import Vocabulary
from train.data import (
    SPLITS,
    Dataset,
    Photo,
    build_vocabulary,
    clean,
    encode_captions,
    main,
    read_dataset,
)


def original(folder: Path, count: int = 20) -> Path:
    kaggle(folder, count)
    (folder / "captions.txt").unlink()
    (folder / "Images").rename(folder / "Flicker8k_Dataset")
    (folder / "Flickr8k_text").mkdir()
    lines = [
        f"{index:03}.jpg#{number}\t{caption}"
        for index in range(count)
        for number, caption in enumerate(CAPTIONS)
    ]
    # A line like this one is in the real file.
    lines.append("2258277193_586949ec62.jpg.1#0\tpeople waiting")
    (folder / "Flickr8k_text" / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    return folder


def names(dataset: Dataset) -> dict[str, list[str]]:
    return {split: [photo.name for photo in photos] for split, photos in dataset.splits.items()}


def flickr30k(folder: Path, count: int = 20) -> Path:
    kaggle(folder, count)
    (folder / "captions.txt").unlink()
    (folder / "Images").rename(folder / "flickr30k_images")
    lines = [
        f"{index:03}.jpg| {number}| {caption}"
        for index in range(count)
        for number, caption in enumerate(CAPTIONS)
    ]
    (folder / "results.csv").write_text("image_name| comment_number| comment\n" + "\n".join(lines))
    return folder


def photos_at(folder: Path, *paths: str) -> None:
    """Empty files: whether they can be decoded is not asked before training."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def karpathy(file: Path, photos: dict[str, str], dataset: str) -> None:
    """A file as Karpathy's; `photos` has paths and their splits."""
    images = []
    for index, (path, split) in enumerate(photos.items()):
        folder, _, name = path.rpartition("/")
        sentences = [
            {
                "tokens": text.lower().split(),
                "raw": text,
                "imgid": index,
                "sentid": 2 * index + number,
            }
            for number, text in enumerate(CAPTIONS)
        ]
        image = {
            "sentids": [sentence["sentid"] for sentence in sentences],
            "imgid": index,
            "sentences": sentences,
            "split": split,
            "filename": name,
        }
        if folder:
            image |= {"filepath": folder, "cocoid": int(name[-10:-4])}
        images.append(image)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "dataset": dataset}))


def coco(folder: Path, train: int, validation: int, year: str = "2017") -> Path:
    """COCO's own files; the photos of train come first."""
    (folder / "annotations").mkdir(parents=True)
    for half, numbers in (("train", range(train)), ("val", range(train, train + validation))):
        names = {n: f"{n:012}.jpg" for n in numbers}
        if year == "2014":
            names = {n: f"COCO_{half}2014_{name}" for n, name in names.items()}
        photos_at(folder / f"{half}{year}", *names.values())
        document = {
            "info": {"description": "COCO 2017 Dataset", "year": 2017},
            "images": [
                {"license": 3, "file_name": name, "height": 480, "width": 640, "id": n}
                for n, name in names.items()
            ],
            "licenses": [{"id": 3, "name": "Attribution"}],
            "annotations": [
                {"image_id": n, "id": 2 * n + number, "caption": f"{text}\n"}
                for number, text in enumerate(CAPTIONS)
                for n in reversed(names)
            ],
        }
        (folder / "annotations" / f"captions_{half}{year}.json").write_text(json.dumps(document))
    return folder


def metadata(file: Path, *photos: str) -> None:
    """An image folder's of Hugging Face, with a row for each caption."""
    rows = [{"file_name": name, "text": text} for name in photos for text in CAPTIONS]
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sizes(dataset: Dataset) -> list[int]:
    for photo in dataset.photos():
        assert photo.captions == tuple(CAPTIONS)
        assert photo.path.is_file()
    assert len({photo.name for photo in dataset.photos()}) == len(dataset.photos())
    return [len(dataset.splits[split]) for split in SPLITS]


@pytest.mark.parametrize("layout", [kaggle, original, flickr30k])
def test_layouts(layout: Callable[[Path], Path], tmp_path: Path):
    dataset = read_dataset(layout(tmp_path), 0.1, 0.1, seed=0)
    assert sizes(dataset) == [16, 2, 2]
    assert dataset.official == ""


@pytest.mark.parametrize("place", ["", "annotations", "caption_datasets"])
@pytest.mark.parametrize(
    ("dataset", "images"),
    [
        ("flickr8k", "Images"),
        ("flickr8k", "Flicker8k_Dataset"),
        ("flickr30k", "flickr30k-images"),
        ("flickr30k", "flickr30k_images/flickr30k_images"),
        ("flickr30k", "."),
    ],
)
def test_karpathys_split(dataset: str, images: str, place: str, tmp_path: Path, capsys):
    splits = {f"{n}.jpg": split for n, split in enumerate(["train"] * 4 + ["test"] * 3 + ["val"])}
    karpathy(tmp_path / place / f"dataset_{dataset}.json", splits, dataset)
    photos_at(tmp_path / images, *splits, "no_captions.JPG", "Thumbs.db")
    (tmp_path / images / "3.jpg").unlink()
    found = read_dataset(tmp_path, 0.1, 0.1, 0)
    assert (found.official, sizes(found)) == (f"dataset_{dataset}.json", [3, 1, 3])
    assert names(found)["test"] == ["4.jpg", "5.jpg", "6.jpg"]
    assert found.skipped == {
        "captioned photos without an image file": ["3.jpg"],
        "photos without captions": ["no_captions.JPG"],
    }
    assert f"captions of dataset_{dataset}.json, with their split" in capsys.readouterr().err


COCO_SPLITS = {
    "train2014/COCO_train2014_000000000001.jpg": "train",
    "val2014/COCO_val2014_000000000002.jpg": "restval",
    "val2014/COCO_val2014_000000000003.jpg": "val",
    "val2014/COCO_val2014_000000000004.jpg": "test",
}
COCO_2017 = ["train2017/000000000001.jpg", "train2017/000000000002.jpg",
             "val2017/000000000003.jpg", "train2017/000000000004.jpg"]  # fmt: skip


@pytest.mark.parametrize(
    ("below", "photos"),
    [
        (".", [*COCO_SPLITS]),
        ("images", [*COCO_SPLITS]),
        ("Images", [path.split("/")[1] for path in COCO_SPLITS]),
        (".", COCO_2017),
        *(
            (".", [f"{path.split('/')[0]}/{path}" for path in some])
            for some in (COCO_SPLITS, COCO_2017)
        ),
    ],
)
def test_karpathys_coco(below: str, photos: list[str], tmp_path: Path):
    karpathy(tmp_path / "dataset_coco.json", COCO_SPLITS, "coco")
    photos_at(tmp_path / below, *photos)
    dataset = read_dataset(tmp_path, 0.1, 0.1, 0)
    assert sizes(dataset) == [2, 1, 1]
    assert [photo.name for photo in dataset.photos()] == photos
    assert dataset.photos()[0].path == tmp_path / below / photos[0]


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_cocos_validation_split_is_halved(year: str, tmp_path: Path, capsys):
    folder = coco(tmp_path / "coco", 5, 6, year)
    dataset = read_dataset(folder, 0.1, 0.1, 0)
    assert sizes(dataset) == [5, 3, 3]
    assert {photo.name.split("/")[0] for photo in dataset.splits["train"]} == {f"train{year}"}
    assert {photo.name.split("/")[0] for photo in dataset.splits["test"]} == {f"val{year}"}
    assert dataset.official == f"captions_train{year}.json, captions_val{year}.json"
    assert "halved into validation and test, seed 0" in capsys.readouterr().err
    assert names(read_dataset(folder, 0.1, 0.1, 1))["test"] != names(dataset)["test"]
    # Karpathy's split, where a model was trained without it: some of its test photos were seen.
    karpathy(folder / "dataset_coco.json", {photo.name: "test" for photo in dataset.photos()}, "")
    assert names(read_dataset(folder, 0.1, 0.1, 0, dataset.official)) == names(dataset)
    # The validation photos alone, 1 GB where the others take 18: split as any folder.
    (folder / "dataset_coco.json").unlink()
    shutil.rmtree(folder / f"train{year}")
    dataset = read_dataset(folder, 0.2, 0.2, 0)
    assert (dataset.official, sizes(dataset), dataset.skipped) == ("", [4, 1, 1], {})


def test_cocos_photos_in_one_folder(tmp_path: Path):
    folder = coco(tmp_path / "coco", 5, 6)
    (folder / "images").mkdir()
    for photo in folder.glob("*2017/*"):
        photo.rename(folder / "images" / photo.name)
    for half in ("train2017", "val2017"):
        (folder / half).rmdir()
    assert sizes(read_dataset(folder, 0.1, 0.1, 0)) == [5, 3, 3]


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_in_folders_of_its_archives_names(year: str, tmp_path: Path):
    folder = coco(tmp_path / "coco", 5, 6, year)
    for inner, outer in (
        (f"train{year}", f"train{year}"),
        (f"val{year}", f"val{year}"),
        ("annotations", f"annotations_trainval{year}"),
    ):
        (folder / inner).rename(tmp_path / inner)
        (folder / outer).mkdir()
        (tmp_path / inner).rename(folder / outer / inner)
    dataset = read_dataset(folder, 0.1, 0.1, 0)
    assert sizes(dataset) == [5, 3, 3]
    assert dataset.splits["train"][0].name.startswith(f"train{year}/train{year}/")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_an_image_folder_of_hugging_face(name: str, tmp_path: Path):
    photos = [f"{n}.png" for n in range(10)]
    photos_at(tmp_path / "plain", *photos)
    metadata(tmp_path / "plain" / name, *photos)
    plain = read_dataset(tmp_path / "plain", 0.2, 0.2, 0)
    assert (plain.official, sizes(plain)) == ("", [6, 2, 2])
    parts = {"train": 5, "validation": 2, "test": 3}
    for part, count in parts.items():
        photos_at(tmp_path / "parts" / part, *photos[:count])
        metadata(tmp_path / "parts" / part / name, *photos[:count])
    # One file for all, with folders of other names, and a photo that is in none of them.
    paths = ["train/a/0.png", "train/b/0.png", "dev/0.png", "test/0.png", "0.png"]
    photos_at(tmp_path / "one", *paths)
    metadata(tmp_path / "one" / name, *paths)
    split = read_dataset(tmp_path / "parts", 0.1, 0.1, 0)
    assert (split.official, sizes(split)) == ("train/, validation/, test/", [5, 2, 3])
    assert names(split)["validation"] == ["validation/0.png", "validation/1.png"]
    one = read_dataset(tmp_path / "one", 0.1, 0.1, 0)
    assert sizes(one) == [2, 1, 1]
    assert one.skipped == {"photos in no split": ["0.png"]}
    # Without validation, the training split gives its share.
    shutil.rmtree(tmp_path / "parts" / "validation")
    split = read_dataset(tmp_path / "parts", 0.2, 0.1, 0)
    assert (split.official, sizes(split)) == ("train/, test/", [4, 1, 3])
    (tmp_path / "parts" / "test").rename(tmp_path / "parts" / "eval")
    split = read_dataset(tmp_path / "parts", 0.2, 0.1, 0)
    assert (split.official, sizes(split)) == ("train/, eval/", [4, 1, 3])


def test_which_of_several_counts(tmp_path: Path, capsys):
    folder = kaggle(tmp_path)
    seeded = names(read_dataset(folder, 0.1, 0.1, 0))
    metadata(folder / "Images" / "metadata.jsonl", "000.jpg")  # of the photos' folder, not of this
    metadata(folder / "metadata.jsonl", "Images/000.jpg")
    assert names(read_dataset(folder, 0.1, 0.1, 0)) == seeded
    # All three of Karpathy's, as one downloads them; Flickr30k's photos hold some of Flickr8k's.
    splits = {f"{n:03}.jpg": ("train", "val", "test")[n % 3] for n in range(18)}
    others = {f"other{n:06}.jpg": "train" for n in range(20)}
    karpathy(folder / "dataset_coco.json", {f"train2014/{name}": "train" for name in others}, "")
    karpathy(folder / "dataset_flickr30k.json", splits | others, "flickr30k")
    capsys.readouterr()
    assert names(read_dataset(folder, 0.1, 0.1, 0)) == seeded
    assert capsys.readouterr().err == (
        f"{folder}: captions of captions.txt, split by photo, seed 0; not taken: "
        "dataset_flickr30k.json (18 of 38 photos), dataset_coco.json (0 of 20 photos), "
        "metadata.jsonl\n"
    )
    karpathy(folder / "dataset_flickr8k.json", splits, "flickr8k")
    dataset = read_dataset(folder, 0.1, 0.1, 0)
    assert (dataset.official, sizes(dataset)) == ("dataset_flickr8k.json", [6, 6, 6])
    # What was trained on a seeded split is scored on it.
    assert names(read_dataset(folder, 0.1, 0.1, 0, official=False)) == seeded
    assert names(read_dataset(folder, 0.1, 0.1, 0, official="")) == seeded
    with pytest.raises(DatasetError, match=r"captions_train2017.json is there, and the model was"):
        read_dataset(folder, 0.1, 0.1, 0, official="captions_train2017.json")


@pytest.mark.parametrize(
    "outside", ["../0.jpg", "a/../../0.jpg", "/0.jpg", "C:/0.jpg", "..\\0.jpg"]
)
def test_no_file_name_leads_out_of_the_folder(outside: str, tmp_path: Path):
    folder = tmp_path / "data"
    photos_at(tmp_path, "0.jpg", "data/0.jpg", "data/Images/0.jpg")
    for write in (
        lambda: metadata(folder / "metadata.jsonl", outside),
        lambda: metadata(folder / "metadata.csv", outside),
        lambda: (folder / "captions.txt").write_text(f"image,caption\n{outside},A dog\n"),
        lambda: karpathy(folder / "dataset_flickr8k.json", {outside[:-5] + "000001.jpg": ""}, ""),
    ):
        write()
        with pytest.raises(DatasetError, match=r"leads out of the data folder"):
            read_dataset(folder, 0.1, 0.1, 0)


def test_links_are_followed(tmp_path: Path):
    folder = kaggle(tmp_path / "data")
    (folder / "Images").rename(tmp_path / "elsewhere")
    (folder / "Images").symlink_to(tmp_path / "elsewhere")
    (folder / "Images" / "001.jpg").unlink()
    (folder / "Images" / "001.jpg").symlink_to("000.jpg")
    (folder / "Images" / "002.jpg").unlink()
    (folder / "Images" / "002.jpg").symlink_to("gone.jpg")
    dataset = read_dataset(folder, 0.1, 0.1, 0)
    assert dataset.skipped == {"captioned photos without an image file": ["002.jpg"]}
    assert len(dataset.photos()) == 19


def test_accents_of_file_names_may_be_letters_of_their_own(tmp_path: Path):
    folder = kaggle(tmp_path)
    (folder / "Images" / "000.jpg").rename(folder / "Images" / "e\u0301te\u0301.jpg")
    text = (folder / "captions.txt").read_text().replace("000.jpg", "\u00e9t\u00e9.jpg")
    (folder / "captions.txt").write_text(text, encoding="utf-8")
    dataset = read_dataset(folder, 0.1, 0.1, 0)
    assert not dataset.skipped
    assert all(photo.path.is_file() for photo in dataset.photos())


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"0.jpg": "train", "a/000000.jpg": "val", "b/000000.jpg": "val"}, "of two photos"),
        ({"0.jpg": "train", "1.jpg": "holdout"}, "1.jpg: of a split that is not known: 'holdout'"),
    ],
)
def test_a_split_that_cannot_be(splits: dict[str, str], message: str, tmp_path: Path):
    karpathy(tmp_path / "dataset_flickr8k.json", splits, "flickr8k")
    photos_at(tmp_path / "Images", "0.jpg", "1.jpg", "000000.jpg")
    with pytest.raises(DatasetError, match=message):
        read_dataset(tmp_path, 0.1, 0.1, 0)


def test_a_photo_in_two_splits(tmp_path: Path):
    folder = kaggle(tmp_path)
    for part in ("train", "dev", "test"):
        (folder / f"Flickr_8k.{part}Images.txt").write_text("000.jpg\n")
    with pytest.raises(DatasetError, match="a photo in two splits"):
        read_dataset(folder, 0.1, 0.1, 0)


def test_the_split_is_80_10_10_by_photo_and_the_same_everywhere(tmp_path: Path):
    folder = kaggle(tmp_path / "a")
    first = names(read_dataset(folder, 0.1, 0.1, seed=0))
    assert [len(photos) for photos in first.values()] == [16, 2, 2]
    assert len({name for photos in first.values() for name in photos}) == 20
    # Written down once: a split that moved would make every published score incomparable.
    assert first["validation"] == ["015.jpg", "008.jpg"]
    assert names(read_dataset(folder, 0.1, 0.1, seed=1)) != first
    # A missing photo moves no other one to another split.
    (folder / "Images" / first["train"][3]).unlink()
    first["train"].pop(3)
    assert names(read_dataset(folder, 0.1, 0.1, seed=0)) == first


@pytest.mark.parametrize("texts", ["Flickr8k_text", "Flickr_TextData"])
def test_the_official_split_counts_where_it_is(texts: str, tmp_path: Path):
    folder = original(tmp_path)
    (folder / "Flickr8k_text").rename(folder / texts)
    wanted = {"train": range(12), "validation": range(12, 15), "test": range(15, 20)}
    for split, official in (("train", "train"), ("validation", "dev"), ("test", "test")):
        text = "".join(f"{index:03}.jpg\n" for index in wanted[split])
        (folder / texts / f"Flickr_8k.{official}Images.txt").write_text(text)
    assert names(read_dataset(folder, 0.1, 0.1, seed=0)) == {
        split: [f"{index:03}.jpg" for index in indices] for split, indices in wanted.items()
    }


@pytest.mark.parametrize("shares", [(0, 0.1), (0.6, 0.4), (float("nan"), 0.1)])
def test_shares_that_leave_a_split_empty(shares: tuple[float, float], tmp_path: Path):
    with pytest.raises(DatasetError, match="--validation and --test must leave"):
        read_dataset(kaggle(tmp_path), *shares, seed=0)


def test_three_photos_are_enough(tmp_path: Path):
    dataset = read_dataset(kaggle(tmp_path / "three", 3), 0.1, 0.1, seed=0)
    assert [len(photos) for photos in dataset.splits.values()] == [1, 1, 1]
    with pytest.raises(DatasetError, match=r"too few photos with captions .*: 2"):
        read_dataset(kaggle(tmp_path / "two", 2), 0.1, 0.1, seed=0)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("My captions.CSV", "captions.txt"),
        ("train.jsonl", "metadata.jsonl"),
        ("captions.json", "captions_train.json"),
    ],
)
def test_a_captions_file_of_another_name_is_told_a_known_one(name, other, tmp_path: Path):
    folder = kaggle(tmp_path)
    (folder / "captions.txt").rename(folder / name)
    with pytest.raises(DatasetError, match=f"if {name} holds them, rename it to {other}"):
        read_dataset(folder, 0.1, 0.1, seed=0)
    with pytest.raises(DatasetError, match="a file; pass the folder that it lies in"):
        read_dataset(folder / name, 0.1, 0.1, seed=0)
    (folder / "also.csv").touch()
    with pytest.raises(DatasetError, match=r"captions_\*.json$"):
        read_dataset(folder, 0.1, 0.1, seed=0)


def test_what_does_not_fit_is_counted_and_skipped(tmp_path: Path):
    folder = kaggle(tmp_path)
    (folder / "Images" / "003.jpg").unlink()
    draw_photo(1).save(folder / "Images" / "uncaptioned.jpg")
    dataset = read_dataset(folder, 0.1, 0.1, seed=0)
    assert dataset.skipped == {
        "captioned photos without an image file": ["003.jpg"],
        "photos without captions": ["uncaptioned.jpg"],
    }
    assert len(dataset.photos()) == 19


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "captions.txt").unlink(), "neither captions.txt nor"),
        (lambda folder: (folder / "captions.txt").write_text("image,caption\n"), "no captions"),
        (lambda folder: (folder / "captions.txt").write_bytes(b"\xff\xfe\x00"), "not a caption"),
        (lambda folder: (folder / "captions.txt").write_text("a,b\n0.jpg,c\n"), "unknown columns"),
        (
            lambda folder: (folder / "Images").rename(folder / "pictures"),
            "none of the 20 photos is there",
        ),
        (lambda folder: [p.unlink() for p in (folder / "Images").iterdir()], "they may lie in"),
    ],
)
def test_nothing_usable_is_an_error(damage, message: str, tmp_path: Path):
    folder = kaggle(tmp_path)
    damage(folder)
    with pytest.raises(DatasetError, match=message):
        read_dataset(folder, 0.1, 0.1, seed=0)


def test_cleaning():
    caption = "A man's 2 dogs , and a tri-colored   cat run -- fast !"
    assert clean(caption, keep_articles=False) == [
        "mans", "dogs", "and", "tricolored", "cat", "run", "fast"
    ]  # fmt: skip
    assert clean("A dog .", keep_articles=True) == ["a", "dog"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("L’homme “court” — vite…", ["lhomme", "court", "vite"]),  # noqa: RUF001
        ("E\u0301te\u0301", ["été"]),
        ("एक लड़का घास पर दौड़ रहा है।", ["एक", "लड़का", "घास", "पर", "दौड़", "रहा", "है"]),
        ("สุนัข วิ่ง บน หญ้า", ["สุนัข", "วิ่ง", "บน", "หญ้า"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # noqa: RUF001
        ("一 只 狗 ， 跑 。", ["一", "只", "狗", "跑"]),  # noqa: RUF001
        ("❤\ufe0f dog 🐶 2nd \ufe0f ²", ["dog"]),
    ],
)
def test_cleaning_leaves_the_words_of_every_script(caption: str, words: list[str]):
    found = clean(caption, keep_articles=True)
    assert found == [unicodedata.normalize("NFC", word) for word in words]


def test_vocabulary_keeps_frequent_words_in_a_fixed_order():
    captions = [["dog", "runs"], ["dog", "cat"], ["cat", "dog", "sits"]]
    assert build_vocabulary(captions, 2).words == (*Vocabulary.SPECIALS, "dog", "cat")


def test_captions_as_arrays():
    vocabulary = Vocabulary((*Vocabulary.SPECIALS, "dog", "runs"))
    texts = [("A dog runs .", "7 !"), (), ("Dog",), ("a cat", "Runs, dog")]
    photos = [Photo(f"{i}.jpg", Path(f"{i}.jpg"), captions) for i, captions in enumerate(texts)]
    one_each = encode_captions(photos, vocabulary, keep_articles=False, whole=False)
    assert len(one_each) == 4  # "7 !" has no word
    assert one_each.longest.tolist() == [4, 3, 3, 4]
    found = [(path.name, [ids.tolist() for ids in captions]) for path, captions in one_each]
    assert found == [
        ("0.jpg", [[1, 4, 5, 2]]),
        ("2.jpg", [[1, 4, 2]]),
        ("3.jpg", [[1, 3, 2]]),
        ("3.jpg", [[1, 5, 4, 2]]),
    ]
    whole = encode_captions(photos, vocabulary, keep_articles=False, whole=True)
    assert [(path.name, len(captions)) for path, captions in whole] == [
        ("0.jpg", 1), ("2.jpg", 1), ("3.jpg", 2)
    ]  # fmt: skip
    assert whole.longest.tolist() == [4, 3, 4]
    assert all(np.shares_memory(ids, whole.ids) for _, captions in whole for ids in captions)
    assert whole.digest() != one_each.digest()
    assert len(encode_captions([], vocabulary, keep_articles=False, whole=True)) == 0


@pytest.mark.parametrize("file", ["checkpoint.json", "best/checkpoint.json", "manifest.json"])
def test_the_photos_of_a_split_as_a_run_had_them(file: str, tmp_path: Path, capsys):
    folder = kaggle(tmp_path / "flickr8k")
    dataset = read_dataset(folder, 0.2, 0.3, seed=3)
    wanted = [str(photo.path) for photo in dataset.splits["test"]]
    run = tmp_path / "run"
    (run / file).parent.mkdir(parents=True)
    split = {"validation": 0.2, "test": 0.3, "seed": 3, "official": False}
    training: dict = {"split": split, "photos": {"test": 6}}
    where = {"provenance": {"training": training}} if "manifest" in file else {"training": training}
    (run / file).write_text(json.dumps(where))
    asked = ["--data", str(folder), "--run", str(run)]
    assert main(asked) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == wanted
    assert "trained" not in err
    assert main([*asked, "--seed", "0"]) == 2
    assert "was trained with seed 3" in capsys.readouterr().err
    # A photo that cannot be read is left out, as in training.
    Path(wanted[0]).write_bytes(b"no photo")
    assert main(asked) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == wanted[1:]
    assert "left out: 1 unreadable images" in err
    assert "the training had 6 photos for test" in err
    # A run on the official split, and a folder that has lost it.
    split["official"] = True
    (run / file).write_text(json.dumps(where))
    assert main(asked) == 2
    assert "Flickr_8k.testImages.txt" in capsys.readouterr().err
    # A run from before splits were kept.
    del training["split"]
    (run / file).write_text(json.dumps(where))
    assert main(asked) == 0
    out, err = capsys.readouterr()
    assert "does not say how its data was split: taking shares of 0.1 and seed 0" in err
    plain = read_dataset(folder, 0.1, 0.1, 0).splits["test"]
    assert set(out.splitlines()) == {str(photo.path) for photo in plain} - {wanted[0]}


def test_the_photos_of_a_split_as_a_list(tmp_path: Path, capsys):
    folder = kaggle(tmp_path / "flickr8k")
    wanted = read_dataset(folder, 0.1, 0.1, seed=3).splits["test"]
    assert main(["--data", str(folder), "--seed", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(photo.path) for photo in wanted]
    assert main(["--data", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
