"""Start a keeper from an earlier one: a memfd describes the inherited fds and the state.

A keeper that upgrades itself (``exec``) writes one. So does a store whose keeper died, for the keeper that it starts.
The new keeper inherits every fd by number, the memfd's included.

Relies on: fds that keep their numbers over ``exec``.
"""

from __future__ import annotations

import os

import msgspec

from shared_store.base.errors import ProtocolError
from shared_store.protocol import keeper_messages
from shared_store.protocol.durable_state import DurableState
from shared_store.runtime.fds import OwnedFd, OwnedFds


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of the memfd. Integers are numbers of inherited fds unless stated otherwise.

    Attributes:
        options: a ``ServeOptions`` as JSON.
        lock: the lock of the runtime directory.
        listen: the listening socket.
        control: the keeper's end of the connection with the running store.
        store: pidfd of the running store.
        store_pid: pid of the running store, for logs.
        unread: bytes received of an incomplete message from the store.
        unread_fds: fds received with ``unread``.
        restarts: number of restarts of the store so far.
        upgrade: start a store of this installation, and let it replace the running one.
        changes: state changes as msgpack, each with its fds.
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
        """Return all fds that the keeper must inherit, except for the memfd."""
        segments = (fd for _, fds in self.changes for fd in fds)
        return (self.lock, self.listen, self.control, self.store, *self.unread_fds, *segments)

    def state(self) -> DurableState:
        """Build the state, which owns the fds of the segments from now on. Call once."""
        state = DurableState()
        for payload, fds in self.changes:
            state.apply(keeper_messages.decode_state(payload), OwnedFds.from_ints(fds))
        return state


def changes_of(state: DurableState) -> tuple[tuple[bytes, tuple[int, ...]], ...]:
    """Return the state in the form of :attr:`Handover.changes`. The fds are borrowed."""
    return tuple((keeper_messages.encode(change), fds) for change, fds in state.changes())


def leave(handover: Handover) -> OwnedFd:
    """Write the handover to a memfd."""
    memfd = OwnedFd(os.memfd_create("wooly-handover", os.MFD_CLOEXEC))
    with os.fdopen(os.dup(memfd.fileno()), "wb") as file:
        file.write(msgspec.msgpack.encode(handover))
    return memfd


def take(memfd: OwnedFd) -> Handover:
    """Read a handover, and close the memfd. Sets close-on-exec on the inherited fds.

    Raises:
        ProtocolError: the file is not a handover.
    """
    with os.fdopen(memfd.detach(), "rb") as file:
        file.seek(0)
        data = file.read()
    try:
        handover = msgspec.msgpack.decode(data, type=Handover)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a handover: {error}") from error
    for inherited in handover.fds:
        os.set_inheritable(inherited, False)
    return handover
