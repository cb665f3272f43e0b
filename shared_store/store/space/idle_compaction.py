"""Compacts host memory while the store is idle: space that evicted and removed models left in segments is freed.

On a GPU ``wooly compact`` does it, because the store has no CUDA context.
"""

from __future__ import annotations

import asyncio
from typing import Final

from shared_store.store.devices.devices import Devices
from shared_store.store.space.host_compaction import HostCompaction
from shared_store.store.state.models import State
from shared_store.store.state.store_state import StoreState

IDLE_S: Final = 5.0
"""Seconds without a change after which a store is idle."""


class IdleCompaction:
    """Waits until the store is idle, and compacts its host memory then, once after each change."""

    def __init__(self, state: StoreState, devices: Devices, compaction: HostCompaction, share: float) -> None:
        """``share``: the least unused fraction of a segment; 1 disables."""
        self._state = state
        self._devices = devices
        self._compaction = compaction
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._due: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = share >= 1

    def changed(self) -> None:
        """Start the wait anew, because the state changed."""
        if self._due is not None:
            self._due.cancel()
        if not self._stopped:
            self._due = self._loop.call_later(IDLE_S, self._begin)

    async def stop(self) -> None:
        """Begin no further compaction, and wait for the one in progress."""
        self._stopped = True
        if self._due is not None:
            self._due.cancel()
        if self._task is not None:
            await self._task

    def _begin(self) -> None:
        self._due = None
        if self._idle() and (self._task is None or self._task.done()):
            self._task = self._loop.create_task(self._compact())

    def _idle(self) -> bool:
        return not self._stopped and all(model.state is State.COMMITTED for model in self._state.models.all())

    async def _compact(self) -> None:
        for device, backend in list(self._devices.backends.items()):
            if backend.host_readable:
                await self._compaction.run(device, share=self._share, until=lambda: not self._idle())
