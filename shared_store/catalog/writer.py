"""The catalog's thread: write pending work to the server, renew the node, and start over after any failure.

It writes differences. After a failure it opens a new connection and rewrites everything.
"""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, Final

from shared_store.runtime.backoff import delays

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared_store.catalog.event_buffer import Event
    from shared_store.catalog.node_writer import NodeWriter
    from shared_store.catalog.pending import Pending

_EVENTS_AT_ONCE: Final = 200
# The delay between attempts starts over only after a connection that lasted: a server that fails soon after each
# connection must not be written to ten times a second.
_STEADY_S: Final = 5.0
_log = logging.getLogger(__name__)


class Writer:
    """Writes to the server at ``url`` until stopped.

    ``up`` is called once everything is written, ``down`` with the reason of a failure; both in the catalog's thread.
    """

    def __init__(
        self,
        url: str,
        pending: Pending,
        *,
        ttl_s: float,
        events_maxlen: int,
        up: Callable[[], None],
        down: Callable[[str], None],
    ) -> None:
        self._url = url
        self._pending = pending
        self._ttl_s = ttl_s
        self._events_maxlen = events_maxlen
        self._up = up
        self._down = down
        self._unsent: list[Event] = []

    def run(self) -> None:
        """Write until :meth:`Pending.stop`."""
        # Imported here, because importing redis-py takes longer than the store's start.
        from redis.exceptions import RedisError

        from shared_store.catalog.node_writer import FencedError, LostError

        waits = delays()
        while not self._pending.stopping:
            node = None
            started = time.monotonic()
            try:
                node = self._open()
                self._write(node)
            except FencedError:
                self._down(
                    "another store of this node, started later, owns the node's entries, so this store's writes are "
                    "refused; stop one of the two (`wooly status` shows this one's process)"
                )
            except LostError:
                self._down("the server lost this node's entries, or let them expire; rewriting them")
            except (RedisError, OSError) as error:
                self._down(f"{error}; the store serves without it and retries")
            except Exception:  # noqa: BLE001 - logged with its stack, and retried
                # A defect must not end the thread while the state is "ok".
                _log.exception("unexpected failure while writing to the catalog")
                self._down("unexpected failure, see the log above")
            finally:
                if node is not None:
                    node.close()
            if node is not None and time.monotonic() - started > _STEADY_S:
                waits = delays()
            self._pending.wait_for_stop(next(waits))

    def _open(self) -> NodeWriter:
        """Connect, and write everything."""
        from shared_store.catalog.node_writer import NodeWriter

        snapshot = self._pending.take_snapshot()
        node = NodeWriter(self._url, snapshot.node, ttl_s=self._ttl_s, events_maxlen=self._events_maxlen)
        try:
            node.resync(snapshot)
        except BaseException:
            node.close()
            raise
        self._up()
        return node

    def _write(self, node: NodeWriter) -> None:
        """Write pending work until stopped."""
        renew_at = time.monotonic() + self._ttl_s / 3
        sweep_at = time.monotonic() + self._sweep_delay()
        while True:
            timeout_s = max(0.0, min(renew_at, sweep_at) - time.monotonic())
            work = self._pending.wait(timeout_s, unsent=bool(self._unsent))
            if work.stopping:
                self._leave(node)
                return
            if work.snapshot is not None:
                node.write(work.snapshot)
            self._send_events(node)
            if work.flushing or time.monotonic() >= renew_at:
                node.renew()
                renew_at = time.monotonic() + self._ttl_s / 3
            if time.monotonic() >= sweep_at:
                node.sweep()
                sweep_at = time.monotonic() + self._sweep_delay()
            self._pending.confirm(work.flushes)

    def _send_events(self, node: NodeWriter) -> None:
        """Send the events that wait now. A batch remains in ``_unsent`` until the server has it."""
        due = self._pending.count_events()
        while True:
            node.add_events(self._unsent)
            self._unsent = []
            if due <= 0:
                return
            due -= _EVENTS_AT_ONCE
            self._unsent = self._pending.take_events(_EVENTS_AT_ONCE)

    def _leave(self, node: NodeWriter) -> None:
        self._send_events(node)
        if time.monotonic() < self._pending.stop_before:
            node.release()

    def _sweep_delay(self) -> float:
        # Random, so that the nodes of a cluster seldom sweep the same dead node at the same moment.
        return self._ttl_s * random.uniform(0.5, 1.5)  # noqa: S311 - not used for security
