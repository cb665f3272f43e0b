"""A segment that is held by its fd alone: enough to hand it on, and it needs no driver.

What a restarted store gets from its keeper is of this kind, so that it serves a GPU's models before the GPU's driver
has started in it.
"""

from __future__ import annotations

import os

from shared_store.memory.backend import Backend, Segment
from shared_store.memory.memfd import duplicate


class KeptSegment(Segment):
    """Some device's memory, behind an fd."""

    def __init__(self, fd: int, nbytes: int) -> None:
        """Take over the fd."""
        super().__init__(nbytes)
        self.fd = fd

    def export(self) -> int:
        """A new fd, close-on-exec, that stands for the segment. The caller closes it."""
        return duplicate(self.fd)

    def release(self) -> None:
        """Let go of it. Idempotent."""
        if not self.released:
            self.released = True
            os.close(self.fd)


def export(backend: Backend, segment: Segment) -> int:
    """A new fd of a segment that the store holds, however it came by it; the caller's."""
    return segment.export() if isinstance(segment, KeptSegment) else backend.export(segment)
