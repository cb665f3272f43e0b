"""The one place that unmaps memory of a device: wait until nothing uses it, unmap, release.

Nothing is unmapped while work may use it: not when a mapping is closed or suspended, nor when the garbage collector
finds one. The wait is for all work that this process started on the device, like the one that ``cudaFree`` makes. It
does not hold the interpreter lock.

While a graph is being captured, waiting would invalidate the capture. What is collected or closed meanwhile is
*deferred*: it stays mapped, and is unmapped when the capture ends, or with the next mapping or unmapping. A thread
retries as well, in case neither comes. The code that begins a capture records it in :class:`Captures`; a backend may
know of others.

Relies on the caller that nothing *new* uses a range once it asks for its unmapping. A captured graph that is replayed
after its tensors are gone is the owner's mistake, as with any memory.

At the end of a process nothing is unmapped here: the kernel and the driver do it, once the process's work has ended.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from shared_store.base.errors import MemoryBackendError, WoolyError
from shared_store.memory.backend import Backend, Segment

log = logging.getLogger(__name__)

RETRY_S: Final = 0.5
"""Seconds between two attempts to unmap what was deferred."""


class Captures:
    """The graph captures of this process. While there is one, nothing waits for a device."""

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[object] = weakref.WeakSet()
        # Held while a device is waited for, so that no capture begins meanwhile. The garbage collector may run inside.
        self.lock = threading.RLock()

    @property
    def active(self) -> bool:
        """True while a graph is being captured."""
        return bool(self._graphs)

    def begin(self, graph: object) -> None:
        """Record that ``graph`` is about to be captured. It is forgotten if it is collected."""
        with self.lock:
            self._graphs.add(graph)

    def end(self, graph: object) -> None:
        """Record that a capture has ended, however it did, and unmap what was deferred."""
        with self.lock:
            self._graphs.discard(graph)
        unmap_deferred()

    def forget(self) -> None:
        """Begin anew, in a forked child: a device's driver is the parent's."""
        self._graphs = weakref.WeakSet()
        self.lock = threading.RLock()


captures: Final = Captures()


class Deferred(NamedTuple):
    """Unmappings that wait for the end of a graph capture: their number, their bytes, and all since the start."""

    waiting: int
    nbytes: int
    total: int


@dataclass(frozen=True)
class Unmapping:
    """A reserved range that its owner will not use again.

    Attributes:
        backend: of its device.
        address: its first byte.
        nbytes: its size.
        mapped: True if memory is mapped there.
        segment: released with it, if there is one.
        pid: the process that reserved it. A driver does not survive a fork, and a child has no mapping of a device.
        parts: address and size of each mapping in it, if they are not one mapping of all of it.
    """

    backend: Backend
    address: int
    nbytes: int
    mapped: bool
    segment: Segment | None
    pid: int
    parts: Sequence[tuple[int, int]] = ()

    def finish(self, *, wait: bool) -> bool:
        """Wait for the device, unmap, free the range, release the segment.

        Args:
            wait: False returns False, too, while another thread waits for a device.

        Returns:
            False if nothing was done, because a graph is being captured.
        """
        if self.backend.asynchronous and self.pid != os.getpid():
            return True
        if self.mapped:
            with _settled(self.backend, wait=wait) as done:
                if not done:
                    return False
                self._unmap()
        self._free()
        return True

    def _unmap(self) -> None:
        try:
            for part in self.parts or ((self.address, self.nbytes),):
                self.backend.unmap(*part)
        except BaseException:
            self._release()  # the range stays mapped and reserved, so that nothing else gets it
            raise

    def _free(self) -> None:
        try:
            self.backend.unreserve(self.address, self.nbytes)
        finally:
            self._release()

    def _release(self) -> None:
        if self.segment is not None:
            self.backend.release(self.segment)


def unmap(backend: Backend, address: int, nbytes: int) -> None:
    """Wait until nothing uses a mapped range, and unmap it. It stays reserved.

    Raises:
        MemoryBackendError: a graph is being captured, or the device refuses. The range is still mapped.
    """
    with settled(backend):
        backend.unmap(address, nbytes)


@contextlib.contextmanager
def settled(backend: Backend) -> Iterator[None]:
    """Wait until nothing uses the device's memory. In the block mapped ranges may be unmapped.

    Raises:
        MemoryBackendError: a graph is being captured.
    """
    with _settled(backend) as done:
        if not done:
            raise MemoryBackendError(
                f"cannot unmap memory of {backend.device} while a CUDA graph is being captured; end the capture first"
            )
        yield
    unmap_deferred()


def give_back(leaving: Unmapping, *, wait: bool = True) -> None:
    """Unmap a range that is not used again, and free it; deferred while a graph is being captured.

    Args:
        leaving: the range.
        wait: False is for the garbage collector, which interrupts any thread: the range is deferred, too, while another
            thread waits for a device. That thread may be waiting for the interrupted one.

    Raises:
        MemoryBackendError: the device refuses.
    """
    if not leaving.finish(wait=wait):
        _queue.defer(leaving)
    else:
        unmap_deferred()


def unmap_deferred() -> None:
    """Unmap what was deferred, if that is possible now. Errors are logged."""
    _queue.drain()


def deferred() -> Deferred:
    """Return the unmappings of this process that are deferred."""
    return _queue.count()


@contextlib.contextmanager
def _settled(backend: Backend, *, wait: bool = True) -> Iterator[bool]:
    """Wait for a device. Yields False if that is not allowed now; otherwise no capture begins before the block ends."""
    if not backend.asynchronous:
        yield backend.settle()
        return
    if not captures.lock.acquire(blocking=wait):
        yield False
        return
    try:
        yield not captures.active and backend.settle()
    finally:
        captures.lock.release()


class _Queue:
    """Deferred unmappings. The garbage collector may call any method while the same thread is in another one."""

    def __init__(self) -> None:
        self._waiting: deque[Unmapping] = deque()  # its methods are atomic
        self._draining = threading.Lock()  # never waited for
        self._retrying = threading.Lock()  # taken while there is a thread that retries
        self._finished = 0

    def defer(self, leaving: Unmapping) -> None:
        self._waiting.append(leaving)
        if self._retrying.acquire(blocking=False):
            try:  # threading.Thread would take locks that the interrupted code may have
                _thread.start_new_thread(self._retry, ())
            except RuntimeError:  # no thread can start, or the process ends; other calls drain
                self._retrying.release()

    def drain(self) -> None:
        if not self._waiting or not self._draining.acquire(blocking=False):
            return
        try:
            for _ in range(len(self._waiting)):
                leaving = self._waiting.popleft()
                try:
                    if not leaving.finish(wait=False):
                        self._waiting.append(leaving)
                        continue
                except WoolyError as error:
                    log.warning("wooly: cannot unmap %d bytes of a device: %s", leaving.nbytes, error)
                self._finished += 1
        finally:
            self._draining.release()

    def count(self) -> Deferred:
        waiting = list(self._waiting)
        return Deferred(len(waiting), sum(leaving.nbytes for leaving in waiting), self._finished + len(waiting))

    def _retry(self) -> None:
        while True:
            while self._waiting:
                time.sleep(RETRY_S)
                self.drain()
            self._retrying.release()
            if not self._waiting or not self._retrying.acquire(blocking=False):
                return

    def forget(self) -> None:
        """Begin anew, in a forked child."""
        self._waiting.clear()
        self._draining, self._retrying = threading.Lock(), threading.Lock()


_queue: Final = _Queue()


def _after_fork_in_child() -> None:
    captures.forget()
    _queue.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
