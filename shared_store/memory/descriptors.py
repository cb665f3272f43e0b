"""Descriptors of segments: duplicated, with the advice that a process without a free descriptor needs."""

from __future__ import annotations

import errno

from shared_store.base.errors import MemoryBackendError
from shared_store.runtime import fds
from shared_store.runtime.fds import OwnedFd


def duplicate(fd: int) -> OwnedFd:
    """Duplicate a borrowed descriptor of a segment, close-on-exec. Raises :class:`MemoryBackendError`."""
    try:
        return fds.duplicate(fd)
    except OSError as error:
        raise refused("cannot duplicate a segment's descriptor", error) from error


def refused(what: str, error: OSError) -> MemoryBackendError:
    """Return the error for a system call that the kernel refused."""
    advice = "; raise the limit of open files (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
    return MemoryBackendError(f"{what}: {error.strerror}{advice}")
