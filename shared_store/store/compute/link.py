"""The store's end of the socket to its arbiter, in the event loop. Sending never waits for the arbiter."""

from __future__ import annotations

import array
import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from shared_store.base.errors import ProtocolError
from shared_store.compute import control
from shared_store.protocol import wire
from shared_store.runtime.fds import OwnedFds

log = logging.getLogger(__name__)

AGAIN_S: Final = 0.05
"""Seconds after which a packet is sent again that the kernel refused for now."""


class ArbiterLink:
    """A socket of type ``SOCK_SEQPACKET``: one message for each packet."""

    def __init__(
        self, sock: socket.socket, hear: Callable[[control.ToStore], None], over: Callable[[str], None]
    ) -> None:
        """Take over a connected socket.

        Args:
            sock: its other end is the arbiter's.
            hear: called with each message.
            over: called once, with the reason, when the other end is closed or the arbiter sends no messages. Not after
                :meth:`close`.
        """
        self._sock = sock
        self._hear = hear
        self._over = over
        self._packets: deque[tuple[bytes, OwnedFds]] = deque()
        self._writing = False
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock, self._read)

    def send(self, message: control.ToArbiter, fds: OwnedFds | None = None) -> None:
        """Queue a message; take over its descriptors, and close them once they are sent, or the link is closed."""
        owned = OwnedFds() if fds is None else fds
        if self._sock.fileno() < 0:
            owned.close()
            return
        self._packets.append((control.encode(message), owned))
        if not self._writing:
            self._write()

    def close(self) -> None:
        """Close the link: the arbiter ends. Closes descriptors that were not sent. Idempotent."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        while self._packets:
            self._packets.popleft()[1].close()

    def _read(self) -> None:
        try:
            packet = self._sock.recv(control.MAX_PACKET)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error.strerror))
            return
        if not packet:
            self._end("it ended")
            return
        try:
            message = control.decode_from_arbiter(packet)
        except ProtocolError as error:
            self._end(str(error))
            return
        self._hear(message)

    def _end(self, reason: str) -> None:
        self.close()
        self._over(reason)

    def _write(self) -> None:
        """Send what the kernel takes."""
        if self._sock.fileno() < 0:
            return  # closed since a refusal
        later = False
        while self._packets and not later:
            packet, fds = self._packets[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds.filenos()))] if len(fds) else []
            try:
                self._sock.sendmsg([packet], rights)
            except BlockingIOError:
                break
            except OSError as error:
                if not wire.is_temporary(error):
                    log.debug("cannot send to the arbiter: %s", error.strerror)
                    return  # reading reports its end, too; what is left is closed then
                later = True
            else:
                self._packets.popleft()
                fds.close()
        self._attend(later=later)

    def _attend(self, *, later: bool) -> None:
        """Go on when the socket is writable, or after a while where the kernel refuses although it is."""
        if later:
            self._loop.call_later(AGAIN_S, self._write)
        waits = bool(self._packets) and not later
        if waits and not self._writing:
            self._loop.add_writer(self._sock, self._write)
        elif self._writing and not waits:
            self._loop.remove_writer(self._sock)
        self._writing = waits
