"""Handlers of ``JoinCompute`` and ``SetShare``: workloads take part in turns of their devices, and get shares."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from shared_store.base.errors import ConfigError, UnsupportedError
from shared_store.base.text import one_line
from shared_store.protocol import messages
from shared_store.protocol.messages.identity import MAX_SHARE
from shared_store.store.clients.ownership import own_workload, tell_settings
from shared_store.store.clients.workloads import MAX_TEXT
from shared_store.store.compute.compute import Compute
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ComputeRequests:
    """Workloads at the arbiter, and their shares."""

    _state: StoreState
    _signals: Signals
    _compute: Compute
    _session_of: Callable[[int], Session | None]

    async def join(self, session: Session, request: messages.JoinCompute) -> Answer:
        """Answer with the descriptors of a compute page and of a socket to the arbiter.

        Raises:
            WorkloadNotFoundError: the client speaks for no workload with this id.
            UnsupportedError: this store has no arbiter.
            MemoryBackendError: the kernel refuses the page or the socket.
        """
        self._check()
        workload = self._state.workloads.by(session.client, request.workload)
        fds = self._compute.join(workload, one_line(request.ungated, MAX_TEXT))
        return Answer(messages.ComputeJoined(request.id), fds)

    async def set_share(self, session: Session, request: messages.SetShare) -> Answer:
        """Set the share of a workload.

        Raises:
            ConfigError: there is no such share.
            UnsupportedError: this store has no arbiter.
            WorkloadNotFoundError: no workload has this name.
            PermissionDeniedError: it is another user's, and the client is no administrator.
        """
        self._check()
        if not (request.percent == 0 or 1 <= request.percent <= MAX_SHARE):
            raise ConfigError("shares are 1 to 100 percent, or 0 for an equal part of what the others leave")
        workload = own_workload(self._state, session, request.name, "set the share of")
        workload.share = request.percent
        tell_settings(workload, self._session_of)
        log.info("%s set the share of %s to %g percent", session.client, workload.name, workload.share)
        self._signals.event("share_set", name=workload.name, percent=f"{workload.share:g}")
        self._signals.changed()
        return Answer(messages.Done(request.id))

    def _check(self) -> None:
        if not self._compute.enabled:
            raise UnsupportedError("this store has no arbiter: it was started with `--no-arbiter`, or WOOLY_ARBITER=0")
