"""Begins and ends compactions. A client copies (``wooly compact``), or the store itself where the host can read.

Until a compaction ends, blobs keep their locations, and readers attach to the old segments. It ends in one step of the
event loop, so an attachment has all locations from before it or all from after it. Segments that got readers meanwhile
keep their blobs.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from shared_store.base.errors import (
    ConnectionLostError,
    DigestMismatchError,
    MemoryBackendError,
    OutOfMemoryError,
    ProtocolError,
)
from shared_store.memory import Unknown
from shared_store.store.devices.devices import Devices
from shared_store.store.effects import Effects
from shared_store.store.pace import Pace
from shared_store.store.session import Session
from shared_store.store.signals import Signals
from shared_store.store.space.compaction_plan import MAX_BLOBS, choose
from shared_store.store.state.compactions import Compaction, CompactionPlan, Source
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)

_FIRST_BLOBS = 2 * MAX_BLOBS
_FIRST_SEGMENTS = 64
"""The emptiest segments, with as many blobs, that are tried before all segments of a device are listed."""


@dataclass(frozen=True, eq=False)
class Compactor:
    """The compactions of a store."""

    _state: StoreState
    _devices: Devices
    _effects: Effects
    _signals: Signals

    async def begin(self, device: str, session: Session | None = None, *, share: float = 0.0) -> Compaction | None:
        """Choose segments to compact, and allocate the new one; return None if nothing would be gained.

        Args:
            device: whose segments.
            session: of the client that will copy; None: the store copies.
            share: the least unused fraction of a segment.

        Raises:
            ProtocolError: the client has not ended its last compaction.
            MemoryBackendError: the free memory of the device is unknown, and it has no limit.
        """
        state = self._state
        backend = await self._devices.find(device)
        client = None if session is None else session.client.number
        if client is not None and state.compactions.by(client):
            raise ProtocolError(f"client {client} has not ended the compaction that it began")
        free = await self._free_bytes(device)
        if state.grace.active:
            return None
        plan = await self._choose(device, share, free)
        if plan is None or state.grace.active or (session is not None and session.gone.is_set()):
            return None
        if not state.compactions.possible(plan):  # the state changed while the plan was made
            return None
        if client is not None and state.compactions.by(client):
            raise ProtocolError(f"client {client} has not ended the compaction that it began")
        compaction = state.compactions.begin(device, plan, client)
        try:
            memory = await self._devices.allocate(device, plan.nbytes)
        except OutOfMemoryError:  # the free bytes were an estimate
            self.cancel(compaction)
            return None
        except BaseException:
            self.cancel(compaction)
            raise
        if not state.compactions.running(compaction):
            backend.release(memory)
            raise ConnectionLostError("the client disconnected")
        self._devices.put(compaction.segment, device, memory)
        state.segments.fill(compaction.segment)
        return compaction

    async def _free_bytes(self, device: str) -> int:
        """Return the bytes that a new segment may have. Raises as :meth:`begin` does."""
        found = await self._devices.free_bytes(device)
        segments = self._state.segments
        limit = segments.limits.get(device)
        if isinstance(found, Unknown) and limit is None:
            raise MemoryBackendError(
                f"cannot compact {device}: its free memory is {found}; start the store with `--max-resident "
                f"{device}=SIZE`, which bounds the new segments instead"
            )
        spaces = [] if isinstance(found, Unknown) else [found]
        if limit is not None:
            spaces.append(limit - segments.used(device))
        return min(spaces)

    async def _choose(self, device: str, share: float, free: int) -> CompactionPlan | None:
        """Plan the next compaction: of the emptiest segments if these gain something, else of any.

        A store has very many blobs, so they are listed in slices of the event loop's time, and the plan is made in a
        thread. Its segments may have got readers meanwhile.
        """
        compactions, pace = self._state.compactions, Pace()
        sources: list[Source] = []
        blobs, tried = 0, 0
        for segment in compactions.candidates(device, share):
            if not self._state.segments.has(segment):
                continue
            sources.append(compactions.source(segment))
            blobs += len(sources[-1].blobs)
            await pace.done(len(sources[-1].blobs))
            if not tried and blobs >= _FIRST_BLOBS and len(sources) >= _FIRST_SEGMENTS:
                tried = len(sources)
                plan = await asyncio.to_thread(choose, tuple(sources), free=free)
                if plan is not None:
                    return plan
        return None if tried == len(sources) else await asyncio.to_thread(choose, sources, free=free)

    async def end(self, compaction: Compaction) -> tuple[int, int]:
        """Seal and verify the copies, and move the blobs to them; return bytes moved and freed.

        Raises:
            DigestMismatchError: a copy is wrong; the compaction was cancelled.
            MemoryBackendError: the new segment is still mapped for writing.
        """
        await self._devices.seal([compaction.segment])
        check = self._devices.check({compaction.segment: compaction.copies})
        wrong = await asyncio.to_thread(check.wrong)
        if wrong:
            self.cancel(compaction)
            blob, found = wrong[0]
            raise DigestMismatchError(f"the copy of blob {blob.digest.hex()[:16]} has digest {found.hex()[:16]}")
        if not self._state.compactions.running(compaction):
            raise ConnectionLostError("the client disconnected")
        moved, freed, effects = self._state.end_compaction(compaction)
        self._effects.carry_out(effects)
        if freed:
            log.info("compacted %s: moved %d bytes, freed %d", compaction.device, moved, freed)
            self._signals.event("compacted", device=compaction.device, moved_bytes=moved, freed_bytes=freed)
        self._signals.changed()
        return moved, freed

    def cancel(self, compaction: Compaction) -> None:
        """End a compaction without moving blobs. Idempotent."""
        self._effects.carry_out(self._state.cancel(compaction))
