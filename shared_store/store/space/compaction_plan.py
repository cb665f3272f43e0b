"""What to copy so that less memory holds the same blobs: a pure function of a snapshot.

A segment is freed as a whole, so one that has lost most of its blobs keeps its size, and a small publication takes at
least 2 MiB. Blobs of several such segments are copied into one that they fill.

What is packed together can only be freed together, so at most :data:`TARGET` bytes are: eviction stays nearly as fine
as models are. A larger segment is copied for itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from shared_store.base.layout import ALIGNMENT, pack, round_up
from shared_store.base.manifest import Blob

TARGET: Final = 64 << 20
"""Bytes up to which segments are packed together."""

MAX_SOURCES: Final = 256
"""Segments that are packed together at most: each is an fd for whoever copies."""

_ONE_SEGMENT: Final = 1 << 62


@dataclass(frozen=True)
class Source:
    """A segment that nobody maps: its live blobs and the first byte of each."""

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
        """The share of its bytes that no live blob has: dead ones, and padding."""
        return 1 - sum(blob.nbytes for blob, _ in self.blobs) / self.nbytes


@dataclass(frozen=True)
class Move:
    """Where a blob lies (segment by its id, first byte), and its first byte in the new segment."""

    blob: Blob
    source: int
    start: int
    offset: int


@dataclass(frozen=True)
class CompactionPlan:
    """Segments whose blobs go to one new segment of ``nbytes``; ``gain``: bytes that are free afterwards."""

    sources: tuple[int, ...]
    moves: tuple[Move, ...]
    nbytes: int
    gain: int


def choose(sources: Sequence[Source], *, room: int, target: int = TARGET) -> CompactionPlan | None:
    """The next segment worth making, beginning with the emptiest; None when nothing would be gained.

    Args:
        sources: segments that may be emptied.
        room: bytes that the new segment may take, while the old ones are still there.
        target: bytes up to which several are packed together.
    """
    order = sorted(sources, key=lambda source: (-source.unused, source.segment))
    for first in range(len(order)):
        found = _best_from(order[first : first + MAX_SOURCES], room, target)
        if found:
            return _plan(found)
    return None


def _best_from(order: Sequence[Source], room: int, target: int) -> list[Source]:
    """The shortest group that begins with the first and gains most; empty when none gains anything."""
    group: list[Source] = []
    best: list[Source] = []
    end = old = most = 0
    for source in order:
        together = round_up(end, ALIGNMENT) + source.span
        if _size(together) > (max(room, 0) if not group else min(room, target)):
            if not group:
                return []
            continue
        group.append(source)
        end, old = together, old + source.nbytes
        if old - _size(end) > most:
            best, most = list(group), old - _size(end)
    return best


def _size(end: int) -> int:
    return pack([end], target=_ONE_SEGMENT).sizes[0]


def _plan(group: Sequence[Source]) -> CompactionPlan:
    found = [(blob, source.segment, start) for source in group for blob, start in source.blobs]
    layout = pack([blob.nbytes for blob, _, _ in found], target=_ONE_SEGMENT)
    moves = tuple(
        Move(blob, segment, start, spot.offset)
        for (blob, segment, start), spot in zip(found, layout.placements, strict=True)
    )
    nbytes = layout.sizes[0]
    old = sum(source.nbytes for source in group)
    return CompactionPlan(tuple(source.segment for source in group), moves, nbytes, old - nbytes)
