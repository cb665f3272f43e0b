"""Ends a wait for an answer from another thread: the request is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Withdrawal:
    """Ends the wait of one call, at once or as soon as it begins. For one call at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._withdrawn = False
        self._wake: Callable[[], None] | None = None

    @property
    def withdrawn(self) -> bool:
        """Whether the wait was ended."""
        return self._withdrawn

    def withdraw(self) -> None:
        """End the wait. Idempotent, does not block."""
        with self._lock:
            self._withdrawn = True
            wake = self._wake
        if wake is not None:
            wake()

    def wake_by(self, wake: Callable[[], None] | None) -> None:
        """Set the function that wakes the waiting thread; None after the wait. Called at once if it is withdrawn."""
        with self._lock:
            self._wake = wake
            withdrawn = self._withdrawn
        if withdrawn and wake is not None:
            wake()
