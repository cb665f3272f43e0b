"""Open files as the source or target of copies: read and written completely, or an error."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from shared_store.base.errors import DiskError, SavedModelError
from shared_store.runtime.fds import OwnedFd


@dataclass(frozen=True)
class OpenFile:
    """An open file and its name in error messages. Owns the descriptor; a context manager that closes it."""

    name: str
    fd: OwnedFd

    def read(self, offset: int, into: memoryview) -> None:
        """Fill a buffer from the file, starting at byte ``offset``. Safe to call from several threads.

        Raises:
            SavedModelError: the file ends too early or cannot be read.
        """
        while into.nbytes:
            try:
                count = os.preadv(self.fd.fileno(), [into], offset)
            except OSError as error:
                raise SavedModelError(f"cannot read {self.name} at byte {offset}: {error.strerror}") from error
            if not count:
                raise SavedModelError(f"{self.name} ends at byte {offset}: it is incomplete")
            into, offset = into[count:], offset + count

    def write(self, offset: int, data: memoryview) -> None:
        """Write a whole buffer, starting at byte ``offset``. Safe to call from several threads.

        Raises:
            DiskError: the file system refuses the write.
        """
        while data.nbytes:
            try:
                count = os.pwritev(self.fd.fileno(), [data], offset)
            except OSError as error:
                raise disk_error(f"cannot write {self.name}", error) from error
            data, offset = data[count:], offset + count

    def size(self) -> int:
        """Return the file's length in bytes."""
        return os.fstat(self.fd.fileno()).st_size

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        self.fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def disk_error(action: str, error: OSError) -> DiskError:
    """Return the error for a save that the file system refused; ``action`` says which step failed."""
    return DiskError(
        f"{action}: {error.strerror or error}; nothing was saved. Free disk space, or choose another directory"
    )
