"""Admits allocations: a publisher's plan under the device's limit, and a segment on the device itself.

Frees memory first by compaction, where the host can read it, then by eviction (see
:mod:`shared_store.store.space.eviction`). During the grace period nothing is evicted.

Released memory is free once the keeper has closed it, so an allocation waits for that, and only then tries again or
evicts more. One allocation at a time frees memory of a device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Final

from shared_store.base.errors import ConnectionLostError, OutOfMemoryError
from shared_store.memory import Segment, Unknown
from shared_store.store.devices.devices import Devices
from shared_store.store.keeper_link.confirmations import Confirmations
from shared_store.store.space.eviction import CachedModel, evict, evict_one
from shared_store.store.space.evictor import Evictor
from shared_store.store.space.host_compaction import HostCompaction
from shared_store.store.state.models import Model, State
from shared_store.store.state.residency import FILES, HOST
from shared_store.store.state.store_state import StoreState

MAX_NAMED: Final = 5
"""Most models that an error lists by name."""

COMPACT_WITHIN_S: Final = 20.0
"""Seconds after which no further segment is compacted for a publisher that waits for its answer."""


class Admission:
    """Frees memory for publishers."""

    def __init__(
        self,
        state: StoreState,
        devices: Devices,
        evictor: Evictor,
        compaction: HostCompaction,
        confirmations: Confirmations,
    ) -> None:
        self._state = state
        self._devices = devices
        self._evictor = evictor
        self._compaction = compaction
        self._confirmations = confirmations
        self._locks: dict[str, asyncio.Lock] = {}

    async def compact(self, device: str, needed: int) -> None:
        """Compact host memory until ``needed`` bytes fit under the limit, if compaction could free enough."""
        await self._compact(device, lambda: self._state.segments.missing(device, needed))

    def admit(self, device: str, needed: int, key: str) -> None:
        """Evict models until ``needed`` bytes for the model ``key`` fit under the limit.

        Raises:
            OutOfMemoryError: eviction cannot free enough; nothing was evicted.
        """
        segments = self._state.segments
        missing = segments.missing(device, needed)
        if missing > 0 and not self._evict(device, missing, "limit"):
            limit = segments.limits[device]
            raise OutOfMemoryError(
                f"not enough memory on {device}: {needed} bytes are needed, "
                f"{max(0, limit - segments.used(device))} of the limit of {limit} are free; "
                f"{self._blockers(device, key)}, or raise --max-resident"
            )

    def evict(self, device: str, nbytes: int) -> bool:
        """Evict models to free bytes that a workload needs; False, without evicting any, if that is not possible."""
        return self._evict(device, nbytes, "memory for a workload")

    async def allocate(
        self, device: str, nbytes: int, key: str, gone: asyncio.Event, wanted: Callable[[], bool] = lambda: True
    ) -> Segment:
        """Allocate memory for a segment of the model ``key``; compact and evict if the device is full.

        Args:
            device: where.
            nbytes: size of the segment.
            key: the model's weight key, for an error.
            gone: set when the client disconnects. It ends a wait for memory, and nothing is evicted any more.
            wanted: asked before each eviction; False ends the attempt with the device's error.

        Raises:
            OutOfMemoryError: the device is full, and neither can free enough.
            ConnectionLostError: the client disconnected while it waited.
        """
        lock = self._locks.setdefault(device, asyncio.Lock())
        if not lock.locked():  # else this allocation would take the memory that was freed for another
            if self._state.segments.over_limit(device):
                await _unless(gone, self._confirmations.wait(device))
            try:
                return await self._devices.allocate(device, nbytes)
            except OutOfMemoryError:
                pass
        await _unless(gone, lock.acquire())
        try:
            return await self._allocate(device, nbytes, key, gone, wanted)
        finally:
            lock.release()

    async def _allocate(
        self, device: str, nbytes: int, key: str, gone: asyncio.Event, wanted: Callable[[], bool]
    ) -> Segment:
        """Allocate memory on a full device.

        Models are evicted in steps, each only after an allocation failed although all memory was free that was released
        before. If the free bytes are known, one step is enough unless another process takes memory meanwhile.
        """
        await _unless(gone, self._confirmations.wait(device))
        backend, evicted = self._devices.backend(device), False
        await self._compact(device, lambda: _missing(nbytes, backend.free_bytes()))
        while True:
            try:
                return await self._devices.allocate(device, nbytes)
            except OutOfMemoryError as error:
                full = error
            free = await self._devices.free_bytes(device)
            if overdue := self._confirmations.overdue(device):
                raise OutOfMemoryError(
                    f"{full}; {overdue} bytes were released, but the keeper does not answer and has not closed them: "
                    "see `wooly status`"
                ) from full
            if gone.is_set() or not wanted():
                raise full
            if not self._evict_for(device, nbytes, free, first=not evicted):
                raise OutOfMemoryError(f"{full}; {self._blockers(device, key)}") from full
            evicted = True
            await _unless(gone, self._confirmations.wait(device))

    async def _compact(self, device: str, missing: Callable[[], int]) -> None:
        """Compact host memory while bytes are ``missing``, if at least as many are unused."""
        segments, now = self._state.segments, asyncio.get_running_loop().time
        if self._devices.backend(device).host_readable and 0 < missing() <= sum(segments.unused(device)):
            until = now() + COMPACT_WITHIN_S
            await self._compaction.run(device, until=lambda: missing() <= 0 or now() > until)

    def _evict(self, device: str, needed: int, reason: str) -> bool:
        """Evict models to free ``needed`` bytes; return False, without evicting any, if that is not possible."""
        if self._state.grace.active:
            return False
        if device in {HOST, FILES}:
            needed -= self._evictor.drop_spare_host_copies(needed, device)
        return self._evict_all(evict(self._cached(device), self._state.segments.occupied(device), needed), reason)

    def _evict_for(self, device: str, nbytes: int, free: int | Unknown, *, first: bool) -> bool:
        """Evict models so that ``nbytes`` may fit on a full device; return False if none can be evicted.

        Args:
            device: where.
            nbytes: size of the segment.
            free: free bytes of the device.
            first: nothing was evicted for this segment yet.
        """
        if (missing := _missing(nbytes, free)) > 0:
            return self._evict(device, missing, "device full")
        if self._state.grace.active:
            return False
        # Unknown, or wrong: the device has refused what should have fit.
        occupied = self._state.segments.occupied(device)
        return self._evict_all(evict_one(self._cached(device), occupied, nbytes if first else None), "device full")

    def _evict_all(self, chosen: Sequence[str] | None, reason: str) -> bool:
        if chosen is None:
            return False
        self._evictor.evict(chosen, reason)
        return True

    def _cached(self, device: str) -> list[CachedModel]:
        """Return the committed models that have memory of a device."""
        return [
            CachedModel(model.key, model.last_used, len(model.readers), model.pinned)
            for model in self._state.models.all()
            if model.state is State.COMMITTED and self._uses(device, model)
        ]

    def _uses(self, device: str, model: Model) -> bool:
        """Whether a model has memory of a device: of its own, or host copies that alone have its bytes."""
        return model.device == device or (device in {HOST, FILES} and self._state.in_lower_tier(model.key, device))

    def _blockers(self, device: str, key: str) -> str:
        """Return the models that cannot be evicted, and the next steps, for an error."""
        if self._state.grace.active:
            return "the store was just restarted and evicts nothing yet: try again in a few seconds"
        models = [model for model in self._state.models.all() if self._uses(device, model) and model.key != key]
        idle = [model for model in models if model.state is State.COMMITTED and not model.readers]
        kinds = {
            "in use": [model for model in models if model.readers],
            "being published": [model for model in models if model.state is State.PUBLISHING],
            "pinned": [model for model in idle if model.pinned],
            "not enough": [model for model in idle if not model.pinned],
        }
        listed = "; ".join(f"{kind}: {self._names(found)}" for kind, found in kinds.items() if found)
        return (
            f"{listed or 'there is no model to evict'}; stop a reader (`wooly status`), "
            "unpin a model (`wooly unpin KEY`)"
        )

    def _names(self, models: Iterable[Model]) -> str:
        texts = []
        for model in models:
            known = self._state.committed.get(model.key)
            size = f" ({known.manifest.nbytes} bytes)" if known else ""
            texts.append(f"{model.name or model.key[:12]}{size}")
        more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
        return ", ".join(texts[:MAX_NAMED]) + more


async def _unless(gone: asyncio.Event, wait: Coroutine[object, object, object]) -> None:
    """Wait for another client or the keeper. Raises :class:`ConnectionLostError` if ``gone`` is set before."""
    waits, disconnected = asyncio.ensure_future(wait), asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait((waits, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not waits.done():
            raise ConnectionLostError("the client disconnected while it waited for memory")
        waits.result()
    finally:
        disconnected.cancel()
        waits.cancel()


def _missing(nbytes: int, free: int | Unknown) -> int:
    """Return the bytes that must become free to allocate ``nbytes``; 0 if that cannot be told."""
    return 0 if isinstance(free, Unknown) else nbytes - free
