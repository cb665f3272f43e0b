"""A Valkey server of the store's own, for nodes that were not given one.

It listens on a private Unix socket only, keeps nothing on disk, and is restarted when it dies; the catalog is then
written again. It dies with the store, however the store dies: the kernel ties it to the thread that forked it, so one
thread forks it and waits for it, and ends only in :meth:`EmbeddedServer.stop`.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final
from urllib.parse import quote

from shared_store.base.errors import PathTooLongError
from shared_store.catalog import valkey_exec
from shared_store.runtime.backoff import delays

_SOCKET_NAME: Final = "catalog.sock"
_LOG_NAME: Final = "catalog.log"
# The kernel's sun_path, less the null byte that servers put at its end.
_LONGEST_PATH: Final = 107
# Room for the manifests and digests of hundreds of models. Full means an error and a degraded store, never eviction.
_MAX_MEMORY: Final = "128mb"
_STEADY_S: Final = 10.0
_STOP_S: Final = 2.0
_POLL_S: Final = 0.01
_log = logging.getLogger(__name__)


class EmbeddedServer:
    """A supervised Valkey server with its socket and log in ``directory``, which must exist and be private.

    Raises :class:`PathTooLongError` for a directory whose path leaves no room for the socket's name.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / _SOCKET_NAME
        length = len(os.fsencode(self._socket))
        if length > _LONGEST_PATH:
            raise PathTooLongError(
                f"the catalog's socket {self._socket} has a path of {length} bytes, and {_LONGEST_PATH} are possible; "
                "set WOOLY_RUNTIME_DIR to a shorter directory, or WOOLY_REDIS_URL to a server"
            )
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where the catalog finds it."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """The server's process, or None while there is none."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Start to supervise. Returns at once; the server answers a moment later."""
        self._thread = threading.Thread(target=self._supervise, name="wooly-catalog-server", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until something listens at its socket; false if nothing does in time, or it is stopped."""
        deadline = time.monotonic() + timeout_s
        while not _listens(self._socket):
            if time.monotonic() > deadline or self._stopping.wait(_POLL_S):
                return False
        return True

    def stop(self) -> None:
        """End the server and its supervision, and wait for both."""
        with self._lock:
            self._stopping.set()
            process = self._process
            if process is not None:
                process.terminate()
        if self._thread is None:
            return
        self._thread.join(_STOP_S)
        if self._thread.is_alive() and process is not None:
            process.kill()
            self._thread.join()

    def _supervise(self) -> None:
        waits = delays()
        while True:
            started = time.monotonic()
            try:
                reason = self._run_once()
            except OSError as error:
                reason = str(error)
            if self._stopping.is_set():
                return
            if time.monotonic() - started > _STEADY_S:
                waits = delays()
            wait_s = next(waits)
            _log.warning(
                "the catalog's own server ended (%s); restarting it in %.1f s, its log is %s",
                *(reason, wait_s, self._directory / _LOG_NAME),
            )
            if self._stopping.wait(wait_s):
                return

    def _run_once(self) -> str:
        """Start the server and wait for its end. Answers why it ended."""
        with self._lock:
            if self._stopping.is_set():
                return "stopped"
            # Its own session, so that Ctrl-C on the store's terminal leaves it to the store to end it.
            with (self._directory / _LOG_NAME).open("wb") as log:
                process = self._process = subprocess.Popen(
                    self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        code = process.wait()
        with self._lock:
            self._process = None
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _command(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._directory),
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
            "databases": "1",
            "maxmemory": _MAX_MEMORY,
            "maxmemory-policy": "noeviction",
            "loglevel": "notice",
        }
        arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [sys.executable, "-P", str(Path(valkey_exec.__file__)), str(os.getpid()), *arguments]


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(os.fspath(path)) == 0
