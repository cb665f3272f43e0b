"""Compactions: which are under way, and what it takes to begin and to end one.

Who copies is a client (``wooly compact``), or the store itself where the host reads the memory: both begin and end
alike. Until the end everything is as before; the old segments are kept, and attached to. The end is one step in the
store's loop, so that an attachment has places from before it or from after it. Readers that came meanwhile map the old
segments, which then stay where they are.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared_store.base.errors import (
    ConnectionLostError,
    DigestMismatchError,
    OutOfMemoryError,
    ProtocolError,
    WoolyError,
)
from shared_store.memory import Mapping
from shared_store.memory.mapping import close_all
from shared_store.memory.transfer import Copy, HostTransfer, copy_blobs
from shared_store.store.space.compaction_plan import CompactionPlan, choose
from shared_store.store.state.digest_check import mapping_of

if TYPE_CHECKING:
    from shared_store.store.state.records import Client
    from shared_store.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compaction:
    """One under way: its new segment, and the client that copies (None: the store)."""

    token: str
    device: str
    plan: CompactionPlan
    segment: int
    client: int | None


class Compactor:
    """The compactions of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._running: dict[int, Compaction] = {}
        self._numbers = itertools.count(1)

    async def begin(self, device: str, client: Client | None = None, *, share: float = 0.0) -> Compaction | None:
        """Choose what to copy, and allocate where to; None when nothing would be gained.

        ``share``: of a segment's bytes, what must be unused for it to be looked at.

        Raises:
            ProtocolError: the client has not ended its last one.
            PermissionDeniedError: the store could not check what a client of another uid copies.
        """
        segments = self._store.segments
        backend = await self._store.device(device)
        if client is not None and any(one.client == client.number for one in self._running.values()):
            raise ProtocolError(f"client {client.number} has not ended the compaction that it began")
        if client is not None and not backend.host_readable:
            self._store.own_uid_only(client, "compact GPU memory")
        room = await asyncio.to_thread(backend.free_bytes)
        if (limit := segments.limits.get(device)) is not None:
            room = min(room, limit - segments.used(device))
        if self._store.recovering or (client is not None and client.gone.is_set()):
            return None
        plan = choose(segments.sources(device, self._store.unmapped, share), room=room)
        if plan is None:
            return None
        token = f"compaction {next(self._numbers)}"
        segment = segments.begin_compaction(device, token, plan)
        compaction = Compaction(token, device, plan, segment, client.number if client else None)
        self._running[segment] = compaction
        try:
            memory = await asyncio.to_thread(backend.create, plan.nbytes)
        except OutOfMemoryError:  # the room was an estimate
            self.cancel(compaction)
            return None
        except BaseException:
            self.cancel(compaction)
            raise
        if segment not in self._running:
            backend.release(memory)
            raise ConnectionLostError("the client left")
        segments.fill(segment, memory)
        return compaction

    def of(self, client: Client, segment: int) -> Compaction:
        """The compaction that a client began, by its new segment. Raises :class:`ProtocolError`."""
        compaction = self._running.get(segment)
        if compaction is None or compaction.client != client.number:
            raise ProtocolError(f"client {client.number} compacts nothing into segment {segment}")
        return compaction

    async def end(self, compaction: Compaction) -> tuple[int, int]:
        """Seal and check the copies, and let the blobs be there; returns bytes moved and freed.

        Raises:
            DigestMismatchError: a copy is wrong; everything is as before, and the compaction is over.
            MemoryBackendError: the new segment is still mapped for writing.
        """
        segments = self._store.segments
        segments.seal([compaction.segment])
        wrong = await asyncio.to_thread(segments.check_moves(compaction.segment, compaction.plan).wrong)
        if wrong:
            self.cancel(compaction)
            blob, found = wrong[0]
            raise DigestMismatchError(f"the copy of blob {blob.digest.hex()[:16]} has digest {found.hex()[:16]}")
        if self._running.pop(compaction.segment, None) is None:
            raise ConnectionLostError("the client left")
        return self._store.switch(compaction)

    def cancel(self, compaction: Compaction) -> None:
        """Nothing comes of it. Idempotent."""
        if self._running.pop(compaction.segment, None) is not None:
            self._store.segments.drop(compaction.token)

    def lost(self, client: int) -> None:
        """A client is gone, and with it what it was copying to."""
        for compaction in [one for one in self._running.values() if one.client == client]:
            log.warning("client %d left in the middle of a compaction of %s", client, compaction.device)
            self.cancel(compaction)

    # The store as the one who copies.

    async def here(self, device: str, *, share: float = 0.0, until: Callable[[], bool] = lambda: False) -> int:
        """Compact a device that the host reads, step by step until nothing is gained any more; returns bytes freed.

        ``until`` is asked before each step. A failure ends it with a warning: compaction is never a must.
        """
        total = 0
        try:
            while not until() and (compaction := await self.begin(device, share=share)):
                try:
                    await asyncio.to_thread(self._copying(compaction))
                    _, freed = await self.end(compaction)
                finally:
                    self.cancel(compaction)
                if not freed:
                    break  # readers came; the next change asks again
                total += freed
        except WoolyError as error:
            log.warning("memory of %s was not compacted: %s", device, error)
        return total

    def _copying(self, compaction: Compaction) -> Callable[[], None]:
        """What copies, in a thread; it has a hold of its own on the segments."""
        segments, plan = self._store.segments, compaction.plan
        backend = segments.backend(compaction.device)
        index = {segment: number for number, segment in enumerate(plan.sources)}
        mappings: list[Mapping] = []
        try:
            for segment in (*plan.sources, compaction.segment):
                memory = segments.segment(segment).memory
                assert memory is not None  # noqa: S101 - settled, and just filled
                mappings.append(mapping_of(backend, memory))
        except BaseException:
            close_all(mappings)
            raise
        copies = [Copy(index[move.source], move.start, move.offset, move.blob.nbytes) for move in plan.moves]

        def copy() -> None:
            try:
                copy_blobs(HostTransfer(), mappings[:-1], mappings[-1], copies)
            finally:
                close_all(mappings)

        return copy
