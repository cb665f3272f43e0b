"""A device with a capacity, planned faults and work in flight, for tests of the code above it.

The bytes are real: the segments are memfds, so everything but the faults behaves as host memory does. As on a GPU, a
segment uses memory until the last descriptor and the last mapping of it in any process are gone, and not only until its
creator has released it: each segment's open file description has a lock, which the kernel removes with the description.

Relies on: locks of open file descriptions, which ``/proc/locks`` lists with their byte ranges, whichever process set
them (see ``fcntl(2)``, ``proc_locks(5)``). The first byte of a range is the device's :attr:`FakeBackend.tag`, its
length the size of the segment.

Work in flight is real, too: threads that use mapped memory, and fault if it is unmapped meanwhile.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from shared_store.base.errors import MemoryBackendError
from shared_store.memory.backend import Access, Segment, Unknown
from shared_store.memory.memfd import MemfdBackend, MemfdSegment
from shared_store.runtime.fds import OwnedFd


class Faults:
    """Calls that fail. After ``fail_at("create", 2)`` the second ``create`` from now raises."""

    def __init__(self) -> None:
        self._planned: dict[str, set[int]] = {}
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def fail_at(self, call: str, nth: int) -> None:
        """Make the ``nth`` call (1 is the next) of a backend method raise :class:`MemoryBackendError`."""
        with self._lock:
            self._planned.setdefault(call, set()).add(self._calls[call] + nth)

    def clear(self) -> None:
        """Forget the faults that were planned and have not happened."""
        with self._lock:
            self._planned.clear()

    def passing(self, call: str) -> None:
        """Count a call. Raises :class:`MemoryBackendError` if it is planned to fail."""
        with self._lock:
            self._calls[call] += 1
            if self._calls[call] in self._planned.get(call, ()):
                raise MemoryBackendError(f"{call}: failed as planned (call {self._calls[call]})")


class FakeBackend(MemfdBackend):
    """Host memory with a capacity, a count of allocated bytes, and planned faults.

    Args:
        device: its name.
        capacity: bytes of its memory.
        seals: without them, published memory can still be written, as a GPU's can.
        tag: identifies the device's memory; processes that pass the same one share a device. Default: a new device.
        zeroed: without it, memory is full of ones when it is allocated.
    """

    def __init__(
        self,
        device: str = "fake",
        capacity: int = 1 << 40,
        *,
        seals: bool = True,
        tag: int | None = None,
        zeroed: bool = True,
    ) -> None:
        self.device = device
        self.zeroed = zeroed
        self.seals = seals
        self.capacity = capacity
        self.tag = 1 + secrets.randbelow(1 << 61) if tag is None else tag
        self.faults = Faults()
        self.capturing = False
        self.calls: list[str] = []
        """Names of the calls of :meth:`settle`, :meth:`unmap` and :meth:`release`, in order."""
        self._lock = threading.Lock()
        self._in_flight: list[threading.Thread] = []

    def launch(self, work: Callable[[], None]) -> None:
        """Start work that uses mapped memory, as a kernel does. :meth:`settle` waits for it."""
        thread = threading.Thread(target=work, name="wooly-fake-work", daemon=True)
        self.asynchronous = True
        self._in_flight.append(thread)
        thread.start()

    def settle(self) -> bool:
        """Wait for the work in flight; False at once while ``capturing`` is True."""
        if self.capturing:
            return False
        self.calls.append("settle")
        while self._in_flight:
            self._in_flight[0].join()
            self._in_flight.pop(0)
        return True

    @property
    def allocated_bytes(self) -> int:
        """Bytes of segments that some process still has a descriptor or a mapping of."""
        total = 0
        with Path("/proc/locks").open(encoding="ascii") as lines:
            for line in lines:
                fields = line.split()
                if fields[1] == "OFDLCK" and fields[-2] == str(self.tag):
                    total += int(fields[-1]) + 1 - self.tag
        return total

    def _allocate(self, nbytes: int, name: str) -> MemfdSegment:
        self.faults.passing("create")
        with self._lock:
            segment = super()._allocate(nbytes, name)  # refuses more than is available
            lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, self.tag, nbytes, 0)  # a struct flock
            fcntl.fcntl(segment.fd.fileno(), fcntl.F_OFD_SETLK, lock)
        if not self.zeroed:
            with mmap.mmap(segment.fd.fileno(), nbytes) as memory:
                memory.write(b"\xff" * nbytes)
        return segment

    def export(self, segment: Segment) -> OwnedFd:  # noqa: D102 - documented by the interface
        self.faults.passing("export")
        return super().export(segment)

    def import_fd(self, fd: int, nbytes: int) -> MemfdSegment:  # noqa: D102 - documented by the interface
        self.faults.passing("import_fd")
        return super().import_fd(fd, nbytes)

    def seal(self, segment: Segment) -> None:  # noqa: D102 - documented by the interface
        self.faults.passing("seal")
        if self.seals:
            super().seal(segment)

    def map(self, segment: Segment, address: int, access: Access) -> None:  # noqa: D102 - documented by the interface
        self.faults.passing("map")
        super().map(segment, address, access)

    def unmap(self, address: int, nbytes: int) -> None:  # noqa: D102 - documented by the interface
        self.faults.passing("unmap")
        self.calls.append("unmap")
        super().unmap(address, nbytes)

    def release(self, segment: Segment) -> None:  # noqa: D102 - documented by the interface
        if not segment.released:
            self.calls.append("release")
        super().release(segment)

    def total_bytes(self) -> int | Unknown:
        """Return the capacity, or host memory if that is less."""
        total = super().total_bytes()
        return total if isinstance(total, Unknown) else min(self.capacity, total)

    def _available(self) -> int:
        """Return the bytes left of the capacity, and of host memory."""
        return min(self.capacity - self.allocated_bytes, super()._available())
