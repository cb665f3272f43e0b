"""The one way in for a keeper that follows another: a memory file that says what its fds are.

A keeper that becomes another version of itself (``exec``) leaves one, and so does a store whose keeper died and that
starts a new one. All fds, this one too, are inherited by number.
"""

from __future__ import annotations

import os

import msgspec

from shared_store.base.errors import ProtocolError
from shared_store.protocol import control
from shared_store.protocol.durable_state import Holdings
from shared_store.runtime.fds import OwnedFds


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """What a keeper takes over. Numbers of fds unless said otherwise.

    Attributes:
        options: a ``ServeOptions`` as JSON.
        lock: holds the runtime directory.
        listen: the listening socket.
        control: the other end of the running store's connection with its keeper.
        store: the running store, by a pidfd; ``store_pid``: its pid, for people.
        unread: what had arrived from it of a message that was not whole; ``unread_fds``: the fds that came with it.
        restarts: how often a store was started again.
        upgrade: start a store of this installation in place of the running one.
        changes: the state, with the fd of each segment.
    """

    options: str
    lock: int
    listen: int
    control: int
    store: int
    store_pid: int
    unread: bytes = b""
    unread_fds: tuple[int, ...] = ()
    restarts: int = 0
    upgrade: bool = False
    changes: tuple[tuple[bytes, tuple[int, ...]], ...] = ()

    @property
    def fds(self) -> tuple[int, ...]:
        """All fds that must be inherited, but for that of the handover itself."""
        segments = (fd for _, fds in self.changes for fd in fds)
        return (self.lock, self.listen, self.control, self.store, *self.unread_fds, *segments)

    def holdings(self) -> Holdings:
        """The state; it owns the fds of the segments from now on."""
        held = Holdings()
        for payload, fds in self.changes:
            held.apply(control.decode_state(payload), OwnedFds.from_ints(fds))
        return held


def changes_of(held: Holdings) -> tuple[tuple[bytes, tuple[int, ...]], ...]:
    """Holdings as a handover has them."""
    return tuple((control.encode(change), fds) for change, fds in held.changes())


def leave(handover: Handover) -> int:
    """Write it down; the fd to be inherited, which is the caller's."""
    fd = os.memfd_create("wooly-handover", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(msgspec.msgpack.encode(handover))
    return fd


def take(fd: int) -> Handover:
    """Read what was left, and close it. Its fds are close-on-exec from now on.

    Raises:
        ProtocolError: it is no handover.
    """
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        data = file.read()
    try:
        handover = msgspec.msgpack.decode(data, type=Handover)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a handover: {error}") from error
    for inherited in handover.fds:
        os.set_inheritable(inherited, False)
    return handover
