"""A compute page: made sealed by the store, mapped by the workload and the arbiter, each of which writes its own words.

Relies on seals of ``memfd_create(2)``: ``F_SEAL_SHRINK`` refuses to cut the file, so neither side can make the other
fault. What a workload writes is not trusted: it can only misrepresent itself.
"""

from __future__ import annotations

import fcntl
import os

from shared_store.base.errors import MemoryBackendError
from shared_store.compute import layout
from shared_store.runtime.fds import OwnedFd
from shared_store.runtime.pages import map_words

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def make_page() -> OwnedFd:
    """Return the descriptor of a new page, in which steps may begin until an arbiter says otherwise.

    Raises:
        MemoryBackendError: the kernel refuses a memfd, for example for lack of descriptors.
    """
    words = free_words()
    try:
        fd = OwnedFd(os.memfd_create("compute", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as error:
        raise MemoryBackendError(f"cannot create a compute page: {error.strerror}") from error
    try:
        os.ftruncate(fd.fileno(), layout.SIZE)
        os.pwrite(fd.fileno(), words, 0)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        fd.close()
        raise MemoryBackendError(f"cannot fill a compute page: {error.strerror}") from error
    return fd


def free_words() -> memoryview:
    """Return the words of a new page, in this process's own memory."""
    words = memoryview(bytearray(layout.SIZE)).cast("Q")
    words[layout.VERSION_WORD] = layout.VERSION
    words[layout.UNTIL_WORD] = layout.FREE
    return words


def map_page(fd: OwnedFd) -> memoryview:
    """Map a page; return its words. Closes the descriptor.

    Raises:
        ProtocolError: it is no compute page that stays mapped.
        UnsupportedError: this machine is big-endian.
    """
    return map_words(fd, "compute page", size=layout.SIZE, version=layout.VERSION)
