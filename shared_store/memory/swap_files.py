"""Segments in files of the swap directory: the lowest tier, for host copies that do not lie in host memory.

A file has no name (``O_TMPFILE``) and mode 0600: it ends with its last descriptor, and only the store's user and root
can open it. On a file system without such files it is created under a random name, which is removed at once.
Descriptors for other processes are read-only, except that of a client that fills the file.

Does not promise that bytes stay as they were written: a file cannot be sealed. Who reads a host copy back compares its
digests.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

from shared_store.base.errors import ConfigError, MemoryBackendError, OutOfMemoryError
from shared_store.memory.backend import Segment
from shared_store.memory.descriptors import duplicate, refused
from shared_store.memory.memfd import MemfdBackend, MemfdSegment, is_memory_file
from shared_store.runtime.fds import OwnedFd
from shared_store.runtime.swap_directory import swap_directory

_MODE = 0o600
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_NAMELESS_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)


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
            MemoryBackendError: the file system refuses the file.
        """
        directory = swap_directory(self._configured)
        try:
            fd = _new_file(directory)
        except OSError as error:
            raise refused(f"cannot create a file in the swap directory {directory}", error) from error
        try:
            os.posix_fallocate(fd.fileno(), 0, nbytes)
        except OSError as error:
            fd.close()
            if error.errno in _FULL:
                raise self._full(directory, nbytes) from error
            raise MemoryBackendError(
                f"cannot allocate {nbytes} bytes in the swap directory {directory}: {error.strerror}"
            ) from error
        return MemfdSegment(fd, nbytes)

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
            return _free(swap_directory(self._configured))
        except (ConfigError, OSError):
            return 0

    def _full(self, directory: Path, nbytes: int) -> OutOfMemoryError:
        try:
            free = f"{_free(directory)} bytes are free"
        except OSError as error:
            free = f"its free space is unknown ({error.strerror})"
        return OutOfMemoryError(
            f"cannot allocate {nbytes} bytes in the swap directory {directory}: {free}; free disk space, or set "
            "WOOLY_SWAP_DIR to a larger disk"
        )


def _new_file(directory: Path) -> OwnedFd:
    """Create a file without a name. Raises :class:`OSError`."""
    try:
        # With O_EXCL nobody can give it a name.
        return OwnedFd(os.open(directory, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, _MODE))
    except OSError as error:
        if error.errno not in _NO_NAMELESS_FILES or not directory.is_dir():
            raise
    path = directory / f".wooly-{secrets.token_hex(16)}"
    fd = OwnedFd(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE))
    try:
        path.unlink()
    except OSError:
        fd.close()
        raise
    return fd


def _free(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
