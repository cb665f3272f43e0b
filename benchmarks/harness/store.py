"""A store in a temporary directory, its usage as the kernel reports it, and how to stop it.

Relies on Linux's /proc and on pidfds.
"""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.harness.processes import ChildError, wait_until
from shared_store.base.errors import StoreUnavailableError
from shared_store.base.status import Status
from shared_store.client.session import Session
from shared_store.runtime import spawn

STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Usage:
    """The store's process at one moment: bytes, CPU seconds since its start, and counts."""

    rss: int
    anonymous: int
    cpu_s: float
    fds: int
    segments: int
    segment_bytes: int


class TemporaryStore:
    """A runtime directory, and the store that runs in it. As a context manager, stops the store and removes both.

    Nothing is started until :meth:`start`, or until a client with autostart connects.
    """

    def __init__(self) -> None:
        """Make a directory with a short path: socket paths are limited to 107 bytes."""
        self._scratch = tempfile.TemporaryDirectory(prefix="wooly-", dir="/tmp")
        self.scratch = Path(self._scratch.name)
        self.directory = self.scratch / "run"
        self._pid = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the store and remove the directory. Idempotent."""
        try:
            self.stop()
        finally:
            self._scratch.cleanup()

    def start(self, options: str = "") -> int:
        """Start a detached store, and return its keeper's pid. ``options`` is a ``ServeOptions`` as JSON."""
        keeper = spawn.start(self.directory, options, timeout_s=30.0)
        with self.session() as session:
            self._pid = session.store_pid
        return keeper

    def session(self, name: str = "benchmark", timeout_s: float = 30.0) -> Session:
        """Connect to the store. Raises :class:`StoreUnavailableError` if none runs."""
        return Session.connect(self.directory, name=name, autostart=False, timeout_s=timeout_s)

    def status(self) -> Status:
        """Return the store's status. Raises :class:`StoreUnavailableError` if none runs."""
        with self.session() as session:
            return session.status()

    def usage(self) -> Usage:
        """Return the usage of the started process. Does not connect, because a connection has a descriptor."""
        return usage(self._pid)

    def stop(self) -> None:
        """Stop the store if one runs, and wait until it and its keeper, and so its memory, are gone.

        Raises:
            ChildError: They still run after ``STOP_TIMEOUT_S``.
        """
        try:
            with self.session() as session:
                keeper = session.status().keeper
                pidfds = open_pidfds([session.store_pid, *([keeper.pid] if keeper is not None else [])])
                session.shutdown_store()
        except StoreUnavailableError:  # no process started one
            return
        if not wait_for_exit(pidfds, STOP_TIMEOUT_S):
            raise ChildError(
                f"the store in {self.directory} or its keeper still runs {STOP_TIMEOUT_S:.0f} s after a stop"
            )


def open_pidfds(pids: Sequence[int]) -> list[int]:
    """Open a pidfd for each process that still runs. :func:`wait_for_exit` closes them."""
    pidfds = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(pid))
    return pidfds


def wait_for_exit(pidfds: Sequence[int], timeout_s: float) -> bool:
    """Wait until all processes have exited, close their pidfds, and return whether they exited in time."""
    try:
        return all(bool(select.select([pidfd], [], [], timeout_s)[0]) for pidfd in pidfds)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def usage(pid: int) -> Usage:
    """Read the usage of a store's process from /proc."""
    process = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (process / "status").read_text(encoding="utf-8").splitlines())
    times = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    fds = list((process / "fd").iterdir())
    sizes = []
    for fd in fds:
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            if str(fd.readlink()).startswith("/memfd:wooly"):
                sizes.append(fd.stat().st_size)
    return Usage(
        rss=int(fields["VmRSS"].split()[0]) * 1024,
        anonymous=int(fields["RssAnon"].split()[0]) * 1024,
        cpu_s=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
        fds=len(fds),
        segments=len(sizes),
        segment_bytes=sum(sizes),
    )


def wait_for_status(
    session: Session, condition: Callable[[Status], object], description: str, timeout_s: float = 30.0
) -> Status:
    """Poll the status until ``condition`` is true for it, and return that status. Raises :class:`TimeoutError`."""
    latest = [session.status()]

    def met() -> object:
        latest[0] = session.status()
        return condition(latest[0])

    wait_until(met, description, timeout_s)
    return latest[0]


def catalog_ready(session: Session) -> Status:
    """Wait until the store is connected to its catalog. Its descriptors would otherwise count as leaked."""
    return wait_for_status(session, lambda status: status.catalog.state == "ok", "the catalog")
