"""The interface of memory backends. Every implementation passes the same test suite."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass

from shared_store.runtime.fds import OwnedFd


class Access(enum.Enum):
    """Access rights of a mapping.

    READ is for readers. On a CPU it is private copy-on-write: a write stays in the process that made it. On a GPU it
    is read-only. WRITE is for the publisher, before the segment is sealed, and every mapping sees the writes.
    """

    READ = "read"
    WRITE = "write"


@dataclass(frozen=True)
class Unknown:
    """A number that this process cannot find out, and why. Never 0: callers do without the number, and say so."""

    reason: str

    def __str__(self) -> str:
        return f"unknown ({self.reason})"


class Segment:
    """One physical allocation that this process references. Backends add their own fields."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.released = False


class Backend(ABC):
    """Physical memory of one device, and this process's address space for it. All methods are thread-safe."""

    device: str
    """``cpu``, or a GPU's UUID."""

    ordinal: int | None = None
    """A GPU's number in this process. Numbers differ between processes, so they are never sent."""

    host_readable: bool
    """True if the host can read mapped memory, so that the store itself can verify published bytes."""

    asynchronous: bool = False
    """True if work may use mapped memory after the call that started it has returned, as kernels of a GPU do. Such
    memory is unmapped by :mod:`shared_store.memory.unmapping` only, and processes map it one at a time."""

    zeroed: bool
    """True if memory is zero when it is allocated. Otherwise it may have any bytes."""

    granularity: int
    """Segment sizes, reservations and their addresses are multiples of this number of bytes."""

    @abstractmethod
    def create(self, nbytes: int) -> Segment:
        """Allocate physical memory, zeroed or not.

        Raises:
            OutOfMemoryError: the device has too little free memory. The message has the bytes requested and free.
        """

    def create_private(self, nbytes: int) -> Segment:
        """Allocate physical memory that is never exported, as :meth:`create` does."""
        return self.create(nbytes)

    @abstractmethod
    def export(self, segment: Segment) -> OwnedFd:
        """Export a descriptor of the segment, close-on-exec and valid in any process.

        Raises:
            MemoryBackendError: this process has no free descriptor, or the driver refuses.
        """

    def export_writable(self, segment: Segment) -> OwnedFd:
        """Export a descriptor to the process that fills the segment. Raises as :meth:`export` does."""
        return self.export(segment)

    @abstractmethod
    def import_fd(self, fd: int, nbytes: int) -> Segment:
        """Import a segment from a descriptor. The descriptor is borrowed: the segment duplicates it.

        Raises:
            MemoryBackendError: the descriptor is not a segment of this backend, or the segment is smaller than
                ``nbytes``. Where only mapping can find that out, :meth:`map` raises it.
        """

    @abstractmethod
    def seal(self, segment: Segment) -> None:
        """Make the bytes immutable for every process, if the device can.

        Raises:
            MemoryBackendError: a process still maps the segment for writing.
        """

    @abstractmethod
    def sealed(self, segment: Segment) -> bool:
        """True if :meth:`seal` would change nothing."""

    @abstractmethod
    def reserve(self, nbytes: int) -> int:
        """Reserve an address range of this process, which faults until it is mapped. Returns its first address."""

    @abstractmethod
    def unreserve(self, address: int, nbytes: int) -> None:
        """Free a reserved range, which must not be mapped."""

    @abstractmethod
    def map(self, segment: Segment, address: int, access: Access) -> None:
        """Map the whole segment at the start of a reserved range that is not mapped."""

    @abstractmethod
    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap a range, which stays reserved. Nothing may be using it: :meth:`settle` comes first."""

    def settle(self) -> bool:
        """Wait until no work that this process started uses the device.

        Returns:
            True when nothing is in flight. False, at once, if waiting is not allowed now: a graph is being captured.
        """
        return True

    @abstractmethod
    def release(self, segment: Segment) -> None:
        """Drop this process's reference to the memory. Mappings and other processes keep theirs. Idempotent."""

    @abstractmethod
    def private_bytes(self, address: int, nbytes: int) -> int:
        """Count the bytes of a mapped range that this process wrote to and therefore has private copies of."""

    @abstractmethod
    def free_bytes(self) -> int | Unknown:
        """Estimate the bytes that could be allocated now."""

    def total_bytes(self) -> int | Unknown:
        """Return the device's whole memory, whoever uses it."""
        return Unknown("this backend does not tell it")
