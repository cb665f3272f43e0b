"""One connection to a store: the greeting, calls with their answers, pushes, and requests of the store.

A thread reads, and passes each answer to the call that waits for it. A call that is not answered in time is cancelled;
if the store granted it meanwhile, the reading thread returns the grant. A link that has ended cannot be used again;
:mod:`shared_store.client.connection` makes a new one.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from shared_store.base.errors import (
    ConnectionLostError,
    ProtocolError,
    RequestCancelledError,
    StoreUnavailableError,
    TimedOutError,
    UnsupportedError,
    WoolyError,
    by_code,
)
from shared_store.client.channel import Channel
from shared_store.client.returning import returning
from shared_store.client.serving import Handlers, Serving
from shared_store.client.withdrawal import Withdrawal
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds

log = logging.getLogger(__name__)
R = TypeVar("R", bound=messages.Reply)
_Result = tuple[messages.Reply, OwnedFds] | WoolyError
_Answer = queue.SimpleQueue[_Result | None]
"""Gets the answer of a call; None where the wait was withdrawn."""

CALL_TIMEOUT_S = 60.0
"""Seconds until the answer to a request that does not wait for other clients."""


class Link:
    """A connected client of a store."""

    def __init__(
        self,
        sock: socket.socket,
        hello: messages.Hello,
        *,
        timeout_s: float,
        next_id: Callable[[], int],
        handlers: Handlers,
        over: Callable[[Link], None],
    ) -> None:
        """Greet the store, and start to read.

        Args:
            sock: connected to the store. The link closes it.
            hello: the greeting; its protocol is that of the link.
            timeout_s: seconds for the store to greet.
            next_id: numbers requests of this client.
            handlers: of requests of the store.
            over: called in the reading thread after the connection has ended.

        Raises:
            PermissionDeniedError, TooManyClientsError, ProtocolVersionError: the store refuses this client.
            ConnectionLostError: the store did not answer the greeting.
            StoreUnavailableError: this process is out of descriptors.
        """
        try:
            self._channel = Channel(sock)
        except OSError as error:
            raise StoreUnavailableError(f"cannot open a channel to the store: {error.strerror or error}") from error
        self._over = over
        self._next_id = next_id
        self._handlers = handlers
        self._serving = Serving(handlers, self._send)
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._calls: dict[int, _Answer] = {}
        self._late: dict[int, messages.Request] = {}
        self._done = threading.Event()
        self.ended: WoolyError | None = None
        """Why the connection ended; None while it is open."""
        self.closing = False
        try:
            self.welcome = self._greet(hello, timeout_s)
        except BaseException:
            self._channel.close()
            raise
        self.capabilities = frozenset(self.welcome.capabilities)
        self._reader = threading.Thread(target=self._read, name="wooly-session", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """True while the connection is open."""
        return self.ended is None and not self.closing

    def close(self) -> None:
        """End the connection. Idempotent."""
        self.closing = True
        self._channel.shut_down()
        if threading.current_thread() is not self._reader:  # a finalizer may run in any thread
            self._done.wait()

    def forget(self) -> None:
        """Close this process's copy of the socket. For a forked child: the connection stays the parent's."""
        self._channel.abandon()

    def call(
        self,
        request: messages.Request,
        kind: type[R] | tuple[type[R], ...],
        timeout_s: float = CALL_TIMEOUT_S,
        fds: Sequence[int] = (),
        withdrawal: Withdrawal | None = None,
    ) -> tuple[R, OwnedFds]:
        """Send a request, and wait for the answer and its descriptors.

        Args:
            request: the message.
            kind: the type of answer that is expected.
            timeout_s: seconds to wait for it.
            fds: descriptors to send with the request, borrowed.
            withdrawal: ends the wait before.

        Raises:
            RequestCancelledError: the wait was withdrawn; the request is cancelled, as after a time-out.
            TimedOutError: no answer in time; the request is cancelled. A store of protocol 1 cannot cancel: there the
                link is closed.
            ConnectionLostError: the connection ended.
            StoreUnavailableError: this process is out of descriptors.
            ProtocolError: an answer of another type.
            WoolyError: the error that the store answered.
        """
        until = time.monotonic() + timeout_s
        answer: _Answer = queue.SimpleQueue()
        with self._settled:
            self._wait_for_late(request, until, timeout_s)
            if self.ended is not None:
                raise type(self.ended)(str(self.ended))  # a new object: a traceback would keep frames alive
            try:
                owned = OwnedFds.duplicates(fds)
            except OSError as error:
                raise StoreUnavailableError(f"cannot pass descriptors on: {error.strerror or error}") from error
            self._calls[request.id] = answer
            self._send(request, owned)
        result = self._wait(request, answer, until, timeout_s, withdrawal)
        if isinstance(result, WoolyError):
            raise type(result)(str(result)) from result
        reply, received = result
        if isinstance(reply, kind):
            return reply, received
        received.close()
        if isinstance(reply, messages.Failed):
            raise by_code(reply.code)(reply.message)
        raise ProtocolError(f"the store answered {type(request).__name__} with {type(reply).__name__}")

    def post(self, request: messages.Request) -> None:
        """Send a request whose answer is ignored. Does not block; without effect after the connection has ended."""
        self._send(request)

    def _wait(
        self, request: messages.Request, answer: _Answer, until: float, timeout_s: float, withdrawal: Withdrawal | None
    ) -> _Result:
        """Wait for the answer; cancel the request where that does not come in time."""
        if withdrawal is not None:
            withdrawal.wake_by(lambda: answer.put(None))
        try:
            result = answer.get(timeout=max(0.0, until - time.monotonic()))
            withdrawn = result is None
            if result is None:
                result = self._cancel(request, answer)
        except queue.Empty:
            withdrawn = False
            result = self._cancel(request, answer)
        except BaseException:  # KeyboardInterrupt, for example
            late = self._cancel(request, answer)
            if late is not None and not isinstance(late, WoolyError):
                self._return(request, *late)
            raise
        finally:
            if withdrawal is not None:
                withdrawal.wake_by(None)
        if result is not None:
            return result
        if withdrawn:
            raise RequestCancelledError(f"`{type(request).__name__.lower()}` was withdrawn before the store answered")
        raise _timed_out(request, timeout_s)

    def _greet(self, hello: messages.Hello, timeout_s: float) -> messages.Welcome:
        self._send(hello)
        greeting = self._channel.receive(timeout_s)
        greeting.fds.close()
        welcome = messages.decode_from_store(greeting.payload)
        if isinstance(welcome, messages.Failed):
            raise by_code(welcome.code)(welcome.message)
        if not isinstance(welcome, messages.Welcome):
            raise ProtocolError(f"the store greeted with {type(welcome).__name__}")
        return welcome

    def _send(self, message: messages.Message, fds: OwnedFds | None = None) -> None:
        self._channel.send(messages.encode(message), fds)

    def _wait_for_late(self, request: messages.Request, until: float, timeout_s: float) -> None:
        """Wait until cancelled requests about the same thing are answered, since what they grant is returned first.

        Raises:
            TimedOutError: they are not answered in time.
        """
        key = messages.order_key(request)
        while key is not None and any(messages.order_key(late) == key for late in self._late.values()):
            if not self._settled.wait(until - time.monotonic()):
                raise _timed_out(request, timeout_s)

    def _cancel(self, request: messages.Request, answer: _Answer) -> _Result | None:
        """Cancel a request; return its answer if that has arrived meanwhile."""
        with self._lock:
            answered = self._calls.pop(request.id, None) is None
            if not answered and self.welcome.protocol > 1:
                self._late[request.id] = request
                self._send(messages.Cancel(request.id))
        while answered:
            if (result := answer.get()) is not None:  # None: it was withdrawn as well
                return result
        if self.welcome.protocol == 1:
            self.close()  # only the end of the connection revokes what the store may still grant
        return None

    def _read(self) -> None:
        try:
            while True:
                frame = self._channel.receive()
                self._received(frame.payload, frame.fds)
        except WoolyError as error:
            if not self.closing and not isinstance(error, ConnectionLostError):
                log.error("wooly: the store ended the connection: %s [%s]", error, error.code)
            with self._settled:
                self.ended = error
                for answer in self._calls.values():
                    answer.put(error)
                self._calls.clear()
                self._late.clear()
                self._settled.notify_all()
        self._channel.close()
        self._serving.ended()
        self._done.set()
        self._over(self)

    def _received(self, payload: bytes, fds: OwnedFds) -> None:
        """Pass an answer to its call, or act on another message. Closes descriptors that no call takes."""
        with contextlib.ExitStack() as unclaimed:
            unclaimed.enter_context(fds)
            message = messages.decode_from_store(payload)
            if isinstance(message, messages.Failed) and message.id == 0:
                raise by_code(message.code)(message.message)
            if not isinstance(message, messages.Reply):
                self._heard(message)
                return
            with self._settled:
                answer = self._calls.pop(message.id, None)
                late = self._late.get(message.id)
            if answer is not None:
                unclaimed.pop_all()
                answer.put((message, fds))
            elif late is not None:
                self._return(late, message, fds)
                with self._settled:
                    del self._late[message.id]
                    self._settled.notify_all()
            elif isinstance(message, messages.Failed):
                log.debug("wooly: the store refused a report: %s [%s]", message.message, message.code)

    def _return(self, request: messages.Request, reply: messages.Reply, fds: OwnedFds) -> None:
        """Return what the answer to a cancelled request grants. The answer to that is ignored."""
        fds.close()
        grant = returning(request, reply, self._next_id, self.capabilities)
        if grant is not None:
            self._send(grant)

    def _heard(self, message: messages.StoreMessage | messages.Unknown) -> None:
        """Act on a message that is no answer. Does not block."""
        if isinstance(message, messages.Push):
            self._pushed(message)
        elif isinstance(message, messages.StoreRequest):
            self._serving.received(message)
        elif isinstance(message, messages.Cancel):
            self._serving.cancelled(message.id)
        elif isinstance(message, messages.Unknown) and message.id:
            text = f"this version does not know the request {message.type!r}"
            self._send(messages.Failed(message.id, UnsupportedError.code, text))

    def _pushed(self, push: messages.Push) -> None:
        heard = self._handlers.hearing(push.kind)
        if heard is not None:
            heard(push.detail)
        elif push.kind == "room":
            log.info("wooly: waiting for memory: %s", push.detail)
        elif push.kind == "waiting":
            log.info("wooly: waiting for %s", push.detail)
        elif push.kind == "shutdown":
            log.warning("wooly: the store is shutting down; mapped weights stay mapped")
        else:
            self._send(messages.Unsupported(push.push))


def _timed_out(request: messages.Request, timeout_s: float) -> TimedOutError:
    return TimedOutError(
        f"the store did not answer `{type(request).__name__.lower()}` within {timeout_s:.0f} s; "
        "`wooly status` shows what it is doing"
    )
