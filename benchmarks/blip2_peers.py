"""BLIP-2 beside other runtimes, in one process: `python benchmarks/blip2_peers.py`.

The weights are random, of blip2-opt-2.7b's width but with few layers, so that all contenders fit
into memory together (16 GB for 4 layers) and take turns. Each part prints a table: `language`, the
language model alone beside CTranslate2, each with its own int8 of the same weights; `captions`,
whole captions of 10 tokens beside PyTorch and OpenVINO, with captions a second by batch size; and
`beams`, captions of 5 beams beside `generate(num_beams=5)`.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from capexport.artifact import Manifest
from capexport.atomic import replace_file
from capexport.bench import measure
from capexport.bench.cli import sample_photos
from capexport.bench.openvino import openvino_captioners
from capexport.bench.report import cpu_model, load, table
from capexport.bench.results import PathResult
from capexport.captioner import Caption, Captioner, Timing
from capexport.decoding import changed, greedy
from capexport.export.pairs import AnyCaptioner, open_pair
from capexport.preprocessing import load_image
from capexport.sessions import CPU, available_cores

TOKENS = 10  # a caption: as many as one of COCO has words
BEAMS = 5
PRECISIONS = ("fp32", "int8")
_REPEATS = 15  # of the language model alone


class TextOnly:
    """The language model of an exported BLIP-2 (OPT), as if `caption` were given texts.

    In the place of an image's features it is given the embeddings of as many tokens: what a
    runtime that takes tokens alone says behind these and the start token can be compared with it.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._captioner = Captioner.load(folder, threads=threads)
        embed = Manifest.read(folder).file(folder, "embed_tokens.onnx")
        self._embed = CPU.open(embed, threads=1)

    def caption(
        self, images: Sequence[NDArray[np.int64]], *, batch_size: int, **options: Any
    ) -> list[Caption]:
        """`images`: int64 (query tokens,) each."""
        own = self._captioner
        ids = {"input_ids": np.stack(images)}
        features = self._embed.run(ids, ["inputs_embeds"])["inputs_embeds"]
        framed = own.text.frame(None, len(images), 1)
        began = time.perf_counter()
        found = greedy(own.decoder, features, changed(own.options, options), framed)
        return _said([one.tokens for one in found], time.perf_counter() - began)


class CTranslate2:
    """The same language model in CTranslate2, converted by its own `OPTLoader`.

    A first token comes from `generate_batch` with `max_length=1`, which feeds all of the prompt
    but its last token at once and then that one, and a further token's time is the difference to a
    longer one: CTranslate2 has no call for one step.
    """

    def __init__(
        self, model: Any, start: int, folder: Path, threads: int, compute_type: str = "int8"
    ) -> None:
        """
        Args:
            model: `OPTForCausalLM` of Transformers.
            start: the token behind a prompt.
            folder: where the converted model is written, and found again.
        """
        import ctranslate2
        from ctranslate2.converters.transformers import OPTLoader

        if not folder.exists():
            spec = OPTLoader().get_model_spec(model)
            spec.register_vocabulary([str(token) for token in range(model.config.vocab_size)])
            for role in ("bos_token", "eos_token", "unk_token"):
                setattr(spec.config, role, str(start))
            spec.validate()
            spec.optimize(quantization=None if compute_type == "float32" else compute_type)
            folder.mkdir(parents=True)
            spec.save(str(folder))
        self._start = start
        self._generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=compute_type, intra_threads=threads
        )

    def caption(
        self,
        images: Sequence[NDArray[np.int64]],
        *,
        batch_size: int,
        max_tokens: int,
        min_tokens: int = 0,
    ) -> list[Caption]:
        prompts = [[str(token) for token in (*image.tolist(), self._start)] for image in images]
        began = time.perf_counter()
        results = self._generator.generate_batch(
            prompts, max_length=max_tokens, min_length=min_tokens, include_prompt_in_result=False
        )
        found = [result.sequences_ids[0] for result in results]
        return _said(found, time.perf_counter() - began)


def _said(tokens: Sequence[Sequence[int]], seconds: float) -> list[Caption]:
    timing = Timing(len(tokens), 0.0, 0.0, seconds)
    return [Caption("", tuple(row), 0.0, timing) for row in tokens]


def language_model(
    checkpoint: Path, exports: Mapping[str, Path], options: argparse.Namespace
) -> str:
    """Prefill and a token of the language model alone, at batch 1, in milliseconds."""
    from capexport.models.blip2 import HuggingFaceCaptioner

    spec = Manifest.read(exports["int8"]).prompt
    assert spec is not None
    threads = options.threads
    torch = HuggingFaceCaptioner.load(checkpoint).model.language_model
    peer = CTranslate2(torch, spec.bos_token, checkpoint.parent / "ctranslate2", threads)
    shape = (_REPEATS, spec.query_tokens)
    words = list(np.random.default_rng(0).integers(2, torch.config.vocab_size, shape))
    del torch
    contenders: dict[str, Any] = {"CTranslate2 int8": peer}
    contenders.update({f"ONNX {name}": TextOnly(path, threads) for name, path in exports.items()})
    rows = [("language model alone, batch 1", *contenders)]
    rows += _stages(contenders, words, _REPEATS, "CTranslate2 int8", bounded=True)
    return table(rows)


def whole_captions(
    checkpoint: Path, exports: Mapping[str, Path], options: argparse.Namespace
) -> str:
    """Stages, and captions a second by batch size, of all that can caption."""
    contenders, failed = _captioners(checkpoint, exports, options)
    photos = [np.asarray(load_image(path)) for path in sample_photos()]
    rows = [("whole captions", *contenders)]
    rows += _stages(contenders, photos, options.repeats, "PyTorch")
    for size in options.batch_sizes:
        paths = _alternate(contenders, photos, size, options.repeats, TOKENS)
        seconds = {name: 1 / path.captions_per_second for name, path in paths.items()}
        rates = (f"{path.captions_per_second:.3g}" for path in paths.values())
        agreed = (f"{path.identical_tokens:.0%}" for path in paths.values())
        rows += [
            (f"batch {size}: captions a second", *rates),
            _ratios(seconds, "PyTorch"),
            ("  tokens identical to the first's", *agreed),
        ]
    return "\n".join([table(rows), "", *failed])


def beams(checkpoint: Path, exports: Mapping[str, Path], options: argparse.Namespace) -> str:
    """Captions of one photo with beams, and what a step of them costs."""
    [torch] = open_pair(str(checkpoint), "cpu", options.threads).variants().values()
    contenders: dict[str, AnyCaptioner] = {"PyTorch fp32": torch}
    for name, folder in exports.items():
        contenders[f"ONNX {name}"] = Captioner.load(folder, threads=options.threads)
    photos = [np.asarray(load_image(path)) for path in sample_photos()]
    rows = [(f"captions of {TOKENS} tokens", *contenders)]
    steps = {}
    for title, size, kept in (
        ("greedy", 1, 1), (f"greedy, batch {BEAMS}", BEAMS, 1), (f"{BEAMS} beams", 1, BEAMS)
    ):  # fmt: skip
        first, whole = (
            _alternate(contenders, photos, size, options.repeats, tokens, num_beams=kept)
            for tokens in (1, TOKENS)
        )
        total = {name: path.milliseconds["total"].p50 for name, path in whole.items()}
        steps[title] = {
            name: (path.milliseconds["decode"].p50 - first[name].milliseconds["decode"].p50)
            / (TOKENS - 1)
            for name, path in whole.items()
        }
        agreed = (f"{path.identical_captions:.0%}" for path in whole.values())
        rows += [
            (f"{title} (ms)", *(f"{value:.1f}" for value in total.values())),
            _ratios(total, "PyTorch"),
            ("  captions identical to PyTorch's", *agreed),
            ("  a token (ms)", *(f"{value:.2f}" for value in steps[title].values())),
        ]
    _, batch, searched = steps.values()
    cost = (f"{searched[name] / batch[name]:.2f}" for name in contenders)
    rows.append((f"a token: {BEAMS} beams, over greedy's at batch {BEAMS}", *cost))
    return table(rows)


def _captioners(
    checkpoint: Path, exports: Mapping[str, Path], options: argparse.Namespace
) -> tuple[dict[str, AnyCaptioner], list[str]]:
    """Those that can caption, and why others cannot."""
    threads = options.threads
    pair = open_pair(str(checkpoint), "cpu", threads)
    peers = pair.peers()
    openers: dict[str, Callable[[], Mapping[str, AnyCaptioner]]] = {
        "PyTorch fp32": pair.variants,
        **{name: peers[name] for name in peers if options.compiled or "compiled" not in name},
    }
    for name, folder in exports.items():
        openers[f"OpenVINO {name}"] = partial(openvino_captioners, folder, "cpu", threads)
    for name, folder in exports.items():
        openers[f"ONNX {name}"] = lambda f=folder: {"": Captioner.load(f, threads=threads)}
    contenders, failed = {}, []
    for name, opener in tqdm(openers.items(), "opening", disable=None):
        try:
            [captioner] = opener().values()
            captioner.caption(sample_photos()[:2], batch_size=2, max_tokens=2)
            contenders[name] = captioner
        except Exception as error:  # a compiler or a runtime may throw anything
            failed.append(f"- {name}: {' '.join(str(error).split()):.300}")
    return contenders, failed


def _stages(
    contenders: Mapping[str, Any],
    inputs: Sequence[Any],
    repeats: int,
    peers: str,
    bounded: bool = False,
) -> list[tuple[str, ...]]:
    """Rows of milliseconds at batch 1: the prefill is what a caption of one token takes to decode,
    a token's time the difference to a longer caption, shared among the tokens.

    `bounded`: the captioners know `min_tokens`, and are held to it.
    """
    first, whole = (
        _alternate(contenders, inputs, 1, repeats, n, **({"min_tokens": n} if bounded else {}))
        for n in (1, TOKENS)
    )
    encode, prefill, decode = (
        {name: path.milliseconds[stage].p50 for name, path in paths.items()}
        for paths, stage in ((whole, "encode"), (first, "decode"), (whole, "decode"))
    )
    token = {name: (decode[name] - prefill[name]) / (TOKENS - 1) for name in decode}
    rows = []
    for title, values in (("image encoder", encode), ("prefill", prefill), ("a token", token)):
        if any(values.values()):
            cells = (f"{value:.1f}" for value in values.values())
            rows += [(f"{title} (ms)", *cells), _ratios(values, peers)]
    return rows


def _alternate(
    contenders: Mapping[str, Any],
    inputs: Sequence[Any],
    size: int,
    repeats: int,
    tokens: int,
    **options: Any,
) -> dict[str, PathResult]:
    options["max_tokens"] = tokens
    return measure.alternate(contenders, inputs, size, repeats, options=options).paths


def _ratios(values: Mapping[str, float], peers: str) -> tuple[str, ...]:
    """A row of ratios to the quickest of those whose names begin with `peers`."""
    best = min(value for name, value in values.items() if name.startswith(peers))
    return (f"  against {peers}", *(f"{best / value:.2f}x" for value in values.values()))


def main(argv: list[str] | None = None) -> None:
    from benchmarks import blip2_full_size

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", choices=blip2_full_size.DIMENSIONS, default="blip2-opt-2.7b")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="a part (default: 4)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=("language", "captions"),
        help="default: language captions",
    )  # fmt: skip
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="batches of a size")
    parser.add_argument("--threads", type=int, default=available_cores(), metavar="N")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile, for minutes")
    parser.add_argument(
        "--folder", type=Path, help="where models are written, and found again (default: temporary)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        making = ["--dims", options.dims, "--layers", str(options.layers), "--turns", "0"]
        blip2_full_size.main([*making, "--folder", str(folder), "--precisions", *PRECISIONS])
        exports = {precision: folder / precision for precision in PRECISIONS}
        tables = [PARTS[part](folder / "checkpoint", exports, options) for part in options.parts]
    title = (
        f"{options.dims} with at most {options.layers} layers a part, random weights, "
        f"{cpu_model()}, {options.threads} threads; {datetime.date.today()}, load {load():.1f}"
    )
    text = "\n\n".join([title, *tables])
    if options.markdown:
        replace_file(options.markdown, text + "\n")
    print(text)


PARTS = {"language": language_model, "captions": whole_captions, "beams": beams}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for benchmarks.blip2_full_size
    main()
