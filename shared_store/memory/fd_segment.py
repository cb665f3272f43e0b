"""A segment of which this process has the descriptor alone: enough to pass it on, without the device's driver.

A restarted store gets segments of this kind from its keeper, so that it serves a GPU's models before the GPU's driver
has started in it.
"""

from __future__ import annotations

from shared_store.memory.backend import Backend, Segment
from shared_store.memory.descriptors import duplicate
from shared_store.runtime.fds import OwnedFd


class FdSegment(Segment):
    """Memory of any device, behind a descriptor that the segment owns."""

    def __init__(self, fd: OwnedFd, nbytes: int) -> None:
        super().__init__(nbytes)
        self.fd = fd

    def export(self) -> OwnedFd:
        """Export a descriptor of the segment. Raises :class:`MemoryBackendError` without a free descriptor."""
        return duplicate(self.fd.fileno())

    def release(self) -> None:
        """Close the descriptor. Idempotent."""
        self.released = True
        self.fd.close()


def export(backend: Backend, segment: Segment) -> OwnedFd:
    """Export a descriptor of a segment of any kind. Raises :class:`MemoryBackendError`."""
    return segment.export() if isinstance(segment, FdSegment) else backend.export(segment)
