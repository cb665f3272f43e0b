"""Frees host memory where it is short: host copies are dropped or moved to files, and nothing else.

Host memory is short when copies exceed their budget, or the machine has little left. Spare copies are dropped first:
their segments are on their device. Copies of segments that left are moved to files after that, of the model that was
used least recently first. Clients that sleep have descriptors of these copies: they are told, and exchange them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from shared_store.base.errors import WoolyError
from shared_store.memory import Unknown
from shared_store.store.devices.devices import Devices
from shared_store.store.effects import Effects
from shared_store.store.session import Session
from shared_store.store.signals import Signals
from shared_store.store.space.admission import Admission
from shared_store.store.space.evictor import Evictor
from shared_store.store.space.host_budget import HostBudget
from shared_store.store.state.residency import FILES, HOST
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)

PUSH: Final = "host_copies"
"""The kind of the push to clients whose host copies moved. Its detail is the model's key."""

LOOK_S: Final = 5.0
"""Seconds between two looks at the machine's free memory."""

LEAST_FREE: Final = 256 << 20
"""Free bytes of the machine, beside what no store allocates, below which host memory is short."""


class HostPressure:
    """Looks at host memory at intervals, and after changes of the state."""

    def __init__(
        self,
        state: StoreState,
        devices: Devices,
        effects: Effects,
        signals: Signals,
        admission: Admission,
        evictor: Evictor,
        budget: HostBudget,
        session_of: Callable[[int], Session | None],
    ) -> None:
        """``session_of``: returns the session of a client by its number."""
        self._state = state
        self._devices = devices
        self._effects = effects
        self._signals = signals
        self._admission = admission
        self._evictor = evictor
        self._budget = budget
        self._session_of = session_of
        self._task: asyncio.Task[None] | None = None
        self._refused: set[int] = set()
        self._never = asyncio.Event()  # no client waits for this

    def start(self) -> None:
        """Look from here on."""
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _watch(self) -> None:
        while True:
            try:
                await self.relieve()
            except WoolyError as error:
                log.warning("cannot free host memory: %s; trying again in %g s", error, LOOK_S)
            except Exception:
                # A defect must not end the watch: host memory would fill up without a word.
                log.exception("internal error while freeing host memory; trying again in %g s", LOOK_S)
            await asyncio.sleep(LOOK_S)

    async def relieve(self) -> None:
        """Drop and move host copies until host memory is not short, or there are none."""
        if not self._state.segments.copied - self._state.segments.filed or self._state.grace.active:
            return
        short = await self._short()
        if short > 0 and (freed := self._evictor.drop_spare_host_copies(short, HOST)):
            log.info("dropped %d bytes of spare host copies: host memory is short", freed)
        while await self._short() > 0 and (segment := self._next()) is not None:
            if not await self._move(segment):
                self._refused.add(segment)
        self._refused.intersection_update(self._state.segments.copied)

    async def _short(self) -> int:
        """Return the bytes of host copies that should not be in host memory."""
        free = await self._devices.free_bytes(HOST)
        lacking = 0 if isinstance(free, Unknown) else LEAST_FREE - free
        return max(self._budget.missing(0), lacking)

    def _next(self) -> int | None:
        """Return the segment whose host copy moves next."""
        state = self._state
        found = [one for one in state.tiers.movable() if one not in self._refused]
        return min(found, key=lambda one: (state.last_used(one), one), default=None)

    async def _move(self, segment: int) -> bool:
        """Move the host copy of a segment to a file. Returns False if there is no space, or its bytes are wrong."""
        state = self._state
        moving = state.tiers.begin_moving(segment)
        try:
            nbytes = state.segments.at(moving.file).nbytes
            memory = await self._admission.allocate(FILES, nbytes, str(segment), self._never)
            self._devices.put(moving.file, FILES, memory)
            state.segments.fill(moving.file)
            if self._devices.memory(moving.host) is None:
                return False  # it was dropped
            await asyncio.to_thread(self._devices.copying(moving.host, FILES, memory))
            contents = state.segments.contents(segment) if state.segments.has(segment) else []
            wrong = await asyncio.to_thread(self._devices.check({moving.file: contents}).wrong)
            if wrong:
                log.error("segment %d: its host copy has wrong bytes, and stays where it is", segment)
                return False
            moved, effects = state.end_moving(moving)
        except WoolyError as error:
            log.warning("cannot move the host copy of segment %d to a file: %s", segment, error)
            return False
        finally:
            self._effects.carry_out(state.cancel_moving(moving))
        self._effects.carry_out(effects)
        if moved:
            self._tell(segment)
        self._signals.changed()
        return True

    def _tell(self, segment: int) -> None:
        """Report the move to the catalog, and to the clients that need the copy."""
        entry = self._state.segments.at(segment)
        log.info("the host copy of segment %d is a file now: %d bytes", segment, entry.nbytes)
        self._signals.event("segment_filed", device=entry.device, segment=segment, bytes=entry.nbytes)
        for client, key in self._state.tiers.needing(segment):
            if (session := self._session_of(client)) is not None:
                session.push(PUSH, key)
