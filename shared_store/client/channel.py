"""Frames over a client's socket. Sending never blocks: a store that is stopped delays no thread of the client.

One thread receives. It also sends what the socket did not take at once, and ends the channel when the store does not
read for :data:`STALLED_S`. Other threads send; each frame is sent as a whole, in the order of the calls.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque

from shared_store.base.errors import ConnectionLostError
from shared_store.protocol import wire
from shared_store.runtime.fds import OwnedFd, OwnedFds

STALLED_S = 60.0
"""Seconds after which a store that reads nothing of what is queued for it counts as lost."""


class Channel:
    """A connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket. Raises :class:`OSError` (it is closed then) where descriptors are used up."""
        self._sock = sock
        try:
            sock.setblocking(False)
            self._wake = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError:
            sock.close()
            raise
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._wake.fileno(), select.POLLIN)
        self._lock = threading.Lock()
        self._outbox = wire.Outbox()
        self._decoder = wire.Decoder(wire.MAX_FROM_STORE)
        self._ready: deque[wire.Frame] = deque()
        self._sent_at = 0.0
        self._closed = False

    def send(self, payload: bytes, fds: OwnedFds | None = None) -> None:
        """Send a frame, or queue it. Takes over the fds. May be called in any thread.

        If the connection has ended, nothing is sent: :meth:`receive` raises the reason.
        """
        with self._lock:
            if self._closed:
                if fds is not None:
                    fds.close()
                return
            if not self._outbox.pending_bytes:
                self._sent_at = time.monotonic()
            self._outbox.put(payload, fds)
            if not self._send_queued():
                os.eventfd_write(self._wake.fileno(), 1)

    def receive(self, timeout_s: float | None = None) -> wire.Frame:
        """Wait for the next frame, and send what is queued meanwhile. Only one thread may receive.

        Args:
            timeout_s: seconds to wait; None: without a limit.

        Raises:
            ConnectionLostError: the store closed the connection, did not read, or (``TimeoutError`` as cause) the time
                is over.
            ProtocolError: the stream is not made of frames.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ready:
            self._wait(until)
            try:
                data, fds = wire.receive(self._sock)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _lost(error) from error
            if not data:
                fds.close()
                cut = " in the middle of a message" if self._decoder.in_frame else ""
                raise ConnectionLostError(f"the store closed the connection{cut}")
            self._ready.extend(self._decoder.feed(data, fds))
        return self._ready.popleft()

    def shut_down(self) -> None:
        """End the connection: :meth:`receive` raises. May be called in any thread; idempotent."""
        with contextlib.suppress(OSError):  # the store may have closed it first, or it is closed
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, and all fds that were not sent or received. For the receiving thread; idempotent."""
        with self._lock:
            self.abandon()

    def abandon(self) -> None:
        """Close as :meth:`close` does, without its lock, for a forked child: another thread may have had it."""
        self._closed = True
        self._sock.close()
        self._wake.close()
        self._outbox.close()
        self._decoder.close()
        while self._ready:
            self._ready.popleft().fds.close()

    def _send_queued(self) -> bool:
        """Send what the socket accepts; return whether nothing is left. The caller has the lock."""
        before = self._outbox.pending_bytes
        try:
            done = self._outbox.send(self._sock)
        except OSError:
            # Nothing more can be sent. What the store sent before, perhaps the reason, can still be received.
            self._outbox.close()
            self.shut_down()
            return True
        if self._outbox.pending_bytes < before:
            self._sent_at = time.monotonic()
        return done

    def _wait(self, until: float | None) -> None:
        """Wait until there may be something to receive, and send what is queued."""
        with self._lock:
            stalled = self._sent_at + STALLED_S if self._outbox.pending_bytes else None
        self._poll.modify(self._sock, select.POLLIN | (0 if stalled is None else select.POLLOUT))
        limits = [limit for limit in (until, stalled) if limit is not None]
        left_ms = max(0.0, (min(limits) - time.monotonic()) * 1e3) if limits else None
        events = dict(self._poll.poll(left_ms))
        if self._wake.fileno() in events:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake.fileno())
        if events.get(self._sock.fileno(), 0) & select.POLLOUT:
            with self._lock:
                self._send_queued()
        if events:
            return
        now = time.monotonic()
        if until is not None and now >= until:
            raise ConnectionLostError("the store is gone: it did not answer in time") from TimeoutError()
        if stalled is not None and now >= stalled:
            raise ConnectionLostError(f"the store has read nothing for {STALLED_S:.0f} s")


def _lost(error: OSError) -> ConnectionLostError:
    return ConnectionLostError(f"the store is gone: {error.strerror or error}")
