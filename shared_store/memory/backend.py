"""What a memory backend does. Every implementation passes one and the same test-suite."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod

from shared_store.runtime.fds import OwnedFd


class Access(enum.Enum):
    """What a mapping lets this process do.

    READ is for readers. On a CPU it is private copy-on-write: a write stays in the process that made it. On a GPU it
    is read-only. WRITE is for the one publisher, before the segment is sealed; all see what it writes.
    """

    READ = "read"
    WRITE = "write"


class Segment:
    """One physical allocation, held by this process. Backends subclass it with what they need."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.released = False


class Backend(ABC):
    """Physical memory of one device, and this process's address space for it. Methods may be called from any thread."""

    device: str
    """``cpu``, or a GPU's UUID."""

    ordinal: int | None = None
    """The device's number in this process, for a GPU; numbers differ between processes, so they are never passed on."""

    host_readable: bool
    """Whether the host can read mapped memory, so that the store itself can check what was published."""

    granularity: int
    """Segment sizes, reservations and their addresses are multiples of this many bytes."""

    @abstractmethod
    def create(self, nbytes: int) -> Segment:
        """Allocate physical memory, zeroed or not.

        Raises:
            OutOfMemoryError: there is no room; the message has bytes asked for and bytes free.
        """

    @abstractmethod
    def export(self, segment: Segment) -> OwnedFd:
        """Export a descriptor of the segment, valid in any process.

        Raises:
            MemoryBackendError: this process has no free descriptor, or the driver refuses.
        """

    @abstractmethod
    def import_fd(self, fd: int, nbytes: int) -> Segment:
        """Import a segment from a descriptor, which is borrowed: the segment duplicates it.

        Raises:
            MemoryBackendError: the descriptor is not a segment of this backend, or the segment is smaller than
                ``nbytes``. Where only mapping can find that out, :meth:`map` raises it.
        """

    @abstractmethod
    def seal(self, segment: Segment) -> None:
        """Make the bytes immutable for every process, where the device can.

        Raises:
            MemoryBackendError: somebody still maps it for writing.
        """

    @abstractmethod
    def sealed(self, segment: Segment) -> bool:
        """Whether all that :meth:`seal` would do has been done."""

    @abstractmethod
    def reserve(self, nbytes: int) -> int:
        """An address range of this process that nothing else will use, and that faults until it is mapped."""

    @abstractmethod
    def unreserve(self, address: int, nbytes: int) -> None:
        """Give a range back. It must not be mapped."""

    @abstractmethod
    def map(self, segment: Segment, address: int, access: Access) -> None:
        """Map the whole segment at the start of a reserved range, in place of what was mapped there."""

    @abstractmethod
    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap a range; it stays reserved."""

    @abstractmethod
    def release(self, segment: Segment) -> None:
        """Let go of this process's hold on the memory. Mappings and other processes keep theirs. Idempotent."""

    @abstractmethod
    def private_bytes(self, address: int, nbytes: int) -> int:
        """Bytes in a mapped range that this process has written to and so holds a private copy of."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes that could be allocated now; an estimate."""
