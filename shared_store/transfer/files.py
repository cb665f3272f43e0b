"""Files that models are saved in: opened without following links, read and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from shared_store.base.errors import DiskError, SavedModelError


@dataclass(frozen=True)
class OpenFile:
    """An open file, and what to call it in an error."""

    name: str
    fd: int

    def read(self, offset: int, into: memoryview) -> None:
        """Fill a buffer. Raises :class:`SavedModelError` where the file ends before, or cannot be read."""
        while into.nbytes:
            try:
                count = os.preadv(self.fd, [into], offset)
            except OSError as error:
                raise SavedModelError(f"cannot read {self.name} at byte {offset}: {error.strerror}") from error
            if not count:
                raise SavedModelError(f"{self.name} ends at byte {offset}: it is incomplete")
            into, offset = into[count:], offset + count

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of a buffer. Raises :class:`DiskError`."""
        while data.nbytes:
            try:
                count = os.pwritev(self.fd, [data], offset)
            except OSError as error:
                raise refused(f"cannot write {self.name}", error) from error
            data, offset = data[count:], offset + count


def refused(what: str, error: OSError) -> DiskError:
    """What a file system's refusal is told as."""
    return DiskError(f"{what}: {error.strerror or error}; nothing was saved. Make room, or name another directory")


def close_all(files: Sequence[OpenFile]) -> None:
    """Close files."""
    for file in files:
        os.close(file.fd)
