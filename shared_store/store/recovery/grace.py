"""Ends the grace period after a restart."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from shared_store.store.effects import Effects
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.recovery.arrivals import Arrivals
from shared_store.store.recovery.offers import Offers
from shared_store.store.signals import Signals
from shared_store.store.space.evictor import Evictor
from shared_store.store.state.grace import GRACE_S
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class GracePeriod:
    """Forgets models that no client offered in time. A model that is being offered prolongs the wait for it."""

    _state: StoreState
    _keeper: KeeperLink
    _signals: Signals
    _arrivals: Arrivals
    _offers: Offers
    _evictor: Evictor
    _effects: Effects

    def start(self) -> None:
        """End the period once its time is over."""
        asyncio.get_running_loop().call_later(GRACE_S, self._end)

    def _end(self) -> None:
        grace = self._state.grace
        if grace.active:  # it was extended
            asyncio.get_running_loop().call_later(grace.left_s, self._end)
            return
        for key in grace.end(self._offers.being_offered()):
            self._arrivals.settled(key)
            if key not in self._state.committed:
                self._keeper.forget(key)
                detail = f"{key}: no client had it any more"
                log.warning("model lost: %s", detail)
                self._signals.event("model_lost", detail=detail)
        if grace.awaited:
            asyncio.get_running_loop().call_later(GRACE_S, self._end)
            return
        for number in grace.segments:
            if not self._state.segments.has(number):
                self._keeper.release(number)
        self._effects.carry_out(self._state.leave_devices())
        self._evictor.drop_asleep(list(self._state.committed))
        self._signals.changed()
