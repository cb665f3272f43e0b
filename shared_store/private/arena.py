"""Host memory for the copies of one process, reused from swap to swap.

Memory that a GPU copies to and from is pinned: registered with its driver, which takes about 0.1 s a GiB and is done
when the arena grows, so that a swap finds it ready. Excluded from core dumps (``MADV_DONTDUMP``): copies are prompts
and answers of users.

Relies on ``mmap(2)`` and ``madvise(2)``. A registration fails where ``RLIMIT_MEMLOCK`` or a driver refuses; copies are
slower then, and right.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from typing import Final, Protocol, TypeAlias

from shared_store.base.errors import OutOfMemoryError, WoolyError
from shared_store.base.layout import round_up
from shared_store.memory.cgroup import group_free, machine_free

log = logging.getLogger(__name__)

EXTENT_BYTES: Final = 256 << 20
"""An arena grows by multiples of this."""

HEADROOM: Final = 512 << 20
"""Host memory that is never used for copies: the last page invokes the kernel's OOM killer instead of an error."""

_ALIGNMENT: Final = 4096

Position: TypeAlias = tuple[int, int]
"""Index of an extent, and offset in it."""


class Pinning(Protocol):
    """Registers host memory with a device, which copies faster then."""

    def register(self, address: int, nbytes: int) -> None:
        """Register memory. Raises :class:`WoolyError` if the driver refuses."""

    def unregister(self, address: int) -> None:
        """Undo :meth:`register`."""


def host_room() -> int:
    """Return the bytes that copies could use now, in this process's control groups too."""
    return max(0, min(machine_free(), group_free()) - HEADROOM)


class _Extent:
    """One mapping of anonymous memory."""

    def __init__(self, nbytes: int, pinning: Pinning | None) -> None:
        self._memory = mmap.mmap(-1, nbytes)
        self._memory.madvise(mmap.MADV_DONTDUMP)
        self._memory.madvise(mmap.MADV_DONTFORK)
        self.nbytes = nbytes
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._pinning = pinning
        self._pinned = False
        self.pin()

    def pin(self) -> None:
        if self._pinning is None or self._pinned:
            return
        try:
            self._pinning.register(self._address, self.nbytes)
            self._pinned = True
        except WoolyError as error:
            log.info("wooly: copies use memory that is not pinned: %s", error)

    def unpin(self) -> None:
        if self._pinning is not None and self._pinned:
            self._pinning.unregister(self._address)
            self._pinned = False

    def part(self, offset: int, nbytes: int) -> memoryview:
        # Not a slice of the map, which could not be closed while somebody has one.
        return memoryview((ctypes.c_char * nbytes).from_address(self._address + offset)).cast("B")

    def close(self) -> None:
        self.unpin()
        self._memory.close()


class Arena:
    """Grows by extents, and gives out buffers from the first to the last. Not thread-safe."""

    def __init__(self, pinning: Pinning | None = None, extent_bytes: int = EXTENT_BYTES) -> None:
        """Begin without memory. ``pinning``: registers it with a device."""
        self._pinning = pinning
        self._extent_bytes = extent_bytes
        self._extents: list[_Extent] = []

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it has."""
        return sum(extent.nbytes for extent in self._extents)

    def grow(self, nbytes: int) -> None:
        """Have at least ``nbytes`` bytes.

        Raises:
            OutOfMemoryError: the host, or this process's control group, has too little memory. It has not grown.
        """
        more = round_up(nbytes - self.nbytes, self._extent_bytes)
        if more <= 0:
            return
        room = host_room()
        if more > room:
            raise OutOfMemoryError(
                f"copies of {nbytes} bytes do not fit into host memory: {room} bytes are free; free host memory, raise "
                "the memory limit of this container, or set WOOLY_SWAP_DIR"
            )
        made: list[_Extent] = []
        try:
            while more:
                size = min(more, max(self._extent_bytes, 1 << 30))
                made.append(_Extent(size, self._pinning))
                more -= size
        except OSError as error:
            for extent in made:
                extent.close()
            raise OutOfMemoryError(f"cannot allocate {nbytes} bytes for copies: {error.strerror}") from error
        self._extents += made

    def shrink(self, nbytes: int) -> None:
        """Free extents that ``nbytes`` bytes do not need. No buffer of them may be in use."""
        while self._extents and self.nbytes - self._extents[-1].nbytes >= nbytes:
            self._extents.pop().close()

    def pin(self) -> None:
        """Register memory that is not registered, as far as the driver allows."""
        for extent in self._extents:
            extent.pin()

    def unpin(self) -> None:
        """Unregister everything; the bytes stay. A driver's checkpoint does not save registrations.

        Raises:
            MemoryBackendError: the driver refuses.
        """
        for extent in self._extents:
            extent.unpin()

    def part(self, nbytes: int, start: Position) -> tuple[memoryview, Position]:
        """Return a buffer at or after a position, and the position after it. The arena grows if it ends before.

        A buffer lies in one extent. The rest of an extent that is too small for it is left out.

        Raises:
            OutOfMemoryError: as :meth:`grow`.
        """
        index, offset = start
        while True:
            if index == len(self._extents):
                self.grow(self.nbytes + nbytes)
            if offset + nbytes <= self._extents[index].nbytes:
                return self._extents[index].part(offset, nbytes), (index, round_up(offset + nbytes, _ALIGNMENT))
            index, offset = index + 1, 0

    def close(self) -> None:
        """Free everything. No buffer may be in use."""
        self.shrink(0)
