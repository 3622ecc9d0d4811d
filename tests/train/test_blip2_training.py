"""Fine-tuning small BLIP-2 models with random weights: what is learnt, what stays, the folder."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from blip2_models import OPT, POSITIONS, QFORMER, QUERIES, T5, VISION
from conftest import draw_photo
from PIL import Image
from safetensors.torch import load_file
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from benchmarks.random_blip2 import END, IMAGE, blip2_config, save_checkpoint
from capexport import Captioner
from capexport.export.blip2 import export_blip2
from capexport.models.blip2 import HuggingFaceCaptioner, load_pretrained
from capexport.models.blip2_checkpoint import read_checkpoint
from capexport.preprocessing import preprocess
from train import blip2_loop
from train.blip2 import Blip2TrainConfig, main
from train.blip2_loop import CaptionInputs, FineTuning, TrainedParts, batch_loss, learning_rate
from train.data import photos_as_trained, read_dataset

CAPTIONS = ["a dog runs", "two cats in the snow", "a red ball"]
LANGUAGES = {"opt": OPT, "t5": T5}
PARTS = ("query_tokens", "qformer.", "language_projection.")

pytestmark = pytest.mark.usefixtures("no_java", "one_thread")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint by its language model, which knows `CAPTIONS` but sees no difference between
    photos yet; its Q-Former drops nothing out."""
    made: dict[str, Path] = {}

    def make(language: str) -> Path:
        if language not in made:
            folder = tmp_path_factory.mktemp("blip2") / language
            qformer = {**QFORMER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            text = LANGUAGES[language]
            save_checkpoint(folder, blip2_config(language, VISION, qformer, text, QUERIES))
            teach_to_speak(folder)
            made[language] = folder
        return made[language]

    return make


def teach_to_speak(folder: Path) -> None:
    tuning = tuning_of(folder)
    language_model = tuning.model.language_model.requires_grad_(True)
    optimiser = torch.optim.AdamW(language_model.parameters(), 3e-3)
    captions = tuning.inputs.encode(CAPTIONS)
    nothing = np.zeros((len(captions), 3, *[VISION["image_size"]] * 2), np.float32)
    for _ in range(50):
        optimiser.zero_grad()
        batch_loss(tuning, nothing, captions).backward()
        optimiser.step()
    for file in folder.glob("model*"):
        file.unlink()
    tuning.model.save_pretrained(folder, max_shard_size="200KB")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos, each with one caption written twenty times; every split has copies of them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "Images").mkdir()
    with (folder / "captions.txt").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for split, prefix in (("train", "train_"), ("dev", "dev_"), ("test", "")):
            names = [f"{prefix}{index}.jpg" for index in range(len(CAPTIONS))]
            for index, (name, caption) in enumerate(zip(names, CAPTIONS, strict=True)):
                draw_photo(index, (60, 50)).save(folder / "Images" / name)
                writer.writerows([name, f" {caption.replace(' ', '  ')}"] for _ in range(20))
            (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names))
    return folder


def tuning_of(folder: Path, prompt: str | None = None, **options) -> FineTuning:
    """All that `batch_loss` needs."""
    checkpoint = read_checkpoint(folder)
    config = Blip2TrainConfig(Path(), **{"dtype": "fp32", **options})
    model = load_pretrained(checkpoint, torch.float32).requires_grad_(False)
    inputs = CaptionInputs(checkpoint, prompt)
    return FineTuning(
        config, {}, None, checkpoint, inputs, model, TrainedParts(model).requires_grad_()
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(index.values())}
    return {name: files[file][name] for name, file in index.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def runs(data: Path, model: Path, out: Path, *options: str) -> list[str]:
    common = ["--data", str(data), "--model", str(model), "--out", str(out), "--dtype", "fp32"]
    return [*common, "--batch-size", "6", "--learning-rate", "1e-2", *options]


@pytest.mark.parametrize("prompt", [None, "a photo of", "Answer: "])
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_loss_is_how_unlikely_generate_finds_the_caption(language, prompt, small):
    """With the prompt framed and the end token counted as `generate()` does it."""
    tuning = tuning_of(small(language), prompt)
    captioner = HuggingFaceCaptioner(tuning.model, tuning.checkpoint.processor)
    lengths = set()
    for seed in range(4):
        photo = draw_photo(seed)
        [said] = captioner.caption([photo], prompt=prompt, max_tokens=7, eos_token_id=-1)
        *caption, end = said.tokens[: 1 + said.tokens.index(said.tokens[-1])]
        [wanted] = captioner.caption([photo], prompt=prompt, eos_token_id=end)
        assert list(wanted.tokens) == caption
        tuning.inputs._end = end
        pixels = preprocess(photo, tuning.checkpoint.image)[None]
        with torch.no_grad():
            loss = batch_loss(tuning, pixels, [caption])
        assert loss.item() * (len(caption) + 1) == pytest.approx(-wanted.log_probability, rel=1e-3)
        lengths.add(len(caption))
    assert max(lengths) > 3


@pytest.mark.parametrize("language", LANGUAGES)
def test_padding_changes_no_loss(language, small):
    tuning = tuning_of(small(language))
    pixels = np.stack([preprocess(draw_photo(s), tuning.checkpoint.image) for s in range(2)])
    captions = [[7, 8], [30, 31, 32, 33, 34, 35, 36]]
    with torch.no_grad():
        together = batch_loss(tuning, pixels, captions)
        alone = [batch_loss(tuning, pixels[i : i + 1], captions[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, (alone[0] * 3 + alone[1] * 8) / 11)


def test_captions_are_kept_as_text(small):
    """White space is one space; behind a prompt there is one; names of special tokens are text."""
    checkpoint = read_checkpoint(small("opt"))
    decode = checkpoint.processor.tokenizer.decode
    for prompt, wanted in (
        (None, "A dog , <image> runs</s>"),
        ("a photo of", " A dog , <image> runs</s>"),
    ):
        inputs = CaptionInputs(checkpoint, prompt)
        [row] = inputs.encode([" A dog ,\t<image>\nruns</s> "])
        assert decode(row) == wanted
        assert not {IMAGE, END} & set(row)
    [joined] = CaptionInputs(checkpoint, "a photo of ").encode(["A dog"])
    assert decode(joined) == "A dog"
    [decoder] = CaptionInputs(read_checkpoint(small("t5")), "a photo of").encode(["A dog"])
    assert decoder == joined


def test_few_captions_are_tokenized_at_once(small, data, monkeypatch):
    """A tokenizer's answer to all of a large data set takes gigabytes."""
    dataset = read_dataset(data, 0.1, 0.1, 0)
    inputs, counted = CaptionInputs(read_checkpoint(small("opt")), None), []
    encode = inputs.encode
    monkeypatch.setattr(inputs, "encode", lambda some: counted.append(len(some)) or encode(some))
    monkeypatch.setattr(blip2_loop, "_TOKENIZED", 7)
    found = blip2_loop._examples(dataset, inputs)
    assert max(counted) == 7
    for split, examples in found.items():
        photos = dataset.splits[split]
        wanted = [(photo.path, row) for photo in photos for row in encode(photo.captions)]
        assert [(path, ids.tolist()) for path, [ids] in examples] == wanted


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_run_from_photos_to_an_exported_captioner(language, small, data, tmp_path, capsys):
    run, model = tmp_path / "run", small(language)
    prompt = ["--prompt", "a photo of"] if language == "t5" else []
    assert main(runs(data, model, run, "--epochs", "6", *prompt)) == 0
    out = capsys.readouterr().out
    assert "s a step, peak memory" in out
    assert {path.name for path in run.iterdir()} == {
        "config.json", "skipped.json", "history.csv", "history.json", "curves.png", "best",
        "last.safetensors", "test.json", "samples.png",
    }  # fmt: skip
    history = json.loads((run / "history.json").read_text())
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    wanted = {f"{index}.jpg": caption for index, caption in enumerate(CAPTIONS)}
    assert json.loads((run / "test.json").read_text())["captions"] == wanted

    assert "- test split, 3 photos: BLEU-1 100.0" in (run / "best" / "README.md").read_text()
    assert len({path.stat().st_mode for path in (run / "best").iterdir()}) == 1

    # What is not trained is the model's, bit for bit, and not in the state.
    before, after = tensors_of(model), tensors_of(run / "best")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert name.startswith(PARTS) or torch.equal(tensor, before[name]), name
    assert not torch.equal(before["query_tokens"], after["query_tokens"])
    state = load_file(run / "last.safetensors")
    assert {name.split(".", 1)[1] for name in state if name.startswith("model.")} == {
        name for name in before if name.startswith(PARTS)
    }

    # Transformers itself, and the export, say the captions.
    loaded = Blip2ForConditionalGeneration.from_pretrained(run / "best")
    processor = Blip2Processor.from_pretrained(run / "best")
    text = [prompt[1]] * len(CAPTIONS) if prompt else None
    paths = [data / "Images" / name for name in wanted]
    inputs = processor(images=[Image.open(path) for path in paths], text=text, return_tensors="pt")
    said = processor.batch_decode(loaded.generate(**inputs), skip_special_tokens=True)
    assert [line.removeprefix("a photo of").strip() for line in said] == CAPTIONS
    manifest = export_blip2(run / "best", tmp_path / "artifact")
    exported = Captioner.load(tmp_path / "artifact")
    captions = exported.caption(paths, prompt=prompt[1] if prompt else None)
    assert [caption.text for caption in captions] == CAPTIONS
    assert manifest.provenance.licence == "mit"
    assert "--epochs 6" in manifest.provenance.training["command"]
    assert str(tmp_path) not in json.dumps(manifest.provenance.training)
    for captioner in (run, run / "best", tmp_path / "artifact"):
        assert len(photos_as_trained(data, "test", captioner, None)) == len(CAPTIONS)
    assert "does not say how its data was split" not in capsys.readouterr().err


def test_a_resumed_run_is_an_unbroken_one(data, tmp_path, monkeypatch, blip2_checkpoint, capsys):
    """With dropout, and a step that takes two batches."""
    model, unbroken, stopped = blip2_checkpoint("opt"), tmp_path / "unbroken", tmp_path / "stopped"
    more = ["--epochs", "3", "--patience", "9", "--gradient-accumulation-steps", "2"]
    assert main(runs(data, model, unbroken, *more)) == 0
    write = blip2_loop.write_history

    def stop(*arguments) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blip2_loop, "write_history", stop)
        assert main(runs(data, model, stopped, *more)) == 130
    assert f"--resume {stopped} goes on" in capsys.readouterr().err
    assert main(runs(data, model, stopped, *more)) == 2
    assert main(["--resume", str(stopped)]) == 0
    for name in ("last.safetensors", "best/model-trained.safetensors"):
        assert same(load_file(unbroken / name), load_file(stopped / name)), name
    first, second = (json.loads((run / "test.json").read_text()) for run in (unbroken, stopped))
    assert first == second
    # With another model, or other captions, it is another run.
    config = json.loads((stopped / "config.json").read_text())
    other = save_checkpoint(tmp_path / "other", read_checkpoint(model).config, seed=1)
    (stopped / "config.json").write_text(json.dumps({**config, "model": str(other)}))
    assert main(["--resume", str(stopped)]) == 2
    assert "the model changed since the run began" in capsys.readouterr().err


def test_the_best_weights_are_kept_and_patience_ends_a_run(data, small, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.0, 2.5, 2.6, 2.7])

    def scripted(tuning, examples, optimiser, number):
        tuning.parts.query_tokens.data.fill_(number)
        figures = {"train_loss": 1.0, "seconds": 1.0, "seconds_a_step": 1.0, "peak_memory_gb": 1.0}
        return {"epoch": number, "validation_loss": next(losses), **figures}

    monkeypatch.setattr(blip2_loop, "_epoch", scripted)
    run = tmp_path / "run"
    assert main(runs(data, small("opt"), run, "--epochs", "6", "--patience", "3")) == 0
    assert len(json.loads((run / "history.json").read_text())) == 2 + 3
    assert (load_file(run / "best" / "model-trained.safetensors")["query_tokens"] == 2).all()
    assert "best epoch 2, validation loss 2.000" in (run / "best" / "README.md").read_text()


@pytest.mark.parametrize("language", LANGUAGES)
def test_bf16_learns_and_rounds_nothing_that_is_kept(language, small, data, tmp_path):
    """The frozen parts are the files' own; the trained ones begin as the files have them."""
    run, model = tmp_path / "run", small(language)
    options = ["--epochs", "2", "--dtype", "bf16", "--warmup-ratio", "0"]
    assert main(runs(data, model, run, *options)) == 0
    first, second = json.loads((run / "history.json").read_text())
    assert second["train_loss"] < first["train_loss"]
    still = tmp_path / "still"
    assert main(runs(data, model, still, *options, "--epochs", "1", "--learning-rate", "1e-9")) == 0
    before, after = tensors_of(model), tensors_of(still / "best")
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32, name
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-7)


def test_gradients_of_several_batches_make_one_step(small, data):
    """That of one large batch, whose captions count by their tokens."""
    rows = [[7] * length for length in (2, 9, 3, 1, 12, 5, 4, 8)]
    examples = [(data / "Images" / f"{index % 3}.jpg", [row]) for index, row in enumerate(rows)]
    after = []
    for batch_size, batches in ((6, 1), (2, 3)):
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": batches}
        tuning = tuning_of(small("opt"), learning_rate=0.1, epochs=1, **sizes)
        optimiser = torch.optim.SGD(tuning.parts.parameters())
        _, steps = blip2_loop._pass(tuning, examples, np.arange(8), "", optimiser)
        assert steps == 2
        after.append(tuning.parts.state_dict())
    for name, tensor in after[0].items():
        torch.testing.assert_close(tensor, after[1][name], rtol=1e-3, atol=1e-5)
    assert not torch.equal(after[0]["query_tokens"], tensors_of(small("opt"))["query_tokens"])


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine():
    config = Blip2TrainConfig(Path(), learning_rate=2.0, warmup_ratio=0.2)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[12] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.03
    assert rates[4:] == sorted(rates[4:], reverse=True)


def change_config(folder: Path, part: str | None = None, **changes) -> None:
    document = json.loads((folder / "config.json").read_text())
    (document[part] if part else document).update(changes)
    (folder / "config.json").write_text(json.dumps(document))


REFUSED: dict[str, tuple[Callable[[Path, Path], object], list[str], str]] = {
    "no BLIP-2": (
        lambda model, data: change_config(model, architectures=["LlavaForConditionalGeneration"]),
        [],
        "supported is Blip2ForConditionalGeneration",
    ),
    "no end": (
        lambda model, data: change_config(model, "text_config", eos_token_id=None),
        [],
        "no eos_token_id",
    ),
    "no weights": (
        lambda model, data: max(model.glob("*.safetensors")).unlink(),
        [],
        "not there",
    ),
    "no captions": (lambda model, data: (data / "captions.txt").unlink(), [], "captions.txt"),
    "no room": (
        lambda model, data: (data / "captions.txt").write_text(
            "image,caption\n"
            + "\n".join(f"{p.name},{'z' * POSITIONS}" for p in (data / "Images").iterdir())
        ),
        [],
        f"have no room in the model's {POSITIONS} places",
    ),
    "image token": (lambda *_: None, ["--prompt", "an <image> of"], "must not contain the image"),
    "no folder": (lambda *_: None, ["--model", "no/such/folder"], "no/such/folder: no such folder"),
    "zero": (lambda *_: None, ["--batch-size", "0"], "--batch-size must be at least 1"),
    "above one": (lambda *_: None, ["--warmup-ratio", "1.5"], "--warmup-ratio must be between"),
}


@pytest.mark.parametrize("damage, options, message", REFUSED.values(), ids=REFUSED)
def test_what_the_first_seconds_tell(damage, options, message, small, data, tmp_path, capsys):
    model, photos = tmp_path / "model", tmp_path / "data"
    shutil.copytree(small("opt"), model)
    shutil.copytree(data, photos)
    damage(model, photos)
    assert main(runs(photos, model, tmp_path / "run", *options)) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.blip2: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_without_a_network_the_remedy_is_named(data, hub, tmp_path, capsys):
    assert main(runs(data, Path("someone/blip2"), tmp_path / "run")) == 2
    assert "connect to the network once, or pass a folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
