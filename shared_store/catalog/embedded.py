"""The embedded Valkey server: the catalog of a store without ``--redis-url``.

It listens on a private Unix socket only, writes no data to disk, and is restarted when it dies; the catalog is then
rewritten. It ends with the store in every case.

Relies on: ``PR_SET_PDEATHSIG``, with which the kernel kills the server when the thread that forked it ends. Therefore
one thread forks the server and waits for it, and ends only in :meth:`EmbeddedServer.stop`.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
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
# Enough for the manifests and digests of hundreds of models. A full server refuses writes; it never evicts keys.
_MAX_MEMORY: Final = "128mb"
_STEADY_S: Final = 10.0
_STOP_S: Final = 2.0
_POLL_S: Final = 0.01
_log = logging.getLogger(__name__)


class EmbeddedServer:
    """A supervised Valkey server with its socket and log in ``directory``, which must exist and be private.

    Raises:
        PathTooLongError: the path of the socket would be longer than the kernel allows.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / _SOCKET_NAME
        length = len(os.fsencode(self._socket))
        if length > _LONGEST_PATH:
            raise PathTooLongError(
                f"the path of the catalog's socket {self._socket} has {length} bytes; the limit is {_LONGEST_PATH}; "
                "set WOOLY_RUNTIME_DIR to a shorter directory, or WOOLY_REDIS_URL to a server"
            )
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Return the URL for :class:`Catalog`."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """Return the pid of the server, or None while it does not run."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Start the supervision. Returns before the server answers."""
        self._thread = threading.Thread(target=self._supervise, name="wooly-catalog-server", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the socket accepts connections. Return False after the time-out or :meth:`stop`."""
        deadline = time.monotonic() + timeout_s
        while not _listens(self._socket):
            if time.monotonic() > deadline or self._stopping.wait(_POLL_S):
                return False
        return True

    def stop(self) -> None:
        """Stop the server and its supervision, and wait for both."""
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
                "the embedded catalog server ended (%s); restarting it in %.1f s; log: %s",
                *(reason, wait_s, self._directory / _LOG_NAME),
            )
            if self._stopping.wait(wait_s):
                return

    def _run_once(self) -> str:
        """Start the server, and wait for its end. Return the reason."""
        with self._lock:
            if self._stopping.is_set():
                return "stopped"
            # A new session, so that Ctrl-C on the store's terminal does not reach the server: the store stops it.
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
        return valkey_exec.command([word for name, value in settings.items() for word in (f"--{name}", value)])


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(os.fspath(path)) == 0
