"""What a store has with its keeper: it tells what is to be held, and starts another keeper when that one dies.

State goes out in order and without acknowledgement (see :mod:`shared_store.protocol.keeper_messages`). A keeper that
reads slowly or not at all holds nobody up for long: what it was not told is told later, and the status says so. Under a
service manager a keeper that died is the manager's to replace.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

import shared_store
from shared_store.base.errors import UpgradeError
from shared_store.base.status import KeeperStatus
from shared_store.protocol import keeper_messages
from shared_store.protocol.durable_state import DurableState
from shared_store.protocol.handover import Handover, changes_of, leave
from shared_store.runtime.backoff import delays
from shared_store.runtime.options import ServeOptions
from shared_store.store.keeper_link.channel import ControlChannel

log = logging.getLogger(__name__)

TAKES_WITHIN_S = 2.0
"""How long the answer to a commit waits for a keeper that does not read."""

_STEADY_S = 10.0


@dataclass(frozen=True)
class Inheritance:
    """What a store begins with: its settings, a listening socket, the lock's fd, and what was held before it."""

    options: ServeOptions
    listen: socket.socket
    lock: int
    held: DurableState
    keeper: int = 0
    restarts: int = 0
    supervised: bool = False


def inherit(channel: ControlChannel) -> Inheritance:
    """Say that this process is prepared; wait for what is held, and for the word to begin.

    Raises:
        ConnectionLostError: the keeper ended.
    """
    channel.send(keeper_messages.Prepared(shared_store.__version__))
    held = DurableState()
    while True:
        message, fds = channel.wait_for()
        if isinstance(message, keeper_messages.Begin):
            listen, lock = (fd.detach() for fd in fds.detach())
            options = ServeOptions.from_json(message.options)
            sock = socket.socket(fileno=listen)
            return Inheritance(options, sock, lock, held, message.keeper, message.restarts, message.supervised)
        if isinstance(message, keeper_messages.StateChange):
            held.apply(message, fds)


class Keeping:
    """A keeper that is told; or, without a channel, nobody is."""

    def __init__(self, inheritance: Inheritance | None = None, channel: ControlChannel | None = None) -> None:
        """``channel``: with the keeper that left the inheritance."""
        self._inheritance = inheritance
        self._channel = channel
        self._pid = inheritance.keeper if inheritance else 0
        self._child: subprocess.Popen[bytes] | None = None
        held = inheritance.held.segments if inheritance else {}
        self._told = {number for number, found in held.items() if found.fd is not None}
        self._lost_fds = set(held) - self._told
        self._journal = ""
        self._gone = ""
        self._slow = ""
        self._replacing = delays()
        self._replaced_at = 0.0
        self._upgrade: asyncio.Future[str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.holdings: Callable[[], DurableState] = DurableState
        """All that is to be held, with fds of their own; for a keeper that begins with nothing."""
        self.event: Callable[..., None] = lambda *_, **__: None

    # The life of a store.

    def start(self) -> None:
        """Clients are served: say so, and go on to show that this process lives."""
        if self._channel is None or self._inheritance is None:
            return
        self._channel.attend(self._hear, self._lost)
        self._channel.send(keeper_messages.Ready())
        if patience := self._inheritance.options.watchdog_s:
            self._run(self._show_life(patience / 4))

    async def stop(self) -> None:
        """This store ends in good order, and the keeper with it."""
        for task in self._tasks:
            task.cancel()
        if self._channel is not None:
            self._channel.send(keeper_messages.Stop())
            await self._channel.flushed(TAKES_WITHIN_S)

    async def upgrade(self, python: str, environment: dict[str, str]) -> None:
        """Have another installation's store take this one's place; if all goes well, this process does not live on.

        Raises:
            UpgradeError: it came to nothing.
        """
        if self._channel is None:
            raise UpgradeError("this store runs without a keeper: `wooly stop`, then start the new version")
        if self._upgrade is not None:
            raise UpgradeError("another upgrade is under way")
        self._upgrade = asyncio.get_running_loop().create_future()
        self._channel.send(keeper_messages.Upgrade(python, environment))
        try:
            raise UpgradeError(await self._upgrade)
        finally:
            self._upgrade = None

    # What is to be held.

    def hold(self, segment: keeper_messages.SegmentRecord, export: Callable[[], int]) -> None:
        """Have a segment held, unless it is; ``export`` makes an fd of it, which is not the caller's."""
        if self._channel is not None and segment.id not in self._told:
            self._told.add(segment.id)
            self._channel.send(keeper_messages.Hold(segment), (export(),))

    def release(self, segment: int) -> None:
        """A segment is needed no more."""
        if segment in self._told or segment in self._lost_fds:
            self._told.discard(segment)
            self._lost_fds.discard(segment)
            self._tell(keeper_messages.Release(segment))

    def tell(
        self, *changes: keeper_messages.NoteModel | keeper_messages.ForgetModel | keeper_messages.NoteFiles
    ) -> None:
        """Have it noted."""
        for change in changes:
            self._tell(change)

    async def flushed(self) -> None:
        """Wait until the keeper will have all that it was told, whatever becomes of this process."""
        if self._channel is not None and not await self._channel.flushed(TAKES_WITHIN_S):
            self._slow = "the keeper does not take what it is told"
            log.error("%s", self._slow)

    # For the status.

    @property
    def reasons(self) -> tuple[str, ...]:
        """What of all this is not as it should be."""
        if self._slow and (self._channel is None or not self._channel.behind):
            self._slow = ""
        return tuple(filter(None, (self._gone, self._journal, self._slow)))

    def status(self) -> KeeperStatus | None:
        """The keeper, if there is one."""
        if self._inheritance is None or not self._inheritance.keeper:
            return None
        return KeeperStatus(
            self._pid,
            "gone" if self._gone else "ok",
            self._inheritance.restarts,
            "degraded" if self._journal else "ok",
        )

    # Inside.

    def _tell(self, message: keeper_messages.KeeperMessage, fds: Sequence[int] = ()) -> None:
        if self._channel is not None:
            self._channel.send(message, fds)

    async def _show_life(self, interval_s: float) -> None:
        while True:
            if self._channel is not None and not self._channel.behind:
                self._channel.send(keeper_messages.Alive())
            await asyncio.sleep(interval_s)

    def _hear(self, message: keeper_messages.FromKeeper) -> None:
        match message:
            case keeper_messages.JournalState(reason):
                self._journal = reason
                if self._gone:
                    self._gone = ""
                    log.info("another keeper (pid %d) has taken over", self._pid)
            case keeper_messages.Notice(kind, detail):
                self.event(kind, detail=detail)
            case keeper_messages.NotUpgraded(reason):
                self._not_upgraded(reason)

    def _not_upgraded(self, reason: str) -> None:
        if self._upgrade is not None and not self._upgrade.done():
            self._upgrade.set_result(reason)

    def _lost(self) -> None:
        """The keeper is gone. Engines go on, and so does this store."""
        self._channel = None
        self._told.clear()
        self._lost_fds.clear()
        self._gone = f"the keeper (pid {self._pid}) is gone"
        self._not_upgraded("the new keeper ended; the store's log says why")
        self.event("keeper_lost", detail=self._gone)
        if self._inheritance is None or self._inheritance.supervised:
            log.error("%s; the service manager is to start another", self._gone)
        else:
            log.error("%s; starting another", self._gone)
            self._run(self._replace(self._inheritance))

    async def _replace(self, inheritance: Inheritance) -> None:
        if self._child is not None:
            self._child.kill()  # it hung up, so it is as good as gone
            self._child.wait()
        if time.monotonic() > self._replaced_at + _STEADY_S:
            self._replacing = delays()
        else:
            await asyncio.sleep(next(self._replacing))
        self._replaced_at = time.monotonic()
        ours, theirs = socket.socketpair()
        held = self.holdings()
        # From here on the new keeper is told what changes; it reads it once it runs.
        self._told = set(held.segments)
        self._channel = ControlChannel(ours)
        self._channel.attend(self._hear, self._lost)
        try:
            self._child = await asyncio.to_thread(_start_keeper, inheritance, held, theirs)
            self._pid = self._child.pid
        except OSError as error:
            log.error("no keeper can be started: %s", error)
        finally:
            theirs.close()
            held.close()

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _start_keeper(inheritance: Inheritance, held: DurableState, theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Start a keeper for this process, with all that it needs."""
    with contextlib.ExitStack() as closing:
        pidfd = os.pidfd_open(os.getpid())
        closing.callback(os.close, pidfd)
        handover = Handover(
            options=inheritance.options.to_json(),
            lock=inheritance.lock,
            listen=inheritance.listen.fileno(),
            control=theirs.fileno(),
            store=pidfd,
            store_pid=os.getpid(),
            restarts=inheritance.restarts,
            changes=changes_of(held),
        )
        left = closing.enter_context(leave(handover))
        directory = os.fspath(inheritance.options.runtime_dir)
        command = [sys.executable, "-m", "shared_store.keeper", directory, "", "", str(left.fileno())]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(left.fileno(), *handover.fds), start_new_session=True
        )
