"""Write benchmarks/README.md from what the last runs left: `python benchmarks/readme.py`."""

from __future__ import annotations

from pathlib import Path

from capexport.artifact import replace_file

FOLDER = Path(__file__).parent
# Heading, the command behind it, a word on reading it, and the file that the command wrote.
SECTIONS = (
    (
        "CNN-LSTM: PyTorch, other runtimes, and ONNX",
        "make bench FLICKR8K=flickr8k",
        "Measured with the captioner of 0.1.0, without attention and beams. Whole captions from "
        "decoded photo to text; all contenders in turn in one process. "
        "`PyTorch` is the fastest of its memory formats and LSTM calls, `PyTorch as usual` what "
        "most people write (default memory format, `nn.LSTM`), `torch.compile` the better of both "
        "formats compiled, OpenVINO runs the same graphs through the same captioner, its decoder "
        "as the loop or step by step, whichever is faster. BLEU, METEOR and CIDEr are those of the "
        "test split's photos. A share of the memory floor above 1 says that the decoder's weights "
        "stay in the processor's cache.\n\n![ratios and stages](ratios.png)",
        "results.md",
    ),
    (
        "CNN-LSTM: the operators behind a caption",
        "python benchmarks/operators.py",
        "What remains at batch 1 in int8: convolutions and matrix products, which read their "
        "weights from the caches of two cores. Profiling itself adds 1 to 3 microseconds a call.",
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
        "CNN-LSTM: many files with Ray",
        "python benchmarks/cluster.py --photos photos/",
        "`capexport.ray.caption_files` against `capexport caption`, on one machine, whose cores "
        "other processes shared: the load average is that before each run.",
        "cluster.md",
    ),
    (
        "CNN-LSTM: the server",
        "python benchmarks/serve.py --photos photos/ --requests 500 --markdown benchmarks/serve.md",
        "200 photos of about 500 x 375 pixels. "
        "`capexport serve` against `capexport caption`, in turn, with the bundled captioner; the "
        "clients share the machine's cores with the server.",
        "serve.md",
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
        "On a GPU",
        "python benchmarks/cuda.py --out DIR",
        "Neither graph is captured as a CUDA graph: the loop and the growing cache have no shapes "
        "that are static.",
        "cuda.md",
    ),
)


def main() -> None:
    parts = [
        "# Benchmarks\n\nWritten by `python benchmarks/readme.py` from the runs named here. "
        "Machines are shared and differ: times are one machine's own, the ratios travel better."
    ]
    for heading, command, text, file in SECTIONS:
        measured = (FOLDER / file).read_text(encoding="utf-8").strip()
        parts.append(f"## {heading}\n\n    {command}\n\n{text}\n\n{measured}")
    replace_file(FOLDER / "README.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
