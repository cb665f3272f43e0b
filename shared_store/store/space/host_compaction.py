"""Compaction by the store itself, on devices whose memory the host can read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from shared_store.base.errors import WoolyError
from shared_store.memory import Mapping
from shared_store.memory.mapping import close_all
from shared_store.memory.transfer import Copy, HostTransfer, copy_blobs
from shared_store.store.devices.devices import Devices
from shared_store.store.space.compaction import Compactor
from shared_store.store.state.compactions import Compaction

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HostCompaction:
    """Copies blobs in a thread of the store."""

    _devices: Devices
    _compactor: Compactor

    async def run(self, device: str, *, share: float = 0.0, until: Callable[[], bool] = lambda: False) -> int:
        """Compact a device segment by segment until nothing more is gained; return bytes freed.

        Args:
            device: whose segments; the host must be able to read it.
            share: the least unused fraction of a segment.
            until: called before each segment; True stops.

        A failure is logged and ends the compaction: it is never required.
        """
        total = 0
        try:
            while not until() and (compaction := await self._compactor.begin(device, share=share)):
                try:
                    await asyncio.to_thread(self._copying(compaction))
                    _, freed = await self._compactor.end(compaction)
                finally:
                    self._compactor.cancel(compaction)
                if not freed:
                    break  # segments got readers; the next change of the state tries again
                total += freed
        except WoolyError as error:
            log.warning("cannot compact memory of %s: %s", device, error)
        return total

    def _copying(self, compaction: Compaction) -> Callable[[], None]:
        """Return a function that copies, for a thread. It has its own references to memory, and must be called."""
        plan = compaction.plan
        index = {segment: number for number, segment in enumerate(plan.sources)}
        mappings: list[Mapping] = []
        try:
            mappings.extend(self._devices.map(segment) for segment in (*plan.sources, compaction.segment))
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
