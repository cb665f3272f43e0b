"""The workload's end of the socket to its arbiter, and the thread that listens to it.

A byte says "look at the page", in both directions. The end of the socket says that the other side is gone. An arbiter
that is stopped closes no socket: while the workload is held, the thread also counts an arbiter as gone that has not
looked at the page for :data:`~shared_store.compute.layout.SILENT_S`. Else it wakes up for bytes only.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from typing import Protocol

from shared_store.base.errors import ProtocolError
from shared_store.compute.layout import LOOK_S, SILENT_S
from shared_store.runtime.fds import OwnedFd

_PATIENCE = round(SILENT_S / LOOK_S)  # of waits without a look; a time would also count while this process is stopped


class Hearer(Protocol):
    """The owner of a bell. Its methods are called in the bell's thread."""

    def heard(self, bell: Bell) -> None:
        """The arbiter rang. Also called once at the beginning."""

    def gone(self, bell: Bell, why: str) -> None:
        """The arbiter is gone. The bell is closed already."""

    def held(self, bell: Bell) -> int | None:
        """Return the time of the arbiter's last look if the workload is held; None if it is not."""


class Bell:
    """One end of a socket pair. :meth:`ring` and :meth:`watch` may be called from any thread."""

    def __init__(self, fd: OwnedFd, hearer: Hearer) -> None:
        """Take over the socket. Raises :class:`ProtocolError` if it is something else."""
        with fd:
            try:
                self._socket = socket.socket(fileno=fd.fileno())
            except OSError as error:
                raise ProtocolError(f"the store sent something else than a socket to its arbiter: {error}") from error
            fd.detach()
        try:
            self._wake = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError as error:
            self._socket.close()
            raise ProtocolError(f"cannot listen to the arbiter: {error}") from error
        self._hearer = hearer
        self._lock = threading.Lock()
        self._open = True
        self._ending = False
        self._watching = False

    def start(self) -> None:
        """Start to listen."""
        threading.Thread(target=self._listen, name="compute-bell", daemon=True).start()

    def ring(self) -> None:
        """Have the arbiter look at the page. Never waits: an arbiter with unread bytes will look anyway."""
        with self._lock:
            if self._open:
                with contextlib.suppress(OSError):  # full, or the end, which the thread sees as well
                    self._socket.send(b"\0", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def watch(self) -> None:
        """Look after the arbiter from here on, until the workload is not held."""
        if not self._watching:
            self._rouse()

    def close(self) -> None:
        """Stop to listen. The thread closes the socket a moment later; no method of the hearer is called any more."""
        self._ending = True
        self._rouse()

    def forget(self) -> None:
        """Close the descriptors in a forked child, which has no thread for them."""
        self._lock = threading.Lock()
        self._ending = True
        self._close()

    def _rouse(self) -> None:
        with self._lock:
            if self._open:
                os.eventfd_write(self._wake.fileno(), 1)

    def _close(self) -> None:
        with self._lock:
            self._open = False
            self._socket.close()
            self._wake.close()

    def _listen(self) -> None:
        self._hearer.heard(self)
        try:
            why = self._until_gone()
        finally:
            self._close()
        if why is not None:
            self._hearer.gone(self, why)

    def _until_gone(self) -> str | None:
        """Listen. Returns why the arbiter is gone; None if this side ended."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._wake.fileno(), select.POLLIN)
        last_look, waits = -1, 0
        while not self._ending:
            ready = poller.poll(LOOK_S * 1000 if self._watching else None)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake.fileno())
            if any(fd != self._wake.fileno() for fd, _ in ready):
                try:
                    data = self._socket.recv(4096, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                except ConnectionError:  # it ended with unread bytes
                    data = b""
                except OSError as error:
                    return f"its socket failed ({error.strerror})"
                if not data:
                    return "it has ended"
                waits = 0
                if not self._ending:
                    self._hearer.heard(self)
            looked = self._held() if ready else self._still_held()
            if looked is None or looked != last_look or ready:
                last_look, waits = -1 if looked is None else looked, 0
            else:
                waits += 1
                if waits >= _PATIENCE:
                    return f"it has not looked at this workload for {SILENT_S:.0f} s"
        return None

    def _still_held(self) -> int | None:
        """As :meth:`_held`, after a wait without a byte: notice the end of a hold without a ring."""
        looked = self._held()
        if looked is None:
            self._hearer.heard(self)
        return looked

    def _held(self) -> int | None:
        """Return the time of the arbiter's last look while it has to be looked after."""
        self._watching = True
        looked = self._hearer.held(self)
        if looked is None:
            self._watching = False
            looked = self._hearer.held(self)  # a hold that began meanwhile did not rouse this thread
            self._watching = looked is not None
        return looked
