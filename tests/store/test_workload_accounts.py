"""Accounts after any history: names are unique, grants are counted once, and nothing outlives its owner."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from shared_store.base.workload_states import WorkloadState
from shared_store.protocol.messages.identity import Identity
from shared_store.store.state.accounts import Accounts
from shared_store.store.state.clients import Client
from shared_store.store.state.segments import Segments
from shared_store.store.state.workloads import AWAY, Report, Wait, Workloads

DEVICES = ("cpu", "GPU-1")
BUDGET, RESERVE, TOTAL = 1000, 10, 1200


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


amounts = st.dictionaries(st.sampled_from(DEVICES), st.integers(0, 300))
states = st.sampled_from(WorkloadState)


class History(RuleBasedStateMachine):
    """Joins, reports, waits, grants, publications and ends, in any order."""

    workloads = Bundle("workloads")

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.segments = Segments({})
        self.state = Workloads({0: 1}, self.clock)
        self.accounts = Accounts(self.segments, self.state, {"GPU-1": BUDGET}, lambda _: RESERVE)
        self.clients = {}
        self.tokens = 0

    @rule(target=workloads, name=st.sampled_from("ab"), uid=st.integers(0, 1), state=states, private=amounts)
    def join(self, name, uid, state, private):
        number = len(self.clients) + 1
        client = Client(number, number, uid, name, identity=Identity(name, "vllm", 0, member_of=f"id {number}"))
        self.clients[number] = client
        found = self.state.join(client, f"id {number}", name, Report(state, private, private, private), starting=False)
        assert found.priority == (1 if uid == 0 else 0)
        return number

    @rule(number=workloads, state=states, private=amounts, refusal=st.sampled_from(["", "no"]))
    def report(self, number, state, private, refusal):
        workload = self.state.spoken_for(number)[0]
        self.state.report(workload, Report(state, private, private, private, refusal))
        assert workload.state is state
        if state is WorkloadState.RESIDENT or state in AWAY:
            assert workload.grant is None
        assert all(workload.leaves(device) == 0 for device in DEVICES)  # all of it stays

    @rule(number=workloads, needs=amounts)
    def wait(self, number, needs):
        workload = self.state.spoken_for(number)[0]
        if self.state.wait_of(workload.id) is None:
            self.state.wait(Wait(self.clock(), workload.priority, needs, workload.id))

    @rule(number=workloads)
    def grant(self, number):
        workload = self.state.spoken_for(number)[0]
        wait = self.state.wait_of(workload.id)
        if wait is None:
            return
        before = {device: self.state.granted(device) for device in DEVICES}
        left = {device: self.state.grant_left(workload, device) for device in DEVICES}
        self.state.end_wait(wait)
        self.state.grant(workload, wait.needs)
        for device in DEVICES:
            assert self.state.granted(device) - before[device] == wait.needs.get(device, 0) - left[device]

    @rule(number=workloads, device=st.sampled_from(DEVICES), nbytes=st.integers(1, 300), aborted=st.booleans())
    def publish(self, number, device, nbytes, aborted):
        """Segments use a grant, until their plan is dropped."""
        workload, before = self.state.spoken_for(number)[0], self.state.granted(device)
        had = self.state.grant_left(workload, device)
        self.tokens += 1
        self.state.published(self.clients[number], f"plan {self.tokens}", device, nbytes)
        assert before - self.state.granted(device) == min(had, nbytes)
        if aborted:
            self.state.unpublished(f"plan {self.tokens}")
            assert self.state.granted(device) == before

    @rule(number=consumes(workloads))
    def end(self, number):
        self.state.lost(number)
        assert not self.state.spoken_for(number)
        assert self.state.of(self.clients[number]) is None

    @rule(device=st.sampled_from(DEVICES), free=st.none() | st.integers(0, TOTAL))
    def measure(self, device, free):
        self.accounts.measured(device, free, TOTAL)

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds):
        self.clock.seconds += seconds

    @invariant()
    def names_are_unique(self):
        names = [one.name for one in self.state.all()]
        assert len(names) == len(set(names))

    @invariant()
    def waits_have_owners(self):
        assert {wait.workload for wait in self.state.waits} <= {one.id for one in self.state.all()}

    @invariant()
    def what_is_free_is_what_nobody_has(self):
        for device in DEVICES:
            account = self.accounts.account(device)
            granted = sum(self.state.grant_left(one, device) for one in self.state.all())
            assert account.granted == granted >= 0
            if account.free is None:
                continue
            used = account.private + account.segments + granted
            budget = BUDGET if device == "GPU-1" else TOTAL
            assert account.free <= budget - used - RESERVE
            assert account.free + used + RESERVE <= TOTAL
            assert 0 <= (account.foreign or 0) <= TOTAL


TestHistory = History.TestCase
