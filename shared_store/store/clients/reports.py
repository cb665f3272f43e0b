"""Handlers of ``Report`` and ``ReportFallback``: clients report private bytes and fallbacks, for the status."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from shared_store.base.errors import ModelNotFoundError, ProtocolError
from shared_store.base.keys import KEY_LENGTH
from shared_store.base.text import one_line
from shared_store.protocol import messages
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)

MAX_TEXT = 500
"""Characters of a name or a reason; the rest is cut."""


@dataclass(frozen=True, eq=False)
class Reports:
    """Private bytes of readers, and fallbacks."""

    _state: StoreState
    _signals: Signals

    async def report(self, session: Session, request: messages.Report) -> Answer:
        """Record the private bytes of a reader.

        Raises:
            ProtocolError: the number is negative.
            ModelNotFoundError: the client does not read the model.
        """
        if request.private_bytes < 0:
            raise ProtocolError("negative private bytes")
        if not self._state.reads(session.client, request.key):
            raise ModelNotFoundError(f"{session.client} does not read {one_line(request.key, KEY_LENGTH)}")
        session.client.private_bytes[request.key] = request.private_bytes
        self._signals.changed()
        return Answer(messages.Done(request.id))

    async def report_fallback(self, session: Session, request: messages.ReportFallback) -> Answer:
        """Count a model that was loaded the engine's stock way."""
        client = session.client
        name, reason = one_line(request.name, MAX_TEXT), one_line(request.reason, MAX_TEXT)
        self._state.counts.add("fallbacks")
        log.warning("%s fell back to stock loading of %s: %s", client, name, reason)
        self._signals.event("fallback", name=name, reason=reason, pid=client.pid)
        self._signals.changed()
        return Answer(messages.Done(request.id))
