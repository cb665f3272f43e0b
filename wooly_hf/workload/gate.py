"""The gate of a process: counts threads that use models, and holds them at its boundary while the models are away.

Threads whose next step has to wait for other workloads of the device (:mod:`~wooly_hf.workload.turns`) wait at the same
boundaries, so the models may leave meanwhile. A step is the outermost call of a model in a thread.

A thread *enters* at a boundary: the call of a model, the beginning of ``generate``. Boundaries nest: in ``generate``
each call of the model is one. While the gate is closed, a thread waits at the boundary that it meets, asks for the
models, and goes on once the gate is open. So the gate is closed with all threads outside, or waiting at a boundary
inside; none of them is in a step then.

Relies on frames: an exception that torch's hooks do not see (``KeyboardInterrupt``) leaves an entry behind whose frame
runs no more; it is removed when the gate is closed, the thread enters again, or :meth:`Gate.look` is called.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import FrameType
from typing import Final

from shared_store.activity.writer import ActivityWriter
from shared_store.base.errors import DeclinedError
from wooly_hf.workload.turns import Turns

_LOOK_AGAIN_S: Final = 1.0
"""Seconds after which the gate looks again: for entries whose frame has ended, and whether a step may begin."""


class Use(Enum):
    """What a thread does with the models inside of a boundary."""

    WEIGHTS = "it uses weights"
    WORK = "it computes in steps, each of which is a boundary inside"
    STEP = "it computes"


@dataclass(frozen=True, eq=False)
class _Entry:
    """One passage of a boundary. ``frame``: runs until the thread has left it; None: it always leaves."""

    key: Hashable
    frame: FrameType | None
    use: Use


class Gate:
    """One for each process. Thread-safe."""

    def __init__(self, come_back: Callable[[], None], activity: ActivityWriter, turns: Turns) -> None:
        """Begin open.

        Args:
            come_back: waits until the models are back, in a thread that met the closed gate. It may raise; the thread
                does not enter then.
            activity: says how many threads use models, and how many wait.
            turns: says whether steps may begin. Call :meth:`changed` when that changes.
        """
        self._come_back = come_back
        self._activity = activity
        self._turns = turns
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._inside: dict[int, list[_Entry]] = {}
        self._waiting: set[int] = set()
        self._held: set[int] = set()
        self._steps: dict[int, _Entry] = {}
        self.closed = False
        """Whether threads wait at it."""

    def enter(self, key: Hashable, frame: FrameType | None = None, use: Use = Use.WEIGHTS) -> None:
        """Pass a boundary, or wait at it while the gate is closed, or while a step may not begin.

        Args:
            key: for :meth:`leave`.
            frame: of a function that runs until the thread leaves; None if it is sure to leave.
            use: what the thread does inside.

        Raises:
            WoolyError: the models could not return. The thread has not entered.
        """
        me, entry = threading.get_ident(), _Entry(key, frame, use)
        with self._lock:
            self._drop_ended(me)
            self._inside.setdefault(me, []).append(entry)
            try:
                self._wait()
                self._say()
                if use is Use.STEP and me not in self._steps:
                    self._turns.end_failed()
                    self._wait_for_turn(me)
                    self._steps[me] = entry
                    self._turns.begin()
            except BaseException:
                self._remove(me, entry)
                raise

    def leave(self, key: Hashable) -> bool:
        """Leave the innermost boundary with a key. Does nothing without one. Returns whether a step ended."""
        me = threading.get_ident()
        with self._lock:
            entry = next((entry for entry in reversed(self._inside.get(me, ())) if entry.key == key), None)
            ends = entry is not None and self._steps.get(me) is entry
        if entry is not None:
            try:
                if ends:
                    self._turns.settle()
            finally:
                self._remove(me, entry)
        return ends

    @property
    def stepping(self) -> bool:
        """Whether this thread is in a step."""
        me = threading.get_ident()
        if (entry := self._steps.get(me)) is not None and entry.frame is not None:
            with self._lock:
                self._drop_ended(me)
        return me in self._steps

    @contextlib.contextmanager
    def using(self, use: Use = Use.WEIGHTS) -> Iterator[None]:
        """Be inside for a block."""
        key = object()
        self.enter(key, use=use)
        try:
            yield
        finally:
            self.leave(key)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Wait until the gate is open, and keep it from being closed for a short block."""
        with self._lock:
            self._wait()
            yield

    def close(self, *, active: bool, within_s: float) -> None:
        """Close it, and wait until no thread is in a step.

        Args:
            active: also while threads are inside.
            within_s: seconds to wait for them; 0: without a limit.

        Raises:
            DeclinedError: threads use models. The gate is open.
        """
        until = time.monotonic() + within_s if within_s else None
        with self._lock:
            self.closed = True
            try:
                declined = self._wait_for_threads(active, until)
            except BaseException:
                self.open()
                raise
            if declined:
                self.open()
                raise DeclinedError(declined)
            self._say()

    def _wait_for_threads(self, active: bool, until: float | None) -> str:
        """Wait until no thread is in a step. Returns why that does not happen; empty if it does."""
        while working := self._working():
            left = _LOOK_AGAIN_S if until is None else until - time.monotonic()
            if not active:
                return "its models are in use"
            if left <= 0:
                return f"threads did not begin another forward pass in time ({len(working)} of them)"
            self._changed.wait(min(left, _LOOK_AGAIN_S))
        return ""

    def open(self) -> None:
        """Let threads pass."""
        with self._lock:
            self.closed = False
            self._changed.notify_all()

    def changed(self) -> None:
        """Let threads look whether their steps may begin."""
        with self._lock:
            if self._held:
                self._changed.notify_all()

    def look(self) -> None:
        """Look for entries whose frame has ended: the activity shows them until then."""
        with self._lock:
            self._drop_ended()
        self._turns.look()

    @property
    def in_use(self) -> bool:
        """Whether threads are inside, or wait."""
        with self._lock:
            self._drop_ended()
            return bool(self._inside or self._waiting)

    def _wait(self) -> None:
        """Wait until the gate is open. The caller has the lock, once; it is released meanwhile."""
        me = threading.get_ident()
        while self.closed:
            self._waiting.add(me)
            self._say()
            self._changed.notify_all()
            self._lock.release()
            try:
                self._come_back()
            finally:
                self._lock.acquire()
                self._waiting.discard(me)
                self._say()

    def _wait_for_turn(self, me: int) -> None:
        """Wait until a step of this thread may begin, and the gate is open. The caller has the lock, once."""
        while not self._turns.may_begin():
            self._waiting.add(me)
            self._held.add(me)
            try:
                self._say()
                self._changed.notify_all()
                self._turns.hold()
                self._changed.wait(_LOOK_AGAIN_S)
            finally:
                self._waiting.discard(me)
                self._held.discard(me)
                self._say()
            self._wait()

    def _working(self) -> list[int]:
        """Return the threads that are inside and do not wait."""
        self._drop_ended()
        return [thread for thread in self._inside if thread not in self._waiting]

    def _remove(self, thread: int, entry: _Entry) -> None:
        with self._lock:
            entries = [other for other in self._inside.get(thread, ()) if other is not entry]
            if entries:
                self._inside[thread] = entries
            else:
                self._inside.pop(thread, None)
            self._end_step(thread, entry)
            self._say()
            self._changed.notify_all()

    def _end_step(self, thread: int, entry: _Entry) -> None:
        if self._steps.get(thread) is entry:
            del self._steps[thread]
            self._turns.end()

    def _drop_ended(self, only: int | None = None) -> None:
        """Remove entries whose frame runs no more. ``only``: of this thread."""
        threads = [thread for thread in self._inside if only in (None, thread) and _framed(self._inside[thread])]
        if not threads:
            return
        frames, dropped = sys._current_frames(), 0
        for thread in threads:
            entries, running = self._inside[thread], _stack(frames.get(thread))
            left = [entry for entry in entries if entry.frame is None or entry.frame in running]
            dropped += len(entries) - len(left)
            self._inside[thread] = left
            for entry in entries:
                if entry not in left:
                    self._end_step(thread, entry)
            if not left:
                del self._inside[thread]
        if dropped:
            self._say()

    def _say(self) -> None:
        """Write the activity: threads in models, and threads that wait. Say whether there is work for the device."""
        self._activity.end(sum(thread not in self._waiting for thread in self._inside), len(self._waiting))
        self._turns.work(has=any(map(self._computes, self._inside)))

    def _computes(self, thread: int) -> bool:
        """Whether a thread computes, or would if it were not held. One that waits for the models has nothing to do."""
        if thread in self._waiting and thread not in self._held:
            return False
        return any(entry.use is not Use.WEIGHTS for entry in self._inside[thread])


def _framed(entries: list[_Entry]) -> bool:
    return any(entry.frame is not None for entry in entries)


def _stack(frame: FrameType | None) -> set[FrameType]:
    found = set()
    while frame is not None:
        found.add(frame)
        frame = frame.f_back
    return found
