"""Pages of this process that became private: copies that writes to a copy-on-write mapping made.

Reads ``/proc/self/pagemap`` (see ``proc_pid_pagemap(5)``) for the pages of one range. The flags need no privileges, and
the cost depends on the range alone; ``/proc/self/smaps`` would walk all memory of the process.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

from shared_store.base.errors import MemoryBackendError

_ENTRY_BYTES: Final = 8
_PAGES_AT_ONCE: Final = 1 << 17  # 1 MiB of entries, for 512 MiB of memory
_PRESENT: Final = 0b1100_0000  # of an entry's last byte: present, swapped
_SHARED: Final = 0b0010_0000  # a page of a file, or shared anonymous memory
_OWN: Final = bytes(int(flags & _PRESENT != 0 and not flags & _SHARED) for flags in range(256))
"""1 for the last byte of the entry of a private page, else 0."""


def written_bytes(address: int, nbytes: int) -> int:
    """Return the bytes of a range of a copy-on-write mapping that became private because this process wrote to them.

    Args:
        address: of the first byte.
        nbytes: of the range; pages count as far as they are in it.

    Raises:
        MemoryBackendError: the kernel does not show this process its page map.
    """
    if nbytes == 0:
        return 0
    page = mmap.PAGESIZE
    first, last = address // page, (address + nbytes - 1) // page
    own = 0
    try:
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            for start in range(first, last + 1, _PAGES_AT_ONCE):
                pagemap.seek(start * _ENTRY_BYTES)
                entries = pagemap.read(min(_PAGES_AT_ONCE, last + 1 - start) * _ENTRY_BYTES)
                private = entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_OWN)  # little-endian: flags come last
                own += private.count(1) * page
                if start == first and private[0]:
                    own -= address - first * page
                if start + len(private) == last + 1 and private[-1]:
                    own -= (last + 1) * page - address - nbytes
    except OSError as error:
        raise MemoryBackendError(f"cannot read /proc/self/pagemap: {error.strerror}") from error
    return own
