"""Pages of shared memory that one process makes and others map: memfds that nobody can cut.

Relies on seals of ``memfd_create(2)``: ``F_SEAL_SHRINK`` refuses to cut the file, so reading the mapping cannot fault
whatever the other side does.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys

from shared_store.base.errors import ProtocolError, UnsupportedError
from shared_store.runtime.fds import OwnedFd


def map_words(fd: OwnedFd, name: str, *, size: int, version: int) -> memoryview:
    """Map a page to read and write; return its words of 8 bytes. The first one is its version. Closes the descriptor.

    Args:
        fd: of the page, from another process.
        name: of this kind of page, for messages: ``compute page``.
        size: in bytes, at least.
        version: of its layout.

    Raises:
        ProtocolError: it is no such page, or one that can be cut.
        UnsupportedError: this machine is big-endian.
    """
    with fd:
        if sys.byteorder != "little":
            raise UnsupportedError(f"a page of this kind is little-endian: {name}")
        try:
            sealed = fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not sealed or os.fstat(fd.fileno()).st_size < size:
                raise ProtocolError(f"the store sent something else than its {name}")
            words = memoryview(mmap.mmap(fd.fileno(), size)).cast("Q")
        except OSError as error:
            raise ProtocolError(f"the store's {name} cannot be mapped: {error.strerror}") from error
    if words[0] != version:
        raise ProtocolError(f"the {name} has layout {words[0]}, not {version}")
    return words
