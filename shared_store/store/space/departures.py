"""Segments that leave their devices and return: what follows once the memory there is released, and waits for both."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shared_store.store.signals import Signals
from shared_store.store.state.residency import Residency
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)

RETURNED_WITHIN_S: Final = 30.0
"""Seconds for which a plan waits for segments that another publisher brings back."""


@dataclass(frozen=True, eq=False)
class Departures:
    """Ends departures, and waits for their end."""

    _state: StoreState
    _signals: Signals

    def left(self, segment: int) -> None:
        """Record that the device memory of a segment is released. Without effect for one that is gone."""
        segments = self._state.segments
        if segments.released(segment):
            entry = segments.at(segment)
            log.info("segment %d left %s: %d bytes", segment, entry.device, entry.nbytes)
            self._signals.event("segment_left", device=entry.device, segment=segment, bytes=entry.nbytes)
            self._signals.changed()

    async def ended(self, segments: Iterable[int]) -> None:
        """Wait until none of the segments is leaving."""
        waited = list(segments)
        while any(map(self._leaving, waited)):
            await self._signals.next_change().wait()

    async def returned(self, segments: Iterable[int]) -> None:
        """Wait until other publishers have brought the segments back, or failed to, for some time.

        A publisher that does not wait would get other segments for blobs in these.
        """
        waited = list(segments)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETURNED_WITHIN_S):
                while any(self._is(segment, Residency.RETURNING) for segment in waited):
                    await self._signals.next_change().wait()

    def _leaving(self, segment: int) -> bool:
        return self._is(segment, Residency.LEAVING)

    def _is(self, segment: int, residency: Residency) -> bool:
        segments = self._state.segments
        return segments.has(segment) and segments.at(segment).residency is residency
