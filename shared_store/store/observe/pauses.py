"""Durations for which something else had to wait, counted in a fixed number of classes, and the longest of them."""

from __future__ import annotations

from bisect import bisect_left

from shared_store.base.status import PAUSE_BOUNDS_S, PauseStatus


class Pauses:
    """Pauses of one kind since the process started, in constant memory."""

    def __init__(self) -> None:
        self._classes = [0] * (len(PAUSE_BOUNDS_S) + 1)
        self._total_s = 0.0
        self._longest_s = 0.0

    def add(self, seconds: float) -> bool:
        """Count a pause of this many seconds; return whether it is the longest so far."""
        self._classes[bisect_left(PAUSE_BOUNDS_S, seconds)] += 1
        self._total_s += seconds
        if seconds <= self._longest_s:
            return False
        self._longest_s = seconds
        return True

    def status(self) -> PauseStatus:
        """Return the part of the status."""
        return PauseStatus(sum(self._classes), self._total_s, self._longest_s, tuple(self._classes))
