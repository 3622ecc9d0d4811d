"""One matrix product of a language model in each of its forms, which bounds what a prefill and a
batch of captions can gain: `python benchmarks/products.py`."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from tqdm import tqdm

from capexport.atomic import replace_file
from capexport.bench.report import cpu_model, load, table
from capexport.cli import run_parser, teaching
from capexport.export.quantize import quantize_graph
from capexport.sessions import CPU, available_cores

# Inputs and outputs of blip2-opt-2.7b's two largest products.
SHAPES = ((2560, 10240), (10240, 2560))
# A step, a step of 5 beams, the prefill of a photo, and of eight.
ROWS = (1, 5, 33, 264)
FORMS = {"8 bits in blocks": (8, False), "4 bits in blocks": (4, False), "whole rows": (8, True)}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="products.py",
        **teaching(
            "Time one matrix product as PyTorch computes it, and as `capexport blip2` exports it.",
            "python benchmarks/products.py --markdown FILE",
        ),
    )
    parser.add_argument("--threads", type=int, default=available_cores(), metavar="N")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="default: 30")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables")
    return run_parser(parser, _benchmark, argv)


def _benchmark(options: argparse.Namespace) -> int:
    title = f"medians in milliseconds, {cpu_model()}, {options.threads} threads, load {load():.1f}"
    parts = [title, *(_compare(*shape, options) for shape in tqdm(SHAPES, "shapes", disable=None))]
    text = "\n\n".join(parts)
    if options.markdown:
        replace_file(options.markdown, text + "\n")
    print(text)
    return 0


def _compare(inputs: int, outputs: int, options: argparse.Namespace) -> str:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((outputs, inputs), np.float32)
    ways = {**_torch_products(weight, options.threads), **_onnx_products(weight, options.threads)}
    rows = [(f"rows of {inputs:,} by {inputs:,} x {outputs:,}", *ways)]
    for count in ROWS:
        x = rng.standard_normal((count, inputs), np.float32)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.repeats + 3):  # three that warm up
            for name, way in ways.items():
                began = time.perf_counter()
                way(x)
                if turn >= 3:
                    times[name].append(time.perf_counter() - began)
        cells = (f"{1e3 * statistics.median(spent):.2f}" for spent in times.values())
        rows.append((str(count), *cells))
    return table(rows)


def _torch_products(weight: np.ndarray, threads: int) -> dict[str, Callable[[np.ndarray], object]]:
    import torch

    torch.set_num_threads(threads)

    def product(dtype: torch.dtype) -> Callable[[np.ndarray], object]:
        own = torch.from_numpy(weight).to(dtype)
        return lambda x: torch.nn.functional.linear(torch.from_numpy(x).to(dtype), own)

    return {"PyTorch fp32": product(torch.float32), "PyTorch bf16": product(torch.bfloat16)}


def _onnx_products(weight: np.ndarray, threads: int) -> dict[str, Callable[[np.ndarray], object]]:
    """The product in float32 and as `capexport blip2` quantises it."""
    outputs, inputs = weight.shape
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", transB=1)
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", inputs), ("y", outputs))
    ]
    graph = helper.make_graph(
        [node], "product", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    target = dataclasses.replace(CPU, threads=threads)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "fp32.onnx")
        onnx.save(model, source, save_as_external_data=True, location=f"{source.name}.data")
        graphs = {"ONNX fp32": target.open(source)}
        for title, (bits, many_rows) in FORMS.items():
            path = Path(name, f"{title}.onnx")
            quantize_graph(source, path, bits, many_rows)
            graphs[title] = target.open(path)
    return {title: lambda x, g=graph: g.run({"x": x}, ["y"]) for title, graph in graphs.items()}


if __name__ == "__main__":
    sys.exit(main())
