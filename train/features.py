"""Backbone weights, and the image features that a frozen backbone makes only once."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import urllib.error
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from capexport.artifact import remove_dead_drafts, replacing_binary_file
from capexport.errors import CheckpointError, DownloadError, ImageError
from capexport.models.cnn_lstm import ImageEncoder
from capexport.preprocessing import ImageSpec, load_image, preprocess
from train.data import readable
from train.run import locked

_ENCODE_BATCH = 32
_SAVE_EVERY = 64  # batches: what an interrupted first epoch loses at the most


def load_backbone(encoder: ImageEncoder, weights: Path | None) -> None:
    """Fill the backbone from a safetensors file, or with torchvision's ImageNet weights.

    Raises:
        CheckpointError: the file has not this backbone's weights.
        DownloadError: torchvision's server cannot be reached.
    """
    kind = encoder.architecture
    if weights is None:
        try:
            state = kind.weights.get_state_dict(check_hash=True)
        except (urllib.error.URLError, OSError) as error:
            raise DownloadError(
                f"cannot download torchvision's {kind.name} weights ({error}): connect to the "
                "network once, or pass --backbone-weights FILE (safetensors)"
            ) from error
    else:
        try:
            state = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{weights}: not a safetensors file: {error}") from error
    state = kind.without_head(state)
    shapes, wanted = (
        # Some files leave out the batch-norm step counters, which a frozen backbone never reads.
        {k: v.shape for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
        for tensors in (state, encoder.backbone.state_dict())
    )
    if shapes != wanted:
        wrong = {name for name, _ in shapes.items() ^ wanted.items()}
        raise CheckpointError(
            f"{weights}: not the {kind.name} of torchvision that --backbone names: {len(wrong)} "
            f"tensors missing, unknown or of another shape, {min(wrong)} for one"
        )
    encoder.backbone.load_state_dict(state, strict=False)


def cached_features(
    encoder: ImageEncoder, paths: Sequence[Path], spec: ImageSpec, cache: Path, device: str
) -> dict[Path, np.ndarray]:
    """Pooled backbone features of each readable image, float32 (channels,).

    They are kept in one safetensors file for each pair of backbone weights and preprocessing,
    and found again by a hash of the image file's bytes. A damaged cache file is made anew. Where
    the cache cannot be written, a warning says so, and the features stay in memory.
    """
    file = (
        cache.expanduser() / f"{encoder.architecture.name}-{_cache_key(encoder, spec)}.safetensors"
    )
    known = _read_cache(file)
    digests = {path: digest for path, digest in readable(paths, _digest) if digest is not None}
    todo = [path for path, digest in digests.items() if digest not in known]
    keep = bool(todo) and _written(file.parent, _try_out)
    batch: list[tuple[bytes, np.ndarray]] = []
    batches = 0

    def encode() -> None:
        images = torch.from_numpy(np.stack([pixels for _, pixels in batch])).to(device)
        pooled = encoder.pooled(images.contiguous(memory_format=torch.channels_last))
        known.update(zip((digest for digest, _ in batch), pooled.cpu().numpy(), strict=True))
        batch.clear()

    encoder.eval()
    pixels_of = readable(todo, lambda path: preprocess(path, spec))
    with torch.inference_mode(), closing(pixels_of):
        for path, pixels in tqdm(pixels_of, "image features", len(todo), disable=not todo):
            if pixels is not None:
                batch.append((digests[path], pixels))
            if len(batch) == _ENCODE_BATCH:
                encode()
                batches += 1
                if keep and batches % _SAVE_EVERY == 0:
                    keep = _written(file, lambda file: _write_cache(file, known))
        if batch:
            encode()
        if keep:
            _written(file, lambda file: _write_cache(file, known))
    return {path: known[digest] for path, digest in digests.items() if digest in known}


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise ImageError(f"{path}: {error}") from error


def _cache_key(encoder: ImageEncoder, spec: ImageSpec) -> str:
    digest = hashlib.sha256(repr(spec).encode())
    for name, tensor in sorted(encoder.backbone.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _written(file: Path, write: Callable[[Path], None]) -> bool:
    """Whether `write(file)` went well; if not, that is said."""
    try:
        write(file)
    except OSError as error:
        print(
            f"image features are kept in memory alone, and made anew by the next run: {error}",
            file=sys.stderr,
        )
        return False
    return True


def _try_out(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=cache).close()


def _read_cache(file: Path) -> dict[bytes, np.ndarray]:
    try:
        tensors = load_file(file)
        rows = zip(tensors["digests"].numpy(), tensors["features"].numpy(), strict=True)
        return {digest.tobytes(): row for digest, row in rows}
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}


def _write_cache(file: Path, known: dict[bytes, np.ndarray]) -> None:
    """Add what is known to the file, and what another training has put there to what is known."""
    with locked(file.parent, wait=True):
        remove_dead_drafts(file.parent)
        for digest, row in _read_cache(file).items():
            known.setdefault(digest, row)
        digests = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 32).copy()
        features = torch.from_numpy(np.stack(list(known.values())))
        with replacing_binary_file(file) as draft:
            draft.write(save({"features": features, "digests": torch.from_numpy(digests)}))


def live_features(
    encoder: ImageEncoder, spec: ImageSpec, augment: bool, device: str
) -> Callable[[Sequence[Path], np.random.Generator], Tensor]:
    """A function that computes a batch's features from its image files, (batch, channels)."""
    pool = ThreadPoolExecutor()

    def features(paths: Sequence[Path], rng: np.random.Generator) -> Tensor:
        seeds = rng.integers(2**63, size=len(paths))

        def pixels(path: Path, seed: int) -> np.ndarray:
            image = load_image(path)
            return preprocess(_augmented(image, seed) if augment else image, spec)

        images = torch.from_numpy(np.stack(list(pool.map(pixels, paths, seeds)))).to(device)
        frozen = not any(p.requires_grad for p in encoder.backbone.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return encoder.pooled(images.contiguous(memory_format=torch.channels_last))

    return features


def _augmented(image: Image.Image, seed: int) -> Image.Image:
    """A crop of 80 to 100% of each edge, mirrored half of the time."""
    rng = np.random.default_rng(seed)
    width, height = (max(1, round(edge * rng.uniform(0.8, 1))) for edge in image.size)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image
