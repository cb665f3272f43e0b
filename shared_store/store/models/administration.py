"""Handlers of ``Remove`` and ``Pin``: commands of operators on committed models."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.protocol import messages
from shared_store.store.effects import Effects
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState


@dataclass(frozen=True, eq=False)
class Administration:
    """Removes and pins models. A model may be named by an unambiguous prefix of its key."""

    _state: StoreState
    _effects: Effects
    _signals: Signals
    _keeper: KeeperLink

    async def remove(self, _session: Session, request: messages.Remove) -> Answer:
        """Remove a committed model without readers; answer with its key.

        Raises:
            ModelNotFoundError: no model has this prefix, or more than one.
            ModelInUseError: the model has readers, or is being published.
        """
        key, effects = self._state.remove(request.key)
        self._effects.carry_out(effects)
        self._signals.event("removed", key=key)
        self._signals.changed()
        return Answer(messages.Done(request.id, key))

    async def pin(self, _session: Session, request: messages.Pin) -> Answer:
        """Pin a model, so that it is not evicted, or unpin it; answer with its key.

        Raises:
            ModelNotFoundError: no model has this prefix, or more than one.
        """
        if request.pinned:
            key = self._state.models.pin(request.key, pinned=True)
        else:
            key, effects = self._state.unpin(request.key)
            self._effects.carry_out(effects)
        if key in self._state.committed:
            self._keeper.note(key)
        self._signals.event("pinned" if request.pinned else "unpinned", key=key)
        self._signals.changed()
        return Answer(messages.Done(request.id, key))
