"""Durations of requests, counted in a fixed number of classes: a microsecond for each, and constant memory."""

from __future__ import annotations

from bisect import bisect_left

from shared_store.base.status import LATENCY_BOUNDS_S, RequestStatus
from shared_store.protocol.messages import Request


class RequestTimes:
    """Durations by kind of request since the store started, including time spent waiting for other clients."""

    def __init__(self) -> None:
        self._classes: dict[str, list[int]] = {}
        self._totals: dict[str, float] = {}

    def add(self, request: Request, seconds: float) -> None:
        """Count a request that was answered, by a result or an error, after this many seconds."""
        name = str(request.__struct_config__.tag)
        classes = self._classes.setdefault(name, [0] * (len(LATENCY_BOUNDS_S) + 1))
        classes[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self._totals[name] = self._totals.get(name, 0.0) + seconds

    def status(self) -> tuple[RequestStatus, ...]:
        """Return the part of the status, in the order of names."""
        return tuple(
            RequestStatus(name, sum(classes), self._totals[name], tuple(classes))
            for name, classes in sorted(self._classes.items())
        )
