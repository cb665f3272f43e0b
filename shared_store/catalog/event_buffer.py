"""A bounded buffer of events for the catalog. It counts the events that it drops.

Not thread-safe: callers use a lock.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = str | int

LONGEST_TEXT: Final = 500
"""Longest text of a field, in characters. Longer text is cut: clients choose model names and reasons freely."""


@dataclass(frozen=True)
class Event:
    """An event. ``seq`` counts from 1 in each epoch; ``time`` is Unix seconds on this node."""

    seq: int
    time: float
    kind: str
    fields: Mapping[str, Value]


class EventBuffer:
    """Events that are not written yet, at most ``capacity``. New events displace the oldest."""

    def __init__(self, capacity: int) -> None:
        self._waiting: deque[Event] = deque()
        self._capacity = capacity
        self._last_seq = 0
        self._dropped = 0
        self._last_dropped: Event | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, kind: str, fields: Mapping[str, Value]) -> None:
        """Add an event, with the next sequence number and the current time."""
        self._last_seq += 1
        kept = {name: value[:LONGEST_TEXT] if isinstance(value, str) else value for name, value in fields.items()}
        self._waiting.append(Event(self._last_seq, time.time(), kind, kept))
        while len(self._waiting) > self._capacity:
            self._last_dropped = self._waiting.popleft()
            self._dropped += 1

    def take(self, most: int) -> list[Event]:
        """Remove and return the oldest ``most`` events.

        If events were dropped since the last call, one event ``events_dropped`` precedes them, with their ``count`` and
        with the sequence number and time of the last dropped event.
        """
        batch = []
        if self._last_dropped is not None:
            last = self._last_dropped
            batch.append(Event(last.seq, last.time, "events_dropped", {"count": self._dropped}))
            self._last_dropped, self._dropped = None, 0
        batch.extend(self._waiting.popleft() for _ in range(min(most, len(self._waiting))))
        return batch
