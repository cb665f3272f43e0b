"""A backend with a capacity, planned faults and work in flight, for tests of the code above it.

The bytes are real: the segments are memfds, so everything but the faults behaves as host memory does. Work in flight is
real, too: threads that use mapped memory, and fault if it is unmapped meanwhile.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from shared_store.base.errors import MemoryBackendError
from shared_store.memory.backend import Access, Segment
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

    def passing(self, call: str) -> None:
        """Count a call. Raises :class:`MemoryBackendError` if it is planned to fail."""
        with self._lock:
            self._calls[call] += 1
            if self._calls[call] in self._planned.get(call, ()):
                raise MemoryBackendError(f"{call}: failed as planned (call {self._calls[call]})")


class FakeBackend(MemfdBackend):
    """Host memory with a capacity, a count of allocated bytes, and planned faults.

    Without ``seals``, published memory can still be written, as a GPU's can.
    """

    def __init__(self, device: str = "fake", capacity: int = 1 << 40, *, seals: bool = True) -> None:
        self.device = device
        self.seals = seals
        self.capacity = capacity
        self.allocated_bytes = 0
        self.faults = Faults()
        self.capturing = False
        self.calls: list[str] = []
        """Names of the calls of :meth:`settle`, :meth:`unmap` and :meth:`release`, in order."""
        self._created: set[int] = set()
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

    def create(self, nbytes: int) -> MemfdSegment:  # noqa: D102 - documented by the interface
        self.faults.passing("create")
        with self._lock:
            segment = super().create(nbytes)  # refuses more than is available
            self.allocated_bytes += nbytes
            self._created.add(id(segment))
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
        if id(segment) in self._created and not segment.released:
            self._created.discard(id(segment))
            with self._lock:
                self.allocated_bytes -= segment.nbytes
        super().release(segment)

    def _available(self) -> int:
        """Return the bytes left of the capacity, and of host memory."""
        return min(self.capacity - self.allocated_bytes, super()._available())
