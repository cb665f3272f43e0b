"""Waits until a workload may allocate: asks the store, and each store that comes after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Final

from shared_store.base.errors import RequestCancelledError, StoreUnavailableError, TimedOutError
from shared_store.client.session import Session
from shared_store.client.withdrawal import Withdrawal
from shared_store.overcommit.record import Record

ALONE_AFTER_S: Final = 10.0
"""Seconds without a store after which a workload goes on alone."""

_LONGEST_S: Final = 86400.0
"""Seconds of one request; then it is sent again."""


class Room:
    """The waits of one workload, one at a time."""

    def __init__(self, record: Record, session: Session) -> None:
        """Wait over a session that has joined, or will."""
        self._record = record
        self._session = session
        self._one = threading.Lock()
        self._lost_since: float | None = None

    def take(self, needs: Mapping[str, int], withdrawal: Withdrawal) -> float:
        """Wait for a grant. Reports are held from here on; whoever called releases them, granted or not.

        Args:
            needs: private bytes on each device.
            withdrawal: ends the wait.

        Returns:
            The seconds that it waited.

        Raises:
            RequestCancelledError: the wait was withdrawn.
            StoreUnavailableError: there has been no store for :data:`ALONE_AFTER_S`.
            WoolyError: the store refuses.
        """
        began = time.monotonic()
        with self._one:
            while not withdrawal.withdrawn:
                with self._record.changed:
                    self._record.hold()
                    joins = self._record.joins
                try:
                    self._session.workloads.take_room(self._record.workload, needs, _LONGEST_S, withdrawal)
                except StoreUnavailableError:
                    self._wait_for_store(joins, withdrawal)
                except TimedOutError:
                    continue
                else:
                    self._lost_since = None
                    return time.monotonic() - began
        raise RequestCancelledError("memory is not needed any more")

    def _wait_for_store(self, joins: int, withdrawal: Withdrawal) -> None:
        """Wait until another store was joined.

        Raises:
            StoreUnavailableError: there has been none for too long.
        """
        record = self._record
        with record.changed:
            if self._lost_since is None:
                self._lost_since = time.monotonic()
            alone_at = self._lost_since + ALONE_AFTER_S
            while record.joins == joins or not record.listed:
                now = time.monotonic()
                if withdrawal.withdrawn:
                    return
                if now >= alone_at:
                    raise StoreUnavailableError(f"no store has answered for {now - self._lost_since:.0f} s")
                record.changed.wait(alone_at - now)
            self._lost_since = None
