"""A compute page: made sealed by the store, mapped by the workload and the arbiter, each of which writes its own words.

Relies on seals of ``memfd_create(2)``: ``F_SEAL_SHRINK`` refuses to cut the file, so neither side can make the other
fault. What a workload writes is not trusted: it can only misrepresent itself.
"""

from __future__ import annotations

from shared_store.runtime.fds import OwnedFd


def make_page() -> OwnedFd:
    """Return the descriptor of a new page. Raises :class:`MemoryBackendError` if the kernel refuses it."""
    raise NotImplementedError


def map_page(fd: OwnedFd) -> memoryview:
    """Map a page; return its words. Closes the descriptor.

    Raises:
        ProtocolError: it is no compute page that stays mapped.
        UnsupportedError: this machine is big-endian.
    """
    raise NotImplementedError
