"""Watches the process of a client. When it ends, its connection is closed, also if a child has a copy of its socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from shared_store.protocol.peers import watch_process

CLOSES_WITHIN_S = 1.0
"""Seconds after the end of a process in which its connection ends by itself: its last requests are read first."""


class ProcessWatch:
    """One watched process; no watch where the kernel has no pidfd for it (before Linux 6.5)."""

    def __init__(self, sock: socket.socket, ended: Callable[[], None]) -> None:
        """Watch the peer of a connected socket.

        Args:
            sock: borrowed during the call.
            ended: called a moment after the process ended, unless :meth:`close` came first.
        """
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._pidfd = watch_process(sock)
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd.fileno(), self._over)

    def close(self) -> None:
        """End the watch. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        self._unwatch()

    def _over(self) -> None:
        self._unwatch()
        self._timer = self._loop.call_later(CLOSES_WITHIN_S, self._ended)

    def _unwatch(self) -> None:
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            self._loop.remove_reader(pidfd.fileno())
            pidfd.close()
