"""The arbiter's loop: it hears the store and the workloads, looks at all pages, decides, and writes.

One thread, one ``select`` at a time. It ends when the store's end of its socket closes. A message of the store that it
does not understand ends it, too: without an arbiter all steps are free.
"""

from __future__ import annotations

import array
import logging
import selectors
import socket
import time
from collections.abc import Callable
from typing import Final

from shared_store.base.errors import ProtocolError, UnsupportedError
from shared_store.compute import control
from shared_store.compute.arbiter.workload import ArbitratedWorkload
from shared_store.compute.decision import decide
from shared_store.compute.layout import LOOK_S
from shared_store.compute.page import map_page
from shared_store.compute.snapshot import History, Settings, Snapshot
from shared_store.compute.usage import charge
from shared_store.runtime.fds import OwnedFd, OwnedFds

log = logging.getLogger(__name__)

_FDS: Final = 2
_RIGHTS: Final = socket.CMSG_SPACE(_FDS * array.array("i").itemsize)


class Arbiter:
    """Decides for the workloads of one store."""

    def __init__(self, store: socket.socket, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Take over the socket to the store. ``monotonic`` returns seconds of ``CLOCK_MONOTONIC``."""
        self._store = store
        store.setblocking(False)
        self._now = monotonic
        self._selector = selectors.DefaultSelector()
        self._selector.register(store, selectors.EVENT_READ)
        self._workloads: dict[int, ArbitratedWorkload] = {}
        self._settings = Settings()
        self._history = History()
        self._looked = monotonic()
        self._report_at = monotonic()
        self._wake_at: float | None = None
        self._reported = False
        self._over = False

    def run(self) -> None:
        """Decide until the store's end closes."""
        try:
            while not self._over:
                self._hear()
                if not self._over:
                    self._look()
        finally:
            for workload in self._workloads.values():
                workload.close()
            self._selector.close()
            self._store.close()

    def _hear(self) -> None:
        """Wait for the store, a workload, or the next time to look; take up what they said."""
        reports = self._workloads or self._reported
        ends = [at for at in (self._wake_at, self._report_at if reports else None) if at is not None]
        timeout = max(0.0, min(ends) - self._now()) if ends else None
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._store:
                self._hear_store()
            elif not self._workloads[key.data].hear():
                self._drop(key.data)

    def _hear_store(self) -> None:
        while not self._over:
            try:
                packet, rights, flags, _ = self._store.recvmsg(
                    control.MAX_PACKET, _RIGHTS, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("the socket to the store failed: %s", error.strerror)
                self._over = True
                return
            with _received(rights) as fds:
                if not packet:
                    self._over = True
                elif flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    log.error("a message of the store was cut: this arbiter ends, and steps are free")
                    self._over = True
                else:
                    self._take(packet, fds)

    def _take(self, packet: bytes, fds: OwnedFds) -> None:
        try:
            message = control.decode_from_store(packet)
        except ProtocolError as error:
            log.error("%s: this arbiter ends, and steps are free", error)
            self._over = True
            return
        if isinstance(message, control.Rules):
            self._settings = Settings(max_hold_s=message.max_hold_s)
        elif isinstance(message, control.Drop):
            self._drop(message.number)
        elif isinstance(message, control.Change):
            if (workload := self._workloads.get(message.number)) is not None:
                workload.priority, workload.share = message.priority, message.share
        else:
            self._add(message, fds)

    def _add(self, message: control.Add, fds: OwnedFds) -> None:
        """Take up a workload, again if it joined anew. The steps of one with wrong descriptors stay free."""
        self._drop(message.number)
        found = fds.detach()
        if len(found) != _FDS:
            OwnedFds(found).close()
            log.warning("workload %d came with %d descriptors, not a page and a socket", message.number, len(found))
            return
        page, bell = found
        with bell:
            try:
                words = map_page(page)
                sock = socket.socket(fileno=bell.fileno())
                bell.detach()
            except (OSError, ProtocolError, UnsupportedError) as error:
                log.warning("workload %d is not taken up: %s", message.number, error)
                return
        self._workloads[message.number] = ArbitratedWorkload(message, words, sock, self._now())
        self._selector.register(sock, selectors.EVENT_READ, message.number)

    def _drop(self, number: int) -> None:
        workload = self._workloads.pop(number, None)
        if workload is not None:
            self._selector.unregister(workload.bell)
            workload.close()

    def _look(self) -> None:
        """Look at all pages, charge what was used, decide, and write."""
        now = self._now()
        passed, self._looked = now - self._looked, now
        devices = {number: workload.devices for number, workload in self._workloads.items()}
        busy = {number: workload.busy_s(now) for number, workload in self._workloads.items()}
        for number, charged in charge(busy, devices, passed).items():
            workload = self._workloads[number]
            workload.used_s += charged.seconds
            workload.estimated_s += charged.seconds if charged.estimated else 0.0
        members = tuple(workload.look(now) for workload in self._workloads.values())
        decision = decide(Snapshot(members, self._history), self._settings, now)
        self._history, self._wake_at = decision.history, decision.wake_at
        users = {
            device: sum(device in each for each in devices.values()) for each in devices.values() for device in each
        }
        for number, workload in self._workloads.items():
            workload.stalled = number in decision.stalled
            contended = any(users[device] > 1 for device in workload.devices)
            workload.permit(decision.permits[number], contended=contended)
        if now >= self._report_at:
            self._report_at = now + LOOK_S
            self._report(now)

    def _report(self, now: float) -> None:
        """Tell the store what was used, once more when there are no workloads. One that does not read is told later."""
        rows = tuple(workload.row(now) for workload in self._workloads.values())
        if not rows and not self._reported:
            return
        try:
            self._store.send(control.encode(control.Usage(rows)), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("cannot report to the store: %s", error.strerror)
            self._over = True
        self._reported = bool(rows)


def _received(rights: list[tuple[int, int, bytes]]) -> OwnedFds:
    """Return the descriptors of a packet, owned."""
    numbers = array.array("i")
    for level, kind, data in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return OwnedFds(OwnedFd(number) for number in numbers)
