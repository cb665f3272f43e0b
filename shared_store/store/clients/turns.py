"""Handlers of ``Acquire`` and ``Yield``: turns."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.base.errors import ProtocolError
from shared_store.protocol import messages
from shared_store.store.effects import Effects
from shared_store.store.session import Answer, Session
from shared_store.store.state.clients import Client
from shared_store.store.state.store_state import StoreState
from shared_store.store.waiting import Waiters


@dataclass(frozen=True, eq=False)
class TurnRequests:
    """Turns of clients."""

    _state: StoreState
    _effects: Effects
    _waiters: Waiters

    async def acquire(self, session: Session, request: messages.Acquire) -> Answer:
        """Wait until the client has the turn; without ``wait``, only join its queue.

        Raises:
            ProtocolError: the client is in the queue already.
            ConnectionLostError: the client disconnected while it waited.
            RequestCancelledError: the client cancelled the request, or left the queue, while it waited.
        """
        turns, name = self._state.turns, request.lease
        try:
            at_once = turns.acquire(name, session.client.number)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if request.wait and not at_once:
            holder = turns.holder(name)
            blocker = None if holder is None else self._state.clients.get(holder)
            await self._waiters.for_turn(session, name, blocker, lambda: self._leave(session.client, name))
        return Answer(messages.Granted(request.id))

    async def yield_turn(self, session: Session, request: messages.Yield) -> Answer:
        """Pass a turn on to the next client in its queue, or leave the queue."""
        self._leave(session.client, request.lease)
        return Answer(messages.Done(request.id))

    def _leave(self, client: Client, name: str) -> None:
        self._effects.carry_out(self._state.turns.leave(name, client.number))
        self._waiters.left_turn(name, client.number)
