"""Handlers of ``Report`` and ``ReportFallback``: clients report private bytes and fallbacks, for the status."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from shared_store.base.errors import ProtocolError
from shared_store.protocol import messages
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Reports:
    """Private bytes of readers, and fallbacks."""

    _state: StoreState
    _signals: Signals

    async def report(self, session: Session, request: messages.Report) -> Answer:
        """Record the private bytes of a reader.

        Raises:
            ProtocolError: the number is negative.
        """
        if request.private_bytes < 0:
            raise ProtocolError("negative private bytes")
        session.client.private_bytes[request.key] = request.private_bytes
        self._signals.changed()
        return Answer(messages.Done(request.id))

    async def report_fallback(self, session: Session, request: messages.ReportFallback) -> Answer:
        """Count a model that was loaded the engine's stock way."""
        client = session.client
        self._state.counts.add("fallbacks")
        log.warning("%s fell back to stock loading of %s: %s", client, request.name, request.reason)
        self._signals.event("fallback", name=request.name, reason=request.reason, pid=client.pid)
        self._signals.changed()
        return Answer(messages.Done(request.id))
