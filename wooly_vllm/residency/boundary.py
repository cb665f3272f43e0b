"""Step boundaries of an engine: moments at which no step is being made, and another thread's function may run.

An engine core in a process of its own has a loop, whose thread alone may touch scheduler and executor: functions are
posted to it, and a message wakes it up. An engine in the caller's process has no loop: its methods and posted functions
exclude each other by a lock.

Relies on ``EngineCoreProc.input_queue``, which another thread may put a ``WAKEUP`` in.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from shared_store.base.errors import DeclinedError
from wooly_vllm import compat

T = TypeVar("T")

CLOSED = "the engine ends"


class Boundary(ABC):
    """Runs functions at step boundaries of one engine."""

    @abstractmethod
    def run(self, function: Callable[[], T], within_s: float = 0.0) -> T:
        """Run a function at the next step boundary, and wait for it. For threads other than the engine's.

        Args:
            function: raises what the caller gets.
            within_s: seconds until it must have begun; 0: no limit.

        Raises:
            DeclinedError: there was no boundary in time, or the engine ends. The function has not run, and will not.
        """

    @abstractmethod
    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Enter a method of the engine: posted functions run before or after, not meanwhile. Reentrant."""

    @abstractmethod
    def calling(self) -> contextlib.AbstractContextManager[None]:
        """Call a method of the executor, possibly in the middle of a step: posted functions do not run meanwhile."""

    @abstractmethod
    def wake(self) -> None:
        """Let a loop that waits for messages look at its engine again. From any thread."""

    @abstractmethod
    def close(self) -> None:
        """Run nothing any more: functions that wait are refused. Idempotent."""


class CallersBoundary(Boundary):
    """Of an engine in the caller's process."""

    def __init__(self) -> None:
        """Begin outside of all methods."""
        self._lock = threading.RLock()
        self._closed = False

    def run(self, function: Callable[[], T], within_s: float = 0.0) -> T:
        """Run a function in this thread, between two calls of the engine."""
        if not self._lock.acquire(timeout=within_s or -1):
            raise DeclinedError(_late(within_s))
        try:
            if self._closed:
                raise DeclinedError(CLOSED)
            return function()
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Hold the lock."""
        with self._lock:
            yield

    calling = entered

    def wake(self) -> None:
        """Do nothing: there is no loop."""

    def close(self) -> None:
        """Refuse what comes later; a function that runs ends first."""
        self._closed = True


class LoopBoundary(Boundary):
    """Of an engine core with a loop."""

    def __init__(self, engine: Any) -> None:
        """Use the loop's queue. This is the loop's thread."""
        (kind,) = compat.find("vllm.v1.engine", "EngineCoreRequestType")
        self._wakeup = (kind.WAKEUP, None)
        self._queue = engine.input_queue
        self._thread = threading.get_ident()
        self._posted: deque[_Posted] = deque()
        self._arrived = threading.Condition()
        self._running = False
        self._inside = 0
        self._closed = False

    def run(self, function: Callable[[], T], within_s: float = 0.0) -> T:
        """Post a function to the loop's thread, or run it, if that is this thread."""
        if threading.get_ident() == self._thread:
            return function()
        posted = _Posted(function)
        with self._arrived:
            if self._closed:
                raise DeclinedError(CLOSED)
            self._posted.append(posted)
            self._arrived.notify_all()
        self.wake()
        if within_s and not posted.begun.wait(within_s) and posted.refuse():
            raise DeclinedError(_late(within_s))
        posted.ended.wait()
        return posted.result()  # type: ignore[no-any-return]  # the function's

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run what was posted, first, unless this is called by another method: a step aborts requests in its middle."""
        if not self._inside:
            self._run_posted()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Do nothing: posted functions run in the thread that calls."""
        yield

    def wake(self) -> None:
        """Post a message that says nothing."""
        self._queue.put_nowait(self._wakeup)

    @property
    def idle(self) -> bool:
        """Whether the loop's thread is in no method and no posted function: the loop itself asks."""
        return not self._inside and not self._running

    def _run_posted(self) -> None:
        if self._running or not self._posted:  # a posted function makes steps, too
            return
        self._running = True
        try:
            while self._posted:
                self._posted.popleft()()
        finally:
            self._running = False

    def wait(self, until: Callable[[], bool]) -> None:
        """Run posted functions, in the loop's thread, until one has made a condition true.

        Raises:
            DeclinedError: the engine ends.
        """
        while not until():
            self.linger(None)
            if self._closed:
                raise DeclinedError(CLOSED)

    def linger(self, timeout_s: float | None) -> None:
        """Wait until something is posted, and run it."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._posted or self._closed, timeout_s)
        self._run_posted()

    def close(self) -> None:
        """Refuse what was posted and has not run."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        while self._posted:
            with contextlib.suppress(IndexError):  # a thread that gave up may take it
                self._posted.popleft().refuse()


class _Posted:
    """A posted function."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self.begun = threading.Event()
        self.ended = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

    def __call__(self) -> None:
        """Run, unless it was refused."""
        with self._lock:
            if self.ended.is_set():
                return
            self.begun.set()
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._error = error
        self.ended.set()

    def refuse(self) -> bool:
        """Let it not run any more. Returns False if it has begun."""
        with self._lock:
            if self.begun.is_set():
                return False
            self._error = DeclinedError(CLOSED)
            self.ended.set()
            return True

    def result(self) -> Any:
        """Return the function's result, or raise its error."""
        if self._error is not None:
            raise self._error
        return self._value


def boundary_of(engine: Any) -> Boundary:
    """Return the step boundaries of an engine core."""
    return LoopBoundary(engine) if hasattr(engine, "input_queue") else CallersBoundary()


def _late(within_s: float) -> str:
    return f"the engine reached no step boundary in {within_s:.1f} s"


def deadline(within_s: float) -> Callable[[], bool]:
    """Return a function that says whether so many seconds have passed; 0: never."""
    end = time.monotonic() + within_s
    return lambda: bool(within_s) and time.monotonic() > end
