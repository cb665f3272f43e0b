"""Writes the store's state to the catalog after changes. Changes in quick succession are written as one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shared_store.catalog import Catalog, Snapshot

SETTLE_S = 0.05
"""Seconds from a change to the write."""


class Mirror:
    """Writes snapshots to the catalog, :data:`SETTLE_S` after a change."""

    def __init__(self, catalog: Catalog, take: Callable[[], Snapshot]) -> None:
        """``take`` returns the snapshot; called in the running event loop, which owns the state."""
        self._catalog = catalog
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._due: asyncio.TimerHandle | None = None
        self._stopped = False

    def changed(self) -> None:
        """Schedule a write, because the state changed."""
        if self._due is None and not self._stopped:
            self._due = self._loop.call_later(SETTLE_S, self._write)

    def stop(self) -> None:
        """Cancel the scheduled write, and schedule no further one."""
        self._stopped = True
        if self._due is not None:
            self._due.cancel()

    def _write(self) -> None:
        self._due = None
        self._catalog.update(self._take())
