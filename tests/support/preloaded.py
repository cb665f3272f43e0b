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
import threading
from pathlib import Path
from typing import IO, Any

from support.waiting import readable

MAIN = Path(__file__).with_name("preloaded_main.py")
IMPORTED_WITHIN_S = 120.0
STARTED_WITHIN_S = 60.0
GPU = Path("/dev/nvidiactl")
"""Where it exists, nothing is forked: a driver that an import has started does not survive that."""


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


Process = PreloadedProcess | subprocess.Popen[Any]


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
        self,
        program: str,
        *arguments: str,
        environment: dict[str, str],
        stdout: IO[Any] | None,
        stderr: IO[Any] | None,
        text: bool,
    ) -> PreloadedProcess:
        """Fork a process; see `Pool.start`."""
        assert self.threads == 1, "a process with threads cannot be forked"
        request = {
            "program": program,
            "arguments": arguments,
            "environment": environment,
            "directory": str(Path.cwd()),
        }
        with contextlib.ExitStack() as theirs:
            mode, buffering = ("", -1) if text else ("b", 0)

            def pipe(end: str) -> tuple[int, IO[Any]]:
                read, write = os.pipe()
                given, kept = (write, read) if end == "r" else (read, write)
                theirs.callback(os.close, given)
                return given, os.fdopen(kept, end + mode, buffering)

            stdin, write = pipe("w")
            out, read = (stdout.fileno(), stdout) if stdout is not None else pipe("r")
            err = stderr.fileno() if stderr is not None else out
            status, exited = os.pipe()
            theirs.callback(os.close, exited)
            socket.send_fds(self._control, [json.dumps(request).encode()], [stdin, out, err, exited])
        assert readable(self._control, STARTED_WITHIN_S), "the server of preloaded processes does not answer"
        pid, (pidfd,), _, _ = socket.recv_fds(self._control, 16, 1)
        return PreloadedProcess(int(pid), pidfd, status, write, read)

    def close(self) -> None:
        """End the server; processes that it forked run on."""
        self._control.close()
        self._process.wait()


class Pool:
    """Starts processes with some modules imported under an environment: from two servers in turn."""

    def __init__(self, modules: tuple[str, ...], environment: dict[str, str]) -> None:
        self._modules = modules
        self._environment = environment
        self._turns = itertools.count()

    @functools.cached_property
    def _servers(self) -> list[Preloaded]:
        seeds = ("1", "2")
        return [Preloaded(self._modules, {**self._environment, "PYTHONHASHSEED": seed}) for seed in seeds]

    @functools.cached_property
    def _forks(self) -> bool:
        return not GPU.exists() and all(server.threads == 1 for server in self._servers)

    def begin(self) -> None:
        """Start the servers, unless they run; they stay until this process ends."""
        if not GPU.exists():
            assert self._servers

    def start(
        self,
        program: str,
        *arguments: str,
        environment: dict[str, str],
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        text: bool = True,
    ) -> Process:
        """Start a process that runs a script, or a module by its name, with pipes as its stdin and stdout.

        Without `stderr`, errors go where stdout goes. Where the imports leave threads running, or there is a GPU, the
        process is not forked but starts from nothing.
        """
        streams: dict[str, Any] = {"stdout": stdout, "stderr": stderr, "text": text}
        if self._forks:
            server = self._servers[next(self._turns) % len(self._servers)]
            return server.start(program, *arguments, environment=environment, **streams)
        return subprocess.Popen(
            [sys.executable, *([program] if Path(program).is_file() else ["-m", program]), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.STDOUT if stderr is None else stderr,
            env=environment,
            text=text,
            bufsize=-1 if text else 0,
        )


def finish(process: Process, timeout_s: float) -> tuple[int, str]:
    """Read stdout to its end; returns the exit code and what was written. Kills the process when the time is up."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    killer = threading.Timer(timeout_s, process.kill)
    killer.start()
    try:
        with process.stdout:
            written = process.stdout.read()
    finally:
        killer.cancel()
        killer.join()
    return process.wait(timeout_s), written
