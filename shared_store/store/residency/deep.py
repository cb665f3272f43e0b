"""The deep tier: swapped workloads whose processes leave their GPU as a whole, through helpers beside them.

A workload is taken off its GPU when it has been swapped for long, or when a start waits for memory of its GPU. It is
brought back before its grant is answered, in memory that is part of the grant.

Relies on the workload: while it says that it may be off (``deep``), nothing but a return calls CUDA in its processes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from shared_store.base.errors import ConnectionLostError, DeclinedError, WoolyError
from shared_store.base.text import one_line
from shared_store.base.workload_states import WorkloadState
from shared_store.protocol import messages
from shared_store.store.session import Session
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import Workload

log = logging.getLogger(__name__)

PREPARE_WITHIN_S: Final = 60.0
"""Seconds for a workload to unregister host memory."""

LOCK_WITHIN_S: Final = 10.0
"""Seconds for the work of a workload on its GPU to end. It has none while it is swapped."""

CHECKPOINT_WITHIN_S: Final = 120.0
"""Seconds for the driver to copy a workload to host memory."""

RESTORE_WITHIN_S: Final = 120.0
"""Seconds for the driver to copy a workload back."""

HELPER_WITHIN_S: Final = 30.0
"""Seconds to wait for another helper when the one of a workload that is off the GPU has ended."""

SPARED_S: Final = 600.0
"""Seconds for which a workload is not tried again after the driver refused."""

MAX_REASON: Final = 300
"""Characters of a helper's reason; the rest is cut."""


@dataclass(frozen=True)
class Candidate:
    """A workload that could be taken off its GPU: its id, its one GPU, and the monotonic seconds of its last swap."""

    workload: str
    device: str
    since: float


def choose(candidates: Iterable[Candidate], pressed: Collection[str], after_s: float, now: float) -> list[str]:
    """Return the ids of the workloads to take off their GPU.

    Args:
        candidates: workloads that are swapped and wait for nothing.
        pressed: GPUs for whose memory a start waits: the workload that left first goes, one at a time.
        after_s: seconds that a workload has been swapped before it goes without need; 0: never.
        now: monotonic seconds.
    """
    oldest = sorted(candidates, key=lambda one: (one.since, one.workload))
    chosen = [one.workload for one in oldest if after_s > 0 and now - one.since >= after_s]
    for device in sorted(pressed):
        first = next((one.workload for one in oldest if one.device == device), None)
        if first is not None and first not in chosen:
            chosen.append(first)
    return chosen


@dataclass
class Helper:
    """The helper of a workload: the number of its client, and why it cannot help."""

    client: int
    refusal: str = ""


class Deep:
    """The workloads that are off their GPU, and their helpers."""

    def __init__(
        self,
        state: StoreState,
        signals: Signals,
        session_of: Callable[[int], Session | None],
        after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``session_of`` returns the session of a connected client by its number. ``after_s``: see :func:`choose`."""
        self._state = state
        self._signals = signals
        self._session_of = session_of
        self._after_s = after_s
        self._now = clock
        self._helpers: dict[str, Helper] = {}
        self._spared: dict[str, float] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def offer(self, workload: Workload, helper: Helper, *, off: bool) -> None:
        """Use a helper for a workload. ``off``: the driver has its processes off the GPU already."""
        self._helpers[workload.id] = helper
        if off:
            self._state.workloads.take_off(workload)
        if helper.refusal:
            log.info("workload %s cannot be taken off its GPU: %s", workload.name, helper.refusal)
        self._signals.changed()

    def refusal(self, workload: Workload) -> str:
        """Return why a workload cannot be taken off its GPU; empty if it can, or says so itself."""
        helper = self._helper(workload)
        return "" if helper is None else helper.refusal

    def look(self, pressed: Collection[str]) -> None:
        """Take workloads off their GPU that it is time for. ``pressed``: as in :func:`choose`."""
        known = {one.id for one in self._state.workloads.all()}
        for table in (self._helpers, self._spared, self._locks):
            for gone in table.keys() - known:
                del table[gone]
        busy = {workload.devices[0] for one in self._tasks if (workload := self._state.workloads.get(one))}
        for number in choose(self._candidates(), set(pressed) - busy, self._after_s, self._now()):
            workload = self._state.workloads.get(number)
            if workload is not None:
                task = self._tasks[number] = asyncio.ensure_future(self._take_off(workload))
                task.add_done_callback(functools.partial(self._ended, number))

    def _ended(self, number: str, _task: asyncio.Task[None]) -> None:
        self._tasks.pop(number, None)

    async def stop(self) -> None:
        """End all work."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def bring_back(self, workload: Workload, session: Session) -> None:
        """Bring a workload back to its GPU, if it is off, for the client that speaks for it.

        Raises:
            DeclinedError: it has no helper, or the driver refuses. It is still off the GPU.
            TimedOutError: the helper did not answer.
        """
        async with self._lock(workload):
            if workload.off is None:
                return
            began, nbytes = self._now(), sum(workload.off.values())
            until = began + HELPER_WITHIN_S
            while True:
                helper = await self._wait_for_helper(workload, session, until)
                try:
                    await self._ask(helper.client, messages.Restore(0), RESTORE_WITHIN_S)
                    break
                except ConnectionLostError:
                    continue  # another one finishes what it began
            self._state.workloads.bring_back(workload)
            self._said("workload_restored", workload, nbytes, began)

    def _candidates(self) -> list[Candidate]:
        waiting = {wait.workload for wait in self._state.workloads.waits}
        return [
            Candidate(one.id, one.devices[0], one.since)
            for one in self._state.workloads.all()
            if one.state is WorkloadState.SWAPPED
            and one.deep
            and not one.starting
            and len(one.devices) == 1
            and one.id not in waiting
            and one.id not in self._tasks
            and self._spared.get(one.id, 0.0) <= self._now()
            and (helper := self._helper(one)) is not None
            and not helper.refusal
        ]

    async def _take_off(self, workload: Workload) -> None:
        """Take a workload off its GPU. A refusal is logged and counted."""
        began = self._now()
        try:
            async with self._lock(workload):
                helper = self._helper(workload)
                waits = self._state.workloads.wait_of(workload.id) is not None
                if helper is None or waits or workload.state is not WorkloadState.SWAPPED or not workload.deep:
                    return
                await self._ask(workload.client, messages.PrepareCheckpoint(0), PREPARE_WITHIN_S)
                waits = self._state.workloads.wait_of(workload.id) is not None
                if waits or workload.state is not WorkloadState.SWAPPED:
                    return  # it asked for memory meanwhile, or was granted it already
                await self._ask(helper.client, messages.Checkpoint(0, LOCK_WITHIN_S), CHECKPOINT_WITHIN_S)
                nbytes = sum(workload.private.values())
                self._state.workloads.take_off(workload)
        except WoolyError as error:
            self._spared[workload.id] = self._now() + SPARED_S
            self._state.workloads.counts.refused(error.code)
            reason = one_line(str(error), MAX_REASON)
            log.warning("%s was not taken off its GPU: %s [%s]", workload.name, reason, error.code)
            self._signals.event("checkpoint_refused", name=workload.name, code=error.code, reason=reason)
            self._signals.changed()
        else:
            self._said("workload_checkpointed", workload, nbytes, began)

    async def _ask(self, client: int, request: messages.StoreRequest, within_s: float) -> None:
        session = self._session_of(client)
        if session is None:
            raise ConnectionLostError("a process of it ended")
        await session.ask(request, within_s=within_s)

    def _said(self, event: str, workload: Workload, nbytes: int, began: float) -> None:
        took_s = self._now() - began
        log.info("%s: %s, %d bytes in %.3f s", event, workload.name, nbytes, took_s)
        self._state.workloads.counts.took(event.removeprefix("workload_"), took_s)
        self._signals.event(event, name=workload.name, bytes=nbytes, took_ms=round(took_s * 1e3))
        self._signals.changed()

    def _helper(self, workload: Workload) -> Helper | None:
        """Return the helper of a workload, if it is connected."""
        helper = self._helpers.get(workload.id)
        session = None if helper is None else self._session_of(helper.client)
        return None if session is None or session.gone.is_set() else helper

    async def _wait_for_helper(self, workload: Workload, session: Session, until: float) -> Helper:
        while (helper := self._helper(workload)) is None or helper.refusal:
            left = until - self._now()
            if left <= 0 or session.gone.is_set():
                raise DeclinedError(f"{workload.name} is off its GPU, and has no helper that could bring it back")
            try:
                async with asyncio.timeout(left):
                    await session.first_of(self._signals.next_change())
            except TimeoutError:
                continue
        return helper

    def _lock(self, workload: Workload) -> asyncio.Lock:
        return self._locks.setdefault(workload.id, asyncio.Lock())
