"""One connection to a store: the greeting, calls with their answers, and pushes.

A thread reads, and passes each answer to the call that waits for it. A link whose connection has ended cannot be used
again; :mod:`shared_store.client.connection` makes a new one.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import struct
import threading
from collections.abc import Callable, Sequence
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
from shared_store.protocol.messages.identity import Identity
from shared_store.runtime.fds import OwnedFds

log = logging.getLogger(__name__)
R = TypeVar("R", bound=messages.Reply)
_Answer = queue.SimpleQueue[tuple[messages.Reply, OwnedFds] | WoolyError]

CALL_TIMEOUT_S = 60.0
"""Seconds until the answer to a request that does not wait for other clients."""


class Link:
    """A connected client of a store."""

    def __init__(
        self, sock: socket.socket, name: str, over: Callable[[Link], None], identity: Identity | None = None
    ) -> None:
        """Greet the store, and start to read.

        Args:
            sock: connected to the store; its time-out limits the greeting. The link closes it.
            name: shown for this client in the status.
            over: called in the reading thread after the connection has ended.
            identity: this process's description of itself.

        Raises:
            PermissionDeniedError, TooManyClientsError, ProtocolVersionError: the store refuses this client.
            ConnectionLostError: the store did not answer the greeting.
        """
        self._channel = wire.BlockingChannel(sock)
        self._over = over
        self._lock = threading.Lock()
        self._calls: dict[int, _Answer] = {}
        self._done = threading.Event()
        self.ended: WoolyError | None = None
        """Why the connection ended; None while it is open."""
        self.closing = False
        with contextlib.suppress(ConnectionLostError):  # a store that refuses sends its reason, and does not read
            hello = messages.Hello(messages.VERSION, name, shared_store.__version__, identity)
            self._channel.send(messages.encode(hello))
        try:
            greeting = self._channel.receive()
            greeting.fds.close()
            welcome = messages.decode_from_store(greeting.payload)
            if isinstance(welcome, messages.Failed):
                raise by_code(welcome.code)(welcome.message)
            if not isinstance(welcome, messages.Welcome):
                raise ProtocolError(f"the store greeted with {type(welcome).__name__}")
        except WoolyError:
            self._channel.close()
            raise
        self.welcome = welcome
        sock.settimeout(None)
        # To a stopped store, sending fails after this time instead of blocking forever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(CALL_TIMEOUT_S), 0))
        self._reader = threading.Thread(target=self._read, name="wooly-session", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """True while the connection is open."""
        return self.ended is None and not self.closing

    def close(self) -> None:
        """End the connection. Idempotent."""
        self.closing = True
        with contextlib.suppress(OSError):  # the store may have closed it first
            self._channel.sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:  # a finalizer may run in any thread
            self._done.wait()

    def forget(self) -> None:
        """Close this process's copy of the socket. For a forked child: the connection stays the parent's."""
        self._channel.sock.close()

    def call(
        self,
        request: messages.Request,
        kind: type[R] | tuple[type[R], ...],
        timeout_s: float = CALL_TIMEOUT_S,
        fds: Sequence[int] = (),
    ) -> tuple[R, OwnedFds]:
        """Send a request, and wait for the answer and its descriptors.

        Args:
            request: the message.
            kind: the type of answer that is expected.
            timeout_s: seconds to wait for it.
            fds: descriptors to send with the request, borrowed.

        Raises:
            TimedOutError: no answer in time; the link is closed.
            ConnectionLostError: the connection ended.
            ProtocolError: an answer of another type.
            WoolyError: the error that the store answered.
        """
        answer: _Answer = queue.SimpleQueue()
        with self._lock:
            if self.ended is not None:
                raise type(self.ended)(str(self.ended))  # a new object: a traceback would keep frames alive
            self._calls[request.id] = answer
            self._channel.send(messages.encode(request), fds)
        try:
            result = answer.get(timeout=timeout_s)
        except queue.Empty:
            self.close()  # the store may still grant the request: only the end of the connection revokes it
            late = answer.get()
            if not isinstance(late, WoolyError):
                late[1].close()
            raise TimedOutError(
                f"the store did not answer `{type(request).__name__.lower()}` within {timeout_s:.0f} s; "
                "`wooly status` shows what it is doing"
            ) from None
        if isinstance(result, WoolyError):
            raise type(result)(str(result)) from result
        reply, received = result
        if isinstance(reply, kind):
            return reply, received
        received.close()
        if isinstance(reply, messages.Failed):
            raise by_code(reply.code)(reply.message)
        raise ProtocolError(f"the store answered {type(request).__name__} with {type(reply).__name__}")

    def _read(self) -> None:
        try:
            while True:
                frame = self._channel.receive()
                self._received(frame.payload, frame.fds)
        except WoolyError as error:
            if not self.closing and not isinstance(error, ConnectionLostError):
                log.error("wooly: the store ended the connection: %s [%s]", error, error.code)
            with self._lock:
                self.ended = error
                for answer in self._calls.values():
                    answer.put(error)
                self._calls.clear()
        self._channel.close()
        self._done.set()
        self._over(self)

    def _received(self, payload: bytes, fds: OwnedFds) -> None:
        """Pass an answer to its call, or act on a push. Closes descriptors that no call takes."""
        with contextlib.ExitStack() as unclaimed:
            unclaimed.enter_context(fds)
            message = messages.decode_from_store(payload)
            if isinstance(message, messages.Push):
                self._pushed(message)
            elif isinstance(message, messages.Failed) and message.id == 0:
                raise by_code(message.code)(message.message)
            elif isinstance(message, messages.Reply):
                with self._lock:
                    answer = self._calls.pop(message.id, None)
                if answer is not None:
                    unclaimed.pop_all()
                    answer.put((message, fds))

    def _pushed(self, push: messages.Push) -> None:
        if push.kind == "waiting":
            log.info("wooly: waiting for %s", push.detail)
        elif push.kind == "shutdown":
            log.warning("wooly: the store is shutting down; mapped weights stay mapped")
        else:
            with self._lock:
                self._channel.send(messages.encode(messages.Unsupported(push.push)))
