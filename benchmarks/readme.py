"""Write benchmarks/README.md, and the figures in README.md, from what the last runs left:
`python benchmarks/readme.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from capexport.atomic import replace_file
from capexport.bench.report import table

FOLDER = Path(__file__).parent
# Heading, the command behind it, a word on reading it, and the file that the command wrote.
SECTIONS = (
    (
        "CNN-LSTM: PyTorch, other runtimes, and ONNX",
        "make bench FLICKR8K=flickr8k",
        "Whole captions from decoded photo to text; all contenders in turn in one process. "
        "`PyTorch` is the fastest of its forms, compiled ones included, `PyTorch as usual` what "
        "most people write (default memory format, nothing folded), OpenVINO runs the same graphs "
        "through the same captioner, with whole batches of images or streams that share them, and "
        "once with the encoder that NNCF quantises with the photos that are measured. BLEU, METEOR "
        "and CIDEr are those of the test split's photos. A share of the memory floor "
        "above 1 says that the decoder's weights stay in the processor's cache."
        "\n\n![ratios and stages](ratios.png)",
        "results.md",
    ),
    (
        "CNN-LSTM: the operators behind a caption",
        "python benchmarks/operators.py",
        "What remains in int8: convolutions and matrix products, which read their weights from the "
        "caches of two cores. At batch 32 the encoder works on parts of two images, one on each "
        "core, so its times are those of both cores together. Profiling itself adds 1 to 3 "
        "microseconds a call.",
        "operators.md",
    ),
    (
        "CNN-LSTM: many files",
        "python benchmarks/bulk.py --photos flickr8k/Images --threads 2",
        "`capexport caption FOLDER` against PyTorch with a `DataLoader` of as many workers, and "
        "against each stage alone with all cores to itself.",
        "bulk.md",
    ),
    (
        "CNN-LSTM: many files of 12 megapixels",
        "python benchmarks/bulk.py --megapixels 12 --photos flickr8k/Images --threads 2 "
        "--count 64 --batch-size 8 --files 0",
        "The same with large JPEGs, of which `capexport caption` decodes a quarter of the width "
        "and height, and PyTorch's side, as Pillow and torchvision have it, all.",
        "bulk_12mp.md",
    ),
    (
        "CNN-LSTM: how cost grows with the work",
        "python benchmarks/growth.py --photos flickr8k/Images",
        "A batch pays off as long as its activations stay in the caches. A beam costs less than a "
        "caption, since the image is encoded once. Words cost evenly. From one megapixel on, "
        "reading costs more than captioning, and reduced decoding keeps that nearly flat. The "
        "command's time grows with its files, its memory at first with the batches in hand, then "
        "slowly."
        "\n\n![curves](growth.png)",
        "growth.md",
    ),
    (
        "CNN-LSTM: many files with Ray",
        "python benchmarks/cluster.py --photos photos/",
        "`capexport.ray.caption_files` against `capexport caption`, on one machine. A run is a "
        "whole process, with Ray's start and end of some seconds; the load average is that before "
        "it.",
        "cluster.md",
    ),
    (
        "CNN-LSTM: the server",
        "python benchmarks/serve.py --photos photos/ --markdown benchmarks/serve.md",
        "`capexport serve` against `capexport caption`, in turn, with the bundled captioner; the "
        "clients share the machine's cores with the server. What a request costs besides its "
        "caption is the event loop, HTTP, JSON and base64, whatever the captioner takes.",
        "serve.md",
    ),
    (
        "CNN-LSTM: backbones at their full size",
        "python benchmarks/backbones.py",
        "The image encoder at batch 1 with random weights, and the batch-norm statistics of 16 "
        "photos: sizes, times and what float32 differs by are those of trained weights. What int8 "
        "loses is not: errors grow through many random layers, and where they pass 0.5 the export "
        "is refused.",
        "backbones.md",
    ),
    (
        "BLIP-2 at its full size",
        "python benchmarks/blip2_full_size.py",
        "Random weights of blip2-opt-2.7b's dimensions. The floor is the time in which the bytes "
        "of the language model's weights can be read from memory, at the bandwidth measured right "
        "before; a CPU multiplies float16 as float32 and so reads twice what is stored.",
        "blip2_full_size.md",
    ),
    (
        "What a trained BLIP-2 loses",
        "python benchmarks/quality.py --checkpoint small --data flickr8k",
        "A BLIP-2 of 30 million parameters, which `benchmarks/train_small_blip2.py` trained in 4 "
        "minutes on an H100, on the test split, which it has not seen. `difference` is that of "
        "CIDEr-D to PyTorch's, `its 95% interval` where it lies for other photos like these: what "
        "holds 0 is noise. The captions that are no longer the same tell more. In blocks of 8 "
        "bits for the image part, 90.6% of int8's were the same; with all layers of int4 in 4 "
        "bits, too, 56.6% of int4's. PyTorch's file is in float16.\n\n"
        "What was tried, by how far the probabilities of the next token are from those in float32 "
        "(Kullback-Leibler divergence in thousandths, along float32's captions of 240 photos; the "
        "language model alone quantised):\n\n"
        "- 8 bits in blocks of 128, 64 and 32: 0.10, 0.08 and 0.07. There is nothing to gain.\n"
        "- 4 bits in blocks of 32, 64 and 128: 7.1, 9.2 and 11.7; in blocks of 32 with the "
        "projection to the vocabulary in 4 bits, too: 8.7.\n"
        "- One of the four layers in 8 bits, the others in 4: the first 1.4, each other 6.4 to "
        "6.9. So the first stays in 8 bits, one layer of the 32 of blip2-opt-2.7b. It made 76% of "
        "the captions float32's, which were 56%. Blocks of 64 and 128 for the others: 1.7 and "
        "2.1.\n"
        "- Other roundings of 4 bits in blocks of 32, no larger: the range with the least squared "
        "error 7.2, onnxruntime's k-quant 7.6, its HQQ 5.7, whose zero points are fractions and "
        "which was computed without 8-bit activations. None is worth its while.\n"
        "- GPTQ, calibrated on 96 photos for validation, all layers in 4 bits: 1.8 in blocks of "
        "32, 2.3 in 64, 2.6 in 128; on colour fields, 4.2. Where the first layer is in 8 bits it "
        "brings 1.1 (on colour fields) instead of 1.4, for the inputs of every product and, at "
        "full size, moments of 10240 x 10240 a layer: not done.\n"
        "- The image part in whole rows of 8 bits, as it is: 0.13; in blocks of 128 and 32, "
        "which are slower: 0.06 and 0.04; in 4 bits: 15 (these of 120 photos).",
        "quality.md",
    ),
    (
        "BLIP-2 beside other runtimes",
        "python benchmarks/blip2_peers.py",
        "Few layers of blip2-opt-2.7b's width, random weights, so that all contenders take turns "
        "in one process. The language model alone is given 32 tokens and the start token on both "
        "sides. Whole captions have 10 tokens; a row's best PyTorch is 1.00x.",
        "blip2_peers.md",
    ),
    (
        "BLIP-2: one product of the language model",
        "python benchmarks/products.py",
        "The two largest products of a layer of blip2-opt-2.7b, as PyTorch computes them and as "
        "they are exported: a step multiplies one row, the prefill of a photo 33, and of eight "
        "photos 264. The language model computes in blocks, the image encoder in whole rows.",
        "products.md",
    ),
    (
        "BLIP-2's beams",
        "python benchmarks/blip2_peers.py --dims small --layers 12 --parts beams --repeats 10",
        "A BLIP-2 of 150 million parameters, random weights, against `generate()`, with beams "
        "`generate(num_beams=5)`.",
        "blip2_beams.md",
    ),
    (
        "On a GPU",
        "python benchmarks/cuda.py --out DIR",
        "Neither graph is captured as a CUDA graph: the loop and the growing cache have no shapes "
        "that are static.",
        "cuda.md",
    ),
)


def results() -> Any:
    """What the last capbench wrote."""
    return json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


def ratios(name: str, *peers: str) -> list[float]:
    """How many times as fast as the quickest of `peers` a path of capbench is, at each batch
    size."""
    found = []
    for run in results()["runs"]:
        times = {n: path["milliseconds"]["total"]["p50"] for n, path in run["paths"].items()}
        found.append(min(times[peer] for peer in peers if peer in times) / times[name])
    return found


def row(file: str, title: str, below: str = "") -> dict[str, float]:
    """The numbers in a row of a benchmark's table, by column: in that of `title`, or in the row
    `below` it."""
    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    cells = list(map(_cells, lines))
    head: tuple[str, ...] = ()
    above = ""
    for line, here, after in zip(lines, cells, [*cells[1:], ()], strict=True):
        if after and set("".join(after)) <= set("-:"):
            head = here
        if here and not line.startswith("|   "):
            above = here[0]
        if here and (above, here[0]) == (title, below or title):
            named = zip(head, here, strict=True)
            return {n: float(c.rstrip("x%")) for n, c in [*named][1:] if c}
    raise ValueError(f"{file} has no row {title} {below}")


def _cells(line: str) -> tuple[str, ...]:
    """The cells of a table's line; none of another line."""
    return tuple(cell.strip() for cell in line.split("|")[1:-1])


def opening() -> str:
    """What a caption takes in PyTorch and here, as this machine measured it."""
    result = results()
    machine, run, metrics = result["environment"], result["runs"][0], result["metrics"]
    largest = max(run["batch_size"] for run in result["runs"])  # that memory was measured with
    rows = [
        (
            name.replace("ONNX", "capexport,"),
            f"{run['paths'][name]['milliseconds']['total']['p50']:.1f}",
            f"{costs['load_seconds']:.2f}",
            f"{costs['peak_memory_mb']:.0f}",
            f"{costs['disk_mb']:.1f}",
            f"{metrics[name]['CIDEr-D']:.1f}",
        )
        for name, costs in result["footprint"].items()
    ]
    head = (
        "", "a caption (ms)", "import and load (s)", f"peak memory, batch {largest} (MB)",
        "on disk (MB)", "CIDEr-D",
    )  # fmt: skip
    title = f"{machine['threads']} threads of {machine['cpu']}, load {machine['load']:.1f}"
    files = row("growth.md", "reduced decoding")
    return (
        f"The bundled captioner, a photo at a time ({title}; PyTorch at its best):\n\n"
        f"{table([head, *rows])}\n\nA caption's time begins with the decoded photo. From a JPEG "
        f"file to text, int8 took {files['0.2']:.0f} ms for 0.2 megapixels and {files['12']:.0f} "
        "for 12."
    )


def compared() -> str:
    """capbench's ratios."""
    result = results()
    machine, runs = result["environment"], result["runs"]
    names = [name for name in runs[0]["paths"] if name.startswith("ONNX")]

    def against(*peers: str) -> list[str]:
        """In whose names {} stands for the precision."""
        named = {n: [peer.format(n.removeprefix("ONNX ")) for peer in peers] for n in names}
        return [", ".join(f"{r:.2f}x" for r in ratios(n, *peers)) for n, peers in named.items()]

    def each(form: str, value: Callable[[str], float]) -> list[str]:
        return [format(value(name), form) for name in names]

    metrics, costs = result["metrics"], result["footprint"]
    sizes = " and ".join(str(run["batch_size"]) for run in runs)
    forms = " and ".join(dict.fromkeys(run["variants"]["PyTorch"] for run in runs))
    rows = [
        ("ONNX", *(name.removeprefix("ONNX ") for name in names)),
        (f"a caption, batch {sizes}, against PyTorch's fastest form ({forms})",
         *against("PyTorch")),
        ("against PyTorch as most people run it", *against("PyTorch as usual")),
        ("against OpenVINO in the same precision, the quickest of the same graphs and NNCF's",
         *against("OpenVINO {}", "OpenVINO, NNCF {}")),
        ("captions identical to PyTorch's",
         *each(".0%", lambda name: runs[-1]["paths"][name]["identical_captions"])),
        (f"BLEU-4, CIDEr-D (PyTorch {metrics['PyTorch']['BLEU-4']:.2f}, "
         f"{metrics['PyTorch']['CIDEr-D']:.2f})",
         *(f"{metrics[name]['BLEU-4']:.2f}, {metrics[name]['CIDEr-D']:.2f}" for name in names)),
        ("import and load, times as fast", *each(
            ".0f", lambda n: costs["PyTorch"]["load_seconds"] / costs[n]["load_seconds"])),
        (f"peak memory, MB (PyTorch {costs['PyTorch']['peak_memory_mb']:.0f})",
         *each(".0f", lambda name: costs[name]["peak_memory_mb"])),
        ("on disk, MB", *each(".1f", lambda name: costs[name]["disk_mb"])),
    ]  # fmt: skip
    title = (
        f"{result['model']}, {machine['threads']} threads of {machine['cpu']}, "
        f"{result['photos']} photos, load {machine['load']:.1f}:"
    )
    return f"{title}\n\n{table(rows)}"


def _bulk(file: str) -> Any:
    return json.loads((FOLDER / file).read_text(encoding="utf-8"))


def bulk() -> str:
    """Images a second of many files."""
    found = [_bulk(file) for file in BULK]
    rows = [("images a second", *BULK.values())]
    rows += [
        (name, *(f"{result['images_per_second'][name]:.0f}" for result in found))
        for name in found[0]["images_per_second"]
    ]
    rows.append(
        ("`capexport caption` against PyTorch", *(f"{r['ratios']['to_torch']:.2f}x" for r in found))
    )
    peaks = found[0]["memory"]["peak_megabytes"]
    memory = " and ".join(f"{peak:.0f} MB for {int(n):,} files" for n, peak in peaks.items())
    return f"{table(rows)}\n\nPeak memory is {memory}."


def full_size() -> str:
    """The rows of BLIP-2's table that most readers look for, those below them included."""
    title, *lines = (FOLDER / "blip2_full_size.md").read_text(encoding="utf-8").splitlines()
    head, _, *body = [line for line in lines if "|" in line]
    if missing := set(FULL_SIZE) - {_cells(line)[0] for line in body}:
        raise ValueError(f"blip2_full_size.md has no rows {', '.join(missing)}")
    wanted, kept = False, [head]
    for line in body:
        below = line.startswith("|   ")
        wanted = wanted if below else _cells(line)[0] in FULL_SIZE
        kept += [line] if wanted else []
    return f"{title}:\n\n{table([_cells(line) for line in kept])}"


def quality() -> str:
    """BLIP-2's captions in each precision."""
    return (FOLDER / "quality.md").read_text(encoding="utf-8").strip()


def goals() -> str:
    """What was aimed at, what came of it, and of what is missed, why."""
    rows = [("two cores, against PyTorch at its best", "aim", "measured", "")]
    missed: dict[str, list[str]] = {}
    for title, aim, measured, tried in GOALS:
        value = measured()
        rows.append((title, f"{aim:g}", f"{value:.2f}", "met" if value >= aim else "missed"))
        if value < aim:
            missed.setdefault(tried, []).append(title)
    reasons = [f"- {'; '.join(titles)}: {tried}" for tried, titles in missed.items()]
    return "\n".join([table(rows), "", *reasons])


def _int8(batch: int, *peers: str) -> float:
    return ratios("ONNX int8", *peers)[batch]


def _blip2(stage: str, peer: str = "PyTorch") -> float:
    return row("blip2_peers.md", f"{stage} (ms)", f"against {peer}")["ONNX int8"]


def _floor(precision: str) -> float:
    shares = row("blip2_full_size.md", "step, batch 1 (ms)", "share of the memory floor")
    return shares[f"ONNX {precision}"]


def _many_photos() -> float:
    """Captions a second, each at its best batch size."""
    best: dict[str, float] = {}
    text = (FOLDER / "blip2_peers.md").read_text(encoding="utf-8")
    for title in re.findall("batch [0-9]+: captions a second", text):
        for name, rate in row("blip2_peers.md", title).items():
            best[name] = max(rate, best.get(name, 0))
    return best["ONNX int8"] / max(rate for n, rate in best.items() if n.startswith("PyTorch"))


_CNN = (
    "what remains are convolutions and products in 8 bits (see the operators), which a core "
    "takes through its caches two images at a time."
)
_FLOOR = (
    "the products read their weights at nearly the memory's speed; the rest is attention, which "
    "copies its cache into a longer one at every step (see the shares of a step)."
)
_BLOCKS = (
    "in blocks of 8 bits, a product of many rows is hardly faster than PyTorch's in bfloat16 (see "
    "one product). In whole rows it is, but one scale for all of a row is too coarse for the few "
    "channels of a language model that are far larger than the others. Blocks of 64 and 256 were "
    "tried, too, and long rows in two pieces, as they are now."
)
_BFLOAT16 = (
    "where a processor has instructions for bfloat16, as this one, PyTorch gains most. 8 bits "
    "read half of its bytes and multiply about twice as fast (see one product); attention, norms "
    "and activations are computed in float32."
)
_CTRANSLATE2 = "a token takes little longer here than reading its weights from memory does."
GOALS: tuple[tuple[str, float, Callable[[], float], str], ...] = (
    ("CNN-LSTM fp32, batch 1", 2.5, lambda: ratios("ONNX fp32", "PyTorch")[0], _CNN),
    ("CNN-LSTM fp32, batch 32", 2.5, lambda: ratios("ONNX fp32", "PyTorch")[1], _CNN),
    ("CNN-LSTM int8, batch 1", 5, lambda: _int8(0, "PyTorch"), _CNN),
    ("CNN-LSTM int8, batch 32", 5.5, lambda: _int8(1, "PyTorch"), _CNN),
    ("the same against OpenVINO's best int8, batch 1", 1.3, lambda: _int8(0, *OPENVINO), _CNN),
    ("the same against OpenVINO's best int8, batch 32", 1.2, lambda: _int8(1, *OPENVINO), _CNN),
    ("many files of 12 megapixels", 4, lambda: _bulk("bulk_12mp.json")["ratios"]["to_torch"],
     "reading and decoding JPEGs takes most of the time, on both sides."),
    ("BLIP-2 at full size, a step in int8, share of the memory floor", 0.85,
     lambda: _floor("int8"), _FLOOR),
    ("BLIP-2 at full size, a step in int4, share of the memory floor", 0.75,
     lambda: _floor("int4"), _FLOOR),
    ("BLIP-2 int8, image encoder", 2, lambda: _blip2("image encoder"), _BFLOAT16),
    ("BLIP-2 int8, prefill", 2, lambda: _blip2("prefill"), _BLOCKS),
    ("BLIP-2 int8, a token", 4, lambda: _blip2("a token"), _BFLOAT16),
    ("BLIP-2 int8, captions a second, each at its best batch size", 3, _many_photos, _BLOCKS),
    ("BLIP-2 int8, prefill, against CTranslate2's int8", 1.3,
     lambda: _blip2("prefill", "CTranslate2 int8"), _BLOCKS),
    ("BLIP-2 int8, a token, against CTranslate2's int8", 2,
     lambda: _blip2("a token", "CTranslate2 int8"), _CTRANSLATE2),
)  # fmt: skip
OPENVINO = ("OpenVINO int8", "OpenVINO, NNCF int8")
FULL_SIZE = (
    "image encoder, batch 1 (ms)", "prefill, batch 1 (ms)", "step, batch 1 (ms)", "on disk (GB)",
    "identical tokens", "export: peak anonymous memory (GB)",
)  # fmt: skip
BULK = {"bulk.json": "224 x 224", "bulk_12mp.json": "12 megapixels"}


def put(text: str, name: str, figures: str) -> str:
    """`text` with other figures between its marks."""
    mark = f"<!-- figures of {name} -->\n"
    before, after = text.split(mark)
    return f"{before}{mark}\n{figures}\n\n{after[after.index('<!-- end -->') :]}"


def main() -> None:
    parts = [
        "# Benchmarks\n\nWritten by `python benchmarks/readme.py` from the runs named here. "
        "Machines are shared and differ: times are one machine's own, the ratios travel better.",
        f"## What was aimed at\n\n{goals()}",
    ]
    for heading, command, text, file in SECTIONS:
        measured = (FOLDER / file).read_text(encoding="utf-8").strip()
        parts.append(f"## {heading}\n\n    {command}\n\n{text}\n\n{measured}")
    replace_file(FOLDER / "README.md", "\n\n".join(parts) + "\n")
    readme = FOLDER.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    figures = {
        "opening": opening, "capbench": compared, "bulk": bulk, "full size": full_size,
        "quality": quality,
    }  # fmt: skip
    for name, written in figures.items():
        text = put(text, name, written())
    replace_file(readme, text)


if __name__ == "__main__":
    main()
