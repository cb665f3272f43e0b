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

    def drop_asleep(self, keys: Iterable[str]) -> None:
        """Remove those of the models whose readers all sleep as clients of protocol 1 do. No eviction: they return."""
        for key in self._state.asleep(keys):
            manifest = self._state.committed[key].manifest
            _, effects = self._state.remove(key)
            self._effects.carry_out(effects)
            log.info("%s left %s: its readers sleep", manifest.name or key, manifest.device)
            self._signals.event("removed", key=key)
            self._signals.changed()

    def drop_spare_host_copies(self, needed: int, device: str) -> int:
        """Drop host copies that no client needs, to free ``needed`` bytes of a device; return the bytes freed.

        No model is evicted.
        """
        freed, effects = self._state.drop_spare_host_copies(needed, device)
        if effects:
            self._effects.carry_out(effects)
            self._signals.changed()
        return freed
