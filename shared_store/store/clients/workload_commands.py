"""Handlers of ``MoveWorkload``, ``SetPriority`` and ``ExplainWorkload``: commands about workloads, by their names."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Final

from shared_store.base.errors import ConfigError, ConnectionLostError, DeclinedError, WoolyError
from shared_store.base.workload_states import WorkloadState
from shared_store.protocol import messages
from shared_store.protocol.messages.identity import PRIORITIES
from shared_store.store.clients.ownership import own_workload, tell_settings
from shared_store.store.clients.sessions import Sessions
from shared_store.store.residency.departing import Departing
from shared_store.store.residency.explanation import Explanations
from shared_store.store.residency.swapper import Swapper
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import AWAY, Workload

log = logging.getLogger(__name__)

RETURN_WITHIN_S: Final = 540.0
"""Seconds that a workload that a command swaps in has to be resident."""


@dataclass(frozen=True, eq=False)
class WorkloadCommands:
    """Commands about workloads. A workload's own user may give them, and administrators."""

    _state: StoreState
    _signals: Signals
    _sessions: Sessions
    _departing: Departing
    _swapper: Swapper
    _explanations: Explanations
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def move(self, session: Session, request: messages.MoveWorkload) -> Answer:
        """Swap a workload out or in; with ``wait``, answer once that is done.

        Raises:
            WorkloadNotFoundError: no workload has this name.
            PermissionDeniedError: it is another user's, and the client is no administrator.
            DeclinedError: the workload must not be swapped out, or declines.
            TimedOutError: it did not move in time.
            ConnectionLostError: it disconnected, or the client that waits.
            RequestCancelledError: the client cancelled the request while it waited.
        """
        workload = own_workload(self._state, session, request.name, "move")
        task = self._move_out(workload) if request.out else self._move_in(workload)
        if task is not None and request.wait:
            await _end_of(task, session)
        return Answer(messages.Done(request.id, workload.state.value))

    async def set_priority(self, session: Session, request: messages.SetPriority) -> Answer:
        """Set the priority of a workload.

        Raises:
            ConfigError: there is no such priority.
            WorkloadNotFoundError: no workload has this name.
            PermissionDeniedError: it is another user's, or above what its user may claim, and the client is no
                administrator.
        """
        if request.priority not in PRIORITIES:
            raise ConfigError(f"priorities are {PRIORITIES[0]} (highest) to {PRIORITIES[-1]}")
        workload = own_workload(self._state, session, request.name, "set the priority of")
        allowed = self._state.workloads.allowed_priority(workload.uid, request.priority)
        if allowed != request.priority:
            session.require_admin(f"raise the priority of {workload.name} above {allowed} (--max-priority)")
        workload.priority = request.priority
        tell_settings(workload, self._sessions.of)
        log.info("%s set the priority of %s to %d", session.client, workload.name, workload.priority)
        self._signals.event("priority_set", name=workload.name, priority=workload.priority)
        self._signals.changed()
        self._swapper.wake()
        return Answer(messages.Done(request.id))

    async def explain(self, _session: Session, request: messages.ExplainWorkload) -> Answer:
        """Answer why a workload is where it is. Raises :class:`WorkloadNotFoundError`."""
        workload = self._state.workloads.named(request.name)
        lines, blocked_by = self._explanations.of(workload, time.monotonic())
        return Answer(messages.Explanation(request.id, lines, blocked_by))

    def _move_out(self, workload: Workload) -> asyncio.Task[None] | None:
        if workload.state in AWAY:
            return None
        if workload.refusal:
            raise DeclinedError(f"{workload.name} is not swappable: {workload.refusal}")
        if workload.state is WorkloadState.RETURNING:
            raise DeclinedError(f"{workload.name} is returning: try again once it is resident")
        return self._departing.begin(workload, "by a command", active=True)

    def _move_in(self, workload: Workload) -> asyncio.Task[None] | None:
        if workload.state is WorkloadState.RESIDENT and not workload.asked:
            return None
        task = asyncio.ensure_future(self._return(workload))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _return(self, workload: Workload) -> None:
        session = self._sessions.of(workload.client)
        if session is None:
            raise ConnectionLostError(f"{workload.name} disconnected")
        await session.ask(messages.SwapIn(0, "by a command"), within_s=RETURN_WITHIN_S)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Log an error that perhaps nobody waits for."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, WoolyError):
            log.warning("a workload was not swapped in: %s [%s]", error, error.code)


async def _end_of(task: asyncio.Task[None], session: Session) -> None:
    """Wait for the end of a move, which goes on without the client that waits. Raises what the move raised."""
    done = asyncio.Event()
    task.add_done_callback(lambda _: done.set())
    await session.first_of(done)
    if not task.done():
        raise ConnectionLostError("the client disconnected while it waited")
    task.result()
