"""Copies of a device's memory, by addresses of this process: one interface, one class for each kind of device.

A :class:`Transfer` copies within the device. A :class:`Lane` of it copies between the device and host buffers, one lane
for each thread. Addresses must be mapped, and are not checked. If a copy fails, the target's bytes are undefined.
"""

from __future__ import annotations

import contextlib
import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from shared_store.memory.backend import Access
from shared_store.memory.mapping import Mapping

BUFFER_BYTES: Final = 4 << 20
"""Most bytes that one copy of a lane may have: the size of a pinned buffer on a GPU."""


class Lane(ABC):
    """Copies of one thread between the device and the host, each of at most :data:`BUFFER_BYTES`."""

    @abstractmethod
    def copy_in(self, address: int, nbytes: int, fill: Callable[[memoryview], None]) -> None:
        """Copy to a device address. ``fill`` writes the bytes into the buffer that it is given.

        The copy may still be in flight on return.
        """

    @abstractmethod
    def copy_out(self, address: int, nbytes: int, take: Callable[[memoryview], None]) -> None:
        """Copy from a device address. ``take`` reads the bytes from the buffer that it is given."""

    @abstractmethod
    def settle(self) -> None:
        """Wait for this lane's copies."""


class Transfer(ABC):
    """Copies of one device's memory. Callers close it."""

    @abstractmethod
    def current(self) -> contextlib.AbstractContextManager[None]:
        """Within the block, the calling thread may map the device's memory and call :meth:`copy`."""

    @abstractmethod
    def lane(self) -> contextlib.AbstractContextManager[Lane]:
        """Open a lane for the calling thread. A block that ends without an error has waited for the lane's copies."""

    @abstractmethod
    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between addresses of the device. The copy may still be in flight on return."""

    @abstractmethod
    def settle(self) -> None:
        """Wait for all work on the device that this process started, copies included."""

    @abstractmethod
    def close(self) -> None:
        """Free what the transfer uses. Idempotent. No lane may be open."""


class HostTransfer(Transfer):
    """Host memory. Nothing is ever in flight, and a lane's buffer is the memory itself."""

    def current(self) -> contextlib.AbstractContextManager[None]:  # noqa: D102 - documented by the interface
        return contextlib.nullcontext()

    def lane(self) -> contextlib.AbstractContextManager[Lane]:  # noqa: D102 - documented by the interface
        return contextlib.nullcontext(_HostLane())

    def copy(self, target: int, source: int, nbytes: int) -> None:  # noqa: D102 - documented by the interface
        ctypes.memmove(target, source, nbytes)

    def settle(self) -> None:  # noqa: D102 - documented by the interface
        return

    def close(self) -> None:  # noqa: D102 - documented by the interface
        return


class _HostLane(Lane):
    def copy_in(self, address: int, nbytes: int, fill: Callable[[memoryview], None]) -> None:
        fill(_memory(address, nbytes))

    def copy_out(self, address: int, nbytes: int, take: Callable[[memoryview], None]) -> None:
        take(_memory(address, nbytes))

    def settle(self) -> None:
        return


def _memory(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


@dataclass(frozen=True)
class Copy:
    """Bytes to copy between mappings.

    Attributes:
        source: index of the source mapping.
        start: first byte in the source.
        offset: first byte in the target.
        nbytes: number of bytes.
    """

    source: int
    start: int
    offset: int
    nbytes: int


def copy_blobs(transfer: Transfer, sources: Sequence[Mapping], target: Mapping, copies: Iterable[Copy]) -> None:
    """Map the sources for reading and the target for writing, and copy. They stay mapped.

    Copies may still be in flight on return: see :meth:`Transfer.settle`.
    """
    target.map(Access.WRITE)
    for mapping in sources:
        mapping.map(Access.READ)
    for one in copies:
        transfer.copy(target.address + one.offset, sources[one.source].address + one.start, one.nbytes)
