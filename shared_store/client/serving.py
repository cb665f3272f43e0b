"""Requests of the store to this client: each is carried out in a thread of its own, so that answers are never late."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from shared_store.base.errors import TooManyRequestsError, UnsupportedError, WoolyError
from shared_store.protocol import messages

log = logging.getLogger(__name__)

MAX_SERVED = 16
"""Requests of the store that are carried out at a time over one connection."""

S = TypeVar("S", bound=messages.StoreRequest)
Send = Callable[[messages.Message], None]


class StoreCall:
    """A request of the store that is being carried out.

    Attributes:
        cancelled: set when the store no longer waits for the answer, or is gone.
    """

    def __init__(self, request: messages.StoreRequest, send: Send) -> None:
        self.cancelled = threading.Event()
        self._when_cancelled: Callable[[], None] | None = None
        self._id = request.id
        self._send = send

    def when_cancelled(self, function: Callable[[], None]) -> None:
        """Call a function once it is cancelled, in the reading thread: it must not wait for the store."""
        self._when_cancelled = function
        if self.cancelled.is_set():
            function()

    def cancel(self) -> None:
        """Set :attr:`cancelled`."""
        self.cancelled.set()
        if (function := self._when_cancelled) is not None:
            function()

    def accept(self) -> None:
        """Tell the store that the request is being carried out. Optional, and at once."""
        self._send(messages.Accepted(self._id))

    def progress(self, done: int, total: int = 0, detail: str = "") -> None:
        """Tell the store how far it is: ``done`` of ``total`` units (0: unknown)."""
        self._send(messages.Progress(self._id, done, total, detail))


Handler = Callable[[S, StoreCall], str | None]
"""Carries a request out, and returns a detail for the answer. May raise :class:`DeclinedError`, with the reason."""


Hearing = Callable[[str], None]
"""Hears the detail of a push. Called in the reading thread: it must not block, or call the store."""


class Handlers:
    """The handlers of a session, by kind of request and push. They outlive connections."""

    def __init__(self) -> None:
        self._handlers: dict[type[messages.StoreRequest], Handler[Any]] = {}
        self._hearing: dict[str, Hearing] = {}

    def add(self, kind: type[S], handler: Handler[S]) -> None:
        """Use a handler for all requests of a kind from here on."""
        self._handlers[kind] = handler

    def hear(self, kind: str, hearing: Hearing) -> None:
        """Call a function for all pushes of a kind from here on."""
        self._hearing[kind] = hearing

    def hearing(self, kind: str) -> Hearing | None:
        """Return the function for pushes of a kind."""
        return self._hearing.get(kind)

    def of(self, request: messages.StoreRequest) -> Handler[Any] | None:
        """Return the handler of a request."""
        return self._handlers.get(type(request))


class Serving:
    """The requests that came over one connection."""

    def __init__(self, handlers: Handlers, send: Send) -> None:
        self._handlers = handlers
        self._send = send
        self._calls: dict[int, StoreCall] = {}

    def received(self, request: messages.StoreRequest) -> None:
        """Begin to carry a request out, or answer why not. Called in the reading thread; does not block."""
        handler = self._handlers.of(request)
        if handler is None:
            name = type(request).__name__
            self._fail(request.id, UnsupportedError(f"this client does not serve {name}"))
            return
        if len(self._calls) >= MAX_SERVED:
            self._fail(request.id, TooManyRequestsError(f"{MAX_SERVED} requests of the store are being carried out"))
            return
        call = self._calls[request.id] = StoreCall(request, self._send)
        worker = threading.Thread(
            target=self._carry_out, args=(handler, request, call), name="wooly-request", daemon=True
        )
        try:
            worker.start()
        except RuntimeError as error:  # the process may start no more threads, or is ending
            self._calls.pop(request.id, None)
            self._fail(request.id, WoolyError(str(error)))

    def cancelled(self, request: int) -> None:
        """The store does not wait for an answer any more."""
        if (call := self._calls.get(request)) is not None:
            call.cancel()

    def ended(self) -> None:
        """The connection has ended."""
        for call in list(self._calls.values()):
            call.cancel()

    def _carry_out(self, handler: Handler[Any], request: messages.StoreRequest, call: StoreCall) -> None:
        answer: messages.Message
        try:
            answer = messages.Done(request.id, handler(request, call) or "")
        except WoolyError as error:
            answer = messages.Failed(request.id, error.code, str(error))
        except Exception as error:
            log.exception("wooly: the handler of the store's %s failed", type(request).__name__)
            answer = messages.Failed(request.id, WoolyError.code, f"{type(error).__name__}: {error}")
        self._calls.pop(request.id, None)
        self._send(answer)

    def _fail(self, request: int, error: WoolyError) -> None:
        self._send(messages.Failed(request, error.code, str(error)))
