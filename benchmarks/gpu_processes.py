"""Starting, telling, hearing and ending the processes of ``gpu_engine.py``; their store; the GPU's memory.

Every wait has a deadline, and every process is ended with its group when its :class:`Node` is left. Relies on
``nvidia-smi`` for the device's memory: asking CUDA would cost the benchmark's own process a context.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from shared_store.base.errors import StoreUnavailableError
from shared_store.base.status import Status
from shared_store.client.session import Session

SCRIPT = Path(__file__).resolve().parent / "gpu_engine.py"
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
MIB = 1 << 20


class ChildError(Exception):
    """A process failed, died, or was silent for too long; the message ends with the tail of its log."""


class Child:
    """A process that says events and is told words. Times: seconds of the monotonic clock."""

    def __init__(
        self, name: str, command: list[str], role: str, job: dict[str, Any], log: Path, environment: dict[str, str]
    ) -> None:
        self.name = name
        self.spawned = time.monotonic()
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [*command, role, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, **ENVIRONMENT, **environment},
                start_new_session=True,
            )
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        """The process's."""
        return self._process.pid

    def heard(self) -> bool:
        """Whether an event is there to be heard."""
        return not self._events.empty()

    def tell(self, word: str) -> None:
        """Send a word. A process that is gone shows when it is next heard."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()

    def hear(self, event: str, timeout_s: float = 300) -> dict[str, Any]:
        """Its next event, which is this one. Raises :class:`ChildError`."""
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
            raise ChildError(f"{self.name} said {facts['event']!r} where {event!r} was due\n{self._tail()}")
        return facts

    def ask(self, word: str, event: str = "", timeout_s: float = 300) -> dict[str, Any]:
        """Send a word, and return the event that answers it (by default of the same name)."""
        self.tell(word)
        return self.hear(event or word, timeout_s)

    def release(self) -> None:
        """Let it go: the end of its input is its end. Idempotent."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self, timeout_s: float = 15) -> None:
        """Let it go, and wait until it is gone; one that stays is killed. Idempotent."""
        self.release()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=max(timeout_s, 0))
        with contextlib.suppress(ProcessLookupError):  # what it started (compilers) is in its group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def _tail(self, lines: int = 12) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


def end_all(children: Iterable[Child], timeout_s: float = 15) -> None:
    """End processes together: all are let go at once, and those that stay longer than all may are killed."""
    living = list(children)
    for child in living:
        child.release()
    deadline = time.monotonic() + timeout_s
    for child in living:
        child.end(deadline - time.monotonic())


class Node:
    """A store of its own, and processes that use it. Leaving it ends them all, and removes the directory."""

    def __init__(self, script: Path = SCRIPT) -> None:
        """``script``: what its processes run."""
        self._command = [sys.executable, str(script)]
        self._scratch = tempfile.TemporaryDirectory(prefix="wooly-", dir="/tmp")  # short: sockets' paths are limited
        self.scratch = Path(self._scratch.name)
        self.runtime_dir = self.scratch / "run"
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes and the store. Idempotent."""
        self.end_all()
        self.stop_store()
        self._scratch.cleanup()

    def end_all(self) -> None:
        """End all processes. The store goes on."""
        end_all(self._children)

    def start(self, name: str, role: str, job: dict[str, Any], **environment: str) -> Child:
        """Start a process."""
        log = self.scratch / f"{len(self._children):03d}-{role}.log"
        environment |= {"WOOLY_RUNTIME_DIR": str(self.runtime_dir)}
        self._children.append(Child(name, self._command, role, job, log, environment))
        return self._children[-1]

    def status(self) -> Status:
        """What the store says of itself. Raises :class:`StoreUnavailableError` where none was started yet."""
        with Session.connect(self.runtime_dir, autostart=False) as session:
            return session.status()

    def stop_store(self) -> None:
        """End the store, if one was started, and wait until its memory is free."""
        try:
            with Session.connect(self.runtime_dir, autostart=False) as session:
                keeper = session.status().keeper
                session.shutdown_store()
        except StoreUnavailableError:  # no process here used one
            return
        deadline = time.monotonic() + 30
        while keeper is not None and Path(f"/proc/{keeper.pid}").exists():  # memory is free when its keeper is gone
            if time.monotonic() > deadline:
                raise ChildError(f"the store was told to end 30 s ago, and its keeper (pid {keeper.pid}) lives")
            time.sleep(0.05)


class Mps:
    """NVIDIA's Multi-Process Service, for the processes that get its environment; leaving it ends the service.

    Raises :class:`ChildError` where the machine does not have it. No setting of the GPU is changed.
    """

    CONTROL = "nvidia-cuda-mps-control"

    def __init__(self, scratch: Path) -> None:
        if shutil.which(self.CONTROL) is None:
            raise ChildError(f"there is no {self.CONTROL} on this machine")
        directory = scratch / "mps"
        directory.mkdir()
        self.environment = {"CUDA_MPS_PIPE_DIRECTORY": str(directory), "CUDA_MPS_LOG_DIRECTORY": str(directory)}

    def __enter__(self) -> Self:
        self._control("-d")
        return self

    def __exit__(self, *_: object) -> None:
        self._control(words="quit\n")

    def _control(self, *arguments: str, words: str = "") -> None:
        result = subprocess.run(
            [self.CONTROL, *arguments],
            input=words,
            capture_output=True,
            text=True,
            timeout=60,
            # With a GPU of its own choice the service would give it another number than its clients know it by.
            env={**{k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}, **self.environment},
            check=False,
        )
        if result.returncode:
            raise ChildError(f"{self.CONTROL}: {result.stdout}{result.stderr}")


def nvidia_smi(query: str) -> str:
    """One figure of the first visible GPU, such as ``memory.used`` (MiB). Raises :class:`OSError` without a driver."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", first]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


def used_mib() -> int:
    """Memory in use on that GPU, in MiB, once it has stopped changing: the driver frees what the dead had late."""
    before, now = -1, int(nvidia_smi("memory.used"))
    deadline = time.monotonic() + 10
    while now != before and time.monotonic() < deadline:
        time.sleep(0.3)
        before, now = now, int(nvidia_smi("memory.used"))
    return now
