"""The layout of blobs in segments: pure functions.

Few, large segments make mapping a model a few calls. But publishing allocates a whole segment before it frees the first
tensor that is copied into it, so segments that are small relative to the model limit the peak of memory. Blobs are
aligned to 512 bytes, which satisfies every vector load and copy engine. Segment sizes are multiples of 2 MiB, the
granularity of CUDA's physical allocations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 512
GRANULARITY = 2 << 20
TARGET = 1 << 30
LEAST_TARGET = 64 << 20
PARTS = 8
"""Segments of a model whose target lies between the two limits: publishing takes an eighth more than its size."""


@dataclass(frozen=True)
class Placement:
    """The place of one blob: index of its segment in the layout, and offset of its first byte there."""

    segment: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """``sizes``: bytes of each segment. ``placements``: one for each blob, in the order of the blobs."""

    sizes: tuple[int, ...]
    placements: tuple[Placement, ...]


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple that is at least ``value``."""
    return -(-value // multiple) * multiple


def target_for(nbytes: int) -> int:
    """Return the bytes after which a new segment begins, for blobs of ``nbytes`` in total."""
    return min(max(nbytes // PARTS, LEAST_TARGET), TARGET)


def pack(sizes: Sequence[int], *, target: int | None = None) -> Layout:
    """Lay out blobs in their order, in which they are also copied and freed.

    Args:
        sizes: bytes of each blob, zero allowed.
        target: bytes after which a new segment begins; by default :func:`target_for` of their sum. A larger blob gets a
            segment of its own.

    Returns:
        A layout without overlaps. Offsets are multiples of :data:`ALIGNMENT`, segment sizes of :data:`GRANULARITY`.
    """
    if target is None:
        target = target_for(sum(sizes))
    placements: list[Placement] = []
    ends: list[int] = []
    for nbytes in sizes:
        if nbytes < 0:
            raise ValueError(f"a blob of {nbytes} bytes")
        offset = round_up(ends[-1], ALIGNMENT) if ends else 0
        if not ends or (ends[-1] and offset + nbytes > target):
            ends.append(0)
            offset = 0
        placements.append(Placement(len(ends) - 1, offset))
        ends[-1] = offset + nbytes
    return Layout(tuple(max(round_up(end, GRANULARITY), GRANULARITY) for end in ends), tuple(placements))


def restrict(preferred: Layout, nbytes: Sequence[int], new: Sequence[int]) -> Layout:
    """Restrict a preferred layout to the segments that get new blobs.

    Args:
        preferred: a placement for each blob, stable because a client has reserved addresses for it.
        nbytes: bytes of each blob.
        new: indexes of the blobs that need a placement; the others are in the store already.

    Returns:
        Placements for the new blobs, in the order of ``new``.

    Raises:
        ValueError: blobs overlap, are not aligned or exceed their segment, or a segment's size is not a multiple of
            :data:`GRANULARITY`.
    """
    if len(preferred.placements) != len(nbytes):
        raise ValueError(f"{len(preferred.placements)} placements for {len(nbytes)} blobs")
    if any(size <= 0 or size % GRANULARITY for size in preferred.sizes):
        raise ValueError(f"a segment's size is not a multiple of {GRANULARITY} bytes")
    end: dict[int, int] = {}
    for index in sorted(new, key=lambda index: (preferred.placements[index].offset, nbytes[index])):
        spot = preferred.placements[index]
        if not 0 <= spot.segment < len(preferred.sizes) or spot.offset % ALIGNMENT:
            raise ValueError(f"blob {index} is in no segment, or is not aligned to {ALIGNMENT} bytes")
        if spot.offset < end.get(spot.segment, 0):
            raise ValueError(f"blob {index} overlaps another blob")
        end[spot.segment] = spot.offset + nbytes[index]
        if end[spot.segment] > preferred.sizes[spot.segment]:
            raise ValueError(f"blob {index} exceeds its segment")
    used = {segment: number for number, segment in enumerate(sorted(end))}
    spots = (preferred.placements[index] for index in new)
    return Layout(
        tuple(preferred.sizes[segment] for segment in used),
        tuple(Placement(used[spot.segment], spot.offset) for spot in spots),
    )
