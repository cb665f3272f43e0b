"""Client of a service manager: ``sd_notify(3)`` and ``sd_listen_fds(3)``.

Datagrams to ``$NOTIFY_SOCKET`` say that the service is ready and alive, and carry fds that the manager stores while the
service is down (``FDSTORE=1``, limited by ``FileDescriptorStoreMax=``). The next run of the service inherits them from
number 3 on, with their names. Without the environment variables, nothing is sent and nothing is inherited.

Does not promise: that the manager stored an fd. It does not answer.
"""

from __future__ import annotations

import array
import logging
import os
import select
import socket
from collections.abc import Sequence

from shared_store.runtime.fds import OwnedFd

log = logging.getLogger(__name__)

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
"""Environment variables for this process alone. Processes that it starts must not inherit them."""

PROCESSED_WITHIN_S = 2.0
_SEND_WITHIN_S = 1.0  # a manager that does not read must not block the keeper
_FIRST_FD = 3


class ServiceManager:
    """The service manager that started this process, if any."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        """Read the manager's variables from an environment (default: this process's)."""
        given = dict(os.environ) if environment is None else environment
        address = given.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._sock: socket.socket | None = None
        if address:
            # For the life of the process: signs of life must not depend on a free fd.
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sock.settimeout(_SEND_WITHIN_S)
        mine = given.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(given.get("WATCHDOG_USEC", "0")) / 1e6 if mine else 0.0
        """Longest interval in seconds between signs of life; 0: none are expected."""

    @property
    def present(self) -> bool:
        """True if a service manager started this process."""
        return bool(self._address)

    def notify(self, *lines: str, fds: Sequence[int] = ()) -> None:
        """Send a datagram of ``NAME=value`` lines. The fds are borrowed."""
        if self._sock is None:
            return
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg(["\n".join(lines).encode()], ancillary, 0, self._address)
        except OSError as error:
            log.warning("cannot notify the service manager at %s: %s", self._address, error)

    def barrier(self) -> OwnedFd | None:
        """Return a pipe that ends once the manager has processed everything that was sent before (``BARRIER=1``).

        A manager that does not know the line closes its end of the pipe, too. None without a manager, and if this
        process has no free fd.
        """
        if self._sock is None:
            return None
        try:
            ours, theirs = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
        except OSError as error:
            log.warning("cannot wait for the service manager: %s", error)
            return None
        with theirs:
            self.notify("BARRIER=1", fds=(theirs.fileno(),))
        return ours

    def wait(self) -> None:
        """Wait until the manager has processed everything that was sent, at most :data:`PROCESSED_WITHIN_S`."""
        if (barrier := self.barrier()) is None:
            return
        poller = select.poll()
        with barrier:
            poller.register(barrier)
            poller.poll(PROCESSED_WITHIN_S * 1000)

    def close(self) -> None:
        """Close the socket."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def store_fd(self, name: str, fd: int) -> None:
        """Store a copy of an fd under a name. The manager does not poll it: a memfd never becomes readable."""
        self.notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=(fd,))

    def remove_fd(self, name: str) -> None:
        """Remove a stored fd."""
        self.notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def stored_fds(environment: dict[str, str] | None = None) -> list[tuple[str, OwnedFd]]:
    """Return names and fds that the manager stored for this process, close-on-exec. Call once."""
    given = dict(os.environ) if environment is None else environment
    if given.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(given.get("LISTEN_FDS", "0"))
    names = given.get("LISTEN_FDNAMES", "").split(":")
    fds = range(_FIRST_FD, _FIRST_FD + count)
    for fd in fds:
        os.set_inheritable(fd, False)
    return [(names[index] if index < len(names) else "", OwnedFd(fd)) for index, fd in enumerate(fds)]
