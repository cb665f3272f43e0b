"""The process behind `arbiters.SteppingProcess`: a workload of synthetic steps, driven by lines of JSON."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.holders import Holder

from shared_store.base.workload_settings import WorkloadSettings
from shared_store.client.session import Session
from shared_store.compute.gate import ComputeGate
from shared_store.overcommit.agent import Agent
from shared_store.runtime.fds import OwnedFd


class Stepping:
    """Makes steps of one length in a thread, as its gate lets it."""

    def __init__(self):
        self._gate = ComputeGate(lambda: None)
        self._socket = socket.socket(fileno=int(os.environ["STEPPING_SOCKET"]))
        self._lost = 0
        self._agent = None
        self._thread = None
        self._stopping = threading.Event()
        self._times = []

    # To an arbiter.

    def attach(self):
        """Obey the arbiter whose descriptors were sent."""
        _, (page, bell), _, _ = socket.recv_fds(self._socket, 1, 2)
        self._gate.attach(OwnedFd(page), OwnedFd(bell), self._count_loss)

    def _count_loss(self):
        self._lost += 1

    def join(self, directory, name, priority=0, share=0.0, exclusive=False, devices=("cpu",), ungated=""):
        """Join a store, and its arbiter."""
        holder = Holder(4096)
        self._agent = Agent(
            lambda identity: Session.connect(Path(directory), name=name, autostart=False, identity=identity),
            holder,
            kind="vllm",
            name=name,
            devices=tuple(devices),
            settings=WorkloadSettings(None, priority, swap=False, compute_share=share, exclusive=exclusive),
        )
        self._agent.join()
        holder.allocate()
        self._agent.joined_resident(holder.holdings())
        self._agent.compute(self._gate, ungated)

    def attached(self):
        return self._gate.attached

    def lost(self):
        """How often the arbiter was lost."""
        return self._lost

    # Steps.

    def work(self, step_s=0.003, spin=False, steps=None):
        """Work in a thread: steps that sleep, or use the CPU, until `rest` or so many."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._work, args=(step_s, spin, steps))
        self._thread.start()

    def _work(self, step_s, spin, steps):
        gate = self._gate
        made = 0
        gate.work(has=True)
        while not self._stopping.is_set() and (steps is None or made < steps):
            if gate.wait(0.1):
                began = time.monotonic()
                gate.begin()
                if spin:
                    while time.monotonic() < began + step_s:
                        pass
                else:
                    time.sleep(step_s)
                gate.end()
                made += 1
                self._times.append((began, time.monotonic()))
        gate.work(has=False)

    def rest(self):
        """Have no work from here on. Returns the steps made so far."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return len(self._times)

    def done(self, timeout_s=60.0):
        """Wait until the steps that `work` was given are made."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def steps(self):
        """How many steps were made so far."""
        return len(self._times)

    def times(self):
        """Beginning and end of each step, in monotonic seconds."""
        return list(self._times)

    def may_begin(self):
        return self._gate.may_begin()

    def wait(self, timeout_s):
        """Wait until a step may begin. Returns False if the time is over."""
        return self._gate.wait(timeout_s)

    def short(self):
        return self._gate.short

    def fork(self):
        """Start a child that has inherited everything, and does nothing. Returns its pid."""
        child = os.fork()
        if not child:
            signal.pause()
        return child

    def close(self):
        self.rest()
        if self._agent is not None:
            self._agent.close()
        self._gate.close()


def main():
    stepping = Stepping()
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = {"result": getattr(stepping, method)(**arguments)}
        except Exception as error:  # noqa: BLE001 - any error is sent to the calling test
            answer = {"error": type(error).__name__, "text": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    stepping.rest()


main()
