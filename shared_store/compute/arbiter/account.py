"""What one workload used so far, and its part of the last seconds."""

from __future__ import annotations

from collections import deque
from typing import Final

from shared_store.compute.control import Row
from shared_store.compute.usage import Charge

WINDOW_S: Final = 10.0
"""Seconds that the used share looks back."""


class Account:
    """Of one workload, in seconds. It lasts as long as the store knows the workload, whatever page that has."""

    def __init__(self, number: int, now: float) -> None:
        """Begin with nothing at ``now``, monotonic seconds."""
        self.number = number
        self.device_s = 0.0
        self._estimated_s = 0.0
        self._held_s = 0.0
        self._samples = deque([(now, 0.0)])

    def add(self, charge: Charge, held_s: float) -> None:
        """Add what was used between two looks."""
        self.device_s += charge.seconds
        if charge.estimated:
            self._estimated_s += charge.seconds
        self._held_s += held_s

    def row(self, now: float, *, held: bool, stalled: bool) -> Row:
        """Return the account for a report. Call it for each report: the used share counts from one of the last ones."""
        samples = self._samples
        samples.append((now, self.device_s))
        while samples[1][0] <= now - WINDOW_S:
            samples.popleft()
        began, used_s = samples[0]
        passed = now - began
        used_share = min(1.0, (self.device_s - used_s) / passed) if passed > 0 else 0.0
        return Row(self.number, self.device_s, self._estimated_s, self._held_s, used_share, held, stalled)
