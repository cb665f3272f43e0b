"""File descriptors with an owner.

An :class:`OwnedFd` closes its descriptor, or passes it on with :meth:`OwnedFd.detach`. Functions that return
descriptors return these types, so that a path that raises closes them. A plain ``int`` is borrowed: valid during the
call, and closed by its owner.

Relies on reference counting as a last resort only: an :class:`OwnedFd` that is collected while it is open closes its
descriptor and emits a :class:`ResourceWarning`, which fails a test.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

_CLOSED = -1
_LOWEST = 3  # a duplicate must not become standard input, output or error where these are closed


class OwnedFd:
    """A descriptor that this object closes: at the end of a ``with`` block, or by :meth:`close`."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        """Take ownership of an open descriptor. Raises :class:`ValueError` for a negative number."""
        self._fd = _CLOSED
        if fd < 0:
            raise ValueError(f"{fd} is not a descriptor")
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor, borrowed. Raises :class:`ValueError` after :meth:`close` or :meth:`detach`."""
        if self._fd == _CLOSED:
            raise ValueError("the descriptor is closed, or was passed on")
        return self._fd

    @property
    def closed(self) -> bool:
        """True after :meth:`close` or :meth:`detach`."""
        return self._fd == _CLOSED

    def dup(self) -> OwnedFd:
        """Return a second descriptor of the same open file, as :func:`duplicate` does."""
        return duplicate(self.fileno())

    def detach(self) -> int:
        """Return the descriptor and transfer ownership: the caller closes it."""
        fd = self.fileno()
        self._fd = _CLOSED
        return fd

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({'closed' if self.closed else self._fd})"

    def __del__(self) -> None:
        if self.closed or sys.is_finalizing():  # the end of the process closes everything
            return
        fd = self._fd
        self.close()
        warnings.warn(f"descriptor {fd} was never closed", ResourceWarning, source=self, stacklevel=2)


class OwnedFds:
    """Several descriptors, owned together and in the order in which a message carries them."""

    __slots__ = ("_fds",)

    def __init__(self, fds: Iterable[OwnedFd] = ()) -> None:
        """Take ownership of the descriptors."""
        self._fds = list(fds)

    @classmethod
    def from_ints(cls, fds: Iterable[int]) -> OwnedFds:
        """Take ownership of plain descriptors, as ``recvmsg`` returns them."""
        return cls([OwnedFd(fd) for fd in fds])

    @classmethod
    def duplicates(cls, fds: Iterable[int]) -> OwnedFds:
        """Duplicate borrowed descriptors: all of them, or none where one fails with :class:`OSError`."""
        with cls() as made:
            for fd in fds:
                made.add(duplicate(fd))
            return cls(made.detach())

    def add(self, fd: OwnedFd) -> None:
        """Take ownership of another descriptor, which becomes the last."""
        self._fds.append(fd)

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptors in order, borrowed."""
        return tuple(fd.fileno() for fd in self._fds)

    def detach(self) -> list[OwnedFd]:
        """Return the descriptors in order and transfer ownership: the caller closes them."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        """Close all descriptors, also where closing one fails. Idempotent."""
        with contextlib.ExitStack() as closing:
            for fd in self.detach():
                closing.callback(fd.close)

    def __len__(self) -> int:
        return len(self._fds)

    def __iter__(self) -> Iterator[OwnedFd]:
        """Iterate over the descriptors, which stay owned by this object."""
        return iter(self._fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def duplicate(fd: int) -> OwnedFd:
    """Duplicate a borrowed descriptor, close-on-exec. Raises :class:`OSError`, for example ``EMFILE``."""
    return OwnedFd(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOWEST))


def raise_file_limit() -> None:
    """Raise this process's limit of open files to the hard limit: each segment and each client is a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
