"""The keeper's loop: run one store at a time, and replace it when needed.

=====================================  ===============================================================================
the store                              the keeper
=====================================  ===============================================================================
ends, or closes its connection         starts another and sends it the state, with a delay if stores keep dying
sends nothing for ``watchdog_s``       kills it, then as above; a starting store has at least :data:`STARTED_WITHIN_S`
sends ``Stop``, and ends               ends too; if a client requested it, nothing is left for a later keeper
cannot be started                      tries again with a delay, and retains the state
sends ``Upgrade``                      becomes the keeper of that installation, starts its store beside the old one, and
                                       kills the old store once the new one is prepared
ends before any store was ready        ends with the store's exit code: the next start would fail in the same way
=====================================  ===============================================================================

The retained state is as the stores sent it. The keeper changes nothing in it.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable

from shared_store.keeper.restart_delay import FIRST_S, RestartDelay
from shared_store.keeper.retained_state import LISTEN, RetainedState
from shared_store.keeper.service_manager import ServiceManager
from shared_store.keeper.stop_signals import stop_signals
from shared_store.keeper.store_process import StoreProcess
from shared_store.keeper.upgrade import become
from shared_store.protocol import keeper_messages
from shared_store.protocol.handover import Handover, changes_of
from shared_store.runtime.fds import OwnedFd
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import RuntimePaths

log = logging.getLogger(__name__)

END_WITHIN_S = 15.0
STARTED_WITHIN_S = 30.0
_TICK_S = 1.0
_AGAIN_S = 0.05
_LATE_S = 2.0  # if the keeper itself was delayed this long, the store's silence is not the store's fault


class Keeper:
    """Retains the state, and runs the store."""

    def __init__(
        self,
        paths: RuntimePaths,
        options: ServeOptions,
        *,
        lock: OwnedFd,
        listen: socket.socket,
        retained: RetainedState,
        manager: ServiceManager,
        ready: Callable[[], None],
    ) -> None:
        """Take over the lock, the listening socket and the state. ``ready`` is called once clients are served."""
        self._paths = paths
        self._options = options
        self._lock = lock
        self._listen = listen
        self._retained = retained
        self._manager = manager
        self._report_ready = ready
        self._journal_reason = ""
        self._selector = selectors.DefaultSelector()
        self._delay = RestartDelay()
        self._start_delay = RestartDelay()
        self._start_reason = ""
        self._store: StoreProcess | None = None
        self._next: StoreProcess | None = None
        self._restarts = 0
        self._start_at = 0.0
        self._stopping = False
        self._stop_requested = False
        self._kill_at = float("inf")
        self._served = bool(retained.state.segments or retained.state.models)
        self._notices: list[keeper_messages.Notice] = []
        self._barriers: dict[OwnedFd, tuple[StoreProcess, tuple[int, ...]]] = {}
        self._exit_code: int | None = None

    def adopt(self, store: StoreProcess, restarts: int, *, upgrade: bool) -> None:
        """Continue with a running store. With ``upgrade``, start a store of this installation to replace it."""
        self._store = store
        self._restarts = restarts
        self._served = True
        self._watch(store)
        if upgrade:
            try:
                self._next = StoreProcess.start(self._paths.directory)
            except OSError as error:
                self._not_upgraded(f"cannot start the new store: {error.strerror}")
            else:
                self._watch(self._next)

    def notice(self, kind: str, detail: str) -> None:
        """Log an event, and queue it for the store, which publishes it."""
        log.warning("%s: %s", kind.replace("_", " "), detail)
        self._notices.append(keeper_messages.Notice(kind, detail))

    def run(self) -> int:
        """Run until SIGTERM, SIGINT, or the requested stop of a store. Return the exit code."""
        signals = stop_signals()
        self._selector.register(signals, selectors.EVENT_READ, lambda _: self._signalled(signals))
        self._manager.store_fd(LISTEN, self._listen.fileno())
        self._retained.rewrite()
        if self._store is not None:
            self._store.send(self._journal_state())
        try:
            while self._exit_code is None:
                self._run_once()
        finally:
            # If the keeper fails, its store continues, and starts another keeper.
            for barrier in self._barriers:
                barrier.close()
            self._retained.close()
            self._listen.close()
            self._selector.close()
            self._lock.close()
        return self._exit_code

    def _run_once(self) -> None:
        now = time.monotonic()
        if self._store is None and now >= self._start_at:
            self._start()
        wait = max(0.0, min(_TICK_S, self._start_at - now if self._store is None else _TICK_S))
        if self._store is not None and self._store.refused:
            wait = _AGAIN_S
        for key, events in self._selector.select(wait):
            key.data(events)
        if time.monotonic() > now + wait + _LATE_S and self._store is not None:
            self._store.last_message = time.monotonic()
        if self._store is not None and self._store.refused:
            self._store.flush()
            self._watch_for_writing(self._store)
        self._check_deadlines()

    def _start(self) -> None:
        """Start a store, or plan another attempt."""
        try:
            self._store = StoreProcess.start(self._paths.directory)
        except OSError as error:
            delay_s = self._start_delay.after(0.0) or FIRST_S
            self._start_at = time.monotonic() + delay_s
            reason = f"cannot start a store: {error.strerror}"
            if not self._served:
                log.error("%s", reason)
                self._exit_code = 1
            elif reason != self._start_reason:
                self.notice("store_not_started", f"{reason}; the models are retained, and the keeper tries again")
            self._start_reason = reason
        else:
            self._start_reason = ""
            self._start_delay = RestartDelay()
            self._watch(self._store)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        store, watchdog_s = self._store, self._options.watchdog_s
        if store is not None and watchdog_s:
            if not store.ready:  # it sends signs of life once it serves
                watchdog_s = max(watchdog_s, STARTED_WITHIN_S)
            if now > store.last_message + watchdog_s:
                self.notice(
                    "store_hung", f"no message from the store (pid {store.pid}) for {watchdog_s:g} s; killing it"
                )
                store.kill()
        if self._next is not None and now > self._next.started + STARTED_WITHIN_S:
            self._next.kill()
        if now > self._kill_at and store is not None:
            log.error("the store (pid %d) did not end within %g s; killing it", store.pid, END_WITHIN_S)
            store.kill()
        self._retained.rewrite_if_due()
        self._report_journal()
        if self._manager.watchdog_s:
            self._manager.notify("WATCHDOG=1")

    # Messages from a store.

    def _watch(self, store: StoreProcess) -> None:
        self._selector.register(store.sock, selectors.EVENT_READ, lambda events: self._on_socket(store, events))
        self._selector.register(store.pidfd, selectors.EVENT_READ, lambda _: self._ended(store))

    def _on_socket(self, store: StoreProcess, events: int) -> None:
        if store not in (self._store, self._next):
            return  # it was replaced earlier in this pass of the loop
        if events & selectors.EVENT_WRITE:
            store.flush()
            self._watch_for_writing(store)
        upgrade = self._receive(store)
        if not store.connected:
            self._ended(store)
        elif upgrade is not None and store is self._store:
            self._become(store, upgrade)

    def _receive(self, store: StoreProcess) -> keeper_messages.Upgrade | None:
        """Process all messages that have arrived. Return a requested upgrade, which must come after the others."""
        upgrade = None
        released: list[int] = []
        for message, fds in store.receive():
            if isinstance(message, keeper_messages.StateChange):
                self._retained.apply(message, fds)
                self._report_journal()
                if isinstance(message, keeper_messages.Release | keeper_messages.Vacate) and message.confirm:
                    released.append(message.segment)
                continue
            fds.close()
            match message:
                case keeper_messages.Prepared(version):
                    store.version = version
                    self._prepared(store)
                case keeper_messages.Ready():
                    self._ready(store)
                case keeper_messages.Stop(requested):
                    self._stopping = True
                    self._stop_requested |= requested
                case keeper_messages.Upgrade():
                    upgrade = message
        if released:
            self._confirm(store, tuple(released))
        return upgrade

    def _confirm(self, store: StoreProcess, released: tuple[int, ...]) -> None:
        """Confirm released segments, once the service manager has closed its fds of them as well."""
        barrier = self._manager.barrier()
        if barrier is None:
            self._send_confirmations(store, released)
            return
        self._barriers[barrier] = (store, released)
        self._selector.register(barrier, selectors.EVENT_READ, lambda _: self._passed(barrier))

    def _passed(self, barrier: OwnedFd) -> None:
        store, released = self._barriers.pop(barrier)
        self._selector.unregister(barrier)
        barrier.close()
        self._send_confirmations(store, released)

    def _send_confirmations(self, store: StoreProcess, released: tuple[int, ...]) -> None:
        if store not in (self._store, self._next):
            return  # it has ended, and the next one learns nothing of these segments
        for segment in released:
            store.send(keeper_messages.Released(segment))
        self._watch_for_writing(store)

    def _prepared(self, store: StoreProcess) -> None:
        if store is self._store:
            self._begin(store)
        elif self._store is not None:
            log.info("replacing the store (pid %d) by version %s (pid %d)", self._store.pid, store.version, store.pid)
            self._ended(self._store)

    def _begin(self, store: StoreProcess) -> None:
        """Send the state, and let the store serve."""
        state = [change for change, _ in self._retained.state.changes()]
        begin = keeper_messages.Begin(os.getpid(), self._restarts, self._manager.present, self._options.to_json())
        store.send_state([*state, begin, self._journal_state(), *self._notices], self._fds_of)
        self._notices.clear()
        self._watch_for_writing(store)

    def _fds_of(self, message: keeper_messages.KeeperMessage) -> tuple[int, ...]:
        """Return the fds that go with a message to a starting store, borrowed."""
        if isinstance(message, keeper_messages.Begin):
            return self._listen.fileno(), self._lock.fileno()
        return self._retained.state.fds_of(message)

    def _watch_for_writing(self, store: StoreProcess) -> None:
        writing = store.unsent and not store.refused  # a refused message is tried again after a while
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
        self._selector.modify(store.sock, events, lambda events: self._on_socket(store, events))

    def _ready(self, store: StoreProcess) -> None:
        store.ready = True
        self._served = True
        log.info("the store (pid %d) is ready, %.3f s after its start", store.pid, time.monotonic() - store.started)
        self._manager.notify("READY=1", f"STATUS=the store (pid {store.pid}) is ready")
        self._report_ready()
        self._report_ready = _reported

    def _journal_state(self) -> keeper_messages.JournalState:
        return keeper_messages.JournalState(self._retained.journal_reason, confirms=True)

    def _report_journal(self) -> None:
        """Log a changed state of the journal, and send it to the store."""
        reason = self._retained.journal_reason
        if reason == self._journal_reason:
            return
        self._journal_reason = reason
        log.warning("%s", reason or "the journal is complete again")
        if self._store is not None and self._store.ready:
            self._store.send(self._journal_state())

    # The end of a store, and the next.

    def _ended(self, store: StoreProcess) -> None:
        """Kill a store unless it has ended, and continue with the next."""
        if store not in (self._store, self._next):
            return  # handled already: pidfd and connection both report the end
        store.kill()
        self._receive(store)  # its last changes count: it may have confirmed them to a client
        self._selector.unregister(store.sock)
        self._selector.unregister(store.pidfd)
        lifetime_s = time.monotonic() - store.started
        code = store.close()
        if store is self._next:
            self._next = None
            self._not_upgraded(f"the new store (pid {store.pid}) {_describe(code)}; see its log for the reason")
            return
        self._store = None
        if self._stopping:
            self._finish()
        elif self._next is not None:
            self._store, self._next = self._next, None
            if self._store.version:
                self._begin(self._store)
        elif not self._served:
            self._exit_code = code if code is not None and code > 0 else 1
        else:
            delay_s = self._delay.after(lifetime_s)
            self._start_at = time.monotonic() + delay_s
            self._restarts += 1
            when = f"restarting it in {delay_s:.1f} s, because it keeps dying" if delay_s else "restarting it"
            self.notice("store_lost", f"the store (pid {store.pid}) {_describe(code)} after {lifetime_s:.1f} s; {when}")

    def _become(self, store: StoreProcess, installation: keeper_messages.Upgrade) -> None:
        """Become the keeper of another installation. Does not return unless that fails."""
        for barrier in list(self._barriers):
            self._passed(barrier)  # the successor could not wait for it
        if self._next is not None or store.unsent:
            self._not_upgraded("another upgrade is in progress; try again when it is done")
            return
        unread, unread_fds = store.unread
        handover = Handover(
            options=self._options.to_json(),
            lock=self._lock.fileno(),
            listen=self._listen.fileno(),
            control=store.sock.fileno(),
            store=store.pidfd.fileno(),
            store_pid=store.pid,
            unread=unread,
            unread_fds=unread_fds,
            restarts=self._restarts,
            upgrade=True,
            changes=changes_of(self._retained.state),
        )
        error = become(installation, handover, self._paths.directory)
        self._not_upgraded(f"cannot run {installation.python}: {error.strerror}")

    def _not_upgraded(self, reason: str) -> None:
        self.notice("upgrade_failed", reason)
        if self._store is not None:
            self._store.send(keeper_messages.NotUpgraded(reason))

    # The end of the keeper.

    def _signalled(self, signals: socket.socket) -> None:
        signals.recv(64)
        self._stopping = True
        self._kill_at = time.monotonic() + END_WITHIN_S
        if self._next is not None:
            self._ended(self._next)
        if self._store is None:
            self._finish()
        else:
            self._store.terminate()

    def _finish(self) -> None:
        """End in good order. A restarting service manager finds journal and fds, unless a client requested the end."""
        if not self._manager.present or self._stop_requested:
            self._retained.discard()
            self._paths.socket.unlink(missing_ok=True)
        self._exit_code = 0


def _describe(code: int | None) -> str:
    """Describe the end of a store by its exit code (negative: a signal; None: unknown)."""
    if code is None:
        return "ended"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _reported() -> None:
    """Do nothing: the starter was notified already."""
