"""Handlers of ``Acquire`` and ``Yield``: turns."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.base.errors import ProtocolError
from shared_store.protocol import messages
from shared_store.store.effects import Effects
from shared_store.store.session import Answer, Session
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
        """
        turns, name = self._state.turns, request.lease
        try:
            at_once = turns.acquire(name, session.client.number)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if request.wait and not at_once:
            holder = turns.holder(name)
            await self._waiters.for_turn(session, name, None if holder is None else self._state.clients.get(holder))
        return Answer(messages.Granted(request.id))

    async def yield_turn(self, session: Session, request: messages.Yield) -> Answer:
        """Pass a turn on to the next client in its queue, or leave the queue."""
        self._effects.carry_out(self._state.turns.leave(request.lease, session.client.number))
        return Answer(messages.Done(request.id))
