"""A workload at the arbiter of its store: its gate obeys that, and joins again when store or arbiter were replaced.

In doubt the gate is free: without a store, without an arbiter, and while it joins.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from shared_store.base.errors import ProtocolError, WoolyError
from shared_store.client.link import Link
from shared_store.compute.gate import ComputeGate
from shared_store.protocol import messages
from shared_store.runtime.backoff import delays

log = logging.getLogger(__name__)

STEADY_S: Final = 10.0
"""Seconds with an arbiter after which the next attempt to join comes soon again."""

_FDS: Final = 2


class ComputeMembership:
    """One workload. Methods may be called from any thread."""

    def __init__(
        self,
        gate: ComputeGate,
        workload: str,
        ungated: str,
        next_id: Callable[[], int],
        joined: Callable[[], Link | None],
    ) -> None:
        """Join nothing yet.

        Args:
            gate: of the workload.
            workload: its id.
            ungated: why it must never be held; empty: it may be.
            next_id: numbers requests.
            joined: returns the link over which the workload has joined its store; None: there is none.
        """
        self._gate = gate
        self._workload = workload
        self._ungated = ungated
        self._next_id = next_id
        self._joined = joined
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._attempts = self._attached = 0
        self._since = 0.0
        self._waits: Iterator[float] = delays()
        self._lost = self._told = False

    def join(self, link: Link) -> None:
        """Join the arbiter of a store that the workload has joined. Without one, the gate is free.

        Raises:
            ConnectionLostError: the connection ended before. The next one has to be joined.
        """
        with self._lock:
            self._attempts += 1
            if self._closed.is_set():
                return
            if messages.COMPUTE not in link.capabilities:
                if not self._told:
                    self._told = True
                    log.info("wooly: the store (version %s) has no arbiter: steps are free", link.welcome.version)
                return
            try:
                self._attach(link)
            except WoolyError as error:
                if not link.alive:
                    raise
                log.warning("wooly: steps of this workload are free: %s [%s]", error, error.code)
                self._again()

    def give_up(self) -> None:
        """Join no arbiter any more, for another membership of the same gate. Idempotent."""
        self._closed.set()

    def close(self) -> None:
        """Leave the arbiter, and close the gate. Idempotent."""
        self.give_up()
        self._gate.close()

    def _attach(self, link: Link) -> None:
        request = messages.JoinCompute(self._next_id(), self._workload, self._ungated)
        _, fds = link.call(request, messages.ComputeJoined)
        if len(fds) != _FDS:
            fds.close()
            raise ProtocolError(f"the store sent {len(fds)} descriptors, not a page and a socket")
        attempt = self._attached = self._attempts
        page, bell = fds.detach()
        self._gate.attach(page, bell, lambda: self._is_lost(attempt))
        self._since = time.monotonic()
        if self._lost:
            self._lost = False
            log.info("wooly: this workload obeys an arbiter again")

    def _is_lost(self, attempt: int) -> None:
        """Hear that the arbiter of an attempt is gone; in a thread of the gate."""
        with self._lock:
            if attempt == self._attached:
                self._lost = True
                self._again()

    def _again(self) -> None:
        """Join again after a while, in a thread. With the lock."""
        if self._since and time.monotonic() - self._since > STEADY_S:
            self._waits = delays()
        self._since = 0.0
        arguments = (self._attempts, next(self._waits))
        threading.Thread(target=self._rejoin, args=arguments, name="wooly-compute", daemon=True).start()

    def _rejoin(self, attempt: int, wait_s: float) -> None:
        if self._closed.wait(wait_s):
            return
        with self._lock:
            link = self._joined()
            if attempt != self._attempts or link is None or not link.alive:
                return  # over a later link, it was joined or will be
        try:
            self.join(link)
        except WoolyError as error:
            log.debug("wooly: the store of an arbiter is gone: %s", error)
