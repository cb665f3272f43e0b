"""One client's socket in the store's event loop: frames in, frames out. Sending never waits for the client.

The connection of a client that sends garbage or too much, or does not read its socket, is closed, after a last message
with the reason. Other clients do not notice.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable

from shared_store.base.errors import NotReadingError, ProtocolError, WoolyError
from shared_store.protocol import messages, wire
from shared_store.protocol.peers import Peer
from shared_store.runtime.fds import OwnedFds

log = logging.getLogger(__name__)

MAX_BEFORE_HELLO = 4 << 10
MAX_FROM_CLIENT = 16 << 20
MAX_EARLY_FRAMES = 64
"""Frames that may arrive before the greeting is answered."""

MAX_UNREAD = 64 << 20
MAX_UNREAD_FDS = wire.MAX_FDS
MAX_OFFERED_FDS = 1024
LINGER_S = 2.0
"""Seconds for a client to read the last message of a connection that the store ended."""


class Connection:
    """A connected client."""

    def __init__(self, sock: socket.socket, peer: Peer, number: int) -> None:
        """Take over a non-blocking socket. :meth:`start` begins to read."""
        self.peer = peer
        self.number = number
        self.closed = asyncio.Event()
        self.reason = ""
        self.refused = False
        self._sock = sock
        self._decoder = wire.Decoder(MAX_BEFORE_HELLO, max_fds=0)
        self._outbox = wire.Outbox()
        self._frames: deque[wire.Frame] = deque()
        self._deliver: Callable[[wire.Frame], None] | None = None
        self._arrived = asyncio.Event()
        self._writing = False
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin to read."""
        self._loop.add_reader(self._sock, self._read)

    def greeted(self) -> None:
        """Accept larger messages from here on, because the client was greeted."""
        self._decoder.limit = MAX_FROM_CLIENT

    def expect_fds(self, count: int) -> None:
        """Accept up to ``count`` descriptors with the next messages, within :data:`MAX_OFFERED_FDS`."""
        self._decoder.max_fds = min(count, MAX_OFFERED_FDS)

    async def receive(self) -> wire.Frame | None:
        """Wait for the first frame; return None if the connection is closed before it."""
        while not self._frames:
            if self.closed.is_set():
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return self._frames.popleft()

    def deliver(self, handle: Callable[[wire.Frame], None]) -> None:
        """Pass each further frame to ``handle``, which takes over its descriptors and may raise :class:`WoolyError`."""
        self._deliver = handle
        self._hand_over()

    def send(self, message: messages.Message, fds: OwnedFds | None = None) -> None:
        """Queue a message; take over its descriptors."""
        if self.closed.is_set():
            if fds is not None:
                fds.close()
            return
        behind = self._outbox.pending_bytes > 0
        self._outbox.put(messages.encode(message), fds)
        self._write()
        if self._outbox.pending_bytes > MAX_UNREAD or (behind and self._outbox.pending_fds > MAX_UNREAD_FDS):
            self._outbox.drop_waiting()
            self.refuse(NotReadingError("client is not reading its socket"))

    def cut(self, reason: str) -> None:
        """Close the connection because of something the client did or did not do."""
        if not self.closed.is_set():
            log.warning(
                "closing the connection of client %d (pid %d, uid %d): %s",
                self.number,
                self.peer.pid,
                self.peer.uid,
                reason,
            )
        self.close(reason)

    def refuse(self, error: WoolyError) -> None:
        """Close the connection because of an error, and send it to the client, as far as its socket takes it."""
        if self.closed.is_set():
            return
        self.refused = True
        self._outbox.put(messages.encode(messages.Failed(0, error.code, str(error))))
        self._write()
        self.cut(str(error))

    def close(self, reason: str = "") -> None:
        """Close the connection. Idempotent.

        What the client has not read of a last message is sent for up to :data:`LINGER_S`.
        """
        if self.closed.is_set():
            return
        self.reason = reason
        self.closed.set()
        self._arrived.set()
        self._loop.remove_reader(self._sock)
        self._decoder.close()
        if self.refused and self._writing:
            self._loop.call_later(LINGER_S, self._shut)
        else:
            self._shut()

    def ended(self) -> None:
        """Drop frames that were not received, and the callback that receives them, which refers to this object."""
        self._deliver = None
        while self._frames:
            self._frames.popleft().fds.close()

    def _shut(self) -> None:
        """Close the socket, and drop what was not sent. Idempotent."""
        if self._sock.fileno() >= 0:
            self._loop.remove_writer(self._sock)
            self._outbox.close()
            self._sock.close()

    def _read(self) -> None:
        try:
            data, fds = wire.receive(self._sock)
            if not data:
                self.close("cut off in the middle of a message" if self._decoder.in_frame else "closed by the client")
                return
            self._frames.extend(self._decoder.feed(data, fds))
            self._hand_over()
        except BlockingIOError:
            return
        except OSError as error:
            self.close(error.strerror or str(error))
        except WoolyError as error:
            self.refuse(error)

    def _hand_over(self) -> None:
        """Pass frames on. Raises :class:`WoolyError` for one that ends the connection."""
        if self._deliver is None:
            if len(self._frames) > MAX_EARLY_FRAMES:
                raise ProtocolError(f"more than {MAX_EARLY_FRAMES} messages before the greeting was answered")
            self._arrived.set()
            return
        while self._frames and not self.refused:
            self._deliver(self._frames.popleft())

    def _write(self) -> None:
        try:
            done = self._outbox.send(self._sock)
        except OSError as error:
            self.close(error.strerror or str(error))
            self._shut()
            return
        if done and self._writing:
            self._loop.remove_writer(self._sock)
        elif not done and not self._writing:
            self._loop.add_writer(self._sock, self._write)
        self._writing = not done
        if done and self.closed.is_set():
            self._shut()
