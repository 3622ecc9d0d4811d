"""Backbone weights, and the image features that a frozen backbone makes only once."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import urllib.error
import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from capexport.atomic import remove_dead_drafts, replacing_binary_file
from capexport.errors import CheckpointError, DownloadError, ImageError
from capexport.models.cnn_lstm import ImageEncoder
from capexport.preprocessing import ImageSpec, load_image, preprocess
from train.data import readable

_ENCODE_BATCH = 32
_SHARD_PHOTOS = 1024  # a file of the cache, and what an interrupted run loses at the most
_CROPPED = 0.75  # the smallest share of an edge that augmentation keeps


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


class CachedFeatures:
    """What the frozen part of an encoder makes of photos, by `ImageEncoder.stem`, once.

    The cache is a folder for each pair of weights and preprocessing, in which photos are found by
    a hash of their files' bytes. Its files are mapped, so that features are read from the disk when
    they are needed. A damaged file is made anew; where the folder cannot be written, a warning says
    so, and the features stay in memory. Maps are kept in float16, pooled features in float32.

    Attributes:
        readable: those of the photos that can be decoded.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        paths: Sequence[Path],
        spec: ImageSpec,
        cache: Path,
        device: str,
        views: int = 1,
    ) -> None:
        """`views`: how many versions of a photo are made: itself, mirrored, and random crops."""
        self._device = device
        self._views = views
        name = f"{encoder.architecture.name}-{_cache_key(encoder, spec, views)}"
        self._folder = cache.expanduser() / name
        digests = {path: digest for path, digest in readable(paths, _digest) if digest is not None}
        self._places: dict[bytes, tuple[Tensor, int]] = {}
        for file in sorted(self._folder.glob("*.safetensors")):
            self._add(_read_shard(file))
        once = {digest: path for path, digest in digests.items()}
        todo = {path: digest for digest, path in once.items() if digest not in self._places}
        if todo:
            self._make(todo, encoder, spec)
        self._digests = {path: d for path, d in digests.items() if d in self._places}
        self.readable = self._digests.keys()

    def __call__(self, paths: Sequence[Path], rng: np.random.Generator | None = None) -> Tensor:
        """Features of a batch, float32 (photos, ...): of a random view each where `rng` is given,
        of the photos themselves otherwise."""
        views = rng.integers(self._views, size=len(paths)) if rng else [0] * len(paths)
        places = (self._places[self._digests[path]] for path in paths)
        rows = [shard[row, view] for (shard, row), view in zip(places, views, strict=True)]
        values = torch.stack(rows).to(self._device).float()
        return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values

    def _add(self, shard: dict[str, Tensor]) -> None:
        if shard:
            for row, digest in enumerate(shard["digests"].numpy()):
                self._places.setdefault(digest.tobytes(), (shard["features"], row))

    def _make(self, todo: dict[Path, bytes], encoder: ImageEncoder, spec: ImageSpec) -> None:
        keep = _written(self._folder, _try_out)
        encoder.eval()
        with closing(self._encoded(todo, encoder, spec)) as encoded:
            while shard := list(islice(encoded, _SHARD_PHOTOS)):
                digests = b"".join(digest for digest, _ in shard)
                tensors = {
                    "digests": torch.tensor(np.frombuffer(digests, np.uint8).reshape(-1, 32)),
                    "features": torch.stack([values for _, values in shard]),
                }
                file = self._folder / f"{shard[0][0].hex()[:16]}.safetensors"
                keep = keep and _written(file, lambda file: _write_shard(file, tensors))  # noqa: B023
                self._add(_read_shard(file) if keep else tensors)

    def _encoded(
        self, todo: dict[Path, bytes], encoder: ImageEncoder, spec: ImageSpec
    ) -> Generator[tuple[bytes, Tensor], None, None]:
        """Each photo's digest and features, (views, ...)."""
        photos = max(1, _ENCODE_BATCH // self._views)
        made = readable(list(todo), partial(_views, spec=spec, count=self._views))
        with closing(made), tqdm(made, "image features", len(todo)) as bar:
            usable = ((todo[path], pixels) for path, pixels in bar if pixels is not None)
            while batch := list(islice(usable, photos)):
                images = torch.from_numpy(np.concatenate([pixels for _, pixels in batch]))
                with torch.inference_mode():
                    images = images.to(self._device).contiguous(memory_format=torch.channels_last)
                    values = encoder.stem(images)
                dtype = torch.float16 if values.ndim == 4 else torch.float32
                values = values.to("cpu", dtype).contiguous()
                rows = values.unflatten(0, (len(batch), self._views))
                yield from zip((digest for digest, _ in batch), rows, strict=True)


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise ImageError(f"{path}: {error}") from error


def _views(path: Path, spec: ImageSpec, count: int) -> np.ndarray:
    """float32 (count, 3, height, width): the photo, its mirror image, and random crops."""
    image = load_image(path)
    versions = [image, ImageOps.mirror(image)][:count] if count > 1 else [image]
    seed = zlib.crc32(image.tobytes())
    versions += [_augmented(image, seed + number) for number in range(2, count)]
    return np.stack([preprocess(version, spec) for version in versions])


def _cache_key(encoder: ImageEncoder, spec: ImageSpec, views: int) -> str:
    """A hash of all that the features depend on, Pillow's version included."""
    place = (spec, encoder.train_from, encoder.pools, views, _CROPPED, PIL.__version__)
    digest = hashlib.sha256(repr(place).encode())
    for name, tensor in sorted(encoder.backbone[: encoder.train_from].state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _written(file: Path, write: Callable[[Path], None]) -> bool:
    """Call `write(file)`; False, after a line on stderr, where the file cannot be written."""
    try:
        write(file)
    except OSError as error:
        print(
            f"image features are kept in memory alone, and made anew by the next run: {error}",
            file=sys.stderr,
        )
        return False
    return True


def _try_out(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_dead_drafts(folder)
    tempfile.TemporaryFile(dir=folder).close()


def _read_shard(file: Path) -> dict[str, Tensor]:
    """`digests`, uint8 (photos, 32), and `features`, (photos, views, ...); nothing if damaged."""
    try:
        tensors = load_file(file)
        return tensors if len(tensors["digests"]) == len(tensors["features"]) else {}
    except (OSError, SafetensorError, KeyError):
        return {}


def _write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    with replacing_binary_file(file) as draft:
        draft.write(save(tensors))


class LiveFeatures:
    """As `CachedFeatures`, but computed anew from the image files for every batch."""

    def __init__(self, encoder: ImageEncoder, spec: ImageSpec, augment: bool, device: str) -> None:
        self._encoder = encoder
        self._spec = spec
        self._augment = augment
        self._device = device
        self._pool = ThreadPoolExecutor()

    def __call__(self, paths: Sequence[Path], rng: np.random.Generator | None = None) -> Tensor:
        """As `CachedFeatures`; `rng` draws crops."""
        draws = self._augment and rng is not None
        seeds = rng.integers(2**63, size=len(paths)) if rng else [0] * len(paths)

        def pixels(path: Path, seed: int) -> np.ndarray:
            image = load_image(path)
            return preprocess(_augmented(image, seed) if draws else image, self._spec)

        images = torch.from_numpy(np.stack(list(self._pool.map(pixels, paths, seeds))))
        images = images.to(self._device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            return self._encoder.stem(images)


def _augmented(image: Image.Image, seed: int) -> Image.Image:
    """A crop of at least `_CROPPED` of each edge, mirrored half of the time."""
    rng = np.random.default_rng(seed)
    width, height = (max(1, round(edge * rng.uniform(_CROPPED, 1))) for edge in image.size)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image
