"""One store process, as its keeper sees it: its end, and the connection with it.

The end is told by a pidfd, so the process need not be a child: a store that outlived its keeper is another's.
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
from collections.abc import Iterator
from pathlib import Path

from shared_store.base.errors import ProtocolError, WoolyError
from shared_store.keeper.notify import VARIABLES
from shared_store.protocol import control, wire
from shared_store.runtime.fds import OwnedFds

log = logging.getLogger(__name__)

GONE_WITHIN_S = 5.0
ENDING_S = 1.0

Heard = tuple[control.FromStore, OwnedFds]


class StoreProcess:
    """A store that runs. Its control socket does not block."""

    def __init__(
        self,
        pid: int,
        pidfd: int,
        sock: socket.socket,
        *,
        child: subprocess.Popen[bytes] | None = None,
        unread: bytes = b"",
        unread_fds: OwnedFds | None = None,
        ready: bool = False,
    ) -> None:
        """Take over the connection with a store, and what had arrived of a message from it."""
        sock.setblocking(False)
        self.pid = pid
        self.sock = sock
        self.pidfd = pidfd
        self.started = time.monotonic()
        self.heard = self.started
        """When something came from it last."""
        self.version = ""
        """Its version, once it is prepared to be sent the state."""
        self.ready = ready
        self.connected = True
        """Whether it may still say something. A store that cannot is killed: nobody would know what it does."""
        self._child = child
        self._decoder = wire.Decoder(wire.MAX_FROM_STORE)
        self._frames = self._decoder.feed(unread, unread_fds)
        self._outbox = wire.Outbox()

    @classmethod
    def start(cls, directory: Path) -> StoreProcess:
        """Start one for a runtime directory. It inherits its end of the connection and no other fd."""
        ours, theirs = socket.socketpair()
        with theirs:
            end = theirs.fileno()
            command = [sys.executable, "-m", "shared_store.daemon", os.fspath(directory), "", "", str(end)]
            environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(end,), env=environment)
        return cls(child.pid, os.pidfd_open(child.pid), ours, child=child)

    def receive(self) -> Iterator[Heard]:
        """What has arrived. Messages that this version does not know are passed over."""
        more = True
        while more:
            while self._frames:
                frame = self._frames.pop(0)
                self.heard = time.monotonic()
                try:
                    message = control.decode_from_store(frame.payload)
                except ProtocolError as error:  # of another version's store, before or after an upgrade
                    log.warning("the store (pid %d) says what this keeper does not know: %s", self.pid, error)
                    frame.fds.close()
                    continue
                yield message, frame.fds
            more = self._read()

    def _read(self) -> bool:
        """Read once; whether there was anything."""
        try:
            data, fds = wire.receive(self.sock)
            self._frames = self._decoder.feed(data, fds)
        except BlockingIOError:
            return False
        except (OSError, WoolyError) as error:
            log.error("the connection with the store (pid %d) broke: %s", self.pid, error)
            self.connected = False
            return False
        self.connected = bool(data)
        return self.connected

    def send(self, message: control.ControlMessage, fds: OwnedFds | None = None) -> None:
        """Queue a message, and take over its fds."""
        self._outbox.put(control.encode(message), fds)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now."""
        try:
            self._outbox.send(self.sock)
        except OSError:  # it is gone, which its pidfd tells too
            self._outbox.close()

    @property
    def unsent(self) -> bool:
        """Whether something waits to be sent."""
        return self._outbox.pending_bytes > 0

    @property
    def unread(self) -> tuple[bytes, tuple[int, ...]]:
        """What has arrived of a message that is not whole yet."""
        return self._decoder.rest

    def kill(self) -> None:
        """Kill it, and wait for its end, but not for ever: in a driver's call it may stay for a while. Idempotent.

        One that hung up is ending, most likely, and has a moment to do so with its own exit code.
        """
        if not self.connected and select.select([self.pidfd], [], [], ENDING_S)[0]:
            return
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return
        select.select([self.pidfd], [], [], GONE_WITHIN_S)

    def ask_to_end(self) -> None:
        """Let it end in good order."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        except ProcessLookupError:
            return  # it has

    def close(self) -> int | None:
        """Bury a store that has ended. Its exit code (negative: a signal), where it was started by this process."""
        code = None
        if self._child is not None:
            code = self._child.poll()
        else:
            with contextlib.suppress(ChildProcessError):  # a child of this process before it became another version
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        self.sock.close()
        self._outbox.close()
        self._decoder.close()
        while self._frames:
            self._frames.pop(0).fds.close()
        os.close(self.pidfd)
        return code
