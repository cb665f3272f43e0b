"""The place of a worker's copies while it is off its device: host memory within limits, else the swap directory.

A worker on a CPU leaves host memory, so that its copies go to disk. On a GPU they go to host memory, as far as the
machine, this process's control groups and ``WOOLY_HOST_BUDGET`` allow.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Final

from shared_store.base import envs
from shared_store.base.errors import ConfigError, DiskError, OutOfMemoryError
from shared_store.memory import Backend
from shared_store.private.arena import Arena, Pinning, host_room
from shared_store.private.copies import Copy, FileCopy, HostCopy
from shared_store.runtime import swap_files

AHEAD_BYTES: Final = 1 << 30
"""Most bytes of host memory that a worker gets before its first copy."""


class HostSpace:
    """Makes one copy at a time."""

    def __init__(self, backend: Backend) -> None:
        """Begin without memory. ``backend``: of the device that the copies are of."""
        self._on_disk = backend.ordinal is None
        self._arena = Arena(_pinning(backend))
        self._getting: threading.Thread | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that it has, in use or not."""
        return self._arena.nbytes

    def get_ahead(self, nbytes: int) -> None:
        """Get and pin host memory in the background, so that a first copy finds it ready.

        Args:
            nbytes: at most so many bytes; at most :data:`AHEAD_BYTES`, and a quarter of what is free.
        """
        wanted = min(nbytes, AHEAD_BYTES, self._host_room() // 4)
        if wanted > self._arena.nbytes:
            self._getting = threading.Thread(target=self._get, args=(wanted,), name="wooly-pin", daemon=True)
            self._getting.start()

    def pin(self) -> None:
        """Pin host memory again after :meth:`unpin`."""
        self._ready().pin()

    def unpin(self) -> None:
        """Unpin host memory before a driver's checkpoint. Copies stay."""
        self._ready().unpin()

    def room(self) -> int:
        """Return the bytes that a copy should have at most: a budget, else half of what is left, for others need some.

        A copy of what must be kept may be larger, and one on a GPU goes to disk if it is too large for host memory.
        """
        if self._on_disk:
            return self._disk_room() // 2
        return self._host_room() if envs.HOST_BUDGET.get() is not None else self._host_room() // 2

    def prepare(self, nbytes: int) -> None:
        """Make sure that a copy of ``nbytes`` bytes fits, and get memory for it ahead.

        Raises:
            OutOfMemoryError: neither host memory nor the swap directory has the space.
        """
        arena = self._ready()
        if nbytes <= self._host_room():
            with contextlib.suppress(OutOfMemoryError):
                arena.grow(nbytes)
                return
        if nbytes > self._disk_room():
            raise OutOfMemoryError(
                f"copies of {nbytes} bytes fit neither into host memory ({self._host_room()} bytes) nor into the swap "
                f"directory ({self._disk_room()} bytes); raise WOOLY_HOST_BUDGET or the container's memory limit, or "
                "free disk space"
            )

    def copy(self, nbytes: int) -> Copy:
        """Return an empty copy for ``nbytes`` bytes.

        Raises:
            DiskError: the disk is full.
            ConfigError: there is no swap directory.
        """
        arena = self._ready()
        if nbytes <= self._host_room():
            return HostCopy(arena)
        return FileCopy(swap_files.directory(), nbytes)

    def free(self) -> None:
        """Free host memory that is not worth keeping for the next copy."""
        keep = max(AHEAD_BYTES, host_room() // 8)
        limit = envs.HOST_BUDGET.get()
        self._ready().shrink(keep if limit is None else min(keep, limit))

    def _ready(self) -> Arena:
        """Return the arena once no thread makes it larger."""
        getting, self._getting = self._getting, None
        if getting is not None:
            getting.join()
        return self._arena

    def _get(self, nbytes: int) -> None:
        with contextlib.suppress(OutOfMemoryError):  # the first copy takes longer then, or goes to disk
            self._arena.grow(nbytes)

    def _host_room(self) -> int:
        if self._on_disk:
            return 0
        limit = envs.HOST_BUDGET.get()
        room = self._arena.nbytes + host_room()
        return room if limit is None else min(room, limit)

    @staticmethod
    def _disk_room() -> int:
        try:
            return swap_files.free_bytes(swap_files.directory())
        except (ConfigError, DiskError):
            return 0


def _pinning(backend: Backend) -> Pinning | None:
    if backend.ordinal is None:
        return None
    from shared_store.memory.cuda.pinning import CudaPinning  # starts the driver

    return CudaPinning(backend.ordinal)
