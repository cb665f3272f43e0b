"""Frames over a blocking socket, for clients and stores that tests play."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence

from shared_store.base.errors import ConnectionLostError
from shared_store.protocol import wire
from shared_store.runtime.fds import OwnedFds, duplicate


class BlockingChannel:
    """Owns a connected socket. One thread may send while another receives."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._decoder = wire.Decoder(wire.MAX_FROM_STORE)
        self._ready: deque[wire.Frame] = deque()

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Send a frame. The fds are borrowed. Raises `ConnectionLostError` where the other side does not take it."""
        outbox = wire.Outbox()
        outbox.put(payload, OwnedFds([duplicate(fd) for fd in fds]))
        try:
            outbox.send(self.sock)
        except OSError as error:
            raise ConnectionLostError(f"the other side is gone: {error.strerror or error}") from error
        finally:
            outbox.close()

    def receive(self) -> wire.Frame:
        """Wait for the next frame. Raises `ConnectionLostError` at the end of the stream, and after a time-out."""
        while not self._ready:
            try:
                data, fds = wire.receive(self.sock)
            except OSError as error:
                raise ConnectionLostError(f"the other side is gone: {error.strerror or error}") from error
            if not data:
                fds.close()
                raise ConnectionLostError("the other side closed the connection")
            self._ready.extend(self._decoder.feed(data, fds))
        return self._ready.popleft()

    def close(self) -> None:
        """Close the socket, and the fds of frames that were not received."""
        self.sock.close()
        self._decoder.close()
        while self._ready:
            self._ready.popleft().fds.close()
