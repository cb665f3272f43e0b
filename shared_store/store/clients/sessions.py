"""Sessions begin and end. When one ends, everything that its client used is released."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from shared_store.store.activity_pages import ActivityPages
from shared_store.store.effects import Effects
from shared_store.store.session import Session
from shared_store.store.signals import Signals
from shared_store.store.space.evictor import Evictor
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sessions:
    """Adds clients to the state, and removes them. Finds the session of a client, to ask it for something."""

    _state: StoreState
    _effects: Effects
    _signals: Signals
    _evictor: Evictor
    _pages: ActivityPages
    _connected: dict[int, Session] = field(default_factory=dict)

    def of(self, client: int) -> Session | None:
        """Return the session of a connected client, by its number."""
        return self._connected.get(client)

    def begin(self, session: Session) -> None:
        """Add a client that was greeted."""
        self._state.clients[session.client.number] = session.client
        self._connected[session.client.number] = session
        self._signals.changed()

    def end(self, session: Session) -> None:
        """Remove a client whose connection ended. Idempotent."""
        state, client = self._state, session.client
        self._connected.pop(client.number, None)
        if client.number not in state.clients:
            return
        self._pages.drop(client.number)
        models = state.models.of(client.number)
        for model in models:
            if model.publisher == client.number:
                log.warning("%s disconnected while publishing %s", client, model.name or model.key)
                self._signals.event("publish_aborted", key=model.key, name=model.name, pid=client.pid)
        for compaction in state.compactions.by(client.number):
            log.warning("%s disconnected during a compaction of %s", client, compaction.device)
        for workload in state.workloads.spoken_for(client.number):
            log.info("workload %s is gone: %s disconnected", workload.name, client)
            self._signals.event("workload_left", name=workload.name, state=workload.state.value)
        read = [model.key for model in models if client.number in model.readers]
        self._effects.carry_out(state.lost(client))
        self._evictor.drop_asleep(read)
        self._signals.changed()
