"""A segment in this process's address space, at one address for as long as it lives."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Self

from shared_store.memory.backend import Access, Backend, Segment


class Mapping:
    """A reserved range that a segment is mapped into, out of, and into again, always at the same address.

    Tensors point into the range, and CUDA graphs hold its address, so the address never changes. The range is given
    back when the last object that refers to this one is gone, or by :meth:`close`.
    """

    def __init__(self, backend: Backend, segment: Segment) -> None:
        """Reserve a range for the segment, which this mapping then owns and releases; nothing is mapped yet."""
        self._backend = backend
        self._segment: Segment | None = segment
        self._lock = threading.Lock()
        self._closed = False
        self.access: Access | None = None
        self.nbytes = segment.nbytes
        self.ordinal = backend.ordinal
        self.address = backend.reserve(segment.nbytes)

    def map(self, access: Access) -> None:
        """Map the segment, in place of a mapping with another access if there is one."""
        with self._lock:
            if self._closed:
                raise ValueError("the mapping is closed")
            if self._segment is None:
                raise ValueError("the mapping has let its segment go")
            if self.access is access:
                return
            if self.access is not None:
                self._backend.unmap(self.address, self.nbytes)
                self.access = None
            self._backend.map(self._segment, self.address, access)
            self.access = access

    def unmap(self) -> None:
        """Unmap the segment; the address stays reserved, and reading it faults until :meth:`map`."""
        with self._lock:
            if self.access is not None:
                self._backend.unmap(self.address, self.nbytes)
                self.access = None

    def let_go(self) -> None:
        """Unmap and release the segment: the address stays reserved, and no memory is behind it. Idempotent."""
        with self._lock:
            if self.access is not None:
                self._backend.unmap(self.address, self.nbytes)
                self.access = None
            segment, self._segment = self._segment, None
            if segment is not None:
                self._backend.release(segment)

    def take(self, segment: Segment) -> None:
        """Own a segment of the same size in place of one that was let go; nothing is mapped yet."""
        with self._lock:
            if self._closed or self._segment is not None or segment.nbytes != self.nbytes:
                raise ValueError("the mapping is closed, has a segment, or is of another size")
            self._segment = segment

    def private_bytes(self) -> int:
        """Bytes of this mapping that went private because this process wrote to them."""
        with self._lock:
            return 0 if self.access is not Access.READ else self._backend.private_bytes(self.address, self.nbytes)

    def close(self) -> None:
        """Unmap, release the segment and give the range back. Idempotent; no tensor may use it any more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self.access is not None:
                self._backend.unmap(self.address, self.nbytes)
                self.access = None
            self._backend.unreserve(self.address, self.nbytes)
            if self._segment is not None:
                self._backend.release(self._segment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "address") and not sys.is_finalizing():  # the process's end unmaps everything anyway
            self.close()
