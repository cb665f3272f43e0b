"""The workload's side of the arbiter: says what its steps do, and whether the next one may begin.

Without an arbiter every step may begin at once. While no other workload shares a device, a step costs a few stores to
memory and no system call: ``time.monotonic_ns`` reads the vDSO (``vdso(7)``), and a lock that nobody else holds is
taken in user space.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from time import monotonic, monotonic_ns

from shared_store.compute import layout
from shared_store.compute.bell import Bell
from shared_store.compute.page import free_words, map_page
from shared_store.runtime.fds import OwnedFd

log = logging.getLogger(__name__)

_STATE, _BEGUN, _ENDED = layout.STATE_WORD, layout.BEGUN_WORD, layout.ENDED_WORD  # looked up at each step
_BUSY, _BUSY_SINCE = layout.BUSY_WORD, layout.BUSY_SINCE_WORD
_HELD, _HELD_SINCE = layout.HELD_WORD, layout.HELD_SINCE_WORD
_UNTIL, _ALLOWED, _CONTENDED = layout.UNTIL_WORD, layout.ALLOWED_WORD, layout.CONTENDED_WORD
_FREE, _WORKING, _IN_FLIGHT = layout.FREE, layout.WORKING, layout.IN_FLIGHT

_gates: weakref.WeakSet[ComputeGate] = weakref.WeakSet()


class ComputeGate:
    """One for each workload. Methods may be called from any thread."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """Begin without an arbiter.

        Args:
            changed: called in a thread of this gate when steps may begin again; also when the arbiter is gone.
        """
        self._changed = changed
        self._bell: Bell | None
        self._words: memoryview
        self._begin_without()
        self._closed = False
        self._lost: Callable[[], None] = _nothing
        _gates.add(self)

    def attach(self, page: OwnedFd, bell: OwnedFd, lost: Callable[[], None]) -> None:
        """Obey an arbiter from here on, beginning with the present state. Closes both when it ends.

        After :meth:`close` it closes both at once.

        Args:
            page: the compute page.
            bell: socket to the arbiter.
            lost: called once, in a thread of this gate, when the arbiter is gone. Steps begin freely again.

        Raises:
            ProtocolError: the descriptors are something else.
        """
        with page, bell:
            words = map_page(page)
            found = Bell(bell, self)
        with self._lock:
            before = self._bell
            if self._closed:
                before = found
            else:
                self._lost, self._bell = lost, found
                self._move(words)
        if before is not None:
            before.close()
        found.start()
        found.ring()  # the arbiter may have looked before the state was there

    @property
    def attached(self) -> bool:
        """Whether there is an arbiter."""
        return self._bell is not None

    def work(self, *, has: bool) -> None:
        """Say whether there is work: requests that could run. Rings if others share a device."""
        with self._lock:
            words = self._words
            state = words[_STATE]
            if bool(state & _WORKING) == has and (has or not words[_HELD_SINCE]):
                return
            words[_STATE] = state | _WORKING if has else state & ~_WORKING
            if not has:
                self._end_hold(words)
            if words[_CONTENDED]:
                self._ring()

    def may_begin(self) -> bool:
        """Return whether a step may begin now. Makes no system call."""
        words = self._words
        until: int = words[_UNTIL]
        return until == _FREE or until > monotonic_ns() or words[_BEGUN] < words[_ALLOWED]

    def hold(self) -> None:
        """Say that a step would begin, were it not held. Idempotent; ends with :meth:`begin`, or without work."""
        with self._lock:
            words = self._words
            if not words[_HELD_SINCE]:
                words[_HELD_SINCE] = monotonic_ns()
                self._ring()
            if self._bell is not None:
                self._bell.watch()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until a step may begin, as :meth:`hold` says. Returns False if the time is over."""
        ends = None if timeout_s is None else monotonic() + timeout_s
        while not self.may_begin():
            self.hold()
            with self._lock:
                if self.may_begin():
                    break
                left = None if ends is None else ends - monotonic()
                if left is not None and left <= 0:
                    return False
                self._news.wait(left)
        return True

    def begin(self) -> None:
        """Say that a step begins: one more batch is in flight."""
        with self._lock:
            words = self._words
            state = words[_STATE]
            if not state & _IN_FLIGHT:
                words[_BUSY_SINCE] = monotonic_ns()
            words[_STATE] = state + 1
            words[_BEGUN] += 1
            if words[_HELD_SINCE]:
                self._end_hold(words)

    def end(self, in_flight: int = 0) -> None:
        """Say that a step ended, and how many batches are left in flight."""
        with self._lock:
            words = self._words
            words[_ENDED] += 1
            words[_STATE] = words[_STATE] & _WORKING | in_flight
            since = words[_BUSY_SINCE]
            if in_flight:
                if not since:
                    words[_BUSY_SINCE] = monotonic_ns()
                return
            if since:
                words[_BUSY_SINCE] = 0  # first: a reader in between sees too little, and never counts twice
                words[_BUSY] += monotonic_ns() - since
            if words[_CONTENDED] and (not words[_STATE] & _WORKING or not self.may_begin()):
                self._ring()  # nobody has to wait any more: the work ended before, or the turn

    @property
    def contended(self) -> bool:
        """Whether others share a device, so that it matters to them when a step has ended. Makes no system call."""
        return bool(self._words[_CONTENDED])

    @property
    def short(self) -> bool:
        """Whether steps should be short, as a more important workload works, or did within the last second."""
        until: int = self._words[layout.SHORT_UNTIL_WORD]
        return until != 0 and until > monotonic_ns()

    def close(self) -> None:
        """Leave the arbiter for good; steps begin freely. Idempotent."""
        with self._lock:
            self._closed = True
            bell, self._bell = self._bell, None
            self._lost = _nothing
            self._move(free_words())
        if bell is not None:
            bell.close()

    # Called in the bell's thread.

    def heard(self, bell: Bell) -> None:
        """Let steps begin that wait and may."""
        with self._lock:
            if bell is not self._bell:
                return
            self._news.notify_all()
        if self.may_begin():
            _call(self._changed)

    def gone(self, bell: Bell, why: str) -> None:
        """Go on without the arbiter."""
        with self._lock:
            if bell is not self._bell:
                return
            self._bell = None
            lost, self._lost = self._lost, _nothing
            self._move(free_words())
        log.warning("The arbiter is gone: %s. Steps begin without turns until there is another one.", why)
        _call(self._changed)
        _call(lost)

    def held(self, bell: Bell) -> int | None:
        """Return the time of the arbiter's last look if the workload is held; None if it is not."""
        with self._lock:
            words = self._words
            if bell is not self._bell or not words[_HELD_SINCE] or self.may_begin():
                return None
            looked: int = words[layout.LOOKED_WORD]
            return looked

    # With the lock.

    def _move(self, words: memoryview) -> None:
        """Write to other words from here on, beginning with the present state."""
        own = slice(_STATE, _HELD_SINCE + 1)
        words[own] = self._words[own]
        self._words = words
        self._news.notify_all()

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    @staticmethod
    def _end_hold(words: memoryview) -> None:
        since = words[_HELD_SINCE]
        if since:
            words[_HELD_SINCE] = 0
            words[_HELD] += monotonic_ns() - since

    def _begin_without(self) -> None:
        self._lock = threading.RLock()  # the collector may close the gate of an engine in any thread
        self._news = threading.Condition(self._lock)
        self._words = free_words()
        self._bell = None

    def _leave_to_parent(self) -> None:
        """In a forked child: the page and the socket are the parent's, whose end must close the socket."""
        bell = self._bell
        self._begin_without()
        if bell is not None:
            bell.forget()


def _call(told: Callable[[], None]) -> None:
    """Call a function of the workload's. Its errors must not end the thread that listens to the arbiter."""
    try:
        told()
    except Exception:
        log.exception("The workload was not told of a change of its turns")


def _nothing() -> None:
    """Do nothing."""


def _forked() -> None:
    for gate in list(_gates):
        gate._leave_to_parent()  # noqa: SLF001 - a function of this module


os.register_at_fork(after_in_child=_forked)
