"""What a benchmark found, as its JSON holds it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# A caption's way from a decoded photo to text: the whole, and its parts.
STAGES = ("total", "preprocess", "encode", "decode")


@dataclass(frozen=True)
class Statistics:
    """Of milliseconds a batch."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class PathResult:
    """One captioner's batches of one size.

    Attributes:
        milliseconds: a batch's, by stage.
        steps: decoding steps a batch, the mean; a search of beams may take more.
        captions_per_second, tokens_per_second: at the median.
        identical_captions, identical_tokens: the share that is the first captioner's.
        outside_graphs: the share of decoding, from features to text, spent outside the graphs.
        share_of_floor: the time in which the decoder's weights can be read from memory, as a share
            of the time that decoding takes.
    """

    milliseconds: dict[str, Statistics]
    steps: float
    captions_per_second: float
    tokens_per_second: float
    identical_captions: float
    identical_tokens: float
    outside_graphs: float | None = None
    share_of_floor: float | None = None


@dataclass(frozen=True)
class Run:
    """All captioners at one batch size; `variants` says which of several was the fastest."""

    batch_size: int
    paths: dict[str, PathResult]
    variants: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Footprint:
    """What a captioner costs: seconds to import and load, megabytes of memory and of disk."""

    load_seconds: float
    peak_memory_mb: float
    disk_mb: float


@dataclass(frozen=True)
class Environment:
    """The machine and the versions that a measurement depends on; `load` is the machine's average
    of processes that want a core, within the last minute of measuring."""

    cpu: str
    threads: int
    memory_gb_per_second: float
    versions: dict[str, str]
    load: float | None = None


@dataclass(frozen=True)
class Result:
    """All that a run of `capbench` found.

    Attributes:
        decoding: options that were given to every captioner, in place of its model's own.
        metrics: caption metrics, by captioner.
        feature_errors: of the encoder's outputs the largest relative error against PyTorch's, by
            captioner; none on a GPU, or where PyTorch's captioner has no encoder of its own.
        unavailable: why a peer could not be measured.
    """

    model: str
    device: str
    photos: int
    repeats: int
    environment: Environment
    runs: list[Run]
    metrics: dict[str, dict[str, float | str]]
    unavailable: dict[str, str]
    footprint: dict[str, Footprint]
    feature_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    decoding: dict[str, Any] = dataclasses.field(default_factory=dict)
