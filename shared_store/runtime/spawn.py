"""Starts processes that outlive this one: a store with its keeper, or any other command.

``wooly serve --detach`` and clients that find no store start one. The store is started as ``python -m
shared_store.keeper``, by name and without importing it, so an engine loads nothing of the store.
"""

from __future__ import annotations

import dataclasses
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared_store.base.errors import StoreUnavailableError
from shared_store.runtime.claim import running
from shared_store.runtime.command import READY, RUNNING
from shared_store.runtime.fds import OwnedFds
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import RuntimePaths, prepare, writing

_LISTENS_WITHIN_S = 1.0  # many times as long as a store needs from the claim of its directory until it listens
_POLL_S = 0.01

# The shell starts the command in the background and ends, so init adopts and reaps it, not this process.
_DETACH = 'log=$1; shift; "$@" </dev/null >>"$log" 2>&1 & echo $!'


def answers(paths: RuntimePaths) -> bool:
    """True if a process accepts connections at the store's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(paths.socket))
        except OSError:
            return False
        return True


def start_detached(options: ServeOptions, timeout_s: float = 10.0) -> int:
    """Start a store that outlives this process, with given options. Returns its keeper's pid once clients can connect.

    Raises:
        StoreRunningError: the runtime directory has a store.
        StoreUnavailableError: the store did not start; the message has the end of its log.
    """
    paths = prepare(options.runtime_dir, mode=options.directory_mode)
    if answers(paths):
        raise running(paths)
    text = dataclasses.replace(options, runtime_dir=paths.directory).to_json()
    pid = start(paths.directory, text, mode=options.directory_mode, timeout_s=timeout_s)
    if not pid:
        raise running(paths)
    return pid


def start(directory: Path, options: str = "", *, mode: int = 0o700, timeout_s: float = 10.0) -> int:
    """Start a detached store, and wait until clients can connect to it.

    Args:
        directory: its runtime directory.
        options: a ``ServeOptions`` as JSON; empty for the environment's.
        mode: permissions of the directory.
        timeout_s: seconds to wait for the store.

    Returns:
        The pid of its keeper; 0 if another process started a store at the same time, which serves now.

    Raises:
        StoreUnavailableError: the store did not start; the message has the end of its log.
        UnsafePathError, PathTooLongError, ConfigError: the directory cannot be used.
    """
    paths = prepare(directory, mode=mode)
    begin = paths.log.stat().st_size if paths.log.exists() else 0
    with writing(paths.directory):
        paths.log.touch(mode=0o600)
    deadline = time.monotonic() + timeout_s
    outcome: bytes | None = RUNNING
    while outcome == RUNNING and time.monotonic() < deadline:
        pid, outcome = _attempt(paths, options, deadline - time.monotonic())
        if outcome == READY:
            return pid
        # The other store may not listen yet. Or it is ending: then the next attempt gets the directory.
        if outcome == RUNNING and _answers_within(paths, min(_LISTENS_WITHIN_S, deadline - time.monotonic())):
            return 0
    with paths.log.open(encoding="utf-8", errors="replace") as log:
        log.seek(begin)
        last = log.read().strip().splitlines()[-5:]
    reason = "ended" if outcome == b"" else f"was not ready within {timeout_s:.0f} s"
    raise StoreUnavailableError(f"the store {reason}; the end of {paths.log}: " + (" | ".join(last) or "(nothing)"))


def detach(
    command: Sequence[str], log: Path, *, pass_fds: Sequence[int] = (), env: Mapping[str, str] | None = None
) -> int:
    """Start a command that outlives this process, and return its pid.

    Args:
        command: the program and its arguments.
        log: file that its output is appended to.
        pass_fds: descriptors that it inherits, borrowed.
        env: its environment; by default this process's.

    Raises:
        OSError, subprocess.SubprocessError: it could not be started.
    """
    shell = ["/bin/sh", "-c", _DETACH, "wooly", os.fspath(log), *command]
    done = subprocess.run(
        shell, pass_fds=pass_fds, stdout=subprocess.PIPE, start_new_session=True, check=True, text=True, env=env
    )
    return int(done.stdout)


def _attempt(paths: RuntimePaths, options: str, timeout_s: float) -> tuple[int, bytes | None]:
    """Start a store. Returns its pid and its report: empty if it ended, None after the time-out."""
    with OwnedFds.from_ints(os.pipe()) as pipe:
        reading, writing_end = pipe
        command = [
            sys.executable,
            "-m",
            "shared_store.keeper",
            os.fspath(paths.directory),
            str(writing_end.fileno()),
            options,
        ]
        with writing_end:
            pid = detach(command, paths.log, pass_fds=(writing_end.fileno(),), env=_environment())
        poller = select.poll()  # select() refuses descriptors from 1,024 on, which engines have
        poller.register(reading.fileno(), select.POLLIN)
        return pid, os.read(reading.fileno(), 1) if poller.poll(timeout_s * 1000) else None


def _environment() -> dict[str, str]:
    """This process's environment without its choice of GPUs: the store serves all of them, by UUID."""
    return {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}


def _answers_within(paths: RuntimePaths, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not answers(paths):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
