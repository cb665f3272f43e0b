"""Memory of one process that releases its pages and returns at the same addresses.

Tensors and captured CUDA graphs have addresses in a range, so that its addresses stay reserved for as long as it lives.
Away, it has no memory; contents are the caller's to save and restore. Memory that returned is zero where the backend
says so (:attr:`~shared_store.memory.Backend.zeroed`), and undefined elsewhere.

All ranges of a device return together or not at all. They return in two steps: first the memory is allocated, which is
what can fail, then it is mapped, which is short and may be done in turn with other processes.

Relies on a mapping keeping its memory: descriptors and handles are released once it is mapped. Ranges are mapped in
parts, because a driver unmaps whole mappings only, and because huge allocations fail sooner than several large ones.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Final

from shared_store.base.layout import round_up
from shared_store.memory import Access, Backend, Segment
from shared_store.memory import unmapping as unmappings
from shared_store.memory.unmapping import Unmapping

PART_BYTES: Final = 256 << 20
"""Most bytes of one mapping."""

Phase = Callable[[], contextlib.AbstractContextManager[None]]
"""Makes a context in which memory may be mapped or unmapped, see :mod:`shared_store.client.mapping_phase`."""


class Range:
    """Addresses with memory of this process behind them, or without. Freed when nothing refers to it any more.

    Attributes:
        address: its first byte.
        nbytes: its size, a multiple of the backend's granularity.
        ordinal: a GPU's number in this process; None for host memory.
    """

    def __init__(self, backend: Backend, nbytes: int, part_bytes: int) -> None:
        """Reserve addresses. No memory is behind them yet."""
        self._backend = backend
        self._pid = os.getpid()
        self._part_bytes = part_bytes
        self._segments: list[Segment] = []
        self._mapped: list[tuple[int, int]] = []
        self.ordinal = backend.ordinal
        self.nbytes = nbytes
        self.address = backend.reserve(nbytes)

    @property
    def mapped(self) -> bool:
        """True if all of it has memory."""
        return sum(nbytes for _, nbytes in self._mapped) == self.nbytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes that have memory."""
        return sum(nbytes for _, nbytes in self._mapped)

    def create(self) -> None:
        """Allocate memory for all of it, which :meth:`map` maps. Raises :class:`OutOfMemoryError`."""
        created = sum(segment.nbytes for segment in self._segments) + self.mapped_bytes
        while created < self.nbytes:
            segment = self._backend.create_private(min(self._part_bytes, self.nbytes - created))
            self._segments.append(segment)
            created += segment.nbytes

    def map(self) -> None:
        """Map what was created. Raises :class:`MemoryBackendError`."""
        while self._segments:
            segment = self._segments[0]
            address = self.address + self.mapped_bytes
            self._backend.map(segment, address, Access.WRITE)
            self._mapped.append((address, segment.nbytes))
            self._backend.release(self._segments.pop(0))

    def release(self) -> None:
        """Drop memory that is created and not mapped."""
        while self._segments:
            self._backend.release(self._segments.pop())

    def unmap(self) -> None:
        """Unmap everything, and so free it. The device has been waited for."""
        while self._mapped:
            self._backend.unmap(*self._mapped[-1])
            self._mapped.pop()

    def __del__(self) -> None:
        if not hasattr(self, "address") or sys.is_finalizing():  # the end of the process unmaps everything
            return
        self.release()
        leaving = Unmapping(
            self._backend, self.address, self.nbytes, bool(self._mapped), None, self._pid, tuple(self._mapped)
        )
        unmappings.give_back(leaving, wait=False)


class PrivateMemory:
    """The ranges of one device. Thread-safe: concurrent calls run one at a time."""

    def __init__(self, backend: Backend, phase: Phase = contextlib.nullcontext, part_bytes: int = PART_BYTES) -> None:
        """Begin without a range.

        Args:
            backend: of the device.
            phase: wraps mapping and unmapping.
            part_bytes: most bytes of one mapping, a multiple of the backend's granularity.
        """
        self.backend = backend
        self.away = False
        """True between :meth:`go_away` and :meth:`come_back`."""
        self._phase = phase
        self._part_bytes = part_bytes
        self._ranges: weakref.WeakSet[Range] = weakref.WeakSet()
        self._lock = threading.RLock()

    def allocate(self, nbytes: int) -> Range:
        """Return a new range with memory, of at least ``nbytes`` bytes.

        Raises:
            OutOfMemoryError: the device has too little memory.
            MemoryBackendError: the device refuses.
        """
        with self._lock:
            made = Range(self.backend, round_up(nbytes, self.backend.granularity), self._part_bytes)
            made.create()
            with self._phase():
                made.map()
            self._ranges.add(made)
            return made

    @property
    def nbytes(self) -> int:
        """Bytes of all ranges, mapped or not."""
        return sum(it.nbytes for it in self._all())

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the device that the ranges have now."""
        return sum(it.mapped_bytes for it in self._all())

    def go_away(self) -> None:
        """Wait for the device, and unmap every range. Contents are lost. Idempotent.

        Raises:
            MemoryBackendError: a graph is being captured, or the device refuses. Some memory may be gone:
                :meth:`come_back` maps it again.
        """
        with self._lock, self._phase(), unmappings.settled(self.backend):
            self.away = True
            for it in self._all():
                it.unmap()

    def come_back(self) -> None:
        """Give every range memory again. Idempotent.

        Raises:
            OutOfMemoryError: the device has too little memory.
            MemoryBackendError: the device refuses.

        After an error no range has memory that it did not have before.
        """
        with self._lock:
            missing = [it for it in self._all() if not it.mapped]
            with self._undone(missing):
                for it in missing:
                    it.create()
                with self._phase():
                    for it in missing:
                        it.map()
            self.away = False

    @contextlib.contextmanager
    def _undone(self, ranges: list[Range]) -> Iterator[None]:
        """Release and unmap ranges again if the block fails."""
        try:
            yield
        except BaseException:
            for it in ranges:
                it.release()
            if any(it.mapped_bytes for it in ranges):
                with self._phase(), unmappings.settled(self.backend):
                    for it in ranges:
                        it.unmap()
            raise

    def _all(self) -> list[Range]:
        return sorted(self._ranges, key=lambda it: it.address)
