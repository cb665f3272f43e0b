"""The limit of a wait for memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

from shared_store.client.withdrawal import Withdrawal
from shared_store.overcommit.record import Record


class Limit:
    """The limit of a wait for memory: learns why it lasts before it ends the wait.

    Attributes:
        withdrawal: ends the wait.
        passed: whether the time is over.
        reason: why there was no memory.
    """

    def __init__(self, timeout_s: float, explain: Callable[[], str], record: Record) -> None:
        self.withdrawal = Withdrawal()
        self.passed = False
        self.reason = ""
        self._explain = explain
        self._record = record
        self._timer = threading.Timer(min(timeout_s, threading.TIMEOUT_MAX), self._pass)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _pass(self) -> None:
        self.reason = self._explain()
        self.passed = True
        self.end()

    def end(self) -> None:
        """End the wait, whether it is for memory or for a store."""
        with self._record.changed:
            self.withdrawal.withdraw()
            self._record.changed.notify_all()
