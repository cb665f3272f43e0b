"""Compactions: which are under way, and how blobs move when one ends.

Until a compaction ends, blobs keep their locations, and the segments that it copies from have references of its token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from shared_store.base.layout import ALIGNMENT, round_up
from shared_store.base.manifest import Blob
from shared_store.store.state.segments import Segments


@dataclass(frozen=True)
class Source:
    """A segment that no client maps: its live blobs and the first byte of each."""

    segment: int
    nbytes: int
    blobs: tuple[tuple[Blob, int], ...]

    @cached_property
    def span(self) -> int:
        """Bytes from the first to the last of its blobs, once they are packed."""
        end = 0
        for blob, _ in self.blobs:
            end = round_up(end, ALIGNMENT) + blob.nbytes
        return end

    @property
    def unused(self) -> float:
        """Fraction of its bytes that no live blob uses: dead bytes and padding."""
        return 1 - sum(blob.nbytes for blob, _ in self.blobs) / self.nbytes


@dataclass(frozen=True)
class Move:
    """A blob's location (segment id, first byte), and its first byte in the new segment."""

    blob: Blob
    source: int
    start: int
    offset: int


@dataclass(frozen=True)
class CompactionPlan:
    """Segments whose blobs move to one new segment of ``nbytes``; ``gain``: bytes that are free afterwards."""

    sources: tuple[int, ...]
    moves: tuple[Move, ...]
    nbytes: int
    gain: int


@dataclass(frozen=True)
class Compaction:
    """A compaction under way: its new segment, and the client that copies (None: the store copies)."""

    token: str
    device: str
    plan: CompactionPlan
    segment: int
    client: int | None

    @property
    def copies(self) -> list[tuple[Blob, int]]:
        """The blobs that are copied, and their first bytes in the new segment."""
        return [(move.blob, move.offset) for move in self.plan.moves]


@dataclass(frozen=True)
class Compacted:
    """The result of a compaction: bytes moved and freed, owners of the moved blobs, and segments to release."""

    moved: int
    freed: int
    owners: frozenset[str] = frozenset()
    released: tuple[int, ...] = ()


class Compactions:
    """The compactions under way, over the segments of a store."""

    def __init__(self, segments: Segments, unread: Callable[[str], bool]) -> None:
        """``unread`` tells whether an owner is a committed model without readers."""
        self._segments = segments
        self._unread = unread
        self._running: dict[int, Compaction] = {}
        self._numbers = itertools.count(1)

    def all(self) -> list[Compaction]:
        """Return the compactions under way."""
        return list(self._running.values())

    def running(self, compaction: Compaction) -> bool:
        """Whether a compaction has neither ended nor been cancelled."""
        return compaction.segment in self._running

    def into(self, segment: int) -> Compaction | None:
        """Return the compaction that fills this segment."""
        return self._running.get(segment)

    def by(self, client: int) -> list[Compaction]:
        """Return the compactions of a client."""
        return [compaction for compaction in self._running.values() if compaction.client == client]

    def sources(self, device: str, share: float = 0.0) -> list[Source]:
        """Return the segments of a device whose blobs may move: all owners are committed models without readers.

        ``share``: the least fraction of a segment's bytes that must be unused.
        """
        return [self.source(segment) for segment in self.candidates(device, share)]

    def candidates(self, device: str, share: float = 0.0) -> list[int]:
        """Return the ids of the segments in :meth:`sources`, the emptiest first, without visiting their blobs."""
        found = [
            entry
            for entry in self._segments.on(device)
            if entry.nbytes - entry.live >= share * entry.nbytes and self._movable(entry.id)
        ]
        return [entry.id for entry in sorted(found, key=lambda entry: entry.live / entry.nbytes)]

    def source(self, segment: int) -> Source:
        """Return a segment with its live blobs."""
        return Source(segment, self._segments.at(segment).nbytes, tuple(self._segments.contents(segment)))

    def possible(self, plan: CompactionPlan) -> bool:
        """Whether a plan that was made from an earlier state can still begin: all its blobs may still move."""
        return all(self._segments.has(segment) and self._movable(segment) for segment in plan.sources)

    def _movable(self, segment: int) -> bool:
        entry = self._segments.at(segment)
        return bool(entry.settled and entry.blobs and all(map(self._unread, self._segments.owners(segment))))

    def begin(self, device: str, plan: CompactionPlan, client: int | None) -> Compaction:
        """Promise the new segment, and refer to the old ones until the compaction ends."""
        token = f"compaction {next(self._numbers)}"
        for segment in plan.sources:
            self._segments.refer(segment, token)
        segment = self._segments.promise(device, plan.nbytes, token)
        self._running[segment] = Compaction(token, device, plan, segment, client)
        return self._running[segment]

    def cancel(self, compaction: Compaction) -> list[int]:
        """End a compaction without moving blobs; return the segments to release. Idempotent."""
        if self._running.pop(compaction.segment, None) is None:
            return []
        return self._segments.drop(compaction.token)

    def end(self, compaction: Compaction) -> Compacted:
        """Move the blobs to their verified copies.

        Blobs that were removed meanwhile do not move, nor do those of segments that got a reader or were quarantined.
        When the rest would free nothing, nothing moves.
        """
        del self._running[compaction.segment]
        segments, plan = self._segments, compaction.plan
        new = segments.at(compaction.segment)
        still = {
            source
            for source in plan.sources
            if all(self._unread(owner) for owner in segments.owners(source) - {compaction.token})
            and segments.at(source).blobs
        }
        freed = sum(segments.at(source).nbytes for source in still) - new.nbytes
        moves = [
            move for move in plan.moves if move.source in still and move.blob.digest in segments.at(move.source).blobs
        ]
        if freed <= 0:
            return Compacted(0, 0, released=tuple(segments.drop(compaction.token)))
        moved = [segments.move(move.blob.digest, compaction.segment, move.offset) for move in moves]
        segments.end_writing(compaction.segment)
        new.placed = new.live
        owners = frozenset[str]().union(*(blob.references for blob in moved))
        return Compacted(new.live, freed, owners, tuple(segments.drop(compaction.token)))
