"""What happens to the store, its keeper and its catalog during a soak: kills, pauses and upgrades.

One at a time: each waits until store, keeper and catalog are well again, because a store that loses its keeper and is
killed before it has another one loses its models, which would hide what a soak looks for.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.harness.processes import wait_until
from benchmarks.harness.store import TemporaryStore, open_pidfds, wait_for_exit
from shared_store.base.errors import StoreUnavailableError, WoolyError
from shared_store.base.status import Status
from shared_store.client.session import Session

WELL_WITHIN_S = 60.0
PAUSE_S = (0.5, 3.0)


class Disruptions:
    """Disrupts a store by chance, and counts what it did."""

    def __init__(self, store: TemporaryStore, chance: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        """The longest time until all was well again, by kind."""
        self._store = store
        self._chance = chance
        self._kinds = {
            "store_killed": self._kill_store,
            "keeper_killed": self._kill_keeper,
            "catalog_killed": self._kill_catalog,
            "catalog_paused": self._pause_catalog,
            "upgraded": self._upgrade,
        }
        self._waiting: list[str] = []

    def disrupt(self) -> None:
        """Do one thing, and wait until all is well again. Every kind comes before one comes again."""
        if not self._waiting:
            self._waiting = self._chance.sample(sorted(self._kinds), len(self._kinds))
        kind = self._waiting.pop()
        began = time.monotonic()
        self._kinds[kind](self.well())
        self.well()
        self.counts[kind] += 1
        self.seconds[kind] = max(self.seconds.get(kind, 0.0), round(time.monotonic() - began, 3))

    def well(self) -> Status:
        """Wait until store, keeper and catalog are well, and return the status. Raises :class:`TimeoutError`."""
        found: list[Status] = []

        def asked() -> bool:
            try:
                status = self._store.status()
            except WoolyError:  # between two stores
                return False
            found[:] = [status]
            return status.store.state == "ok" and status.keeper is not None and status.keeper.state == "ok"

        wait_until(asked, f"the store, its keeper and its catalog to be well, not {found}", WELL_WITHIN_S, 0.05)
        return found[0]

    def _kill_store(self, status: Status) -> None:
        _kill(status.store.pid)

    def _kill_keeper(self, status: Status) -> None:
        assert status.keeper is not None
        _kill(status.keeper.pid)

    def _kill_catalog(self, status: Status) -> None:
        _kill(_catalog_of(status.store.pid))

    def _pause_catalog(self, status: Status) -> None:
        """Stop the server as a lost network would, and let it go on."""
        pid = _catalog_of(status.store.pid)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._chance.uniform(*PAUSE_S))
        os.kill(pid, signal.SIGCONT)

    def _upgrade(self, status: Status) -> None:
        """Replace the store and its keeper by those of the same installation."""
        here = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
        with Session.connect(self._store.directory, name="upgrade", autostart=False, timeout_s=30.0) as session:
            session.upgrade_store(sys.executable, here)
            if session.store_pid == status.store.pid:
                raise StoreUnavailableError("the store is the same after an upgrade")


def _kill(pid: int) -> None:
    pidfds = open_pidfds([pid])
    os.kill(pid, signal.SIGKILL)
    if not wait_for_exit(pidfds, 10.0):
        raise TimeoutError(f"process {pid} still runs after SIGKILL")


def _catalog_of(store: int) -> int:
    """Return the pid of a store's embedded server, which is a child of it."""
    found: list[int] = []

    def running() -> bool:
        children = [int(pid) for task in Path(f"/proc/{store}/task").iterdir() for pid in _children(task)]
        found[:] = [pid for pid in children if "valkey-server" in Path(f"/proc/{pid}/cmdline").read_text()]
        return bool(found)

    wait_until(running, "the embedded server to run", 10.0)
    return found[0]


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()
