"""Identify and watch the process at the other end of a Unix socket (``unix(7)``, ``pidfd_open(2)``).

``SO_PEERCRED`` and ``SO_PEERGROUPS`` have the credentials of the moment at which the process connected. A process of
another PID namespace that is not below this one has no number here: the kernel reports pid 0. ``SO_PEERPIDFD`` (Linux
6.5) yields a pidfd for it all the same, which becomes readable when the process ends.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from dataclasses import dataclass

from shared_store.runtime.fds import OwnedFd

SO_PEERGROUPS = 59
SO_PEERPIDFD = 77
"""Of ``asm-generic/socket.h``; Python's ``socket`` does not have them."""

_UCRED = struct.Struct("iII")
_GID_BYTES = 4
_FEW_GROUPS = 64
_libc = ctypes.CDLL(
    None, use_errno=True
)  # Python's getsockopt returns at most 1,024 bytes: a process may have more groups


@dataclass(frozen=True)
class Peer:
    """Credentials of a process at the time it connected.

    Attributes:
        pid: 0 if the process is in another PID namespace.
        uid: its effective user id.
        gid: its effective group id.
        groups: all its group ids, supplementary ones included.
    """

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()


def peer_of(sock: socket.socket) -> Peer:
    """Return the credentials of the peer of a connected socket."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid, gid, frozenset({gid, *_supplementary(sock)}))


def watch_process(sock: socket.socket) -> OwnedFd | None:
    """Return a pidfd of the peer's process; None before Linux 6.5, and without a free descriptor."""
    try:
        return OwnedFd(sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
    except OSError:
        return None


def _supplementary(sock: socket.socket) -> tuple[int, ...]:
    """Return the peer's supplementary groups; none where the kernel does not report them (before Linux 4.13)."""
    groups = (ctypes.c_uint32 * _FEW_GROUPS)()
    nbytes = ctypes.c_uint32(ctypes.sizeof(groups))
    while _libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, groups, ctypes.byref(nbytes)) != 0:
        if ctypes.get_errno() != errno.ERANGE or nbytes.value <= ctypes.sizeof(groups):
            return ()
        groups = (ctypes.c_uint32 * (nbytes.value // _GID_BYTES))()  # the kernel returned the size that it needs
    return tuple(groups[: nbytes.value // _GID_BYTES])
