"""Receive SIGTERM and SIGINT in an event loop, as bytes on a socket.

Relies on: :func:`signal.set_wakeup_fd`, so only the main thread of a process may call this.
"""

from __future__ import annotations

import signal
import socket


def stop_signals() -> socket.socket:
    """Return a non-blocking socket that becomes readable on SIGTERM and SIGINT. The caller closes it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return ours
