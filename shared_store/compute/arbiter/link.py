"""The arbiter's end of the socket pair to its store."""

from __future__ import annotations

import array
import logging
import socket
from collections.abc import Iterator, Sequence
from typing import Final

from shared_store.base.errors import ProtocolError
from shared_store.compute import control
from shared_store.runtime.fds import OwnedFds

log = logging.getLogger(__name__)

ROWS: Final = 1000
"""Workloads in one report; more come in several."""

_DESCRIPTORS: Final = socket.CMSG_SPACE(8 * array.array("i").itemsize)


class Link:
    """Packets of the store, and reports for it."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a ``SOCK_SEQPACKET`` socket."""
        self._socket = sock
        sock.setblocking(False)
        self.ended = False
        """True once the store's end is closed."""

    def fileno(self) -> int:
        """Return the descriptor, borrowed."""
        return self._socket.fileno()

    def read(self) -> Iterator[tuple[control.ToArbiter, OwnedFds]]:
        """Yield the packets that are there. The caller closes their descriptors."""
        while not self.ended:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    control.MAX_PACKET, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except ConnectionError:
                data, ancillary, flags = b"", [], 0
            fds = _descriptors(ancillary)
            if not data:
                fds.close()
                self.ended = True
                return
            if flags & socket.MSG_CTRUNC:
                log.error("Descriptors of a workload were lost on the way: raise the limit of open files (ulimit -n)")
                fds.close()  # the workload's end of the socket closes, so it goes on without turns
            try:
                yield control.decode_from_store(data), fds
            except ProtocolError as error:
                fds.close()
                log.error("A packet of the store is of no use: %s", error)

    def report(self, rows: Sequence[control.Row]) -> None:
        """Send a report, of no rows as well. A store that does not read them loses some."""
        for first in range(0, max(len(rows), 1), ROWS):
            try:
                self._socket.send(control.encode(control.Usage(tuple(rows[first : first + ROWS]))), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except ConnectionError:
                self.ended = True
                return

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> OwnedFds:
    numbers = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
    return OwnedFds.from_ints(numbers)
