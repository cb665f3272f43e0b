"""Evicts models: removes them from the state, and reports each."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from shared_store.store.effects import Effects
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Evictor:
    """Evicts models that the caller chose."""

    _state: StoreState
    _effects: Effects
    _signals: Signals

    def evict(self, keys: Iterable[str], reason: str) -> None:
        """Evict committed models without readers."""
        for key in keys:
            manifest = self._state.committed[key].manifest
            _, effects = self._state.remove(key)
            self._effects.carry_out(effects)
            self._state.counts.add("evictions")
            log.info("evicted %s: %s", manifest.name or key, reason)
            self._signals.event("evicted", key=key, name=manifest.name, bytes=manifest.nbytes, reason=reason)
        self._signals.changed()

    def evict_asleep(self, keys: Iterable[str]) -> None:
        """Evict those of the models whose readers all sleep: they read the host copies."""
        for key in self._state.asleep(keys):
            self.evict([key], "its readers sleep")
