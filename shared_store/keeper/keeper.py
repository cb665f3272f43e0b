"""The keeper's loop: one store at a time, started, listened to, and started again when it dies.

What it holds, it holds because a store said so; it decides nothing but when a store is to be replaced:

=====================================  ===============================================================================
the store                              the keeper
=====================================  ===============================================================================
ends, or its connection does           starts another, which is sent all that is held; later if it keeps dying at once
says nothing for ``watchdog_s``        kills it, and goes on as above; one that starts has ``STARTED_WITHIN_S`` at least
said ``Stop``, and ends                ends with it
said ``Upgrade``                       becomes that installation's keeper, which starts its store beside the old one,
                                       and once that is prepared kills the old one
ends at its first start, unprepared    ends with its exit code: what stops it now will stop the next one
=====================================  ===============================================================================
"""

from __future__ import annotations

import fcntl
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable

from shared_store.keeper.child import StoreProcess
from shared_store.keeper.journal import Journal
from shared_store.keeper.notify import ServiceManager
from shared_store.keeper.pace import Pace
from shared_store.protocol import control
from shared_store.protocol.durable_state import Holdings
from shared_store.protocol.handover import Handover, changes_of, leave
from shared_store.runtime.fds import OwnedFd, OwnedFds
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import RuntimePaths

log = logging.getLogger(__name__)

LISTEN = "listen"
SEGMENT = "segment-"
"""Names of what a service manager keeps: the listening socket; a segment, with its id behind it."""

END_WITHIN_S = 15.0
STARTED_WITHIN_S = 30.0
_TICK_S = 1.0
_LATE_S = 2.0  # a keeper that was held up itself for so long gives the store another chance


class Keeper:
    """Holds what outlives a store, and sees to it that there is one."""

    def __init__(
        self,
        paths: RuntimePaths,
        options: ServeOptions,
        *,
        lock: int,
        listen: socket.socket,
        held: Holdings,
        manager: ServiceManager,
        ready: Callable[[], None],
    ) -> None:
        """Take over the lock, the socket and what is held. ``ready`` is called once clients are served."""
        self._paths = paths
        self._options = options
        self._lock = lock
        self._listen = listen
        self._held = held
        self._manager = manager
        self._tell_ready = ready
        self._journal = Journal(paths.journal)
        self._journal_reason = ""
        self._selector = selectors.DefaultSelector()
        self._pace = Pace()
        self._store: StoreProcess | None = None
        self._next: StoreProcess | None = None
        self._restarts = 0
        self._start_at = 0.0
        self._stopping = False
        self._give_up_at = float("inf")
        self._served = bool(held.segments or held.models)
        self._notices: list[control.Notice] = []
        self._code: int | None = None

    def adopt(self, store: StoreProcess, restarts: int, *, upgrade: bool) -> None:
        """Go on with a store that runs; ``upgrade``: until one of this installation takes its place."""
        self._store = store
        self._restarts = restarts
        self._served = True
        self._watch(store)
        if upgrade:
            self._next = StoreProcess.start(self._paths.directory)
            self._watch(self._next)

    def notice(self, kind: str, detail: str) -> None:
        """Have the store tell an event, as soon as there is one."""
        log.warning("%s: %s", kind.replace("_", " "), detail)
        self._notices.append(control.Notice(kind, detail))

    def run(self) -> int:
        """Keep until a store or a signal says that it is enough. Returns the exit code."""
        signals = _signals()
        self._selector.register(signals, selectors.EVENT_READ, lambda _: self._signalled(signals))
        self._manager.keep(LISTEN, self._listen.fileno())
        self._journal.rewrite(change for change, _ in self._held.changes())
        if self._store is not None:
            self._store.send(control.JournalState(self._journal.reason))
        try:
            while self._code is None:
                self._turn()
        finally:
            # A store that still runs here is one whose keeper failed: it starts another keeper.
            self._held.close()
            self._listen.close()
            self._selector.close()
            os.close(self._lock)
        return self._code

    def _turn(self) -> None:
        now = time.monotonic()
        if self._store is None and now >= self._start_at:
            self._store = StoreProcess.start(self._paths.directory)
            self._watch(self._store)
        wait = max(0.0, min(_TICK_S, self._start_at - now if self._store is None else _TICK_S))
        for key, events in self._selector.select(wait):
            key.data(events)
        if time.monotonic() > now + wait + _LATE_S and self._store is not None:
            self._store.heard = time.monotonic()
        self._look_at_clocks()

    def _look_at_clocks(self) -> None:
        now = time.monotonic()
        store, patience = self._store, self._options.watchdog_s
        if store is not None and patience:
            if not store.ready:  # it shows life once it serves
                patience = max(patience, STARTED_WITHIN_S)
            if now > store.heard + patience:
                silent = f"the store (pid {store.pid}) said nothing for {patience:g} s and is killed"
                self.notice("store_hung", silent)
                store.kill()
        if self._next is not None and now > self._next.started + STARTED_WITHIN_S:
            self._next.kill()
        if now > self._give_up_at and store is not None:
            log.error("the store (pid %d) does not end, and is killed", store.pid)
            store.kill()
        if self._journal.due():
            self._journal.rewrite(change for change, _ in self._held.changes())
        self._tell_journal()
        if self._manager.watchdog_s:
            self._manager.tell("WATCHDOG=1")

    # One store after another.

    def _watch(self, store: StoreProcess) -> None:
        self._selector.register(store.sock, selectors.EVENT_READ, lambda events: self._talk(store, events))
        self._selector.register(store.pidfd, selectors.EVENT_READ, lambda _: self._ended(store))

    def _talk(self, store: StoreProcess, events: int) -> None:
        if store not in (self._store, self._next):
            return  # it was replaced in this very turn
        if events & selectors.EVENT_WRITE:
            store.flush()
            self._want_to_send(store)
        upgrade = self._listen_to(store)
        if not store.connected:
            self._ended(store)
        elif upgrade is not None and store is self._store:
            self._become(store, upgrade)

    def _listen_to(self, store: StoreProcess) -> control.Upgrade | None:
        """Take in what has arrived; an upgrade that is asked for waits until nothing else does."""
        upgrade = None
        for message, fds in store.receive():
            if isinstance(message, control.StateChange):
                self._change(message, fds)
                continue
            fds.close()
            match message:
                case control.Prepared(version):
                    store.version = version
                    self._prepared(store)
                case control.Ready():
                    self._ready(store)
                case control.Stop():
                    self._stopping = True
                case control.Upgrade():
                    upgrade = message
        return upgrade

    def _change(self, change: control.StateChange, fds: OwnedFds) -> None:
        with_fd = len(fds) > 0
        self._held.apply(change, fds)
        self._journal.append(change)
        self._tell_journal()
        if isinstance(change, control.Hold):
            fd = self._held.segments[change.segment.id].fd
            if with_fd and fd is not None:
                self._manager.keep(f"{SEGMENT}{change.segment.id}", fd)
        elif isinstance(change, control.Release):
            self._manager.drop(f"{SEGMENT}{change.segment}")

    def _prepared(self, store: StoreProcess) -> None:
        if store is self._store:
            self._bring(store)
        elif self._store is not None:
            log.info("the store (pid %d) makes room for version %s (pid %d)", self._store.pid, store.version, store.pid)
            self._ended(self._store)

    def _bring(self, store: StoreProcess) -> None:
        """Send all that is held, and let it begin."""
        for change, fds in self._held.changes():
            store.send(change, _duplicates(fds))
        begin = control.Begin(os.getpid(), self._restarts, self._manager.present, self._options.to_json())
        store.send(begin, _duplicates((self._listen.fileno(), self._lock)))
        store.send(control.JournalState(self._journal.reason))
        while self._notices:
            store.send(self._notices.pop(0))
        self._want_to_send(store)

    def _want_to_send(self, store: StoreProcess) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if store.unsent else 0)
        self._selector.modify(store.sock, events, lambda events: self._talk(store, events))

    def _ready(self, store: StoreProcess) -> None:
        store.ready = True
        self._served = True
        log.info("the store (pid %d) serves %.3f s after its start", store.pid, time.monotonic() - store.started)
        self._manager.tell("READY=1", f"STATUS=the store (pid {store.pid}) serves")
        self._tell_ready()
        self._tell_ready = _nobody

    def _ended(self, store: StoreProcess) -> None:
        """A store is gone, or is to be."""
        if store not in (self._store, self._next):
            return  # told twice, by its pidfd and by its connection
        store.kill()
        self._listen_to(store)  # what it said last counts: it may have told somebody so
        self._selector.unregister(store.sock)
        self._selector.unregister(store.pidfd)
        lived = time.monotonic() - store.started
        code = store.close()
        if store is self._next:
            self._next = None
            self._not_upgraded(f"the new store (pid {store.pid}) {_how(code)}; its log says why")
            return
        self._store = None
        if self._stopping:
            self._finish()
        elif self._next is not None:
            self._store, self._next = self._next, None
            if self._store.version:
                self._bring(self._store)
        elif not self._served:
            self._code = code if code is not None and code > 0 else 1
        else:
            delay = self._pace.delay(lived)
            self._start_at = time.monotonic() + delay
            self._restarts += 1
            when = f"in {delay:.1f} s, for it keeps dying" if delay else "now"
            self.notice("store_lost", f"the store (pid {store.pid}) {_how(code)} after {lived:.1f} s; restarted {when}")

    def _not_upgraded(self, reason: str) -> None:
        self.notice("upgrade_failed", reason)
        if self._store is not None:
            self._store.send(control.NotUpgraded(reason))

    def _become(self, store: StoreProcess, wanted: control.Upgrade) -> None:
        """Become another installation's keeper, in this process, with all that this one has."""
        if self._next is not None or store.unsent:
            self._not_upgraded("another upgrade is under way")
            return
        unread, unread_fds = store.unread
        handover = Handover(
            options=self._options.to_json(),
            lock=self._lock,
            listen=self._listen.fileno(),
            control=store.sock.fileno(),
            store=store.pidfd,
            store_pid=store.pid,
            unread=unread,
            unread_fds=unread_fds,
            restarts=self._restarts,
            upgrade=True,
            changes=changes_of(self._held),
        )
        left = leave(handover)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LISTEN_"))}
        python = {name: value for name, value in wanted.environment.items() if name.startswith("PYTHON")}
        command = [wanted.python, "-m", "shared_store.keeper", str(self._paths.directory), "", "", str(left)]
        log.info("becoming the keeper of %s", wanted.python)
        for fd in (left, *handover.fds):
            os.set_inheritable(fd, True)
        try:
            os.execve(wanted.python, command, {**kept, **python})  # noqa: S606 - no shell is the point
        except OSError as error:
            for fd in handover.fds:
                os.set_inheritable(fd, False)
            os.close(left)
            self._not_upgraded(f"{wanted.python} cannot be run: {error.strerror}")

    # The end, and those who want to know.

    def _signalled(self, signals: socket.socket) -> None:
        signals.recv(64)
        self._stopping = True
        self._give_up_at = time.monotonic() + END_WITHIN_S
        if self._next is not None:
            self._ended(self._next)
        if self._store is None:
            self._finish()
        else:
            self._store.ask_to_end()

    def _finish(self) -> None:
        """In good order: nothing is left behind, but for what a service manager keeps for the next start."""
        if not self._manager.present:
            self._journal.remove()
            self._paths.socket.unlink(missing_ok=True)
        self._code = 0

    def _tell_journal(self) -> None:
        if self._journal.reason == self._journal_reason:
            return
        self._journal_reason = self._journal.reason
        log.warning("%s", self._journal_reason or "the journal is whole again")
        if self._store is not None and self._store.ready:
            self._store.send(control.JournalState(self._journal_reason))


def _signals() -> socket.socket:
    """A socket that gets a byte for each signal that asks this process to end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return ours


def _duplicates(fds: Iterable[int]) -> OwnedFds:
    made = OwnedFds()
    try:
        for fd in fds:
            made.add(OwnedFd(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)))
    except BaseException:
        made.close()
        raise
    return made


def _how(code: int | None) -> str:
    if code is None:
        return "ended"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _nobody() -> None:
    """The starter was told."""
