"""vLLM servers, for tests, the demo and benchmarks: start, wait until ready, send requests, measure memory, stop.

Each server is `vllm serve` of the current environment, in a process session of its own, so that stopping it stops every
process that it started. Its output goes to a log file. Relies on Linux's /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
"""The `vllm` command of this environment. Works without its script, when vLLM is only on PYTHONPATH."""

SMALL_ARGUMENTS = ("--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager", "--dtype", "bfloat16")
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

_LOADED = re.compile(r"Model loading took .*?([\d.]+) seconds|Loading weights took ([\d.]+) seconds")


class ServerError(Exception):
    """A server did not start, exited, or returned an error. The message ends with the tail of its log."""


@dataclass(frozen=True)
class Answer:
    """A server's answer to one request: its text and its token ids."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Proportional set size (bytes) of a process: a page shared by N processes counts as 1/N.

    ``anonymous`` is memory that the process allocated, ``shared`` is what it maps from the store. Pages of files
    (libraries) are excluded, because their share depends on the number of other servers.
    """

    pid: int
    anonymous: int
    shared: int

    @property
    def total(self) -> int:
        """Sum of both, in bytes."""
        return self.anonymous + self.shared


class Server:
    """A `vllm serve MODEL` process. As a context manager, stops it on exit."""

    def __init__(
        self,
        name: str,
        model: str,
        log: Path,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.start_s = 0.0
        self._began = time.monotonic()
        self._port = _free_port()
        command = [*VLLM, "serve", model, "--served-model-name", "model", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), *arguments]
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The TCP port that it listens on."""
        return self._port

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server is healthy. Raises :class:`ServerError` if it exits or ``timeout_s`` passes."""
        deadline = self._began + timeout_s
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise ServerError(f"{self.name} exited with {self._process.returncode} during start\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} was not ready after {timeout_s:.0f} s\n{self.log_tail()}")
            time.sleep(0.5)
        self.start_s = time.monotonic() - self._began

    def ask(self, question: str, *, max_tokens: int = 48, timeout_s: float = 120, ignore_eos: bool = False) -> Answer:
        """Send a question to the chat API, with greedy decoding. Raises :class:`ServerError`.

        ``ignore_eos``: the answer has ``max_tokens`` tokens, whatever the model says.
        """
        asked = {"messages": [{"role": "user", "content": question}], "ignore_eos": ignore_eos}
        choice = self._choice("/v1/chat/completions", asked, max_tokens, timeout_s)
        return Answer(choice["message"]["content"], tuple(choice["token_ids"]))

    def complete(self, prompt: Sequence[int], *, max_tokens: int = 48, timeout_s: float = 120) -> Answer:
        """Complete a prompt of token ids, for models without a chat template. Otherwise as :meth:`ask`."""
        choice = self._choice("/v1/completions", {"prompt": list(prompt)}, max_tokens, timeout_s)
        return Answer(choice["text"], tuple(choice["token_ids"]))

    def _choice(self, path: str, asked: dict[str, Any], max_tokens: int, timeout_s: float) -> Any:
        request = {**asked, "model": "model", "temperature": 0, "max_tokens": max_tokens, "return_token_ids": True}
        try:
            return self._post(path, request, timeout_s)["choices"][0]
        except (OSError, ValueError, LookupError) as error:
            raise ServerError(f"{self.name} did not answer: {error!r}\n{self.log_tail()}") from error

    def pids(self) -> set[int]:
        """Process ids of the server and of all processes that it started."""
        session = self._process.pid
        running = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return {pid for pid in running if _session(pid) == session}

    def worker_memory(self, pids: set[int] | None = None) -> Memory:
        """Memory of the largest process of ``pids`` (default: the engine's processes), which is the worker."""
        candidates = pids or self.pids() - {self._process.pid}
        return max((_memory(pid) for pid in candidates), key=lambda memory: memory.total)

    def load_seconds(self) -> float | None:
        """Load time (seconds) that vLLM logged; None if it logged none."""
        found = _LOADED.findall(self.log.read_text(errors="replace"))
        return max((float(text) for pair in found for text in pair if text), default=None)

    def log_tail(self, lines: int = 25) -> str:
        """Return the last lines of the server's log."""
        tail = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"--- {self.log} (last {len(tail)} lines)", *tail])

    def stop(self) -> None:
        """Stop the server and all processes that it started: SIGTERM, then SIGKILL after 20 s. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        # A killed server leaves its engine running; the engine is in the same process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _post(self, path: str, body: object, timeout_s: float) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:  # exited since it was listed
        return None


def _memory(pid: int) -> Memory:
    sizes = dict.fromkeys(("Pss_Anon", "Pss_Shmem"), 0)
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # a helper process that has just exited
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            key, value = line.split(":")
            if key in sizes:
                sizes[key] = int(value.split()[0]) * 1024
    return Memory(pid, sizes["Pss_Anon"], sizes["Pss_Shmem"])
