"""Writes the store's state to the catalog after changes. Changes in quick succession are written as one.

The more a snapshot costs, the longer the next one waits: at most a fraction of :data:`SHARE` of the event loop's time
goes into snapshots, whatever the store's size.
"""

from __future__ import annotations

import asyncio
import logging
from time import thread_time
from typing import Final

from shared_store.catalog import Catalog
from shared_store.store.observe.catalog_documents import CatalogDocuments

log = logging.getLogger(__name__)

SETTLE_S: Final = 0.05
"""Least seconds from a change to the write."""

SHARE: Final = 0.05
"""Most of the event loop's time that snapshots may take, while changes never end."""


class Mirror:
    """Writes snapshots to the catalog, :data:`SETTLE_S` after a change or later."""

    def __init__(self, catalog: Catalog, documents: CatalogDocuments) -> None:
        """Nothing is written before :meth:`start`."""
        self._catalog = catalog
        self._documents = documents
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the catalog with a first snapshot, and write changes from here on."""
        await self._documents.catch_up()
        self._catalog.start(self._documents.take())
        self._task = asyncio.get_running_loop().create_task(self._write())

    def changed(self) -> None:
        """Schedule a write, because the state changed."""
        self._changed.set()

    def stop(self) -> None:
        """Write no further snapshot."""
        if self._task is not None:
            self._task.cancel()

    async def _write(self) -> None:
        pause = SETTLE_S
        while True:
            await self._changed.wait()
            await asyncio.sleep(pause)
            self._changed.clear()
            began = thread_time()
            try:
                await self._documents.catch_up()
                self._catalog.update(self._documents.take())
            except Exception:
                # A defect must not end the mirror while the catalog's state is "ok".
                log.exception("cannot take a snapshot for the catalog")
            pause = max(SETTLE_S, (thread_time() - began) / SHARE)
