"""Servers for the catalog's tests: a `redis-server` process, and the embedded Valkey.

`RedisServer`, `OwnServer` and the fixtures `server`, `redis_server` and `server_directory` use nothing else of this
folder.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared_store.catalog import EmbeddedServer


def wait_until(condition, what, timeout_s=15.0):
    """Poll until `condition()` is true; fail with `what` it waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s} s for: {what}")
        time.sleep(0.01)


def process_ended(pid):
    """Return True if a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Server:
    """Operations of a test on a server: `kill` and `restart` (empty), `pause` and `resume`, and a client."""

    url: str

    @property
    def pid(self):
        raise NotImplementedError

    def kill(self):
        raise NotImplementedError

    def restart(self):
        raise NotImplementedError

    def pause(self):
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)

    def client(self):
        """Return a new client, which does not retry. The caller closes it."""
        return redis.Redis.from_url(self.url, protocol=2, socket_timeout=5, retry=Retry(NoBackoff(), 0))

    def answers(self):
        with self.client() as client:
            try:
                return client.ping()
            except redis.ConnectionError:
                return False


class RedisServer(Server):
    """A `redis-server` process on a Unix socket, without persistence."""

    def __init__(self, directory):
        self._socket = directory / "redis.sock"
        self.url = f"unix://{self._socket}"
        self._process = None

    @property
    def pid(self):
        return self._process.pid

    def start(self):
        self._process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", self._socket, "--save", "", "--dir", self._socket.parent],
            stdout=subprocess.DEVNULL,
        )
        wait_until(self.answers, "redis-server to answer")

    def stop(self):
        self._process.kill()
        self._process.wait()

    kill = stop
    restart = start


class OwnServer(Server):
    """The embedded server, which restarts by itself."""

    def __init__(self, directory):
        self._embedded = EmbeddedServer(directory)
        self.url = self._embedded.url

    @property
    def pid(self):
        return self._embedded.pid

    def start(self):
        self._embedded.start()
        wait_until(self.answers, "the embedded server to answer")

    def stop(self):
        self._embedded.stop()

    def kill(self):
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: process_ended(pid), "the embedded server to end")

    def restart(self):
        wait_until(self.answers, "the embedded server to be restarted")


@pytest.fixture
def server_directory():
    """A private directory with a path that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="wooly-") as directory:
        yield Path(directory)


@contextlib.contextmanager
def running(kind, directory):
    """Run a server of the class `kind`. It ends with the block."""
    if kind is RedisServer and shutil.which("redis-server") is None:
        pytest.skip("no redis-server on PATH")
    server = kind(directory)
    server.start()
    try:
        yield server
    finally:
        if server.pid is not None and not process_ended(server.pid):
            server.resume()
        server.stop()


@pytest.fixture(params=[pytest.param(RedisServer, marks=pytest.mark.redis_server), OwnServer], ids=["redis", "own"])
def server(request, server_directory):
    """A running server of each kind."""
    with running(request.param, server_directory) as started:
        yield started


@pytest.fixture
def redis_server(server_directory):
    """A running `redis-server`, for tests that change its settings."""
    with running(RedisServer, server_directory) as started:
        yield started


@pytest.fixture
def client(server):
    with server.client() as connected:
        yield connected
