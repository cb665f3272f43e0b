"""Locks of devices for the whole node: which store grants a GPU's memory, and which process maps when none does.

A lock is an ``flock(2)`` on a file named after the device, in a directory that all users share. It ends with its last
descriptor, so a process that is killed has none. Files stay: removing one would let two processes lock two files.

Relies on a directory that all processes see. Containers have a ``/dev/shm`` of their own unless they share the host's
IPC namespace: mount one directory of the host in each, and name it in ``WOOLY_LOCK_DIR``. A user can take another's
lock first, which costs the other one overcommit, and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import Final

from shared_store.base import envs
from shared_store.base.errors import ConfigError
from shared_store.runtime.fds import OwnedFd

GRANTS: Final = "grants"
"""The lock of the store that grants a device's memory."""

RETURNS: Final = "returns"
"""The lock of a process that takes a device's memory while there is no store."""

_SAFE: Final = re.compile(r"[A-Za-z0-9-]{1,80}")


def lock_path(device: str, purpose: str) -> Path:
    """Return the file of a device's lock for a purpose. Raises :class:`ConfigError` if it can be no file's name."""
    if not _SAFE.fullmatch(device):
        raise ConfigError(f"{device!r} is no name of a device")
    return envs.LOCK_DIR.get() / f"wooly-{device}.{purpose}"


def try_lock(device: str, purpose: str) -> OwnedFd | None:
    """Take the lock of a device; return None if another process has it.

    Raises:
        ConfigError: the lock's file cannot be opened.
    """
    path = lock_path(device, purpose)
    fd = _open(path)
    if not stat.S_ISREG(os.fstat(fd.fileno()).st_mode):
        fd.close()
        raise ConfigError(f"{path} is not a regular file: remove it, or set WOOLY_LOCK_DIR")
    try:
        fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fd.close()
        return None
    except BaseException:
        fd.close()
        raise
    return fd


def _open(path: Path) -> OwnedFd:
    """Open a lock's file, and create it if it is missing. A lock needs no permission to write."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            return OwnedFd(os.open(path, os.O_RDONLY | flags))
        except FileNotFoundError:
            pass
        try:
            fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | flags, 0o644))
        except FileExistsError:  # another process was faster
            return OwnedFd(os.open(path, os.O_RDONLY | flags))
        os.fchmod(fd.fileno(), 0o644)  # whatever the umask is: other users open it, too
    except OSError as error:
        hint = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(
            f"cannot open the lock {path}: {hint}; set WOOLY_LOCK_DIR to a directory of all users"
        ) from error
    return fd
