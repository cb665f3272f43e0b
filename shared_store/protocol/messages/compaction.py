"""Messages with which a client compacts a device whose memory the store cannot read."""

from __future__ import annotations

import msgspec

from shared_store.protocol.messages.envelope import Reply, Request
from shared_store.protocol.messages.segments import SegmentInfo


class Compact(Request, frozen=True, tag="compact"):
    """Offer to copy blobs on a device. Answered by :class:`Compacting`; by :class:`Done` if it would free nothing."""

    device: str


class Move(msgspec.Struct, frozen=True, array_like=True):
    """A blob to copy: index of its segment in ``sources``, offset there, offset in the target, length (bytes)."""

    source: int
    start: int
    offset: int
    nbytes: int
    digest: bytes


class Compacting(Reply, frozen=True, tag="compacting"):
    """Copies to make. Carries the fd of ``target``, to be mapped for writing, then the fds of ``sources``."""

    target: SegmentInfo
    sources: tuple[SegmentInfo, ...]
    moves: tuple[Move, ...]


class Compacted(Request, frozen=True, tag="compacted"):
    """All copies into this segment (by id) are made; it is not mapped for writing. Answered by :class:`Switched`."""

    segment: int


class AbandonCompaction(Request, frozen=True, tag="abandon_compaction"):
    """End the compaction into this segment (by id) without a change. Answered by :class:`Done`."""

    segment: int


class Switched(Reply, frozen=True, tag="switched"):
    """Blobs are served from their copies. Both numbers are 0 if too many segments got readers in the meantime."""

    moved_bytes: int
    freed_bytes: int
