"""Real workloads at a real store, killed in every state: processes that hold memory, and take turns to have it."""

from __future__ import annotations

import os
import signal
import time

import pytest
from support.stores import KeptStore
from support.waiting import wait_until

from shared_store.client.session import Session

MIB = 1 << 20
NBYTES = 4 * MIB
BUDGET = NBYTES * 3 // 2
"""Bytes of a workload, and of all that are resident at a time: one is."""

SETTINGS = {
    "budget": {"cpu": BUDGET},
    "vram_reserve": 0,
    "idle_after_s": 300.0,
    "min_resident_s": 0.0,
    "turn_s": 0.0,
}


pytestmark = pytest.mark.usefixtures("locks")


@pytest.fixture
def settings():
    return SETTINGS


@pytest.fixture
def nbytes():
    return NBYTES


def states(directory):
    """State of each workload in the store's list, by name."""
    with Session.connect(directory, name="test", autostart=False) as session:
        return {one.name: one.state for one in session.status().workloads}


def wait_for_states(directory, **expected):
    wait_until(lambda: states(directory) == expected, f"the store to list {expected}", 30.0)


def test_workloads_take_turns_in_memory_for_one(stores, workloads, directory):
    stores()
    first, second = workloads("first"), workloads("second")
    assert (first.state(), first.held()) == ("swapped", 0)
    wait_for_states(directory, first="swapped", second="resident")
    for _ in range(3):
        assert first.use()
        assert (second.state(), second.held()) == ("swapped", 0)
        assert second.use()
        assert (first.state(), first.held()) == ("swapped", 0)
    wait_for_states(directory, first="swapped", second="resident")


def reach(state, workloads):
    """Bring a workload to a state, with another one beside it. Returns both."""
    if state == "starting":
        other = workloads("other")
        doomed = workloads("doomed", start=False)
        other.set(busy=True, refusal="it is busy")
        doomed.begin("start")
        return doomed, other
    doomed = workloads("doomed")
    if state == "resident":
        return doomed, workloads("other", start=False)
    if state in {"draining", "leaving"}:
        doomed.set(stop=state)
        other = workloads("other", start=False)
        other.begin("start")
        doomed.at(step=state)
        return doomed, other
    other = workloads("other")
    if state == "waiting":
        other.set(busy=True, refusal="it is busy")
        doomed.wanted()
    elif state == "returning":
        doomed.set(stop="returning")
        doomed.wanted()
        doomed.at(step="returning")
    return doomed, other


STATES = ("starting", "resident", "draining", "leaving", "swapped", "waiting", "returning")


@pytest.mark.parametrize("state", STATES)
def test_a_workload_that_is_killed_frees_what_it_had_and_waited_for(stores, workloads, directory, state):
    """The other one gets the memory, whatever it was used for, and nothing is left of the dead one."""
    stores()
    doomed, other = reach(state, workloads)
    doomed.kill()
    if state in {"draining", "leaving"}:
        other.finish()
    elif state == "resident":
        other.start()
    elif state == "returning":
        assert other.use()
    other.set(busy=False, refusal="")
    wait_for_states(directory, other="resident")  # the dead one is not listed
    third = workloads("third")
    wait_for_states(directory, other="swapped", third="resident")
    assert other.use()
    assert third.state() == "swapped"


@pytest.mark.parametrize("state", STATES)
def test_a_store_that_is_killed_learns_of_all_workloads_again(stores, workloads, directory, state):
    """Moves end without it. The next store knows the states, and workloads take turns as before."""
    kept = stores(KeptStore)
    one, other = reach(state, workloads)
    kept.kill_store()
    if state in {"draining", "leaving", "returning"}:
        one.go_on(step=state)
    if state in {"starting", "waiting"}:
        other.set(busy=False, refusal="")
    if state == "starting":
        one.finish()
        wait_for_states(directory, doomed="resident", other="swapped")
    elif state in {"draining", "leaving"}:
        other.finish()
        wait_for_states(directory, doomed="swapped", other="resident")
    elif state == "resident":
        wait_for_states(directory, doomed="resident", other="swapped")
        other.start()
    elif state == "swapped":
        wait_for_states(directory, doomed="swapped", other="resident")
    else:
        assert one.use()
        wait_for_states(directory, doomed="resident", other="swapped")
    assert one.use()
    assert (other.state(), other.held()) == ("swapped", 0)
    assert other.use()
    assert (one.state(), one.held()) == ("swapped", 0)


def test_one_that_declines_is_passed_over(stores, workloads, directory):
    stores(budget={"cpu": 2 * NBYTES + NBYTES // 2})
    busy, _ = workloads("busy"), workloads("idle")
    busy.set(refusal="it will not")
    third = workloads("third")
    wait_for_states(directory, busy="resident", idle="swapped", third="resident")
    assert busy.intact()
    assert third.intact()


def test_one_that_does_not_answer_is_passed_over_in_the_end(stores, workloads, directory):
    """It is the longest idle, so that it is asked first. It goes on when it answers again."""
    stores(budget={"cpu": 2 * NBYTES + NBYTES // 2})
    silent, idle = workloads("silent"), workloads("idle")
    silent.stop()
    workloads("third")
    wait_for_states(directory, silent="resident", idle="swapped", third="resident")
    silent.resume()
    assert silent.use()
    assert idle.use()


def test_memory_that_cannot_be_had_is_tried_for_again(stores, workloads, directory):
    """The request stays queued, and the store sees both: the grant, and its end."""
    store = stores()
    first, _ = workloads("first"), workloads("second")
    first.fail(times=3)
    assert first.use()
    wait_for_states(directory, first="resident", second="swapped")
    assert store.log().count("first: returning -> swapped") == 3
    assert first.leaves() == ["leave", *4 * ["come back"]]


def test_a_request_that_is_aborted_while_it_waits_moves_nobody(stores, workloads, directory):
    stores()
    first, second = workloads("first"), workloads("second")
    second.set(refusal="it will not")
    first.wanted()
    wait_until(lambda: "second did not leave" in "".join((directory / "test.log").read_text()), "the refusal")
    first.unwanted()
    second.set(refusal="")
    third = workloads("third")  # takes the memory, so that every request before was carried out
    assert (second.state(), third.state()) == ("swapped", "resident")
    assert first.leaves() == ["leave"]
    assert second.leaves()[-1] == "leave"
    wait_for_states(directory, first="swapped", second="swapped", third="resident")


def test_one_that_sleeps_by_request_gives_its_memory_to_others(stores, workloads, directory):
    stores()
    first = workloads("first")
    first.sleep()
    second = workloads("second")
    assert not first.wanted()
    assert second.use()
    wait_for_states(directory, first="swapped", second="resident")


def test_without_a_store_one_returns_by_itself_after_10_s(stores, workloads, directory):
    """Both are resident then: only the machine's memory counts."""
    kept = stores(KeptStore)
    first, second = workloads("first"), workloads("second")
    kept.kill_both()
    began = time.monotonic()
    assert first.use()
    assert time.monotonic() - began >= 10.0
    assert second.intact()
    assert first.held() == second.held() == NBYTES
    stores()
    wait_for_states(directory, first="resident", second="resident")


def test_a_store_that_stops_and_goes_on(stores, workloads, directory):
    """Nothing is lost and nobody returns by itself: the store still has the accounts."""
    store = stores()
    first, second = workloads("first", alone_after_s=0.2), workloads("second", alone_after_s=0.2)
    os.kill(store.pid, signal.SIGSTOP)
    first.begin("use")
    second.begin("use")
    assert second.finish()
    assert first.idle()
    os.kill(store.pid, signal.SIGCONT)
    assert first.finish()
    wait_for_states(directory, first="resident", second="swapped")
