"""Replicates state to the keeper, and replaces a keeper that died. No-op without a keeper.

State is sent in order and without acknowledgement (see :mod:`shared_store.protocol.keeper_messages`); releases are
confirmed (:mod:`shared_store.store.keeper_link.confirmations`). A keeper that reads slowly or not at all does not block
the store: unread messages wait in the channel, and the status reports it. Under a service manager, the manager replaces
a keeper that died.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import time
from collections.abc import Coroutine
from typing import Final

from shared_store.base.errors import UpgradeError, WoolyError
from shared_store.base.status import KeeperStatus
from shared_store.protocol import keeper_messages
from shared_store.protocol.durable_state import DurableState
from shared_store.runtime.backoff import delays
from shared_store.runtime.fds import OwnedFds
from shared_store.store.keeper_link.channel import ControlChannel
from shared_store.store.keeper_link.confirmations import Confirmations
from shared_store.store.keeper_link.inheritance import Inheritance
from shared_store.store.keeper_link.records import Records
from shared_store.store.keeper_link.successor import start_keeper, wait_for_end
from shared_store.store.signals import Signals

log = logging.getLogger(__name__)

TAKES_WITHIN_S: Final = 2.0
"""Seconds that the reply to a commit waits for a keeper that does not read."""

ENDED_WITHIN_S: Final = 5.0
"""Seconds that a keeper that closed its connection has to end."""

_STEADY_S: Final = 10.0
"""Seconds after which another keeper's death is not counted as one of a series."""


class KeeperLink:
    """The store's side of its connection with the keeper."""

    def __init__(
        self,
        records: Records,
        signals: Signals,
        confirmations: Confirmations,
        inheritance: Inheritance | None = None,
        channel: ControlChannel | None = None,
    ) -> None:
        """Connect to the keeper that the inheritance came from.

        Args:
            records: the state to replicate.
            signals: receives events of the keeper.
            confirmations: receives the keeper's confirmations of releases.
            inheritance: settings, descriptors and state that the store started with.
            channel: the connection; None: there is no keeper.
        """
        self._records = records
        self._signals = signals
        self._confirmations = confirmations
        self._inheritance = inheritance
        self._channel = channel
        self._pid = inheritance.keeper if inheritance else 0
        self._child: subprocess.Popen[bytes] | None = None
        held = inheritance.held.segments if inheritance else {}
        self._sent = {number for number, found in held.items() if found.fd is not None}
        self._lost_fds = set(held) - self._sent  # the keeper has their records, but no descriptors
        self._hosts = {number: found.record.host for number, found in held.items()}  # as the keeper knows them
        self._journal = ""
        self._gone = ""
        self._slow = ""
        self._replacing = delays()
        self._replaced_at = 0.0
        self._stop_requested = False
        self._upgrade: asyncio.Future[str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # Lifecycle.

    def start(self) -> None:
        """Report that clients are served, and send signs of life from here on."""
        if self._channel is None or self._inheritance is None:
            return
        self._channel.attend(self._hear, self._lost)
        self._channel.send(keeper_messages.Ready())
        if patience := self._inheritance.options.watchdog_s:
            self._run(self._show_life(patience / 4))

    def request_stop(self) -> None:
        """Record that a client stops this store: a service manager must not bring its models back."""
        self._stop_requested = True

    async def stop(self) -> None:
        """Stop the keeper, because this store was stopped."""
        for task in self._tasks:
            task.cancel()
        if self._channel is not None:
            self._channel.send(keeper_messages.Stop(self._stop_requested))
            await self._channel.flushed(TAKES_WITHIN_S)

    async def upgrade(self, python: str, environment: dict[str, str]) -> None:
        """Replace keeper and store by those of another installation. Success ends this process.

        Args:
            python: the installation's interpreter.
            environment: its ``PYTHON...`` variables.

        Raises:
            UpgradeError: the upgrade failed, and this store goes on.
        """
        if self._channel is None:
            raise UpgradeError("this store runs without a keeper: `wooly stop`, then start the new version")
        if self._upgrade is not None:
            raise UpgradeError("another upgrade is in progress; wait until it ends")
        self._upgrade = asyncio.get_running_loop().create_future()
        self._channel.send(keeper_messages.Upgrade(python, environment))
        try:
            raise UpgradeError(await self._upgrade)
        finally:
            self._upgrade = None

    # Replication.

    def note(self, key: str) -> None:
        """Send a committed model's record, and the descriptors of those of its segments that were not sent yet.

        Must be called after every change of the record.

        Raises:
            MemoryBackendError: a descriptor cannot be duplicated.
        """
        if self._channel is None:
            return
        record = self._records.model(key)
        for number in record.segments:
            self._hold(self._channel, number)
        self._channel.send(keeper_messages.NoteModel(record))

    def _hold(self, channel: ControlChannel, number: int) -> None:
        """Send a segment's record and descriptor, and its host copy, unless they were sent before."""
        record = self._records.segment(number)
        if record.host:
            self._hold(channel, record.host)
        with_fd = number not in self._sent and self._records.allocated(number)
        if not with_fd and self._known(number) and self._hosts.get(number, 0) == record.host:
            return
        fds = OwnedFds([self._records.export(number)] if with_fd else [])
        if with_fd:
            self._sent.add(number)
            self._lost_fds.discard(number)
        elif number not in self._sent:
            self._lost_fds.add(number)
        self._hosts[number] = record.host
        channel.send(keeper_messages.Hold(record), fds)

    def _known(self, segment: int) -> bool:
        """Whether the keeper has the segment's record."""
        return segment in self._sent or segment in self._lost_fds

    def forget(self, key: str) -> None:
        """Report that a model is no longer committed."""
        self._send(keeper_messages.ForgetModel(key))

    def note_files(self, files: keeper_messages.NoteFiles) -> None:
        """Send digests of files."""
        self._send(files)

    def release(self, segment: int, freed: tuple[str, int] | None = None) -> None:
        """Report that a segment is released.

        Args:
            segment: its id.
            freed: device and size in bytes of the memory that the store had of it; None: it had none.
        """
        if self._known(segment):
            if segment in self._sent and freed is not None:
                self._confirmations.begin(segment, *freed)
            self._sent.discard(segment)
            self._lost_fds.discard(segment)
            self._hosts.pop(segment, None)
            self._send(keeper_messages.Release(segment, confirm=True))

    def vacate(self, segment: int, freed: tuple[str, int] | None) -> None:
        """Report that a segment left its device. The keeper keeps its record, and confirms that the memory is free.

        Arguments as of :meth:`release`.
        """
        if segment in self._sent:
            if freed is not None:
                self._confirmations.begin(segment, *freed)
            self._sent.discard(segment)
            self._lost_fds.add(segment)
            self._send(keeper_messages.Vacate(segment, confirm=True))

    async def flushed(self) -> None:
        """Wait until the keeper will receive everything that was sent, even if this process ends now."""
        if self._channel is not None and not await self._channel.flushed(TAKES_WITHIN_S):
            self._slow = "the keeper is not reading its messages"
            log.error("the keeper has not read its messages for %g s", TAKES_WITHIN_S)

    # Status.

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reasons for which the store is degraded."""
        if self._slow and (self._channel is None or not self._channel.behind):
            self._slow = ""
        return tuple(filter(None, (self._gone, self._journal, self._slow, self._confirmations.reason)))

    def status(self) -> KeeperStatus | None:
        """Return the keeper's part of the status; None without a keeper."""
        if self._inheritance is None or not self._inheritance.keeper:
            return None
        return KeeperStatus(
            self._pid,
            "gone" if self._gone else "ok",
            self._inheritance.restarts,
            "degraded" if self._journal else "ok",
        )

    # Messages from the keeper, and its end.

    def _send(self, message: keeper_messages.KeeperMessage) -> None:
        if self._channel is not None:
            self._channel.send(message)

    async def _show_life(self, interval_s: float) -> None:
        while True:
            if self._channel is not None and not self._channel.behind:
                self._channel.send(keeper_messages.Alive())
            await asyncio.sleep(interval_s)

    def _hear(self, message: keeper_messages.FromKeeper) -> None:
        match message:
            case keeper_messages.JournalState(reason, confirms):
                self._journal = reason
                self._confirmations.supported(by_keeper=confirms)
                if self._gone:
                    self._gone = ""
                    log.info("another keeper (pid %d) has taken over", self._pid)
            case keeper_messages.Released(segment):
                self._confirmations.confirmed(segment)
            case keeper_messages.Notice(kind, detail):
                self._signals.event(kind, detail=detail)
            case keeper_messages.NotUpgraded(reason):
                self._not_upgraded(reason)

    def _not_upgraded(self, reason: str) -> None:
        if self._upgrade is not None and not self._upgrade.done():
            self._upgrade.set_result(reason)

    def _lost(self) -> None:
        """Go on without the keeper until there is another."""
        self._channel = None
        self._sent.clear()
        self._lost_fds.clear()
        self._hosts.clear()
        self._gone = f"the keeper (pid {self._pid}) is gone"
        self._not_upgraded("the new keeper ended; the store's log says why")
        self._signals.event("keeper_lost", detail=self._gone)
        if self._inheritance is None or self._inheritance.supervised:
            log.error("%s; the service manager must start another", self._gone)
            self._run(self._ended())
        else:
            log.error("%s; starting another", self._gone)
            self._run(self._replace(self._inheritance))

    async def _ended(self) -> None:
        """Wait until the keeper's process has ended."""
        if self._child is not None:
            self._child.kill()  # it closed its connection, so it no longer replicates
            await asyncio.to_thread(self._child.wait)
        else:
            await asyncio.to_thread(wait_for_end, self._pid, ENDED_WITHIN_S)
        self._confirmations.keeper_ended()

    async def _replace(self, inheritance: Inheritance) -> None:
        await self._ended()
        if time.monotonic() > self._replaced_at + _STEADY_S:
            self._replacing = delays()
        else:
            await asyncio.sleep(next(self._replacing))
        for delay_s in self._replacing:
            begun = self._begin_to_replace()
            if begun is not None:
                await self._start_keeper(inheritance, *begun)
                return
            await asyncio.sleep(delay_s)

    async def _start_keeper(self, inheritance: Inheritance, held: DurableState, theirs: socket.socket) -> None:
        """Start a keeper for the state and its end of the channel, and close both here."""
        try:
            self._child = await asyncio.to_thread(start_keeper, inheritance, held, theirs)
            self._pid = self._child.pid
        except OSError as error:
            log.error("cannot start another keeper: %s", error)  # closing its end of the channel starts the next try
        finally:
            theirs.close()
            held.close()

    def _begin_to_replace(self) -> tuple[DurableState, socket.socket] | None:
        """Attend a new channel; return the state for a keeper and its end, or None if that must be tried again later.

        Changes from here on are sent to the new keeper, which reads them once it runs.
        """
        self._replaced_at = time.monotonic()
        try:
            held = self._records.holdings()
        except WoolyError as error:
            self._not_replaced(error)
            return None
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            held.close()
            self._not_replaced(error)
            return None
        self._sent = {number for number, found in held.segments.items() if found.fd is not None}
        self._lost_fds = set(held.segments) - self._sent
        self._hosts = {number: found.record.host for number, found in held.segments.items()}
        self._channel = ControlChannel(ours)
        self._channel.attend(self._hear, self._lost)
        return held, theirs

    def _not_replaced(self, error: Exception) -> None:
        reason = f"the keeper (pid {self._pid}) is gone, and another cannot be started yet: {error}"
        if reason != self._gone:
            log.error("%s; trying again", reason)
        self._gone = reason

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
