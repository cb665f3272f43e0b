"""The store's interface to the catalog. Calls never block on the network; a thread writes.

Relies on one Redis server (not Redis Cluster) of version 6.2 or later, or on Valkey.

Does not promise: that the catalog is current at any moment (:meth:`Catalog.flush` waits for that), that an event is in
the stream exactly once (its ``seq`` identifies it), or anything while :attr:`Catalog.state` is ``down``.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Literal

from shared_store.catalog.pending import Pending
from shared_store.catalog.server_url import without_credentials
from shared_store.catalog.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared_store.catalog.schema import Snapshot

CatalogState = Literal["ok", "down"]

_log = logging.getLogger(__name__)


class Catalog:
    """Mirrors the snapshots of a node into the server at ``url``.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        lease_ttl_s: seconds after which a node without a heartbeat counts as gone.
        events_maxlen: approximate number of events that the cluster's stream retains.
        on_change: called with the new state, in the catalog's thread.

    Raises:
        ConfigError: ``url`` is not the URL of a Redis server.
    """

    def __init__(
        self,
        url: str,
        *,
        lease_ttl_s: float = 15.0,
        events_maxlen: int = 10_000,
        on_change: Callable[[CatalogState], None] | None = None,
    ) -> None:
        self._display_url = without_credentials(url)
        self._on_change = on_change
        self._pending = Pending()
        self._writer = Writer(
            url, self._pending, ttl_s=lease_ttl_s, events_maxlen=events_maxlen, up=self._up, down=self._down
        )
        self._thread: threading.Thread | None = None
        self._state: CatalogState = "down"
        # Used in the catalog's thread only.
        self._down_since: float | None = None
        self._trouble: str | None = None

    @property
    def url(self) -> str:
        """Return the server's URL without user name and password."""
        return self._display_url

    @property
    def state(self) -> CatalogState:
        """Return ``ok`` if everything is written; ``down`` before that, and from the first failure on."""
        return self._state

    def start(self, snapshot: Snapshot) -> None:
        """Start to mirror. Returns at once, whether the server answers or not."""
        self.update(snapshot)
        self._thread = threading.Thread(target=self._writer.run, name="wooly-catalog", daemon=True)
        self._thread.start()

    def update(self, snapshot: Snapshot) -> None:
        """Replace the snapshot to mirror. Any thread may call it. Never blocks."""
        self._pending.put_snapshot(snapshot)

    def event(self, kind: str, **fields: str | int) -> None:
        """Queue an event for the stream. Any thread may call it. Never blocks.

        The queue is bounded. When the oldest events are dropped, an event ``events_dropped`` with their ``count``
        replaces them.
        """
        self._pending.put_event(kind, fields)

    def flush(self, timeout_s: float) -> bool:
        """Wait until the server confirmed everything so far. Return False after the time-out."""
        return self._pending.flush(timeout_s)

    def stop(self, timeout_s: float = 2.0) -> None:
        """Remove the node from the catalog if the server answers within ``timeout_s`` seconds, and end the thread.

        If the server does not answer, the node's time to live expires, and other nodes remove its entries.
        """
        self._pending.stop(timeout_s)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _up(self) -> None:
        self._trouble = None
        if self._down_since is not None:
            down_ms = round((time.monotonic() - self._down_since) * 1000)
            self._down_since = None
            self.event("catalog_restored", down_ms=down_ms)
            _log.warning("catalog %s is complete again after %.1f s", self.url, down_ms / 1000)
        self._set_state("ok")

    def _down(self, trouble: str) -> None:
        if self._down_since is None:
            self._down_since = time.monotonic()
        if trouble != self._trouble:
            self._trouble = trouble
            _log.warning("catalog %s is down: %s", self.url, trouble)
        self._set_state("down")

    def _set_state(self, state: CatalogState) -> None:
        if state == self._state:
            return
        self._state = state
        if self._on_change is not None:
            try:
                self._on_change(state)
            except Exception:  # noqa: BLE001 - whatever it raises
                # The callback may fail while the store shuts down; the mirror continues.
                _log.exception("catalog %s: on_change(%r) failed", self.url, state)
