"""Counts of overcommit since the store started: swaps, their steps, waits for memory, refusals.

Names of steps and refusals come from clients. Only the first :data:`MAX_NAMES` are counted by name, the rest as
``other``, so that the counts have constant memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Final, Literal

from shared_store.base.status import (
    LATENCY_BOUNDS_S,
    DurationStatus,
    OvercommitStatus,
    RefusalStatus,
    SwapStatus,
)
from shared_store.base.text import one_line

MAX_NAMES: Final = 32
"""Steps, and reasons of refusals, that are counted by name."""

_MAX_LETTERS: Final = 32
_OTHER: Final = "other"


class OvercommitCounts:
    """Counts that the handlers of workloads add to."""

    def __init__(self) -> None:
        self._swaps: dict[Literal["out", "in"], list[int]] = {"out": [0, 0], "in": [0, 0]}
        self._steps: dict[str, _Durations] = {}
        self._waits = tuple(_Durations() for _ in range(5))
        self._refusals: dict[str, int] = {}

    def swapped(self, direction: Literal["out", "in"], moved: int, steps: Mapping[str, float]) -> None:
        """Count a swap that is complete. ``moved``: bytes copied. ``steps``: seconds of its parts."""
        counted = self._swaps[direction]
        counted[0] += 1
        counted[1] += max(0, moved)
        for step, seconds in steps.items():
            self.took(step, seconds)

    def took(self, step: str, seconds: float) -> None:
        """Count a step that belongs to no swap, for example a checkpoint."""
        self._steps.setdefault(_bounded(step, self._steps), _Durations()).add(max(0.0, seconds))

    def waited(self, priority: int, seconds: float) -> None:
        """Count a wait for memory that ended, granted or not. ``priority``: 0 (highest) to 4."""
        self._waits[priority].add(seconds)

    def refused(self, code: str) -> None:
        """Count a request to leave that was refused or not answered, by the code of the error."""
        name = _bounded(code, self._refusals)
        self._refusals[name] = self._refusals.get(name, 0) + 1

    def status(self, waiting: tuple[int, ...]) -> OvercommitStatus:
        """Return the part of the status. ``waiting``: workloads that wait for memory now, by priority."""
        return OvercommitStatus(
            tuple(SwapStatus(direction, count, nbytes) for direction, (count, nbytes) in self._swaps.items()),
            tuple(durations.status(step) for step, durations in sorted(self._steps.items())),
            tuple(durations.status(str(priority)) for priority, durations in enumerate(self._waits)),
            waiting,
            tuple(RefusalStatus(reason, count) for reason, count in sorted(self._refusals.items())),
        )


class _Durations:
    """Durations in classes by :data:`LATENCY_BOUNDS_S`."""

    def __init__(self) -> None:
        self._classes = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self._total_s = 0.0

    def add(self, seconds: float) -> None:
        self._classes[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self._total_s += seconds

    def status(self, name: str) -> DurationStatus:
        return DurationStatus(name, sum(self._classes), self._total_s, tuple(self._classes))


def _bounded(name: str, known: Mapping[str, object]) -> str:
    """Return a printable name, or ``other`` if there are too many."""
    name = one_line(name, _MAX_LETTERS) or _OTHER
    return name if name in known or len(known) < MAX_NAMES else _OTHER
