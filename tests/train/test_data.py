"""Both layouts of Flickr8k, the split, cleaning, vocabulary, and what is left out."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CAPTIONS, draw_photo, kaggle

from capexport.errors import DatasetError
from capexport.families.cnn_lstm import Vocabulary
from train.data import (
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


@pytest.mark.parametrize("layout", [kaggle, original, flickr30k])
def test_layouts(layout: Callable[[Path], Path], tmp_path: Path):
    dataset = read_dataset(layout(tmp_path), 0.1, 0.1, seed=0)
    assert len(dataset.photos()) == 20
    for photo in dataset.photos():
        assert photo.captions == tuple(CAPTIONS)
        assert photo.path.is_file()


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


def test_the_official_split_counts_where_it_is(tmp_path: Path):
    folder = original(tmp_path)
    wanted = {"train": range(12), "validation": range(12, 15), "test": range(15, 20)}
    for split, official in (("train", "train"), ("validation", "dev"), ("test", "test")):
        text = "".join(f"{index:03}.jpg\n" for index in wanted[split])
        (folder / "Flickr8k_text" / f"Flickr_8k.{official}Images.txt").write_text(text)
    assert names(read_dataset(folder, 0.1, 0.1, seed=0)) == {
        split: [f"{index:03}.jpg" for index in indices] for split, indices in wanted.items()
    }


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
        (lambda folder: (folder / "Images").rename(folder / "pictures"), "no image folder"),
        (lambda folder: [p.unlink() for p in (folder / "Images").iterdir()], "no usable photo"),
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


def test_vocabulary_keeps_frequent_words_in_a_fixed_order():
    captions = [["dog", "runs"], ["dog", "cat"], ["cat", "dog", "sits"]]
    assert build_vocabulary(captions, 2).words == (*Vocabulary.SPECIALS, "dog", "cat")


def test_captions_as_arrays():
    vocabulary = Vocabulary((*Vocabulary.SPECIALS, "dog", "runs"))
    texts = [("A dog runs .", "7 !"), (), ("Dog",), ("a cat", "Runs, dog")]
    photos = [Photo(f"{i}.jpg", Path(f"{i}.jpg"), captions) for i, captions in enumerate(texts)]
    examples = encode_captions(iter(photos), vocabulary, keep_articles=False)
    assert len(examples) == 4  # "7 !" has no word
    assert examples.lengths.tolist() == [4, 3, 3, 4]
    places, ids = examples.batch([3, 0, 2])
    assert places.tolist() == [3, 0, 3]
    assert [row.tolist() for row in ids] == [[1, 5, 4, 2], [1, 4, 5, 2], [1, 3, 2]]
    assert examples.batch(range(4))[0].tolist() == [0, 2, 3, 3]
    assert all(np.shares_memory(row, examples.ids) for row in ids)
    empty = encode_captions([], vocabulary, keep_articles=False)
    assert (len(empty), empty.lengths.tolist(), empty.batch([])[1]) == (0, [], [])


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
