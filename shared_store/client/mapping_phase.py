"""Phases in which a process maps or unmaps large memory of a GPU: one at a time on each GPU, across processes.

Mapping and unmapping change the page tables that running kernels of every process on the GPU use, so phases at the same
time disturb their steps more than phases in turn. A phase is a turn of the store, named ``map:`` and the device; it
ends with its client's connection, should the client be killed.

A phase is a courtesy and no lock: a client that does not get it in time, or has no store, logs the reason and goes on.
Mappings that the garbage collector finds are unmapped without one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from shared_store.base.errors import WoolyError
from shared_store.client.session import Session
from shared_store.memory import Backend

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 5.0
"""Seconds to wait for the phases of other processes. One takes less than a second."""

_threads: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
"""By device: threads of one process may share a session, which asks for a turn once."""


@contextlib.contextmanager
def mapping_phase(session: Session, backend: Backend, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Map or unmap memory of a device in the block, while no other process of this store does.

    Does nothing for host memory. Not reentrant: a block that begins a phase of the same device waits for itself until
    the time-out. Raises nothing of its own.

    Args:
        session: the connection to the store.
        backend: of the device.
        timeout_s: seconds to wait; 0 or more.
    """
    if not backend.asynchronous:
        yield
        return
    with contextlib.ExitStack() as turns:
        lock = _threads[backend.device]
        if not lock.acquire(timeout=timeout_s):
            _go_on(backend, "another thread of this process has not ended its own")
        else:
            turns.callback(lock.release)
            turns.enter_context(_turn(session, backend, timeout_s))
        yield


@contextlib.contextmanager
def _turn(session: Session, backend: Backend, timeout_s: float) -> Iterator[None]:
    """Take the store's turn for the block if that is possible. Only the block's errors are raised."""
    taken = contextlib.ExitStack()
    if not session.alive:
        _go_on(backend, "no store is connected")
    else:
        try:
            taken.enter_context(session.turn(f"map:{backend.device}", timeout_s))
        except WoolyError as error:
            _go_on(backend, f"{error} [{error.code}]")
    try:
        yield
    finally:
        try:
            taken.close()
        except WoolyError as error:  # the store ended, and the turn with it
            log.debug("wooly: could not end the mapping phase of %s: %s [%s]", backend.device, error, error.code)


def _go_on(backend: Backend, reason: str) -> None:
    log.info("wooly: mapping memory of %s without waiting for other processes: %s", backend.device, reason)
