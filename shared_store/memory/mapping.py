"""A segment in this process's address space, at the same address for as long as the mapping lives.

Relies on reference counting: tensors refer to their mapping, so that the range is unmapped and freed when the last of
them is gone. However a mapping ends, :mod:`shared_store.memory.unmapping` first waits until no work uses the device.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from shared_store.memory import unmapping
from shared_store.memory.backend import Access, Backend, Segment
from shared_store.memory.unmapping import Unmapping
from shared_store.runtime.fds import OwnedFd


class Mapping:
    """A reserved range that a segment is mapped into, out of, and into again. A context manager: it closes itself.

    Tensors point into the range and CUDA graphs record its address, so the address never changes.
    """

    def __init__(self, backend: Backend, segment: Segment) -> None:
        """Reserve a range and take ownership of the segment, which is not mapped yet.

        Raises:
            MemoryBackendError: no range is free. The segment is released.
        """
        self._backend = backend
        self._segment: Segment | None = segment
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()
        self.access: Access | None = None
        self.nbytes = segment.nbytes
        self.ordinal = backend.ordinal
        try:
            self.address = backend.reserve(segment.nbytes)
        except BaseException:
            backend.release(segment)
            raise

    def map(self, access: Access) -> None:
        """Map the segment, in place of a mapping with other access rights if there is one.

        Raises:
            MemoryBackendError: the device refuses; or it is mapped otherwise, and a graph is being captured.
        """
        unmapping.unmap_deferred()
        with self._lock:
            if self._closed:
                raise ValueError("the mapping is closed")
            if self._segment is None:
                raise ValueError("the mapping has no segment")
            if self.access is access:
                return
            self._unmap()
            self._backend.map(self._segment, self.address, access)
            self.access = access

    def unmap(self) -> None:
        """Unmap the segment. The address stays reserved, and reading it faults until :meth:`map`.

        Raises:
            MemoryBackendError: a graph is being captured. The segment is still mapped.
        """
        with self._lock:
            self._unmap()

    def release_segment(self) -> None:
        """Unmap and release the segment. The address stays reserved, with no memory behind it. Idempotent.

        Raises:
            MemoryBackendError: a graph is being captured. The segment is still mapped.
        """
        with self._lock:
            self._unmap()
            segment, self._segment = self._segment, None
            if segment is not None:
                self._backend.release(segment)

    def set_segment(self, segment: Segment) -> None:
        """Take ownership of another segment of the same size after :meth:`release_segment`. It is not mapped yet.

        Raises:
            ValueError: the mapping is closed or has a segment, or the sizes differ. The caller still owns the segment.
        """
        with self._lock:
            if self._closed or self._segment is not None or segment.nbytes != self.nbytes:
                raise ValueError("the mapping is closed, has a segment, or is of another size")
            self._segment = segment

    def private_bytes(self) -> int:
        """Count the bytes of this mapping that became private because this process wrote to them."""
        with self._lock:
            return 0 if self.access is not Access.READ else self._backend.private_bytes(self.address, self.nbytes)

    def close(self) -> None:
        """Unmap, free the range and release the segment. Idempotent. No tensor may use the range afterwards.

        While a graph is being captured, all of that happens later.
        """
        self._close(wait=True)

    def _close(self, *, wait: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            mapped, self.access = self.access is not None, None
            segment, self._segment = self._segment, None
            leaving = Unmapping(self._backend, self.address, self.nbytes, mapped, segment, self._pid)
            unmapping.give_back(leaving, wait=wait)

    def _unmap(self) -> None:
        if self.access is not None:
            unmapping.unmap(self._backend, self.address, self.nbytes)
            self.access = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "address") and not sys.is_finalizing():  # the end of the process unmaps everything
            self._close(wait=False)


@contextlib.contextmanager
def map_writable(backend: Backend, fd: OwnedFd, nbytes: int) -> Iterator[int]:
    """Map a segment for writing within a block; yields its address. Closes the descriptor.

    Raises:
        MemoryBackendError: the descriptor is not a segment of this size, or the segment is sealed.
    """
    with fd:
        mapping = Mapping(backend, backend.import_fd(fd.fileno(), nbytes))
    with mapping:
        mapping.map(Access.WRITE)
        yield mapping.address


def close_all(mappings: Iterable[Mapping]) -> None:
    """Close all mappings. An error of one is raised after the others were closed."""
    with contextlib.ExitStack() as closing:
        for mapping in mappings:
            closing.push(mapping)
