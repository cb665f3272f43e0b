"""Starts the helper process of this workload, and another one when it ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from shared_store.runtime.backoff import delays

log = logging.getLogger(__name__)


class HelperProcess:
    """The helper of the workload that this process speaks for. Ends with this process, or :meth:`close`.

    Relies on threads of this process: while one of them holds the interpreter's lock in a call into CUDA that is
    blocked, no other helper is started.
    """

    def __init__(self, directory: Path, workload: str) -> None:
        """Prepare. ``directory``: the store's. ``workload``: the id."""
        self._arguments = [os.fspath(directory), workload, str(os.getpid())]
        self._closed = threading.Event()
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

    def _run(self) -> None:
        pids: Sequence[str] = ()
        for delay in delays():
            pids = self._serve(pids)
            if self._closed.wait(delay):
                return
            log.warning("wooly: the helper that takes this workload off its GPU ended; starting another")

    def _serve(self, pids: Sequence[str]) -> Sequence[str]:
        """Run one helper to its end. Takes and returns the pids that are locked, or off the GPU."""
        command = [sys.executable, "-m", "shared_store.overcommit.checkpoints", *self._arguments, *pids]
        with self._lock:
            if self._closed.is_set():
                return pids
            try:
                process = self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            except OSError as error:
                log.warning("wooly: cannot start the helper that takes this workload off its GPU: %s", error)
                return pids
        with process:
            for line in process.stdout or ():
                word, *numbers = line.split()
                pids = numbers if word == "locked" else ()
        return pids
