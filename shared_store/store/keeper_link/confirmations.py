"""Waits until the keeper has confirmed releases, and so until released memory is free.

Does not promise that the memory is free after the wait: a keeper that does not read has
:data:`~shared_store.store.state.releases.CONFIRMED_WITHIN_S`, and a client may still map what it no longer reads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from shared_store.store.state.counts import Counts
from shared_store.store.state.releases import CONFIRMED_WITHIN_S, Releases

log = logging.getLogger(__name__)


class Confirmations:
    """The keeper's confirmations, and the tasks that wait for them."""

    def __init__(self, releases: Releases, counts: Counts) -> None:
        self._releases = releases
        self._counts = counts
        self._waiters: set[asyncio.Future[None]] = set()
        self._observers: list[Callable[[], None]] = []

    def observe(self, freed: Callable[[], None]) -> None:
        """Call a function after each confirmation: released memory is free."""
        self._observers.append(freed)

    def supported(self, *, by_keeper: bool) -> None:
        """Record whether the keeper confirms releases: those of earlier versions do not."""
        self._releases.confirmed_by_keeper = by_keeper

    def begin(self, segment: int, device: str, nbytes: int) -> None:
        """Record that a segment was released, and that the keeper still has a descriptor of it."""
        self._releases.begin(segment, device, nbytes)

    def confirmed(self, segment: int) -> None:
        """Record that the keeper has closed a segment."""
        self._releases.confirm(segment)
        self._wake()

    def keeper_ended(self) -> None:
        """Record that the keeper's process has ended: its descriptors are closed."""
        self._releases.confirm_all()
        self._wake()

    async def wait(self, device: str) -> None:
        """Wait until all released memory of a device is free, or the keeper's time is over."""
        while left_s := self._releases.left_s(device):
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await asyncio.wait([waiter], timeout=left_s)
            finally:
                self._waiters.discard(waiter)
            self._expire()

    def overdue(self, device: str) -> int:
        """Return the bytes of a device that the keeper has not confirmed in time."""
        self._expire()
        return self._releases.overdue(device)[1]

    @property
    def reason(self) -> str:
        """Why the store is degraded; empty: nothing is overdue."""
        self._expire()
        segments, nbytes = self._releases.overdue()
        if not segments:
            return ""
        return (
            f"the keeper has not confirmed the release of {segments} segments ({nbytes} bytes): their memory may "
            "still be allocated"
        )

    def _expire(self) -> None:
        late = self._releases.expire()
        for _ in range(late):
            self._counts.add("unconfirmed_releases")
        if late:
            log.error("the keeper has not confirmed %d releases within %g s", late, CONFIRMED_WITHIN_S)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        for observer in self._observers:
            observer()
