"""Any order of requests, swaps, sleeps, failures and restarts: the reports are transitions, and the memory follows."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.holders import Holder
from support.scripted import ScriptedStore
from support.waiting import wait_until

from shared_store.base.errors import ConnectionLostError, OutOfMemoryError
from shared_store.base.workload_states import TRANSITIONS, WorkloadState
from shared_store.client.session import Session
from shared_store.overcommit.agent import Agent
from shared_store.protocol import messages

NBYTES = 1 << 14
LIMIT_S = 20.0
ALLOWED = {(before, after) for (before, _), after in TRANSITIONS.items()}


class Counting:
    """A store in a thread: grants what is asked for, at once or when it is told, and checks what is reported.

    Attributes:
        wrong: what must not have happened.
        granted: whether a grant is outstanding.
    """

    def __init__(self, directory):
        self._directory = directory
        self._changed = threading.Condition()
        self._hold = False
        self._pending = None
        self._number = 0
        self._peer = None
        self.state = None
        self.granted = False
        self._fresh = False  # the grant may be that of the store before
        self.answers = {}
        self.wrong = []
        self._open()

    def _open(self):
        self._store = ScriptedStore(self._directory)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def end(self):
        self._peer.channel.sock.shutdown(2)
        self._thread.join(LIMIT_S)
        self._store.close()
        (self._directory / "store.sock").unlink()

    def restart(self):
        self.end()
        with self._changed:
            self._pending, self.granted, self.state = None, False, None
        self._open()
        wait_until(lambda: self.state is not None, "the workload to join again")

    def hold(self, hold):
        """Hold grants back, or give those that are held back."""
        with self._changed:
            self._hold = hold
            if not hold:
                self._grant()

    def swap_out(self, *, active):
        """Ask for it. Returns the number of the request."""
        self._number += 1
        self._peer.send(messages.SwapOut(self._number, "a test", 5.0, active))
        return self._number

    def _grant(self):
        if self._pending is not None:
            self._peer.send(messages.RoomTaken(self._pending))
            self._pending, self.granted = None, True

    def _serve(self):
        peer, _ = self._store.accept()
        self._peer = peer
        peer.send(messages.Welcome(messages.VERSION, "0", os.getpid(), 1, (messages.WORKLOADS,)))
        try:
            while True:
                message = peer.receive()
                with self._changed:
                    self._received(message)
        except ConnectionLostError:
            pass

    def _received(self, message):
        if isinstance(message, messages.Join):
            self.state, self._fresh = WorkloadState(message.state), True
            self._peer.send(messages.Joined(message.id, "engine", 0))
        elif isinstance(message, messages.TakeRoom):
            if self._pending is not None or self.granted:
                self.wrong.append(f"{message} while another one waits, or was granted")
            self._pending = message.id
            if not self._hold:
                self._grant()
        elif isinstance(message, messages.Cancel):
            if self._pending == message.id:
                self._pending = None
                self._peer.send(messages.Failed(message.id, "cancelled", ""))
        elif isinstance(message, messages.ReportWorkload):
            self._reported(WorkloadState(message.state))
            self._peer.send(messages.Done(message.id))
        elif isinstance(message, messages.Done | messages.Failed):
            self.answers[message.id] = message
            if isinstance(message, messages.Done) and self.state is not WorkloadState.SWAPPED:
                self.wrong.append(f"it said that it left, and is {self.state}")

    def _reported(self, state):
        if state is not self.state and (self.state, state) not in ALLOWED:
            self.wrong.append(f"{self.state} -> {state}")
        if state is WorkloadState.RETURNING and not self.granted and not self._fresh:
            self.wrong.append("it returns without memory")
        if state in {WorkloadState.RESIDENT, WorkloadState.SWAPPED}:
            self.granted = self._fresh = False
        self.state = state


class Machine(RuleBasedStateMachine):
    """One workload."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="wooly-"))
        self.store = Counting(self.directory)
        self.holder = Holder(NBYTES)
        self.agent = Agent(
            lambda identity: Session.connect(self.directory, autostart=False, identity=identity),
            self.holder,
            kind="vllm",
            name="engine",
            devices=("cpu",),
        )

    def teardown(self):
        self.holder.busy = False
        self.holder.failures = []
        if not self.agent.asleep and self.agent._session is not None:
            self.store.hold(hold=False)
            self.agent.ensure_resident(LIMIT_S)
            assert self.holder.intact()
        self.agent.close()
        if self.agent._moves is not None:
            self.agent._moves._thread.join(LIMIT_S)
        self.store.end()
        self.holder.close()
        shutil.rmtree(self.directory)
        assert not self.store.wrong

    @initialize()
    def start(self):
        self.agent.join()
        self.agent.take_room({"cpu": NBYTES}, LIMIT_S)
        self.holder.allocate()
        self.agent.joined_resident(self.holder.holdings())

    @rule(active=st.booleans(), busy=st.booleans())
    def swap_out(self, active, busy):
        self.holder.busy = busy
        number = self.store.swap_out(active=active)
        wait_until(lambda: number in self.store.answers, "an answer")
        answer = self.store.answers[number]
        if isinstance(answer, messages.Failed):
            assert not active or answer.message == "it is returning"

    @rule()
    def request(self):
        assert self.agent.wanted() in {True, False}

    @rule()
    def abort(self):
        self.agent.unwanted()

    @rule(hold=st.booleans())
    def hold(self, hold):
        self.store.hold(hold=hold)

    @precondition(lambda self: not self.agent.asleep)
    @rule(failures=st.integers(0, 1))
    def use(self, failures):
        self.holder.failures = [OutOfMemoryError("full")] * failures
        self.store.hold(hold=False)
        self.agent.ensure_resident(LIMIT_S)
        assert self.holder.intact()

    @precondition(lambda self: not self.agent.asleep)
    @rule()
    def sleep(self):
        self.use(failures=0)
        self.holder.leave(active=True, within_s=0, reached=lambda _: None)
        self.agent.left_by_itself(self.holder.holdings())

    @precondition(lambda self: self.agent.asleep)
    @rule(works=st.booleans())
    def wake(self, works):
        self.store.hold(hold=False)
        self.agent.take_room({"cpu": NBYTES}, LIMIT_S)
        if works:
            self.holder.allocate()
            self.agent.joined_resident(self.holder.holdings())
        else:
            self.agent.left_by_itself(self.holder.holdings())

    @precondition(lambda self: not self.agent.asleep)
    @rule()
    def grow(self):
        self.use(failures=0)
        self.agent.take_room({"cpu": 1}, LIMIT_S)
        self.agent.joined_resident(self.holder.holdings())

    @rule()
    def restart(self):
        self.store.restart()

    @invariant()
    def nothing_is_wrong(self):
        assert not self.store.wrong

    @invariant()
    def memory_follows_the_state(self):
        with self.agent._record.changed:  # nothing begins to move meanwhile
            if self.agent.state is WorkloadState.RESIDENT:
                assert self.holder.held == NBYTES
            elif self.agent.state is WorkloadState.SWAPPED:
                assert self.holder.held == 0


Machine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = pytest.mark.timeout(240)(Machine.TestCase)
