"""Making room: for what a publisher plans, under the device's limit, and for what it fills, on the device itself.

First, in host memory, by packing what lies loosely; then by dropping models that nobody reads (see
:mod:`shared_store.store.space.eviction`). A store that was just restarted drops nothing: its readers may be on their
way back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from shared_store.base.errors import OutOfMemoryError
from shared_store.memory.backend import Segment
from shared_store.store.space.eviction import CachedModel, evict
from shared_store.store.state.models import Model, State

if TYPE_CHECKING:
    from shared_store.store.store import Store

MAX_NAMED: Final = 5

PACK_WITHIN_S: Final = 20.0
"""Seconds after which no further segment is packed for a publisher, who waits for an answer meanwhile."""


class Room:
    """What a store does when memory is short."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._turns: dict[str, asyncio.Lock] = {}

    async def pack(self, device: str, needed: int) -> None:
        """Compact host memory until the limit leaves ``needed`` bytes free, if that could be enough."""
        await self._pack(device, lambda: self._short(device, needed))

    def make(self, device: str, needed: int, asker: str) -> None:
        """Drop models until the limit leaves ``needed`` bytes free, for the model with the key ``asker``.

        Raises:
            OutOfMemoryError: it cannot be done; nothing was dropped.
        """
        short = self._short(device, needed)
        if short > 0 and not self._evict(device, short, "limit"):
            limit = self._store.segments.limits[device]
            raise OutOfMemoryError(
                f"no room on {device}: {needed} bytes are needed, {max(0, limit - self._store.segments.used(device))} "
                f"of the limit of {limit} are free; {self._kept(device, asker)}, or raise --max-resident"
            )

    async def allocate(self, device: str, nbytes: int, asker: str) -> Segment:
        """Allocate a segment for a model, in a thread; dropping others when the device is full.

        Raises:
            OutOfMemoryError: there is no room, and none can be made.
        """
        backend = self._store.segments.backend(device)
        try:
            return await asyncio.to_thread(backend.create, nbytes)
        except OutOfMemoryError:
            pass
        async with self._turns.setdefault(device, asyncio.Lock()):  # two would drop models for one shortage
            await self._pack(device, lambda: nbytes - backend.free_bytes())
            # What is free is an estimate: where it was wrong, the second try makes room for all of the segment.
            for estimated in (True, False):
                try:
                    return await asyncio.to_thread(backend.create, nbytes)
                except OutOfMemoryError as error:
                    full = error
                free = await asyncio.to_thread(backend.free_bytes) if estimated else 0
                if not self._evict(device, max(1, nbytes - free), "device full"):
                    break
            else:
                return await asyncio.to_thread(backend.create, nbytes)
            raise OutOfMemoryError(f"{full}; {self._kept(device, asker)}") from full

    async def _pack(self, device: str, short: Callable[[], int]) -> None:
        """Compact host memory while bytes are ``short``, if as many are unused."""
        segments, now = self._store.segments, asyncio.get_running_loop().time
        if segments.backend(device).host_readable and 0 < short() <= sum(segments.unused(device)):
            until = now() + PACK_WITHIN_S
            await self._store.compactor.here(device, until=lambda: short() <= 0 or now() > until)

    def _short(self, device: str, needed: int) -> int:
        """Bytes that are missing under the limit; zero or less where there are enough."""
        limit = self._store.segments.limits.get(device)
        return 0 if limit is None else self._store.segments.used(device) + needed - limit

    def _evict(self, device: str, needed: int, reason: str) -> bool:
        store = self._store
        if store.recovering:
            return False
        models = [
            CachedModel(model.key, model.last_used, len(model.readers), model.pinned)
            for model in store.models.all()
            if model.state is State.COMMITTED and model.device == device
        ]
        chosen = evict(models, store.segments.occupied(device), needed)
        if chosen is None:
            return False
        store.evict(chosen, reason)
        return True

    def _kept(self, device: str, asker: str) -> str:
        """Why no more can leave, and what to do."""
        if self._store.recovering:
            return "the store was just restarted and drops nothing yet: try again in a few seconds"
        models = [model for model in self._store.models.all() if model.device == device and model.key != asker]
        idle = [model for model in models if model.state is State.COMMITTED and not model.readers]
        kinds = {
            "in use": [model for model in models if model.readers],
            "being published": [model for model in models if model.state is State.PUBLISHING],
            "pinned": [model for model in idle if model.pinned],
            "not enough": [model for model in idle if not model.pinned],
        }
        told = "; ".join(f"{kind}: {self._names(found)}" for kind, found in kinds.items() if found)
        return (
            f"{told or 'nothing is there to leave'}; stop a reader (`wooly status`), unpin a model (`wooly unpin KEY`)"
        )

    def _names(self, models: Iterable[Model]) -> str:
        texts = []
        for model in models:
            known = self._store.committed.get(model.key)
            size = f" ({known.manifest.nbytes} bytes)" if known else ""
            texts.append(f"{model.name or model.key[:12]}{size}")
        more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
        return ", ".join(texts[:MAX_NAMED]) + more
