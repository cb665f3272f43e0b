"""Acts on the policy: grants memory to those that wait for it, evicts models, and asks workloads to leave.

It decides after each change of the state while a request waits, whenever the policy says, and now and then: steps of
engines and memory of other processes change without a message. After a restart of the store it decides nothing until
workloads had time to join again, because their memory is not known before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from shared_store.base.errors import ConnectionLostError, OutOfMemoryError
from shared_store.store.residency import policy
from shared_store.store.residency.authority import Authority
from shared_store.store.residency.deep import Deep
from shared_store.store.residency.departing import Departing
from shared_store.store.residency.node_view import NodeView, waits_by_name
from shared_store.store.session import Session, cancelled
from shared_store.store.signals import Signals
from shared_store.store.state.sharing import sharing
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import AWAY, Wait, Workload

log = logging.getLogger(__name__)

REJOIN_S: Final = 5.0
"""Seconds that workloads have to join a restarted store. They retry at least once a second."""

PAUSE_S: Final = 0.005
"""Seconds between two decisions, however often the state changes."""

LOOK_S: Final = 0.1
"""Seconds between two decisions while a request waits."""

KEEP_S: Final = 5.0
"""Seconds between two decisions while no request waits, for the reserve."""

PUSH: Final = "room"
"""Kind of the pushes that tell a client why it waits."""


class Evict(Protocol):
    """Evicts models that no client reads."""

    def __call__(self, device: str, nbytes: int, /) -> bool:
        """Evict models to free bytes of a device; False, without evicting any, if that is not possible."""


class Confirmed(Protocol):
    """Waits until released memory is free."""

    async def __call__(self, device: str, /) -> None:
        """Wait for all released memory of a device."""


@dataclass(eq=False)
class Waiting:
    """A client that waits for memory, and the names of those that were asked to leave for it."""

    wait: Wait
    session: Session
    granted: asyncio.Future[None]
    asked: dict[str, None] = field(default_factory=dict)
    preempted: tuple[str, ...] = ()
    revoked: bool = False


class Swapper:
    """Grants memory, and has it freed."""

    def __init__(
        self,
        state: StoreState,
        view: NodeView,
        authority: Authority,
        departing: Departing,
        signals: Signals,
        *,
        deep: Deep,
        evict: Evict,
        confirmed: Confirmed,
        settings: policy.Settings,
        start_within_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._view = view
        self._authority = authority
        self._departing = departing
        self._signals = signals
        self._deep = deep
        self._evict = evict
        self._confirmed = confirmed
        self._settings = settings
        self._start_within_s = start_within_s
        self._now = clock
        self._waiting: list[Waiting] = []
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._again = False
        self._held_until = 0.0
        self._evict_again = 0.0
        self._stopped = False
        signals.observe(self.changed)

    def hold(self) -> None:
        """Decide nothing until workloads had time to join: the store was restarted."""
        self._held_until = self._now() + REJOIN_S

    @property
    def holds_s(self) -> float:
        """Seconds until workloads had time to join."""
        return max(0.0, self._held_until - self._now(), self._state.grace.left_s)

    def changed(self) -> None:
        """Decide again if a request waits: the state changed."""
        if self._state.workloads.waits:
            self.wake()

    def wake(self) -> None:
        """Decide as soon as possible."""
        self._again = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is None and not self._stopped:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End all work."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._departing.stop()
        await self._deep.stop()
        self._authority.close()

    async def take(self, session: Session, wait: Wait) -> tuple[str, ...]:
        """Wait until a client may allocate; return the names of those that left for it.

        A workload has a grant then. A publisher has its memory reserved until :meth:`Workloads.end_wait`.

        Raises:
            RequestCancelledError: the client cancelled its request.
            ConnectionLostError: the client disconnected.
            OutOfMemoryError: a start waited for longer than it may. The message says what for.
        """
        within_s = self._start_within_s if wait.start else None
        waiting = Waiting(wait, session, asyncio.get_running_loop().create_future())
        self._state.workloads.wait(wait)
        self._waiting.append(waiting)
        self.wake()
        gone = asyncio.ensure_future(session.gone.wait())
        try:
            with session.pending.waiting(lambda: self._revoke(waiting)):
                await asyncio.wait((waiting.granted, gone), timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
            passed = not gone.done()
        finally:
            gone.cancel()
            self._waiting.remove(waiting)
            if not waiting.granted.done() or waiting.granted.cancelled():
                self._state.workloads.end_wait(wait)
                self._signals.changed()
        if waiting.revoked:
            raise cancelled()
        if not waiting.granted.done():
            waiting.granted.cancel()
            if passed:
                raise OutOfMemoryError(
                    f"no memory was free within {within_s:.0f} s, the store's WOOLY_START_TIMEOUT. {wait.text}".rstrip()
                )
            raise ConnectionLostError("the client disconnected while it waited")
        return waiting.preempted

    def _revoke(self, waiting: Waiting) -> None:
        """End a wait as cancelled, unless it was granted."""
        if not waiting.granted.done():
            waiting.revoked = True
            waiting.granted.cancel()
            self._state.workloads.end_wait(waiting.wait)

    async def _run(self) -> None:
        """Decide until nothing is left to decide now, and set the time of the next decision."""
        try:
            at: float | None = None
            while self._again:
                self._again = False
                at = await self._decide()
                if self._again:
                    await asyncio.sleep(PAUSE_S)
            self._set_timer(at)
        except Exception:
            log.exception("internal error in a decision about memory; deciding again in %g s", KEEP_S)
            self._set_timer(self._now() + KEEP_S)
        finally:
            self._task = None
        if self._again:  # it woke after the loop
            self.wake()

    def _set_timer(self, at: float | None) -> None:
        workloads = self._state.workloads
        if not workloads.waits and not workloads.all():
            return
        latest = self._now() + (LOOK_S if workloads.waits else KEEP_S)
        delay = max(0.0, min(latest, latest if at is None else at) - self._now())
        self._timer = asyncio.get_running_loop().call_later(delay, self.wake)

    async def _decide(self) -> float | None:
        """Decide once; return when to decide again, or None."""
        if (held := self.holds_s) > 0:
            for waiting in self._waiting:
                self._explain(waiting, (), "the store was just restarted, and waits for workloads to join again")
            return self._now() + held
        await self._authority.measure()
        now = self._now()
        snapshot = self._view.take(now, may_evict=now >= self._evict_again)
        decision = policy.decide(snapshot, self._settings, now)
        waits = waits_by_name(self._view, self._state.workloads.waits)
        by_wait = {id(one.wait): one for one in self._waiting}
        by_name = {name: by_wait[id(wait)] for name, wait in waits.items() if id(wait) in by_wait}
        for said in decision.waits:
            if said.name in by_name:
                self._explain(by_name[said.name], said.blocked_by, said.text)
        for victim in decision.victims:
            self._leave(victim, by_name.get(victim.for_request))
        await self._carry_out(decision, by_name)
        self._deep.look(self._pressed())
        return decision.wake_at

    def _pressed(self) -> set[str]:
        """Return the devices for whose memory a start waits."""
        return {
            device
            for waiting in self._waiting
            if waiting.wait.start and waiting.wait.blocked_by and not waiting.granted.done()
            for device in waiting.wait.needs
        }

    async def _carry_out(self, decision: policy.Decision, waiting: Mapping[str, Waiting]) -> None:
        """Grant memory, and evict models for it. After an eviction, decide anew with what is free then."""
        if decision.reclaim and await self._reclaim(decision.reclaim):
            return  # else the reserve stays used
        for grant in decision.grants:
            if grant.name in waiting:
                if grant.reclaim:
                    await self._reclaim(grant.reclaim)
                    return
                self._grant(waiting[grant.name])

    async def _reclaim(self, nbytes: Mapping[str, int]) -> bool:
        """Evict models, and wait until their memory is free; return whether there were any."""
        evicted = [device for device, needed in nbytes.items() if self._evict(device, needed)]
        for device in evicted:
            await self._confirmed(device)
        if not evicted:
            self._evict_again = self._now() + LOOK_S
        self._again = True
        return bool(evicted)

    def _grant(self, waiting: Waiting) -> None:
        if waiting.granted.done():
            return
        wait, workloads = waiting.wait, self._state.workloads
        workload = workloads.get(wait.workload)
        if wait.publishes:
            workloads.reserve(wait)
        elif workload is None:
            return
        else:
            needs = self._view.needs(wait, sharing(self._state))
            workloads.end_wait(wait)
            workloads.grant(workload, needs)
        away = {one.name for one in workloads.all() if one.state in AWAY}
        waiting.preempted = tuple(name for name in waiting.asked if name in away)
        waited = max(0.0, self._now() - wait.since)
        name = self._view.name(wait)
        log.info("%s may allocate, after %.3f s", name, waited)
        self._signals.event(
            "memory_granted", name=name, waited_ms=round(waited * 1e3), preempted=", ".join(waiting.preempted)
        )
        waiting.granted.set_result(None)
        self._signals.changed()

    def _leave(self, victim: policy.Victim, waiting: Waiting | None) -> None:
        """Ask a victim to leave, for a request or for the reserve."""
        workload = self._named(victim.name)
        if workload is None or workload.asked:
            return
        self._departing.begin(workload, victim.reason, active=victim.active)
        if waiting is not None:
            waiting.asked[victim.name] = None

    def _explain(self, waiting: Waiting, blocked_by: tuple[str, ...], text: str) -> None:
        """Record why a request waits, and push the reason if it has changed."""
        wait = waiting.wait
        if blocked_by != wait.blocked_by or not wait.text:
            wait.blocked_by = blocked_by
            waiting.session.push(PUSH, text)
            name = self._view.name(wait)
            log.info("%s waits for memory: %s", name, text)
            self._signals.event("memory_waits", name=name, reason=text)
        wait.text = text

    def _named(self, name: str) -> Workload | None:
        return next((one for one in self._state.workloads.all() if one.name == name), None)
