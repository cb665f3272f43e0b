"""A connection to the store of a runtime directory that outlives the store.

When the link is lost, a client that reads models, has turns or speaks for a workload reconnects in the background, and
rejoins: see :func:`_rejoin`. A call that may be repeated is sent again to the new store; others raise
:class:`~shared_store.base.errors.ConnectionLostError`.

Calls may come from any thread. A connection does not survive a fork: the child gets an error, and its copies of the
descriptors are closed, so that the connection ends when the parent closes it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import shared_store
from shared_store.activity.writer import ActivityWriter
from shared_store.base.errors import (
    ConnectionLostError,
    ModelNotFoundError,
    ProtocolVersionError,
    StoreUnavailableError,
    TimedOutError,
    TooManyClientsError,
    WoolyError,
)
from shared_store.client.activity import attach_page
from shared_store.client.link import CALL_TIMEOUT_S, Link
from shared_store.client.retained import RetainedModel
from shared_store.client.serving import Handlers
from shared_store.client.withdrawal import Withdrawal
from shared_store.protocol import messages
from shared_store.protocol.messages import capabilities
from shared_store.protocol.messages.identity import Identity
from shared_store.runtime.backoff import delays
from shared_store.runtime.fds import OwnedFds
from shared_store.runtime.paths import locate

log = logging.getLogger(__name__)
R = TypeVar("R", bound=messages.Reply)

GREETING_TIMEOUT_S = 60.0
"""Seconds for a store to greet a client that reconnects: the store may be starting."""

OFFER_TIMEOUT_S = 600.0
"""Seconds for a store to digest an offered model."""

FIRST_DELAY_S, LONGEST_DELAY_S = 0.02, 1.0
"""Seconds between two attempts to reconnect; the delay doubles."""


class Connection:
    """The current link to the store, and what the client claims again after a restart.

    Attributes:
        retained: models that this client reads, by key.
        turns: names of the turns that this client has, in order.
        handlers: of requests of the store.
        identity: this process's description of itself, for the next store.
        activity: writes this client's activity page; None if it has none.
        joining: joins the store of a new link as a workload; None if this client speaks for none.
    """

    def __init__(self, directory: Path, name: str, timeout_s: float, identity: Identity | None = None) -> None:
        """Connect to the store of a runtime directory.

        Args:
            directory: the runtime directory.
            name: shown for this client in the status.
            timeout_s: seconds for the store to greet.
            identity: this process's description of itself.

        Raises:
            StoreUnavailableError: no store answers.
            WoolyError: the store refuses this client.
        """
        self.retained: dict[str, RetainedModel] = {}
        self.turns: dict[str, None] = {}
        self.activity: ActivityWriter | None = None
        self.joining: Callable[[Link], None] | None = None
        self._directory = directory
        self._name = name
        self.identity = identity
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        self._closed = threading.Event()
        self._connecting = threading.Lock()
        self._dialled: socket.socket | None = None
        self.handlers = Handlers()
        with self._connecting:
            self._link = self._dial(timeout_s)
        _open_connections.add(self)

    @property
    def link(self) -> Link:
        """The current link, or the last one."""
        return self._link

    @property
    def alive(self) -> bool:
        """True while the store is connected."""
        return self._link.alive and not self._closed.is_set()

    def next_id(self) -> int:
        """Return a number for a request."""
        return next(self._ids)

    def call(
        self,
        request: messages.Request,
        kind: type[R] | tuple[type[R], ...],
        timeout_s: float = CALL_TIMEOUT_S,
        *,
        repeat: bool,
        withdrawal: Withdrawal | None = None,
    ) -> tuple[R, OwnedFds]:
        """Send a request, and wait for the answer and its descriptors.

        Args:
            request: the message.
            kind: the type of answer that is expected.
            timeout_s: seconds to wait, reconnecting included.
            repeat: send the request again if the store ends before it answers.
            withdrawal: ends the wait before; not while it reconnects.

        Raises:
            TimedOutError: no answer in time. The request was cancelled, and the connection goes on.
            RequestCancelledError: the same, because it was withdrawn.
            ConnectionLostError: the connection ended, and ``repeat`` is False or the time is over.
            StoreUnavailableError: no store could be reached again; or this process is a fork.
            WoolyError: the error that the store answered.
        """
        deadline = time.monotonic() + timeout_s
        for lost, delay in enumerate(delays(FIRST_DELAY_S, LONGEST_DELAY_S)):
            self._check()
            link = self._link
            try:
                return link.call(request, kind, max(0.0, deadline - time.monotonic()), withdrawal=withdrawal)
            except ConnectionLostError:
                if not repeat or time.monotonic() >= deadline:
                    raise
                self._check()
            self._reconnect(link, min(GREETING_TIMEOUT_S, max(1.0, deadline - time.monotonic())))
            if lost:  # a store that closes the connection because of this request, each time, is not flooded with it
                self._closed.wait(min(delay, max(0.0, deadline - time.monotonic())))
        raise AssertionError  # the delays do not end

    def reconnect(self, lost: Link) -> None:
        """Replace a link that has ended. Raises as the constructor does."""
        self._reconnect(lost, GREETING_TIMEOUT_S)

    def close(self) -> None:
        """End the connection, also while it reconnects. Idempotent."""
        self._closed.set()
        if self._pid == os.getpid():
            dialled = self._dialled
            if dialled is not None:
                with contextlib.suppress(OSError):  # it may have ended by itself
                    dialled.shutdown(socket.SHUT_RDWR)
            self._link.close()
        self.retained.clear()

    def forget(self) -> None:
        """Close a forked child's copies of the descriptors."""
        self._link.forget()
        if self._dialled is not None:
            self._dialled.close()
        self.retained.clear()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise StoreUnavailableError("this session belongs to the parent process; connect again after a fork")
        if self._closed.is_set():
            raise ConnectionLostError("this session was closed")

    def _dial(self, timeout_s: float) -> Link:
        """Connect a socket, and greet the store; again with protocol 1 if it does not speak the present one."""
        try:
            return self._greet(messages.VERSION, timeout_s)
        except ProtocolVersionError as error:
            try:
                return self._greet(messages.OLDEST, timeout_s)
            except ProtocolVersionError:
                raise error from None

    def _greet(self, protocol: int, timeout_s: float) -> Link:
        paths = locate(self._directory)
        try:
            sock = self._dialled = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise StoreUnavailableError(f"cannot open a socket to the store: {error.strerror or error}") from error
        sock.settimeout(timeout_s)
        try:
            if self._closed.is_set():
                raise ConnectionLostError("this session was closed")
            sock.connect(os.fspath(paths.socket))
        except OSError as error:
            sock.close()
            raise StoreUnavailableError(
                f"no store answers at {paths.socket} ({error.strerror or error}); start one with `wooly serve --detach`"
            ) from error
        except WoolyError:
            sock.close()
            raise
        return Link(
            sock,
            self._hello(protocol),
            timeout_s=timeout_s,
            next_id=self.next_id,
            handlers=self.handlers,
            over=self._link_ended,
        )

    def _hello(self, protocol: int) -> messages.Hello:
        announced = capabilities.CLIENT if protocol > 1 else ()
        return messages.Hello(protocol, self._name, shared_store.__version__, announced, self.identity)

    def _link_ended(self, link: Link) -> None:
        """Reconnect if there is something to claim. Called in the reading thread of a link that has ended."""
        with self._connecting:
            current = link is self._link
        if not current or not isinstance(link.ended, ConnectionLostError):
            return
        delay = FIRST_DELAY_S
        while (self.retained or self.turns or self.activity or self.joining) and not self._closed.is_set():
            try:
                self._reconnect(link, GREETING_TIMEOUT_S)
            except (StoreUnavailableError, TimedOutError, TooManyClientsError):
                self._closed.wait(delay)
                delay = min(LONGEST_DELAY_S, 2 * delay)
            except WoolyError as error:
                log.warning(
                    "wooly: cannot rejoin the restarted store, keeping existing mappings: %s [%s]", error, error.code
                )
                return
            else:
                return

    def _reconnect(self, lost: Link, timeout_s: float) -> None:
        """Replace the link ``lost``, unless another thread has done so, and rejoin.

        Raises:
            StoreUnavailableError: no store answers.
            WoolyError: the store refuses this client.
        """
        with self._connecting:
            if self._link is not lost and self._link.alive:
                return
            self._link.close()  # for good: the store must not see this client twice
            link = self._dial(timeout_s)
            try:
                self._rejoin(link)
            except BaseException:
                link.close()
                raise
            self._link, self._dialled = link, None
            if self._closed.is_set():
                link.close()
                raise ConnectionLostError("this session was closed")
        if self.retained:
            log.info("wooly: rejoined the store (pid %d)", link.welcome.pid)

    def _rejoin(self, link: Link) -> None:
        """Join, take all turns again, become a reader of all models again, and get another activity page.

        A store that was restarted by its keeper has the models. One that does not is offered their segments.
        """
        if self.joining is not None:  # first: what the store grants next counts on it
            self.joining(link)
        for name in list(self.turns):
            link.call(messages.Acquire(self.next_id(), name, wait=False), messages.Granted)[1].close()
        for key, model in list(self.retained.items()):
            try:
                answer, fds = link.call(model.rejoin(self.next_id(), key), (messages.Done, messages.Wanted))
            except ModelNotFoundError:  # of a store of protocol 1
                self._offer(link, key, model, ticket=0)
                continue
            fds.close()
            if isinstance(answer, messages.Wanted):
                self._offer(link, key, model, answer.ticket)
        if self.activity is not None:
            attach_page(link, self.next_id(), self.activity)

    def _offer(self, link: Link, key: str, model: RetainedModel, ticket: int) -> None:
        request = model.offer(self.next_id(), key, ticket)
        try:
            link.call(request, messages.Done, OFFER_TIMEOUT_S, model.fds.filenos())[1].close()
        except WoolyError as error:
            if not link.alive:
                raise
            log.warning(
                "wooly: the restarted store refused model %s, keeping the existing mapping: %s [%s]",
                key[:12],
                error,
                error.code,
            )


_open_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for connection in list(_open_connections):
        connection.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
