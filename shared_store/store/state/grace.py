"""The grace period after a restart, and what is known of the store before this one.

A model is awaited when only the journal knows it: keeper and store ended together, and its segments exist in clients
only. Nothing is evicted or compacted during the grace period, because readers may be about to rejoin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping

from shared_store.protocol.keeper_messages import ModelRecord, SegmentRecord

GRACE_S = 5.0
"""Seconds that clients have to rejoin after a restart. They retry at least once a second."""

MORE_S = 2.0
"""Least seconds that remain after a client offered a model: it may offer others, one after the other."""

LONGEST_S = 60.0
"""Seconds after which the grace period ends in any case."""


class Grace:
    """The grace period. A store that starts with nothing has none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` returns monotonic seconds."""
        self._clock = clock
        self._models: dict[str, ModelRecord] = {}
        self._segments: dict[int, SegmentRecord] = {}
        self._awaited: set[str] = set()
        self._latest = 0.0
        self.until = 0.0
        """When the period ends, on the monotonic clock."""

    def begin(self, models: Mapping[str, ModelRecord], segments: Mapping[int, SegmentRecord]) -> None:
        """Start the period if the store before this one had models."""
        self._models = dict(models)
        self._segments = dict(segments)
        self.until = self._clock() + GRACE_S if models else 0.0
        self._latest = self._clock() + LONGEST_S

    @property
    def active(self) -> bool:
        """Whether readers may still rejoin, so that nothing is evicted or compacted."""
        return self._clock() < self.until

    @property
    def left_s(self) -> float:
        """Seconds until the period ends."""
        return max(0.0, self.until - self._clock())

    @property
    def segments(self) -> frozenset[int]:
        """Ids of all segments that an earlier store had."""
        return frozenset(self._segments)

    @property
    def awaited(self) -> bool:
        """Whether clients may still offer models."""
        return bool(self._awaited)

    def model(self, key: str) -> ModelRecord | None:
        """Return the earlier store's record of a model."""
        return self._models.get(key)

    def segment(self, number: int) -> SegmentRecord | None:
        """Return the earlier store's record of a segment."""
        return self._segments.get(number)

    def pinned(self, key: str) -> bool:
        """Whether the earlier store had the model pinned."""
        return key in self._models and self._models[key].pinned

    def forgotten(self, key: str) -> bool:
        """Whether the earlier store had models or segments, but not this model.

        A client that still reads it has read it since before it was quarantined.
        """
        return bool(self._models or self._segments) and key not in self._models

    def expect(self, key: str) -> None:
        """Wait for clients to offer the model."""
        self._awaited.add(key)

    def extend(self) -> None:
        """Leave time for further offers, because a client just offered a model."""
        if self._awaited:
            self.until = min(self._latest, max(self.until, self._clock() + MORE_S))

    def end(self, busy: Container[str]) -> list[str]:
        """End the wait for all models except the ``busy`` ones, which are being offered; return their keys.

        Some of the returned models may have been offered.
        """
        over = sorted(key for key in self._awaited if key not in busy)
        self._awaited.difference_update(over)
        return over
