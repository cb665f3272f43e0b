"""Handlers of ``Open`` and ``Leave``: clients become readers, publishers or waiters of models, and cease to be."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from shared_store.base.errors import ProtocolError
from shared_store.base.keys import KEY_LENGTH, is_key
from shared_store.base.text import one_line
from shared_store.protocol import messages
from shared_store.store.devices.devices import Devices
from shared_store.store.effects import Effects
from shared_store.store.models.attach import Attach
from shared_store.store.recovery.arrivals import Arrivals
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.space.evictor import Evictor
from shared_store.store.state.clients import Client
from shared_store.store.state.effects import MayPublish, Refused
from shared_store.store.state.models import Asker
from shared_store.store.state.store_state import StoreState
from shared_store.store.waiting import Waiters

log = logging.getLogger(__name__)

MAX_NAME = 500
"""Characters of a model's or an engine's name; the rest is cut."""


@dataclass(frozen=True, eq=False)
class Opening:
    """Opens and leaves models."""

    _state: StoreState
    _devices: Devices
    _effects: Effects
    _signals: Signals
    _waiters: Waiters
    _arrivals: Arrivals
    _evictor: Evictor
    _attach: Attach

    async def open(self, session: Session, request: messages.Open) -> Answer:
        """Attach a client to a model, or grant it the publication; wait while another client publishes.

        Raises:
            ProtocolError: not a weight key, or the client has opened the model before.
            UnknownDeviceError: there is no such device on this node.
            ModelNotFoundError: the model is not in the store, and no client publishes it.
            ConnectionLostError: the client disconnected while it waited.
            RequestCancelledError: the client cancelled the request, or left the model, while it waited.
            MemoryBackendError: a descriptor cannot be duplicated.
        """
        if not is_key(request.key):
            raise ProtocolError(f"a weight key has {KEY_LENGTH} hexadecimal digits")
        await self._devices.find(request.device)
        await self._arrivals.wait(request.key, session)
        session.pending.check()
        asker = Asker(session.client.number, request.publish)
        name, engine = one_line(request.name, MAX_NAME), one_line(request.engine, MAX_NAME)
        outcomes = self._state.open(request.key, asker, name=name, engine=engine, device=request.device)
        self._signals.changed()
        outcome = (
            outcomes[0]
            if outcomes
            else await self._waiters.for_model(
                session,
                request.key,
                self._publisher(request.key),
                lambda: self._leave(session.client, request.key),
            )
        )
        if isinstance(outcome, Refused):
            raise outcome.error
        if isinstance(outcome, MayPublish):
            log.info("%s publishes %s", session.client, name or request.key)
            self._signals.event("publish_started", key=request.key, name=name, pid=session.client.pid)
            return Answer(messages.Granted(request.id))
        if request.key not in self._state.committed:  # withdrawn between the commit and now: open the key anew
            self._leave(session.client, request.key)
            return await self.open(session, request)
        return self._attach.attached(session, request.key, request.id)

    async def leave(self, session: Session, request: messages.Leave) -> Answer:
        """Remove a reader or waiter; abort the publication if it was the publisher."""
        self._leave(session.client, request.key)
        return Answer(messages.Done(request.id))

    def _leave(self, client: Client, key: str) -> None:
        self._effects.carry_out(self._state.leave(client, key))
        self._waiters.left_model(key, client.number)
        self._evictor.drop_asleep([key])
        self._signals.changed()

    def _publisher(self, key: str) -> Client | None:
        model = self._state.models.get(key)
        return self._state.clients.get(model.publisher) if model and model.publisher is not None else None
