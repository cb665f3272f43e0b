"""One client's socket in the store's event loop: frames in, frames out. Sending never waits for the client.

The connection of a client that sends garbage or too much, or does not read its socket, is closed. Other clients do not
notice.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque

from shared_store.base.errors import ProtocolError, WoolyError
from shared_store.protocol import messages, wire
from shared_store.protocol.peers import Peer
from shared_store.runtime.fds import OwnedFds

log = logging.getLogger(__name__)

MAX_BEFORE_HELLO = 4 << 10
MAX_FROM_CLIENT = 16 << 20
MAX_REQUESTS_WAITING = 64
MAX_UNREAD = 64 << 20
MAX_OFFERED_FDS = 1024


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
        """Wait for the next frame; return None once the connection is closed and its frames are read."""
        while not self._frames:
            if self.closed.is_set():
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return self._frames.popleft()

    def send(self, message: messages.Message, fds: OwnedFds | None = None) -> None:
        """Queue a message; take over its descriptors."""
        if self.closed.is_set():
            if fds is not None:
                fds.close()
            return
        self._outbox.put(messages.encode(message), fds)
        if self._outbox.pending_bytes > MAX_UNREAD:
            self.cut("client is not reading its socket")
            return
        self._write()

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
        """Send the client an error, as far as its socket takes it, and close the connection."""
        self.refused = True
        self.send(messages.Failed(0, error.code, str(error)))
        self.cut(str(error))

    def close(self, reason: str = "") -> None:
        """Close the connection. Idempotent."""
        if self.closed.is_set():
            return
        self.reason = reason
        self.closed.set()
        self._arrived.set()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._outbox.close()
        self._decoder.close()
        self._sock.close()

    def drop_frames(self) -> None:
        """Drop frames that were not received, and close their descriptors."""
        while self._frames:
            self._frames.popleft().fds.close()

    def _read(self) -> None:
        try:
            data, fds = wire.receive(self._sock)
            if not data:
                self.close("cut off in the middle of a message" if self._decoder.in_frame else "closed by the client")
                return
            self._frames.extend(self._decoder.feed(data, fds))
            if len(self._frames) > MAX_REQUESTS_WAITING:
                raise ProtocolError(f"more than {MAX_REQUESTS_WAITING} requests wait for an answer")
        except BlockingIOError:
            return
        except OSError as error:
            self.close(error.strerror or str(error))
            return
        except WoolyError as error:
            self.refuse(error)
            return
        self._arrived.set()

    def _write(self) -> None:
        try:
            done = self._outbox.send(self._sock)
        except OSError as error:
            self.close(error.strerror or str(error))
            return
        if done and self._writing:
            self._loop.remove_writer(self._sock)
        elif not done and not self._writing:
            self._loop.add_writer(self._sock, self._write)
        self._writing = not done
