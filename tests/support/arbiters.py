"""An arbiter's process, and workloads of it in this process and in others. The test plays the store."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time

from support.actors import Actor
from support.waiting import process_state, readable, wait_until

from shared_store.compute import control
from shared_store.compute.gate import ComputeGate
from shared_store.compute.page import make_page, map_page
from shared_store.runtime.fds import OwnedFd


class Rows(dict):
    """The last row of each workload; one that was not reported yet used nothing."""

    def __missing__(self, number):
        return control.Row(number, 0.0, 0.0, 0.0, 0.0, held=False, stalled=False)


class ArbiterProcess:
    """`rows`: the last that it reported of each workload."""

    def __init__(self, max_hold_s=0.0, env=None, unread=None):
        """`unread`: bytes of reports that the kernel keeps at most."""
        self._store, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if unread is not None:
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, unread)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shared_store.compute.arbiter", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=env,
            )
        self.rows = Rows()
        self.send(control.Rules(max_hold_s))

    @property
    def pid(self):
        return self._process.pid

    def send(self, message, *fds):
        self.send_bytes(control.encode(message), *fds)

    def send_bytes(self, data, *fds):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._store.sendmsg([data], rights)

    def add(self, number, priority=0, *, share=0.0, gated=True, devices=("cpu",)):
        """Add a workload. Returns the descriptors of its page and of its end of the socket."""
        page = make_page()
        ours, theirs = socket.socketpair()
        with theirs:
            self.send(control.Add(number, devices, priority, share, gated), page.fileno(), theirs.fileno())
        return page, OwnedFd(ours.detach())

    def report(self, timeout_s=30.0):
        """Wait for the next report. Returns the rows by number."""
        if not readable(self._store, timeout_s):
            raise AssertionError(f"the arbiter did not report within {timeout_s} s")
        packet = self._store.recv(control.MAX_PACKET)
        assert packet, "the arbiter has ended"
        self.rows |= {row.number: row for row in control.decode_from_arbiter(packet).rows}
        return self.rows

    def until(self, condition, timeout_s=30.0):
        """Wait for a report whose rows are as `condition` says; return them."""
        deadline = time.monotonic() + timeout_s
        while not condition(self.report()):
            assert time.monotonic() < deadline, f"the last report is {self.rows}"
        return self.rows

    def look(self):
        """Wait until it has looked at all that was sent and written so far: it reports after a look."""
        while readable(self._store, 0):
            self.report()
        self.report()

    def unread(self):
        """Bytes of reports that the test has not read (`SIOCINQ` of `unix(7)`)."""
        return int.from_bytes(fcntl.ioctl(self._store, termios.FIONREAD, bytes(4)), sys.byteorder)

    def stop(self):
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: process_state(self.pid) == "T", "the arbiter to be stopped")

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)

    def kill(self):
        self._process.kill()
        self._process.wait()

    def leave(self):
        """Close the store's end. Returns the exit code of the arbiter, which ends."""
        self._store.close()
        return self._process.wait(30)

    def close(self):
        self._store.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        self.kill()


class Gated:
    """A workload of this process. `words`: its page, as the arbiter sees it. `changes`: how often steps may again."""

    def __init__(self):
        self.changed = threading.Event()
        self.changes = 0
        self.lost = threading.Event()
        self.losses = 0
        self.gate = ComputeGate(self._on_change)
        self.words = None
        self.steps = 0
        self.ended = None
        self._thread = None
        self._stopping = threading.Event()

    def attach(self, page, bell):
        with page:
            self.words = map_page(page.dup())
            self.gate.attach(page.dup(), bell, self._on_loss)
        return self

    def _on_change(self):
        self.changes += 1
        self.changed.set()

    def _on_loss(self):
        self.losses += 1
        self.lost.set()

    def held(self):
        """Wait until no step may begin."""
        wait_until(lambda: not self.gate.may_begin(), "the workload to be held", 30)

    def free(self):
        """Wait until a step may begin."""
        assert self.gate.wait(30), "the workload is held"

    def work(self, step_s=0.003, steps=None):
        """Make steps in a thread, until `finish` or so many."""

        def run():
            self.gate.work(has=True)
            while not self._stopping.is_set() and (steps is None or self.steps < steps):
                if self.gate.wait(0.1):
                    self.gate.begin()
                    time.sleep(step_s)
                    self.gate.end()
                    self.steps += 1
            self.ended = time.monotonic()
            self.gate.work(has=False)

        self._stopping.clear()
        self._thread = threading.Thread(target=run)
        self._thread.start()

    def goes_on(self, steps=3):
        """Wait until it has made more steps."""
        before = self.steps
        wait_until(lambda: self.steps >= before + steps, "the workload to make steps", 30)

    def finish(self):
        self._stopping.set()
        self.join()

    def join(self, timeout_s=60):
        if self._thread is not None:
            self._thread.join(timeout_s)
            assert not self._thread.is_alive(), "the workload still works"
            self._thread = None

    def close(self):
        self.finish()
        self.gate.close()
        self.words = None


class SteppingProcess(Actor):
    """A workload in a process of its own, see `stepping_main`."""

    MAIN = "stepping_main.py"

    def __init__(self, **popen):
        self._ours, theirs = socket.socketpair()
        with theirs:
            super().__init__(
                env={**os.environ, "STEPPING_SOCKET": str(theirs.fileno())}, pass_fds=[theirs.fileno()], **popen
            )

    def attach(self, page, bell):
        """Obey an arbiter, given the descriptors that `ArbiterProcess.add` returned."""
        with page, bell:
            socket.send_fds(self._ours, [b"\0"], [page.fileno(), bell.fileno()])
        self.begin("attach")
        self.finish()

    def goes_on(self, steps=3):
        before = self.steps()
        wait_until(lambda: self.steps() >= before + steps, "the workload to make steps", 30)

    def kill(self):
        super().kill()
        self._ours.close()
