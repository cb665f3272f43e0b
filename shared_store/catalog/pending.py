"""Work for the catalog's thread: the latest snapshot, events, flushes, and the request to stop.

Any thread may add work, without blocking. One thread takes it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shared_store.catalog.event_buffer import Event, EventBuffer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared_store.catalog.schema import Snapshot

_EVENTS_BUFFERED: Final = 1000


@dataclass(frozen=True)
class Work:
    """The work at one moment. ``snapshot`` is None if it was taken before. ``flushes`` is to be confirmed when done."""

    stopping: bool
    snapshot: Snapshot | None
    flushes: int
    flushing: bool


class Pending:
    """Work that is guarded by one condition."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._changed = False
        self._events = EventBuffer(_EVENTS_BUFFERED)
        self._flushes_requested = 0
        self._flushes_done = 0
        self._stopping = False
        self._stop_before = 0.0

    # From any thread.

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Replace the snapshot."""
        with self._condition:
            self._snapshot = snapshot
            self._changed = True
            self._condition.notify_all()

    def put_event(self, kind: str, fields: Mapping[str, str | int]) -> None:
        """Add an event."""
        with self._condition:
            self._events.add(kind, fields)
            self._condition.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all work so far is confirmed. Return False after the time-out."""
        with self._condition:
            self._flushes_requested += 1
            mine = self._flushes_requested
            self._condition.notify_all()
            return self._condition.wait_for(lambda: self._flushes_done >= mine, timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Request the end of the thread. Network traffic must end within ``timeout_s``."""
        with self._condition:
            self._stopping = True
            self._stop_before = time.monotonic() + timeout_s
            self._condition.notify_all()

    # From the catalog's thread.

    @property
    def stopping(self) -> bool:
        """True after :meth:`stop`."""
        return self._stopping

    @property
    def stop_before(self) -> float:
        """Monotonic time until which the thread may use the network after :meth:`stop`."""
        return self._stop_before

    def wait(self, timeout_s: float, *, unsent: bool) -> Work:
        """Wait for work, unless some is ``unsent`` from an earlier attempt. Marks the snapshot as taken."""
        with self._condition:
            self._condition.wait_for(lambda: unsent or self._has_work(), timeout_s)
            snapshot = self._snapshot if self._changed else None
            self._changed = False
            flushing = self._flushes_requested > self._flushes_done
            return Work(self._stopping, snapshot, self._flushes_requested, flushing)

    def wait_for_stop(self, timeout_s: float) -> None:
        """Wait for :meth:`stop`, or for the time-out."""
        with self._condition:
            self._condition.wait_for(lambda: self._stopping, timeout_s)

    def take_snapshot(self) -> Snapshot:
        """Return the latest snapshot, taken before or not."""
        with self._condition:
            self._changed = False
            assert self._snapshot is not None  # noqa: S101 - Catalog.start() puts one
            return self._snapshot

    def count_events(self) -> int:
        """Return the number of waiting events."""
        with self._condition:
            return len(self._events)

    def take_events(self, most: int) -> list[Event]:
        """Remove and return the oldest events."""
        with self._condition:
            return self._events.take(most)

    def confirm(self, flushes: int) -> None:
        """Report that all work up to this flush is written."""
        with self._condition:
            self._flushes_done = flushes
            self._condition.notify_all()

    def _has_work(self) -> bool:
        return bool(
            self._stopping or self._changed or len(self._events) or self._flushes_requested > self._flushes_done
        )
