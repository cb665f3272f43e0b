"""One segment, as the state knows it: its place, its size, and who needs it. No memory is touched.

A segment id is a random number of 53 bits (exact in every JSON reader): no two segments have the same id, including
segments of a store before or after this one.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from shared_store.store.state.residency import Residency


@dataclass
class SegmentEntry:
    """A segment that is allocated or promised.

    Attributes:
        writer: token of the publication or compaction that fills it.
        allocated: whether it has memory of its device: False until its writer is ready to fill it, and in lower tiers.
        blobs: digests of the live blobs in it; ``live``: their bytes.
        placed: bytes of all blobs that were ever placed in it. The rest is padding; placed bytes that are not live are
            dead.
        references: owners that need it as a whole: compactions that copy from it; when it is quarantined, the models
            whose readers map it.
        quarantined: it has wrong bytes; none of its blobs is shared any more.
        residency: where its bytes are.
        host: id of its host copy.
        host_of: id of the segment that it is the host copy of.
    """

    id: int
    device: str
    nbytes: int
    writer: str | None
    allocated: bool = False
    blobs: set[bytes] = field(default_factory=set)
    live: int = 0
    placed: int = 0
    references: set[str] = field(default_factory=set)
    quarantined: bool = False
    residency: Residency = Residency.RESIDENT
    host: int | None = None
    host_of: int | None = None

    @property
    def settled(self) -> bool:
        """Whether it is allocated and its contents are committed, and stays so."""
        return self.allocated and self.writer is None and self.residency is Residency.RESIDENT


@dataclass(frozen=True)
class OccupiedSegment:
    """A settled segment. ``owners``: models, publications and compactions that must end before it is released."""

    nbytes: int
    owners: frozenset[str]


def new_id() -> int:
    """Return an id for a segment; see the module."""
    return 1 + secrets.randbelow((1 << 53) - 1)
