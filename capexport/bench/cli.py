"""The `capbench` command."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capexport.artifact import Manifest, replace_file
from capexport.bench import measure, report
from capexport.bulk import find_images
from capexport.captioner import Captioner, available_cores
from capexport.cli import bundled_checkpoint, run_command, show_progress, teaching
from capexport.errors import ArtifactError, ImageNotFoundError, MissingExtraError
from capexport.graphs import require_provider

if TYPE_CHECKING:
    from capexport.models.checkpoint import Checkpoint

# Photographs among the sample images of scikit-image.
_SAMPLES = (
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run `capbench`; returns its exit code, 2 where the benchmark cannot be run."""
    options = _parser().parse_args(argv)
    show_progress()
    return run_command("capbench", lambda: _benchmark(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="capbench",
        **teaching(
            "Measure a captioner's PyTorch and ONNX paths against each other: in turn, in one "
            "process, on the same photos. The last line of standard output is JSON.",
            "capbench --device cpu                            # the bundled Flickr8k model",
            "capbench runs/first --artifact artifacts/first --photos photos/ --markdown table.md",
        ),
    )
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, help="checkpoint or run folder (default: bundled)"
    )
    parser.add_argument(
        "--artifact", type=Path, metavar="DIR", help="its export (default: made for this run)"
    )
    parser.add_argument(
        "--photos", nargs="+", default=[], metavar="PATH", help="default: scikit-image's samples"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8"
    )
    parser.add_argument(
        "--repeats", type=int, default=50, metavar="N", help="batches of each size (default: 50)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report")
    return parser


def sample_photos() -> list[Path]:
    """Photographs that the package scikit-image ships.

    Raises:
        ImageNotFoundError: it isn't installed.
    """
    spec = importlib.util.find_spec("skimage")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        photos = [Path(folder, "data", name) for name in _SAMPLES]
        if all(photo.is_file() for photo in photos):
            return photos
    raise ImageNotFoundError("no sample photos: `pip install scikit-image`, or pass --photos PATH")


def _benchmark(options: argparse.Namespace) -> int:
    if min(*options.batch_sizes, options.repeats, options.threads or 1) < 1:
        raise ValueError("--batch-sizes, --repeats and --threads must be at least 1")
    require_provider(options.device)
    source = options.checkpoint or bundled_checkpoint()
    paths = find_images(options.photos, sys.stdin) if options.photos else sample_photos()
    photos = [path.read_bytes() for path in paths]
    threads = options.threads or available_cores()
    try:
        import torch

        from capexport.models.checkpoint import find_checkpoint, load_checkpoint
    except ImportError as error:
        raise MissingExtraError(
            f"the PyTorch path needs `pip install 'capexport[cpu,export]'` ({error})"
        ) from error
    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(source)
    with contextlib.ExitStack() as stack:
        artifact = options.artifact
        if artifact is None:
            from capexport.export.cnn_lstm import export_cnn_lstm

            artifact = Path(stack.enter_context(tempfile.TemporaryDirectory()), "artifact")
            export_cnn_lstm(checkpoint, artifact)
        if Manifest.read(artifact).provenance["checkpoint_sha256"] != checkpoint.sha256:
            raise ArtifactError(f"{artifact}: was not exported from {source}; export it again")
        exported = Captioner.load(artifact, device=options.device, threads=threads)
        result: dict[str, Any] = {
            "model": f"cnn-lstm {checkpoint.sha256[:12]}",
            "device": options.device,
            "photos": len(photos),
            "repeats": options.repeats,
            "environment": report.environment(threads),
            "runs": [],
            "footprint": {},
        }
        for size in options.batch_sizes:
            variant, reference = _fastest_torch(checkpoint, options.device, threads, photos, size)
            run = measure.alternate(
                {"torch": reference, "onnx": exported}, photos, size, options.repeats
            )
            result["runs"].append({**run, "torch_variant": variant})
        checkpoint_folder = find_checkpoint(source).parent
        for kind, folder in (("torch", checkpoint_folder), ("onnx", artifact)):
            result["footprint"][kind] = {
                **measure.footprint(
                    kind, folder, paths, max(options.batch_sizes), options.device, threads
                ),
                "disk_mb": measure.folder_size(folder),
            }
    table = report.render(result)
    if options.json:
        replace_file(options.json, json.dumps(result, indent=1) + "\n")
    if options.markdown:
        replace_file(options.markdown, table + "\n")
    print(table)
    print(json.dumps(result))
    return 0


def _fastest_torch(
    checkpoint: Checkpoint, device: str, threads: int, photos: list[bytes], batch_size: int
) -> tuple[str, Captioner]:
    """PyTorch at its best for this batch size: memory format and LSTM call are tried out."""
    from capexport.models.torch_captioner import torch_captioner

    encoders, decoders = ("contiguous", "channels_last"), ("nn.LSTMCell", "nn.LSTM")
    variants = {}
    for encoder, decoder in zip(encoders, decoders, strict=True):
        own = copy.copy(checkpoint)
        own.model = copy.deepcopy(checkpoint.model)
        variants[encoder] = variants[decoder] = torch_captioner(
            own,
            device,
            channels_last=encoder == "channels_last",
            step_by_module=decoder == "nn.LSTM",
            threads=threads,
        )
    encoder = measure.fastest({k: variants[k] for k in encoders}, photos, batch_size, "encode")
    decoder = measure.fastest({k: variants[k] for k in decoders}, photos, batch_size, "decode")
    best = copy.copy(variants[encoder])
    best.decoder = variants[decoder].decoder
    return f"{encoder}, {decoder}", best


if __name__ == "__main__":
    sys.exit(main())
