"""Host copies that the store makes itself: segments of host memory, copied to files of the swap directory."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shared_store.base.errors import ConnectionLostError, DiskError
from shared_store.memory import Access, Mapping
from shared_store.memory.mapping import close_all
from shared_store.runtime.fds import OwnedFds
from shared_store.store.devices.devices import Devices
from shared_store.store.space.admission import Admission
from shared_store.store.state.residency import FILES
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.tiers import HostCopying

_PIECE_BYTES: Final = 16 << 20


@dataclass(frozen=True, eq=False)
class FileCopies:
    """Allocates and writes files."""

    _state: StoreState
    _devices: Devices
    _admission: Admission

    async def make(self, copying: HostCopying, gone: asyncio.Event) -> None:
        """Allocate and write promised copies. They are not verified yet. ``gone`` ends a wait for memory.

        Raises:
            OutOfMemoryError: the disk is too small.
            ConfigError: there is no swap directory.
            DiskError: a write failed.
            ConnectionLostError: the copies were dropped meanwhile.
            MemoryBackendError: a descriptor cannot be duplicated, or a segment cannot be mapped.
        """
        state = self._state
        for host in copying.copies.values():
            memory = await self._admission.allocate(FILES, state.segments.at(host).nbytes, copying.key, gone)
            if not state.tiers.running(copying):
                self._devices.backend(FILES).release(memory)
                raise ConnectionLostError(f"the host copies of {copying.key} were dropped")
            self._devices.put(host, FILES, memory)
            state.segments.fill(host)
        await asyncio.to_thread(self._writing(copying))

    def _writing(self, copying: HostCopying) -> Callable[[], None]:
        """Return a function that copies, for a thread. It has its own references to memory, and must be called."""
        sources: list[Mapping] = []
        files = OwnedFds()
        try:
            for segment, host in copying.copies.items():
                sources.append(self._devices.map(segment))
                files.add(self._devices.export(host, writable=True))
        except BaseException:
            close_all(sources)
            files.close()
            raise

        def write() -> None:
            try:
                for source, fd in zip(sources, files, strict=True):
                    source.map(Access.READ)
                    _write(fd.fileno(), source)
            finally:
                close_all(sources)
                files.close()

        return write


def _write(fd: int, source: Mapping) -> None:
    """Write a mapping to a file. Raises :class:`DiskError`."""
    view = memoryview((ctypes.c_char * source.nbytes).from_address(source.address)).cast("B")
    done = 0
    while done < source.nbytes:
        try:
            done += os.pwrite(fd, view[done : done + _PIECE_BYTES], done)
        except OSError as error:
            raise DiskError(
                f"cannot write to the swap directory: {error.strerror or error}; free disk space, or set "
                "WOOLY_SWAP_DIR to another disk"
            ) from error
