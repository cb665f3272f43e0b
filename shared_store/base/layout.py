"""Where blobs lie in segments: a pure function.

Few, large segments make mapping a model a handful of calls. But a segment is allocated whole before the first of its
originals is freed, so one that is small beside its model keeps the peak of publishing near the model's size. 512-byte
alignment satisfies every vector load and copy engine; segment sizes are multiples of 2 MiB because that is the
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
"""Segments that a model is divided into between the two targets: publishing it takes an eighth more than it has."""


@dataclass(frozen=True)
class Placement:
    """Where one blob lies: the index of its segment in the layout, and its first byte there."""

    segment: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """``sizes``: bytes of each segment; ``placements``: one for each blob, in the order they were given."""

    sizes: tuple[int, ...]
    placements: tuple[Placement, ...]


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


def target_for(nbytes: int) -> int:
    """Bytes after which a new segment begins, for blobs of so many bytes together."""
    return min(max(nbytes // PARTS, LEAST_TARGET), TARGET)


def pack(sizes: Sequence[int], *, target: int | None = None) -> Layout:
    """Lay blobs out in their given order, which is the order in which they will be copied and freed.

    Args:
        sizes: bytes of each blob, zero allowed.
        target: bytes after which a new segment begins; by default :func:`target_for` them all. A blob larger than that
            gets a segment of its own size.

    Returns:
        Offsets are multiples of :data:`ALIGNMENT`, segment sizes of :data:`GRANULARITY`; blobs do not overlap.
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


def as_wished(wish: Layout, nbytes: Sequence[int], new: Sequence[int]) -> Layout:
    """The wished layout, of those segments that get something new.

    Args:
        wish: a place for each blob: somebody has addresses for them there.
        nbytes: bytes of each blob.
        new: indexes of the blobs that need a place; the others have one elsewhere.

    Returns:
        Placements for the new blobs, in the order of ``new``.

    Raises:
        ValueError: it cannot be: blobs overlap or reach out of their segment, or a segment has no possible size.
    """
    if len(wish.placements) != len(nbytes) or any(size <= 0 or size % GRANULARITY for size in wish.sizes):
        raise ValueError("places for other blobs, or segments of impossible sizes")
    end: dict[int, int] = {}
    for index in sorted(new, key=lambda index: (wish.placements[index].offset, nbytes[index])):
        spot = wish.placements[index]
        if not 0 <= spot.segment < len(wish.sizes) or spot.offset % ALIGNMENT or spot.offset < end.get(spot.segment, 0):
            raise ValueError(f"blob {index} lies on another, or in no segment")
        end[spot.segment] = spot.offset + nbytes[index]
        if end[spot.segment] > wish.sizes[spot.segment]:
            raise ValueError(f"blob {index} reaches out of its segment")
    kept = {segment: number for number, segment in enumerate(sorted(end))}
    spots = (wish.placements[index] for index in new)
    return Layout(
        tuple(wish.sizes[segment] for segment in kept),
        tuple(Placement(kept[spot.segment], spot.offset) for spot in spots),
    )
