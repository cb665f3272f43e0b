"""One connection to a store: the greeting, calls and their answers, pushes.

One thread reads: it hands answers to the calls that wait for them. When the connection ends, that thread tells so and
ends; a link never comes back, see :mod:`shared_store.client.session` for what does.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import struct
import threading
from collections.abc import Callable
from typing import TypeVar

import shared_store
from shared_store.base.errors import (
    ConnectionLostError,
    ProtocolError,
    TimedOutError,
    WoolyError,
    by_code,
)
from shared_store.protocol import messages, wire
from shared_store.runtime.fds import OwnedFds

log = logging.getLogger(__name__)
R = TypeVar("R", bound=messages.Reply)
_Answer = queue.SimpleQueue[tuple[messages.StoreMessage, OwnedFds] | WoolyError]

CALL_TIMEOUT_S = 60.0
"""Seconds that an answer may take which waits for nobody else."""


class Link:
    """A connected client of a store."""

    def __init__(self, sock: socket.socket, name: str, over: Callable[[Link], None]) -> None:
        """Greet the store at the other end of a connected socket, and begin to read.

        ``over`` is called in the reading thread once the connection has ended. The socket's time-out is the greeting's.
        """
        self._channel = wire.BlockingChannel(sock)
        self._over = over
        self._lock = threading.Lock()
        self._calls: dict[int, _Answer] = {}
        self._done = threading.Event()
        self.ended: WoolyError | None = None
        """Why the connection ended; None: it stands."""
        self.closing = False
        with contextlib.suppress(ConnectionLostError):  # a store that refuses has said why, and does not listen
            self._channel.send(messages.encode(messages.Hello(messages.VERSION, name, shared_store.__version__)))
        try:
            welcome = messages.decode_from_store(self._channel.receive().payload)
            if isinstance(welcome, messages.Failed):
                raise by_code(welcome.code)(welcome.message)
            if not isinstance(welcome, messages.Welcome):
                raise ProtocolError(f"the store greeted with {type(welcome).__name__}")
        except WoolyError:
            self._channel.close()
            raise
        self.welcome = welcome
        sock.settimeout(None)
        # Sending may fail after a while instead of waiting for ever for a store that was stopped.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(CALL_TIMEOUT_S), 0))
        self._reader = threading.Thread(target=self._read, name="wooly-session", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """Whether the store is still there."""
        return self.ended is None and not self.closing

    def close(self) -> None:
        """End the connection. Idempotent."""
        self.closing = True
        with contextlib.suppress(OSError):  # the store may have closed it first
            self._channel.sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:  # a finalizer may run in any thread
            self._done.wait()

    def forget(self) -> None:
        """In a forked child: let go of the parent's connection, so that it ends when the parent does."""
        self._channel.sock.close()

    def call(
        self,
        request: messages.Request,
        kind: type[R] | tuple[type[R], ...],
        timeout_s: float = CALL_TIMEOUT_S,
        fds: tuple[int, ...] = (),
    ) -> tuple[R, tuple[int, ...]]:
        """Ask, and wait for the answer; its fds are the caller's, those sent stay so.

        Raises:
            TimedOutError: it did not come in time. The link is closed then.
            ConnectionLostError: the connection ended.
            WoolyError: what the store answered.
        """
        answer: _Answer = queue.SimpleQueue()
        with self._lock:
            if self.ended is not None:
                raise type(self.ended)(str(self.ended))  # a new one each time: it would keep its callers' frames
            self._calls[request.id] = answer
            self._channel.send(messages.encode(request), fds)
        try:
            result = answer.get(timeout=timeout_s)
        except queue.Empty:
            self.close()  # the store may still grant what nobody waits for: only the connection's end settles it
            late = answer.get()
            if not isinstance(late, WoolyError):
                late[1].close()
            raise TimedOutError(
                f"the store did not answer `{type(request).__name__.lower()}` within {timeout_s:.0f} s; "
                "`wooly status` shows who is busy"
            ) from None
        if isinstance(result, WoolyError):
            raise type(result)(str(result)) from result
        reply, received = result
        if isinstance(reply, messages.Failed):
            raise by_code(reply.code)(reply.message)
        if not isinstance(reply, kind):
            received.close()
            raise ProtocolError(f"the store answered {type(request).__name__} with {type(reply).__name__}")
        return reply, tuple(fd.detach() for fd in received.detach())

    def _read(self) -> None:
        try:
            while True:
                frame = self._channel.receive()
                message = messages.decode_from_store(frame.payload)
                if isinstance(message, messages.Push):
                    self._pushed(message)
                    frame.fds.close()
                elif isinstance(message, messages.Failed) and message.id == 0:
                    raise by_code(message.code)(message.message)
                elif isinstance(message, messages.Reply):
                    with self._lock:
                        answer = self._calls.pop(message.id, None)
                    if answer is None:
                        frame.fds.close()
                    else:
                        answer.put((message, frame.fds))
        except WoolyError as error:
            if not self.closing and not isinstance(error, ConnectionLostError):
                log.error("wooly: the store ended the connection: %s", error)
            with self._lock:
                self.ended = error
                for answer in self._calls.values():
                    answer.put(error)
                self._calls.clear()
        self._channel.close()
        self._done.set()
        self._over(self)

    def _pushed(self, push: messages.Push) -> None:
        if push.kind == "waiting":
            log.info("wooly: waiting for %s", push.detail)
        elif push.kind == "shutdown":
            log.warning("wooly: the store ends; what is mapped stays mapped")
        else:
            with self._lock:
                self._channel.send(messages.encode(messages.Unsupported(push.push)))
