"""Waits for the end of a keeper, and starts a new one for the running store."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys

from shared_store.protocol.durable_state import DurableState
from shared_store.protocol.handover import Handover, changes_of, leave
from shared_store.runtime.fds import OwnedFd
from shared_store.store.keeper_link.inheritance import Inheritance


def wait_for_end(pid: int, timeout_s: float) -> None:
    """Wait until a process has ended, and with it its descriptors are closed, or until the time-out."""
    try:
        pidfd = OwnedFd(os.pidfd_open(pid))
    except OSError:
        return  # it has ended
    poller = select.poll()  # select() cannot wait for descriptors above 1023
    with pidfd:
        poller.register(pidfd, select.POLLIN)
        poller.poll(timeout_s * 1000)


def start_keeper(inheritance: Inheritance, held: DurableState, control: socket.socket) -> subprocess.Popen[bytes]:
    """Start a keeper for this process.

    Args:
        inheritance: settings, descriptors and state that the store started with.
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
