"""Starting a store that outlives the process that starts it.

Used by ``wooly serve --detach`` and by clients that find no store. It runs ``python -m shared_store.keeper`` by name,
which starts the store, and imports nothing of it, so an engine pays for none of the imports.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

from shared_store.base.errors import StoreUnavailableError
from shared_store.runtime.paths import RuntimePaths, prepare, writing

_READY, _OTHER = b"1", b"0"  # what a keeper says to its starter: see shared_store.keeper.__main__
_PATIENCE_S = 1.0  # from a store's claim of its directory until it listens, many times over
_POLL_S = 0.01

# The shell forks the store off and leaves, so that the store is nobody's child and nobody's zombie.
_FORK_OFF = 'log=$1; shift; "$@" </dev/null >>"$log" 2>&1 & echo $!'


def answers(paths: RuntimePaths) -> bool:
    """Whether something accepts connections at the store's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(paths.socket))
        except OSError:
            return False
        return True


def start(directory: Path, options: str = "", *, mode: int = 0o700, timeout_s: float = 10.0) -> int:
    """Start a detached store, and wait until clients can connect to it.

    Args:
        directory: its runtime directory.
        options: a ``ServeOptions`` as JSON; empty: the environment's.
        mode: permissions of the directory.
        timeout_s: how long it may take.

    Returns:
        The pid of its keeper; 0 when another one was there first.

    Raises:
        StoreUnavailableError: it did not come up; the message has the end of its log.
        UnsafePathError, PathTooLongError, ConfigError: about the directory.
    """
    paths = prepare(directory, mode=mode)
    begin = paths.log.stat().st_size if paths.log.exists() else 0
    with writing(paths.directory):
        paths.log.touch(mode=0o600)
    deadline = time.monotonic() + timeout_s
    said: bytes | None = _OTHER
    while said == _OTHER and time.monotonic() < deadline:
        pid, said = _start_one(paths, options, deadline - time.monotonic())
        if said == _READY:
            return pid
        # The other one may not listen yet; or it is ending, and then it is this one's turn after all.
        if said == _OTHER and _answers_within(paths, min(_PATIENCE_S, deadline - time.monotonic())):
            return 0
    with paths.log.open(encoding="utf-8", errors="replace") as log:
        log.seek(begin)
        last = log.read().strip().splitlines()[-5:]
    what = "ended" if said == b"" else f"was not ready within {timeout_s:.0f} s"
    raise StoreUnavailableError(f"the store {what}; the end of {paths.log}: " + (" | ".join(last) or "(nothing)"))


def _start_one(paths: RuntimePaths, options: str, timeout_s: float) -> tuple[int, bytes | None]:
    """Fork a store off. Returns its pid and what it said; nothing (empty) when it ended, None after the time-out."""
    told, tell = os.pipe()
    try:
        command = [sys.executable, "-m", "shared_store.keeper", os.fspath(paths.directory), str(tell), options]
        shell = ["/bin/sh", "-c", _FORK_OFF, "wooly", os.fspath(paths.log), *command]
        try:
            forked = subprocess.run(
                shell,
                pass_fds=(tell,),
                stdout=subprocess.PIPE,
                start_new_session=True,
                check=True,
                text=True,
                env=_environment(),
            )
        finally:
            os.close(tell)
        poller = select.poll()  # unlike select(), at home in an engine with thousands of open files
        poller.register(told, select.POLLIN)
        return int(forked.stdout), os.read(told, 1) if poller.poll(timeout_s * 1000) else None
    finally:
        os.close(told)


def _environment() -> dict[str, str]:
    """This process's, less what limits it to some of the node's GPUs: the store serves them all, by their UUIDs."""
    return {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}


def _answers_within(paths: RuntimePaths, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not answers(paths):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
