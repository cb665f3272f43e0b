"""A workload without an engine: memory that leaves and returns, and a mover that a test can stop at any step."""

from __future__ import annotations

import mmap
import os
import threading

from support.content import content

from shared_store.base.errors import DeclinedError
from shared_store.overcommit.mover import Holdings

STAYS = 4096
"""Bytes of a holder that never leave."""


class Holder:
    """Holds bytes in a memory file. A `Mover`: their pages are released and come back with their content.

    A step whose name is in `stops` waits until the test removes it. A return raises the errors in `failures` first.
    """

    def __init__(self, nbytes, seed=1):
        self._content = content(seed, nbytes)
        self._fd = os.memfd_create("holder")
        os.ftruncate(self._fd, nbytes)
        self._map = mmap.mmap(self._fd, nbytes)
        self._copy = self._content
        self._changed = threading.Condition()
        self.nbytes = nbytes
        self.busy = False
        self.refusal = ""
        self.stops = set()
        self.step = ""
        self.failures = []
        self.calls = []

    def close(self):
        self._map.close()
        os.close(self._fd)

    @property
    def held(self):
        """Bytes of memory that it has now."""
        return os.fstat(self._fd).st_blocks * 512

    def intact(self):
        return self._map[:] == self._content

    def allocate(self):
        self._map[:] = self._copy
        self._copy = b""

    def go_on(self, step):
        with self._changed:
            self.stops.discard(step)
            self._changed.notify_all()

    def wait_for(self, step, timeout_s=10.0):
        """Wait until it is at a step."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.step == step, timeout_s), f"it is at {self.step!r}, not {step!r}"

    def _at(self, step):
        with self._changed:
            self.step = step
            self._changed.notify_all()
            self._changed.wait_for(lambda: step not in self.stops)

    def give_up(self):
        """Release its memory by itself."""
        self._copy = self._map[:]
        self._map.madvise(mmap.MADV_REMOVE)

    # The mover.

    def leave(self, *, active, within_s, reached):
        self.calls.append(("leave", active, within_s))
        self._at("draining")
        if self.refusal or (self.busy and not active):
            raise DeclinedError(self.refusal or "it has requests")
        reached("leaving")
        self._at("leaving")
        self.give_up()
        self._at("")
        return self.holdings()

    def come_back(self):
        self.calls.append(("come back",))
        self._at("returning")
        if self.failures:
            raise self.failures.pop(0)
        self.allocate()
        self._at("")
        return self.holdings()

    def prepare_checkpoint(self):
        self.calls.append(("prepare checkpoint",))

    def holdings(self):
        return Holdings(
            {"cpu": self.held + STAYS}, {"cpu": STAYS}, {"cpu": self.nbytes + STAYS}, self.nbytes, {"copy": 0.1}
        )
