"""Starts a new keeper for a running store whose keeper died."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

from shared_store.protocol.durable_state import DurableState
from shared_store.protocol.handover import Handover, changes_of, leave
from shared_store.store.keeper_link.inheritance import Inheritance


def start_keeper(inheritance: Inheritance, held: DurableState, control: socket.socket) -> subprocess.Popen[bytes]:
    """Start a keeper for this process.

    Args:
        inheritance: what the store started with.
        held: the state; its descriptors stay owned by it.
        control: the keeper's end of the control channel; the caller closes it.

    Raises:
        OSError: no process can be started.
    """
    with contextlib.ExitStack() as closing:
        pidfd = os.pidfd_open(os.getpid())
        closing.callback(os.close, pidfd)
        handover = Handover(
            options=inheritance.options.to_json(),
            lock=inheritance.lock,
            listen=inheritance.listen.fileno(),
            control=control.fileno(),
            store=pidfd,
            store_pid=os.getpid(),
            restarts=inheritance.restarts,
            changes=changes_of(held),
        )
        left = closing.enter_context(leave(handover))
        directory = os.fspath(inheritance.options.runtime_dir)
        command = [sys.executable, "-m", "shared_store.keeper", directory, "", "", str(left.fileno())]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(left.fileno(), *handover.fds), start_new_session=True
        )
