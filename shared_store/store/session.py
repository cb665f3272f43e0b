"""A client's session, as the handler of one request sees it, and the form of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from shared_store.base.errors import RequestCancelledError, UnsupportedError
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.store.roles import Roles
from shared_store.store.state.clients import Client


class Pending:
    """One request in progress. It can be cancelled while it waits for other clients.

    Attributes:
        cancelled: True once the client cancelled it.
    """

    def __init__(self, waits: Callable[[], None] = lambda: None) -> None:
        """``waits`` is called when the request begins to wait: later ones with its key may begin."""
        self.cancelled = False
        self._waits = waits
        self._stop: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Cancel the request: end its wait now, or the next one at its beginning."""
        self.cancelled = True
        if self._stop is not None:
            self._stop()

    @contextmanager
    def waiting(self, stop: Callable[[], None]) -> Iterator[None]:
        """The block waits for other clients, until :meth:`cancel` calls ``stop``."""
        self._stop = stop
        if self.cancelled:
            stop()
        self._waits()
        try:
            yield
        finally:
            self._stop = None

    def answered(self) -> None:
        """Drop the callback, which refers to the request, because it was answered."""
        self._waits = _nothing

    def check(self) -> None:
        """Raise :class:`RequestCancelledError` if the request was cancelled."""
        if self.cancelled:
            raise cancelled()


def _nothing() -> None:
    """Follow a request that was answered."""


def cancelled() -> RequestCancelledError:
    """Return the error of a request that was cancelled."""
    return RequestCancelledError("the client cancelled the request")


class Ask(Protocol):
    """Sends a request of the store to a client, see :meth:`Session.ask`."""

    def __call__(self, request: messages.StoreRequest, within_s: float, heard: Heard, /) -> Awaitable[messages.Done]:
        """Send it, and return the answer."""


Heard = Callable[[messages.Accepted | messages.Progress], None]
"""Receives what a client says before its answer."""


async def _unsupported(request: messages.StoreRequest, _within_s: float, _heard: Heard) -> messages.Done:
    raise UnsupportedError(f"the client speaks protocol 1, which has no {type(request).__name__}")


@dataclass(frozen=True)
class Session:
    """A greeted connection.

    Attributes:
        client: the process at its other end.
        gone: set when the connection ends.
        push: sends a push of a kind with a detail.
        roles: the store's administrators.
        asks: sends a request of the store. See :meth:`ask`.
        capabilities: that the client announced.
        pending: the request that this handler answers.
    """

    client: Client
    gone: asyncio.Event
    push: Callable[[str, str], None]
    roles: Roles = field(default_factory=Roles)
    asks: Ask = _unsupported
    capabilities: frozenset[str] = frozenset()
    pending: Pending = field(default_factory=Pending)

    async def ask(
        self, request: messages.StoreRequest, *, within_s: float, heard: Heard = lambda _: None
    ) -> messages.Done:
        """Ask the client to do something, and wait for its answer.

        Args:
            request: with any id; it gets the next one of the connection.
            within_s: seconds to wait; then the request is cancelled.
            heard: called with what the client says before it answers.

        Raises:
            DeclinedError: the client refuses; the message has its reason.
            UnsupportedError: the client does not know the request, has no handler for it, or speaks protocol 1.
            TimedOutError: it did not answer in time.
            ConnectionLostError: the connection ended.
            TooManyRequestsError: too many requests wait for this client's answers.
            WoolyError: the error that the client answered.
        """
        return await self.asks(request, within_s, heard)

    async def first_of(self, *events: asyncio.Event) -> None:
        """Wait until one of the events is set, or the client has disconnected.

        Raises:
            RequestCancelledError: the client cancelled its request.
        """
        stopped = asyncio.Event()
        waits = [asyncio.ensure_future(event.wait()) for event in (*events, self.gone, stopped)]
        try:
            with self.pending.waiting(stopped.set):
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self.pending.check()

    def require_admin(self, action: str) -> None:
        """Raise :class:`PermissionDeniedError` unless the client is an administrator. ``action``: after "may not"."""
        self.roles.require_admin(self.client, action)


@dataclass(frozen=True)
class Answer:
    """The reply to a request, and the descriptors that are sent with it."""

    reply: messages.Reply
    fds: OwnedFds = field(default_factory=OwnedFds)
