"""Workloads take memory from each other, over real sockets: grants, swaps, refusals and deadlines, waits and names."""

from __future__ import annotations

import os
import threading
import time

import pytest
from support.plain_workload import MIB, InThread, PlainWorkload
from support.served import ServedStore
from support.waiting import wait_until

from shared_store.base.errors import (
    DeclinedError,
    OutOfMemoryError,
    ProtocolError,
    TimedOutError,
    WorkloadNotFoundError,
)
from shared_store.memory.fake import FakeBackend
from shared_store.protocol import messages

BUDGET = 1000  # MiB; half of it is what a workload of these tests needs


@pytest.fixture
def served(directory, request):
    options = {
        **getattr(request, "param", {}),
        "budget": {"fake": BUDGET * MIB},
        "vram_reserve": 0,
        "min_resident_s": 0.0,
        "turn_s": 0.2,
    }
    with ServedStore(directory, FakeBackend("fake"), **options) as served:
        yield served


@pytest.fixture
def workload(served):
    """Return a function that makes a workload, which joins."""
    made = []

    def make(name, needs=600, *, state="swapped", starting=False, refusal="", **options):
        one = PlainWorkload(served.paths.directory, name, needs=needs, **options)
        made.append(one)
        one.join(state, starting=starting, refusal=refusal)
        return one

    yield make
    for one in made:
        one.close()


def account(served):
    return served.call(lambda: served.parts.state.accounts.account("fake"))


def statuses(served):
    found = served.call(lambda: served.parts.statuses.workload_statuses(time.monotonic()))
    return {status.name: status for status in found}


def state_of(served, name):
    return statuses(served)[name].state


def test_memory_that_is_free_is_granted_at_once(served, workload):
    one = workload("a", starting=True)
    assert one.take_room().preempted == ()
    assert account(served).granted == 600 * MIB
    assert state_of(served, "a") == "returning"
    one.report("resident")
    assert (account(served).granted, account(served).private) == (0, 600 * MIB)
    assert not statuses(served)["a"].starting


def test_one_that_is_idle_leaves_for_one_that_waits(served, workload):
    first, second = workload("first", priority=1), workload("second", priority=1)
    first.enter()
    assert second.enter().preempted == ("first",)
    assert len(first.asked) == 1
    found = statuses(served)
    assert (found["first"].state, found["second"].state) == ("swapped", "resident")
    assert found["first"].swaps == 1
    kinds = [kind for kind, _ in served.events if kind.startswith(("swap", "workload", "memory"))]
    assert kinds[-5:] == ["memory_waits", "swap_asked", "workload_swapped_out", "memory_granted", "workload_returned"]


def test_nobody_has_more_than_the_devices_physical_memory(served, workload):
    """Whatever it reports, when it joins and later: the account of the device stays one of memory that exists."""
    total = served.backend.total_bytes()
    beyond = (1 << 50) // MIB
    one = workload("one", beyond, state="resident", stays=beyond)
    assert account(served).private == statuses(served)["one"].memory[0].private == total
    one.report("resident", 100)
    assert account(served).private == 100 * MIB
    one.report("resident")
    assert account(served).private == total


def test_nothing_leaves_while_memory_is_free(workload):
    first, second = workload("first", 400), workload("second", 400)
    first.enter()
    second.enter()
    assert not first.asked


def test_a_grant_counts_until_it_is_used(served, workload):
    """Memory that was granted is granted to nobody else, and its holder is not asked to leave."""
    first, second = workload("first"), workload("second")
    first.take_room()
    waits = second.entering()
    wait_until(lambda: statuses(served)["second"].blocked_by == ("first",), "the second to be blocked by the first")
    first.report("resident")
    waits.join()
    assert len(first.asked) == 1


def test_a_wait_says_what_it_is_for(served, workload):
    holder = workload("holder", refusal="it is precious")
    holder.enter()
    one = workload("one", 700)
    pending = one.entering()
    wait_until(lambda: statuses(served)["one"].blocked_by, "the wait to be blocked")
    assert statuses(served)["one"].blocked_by == ("holder",)
    told = one.explain()
    assert told.blocked_by == ("holder",)
    text = "\n".join(told.lines)
    assert "one (vllm, P0) is swapped and waits for 700 MiB on fake to return" in text
    assert "not swappable (it is precious)" in text
    assert "400 MiB free of 1000 MiB" in text
    holder.close()
    pending.join()
    assert statuses(served)["one"].starved_s > 0


@pytest.mark.parametrize("served", [{"start_timeout_s": 0.3}], indirect=True)
def test_a_start_waits_for_a_limited_time_and_says_what_for(served, workload):
    """A return waits for as long as it takes."""
    holder = workload("holder", swap=False)
    holder.enter()
    starting, returning = workload("one", starting=True), workload("two")
    waits = returning.entering()
    with pytest.raises(OutOfMemoryError, match=r"no memory was free within 0 s, .*holder"):
        starting.take_room()
    assert statuses(served)["one"].waits_s == 0
    assert waits.waits
    holder.close()
    waits.join()


def test_one_that_may_not_be_swapped_is_never_asked(served, workload):
    holder = workload("holder", swap=False, priority=4)
    holder.enter()
    one = workload("one")
    waits = one.entering(timeout_s=1.0)
    with pytest.raises(TimedOutError):
        waits.join()
    assert not holder.asked
    assert statuses(served)["holder"].refusal == "WOOLYAI_SWAP_FROM_VRAM=0"
    assert account(served).granted == 0


def test_one_that_declines_is_counted_and_the_next_one_leaves(served, workload):
    stubborn, other = workload("stubborn", 400, priority=2), workload("other", 400, priority=2)
    stubborn.enter()
    other.enter()

    def decline(*_):
        raise DeclinedError("a request arrived")

    stubborn.leave = decline
    assert workload("third").enter().preempted == ("other",)
    assert statuses(served)["stubborn"].refusals == len(stubborn.asked) == 1
    assert ("swap_refused", {"name": "stubborn", "code": "declined", "reason": "a request arrived"}) in served.events


def test_one_that_does_not_answer_is_spared_and_the_next_one_leaves(served, workload):
    hung, other = workload("hung", 400, priority=2), workload("other", 400, priority=2)
    hung.enter()
    other.enter()
    served.parts.departing.drain_within_s = 0.3
    go = threading.Event()
    cancelled = []

    def hang(_, call):
        cancelled.append(call.cancelled.wait(10))
        go.wait(10)
        raise DeclinedError("too late")

    hung.leave = hang
    assert workload("third").enter().preempted == ("other",)
    assert cancelled == [True]  # the request was withdrawn
    assert statuses(served)["hung"].refusals == 1
    go.set()


def test_a_client_without_a_handler_is_not_swappable_from_then_on(served, workload):
    mute = workload("mute", 400)
    mute.session._connection.handlers._handlers.clear()
    mute.enter()
    other = workload("other", 400)
    other.enter()
    assert workload("third").enter().preempted == ("other",)
    assert not statuses(served)["mute"].swappable


def test_one_that_is_killed_frees_what_it_had(served, workload):
    first = workload("first", refusal="stays")
    first.enter()
    second = workload("second")
    waits = second.entering()
    wait_until(lambda: statuses(served)["second"].blocked_by, "the wait")
    first.close()
    waits.join()
    assert account(served).private == 600 * MIB


def test_one_that_is_killed_with_a_grant_frees_it(served, workload):
    first, second = workload("first"), workload("second")
    first.take_room()
    waits = second.entering()
    wait_until(lambda: statuses(served)["second"].blocked_by, "the wait")
    first.close()
    waits.join()
    assert set(statuses(served)) == {"second"}


def test_a_victim_that_is_killed_while_it_leaves_frees_what_it_had(served, workload):
    victim, second = workload("victim", priority=1), workload("second")
    victim.enter()
    victim.leave = lambda *_: victim.close()
    second.enter()
    assert set(statuses(served)) == {"second"}


def test_a_client_that_goes_while_it_waits_leaves_nothing_behind(served, workload):
    first, second = workload("first", refusal="stays"), workload("second")
    first.enter()
    second.entering()
    wait_until(lambda: statuses(served)["second"].blocked_by, "the wait")
    second.close()
    wait_until(lambda: not served.call(lambda: served.parts.state.workloads.waits), "the end of the wait")
    assert set(statuses(served)) == {"first"}


def test_a_wait_that_is_cancelled_is_no_grant(served, workload):
    first, second = workload("first", refusal="stays"), workload("second")
    first.enter()
    with pytest.raises(TimedOutError):
        second.enter(timeout_s=0.3)
    wait_until(lambda: not served.call(lambda: served.parts.state.workloads.waits), "the end of the wait")
    assert state_of(served, "second") == "swapped"


def test_a_return_that_fails_gives_its_grant_back(served, workload):
    first, second = workload("first"), workload("second")
    first.take_room()
    first.report("swapped")
    assert account(served).granted == 0
    assert ("workload_rolled_back", {"name": "first"}) in served.events
    second.enter()
    assert not first.asked


def test_a_device_is_granted_with_all_others_or_not_at_all(directory):
    """Two that need both devices never hold one each."""
    backends = FakeBackend("fake")
    options = {"budget": {"fake": BUDGET * MIB, "cpu": BUDGET * MIB}, "vram_reserve": 0}
    with ServedStore(directory, backends, **options) as served:
        served.call(lambda: served.parts.devices.add(FakeBackend("cpu")))
        both = {"fake": 600, "cpu": 600}
        with PlainWorkload(directory, "a") as a, PlainWorkload(directory, "b") as b:
            for one in (a, b):
                one.needs, one.stays = both, 0
                one.join(private=0, refusal="stays")
            a.take_room(both)
            waits = InThread(lambda: b.take_room(both))
            wait_until(lambda: statuses(served)["b"].blocked_by, "the wait")
            granted = served.call(
                lambda: {device: served.parts.state.workloads.granted(device) for device in ("fake", "cpu")}
            )
            assert granted == {"fake": 600 * MIB, "cpu": 600 * MIB}
            a.close()
            waits.join()


def test_the_reserve_stays_free(directory):
    options = {"budget": {"fake": BUDGET * MIB}, "vram_reserve": 100 * MIB}
    with ServedStore(directory, FakeBackend("fake"), **options) as served:
        with PlainWorkload(directory, "a", needs=901) as one:
            one.join(starting=True)
            with pytest.raises(TimedOutError):
                one.take_room(timeout_s=0.3)
            one.take_room(900)
        wait_until(lambda: account(served).granted == 0, "the end of the grant")


def test_names_are_unique(workload):
    assert [workload("chat").name for _ in range(3)] == ["chat", "chat-2", "chat-3"]


def test_a_name_that_a_store_before_gave_is_given_again(served):
    with PlainWorkload(served.paths.directory, "chat") as one, PlainWorkload(served.paths.directory, "chat") as other:
        assert one.join(name="chat-2") == ("chat-2", 0)
        assert other.join() == ("chat", 0)
        assert other.join() == ("chat", 0)  # again, over the same connection


def test_a_priority_may_be_capped(directory):
    with (
        ServedStore(directory, FakeBackend("fake"), max_priority={os.getuid(): 2}),
        PlainWorkload(directory, "a", priority=0) as one,
        PlainWorkload(directory, "b", priority=3) as other,
    ):
        assert (one.join()[1], other.join()[1]) == (2, 3)


def test_a_command_sets_a_priority(served, workload):
    one = workload("one", priority=3)
    one.call(messages.SetPriority(one.session._next(), "one", 1))
    assert statuses(served)["one"].priority == 1


def test_a_command_swaps_out_and_in(served, workload):
    one, operator = workload("one"), workload("operator", 0)
    one.enter()
    operator.call(messages.MoveWorkload(operator.session._next(), "one", out=True))
    assert state_of(served, "one") == "swapped"
    assert one.asked[0].active
    operator.call(messages.MoveWorkload(operator.session._next(), "one", out=False))
    assert state_of(served, "one") == "resident"


def test_a_command_does_not_swap_out_what_may_not_be(workload):
    one = workload("one", swap=False)
    one.enter()
    with pytest.raises(DeclinedError, match="one is not swappable: WOOLYAI_SWAP_FROM_VRAM=0"):
        one.call(messages.MoveWorkload(one.session._next(), "one", out=True))


def test_an_unknown_name_lists_the_names(workload):
    one = workload("one")
    with pytest.raises(WorkloadNotFoundError, match="no workload 'two'; there are: one"):
        one.explain("two")


def test_only_the_speaker_reports(served, workload):
    one = workload("one")
    with PlainWorkload(served.paths.directory, "other") as other:
        other.id = one.id
        with pytest.raises(WorkloadNotFoundError):
            other.report("resident")
        with pytest.raises(ProtocolError):
            other.join()


def test_a_workload_that_is_forgotten_by_nobody_joins_again_with_its_state(directory):
    """A store that begins learns the states from the workloads."""
    for state, private in (("resident", 600), ("swapped", 0), ("returning", 300)):
        with (
            ServedStore(directory, FakeBackend("fake"), budget={"fake": BUDGET * MIB}) as served,
            PlainWorkload(directory, "a", needs=600) as one,
        ):
            one.join(state, private)
            assert state_of(served, "a") == state
            assert account(served).private == private * MIB


def test_an_unknown_state_is_refused(workload):
    one = workload("one")
    with pytest.raises(ProtocolError):
        one.report("asleep")
