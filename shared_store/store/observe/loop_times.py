"""How long the event loop is occupied: the duration of every callback, and of every garbage collection.

While a callback runs, no other client is answered. A callback that takes longer than :data:`SLOW_S` is logged with its
name. Its duration is wall time, which includes the wait for a processor and for other threads of the process. The CPU
time of the event loop's thread is measured beside it, and tells a slow callback from a busy machine.

Relies on: :mod:`gc` calling :data:`gc.callbacks` right before and after a collection, in the thread that collects.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from contextvars import Context
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any, Final, TypeVarTuple

from shared_store.base.status import LoopStatus
from shared_store.store.observe.pauses import Pauses

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

_Ts = TypeVarTuple("_Ts")

log = logging.getLogger(__name__)

SLOW_S: Final = 0.05
"""Seconds from which a callback is logged."""

LOG_EVERY_S: Final = 10.0
"""Least seconds between two such messages."""


class LoopTimes:
    """Durations of callbacks and collections since the process started."""

    def __init__(self) -> None:
        self._callbacks = Pauses()
        self._collections = Pauses()
        self._longest_callback = ""
        self._longest_cpu_s = 0.0
        self._cpu_s = thread_time()  # created in the thread that will run the event loop
        self._logged_at = float("-inf")
        self._collecting_since = 0.0

    def run(self, callback: Callable[[*_Ts], object], *arguments: *_Ts) -> None:
        """Call the callback, and count its duration. Called in the event loop's thread only."""
        began = perf_counter()
        try:
            callback(*arguments)
        finally:
            ended = perf_counter()
            cpu_s, self._cpu_s = self._cpu_s, thread_time()
            self._count(callback, ended - began, self._cpu_s - cpu_s)

    def watch_collections(self) -> None:
        """Count garbage collections from here on."""
        gc.callbacks.append(self._on_collection)

    def status(self) -> LoopStatus:
        """Return the part of the status."""
        return LoopStatus(
            self._callbacks.status(), self._collections.status(), self._longest_callback, self._longest_cpu_s
        )

    def _count(self, callback: Callable[..., object], seconds: float, cpu_s: float) -> None:
        if self._callbacks.add(seconds):
            self._longest_callback = name_of(callback)
        self._longest_cpu_s = max(self._longest_cpu_s, cpu_s)
        if seconds >= SLOW_S and perf_counter() >= self._logged_at + LOG_EVERY_S:
            self._logged_at = perf_counter()
            log.warning(
                "the event loop was occupied for %.0f ms (%.0f ms of CPU time) by %s",
                seconds * 1e3,
                cpu_s * 1e3,
                name_of(callback),
            )

    def _on_collection(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._collecting_since = perf_counter()
        else:
            self._collections.add(perf_counter() - self._collecting_since)


class TimedLoop(asyncio.SelectorEventLoop):
    """An event loop that times its callbacks, through the public methods by which they are scheduled."""

    def __init__(self, times: LoopTimes) -> None:
        self._run = times.run
        super().__init__()

    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Schedule a timed callback."""
        return super().call_soon(self._run, callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Schedule a timed callback from another thread."""
        return super().call_soon_threadsafe(self._run, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Schedule a timed callback at a time of the loop's clock; ``call_later`` comes here, too."""
        return super().call_at(when, self._run, callback, *args, context=context)

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[*_Ts], Any], *args: *_Ts) -> None:
        """Call a timed callback whenever a descriptor is readable."""
        super().add_reader(fd, self._run, callback, *args)

    def add_writer(self, fd: FileDescriptorLike, callback: Callable[[*_Ts], Any], *args: *_Ts) -> None:
        """Call a timed callback whenever a descriptor is writable."""
        super().add_writer(fd, self._run, callback, *args)

    def add_signal_handler(self, sig: int, callback: Callable[[*_Ts], object], *args: *_Ts) -> None:
        """Call a timed callback whenever a signal arrives."""
        super().add_signal_handler(sig, self._run, callback, *args)


def name_of(callback: Callable[..., object]) -> str:
    """Return a name for a callback: that of the coroutine, for a step of a task."""
    owner = getattr(callback, "__self__", None)
    named = owner.get_coro() if isinstance(owner, asyncio.Task) else callback
    return str(getattr(named, "__qualname__", named))
