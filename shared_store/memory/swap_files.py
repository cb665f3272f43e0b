"""Segments in files of the swap directory: the lowest tier, for host copies that do not lie in host memory.

Files are those of :mod:`shared_store.runtime.swap_files`. Descriptors for other processes are read-only, except that of
a client that fills the file.

Does not promise that bytes stay as they were written: a file cannot be sealed. Who reads a host copy back compares its
digests.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from shared_store.base.errors import ConfigError, DiskError, MemoryBackendError, OutOfMemoryError
from shared_store.memory.backend import Segment
from shared_store.memory.descriptors import duplicate, refused
from shared_store.memory.memfd import MemfdBackend, MemfdSegment, is_memory_file
from shared_store.runtime import swap_files
from shared_store.runtime.fds import OwnedFd

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SwapFiles(MemfdBackend):
    """Files of a swap directory, mapped as host memory is."""

    device = "disk"

    def __init__(self, directory: Path | None = None) -> None:
        """Choose the directory; None is the default of ``WOOLY_SWAP_DIR``. Nothing is created yet."""
        self._configured = directory

    def create(self, nbytes: int) -> MemfdSegment:
        """Create a file, with its space on the disk.

        Raises:
            OutOfMemoryError: the file system has too little space.
            ConfigError: no directory can be used.
            DiskError: the file system refuses the file.
        """
        directory = swap_files.directory(self._configured)
        try:
            return MemfdSegment(swap_files.create(directory, nbytes), nbytes)
        except DiskError as error:
            if isinstance(cause := error.__cause__, OSError) and cause.errno in _FULL:
                raise OutOfMemoryError(str(error)) from error
            raise

    def export(self, segment: Segment) -> OwnedFd:
        """Export a descriptor that is read-only, even where other processes write."""
        fd = self._fd(segment)
        try:
            return OwnedFd(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise refused("cannot open a file of the swap directory again", error) from error

    def export_writable(self, segment: Segment) -> OwnedFd:  # noqa: D102 - documented by the interface
        return duplicate(self._fd(segment))

    def import_fd(self, fd: int, nbytes: int) -> MemfdSegment:  # noqa: D102 - documented by the interface
        try:
            found = os.fstat(fd)
        except OSError as error:
            raise MemoryBackendError(f"descriptor {fd} is not a file: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode) or is_memory_file(fd):
            raise MemoryBackendError(f"descriptor {fd} is not a file of a swap directory")
        if found.st_size < nbytes:
            raise MemoryBackendError(f"the file has {found.st_size} bytes, where {nbytes} were announced")
        return MemfdSegment(duplicate(fd), nbytes)

    def seal(self, segment: Segment) -> None:
        """Do nothing: files cannot be sealed."""

    def sealed(self, segment: Segment) -> bool:  # noqa: ARG002 - the interface's
        """Return True: there is nothing to do."""
        return True

    def free_bytes(self) -> int:
        """Return the bytes that the file system has left for this user; 0 without a directory."""
        try:
            return swap_files.free_bytes(swap_files.directory(self._configured))
        except (ConfigError, DiskError):
            return 0
