"""The arbiter's process: started when it is needed, watched, and started again with a growing delay when it ends.

The arbiter ends by itself when the store's end of its socket closes. One that reports nothing for a while although it
has workloads is killed: what it held would be held for ever, while without an arbiter all steps are free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Final

from shared_store.compute import control
from shared_store.runtime.backoff import delays
from shared_store.runtime.fds import OwnedFds
from shared_store.store.compute.link import ArbiterLink

log = logging.getLogger(__name__)

STEADY_S: Final = 10.0
"""Seconds that an arbiter runs before its end is the first of a new series, with the shortest delay."""

LOOK_S: Final = 2.0
"""Seconds between two looks at whether it reports."""

SILENT_LOOKS: Final = 4
"""Looks in a row without a report, after which it is killed. Several, since this process may have been stopped too."""

_END_S: Final = 2.0
"""Seconds that an arbiter has to end by itself."""


class ArbiterProcess:
    """At most one arbiter at a time."""

    def __init__(
        self,
        rules: control.Rules,
        *,
        started: Callable[[], None],
        hear: Callable[[control.ToStore], None],
        lost: Callable[[str], None],
        watched: Callable[[], bool],
    ) -> None:
        """Start nothing yet.

        Args:
            rules: its settings.
            started: called when there is a new one, which knows the rules and nothing else.
            hear: called with its messages.
            lost: called with the reason when it ended, and is not there any more.
            watched: whether it must report: it has workloads.
        """
        self._rules = rules
        self._started = started
        self._hear = hear
        self._lost = lost
        self._watched = watched
        self._link: ArbiterLink | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = False
        self._look: asyncio.TimerHandle | None = None
        self._silent = 0
        self._waits = delays()
        self._since = 0.0
        self._not_before = 0.0
        self._stopping = asyncio.Event()

    @property
    def running(self) -> bool:
        """Whether there is an arbiter."""
        return self._link is not None

    @property
    def pid(self) -> int | None:
        """The pid of the arbiter; None: there is none."""
        return self._process.pid if self._process is not None and self._link is not None else None

    def need(self) -> None:
        """Start an arbiter, unless there is one, or one is about to be started."""
        if self._link is None and not self._starting and not self._stopping.is_set():
            self._starting = True
            self._task(self._start())

    def send(self, message: control.ToArbiter, fds: OwnedFds | None = None) -> None:
        """Send the arbiter a message; close the descriptors if there is none."""
        if self._link is not None:
            self._link.send(message, fds)
        elif fds is not None:
            fds.close()

    async def stop(self) -> None:
        """End the arbiter, and wait for its end."""
        self._stopping.set()
        self._unlink()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _task(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self) -> None:
        """Start one, as soon as the delay after the last one allows."""
        try:
            while self._link is None and not self._stopping.is_set():
                await self._delay()
                if not self._stopping.is_set():
                    await self._try()
        finally:
            self._starting = False

    async def _delay(self) -> None:
        """Wait until one may be started, or none will be."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._not_before - time.monotonic())):
                await self._stopping.wait()

    async def _try(self) -> None:
        """Start one. Tell what happens if that fails."""
        try:
            ours, process = await asyncio.to_thread(_spawn)
        except OSError as error:
            wait_s = self._put_off()
            log.error("cannot start an arbiter (%s); trying again in %.1f s", error.strerror or error, wait_s)
            return
        self._process, self._since, self._silent = process, time.monotonic(), 0
        loop = asyncio.get_running_loop()
        self._link = ArbiterLink(ours, self._heard, self._over)
        if self._stopping.is_set():
            self._unlink()
            return
        self._link.send(self._rules)
        self._look = loop.call_later(LOOK_S, self._look_at_it)
        log.info("the arbiter runs: pid %d", process.pid)
        self._started()

    def _put_off(self) -> float:
        """Set the time before which no arbiter is started; return the seconds until then."""
        if self._since and time.monotonic() - self._since > STEADY_S:
            self._waits = delays()
        self._since = 0.0
        wait_s = next(self._waits)
        self._not_before = time.monotonic() + wait_s
        return wait_s

    def _heard(self, message: control.ToStore) -> None:
        self._silent = 0
        self._hear(message)

    def _look_at_it(self) -> None:
        """Kill an arbiter that reports nothing."""
        self._silent = self._silent + 1 if self._watched() else 0
        if self._silent >= SILENT_LOOKS:
            self._over(f"it reported nothing for {SILENT_LOOKS * LOOK_S:.0f} s, and was killed")
        else:
            self._look = asyncio.get_running_loop().call_later(LOOK_S, self._look_at_it)

    def _over(self, reason: str) -> None:
        """The arbiter is gone, or must be."""
        self._unlink()
        wait_s = self._put_off()
        log.error("the arbiter is lost: %s; workloads compute without one for at least %.1f s", reason, wait_s)
        self._lost(reason)

    def _unlink(self) -> None:
        """Close the link, and see to it that the process ends."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._process is not None:
            process, self._process = self._process, None
            self._task(asyncio.to_thread(_end, process, 0.0 if self._silent >= SILENT_LOOKS else _END_S))


def _spawn() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start an arbiter; return the socket to it. It inherits its end, and no other descriptor.

    It is in a process group of its own: an interrupt of the terminal is the store's.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "shared_store.compute.arbiter", str(theirs.fileno())]
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), process_group=0)
        except BaseException:
            ours.close()
            raise
    return ours, process


def _end(process: subprocess.Popen[bytes], within_s: float) -> None:
    """Wait for the end of a process whose socket is closed; kill it if it does not end in time."""
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
