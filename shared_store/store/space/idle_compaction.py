"""Compacts host memory while nothing else happens: what readers and removed models left loose is packed together.

Only what the host reads is compacted here; on a GPU ``wooly compact`` does it, because the store has no CUDA context.
"""

from __future__ import annotations

import asyncio
from typing import Final

from shared_store.store.state.models import State
from shared_store.store.store import Store

IDLE_S: Final = 5.0
"""Seconds without a change after which a store counts as idle."""


class Tidier:
    """Waits until a store is idle, and compacts its host memory then, once after each change."""

    def __init__(self, store: Store, share: float) -> None:
        """``share`` of a segment's bytes that must be unused before it is packed anew; 1 turns it off."""
        self._store = store
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._due: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = share >= 1

    def changed(self) -> None:
        """Something changed."""
        if self._due is not None:
            self._due.cancel()
        if not self._stopped:
            self._due = self._loop.call_later(IDLE_S, self._begin)

    async def stop(self) -> None:
        """Begin nothing more, and wait for what is under way."""
        self._stopped = True
        if self._due is not None:
            self._due.cancel()
        if self._task is not None:
            await self._task

    def _begin(self) -> None:
        self._due = None
        if self._idle() and (self._task is None or self._task.done()):
            self._task = self._loop.create_task(self._tidy())

    def _idle(self) -> bool:
        return not self._stopped and all(model.state is State.COMMITTED for model in self._store.models.all())

    async def _tidy(self) -> None:
        for device, backend in list(self._store.segments.backends.items()):
            if backend.host_readable:
                await self._store.compactor.here(device, share=self._share, until=lambda: not self._idle())
