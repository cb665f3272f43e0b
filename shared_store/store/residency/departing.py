"""Asks workloads to leave their devices, with deadlines. One that declines or does not answer is spared for a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from shared_store.base.errors import (
    ConnectionLostError,
    DeclinedError,
    TimedOutError,
    UnsupportedError,
    WoolyError,
)
from shared_store.base.text import one_line
from shared_store.protocol import messages
from shared_store.store.session import Session
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import AWAY, STILL, Workload

log = logging.getLogger(__name__)

DRAIN_WITHIN_S: Final = 10.0
"""Seconds in which a workload must have declined or begun to leave."""

LEAVE_WITHIN_S: Final = 120.0
"""Seconds in which a workload that began to leave must be away."""

SPARED_S: Final = {DeclinedError.code: 1.0, TimedOutError.code: 30.0}
"""Seconds for which a workload is not asked again, by the code of its refusal."""

SPARED_OTHERWISE_S: Final = 10.0

MAX_REASON: Final = 300
"""Characters of a client's reason; the rest is cut."""


class Departing:
    """The workloads that are asked to leave."""

    def __init__(self, state: StoreState, signals: Signals, session_of: Callable[[int], Session | None]) -> None:
        """``session_of`` returns the session of a connected client by its number."""
        self._state = state
        self._signals = signals
        self._session_of = session_of
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.drain_within_s = DRAIN_WITHIN_S
        self.leave_within_s = LEAVE_WITHIN_S

    def begin(self, workload: Workload, reason: str, *, active: bool) -> asyncio.Task[None]:
        """Ask a workload to leave, unless that is under way. The task raises as :meth:`_ask` does.

        Args:
            workload: a workload that is resident.
            reason: for people.
            active: also with requests running or waiting.
        """
        task = self._tasks.get(workload.id)
        if task is None:
            self._state.workloads.taken(workload)
            task = self._tasks[workload.id] = asyncio.ensure_future(self._ask(workload, reason, active=active))
            task.add_done_callback(lambda done: self._done(workload.id, done))
        return task

    async def stop(self) -> None:
        """Withdraw all requests."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _ask(self, workload: Workload, reason: str, *, active: bool) -> None:
        """Ask a workload to leave, and wait until it is away.

        Raises:
            DeclinedError: it declines.
            TimedOutError: it did not begin to leave, or is not away, in time.
            UnsupportedError: its client serves no such request. It is not swappable from now on.
            ConnectionLostError: its client disconnected.
            WoolyError: it failed to leave.
        """
        try:
            await self._answer(workload, reason, active=active)
        except ConnectionLostError:
            raise
        except WoolyError as error:
            self._refused(workload, error)
            raise
        finally:
            workload.asked = False
            self._signals.changed()

    async def _answer(self, workload: Workload, reason: str, *, active: bool) -> None:
        session = self._session_of(workload.client)
        if session is None:
            raise ConnectionLostError(f"{workload.name} disconnected")
        log.info("asking %s to leave: %s", workload.name, reason)
        self._signals.event("swap_asked", name=workload.name, reason=reason)
        request = messages.SwapOut(0, reason, self.drain_within_s, active)
        swaps = workload.swaps
        answer = asyncio.ensure_future(session.ask(request, within_s=self.leave_within_s))
        try:
            await asyncio.wait([answer], timeout=self.drain_within_s)
            if answer.done() or workload.state not in STILL:
                await answer
                if workload.state not in AWAY and workload.swaps == swaps:  # it may have returned already
                    raise WoolyError(f"{workload.name} said that it left, and did not report it")
                return
        finally:
            if not answer.done():
                answer.cancel()
                await asyncio.wait([answer])
        raise TimedOutError(f"{workload.name} did not begin to leave within {self.drain_within_s:g} s")

    def _refused(self, workload: Workload, error: WoolyError) -> None:
        """Count a refusal, and spare the workload for a while."""
        text = one_line(str(error), MAX_REASON)
        self._state.workloads.declined(workload, error.code, SPARED_S.get(error.code, SPARED_OTHERWISE_S))
        if isinstance(error, UnsupportedError):
            workload.refusal = text
        log.warning("%s did not leave: %s [%s]", workload.name, text, error.code)
        self._signals.event("swap_refused", name=workload.name, code=error.code, reason=text)

    def _done(self, workload: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(workload, None)
        if not task.cancelled():
            task.exception()  # _refused has logged it; whoever waits for the task gets it too
