"""Chooses segments to compact: a pure function of a snapshot.

A segment is freed as a whole, so one whose blobs are mostly dead still has its full size, and a small model occupies at
least 2 MiB. Blobs of several such segments are copied into one segment that they fill.

Blobs in one segment can only be freed together, so at most :data:`TARGET` bytes are packed together: eviction stays
nearly as fine as models are. A larger segment is compacted alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shared_store.base.layout import ALIGNMENT, pack, round_up
from shared_store.store.state.compactions import CompactionPlan, Move, Source

TARGET: Final = 64 << 20
"""Bytes up to which segments are packed together."""

MAX_SOURCES: Final = 256
"""Most segments that are packed together: each costs the copying process a descriptor."""

MAX_BLOBS: Final = 4096
"""Blobs after which no further segment joins a group: blobs move in one step of the event loop."""

_ONE_SEGMENT: Final = 1 << 62


def choose(sources: Sequence[Source], *, free: int, target: int = TARGET) -> CompactionPlan | None:
    """Return the next compaction, starting with the emptiest segments; None if nothing would be gained.

    Args:
        sources: segments whose blobs may move.
        free: bytes available for the new segment, while the old ones still exist.
        target: bytes up to which several segments are packed together.
    """
    order = sorted(sources, key=lambda source: (-source.unused, source.segment))
    for first in range(len(order)):
        found = _best_from(order[first : first + MAX_SOURCES], free, target)
        if found:
            return _plan(found)
    return None


def _best_from(order: Sequence[Source], free: int, target: int) -> list[Source]:
    """Return the shortest group that starts with the first source and gains most; empty if none gains anything."""
    group: list[Source] = []
    best: list[Source] = []
    end = old = most = blobs = 0
    for source in order:
        if group and blobs + len(source.blobs) > MAX_BLOBS:
            break
        together = round_up(end, ALIGNMENT) + source.span
        if _size(together) > (max(free, 0) if not group else min(free, target)):
            if not group:
                return []
            continue
        group.append(source)
        end, old, blobs = together, old + source.nbytes, blobs + len(source.blobs)
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
