"""Opens the accounts of devices: measures their memory, and takes the node's lock of each GPU.

Two stores on one node must not both grant a GPU's memory. The store that has the lock grants it; another one says so in
its status, and its workloads on that GPU start and run as without overcommit. It tries again as long as it runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Final

from shared_store.base.errors import ConfigError, WoolyError
from shared_store.memory import Unknown
from shared_store.runtime.device_lock import GRANTS, lock_path, try_lock
from shared_store.runtime.fds import OwnedFd
from shared_store.store.devices.devices import Devices
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)

TRY_AGAIN_S: Final = 5.0
"""Seconds after which a store tries again to take a lock that another one has."""


class Authority:
    """The devices whose memory this store grants."""

    def __init__(self, state: StoreState, devices: Devices, signals: Signals) -> None:
        self._state = state
        self._devices = devices
        self._signals = signals
        self._locks: dict[str, OwnedFd] = {}
        self._tried: dict[str, float] = {}

    async def open(self, devices: Iterable[str]) -> None:
        """Open the accounts of devices, and measure them.

        Raises:
            UnknownDeviceError: there is no such device on this node.
        """
        for device in devices:
            await self._devices.find(device)
            if not self._state.accounts.known(device):
                await self._measure(device)

    async def measure(self) -> None:
        """Measure the memory of all devices that have accounts, and try again where another store had the lock."""
        await asyncio.gather(*map(self._measure, self._state.accounts.devices()))

    def close(self) -> None:
        """Release the locks."""
        for lock in self._locks.values():
            lock.close()
        self._locks.clear()

    async def _measure(self, device: str) -> None:
        backend = self._devices.backend(device)
        free, total = await asyncio.to_thread(lambda: (backend.free_bytes(), backend.total_bytes()))
        accounts = self._state.accounts
        accounts.measured(device, _known(free), _known(total))
        if accounts.budget(device) is None:
            self._refuse(device, f"its memory is {total}; start the store with `--budget {device}=SIZE`")
        elif device.startswith("GPU-"):
            self._take_lock(device)

    def _take_lock(self, device: str) -> None:
        """Take the lock of a GPU, unless this store has it; refuse the device to its workloads while another has it."""
        now = time.monotonic()
        if device in self._locks or now < self._tried.get(device, 0.0):
            return
        self._tried[device] = now + TRY_AGAIN_S
        try:
            lock = try_lock(device, GRANTS)
        except ConfigError as error:
            self._refuse(device, str(error))
            return
        if lock is None:
            self._refuse(device, f"another store on this node grants its memory: it has the lock {_path(device)}")
            return
        self._locks[device] = lock
        self._refuse(device, "")

    def _refuse(self, device: str, reason: str) -> None:
        """Say once why this store does not grant the memory of a device; an empty reason: it does."""
        before = self._state.accounts.refusal(device)
        if reason == before:
            return
        self._state.accounts.refuse(device, reason)
        if reason:
            log.warning("no overcommit on %s: %s", device, reason)
            self._signals.event("overcommit_refused", device=device, reason=reason)
        else:
            log.info("this store grants the memory of %s", device)
            self._signals.event("overcommit_allowed", device=device)
        self._signals.changed()


def _known(number: int | Unknown) -> int | None:
    return None if isinstance(number, Unknown) else number


def _path(device: str) -> str:
    try:
        return str(lock_path(device, GRANTS))
    except WoolyError as error:
        return str(error)
