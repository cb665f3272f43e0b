"""The messages of one connection after the greeting: requests of both sides at once, cancels, and answers.

Requests about one thing (:func:`~shared_store.protocol.messages.order_key`) run in the order in which they arrived;
others run at once. A request that waits for other clients lets the next one begin. A client of protocol 1 has one
request at a time, as in the version that it comes from.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from shared_store.base.errors import (
    ModelNotFoundError,
    ProtocolError,
    RequestCancelledError,
    TooManyRequestsError,
    UnsupportedError,
    WoolyError,
)
from shared_store.protocol import messages, wire
from shared_store.runtime.fds import OwnedFds
from shared_store.store.asking import Asking
from shared_store.store.connection import Connection
from shared_store.store.dispatch import Dispatch
from shared_store.store.session import Answer, Pending, Session
from shared_store.store.tickets import Tickets

log = logging.getLogger(__name__)

MAX_REQUESTS = 64
"""Requests of a client that are in progress or queued. Further ones are refused one by one."""

MAX_REQUEST_BYTES = 64 << 20
"""Bytes of these requests together."""

MAX_REFUSED = 256
"""Requests in a row that are refused because of these limits, before the connection is closed."""

_INTERNAL = "internal error; closing the connection of client %d"


@dataclass(eq=False)
class _Running:
    """A request that is not answered yet. ``place``: what it is about; None once it lets the next one begin."""

    request: messages.Request
    fds: OwnedFds
    nbytes: int
    place: Hashable | None
    pending: Pending
    begun: bool = False


class Exchange:
    """A greeted connection's requests."""

    def __init__(self, connection: Connection, session: Session, dispatch: Dispatch, *, protocol: int) -> None:
        """Serve a session. :meth:`begin` begins."""
        self._asking = Asking(connection.send, connection.closed)
        self._connection = connection
        self._session = session if protocol == 1 else dataclasses.replace(session, asks=self._asking.ask)
        self._dispatch = dispatch
        self._protocol = protocol
        self._tickets = Tickets()
        self._running: set[_Running] = set()
        self._by_id: dict[int, _Running] = {}
        self._places: dict[Hashable, deque[_Running]] = {}
        self._bytes = 0
        self._refused = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def session(self) -> Session:
        """The session, for requests of the store."""
        return self._session

    def begin(self) -> None:
        """Begin to serve. Raises :class:`WoolyError` for a message that arrived already and ends the connection."""
        self._connection.deliver(self._received)

    async def ended(self) -> None:
        """Wait until all requests that arrived before the connection ended are executed. None of them waits."""
        self._asking.ended()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _received(self, frame: wire.Frame) -> None:
        """Act on a message; take over its descriptors. Raises :class:`WoolyError` for one that ends the connection."""
        try:
            self._act(messages.decode_from_client(frame.payload), frame)
        except WoolyError:
            frame.fds.close()
            raise
        except Exception:
            frame.fds.close()
            log.exception(_INTERNAL, self._connection.number)
            self._connection.close("internal error")

    def _act(self, message: messages.ClientMessage | messages.Unknown, frame: wire.Frame) -> None:
        if len(frame.fds) and not isinstance(message, messages.Offer):
            raise ProtocolError("fds with a message that has none")
        if isinstance(message, messages.Request):
            self._requested(message, frame)
        else:
            self._heard(message)

    def _heard(self, message: messages.ClientMessage | messages.Unknown) -> None:
        """Act on a message that is no request. Raises as :meth:`_received` does."""
        if isinstance(message, messages.Unsupported):
            return
        if isinstance(message, messages.Hello):
            raise ProtocolError("a second greeting")
        if self._protocol == 1:
            name = message.type[:100] if isinstance(message, messages.Unknown) else type(message).__name__
            raise ProtocolError(f"not a message of protocol version 1: {name!r}")
        if isinstance(message, messages.Unknown):
            self._unknown(message)
        elif isinstance(message, messages.Cancel):
            self._cancel(message.id)
        elif not isinstance(message, messages.Request):
            self._asking.answered(message)

    def _requested(self, request: messages.Request, frame: wire.Frame) -> None:
        """Run a request, now or in its turn; take over the frame's descriptors."""
        if self._protocol > 1 and request.id in self._by_id:
            raise ProtocolError(f"the id {request.id} of a request that is not answered yet")
        if isinstance(request, messages.Offer) and self._protocol > 1:
            self._tickets.redeem(request.ticket, request.key, len(frame.fds))
            self._connection.expect_fds(self._tickets.fds)
        if self._refuse(request, len(frame.payload)):
            frame.fds.close()
            return
        place: Hashable | None = "all" if self._protocol == 1 else messages.order_key(request)
        running = _Running(request, frame.fds, len(frame.payload), place, Pending(lambda: self._waits(running)))
        self._running.add(running)
        self._by_id[request.id] = running
        self._bytes += running.nbytes
        if place is not None:
            queue = self._places.setdefault(place, deque())
            queue.append(running)
            if len(queue) > 1:
                return
        self._start(running)

    def _refuse(self, request: messages.Request, nbytes: int) -> bool:
        """Refuse a request over the limits; return False if it is within them.

        Raises:
            ProtocolError, TooManyRequestsError: the client does not stop.
        """
        most = MAX_REQUESTS + (self._protocol == 1)  # its client counts those that wait behind one
        over = len(self._running) >= most
        over |= bool(self._running) and self._bytes + nbytes > MAX_REQUEST_BYTES
        if not over:
            self._refused = 0
            return False
        text = f"{len(self._running)} requests of {self._bytes} bytes are in progress; wait for an answer"
        self._refused += 1
        if self._protocol == 1:
            raise ProtocolError(text)
        if self._refused > MAX_REFUSED:
            raise TooManyRequestsError(f"{text}. The client does not stop")
        self._connection.send(messages.Failed(request.id, TooManyRequestsError.code, text))
        return True

    def _unknown(self, message: messages.Unknown) -> None:
        if message.id:
            text = f"this version does not know the request {message.type[:100]!r}"
            self._connection.send(messages.Failed(message.id, UnsupportedError.code, text))

    def _cancel(self, request: int) -> None:
        """Cancel a request: one that is queued or waits is answered now. Ignored if it was answered already."""
        running = self._by_id.get(request)
        if running is None:
            return
        if running.begun:
            running.pending.cancel()
            return
        self._leave(running)
        running.fds.close()
        self._finish(running)
        self._connection.send(messages.Failed(request, RequestCancelledError.code, "the client cancelled the request"))

    def _start(self, running: _Running) -> None:
        running.begun = True
        task = asyncio.get_running_loop().create_task(self._run(running))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, running: _Running) -> None:
        session = dataclasses.replace(self._session, pending=running.pending)
        if self._protocol == 1:
            self._connection.expect_fds(0)
        try:
            with running.fds:
                answer = await self._dispatch.answer(session, running.request, running.fds)
            self._answer(running.request, answer)
        except Exception:
            log.exception(_INTERNAL, self._connection.number)
            self._connection.close("internal error")
        finally:
            self._finish(running)
            self._leave(running)

    def _answer(self, request: messages.Request, answer: Answer) -> None:
        """Send an answer, and expect the descriptors of an offer that may follow."""
        reply = answer.reply
        missing = isinstance(reply, messages.Failed) and reply.code == ModelNotFoundError.code
        if isinstance(request, messages.Rejoin) and missing:
            if self._protocol == 1:
                self._connection.expect_fds(len(request.segments))
            else:
                reply = messages.Wanted(request.id, self._tickets.issue(request.key, len(request.segments)))
                self._connection.expect_fds(self._tickets.fds)
        self._connection.send(reply, answer.fds)

    def _finish(self, running: _Running) -> None:
        """Forget a request that is answered."""
        running.pending.answered()
        self._running.discard(running)
        self._bytes -= running.nbytes
        if self._by_id.get(running.request.id) is running:
            del self._by_id[running.request.id]

    def _waits(self, running: _Running) -> None:
        """Let the next request begin, because this one waits for other clients."""
        if self._protocol > 1:
            self._leave(running)

    def _leave(self, running: _Running) -> None:
        """Take a request out of its queue; start the next one if it was the first. Idempotent."""
        place, running.place = running.place, None
        if place is None:
            return
        queue = self._places[place]
        first = queue[0] is running
        queue.remove(running)
        if not queue:
            del self._places[place]
        elif first:
            self._start(queue[0])
