"""Maps each request to its one handler, and errors of handlers to replies."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from shared_store.base.errors import PermissionDeniedError, ProtocolError, WoolyError
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.store.observe.latency import RequestTimes
from shared_store.store.roles import ADMIN_REQUESTS
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.state.counts import Counts

log = logging.getLogger(__name__)

R = TypeVar("R", bound=messages.Request)

Handler = Callable[[Session, Any, OwnedFds], Awaitable[Answer]]
"""Answers a request of one class (the table's key), which came with descriptors that the caller closes."""

Table = Mapping[type[messages.Request], Handler]
"""The handler of each class of request."""


def plain(handle: Callable[[Session, R], Awaitable[Answer]]) -> Handler:
    """Return the handler of a request that comes without descriptors."""

    def handler(session: Session, request: R, _fds: OwnedFds) -> Awaitable[Answer]:
        return handle(session, request)

    return handler


@dataclass(frozen=True, eq=False)
class Dispatch:
    """Answers requests by a table of handlers."""

    table: Table
    _times: RequestTimes
    _counts: Counts
    _signals: Signals

    async def answer(self, session: Session, request: messages.Request, fds: OwnedFds) -> Answer:
        """Call the request's handler; answer with its error if it fails. The descriptors stay owned by the caller."""
        began = time.monotonic()
        try:
            if (action := ADMIN_REQUESTS.get(type(request))) is not None:
                session.require_admin(action)
            answer = await self.table[type(request)](session, request, fds)
        except WoolyError as error:
            if isinstance(error, ProtocolError):
                self._counts.add("protocol_errors")
            elif isinstance(error, PermissionDeniedError):
                self._denied(session, request, error)
            answer = Answer(messages.Failed(request.id, error.code, str(error)))
        self._times.add(request, time.monotonic() - began)
        return answer

    def _denied(self, session: Session, request: messages.Request, error: PermissionDeniedError) -> None:
        """Count and log a request that its client may not make."""
        client = session.client
        log.warning("%s: %s", client, error)
        self._counts.add("permission_denials")
        tag = str(type(request).__struct_config__.tag)
        self._signals.event("permission_denied", request=tag, uid=client.uid, pid=client.pid)
