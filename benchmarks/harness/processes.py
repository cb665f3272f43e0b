"""Processes that benchmarks start: they send events as JSON lines and receive words as lines.

A process is ``python benchmarks WORKER ROLE JSON``; ``harness/worker.py`` is the other side of the conversation. Every
wait has a deadline, and every process ends with its process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
END_TIMEOUT_S = 15.0


class ChildError(Exception):
    """A process failed, exited, or sent nothing in time. The message ends with the tail of its log."""


def command(name: str, *arguments: str) -> list[str]:
    """Return the command line of a benchmark or worker, in the interpreter of this process."""
    return [sys.executable, str(BENCHMARKS), name, *arguments]


class Child:
    """A running worker. Times are seconds of the monotonic clock, which all processes of a machine share."""

    def __init__(
        self,
        name: str,
        worker: str,
        role: str,
        job: dict[str, Any],
        log: Path,
        environment: dict[str, str],
        *,
        own_session: bool = True,
    ) -> None:
        """Start ``role`` of ``worker`` with ``job``. Its stderr goes to ``log``.

        Without ``own_session`` it only gets a process group: the kernel shares cores between sessions first, and then
        between the threads of each (``sched(7)``, autogroups).
        """
        self.name = name
        self.spawned = time.monotonic()
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command(worker, role, json.dumps(job)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, **ENVIRONMENT, **environment},
                start_new_session=own_session,
                process_group=None if own_session else 0,
            )
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def has_event(self) -> bool:
        """Return whether :meth:`wait` would return at once."""
        return not self._events.empty()

    def tell(self, word: str) -> None:
        """Send a word. If the process has exited, the next :meth:`wait` reports it."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()

    def wait(self, event: str, timeout_s: float = 300) -> dict[str, Any]:
        """Return the next event, which must be ``event``. Raises :class:`ChildError`."""
        try:
            facts = self._events.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            raise ChildError(f"{self.name}: no {event!r} within {timeout_s:.0f} s\n{self._tail()}") from None
        if facts is None:
            code = self._process.wait(timeout=30)
            raise ChildError(f"{self.name} ended with exit code {code} before {event!r}\n{self._tail()}")
        if facts["event"] == "failed":
            raise ChildError(f"{self.name}: {facts['error']}\n{self._tail()}")
        if facts["event"] != event:
            raise ChildError(f"{self.name} sent {facts['event']!r}; expected {event!r}\n{self._tail()}")
        return facts

    def ask(self, word: str, event: str = "", timeout_s: float = 300) -> dict[str, Any]:
        """Send a word and return the event that answers it (by default, the event of the same name)."""
        self.tell(word)
        return self.wait(event or word, timeout_s)

    def close_input(self) -> None:
        """Close the process's stdin, at which it exits. Idempotent."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self, timeout_s: float = END_TIMEOUT_S) -> None:
        """Close the process's stdin and wait for its exit; kill it after ``timeout_s``. Idempotent."""
        self.close_input()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=max(timeout_s, 0))
        self.kill()

    def kill(self) -> int:
        """Kill the process and its group, and return its exit code. Idempotent."""
        with contextlib.suppress(ProcessLookupError):  # also processes that it started (compilers)
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self.close_input()
        self._reader.join(timeout=10)
        assert self._process.stdout
        if not self._reader.is_alive():
            self._process.stdout.close()
        return code

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def _tail(self, lines: int = 12) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


def end_all(children: Iterable[Child], timeout_s: float = END_TIMEOUT_S) -> None:
    """End processes at the same time; kill those that still run after ``timeout_s``."""
    living = list(children)
    for child in living:
        child.close_input()
    deadline = time.monotonic() + timeout_s
    for child in living:
        child.end(deadline - time.monotonic())


def wait_until(
    condition: Callable[[], object], description: str, timeout_s: float = 30.0, poll_s: float = 0.01
) -> None:
    """Poll until ``condition()`` is true. Raises :class:`TimeoutError`, whose message has the description."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {description}")
        time.sleep(poll_s)
