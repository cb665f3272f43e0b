"""Starts the helper process of this workload, and another one when it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shared_store.base.errors import DeclinedError
from shared_store.runtime.backoff import delays

LOCKED, RUNNING, BACK = "locked", "running", "back"
"""Lines: of a helper with pids that it is about to lock; once they run again; and of the workload, that wants that."""

BACK_WITHIN_S: Final = 120.0
ASK_EVERY_S: Final = 2.0

log = logging.getLogger(__name__)


class HelperProcess:
    """The helper of the workload that this process speaks for. Ends with this process, or :meth:`close`.

    Relies on threads of this process: while one of them has the interpreter's lock in a call into CUDA that is
    blocked, no other helper is started.
    """

    def __init__(self, directory: Path, workload: str) -> None:
        """Prepare. ``directory``: the store's. ``workload``: the id."""
        self._arguments = [os.fspath(directory), workload, str(os.getpid())]
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._pids: Sequence[str] = ()
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="wooly-checkpoints", daemon=True)

    def start(self) -> None:
        """Start it, in the background."""
        self._thread.start()

    def close(self) -> None:
        """End it. Idempotent."""
        with self._lock:
            self._closed.set()
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()

    def bring_back(self, within_s: float = BACK_WITHIN_S) -> None:
        """Bring this process back to its GPU without a store, if the driver has it off.

        Args:
            within_s: seconds to wait.

        Raises:
            DeclinedError: it is not back in time.
        """
        until = time.monotonic() + within_s
        with self._changed:
            while self._pids:
                self._ask()
                if time.monotonic() >= until:
                    raise DeclinedError(f"the driver did not bring it back to its GPU within {within_s:g} s")
                self._changed.wait(ASK_EVERY_S)

    def _ask(self) -> None:
        """Ask the present helper to bring this process back."""
        with self._lock, contextlib.suppress(OSError, ValueError):  # it ended; the next one is asked
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(f"{BACK}\n")
                self._process.stdin.flush()

    def _run(self) -> None:
        for delay in delays():
            self._serve(self._pids)
            if self._closed.wait(delay):
                return
            log.warning("wooly: the helper that takes this workload off its GPU ended; starting another")

    def _serve(self, pids: Sequence[str]) -> None:
        """Run one helper to its end. ``pids``: of processes that are locked, or off the GPU."""
        command = [sys.executable, "-m", "shared_store.overcommit.checkpoints", *self._arguments, *pids]
        with self._lock:
            if self._closed.is_set():
                return
            try:
                process = self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            except OSError as error:
                log.warning("wooly: cannot start the helper that takes this workload off its GPU: %s", error)
                return
        with process:
            for line in process.stdout or ():
                word, *numbers = line.split()
                with self._changed:
                    self._pids = numbers if word == LOCKED else ()
                    self._changed.notify_all()
