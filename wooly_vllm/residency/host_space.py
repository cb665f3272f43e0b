"""The place of a worker's copies while it is off its device: host memory within limits, else the swap directory.

A worker on a CPU leaves host memory, so that its copies go to disk. On a GPU they go to host memory, as far as the
machine, this process's control groups and ``WOOLY_HOST_BUDGET`` allow.
"""

from __future__ import annotations

import contextlib

from shared_store.base import envs
from shared_store.base.errors import ConfigError, DiskError, OutOfMemoryError
from shared_store.memory import Backend
from shared_store.private.arena import Arena, Pinning, host_room
from shared_store.private.copies import Copy, FileCopy, HostCopy
from shared_store.runtime import swap_files


class HostSpace:
    """Makes one copy at a time."""

    def __init__(self, backend: Backend) -> None:
        """Begin without memory. ``backend``: of the device that the copies are of."""
        self._on_disk = backend.ordinal is None
        self._arena = Arena(_pinning(backend))

    def room(self) -> int:
        """Return the most bytes that a copy may have now."""
        return max(self._host_room(), self._disk_room())

    def prepare(self, nbytes: int) -> None:
        """Make sure that a copy of ``nbytes`` bytes fits, and get memory for it ahead.

        Raises:
            OutOfMemoryError: neither host memory nor the swap directory has the space.
        """
        if nbytes <= self._host_room():
            with contextlib.suppress(OutOfMemoryError):
                self._arena.grow(nbytes)
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
        if nbytes <= self._host_room():
            return HostCopy(self._arena)
        return FileCopy(swap_files.directory(), nbytes)

    def free(self) -> None:
        """Return host memory that is not worth keeping for the next copy."""
        limit = envs.HOST_BUDGET.get()
        if limit is not None and self._arena.nbytes > limit:
            self._arena.shrink(limit)

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
