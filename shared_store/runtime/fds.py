"""Ownership of file descriptors: whoever has an :class:`OwnedFd` closes it, or passes it on.

Functions that return descriptors return these types, so that a path that raises closes what it had. A plain ``int`` is
borrowed: valid during the call, closed by somebody else.

Relies on reference counting only as the last resort: an :class:`OwnedFd` that is collected while open is closed with a
:class:`ResourceWarning`, which the tests turn into a failure.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

_CLOSED = -1


class OwnedFd:
    """A descriptor that this object closes: at the end of a ``with`` block, or by :meth:`close`."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        """Take over an open descriptor."""
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor, borrowed. Raises :class:`ValueError` after :meth:`close` or :meth:`detach`."""
        if self._fd == _CLOSED:
            raise ValueError("this descriptor is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether it was closed or passed on."""
        return self._fd == _CLOSED

    def dup(self) -> OwnedFd:
        """A second descriptor of the same open file, close-on-exec."""
        return OwnedFd(os.dup(self.fileno()))

    def detach(self) -> int:
        """Pass the descriptor on: the caller closes it from now on."""
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
        if not self.closed:
            fd = self._fd
            self.close()
            warnings.warn(f"descriptor {fd} was never closed", ResourceWarning, source=self, stacklevel=2)


class OwnedFds:
    """Descriptors in an order that a message gives them, owned together: a context manager, like :class:`OwnedFd`."""

    __slots__ = ("_fds",)

    def __init__(self, fds: Iterable[OwnedFd] = ()) -> None:
        """Take over the descriptors."""
        self._fds = list(fds)

    @classmethod
    def from_ints(cls, fds: Iterable[int]) -> OwnedFds:
        """Take over plain descriptors, as ``recvmsg`` gives them."""
        return cls(OwnedFd(fd) for fd in fds)

    def add(self, fd: OwnedFd) -> None:
        """Take over one more."""
        self._fds.append(fd)

    def filenos(self) -> tuple[int, ...]:
        """The descriptors in order, borrowed."""
        return tuple(fd.fileno() for fd in self._fds)

    def detach(self) -> list[OwnedFd]:
        """Pass all of them on, in order: the caller closes them from now on."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        """Close all of them. Idempotent."""
        for fd in self.detach():
            fd.close()

    def __len__(self) -> int:
        return len(self._fds)

    def __iter__(self) -> Iterator[OwnedFd]:
        """Iterate over the descriptors, which stay owned by this object."""
        return iter(self._fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
