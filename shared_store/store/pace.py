"""Long work of the event loop in slices, between which other callbacks run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

SLICE: Final = 10_000
"""Units of work, such as blobs visited, between two pauses: a few milliseconds."""


class Pace:
    """Counts work, and lets other callbacks run after each slice of it. ``slices``: the pauses so far."""

    def __init__(self) -> None:
        self.slices = 0
        self._done = 0

    async def through(self, steps: Iterable[int]) -> None:
        """Take all steps, which yield the units of work that each took."""
        for units in steps:
            await self.done(units)

    async def done(self, units: int) -> None:
        """Count work, and pause if the slice is full. The state may be another one after that."""
        self._done += units
        if self._done >= SLICE:
            self._done = 0
            self.slices += 1
            await asyncio.sleep(0)
