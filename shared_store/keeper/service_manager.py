"""What a service manager is told, and what it hands back: ``sd_notify(3)``, ``sd_listen_fds(3)``.

Datagrams to ``$NOTIFY_SOCKET`` say that the service is ready, that it lives, and bring fds that the manager keeps while
the service is down (``FDSTORE=1``, limited by ``FileDescriptorStoreMax=``). A later run of the service gets them back,
from number 3 on, with their names. Without the variables nothing is sent and nothing was handed back.

Does not promise: that the manager took what it was sent. There is no answer.
"""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import Sequence

log = logging.getLogger(__name__)

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
"""Meant for this process alone: not for those that it starts."""

_TAKES_WITHIN_S = 1.0  # a manager that reads nothing must not stop a keeper
_FIRST_FD = 3


class ServiceManager:
    """The one that started this process, if any did."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        """Read what it said in the environment (by default this process's)."""
        said = dict(os.environ) if environment is None else environment
        self._address = said.get("NOTIFY_SOCKET", "")
        mine = said.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(said.get("WATCHDOG_USEC", "0")) / 1e6 if mine else 0.0
        """It wants to hear from this process this often; 0: it does not."""

    @property
    def present(self) -> bool:
        """Whether there is one that listens."""
        return bool(self._address)

    def tell(self, *lines: str, fds: Sequence[int] = ()) -> None:
        """Send a datagram of ``NAME=value`` lines."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_TAKES_WITHIN_S)
            try:
                sock.sendmsg(["\n".join(lines).encode()], ancillary, 0, address)
            except OSError as error:
                log.warning("the service manager at %s cannot be told: %s", self._address, error)

    def keep(self, name: str, fd: int) -> None:
        """Have an fd kept. It is not watched: a segment's fd has no news."""
        self.tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=(fd,))

    def drop(self, name: str) -> None:
        """Have it kept no more."""
        self.tell("FDSTOREREMOVE=1", f"FDNAME={name}")


def handed_back(environment: dict[str, str] | None = None) -> list[tuple[str, int]]:
    """Names and fds that a service manager kept for this process. They are the caller's, and close-on-exec now."""
    said = dict(os.environ) if environment is None else environment
    if said.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(said.get("LISTEN_FDS", "0"))
    names = said.get("LISTEN_FDNAMES", "").split(":")
    fds = range(_FIRST_FD, _FIRST_FD + count)
    for fd in fds:
        os.set_inheritable(fd, False)
    return [(names[index] if index < len(names) else "", fd) for index, fd in enumerate(fds)]
