"""Memory for publishers: what a plan needs beyond its workload's grant has to be free before segments are promised."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shared_store.base.errors import OutOfMemoryError
from shared_store.base.sizes import format_size
from shared_store.store.residency.authority import Authority
from shared_store.store.residency.swapper import Swapper
from shared_store.store.session import Session
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import Wait

log = logging.getLogger(__name__)

PUBLISH_WITHIN_S: Final = 45.0
"""Seconds that a publisher waits for memory: its client waits a minute for the answer to its plan."""


@dataclass(frozen=True, eq=False)
class Publishers:
    """Publishers that need memory of a device with a budget."""

    _state: StoreState
    _authority: Authority
    _swapper: Swapper

    async def admit(self, session: Session, device: str, needed: Callable[[], int]) -> None:
        """Wait until the segments of a plan fit beside what workloads use and were granted.

        The caller promises them in the same step of the event loop.

        Args:
            session: of the publisher.
            device: where.
            needed: returns the bytes of the segments, as of now.

        Raises:
            OutOfMemoryError: they did not fit in time, or never can.
            RequestCancelledError: the client cancelled its request while it waited.
            ConnectionLostError: the client disconnected while it waited.
        """
        accounts = self._state.accounts
        if not accounts.known(device) and accounts.budget(device) is not None:
            await self._authority.open([device])
        if not accounts.open(device):
            return
        until = time.monotonic() + PUBLISH_WITHIN_S
        while (missing := self._missing(session, device, needed())) > 0:
            await self._wait(session, device, missing, until)

    def _missing(self, session: Session, device: str, needed: int) -> int:
        """Return the bytes to wait for: all that no grant covers, if they are not free."""
        workload = self._state.workloads.of(session.client)
        needed -= 0 if workload is None else self._state.workloads.grant_left(workload, device)
        return needed if needed > self._state.accounts.free(device) else 0

    async def _wait(self, session: Session, device: str, nbytes: int, until: float) -> None:
        account, client = self._state.accounts.account(device), session.client
        if account.budget is not None and nbytes > account.budget - account.reserve:
            raise OutOfMemoryError(
                f"not enough memory on {device}: {format_size(nbytes)} are needed, of a budget of "
                f"{format_size(account.budget)} with a reserve of {format_size(account.reserve)}: raise --budget"
            )
        workload = self._state.workloads.of(client)
        wait = Wait(
            time.monotonic(),
            client.identity.priority if workload is None else workload.priority,
            {device: nbytes},
            "" if workload is None else workload.id,
            client=f"{client.name or client.identity.name or 'client'} ({client.number})",
            publishes=True,
        )
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(0.0, until - time.monotonic())):
                await self._swapper.take(session, wait)
        except TimeoutError as error:
            raise OutOfMemoryError(
                f"not enough memory on {device}: {format_size(nbytes)} are needed, and were not free within "
                f"{PUBLISH_WITHIN_S:g} s: {wait.text or 'the store was restarted'}"
            ) from error
        finally:
            self._state.workloads.end_wait(wait)
