"""One store process as its keeper sees it: the connection, and the end of the process.

Relies on: a pidfd, which becomes readable when the process ends. The process need not be a child: a store that outlived
its keeper is the child of another process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from shared_store.base.errors import ProtocolError, WoolyError
from shared_store.keeper.service_manager import VARIABLES
from shared_store.protocol import keeper_messages, wire
from shared_store.runtime.fds import OwnedFd, OwnedFds

log = logging.getLogger(__name__)

GONE_WITHIN_S = 5.0
ENDING_S = 1.0

Received = tuple[keeper_messages.FromStore, OwnedFds]


class StoreProcess:
    """A running store. Its socket is non-blocking."""

    def __init__(
        self,
        pid: int,
        pidfd: OwnedFd,
        sock: socket.socket,
        *,
        child: subprocess.Popen[bytes] | None = None,
        unread: bytes = b"",
        unread_fds: OwnedFds | None = None,
        ready: bool = False,
    ) -> None:
        """Take over a connection with a store, and the received part of an incomplete message."""
        sock.setblocking(False)
        self.pid = pid
        self.sock = sock
        self.pidfd = pidfd
        self.started = time.monotonic()
        self.last_message = self.started
        """Monotonic time of the last message from the store."""
        self.version = ""
        """Version of the store, once it is prepared to receive the state."""
        self.ready = ready
        self.connected = True
        """False once the store closed the connection. The keeper kills such a store: its state would be unknown."""
        self.refused = ""
        """Why the kernel takes no message now although the store reads; empty: it does."""
        self._child = child
        self._decoder = wire.Decoder(wire.MAX_FROM_STORE)
        self._frames = self._decoder.feed(unread, unread_fds)
        self._outbox = wire.Outbox()
        self._state: deque[keeper_messages.KeeperMessage] = deque()
        self._fds_of: Callable[[keeper_messages.KeeperMessage], Sequence[int]] = lambda _: ()

    @classmethod
    def start(cls, directory: Path) -> StoreProcess:
        """Start a store for a runtime directory. It inherits its end of the connection, and no other fd.

        The module name and the arguments are an interface between versions: the installation may have been replaced
        since this process started.

        Raises:
            OSError: this process has no free fd, or no process can be started.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            end = theirs.fileno()
            command = [sys.executable, "-m", "shared_store.daemon", os.fspath(directory), "", "", str(end)]
            environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
            try:
                child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(end,), env=environment)
            except OSError:
                ours.close()
                raise
        try:
            pidfd = OwnedFd(os.pidfd_open(child.pid))
        except OSError:
            child.kill()
            child.wait()
            ours.close()
            raise
        return cls(child.pid, pidfd, ours, child=child)

    def receive(self) -> Iterator[Received]:
        """Yield the messages that have arrived, with their fds. Unknown messages are logged and skipped."""
        more = True
        while more:
            while self._frames:
                frame = self._frames.pop(0)
                self.last_message = time.monotonic()
                try:
                    message = keeper_messages.decode_from_store(frame.payload)
                except ProtocolError as error:  # from a store of another version, around an upgrade
                    log.warning("unknown message from the store (pid %d): %s", self.pid, error)
                    frame.fds.close()
                    continue
                yield message, frame.fds
            more = self._read()

    def _read(self) -> bool:
        """Read once. Return True if data arrived."""
        try:
            data, fds = wire.receive(self.sock)
            self._frames = self._decoder.feed(data, fds)
        except BlockingIOError:
            return False
        except (OSError, WoolyError) as error:
            log.error("lost the connection with the store (pid %d): %s", self.pid, error)
            self.connected = False
            return False
        self.connected = bool(data)
        return self.connected

    def send(self, message: keeper_messages.KeeperMessage, fds: OwnedFds | None = None) -> None:
        """Queue a message, and take over its fds."""
        self._outbox.put(keeper_messages.encode(message), fds)
        self.flush()

    def send_state(
        self,
        messages: Iterable[keeper_messages.KeeperMessage],
        fds_of: Callable[[keeper_messages.KeeperMessage], Sequence[int]],
    ) -> None:
        """Send messages one by one, each when the socket accepts it.

        Args:
            messages: in this order; messages of :meth:`send` may come in between.
            fds_of: returns the fds of a message when it is sent, borrowed. None is duplicated, because there may be
                thousands, and this process may have no free fd.
        """
        self._state.extend(messages)
        self._fds_of = fds_of
        self.flush()

    def flush(self) -> None:
        """Send as much as the socket accepts now."""
        try:
            while self._outbox.send(self.sock) and self._state:
                message = self._state[0]
                if not self._outbox.send_borrowed(self.sock, keeper_messages.encode(message), self._fds_of(message)):
                    break
                self._state.popleft()
            self.refused = ""
        except OSError as error:
            if wire.is_temporary(error):
                reason = error.strerror or str(error)
                if reason != self.refused:
                    log.warning("cannot send to the store (pid %d) now: %s; trying again", self.pid, reason)
                self.refused = reason
                return
            self._outbox.close()  # the store has ended, which its pidfd reports
            self._state.clear()

    @property
    def unsent(self) -> bool:
        """True while queued messages are not sent completely."""
        return self._outbox.pending_bytes > 0 or bool(self._state)

    @property
    def unread(self) -> tuple[bytes, tuple[int, ...]]:
        """Return the received part of an incomplete message. The fds are borrowed."""
        return self._decoder.rest

    def kill(self) -> None:
        """Send SIGKILL, and wait at most :data:`GONE_WITHIN_S` for the end: a driver call may delay it. Idempotent.

        A store that closed the connection is ending already: it has :data:`ENDING_S` to return its own exit code.
        """
        if not self.connected and self._ends_within(ENDING_S):
            return
        try:
            signal.pidfd_send_signal(self.pidfd.fileno(), signal.SIGKILL)
        except ProcessLookupError:
            return
        self._ends_within(GONE_WITHIN_S)

    def _ends_within(self, timeout_s: float) -> bool:
        poller = select.poll()  # select() cannot wait for descriptors above 1023
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def terminate(self) -> None:
        """Send SIGTERM."""
        try:
            signal.pidfd_send_signal(self.pidfd.fileno(), signal.SIGTERM)
        except ProcessLookupError:
            return  # it has ended

    def close(self) -> int | None:
        """Reap a store that has ended, and close all fds.

        Returns:
            The exit code (negative: a signal) if this process started the store, else None.
        """
        code = None
        if self._child is not None:
            code = self._child.poll()
        else:
            with contextlib.suppress(ChildProcessError):  # a child of this process before it became another version
                os.waitid(os.P_PIDFD, self.pidfd.fileno(), os.WEXITED | os.WNOHANG)
        self.sock.close()
        self._outbox.close()
        self._decoder.close()
        while self._frames:
            self._frames.pop(0).fds.close()
        self.pidfd.close()
        return code
