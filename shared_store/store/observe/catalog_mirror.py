"""Keeps the catalog up with the store: changes that follow each other closely are written as one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shared_store.catalog import Catalog, Snapshot

SETTLE_S = 0.05


class Mirror:
    """Writes snapshots of the store to the catalog, a moment after something changed."""

    def __init__(self, catalog: Catalog, take: Callable[[], Snapshot]) -> None:
        """``take`` makes the snapshot; it is called in the running loop, which owns the store's state."""
        self._catalog = catalog
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._due: asyncio.TimerHandle | None = None
        self._stopped = False

    def changed(self) -> None:
        """Something changed."""
        if self._due is None and not self._stopped:
            self._due = self._loop.call_later(SETTLE_S, self._write)

    def stop(self) -> None:
        """Write nothing more."""
        self._stopped = True
        if self._due is not None:
            self._due.cancel()

    def _write(self) -> None:
        self._due = None
        self._catalog.update(self._take())
