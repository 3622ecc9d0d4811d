"""Counters of a server, in the text format that Prometheus reads.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """How many values lie at or below each of `bounds`, which ascend, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, label: str = "") -> Iterator[str]:
        """The lines of a metric; `label` is none or one, as `path="/caption",`."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{label}le="{bound}"}} {total}'
        labels = f"{{{label.rstrip(',')}}}" if label else ""
        yield f"{name}_sum{labels} {self._sum:.6f}"
        yield f"{name}_count{labels} {total}"


class Metrics:
    """What was asked and captioned since the start.

    Only the event loop's thread writes and reads it.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.images: Counter[str] = Counter()
        self.seconds: dict[str, Histogram] = {}
        self.batches = Histogram(_IMAGES)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request. `path` is a route's, since each path gets counters of its own."""
        self.requests[path, status] += 1
        self.seconds.setdefault(path, Histogram(_SECONDS)).observe(seconds)

    def text(self, gauges: Mapping[str, int]) -> str:
        """All counters, and `gauges` by name."""
        return "\n".join([*self._lines(gauges), ""])

    def _lines(self, gauges: Mapping[str, int]) -> Iterator[str]:
        yield "# TYPE capexport_requests_total counter"
        for (path, status), count in sorted(self.requests.items()):
            yield f'capexport_requests_total{{path="{path}",status="{status}"}} {count}'
        yield "# TYPE capexport_request_seconds histogram"
        for path, histogram in sorted(self.seconds.items()):
            yield from histogram.lines("capexport_request_seconds", f'path="{path}",')
        yield "# TYPE capexport_images_total counter"
        for result in ("captioned", "failed"):
            yield f'capexport_images_total{{result="{result}"}} {self.images[result]}'
        yield "# TYPE capexport_batch_images histogram"
        yield from self.batches.lines("capexport_batch_images")
        for name, value in gauges.items():
            yield f"# TYPE {name} gauge"
            yield f"{name} {value}"
