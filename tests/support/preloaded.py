"""Python processes whose imports are done: forked from a server that imported torch, transformers or vLLM once.

Each is a process of its own, with its own memory, descriptors and pid, and is killed like any other. What it does not
have for itself is the import: of tests that start dozens of processes with vLLM in them, most of the time is that.

Processes come from two servers in turn. Two in a row, such as a publisher and its reader, thus differ in address
layout and in the seed of string hashes, as unrelated processes do.

Not for CUDA, whose state does not survive a fork, and not for tests of what happens during imports. The environment of
a process is its own, but what imports read from it was read by the server.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from support.waiting import readable

MAIN = Path(__file__).with_name("preloaded_main.py")
IMPORTED_WITHIN_S = 120.0
STARTED_WITHIN_S = 60.0


class PreloadedProcess:
    """A forked process, with what tests use of `subprocess.Popen`."""

    def __init__(self, pid: int, pidfd: int, status: int, stdin: IO[Any], stdout: IO[Any]) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._status = status

    def poll(self) -> int | None:
        return self._exit_code(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises `subprocess.TimeoutExpired`."""
        code = self._exit_code(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _exit_code(self, timeout_s: float | None) -> int | None:
        if self.returncode is None and readable(self._status, timeout_s):
            written = os.read(self._status, 16)
            assert written, "the server of preloaded processes has ended"
            self.returncode = int(written)
            os.close(self._status)
            os.close(self._pidfd)
        return self.returncode


class Preloaded:
    """A server with some modules imported under an environment. `threads`: how many the imports left running."""

    def __init__(self, modules: tuple[str, ...], environment: dict[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(MAIN), str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},  # or it starts threads when imported
            )
        atexit.register(self.close)

    @functools.cached_property
    def threads(self) -> int:
        assert readable(self._control, IMPORTED_WITHIN_S), "the imports did not end in time"
        return int(self._control.recv(16))

    def start(
        self, program: str, *arguments: str, environment: dict[str, str], stderr: IO[Any] | None = None, text: bool
    ) -> PreloadedProcess:
        """Fork a process that runs a script, or a module by its name. Its stdin and stdout are pipes of the test's.

        Without `stderr`, that goes to stdout.
        """
        assert self.threads == 1, "a process with threads cannot be forked"
        request = {
            "program": program,
            "arguments": arguments,
            "environment": environment,
            "directory": str(Path.cwd()),
        }
        (stdin, write), (read, stdout), (status, exited) = (os.pipe() for _ in range(3))
        told = stdout if stderr is None else stderr.fileno()
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], [stdin, stdout, told, exited])
        finally:
            for fd in (stdin, stdout, exited):
                os.close(fd)
        assert readable(self._control, STARTED_WITHIN_S), "the server of preloaded processes does not answer"
        pid, (pidfd,), _, _ = socket.recv_fds(self._control, 16, 1)
        mode, buffering = ("", -1) if text else ("b", 0)
        return PreloadedProcess(
            int(pid),
            pidfd,
            status,
            os.fdopen(write, f"w{mode}", buffering),
            os.fdopen(read, f"r{mode}", buffering),
        )

    def close(self) -> None:
        """End the server; processes that it forked run on."""
        self._control.close()
        self._process.wait()


class Pool:
    """Two servers with the same modules, from which processes come in turn. They start with the first process."""

    def __init__(self, modules: tuple[str, ...], environment: dict[str, str]) -> None:
        self._modules = modules
        self._environment = environment
        self._turns = itertools.count()

    @functools.cached_property
    def _servers(self) -> list[Preloaded]:
        seeds = ("1", "2")
        return [Preloaded(self._modules, {**self._environment, "PYTHONHASHSEED": seed}) for seed in seeds]

    @functools.cached_property
    def forks(self) -> bool:
        """Whether the imports left no thread running, so that a process can be forked after them."""
        return all(server.threads == 1 for server in self._servers)

    def start(self, *arguments: Any, **options: Any) -> PreloadedProcess:
        """`Preloaded.start`, from the one or the other."""
        servers = self._servers
        return servers[next(self._turns) % len(servers)].start(*arguments, **options)
