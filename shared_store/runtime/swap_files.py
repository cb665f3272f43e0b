"""Files without a name in the swap directory (``WOOLY_SWAP_DIR``): memory that left its device, on disk.

A file has no name from the start, so that nobody opens it by one, and so that the kernel frees it with its last
descriptor, however a process ends. Mode 0600. Its space is allocated when it is made: a full disk is an error then, and
not when memory is half written.

Relies on ``O_TMPFILE`` (see ``open(2)``); where a file system has none, a file is made and unlinked at once. Bytes lie
on the disk in plain text. Whoever reads them back checks their digest.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Final

from shared_store.base import envs, file_systems
from shared_store.base.errors import ConfigError, DiskError
from shared_store.runtime.fds import OwnedFd

DEFAULT_DIRECTORY: Final = Path("/var/tmp")  # noqa: S108 - files there have no names
_IN_MEMORY: Final = frozenset({0x01021994, 0x858458F6})  # tmpfs, ramfs
_MODE: Final = 0o600


def directory(configured: Path | None = None) -> Path:
    """Return the swap directory: the configured one, that of ``WOOLY_SWAP_DIR``, or ``/var/tmp``.

    Raises:
        ConfigError: it is not a directory that can be written to; or none is configured, and ``/var/tmp`` is in memory.
    """
    chosen = configured or envs.SWAP_DIR.get()
    found = chosen or DEFAULT_DIRECTORY
    if not os.access(found, os.W_OK | os.X_OK) or not found.is_dir():
        raise ConfigError(f"cannot write to the swap directory {found}; set WOOLY_SWAP_DIR to a directory on a disk")
    if chosen is None and in_memory(found):
        raise ConfigError(f"{found} is in memory; set WOOLY_SWAP_DIR to a directory on a disk")
    return found


def in_memory(path: Path) -> bool:
    """Whether a directory is in host memory."""
    return file_systems.type_of(path) in _IN_MEMORY


def free_bytes(path: Path) -> int:
    """Return the bytes that this user could write to the directory's disk. Raises :class:`DiskError`."""
    try:
        found = os.statvfs(path)
    except OSError as error:
        raise DiskError(f"cannot examine the swap directory {path}: {error.strerror}") from error
    return found.f_bavail * found.f_frsize


def create(path: Path, nbytes: int) -> OwnedFd:
    """Create a file without a name in a directory, with space for ``nbytes`` bytes.

    Raises:
        DiskError: the disk is full, or the file system refuses.
    """
    try:
        fd = OwnedFd(_unnamed(path))
    except OSError as error:
        raise DiskError(f"cannot create a file in the swap directory {path}: {error.strerror}") from error
    try:
        if nbytes:
            os.posix_fallocate(fd.fileno(), 0, nbytes)
    except OSError as error:
        fd.close()
        raise DiskError(
            f"cannot write {nbytes} bytes to the swap directory {path}: {error.strerror}; free disk space, or set "
            "WOOLY_SWAP_DIR to a larger disk"
        ) from error
    return fd


def _unnamed(path: Path) -> int:
    try:
        # With O_EXCL the file cannot be given a name later.
        return os.open(path, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, _MODE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    fd, name = tempfile.mkstemp(dir=path, prefix=".wooly-swap-")  # mode 0600
    Path(name).unlink()
    return fd
