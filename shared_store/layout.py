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
