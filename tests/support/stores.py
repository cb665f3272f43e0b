"""Store processes, each in a private runtime directory with a short path."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from support.client import Client
from support.waiting import open_fds, process_state, readable, wait_until

from shared_store.base.errors import StoreUnavailableError
from shared_store.client.session import Session
from shared_store.runtime.paths import RuntimePaths


class StoreProcess:
    """`python -m shared_store.daemon`: a store without a keeper. Options are those of `ServeOptions`.

    `program`: Python arguments that replace the module.
    """

    PROGRAM = ("-m", "shared_store.daemon")

    def __init__(self, directory, *, program=None, **options):
        self._program = program or self.PROGRAM
        self.directory = Path(directory)
        self.paths = RuntimePaths(self.directory)
        self._options = {"runtime_dir": str(directory), **options}
        self._clients = []
        self._process = None

    @property
    def pid(self):
        return self._process.pid

    def start(self, *, through=(), pass_fds=(), **popen):
        """Start it, and wait until clients can connect. ``through``: a command that executes the store's."""
        ready, low = os.pipe()
        tell = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 200)  # a number above those that tests assign
        os.close(low)
        try:
            command = [
                *through,
                sys.executable,
                *self._program,
                str(self.directory),
                str(tell),
                json.dumps(self._options),
            ]
            with (self.directory / "test.log").open("ab") as log:
                self._process = subprocess.Popen(command, pass_fds=(tell, *pass_fds), stdout=log, stderr=log, **popen)
            os.close(tell)
            assert readable(ready, 20.0), "the store was not ready within 20 s"
            assert os.read(ready, 1) == b"1", self.log()
        finally:
            os.close(ready)
        return self

    def refused(self, **popen):
        """Start it where it must fail. Returns exit code and stderr."""
        command = [sys.executable, *self._program, str(self.directory), "", json.dumps(self._options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, **popen)
        return done.returncode, done.stderr

    def log(self):
        return (self.directory / "test.log").read_text()

    def client(self, name=""):
        """Connect a client in this process. It ends with the test."""
        client = Client(self.directory, name)
        self._clients.append(client)
        return client

    @property
    def proc(self):
        return Path(f"/proc/{self.pid}")

    def open_fds(self):
        return open_fds(self.pid)

    def lowest_free_fd(self):
        """Return the number of the next file that it opens."""
        taken = {int(fd.name) for fd in (self.proc / "fd").iterdir()}
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def children(self):
        """Return the pids of its running child processes."""
        return [int(pid) for task in (self.proc / "task").iterdir() for pid in (task / "children").read_text().split()]

    def stop(self):
        """Send SIGTERM. Returns the exit code."""
        self._process.terminate()
        return self.wait()

    def wait(self):
        """Wait for its end. Returns the exit code."""
        return self._process.wait(timeout=20)

    def kill(self):
        self._process.kill()
        self._process.wait()

    def clean_up(self):
        for client in self._clients:
            client.unmap_all()
            client.close()
        if self._process is not None and self._process.poll() is None:
            if process_state(self.pid) == "T":
                os.kill(self.pid, signal.SIGCONT)
            self.kill()


class KeptStore(StoreProcess):
    """`python -m shared_store.keeper`: the process is the keeper, which starts a store."""

    PROGRAM = ("-m", "shared_store.keeper")

    @property
    def store_pid(self):
        """Wait for a store. Returns its pid."""
        return self.status().store.pid

    def status(self):
        with Session.connect(self.directory, name="test", autostart=False) as session:
            return session.status()

    def kill_store(self):
        """Send SIGKILL to the store. Returns its pid."""
        pid = self.store_pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill_both(self):
        """Send SIGKILL to keeper and store, and wait until both have ended, including all threads."""
        status = self.status()
        both = [os.pidfd_open(pid) for pid in (status.keeper.pid, status.store.pid)]
        try:
            signal.pidfd_send_signal(both[0], signal.SIGSTOP)  # so that it does not start another store
            for process in reversed(both):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            for process in both:
                assert readable(process, 20.0), "keeper and store did not end"
        finally:
            for process in both:
                os.close(process)
        if status.keeper.pid == self.pid:
            self._process.wait()

    def clean_up(self):
        if self._process is not None and self._process.poll() is None and process_state(self.pid) == "T":
            os.kill(self.pid, signal.SIGCONT)
        for client in self._clients:
            client.unmap_all()
            client.close()
        with contextlib.suppress(StoreUnavailableError), Session.connect(self.directory, autostart=False) as session:
            keeper = session.status().keeper.pid
            session.shutdown_store()
            wait_until(lambda: process_state(keeper) in {"", "Z"}, "the keeper to end")
        if self._process is not None and self._process.poll() is None:
            self.kill()


def resident(client):
    """Return the resident bytes of the status."""
    return client.session.status().totals.resident_bytes


def wait_for_status(client, condition, what):
    """Poll the status until `condition(status)`."""
    wait_until(lambda: condition(client.session.status()), what)


def store_without_catalog(**options):
    """Start a store with some options whose catalog is unreachable, and yield it, for a fixture."""
    directory = Path(tempfile.mkdtemp(prefix="wooly-"))
    running = StoreProcess(directory, redis_url=f"unix://{directory}/away", **options).start()
    yield running
    running.clean_up()
    shutil.rmtree(directory)
