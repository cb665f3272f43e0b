"""A backend whose memory can run out and whose calls can fail, on request: for testing what stands on a backend.

The bytes are real (memfds underneath), so everything but the faults behaves as on the host.
"""

from __future__ import annotations

import threading
from collections import Counter

from shared_store.base.errors import MemoryBackendError
from shared_store.memory.backend import Access, Segment
from shared_store.memory.memfd import MemfdBackend, MemfdSegment
from shared_store.runtime.fds import OwnedFd


class Faults:
    """Which calls fail. ``fail_at("create", 2)``: the second ``create`` from now raises."""

    def __init__(self) -> None:
        self._planned: dict[str, set[int]] = {}
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def fail_at(self, call: str, nth: int) -> None:
        """Make the ``nth`` call (1 is the next) of a backend method raise :class:`MemoryBackendError`."""
        with self._lock:
            self._planned.setdefault(call, set()).add(self._calls[call] + nth)

    def passing(self, call: str) -> None:
        """Count a call, and raise if it is one that was to fail."""
        with self._lock:
            self._calls[call] += 1
            if self._calls[call] in self._planned.get(call, ()):
                raise MemoryBackendError(f"{call}: failed as planned (call {self._calls[call]})")


class FakeBackend(MemfdBackend):
    """Host memory with a capacity, a count of what is held, and planned faults.

    Without ``seals`` it can be written after it was published, as a GPU's can.
    """

    def __init__(self, device: str = "fake", capacity: int = 1 << 40, *, seals: bool = True) -> None:
        self.device = device
        self.seals = seals
        self.capacity = capacity
        self.held = 0
        self.faults = Faults()
        self._created: set[int] = set()
        self._lock = threading.Lock()

    def create(self, nbytes: int) -> MemfdSegment:  # noqa: D102 - the interface's
        self.faults.passing("create")
        with self._lock:
            segment = super().create(nbytes)  # refuses what is more than free_bytes()
            self.held += nbytes
            self._created.add(id(segment))
        return segment

    def export(self, segment: Segment) -> OwnedFd:  # noqa: D102 - the interface's
        self.faults.passing("export")
        return super().export(segment)

    def import_fd(self, fd: int, nbytes: int) -> MemfdSegment:  # noqa: D102 - the interface's
        self.faults.passing("import_fd")
        return super().import_fd(fd, nbytes)

    def seal(self, segment: Segment) -> None:  # noqa: D102 - the interface's
        self.faults.passing("seal")
        if self.seals:
            super().seal(segment)

    def map(self, segment: Segment, address: int, access: Access) -> None:  # noqa: D102 - the interface's
        self.faults.passing("map")
        super().map(segment, address, access)

    def release(self, segment: Segment) -> None:  # noqa: D102 - the interface's
        if id(segment) in self._created and not segment.released:
            self._created.discard(id(segment))
            with self._lock:
                self.held -= segment.nbytes
        super().release(segment)

    def free_bytes(self) -> int:  # noqa: D102 - the interface's
        return min(self.capacity - self.held, super().free_bytes())
