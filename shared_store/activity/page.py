"""An activity page on the store's side: made for one client, mapped read-only.

Relies on seals of ``memfd_create(2)``: ``F_SEAL_SHRINK`` refuses to cut the file, so reading the mapping cannot fault
whatever the client does, and ``F_SEAL_GROW`` bounds the memory that a client can be charged for. The page stays
writable. Content is not trusted, see :func:`shared_store.activity.layout.decode`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time

from shared_store.activity import layout
from shared_store.base.errors import MemoryBackendError
from shared_store.runtime.fds import OwnedFd

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ActivityPage:
    """One page. The mapping keeps its memory; the descriptor is for the client."""

    def __init__(self, words: memoryview) -> None:
        """Use :func:`make_page`."""
        self._words = words

    def read(self) -> layout.Activity | None:
        """Return the content; None if the client wrote what cannot be right."""
        words = self._words
        return layout.decode(words[layout.STATE_WORD], words[layout.LAST_USE_WORD], time.monotonic_ns())


def make_page() -> tuple[ActivityPage, OwnedFd]:
    """Make a page; return it with the descriptor that lets a client write it.

    Raises:
        MemoryBackendError: the kernel refuses a memfd or a mapping, for example for lack of descriptors.
    """
    try:
        fd = OwnedFd(os.memfd_create("activity", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as error:
        raise MemoryBackendError(f"cannot create an activity page: {error.strerror}") from error
    try:
        os.ftruncate(fd.fileno(), layout.SIZE)
        os.pwrite(fd.fileno(), layout.VERSION.to_bytes(8, "little"), 8 * layout.VERSION_WORD)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, SEALS)
        return ActivityPage(memoryview(mmap.mmap(fd.fileno(), layout.SIZE, prot=mmap.PROT_READ)).cast("Q")), fd
    except OSError as error:
        fd.close()
        raise MemoryBackendError(f"cannot map an activity page: {error.strerror}") from error
