"""Workloads compute in turn, at real stores with real arbiters: priorities, shares, faults, and workloads alone."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from support.plain_workload import PlainWorkload
from support.stepping import Stepping
from support.stores import KeptStore
from support.users import NOBODY, needs_root, wooly_as
from support.waiting import process_state, wait_until

from shared_store.base.errors import (
    ConfigError,
    ExclusiveError,
    PermissionDeniedError,
    UnsupportedError,
    WorkloadNotFoundError,
)
from shared_store.protocol import messages

WITHIN_S = 40.0
"""Seconds for what takes milliseconds on a machine that is not busy."""


@pytest.fixture
def arbitrating(start_store, directory):
    """A store with an arbiter, without a catalog."""
    return start_store(redis_url=f"unix://{directory}/away")


@pytest.fixture
def kept(directory):
    """A store with a keeper and an arbiter."""
    running = KeptStore(directory, redis_url=f"unix://{directory}/away").start()
    yield running
    running.clean_up()


@pytest.fixture
def stepping(directory):
    """Return a function that makes a workload, which joins the store and its arbiter; all leave after the test."""
    made = []

    def make(name, **options):
        made.append(Stepping(directory, name, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def arbiter(store):
    return store.client().session.status().arbiter


def computes(store, name):
    """Return what a workload computes, as the status has it."""
    return next(one.compute for one in store.client().session.status().workloads if one.name == name)


def wait_for(condition, what):
    return wait_until(condition, what, WITHIN_S)


def wait_for_steps(workload, number=3):
    """Wait until a workload made some steps more."""
    enough = workload.steps + number
    wait_for(lambda: workload.steps >= enough, f"{workload.name} to make {number} steps")


def wait_until_held(store, name):
    wait_for(lambda: computes(store, name).held, f"{name} to be held")


def test_the_arbiter_is_started_when_a_workload_needs_it(arbitrating, stepping):
    assert (arbiter(arbitrating).state, arbiter(arbitrating).pid) == ("idle", 0)
    one = stepping("one")
    wait_for(lambda: arbiter(arbitrating).state == "ok", "the arbiter to run")
    assert arbiter(arbitrating).pid in arbitrating.children()
    with one.working():
        wait_for(lambda: computes(arbitrating, "one").device_s > 0.1, "the device time to be counted")
        wait_for(lambda: computes(arbitrating, "one").used_share > 0.1, "the used share to be measured")
    found = computes(arbitrating, "one")
    assert (found.gated, found.ungated, found.held, found.held_s) == (True, "", False, 0.0)


def test_a_more_important_workload_holds_others_while_it_works(arbitrating, stepping):
    low, high = stepping("low", priority=3), stepping("high")
    with low.working():
        wait_for_steps(low)
        with high.working():
            wait_until_held(arbitrating, "low")
            before = low.steps
            wait_for_steps(high, 20)
            assert low.steps - before <= 1  # the one that was in flight when it was counted
            assert not computes(arbitrating, "high").held
        wait_for_steps(low)
    assert computes(arbitrating, "low").held_s > 0


def test_another_priority_acts_on_a_running_workload(arbitrating, stepping):
    low, high = stepping("low", priority=3), stepping("high")
    with low.working(), high.working():
        wait_until_held(arbitrating, "low")
        with low.session() as session:
            session.workloads.set_priority("low", 0)
        wait_for_steps(low)
        with low.session() as session:
            session.workloads.set_priority("high", 4)
        wait_until_held(arbitrating, "high")
        wait_for_steps(low)


def test_a_share_acts_on_running_workloads(arbitrating, stepping):
    """Without shares two equals compute at the same time; with a share they take turns, and so never overlap."""
    one, two = stepping("one"), stepping("two", share=50)
    with one.session() as session, one.working(), two.working():
        session.workloads.set_share("one", 90)
        session.workloads.set_share("two", 10)
        assert [computes(arbitrating, name).share for name in ("one", "two")] == [90, 10]
        wait_for(lambda: computes(arbitrating, "two").held_s > 0.5, "the one with the small share to wait")
        wait_for_steps(two)
        session.workloads.set_share("one", 0)
        session.workloads.set_share("two", 0)
        wait_for(lambda: not computes(arbitrating, "two").held, "both to run as they like")
        wait_for_steps(two, 10)
        for percent in (-1, 0.5, 101):
            with pytest.raises(ConfigError, match="1 to 100"):
                session.workloads.set_share("one", percent)
        with pytest.raises(WorkloadNotFoundError, match="there are: one, two"):
            session.workloads.set_share("three", 10)


@needs_root
def test_another_user_may_not_set_a_share(start_store, directory, stepping):
    store = start_store(redis_url=f"unix://{directory}/away", allow_uids=[NOBODY])
    stepping("one")
    done = wooly_as("share", "one", "50", uid=NOBODY)
    assert done.returncode == PermissionDeniedError.exit_code
    assert f"uid {NOBODY} may not set the share of one, a workload of uid 0" in done.stderr
    assert computes(store, "one").share == 0


def test_a_workload_that_must_not_be_held_is_not(arbitrating, stepping):
    """Others are held for it all the same."""
    low = stepping("low", priority=3, ungated="its ranks wait for each other")
    lower, high = stepping("lower", priority=4), stepping("high")
    with low.working(), high.working(), lower.working():
        wait_until_held(arbitrating, "lower")
        wait_for_steps(high, 10)
        wait_for_steps(low, 10)
    found = computes(arbitrating, "low")
    assert (found.gated, found.ungated, found.held_s) == (False, "its ranks wait for each other", 0.0)


def test_a_workload_that_joins_no_arbiter_is_shown_without_turns(arbitrating, directory):
    with PlainWorkload(directory, "plain", device="cpu") as plain:
        plain.join("resident")
        found = computes(arbitrating, "plain")
        assert (found.gated, found.ungated) == (False, "it has not joined the arbiter")


def test_one_that_leaves_while_others_wait_for_it_lets_them_go_on(arbitrating, stepping):
    low, high = stepping("low", priority=3), stepping("high")
    with low.working():
        with high.working():
            wait_until_held(arbitrating, "low")
            high.close()
            wait_for_steps(low)
        assert [one.name for one in arbitrating.client().session.status().workloads] == ["low"]


def test_a_killed_arbiter_is_replaced_and_obeyed(arbitrating, stepping):
    """Steps are free without it. What was used before counts on."""
    low, high = stepping("low", priority=3), stepping("high")
    with low.working(), high.working():
        wait_until_held(arbitrating, "low")
        wait_for(lambda: computes(arbitrating, "high").device_s > 0.5, "the device time to be counted")
        before, pid = computes(arbitrating, "high").device_s, arbiter(arbitrating).pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: arbiter(arbitrating).restarts == 1, "another arbiter")
        wait_for(lambda: low.attached and high.attached, "the workloads to join it")
        wait_until_held(arbitrating, "low")
        assert computes(arbitrating, "high").device_s >= before
        assert arbiter(arbitrating).pid != pid
        assert process_state(pid) == ""  # its parent waited for it
    assert "the arbiter is lost: it ended" in arbitrating.log()


def test_a_stopped_arbiter_is_killed_and_replaced(arbitrating, stepping):
    low, high = stepping("low", priority=3), stepping("high")
    with low.working(), high.working():
        wait_until_held(arbitrating, "low")
        os.kill(arbiter(arbitrating).pid, signal.SIGSTOP)
        wait_for_steps(low)
        wait_for(lambda: arbiter(arbitrating).restarts == 1, "another arbiter")
        wait_until_held(arbitrating, "low")
    assert "it reported nothing for" in arbitrating.log()


def test_a_killed_store_is_replaced_with_its_arbiter(kept, stepping):
    low, high = stepping("low", priority=3), stepping("high")
    with low.working(), high.working():
        wait_until_held(kept, "low")
        pid = arbiter(kept).pid
        kept.kill_store()
        wait_for(lambda: process_state(pid) in {"", "Z"}, "the arbiter of the killed store to end")
        wait_for(lambda: arbiter(kept).pid not in {0, pid}, "the arbiter of the next store")
        wait_for(lambda: low.attached and high.attached, "the workloads to join it")
        wait_until_held(kept, "low")
        wait_for_steps(high)
    assert computes(kept, "low").gated


def test_what_was_set_is_kept_when_the_store_is_replaced(kept, stepping):
    one = stepping("one", priority=1)
    with one.session() as session:
        session.workloads.set_priority("one", 2)
        session.workloads.set_share("one", 25)
    kept.kill_store()

    def settings():
        return [(found.priority, found.compute.share) for found in kept.status().workloads]

    wait_for(settings, "it to join again")
    assert settings() == [(2, 25)]


def test_an_upgraded_store_has_another_arbiter(kept, stepping):
    """Of the store that it replaces, none is left."""
    low, high = stepping("low", priority=3), stepping("high")
    with low.working(), high.working():
        wait_until_held(kept, "low")
        pid = arbiter(kept).pid
        python = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
        with low.session() as session:
            session.upgrade_store(sys.executable, python)
        wait_for(lambda: arbiter(kept).pid not in {0, pid}, "the arbiter of the next store")
        wait_for(lambda: process_state(pid) in {"", "Z"}, "the arbiter of the store before to end")
        wait_for(lambda: low.attached and high.attached, "the workloads to join it")
        wait_until_held(kept, "low")
        wait_for_steps(high)


def test_an_arbiter_ends_with_its_store(arbitrating, stepping):
    one = stepping("one")
    wait_for(lambda: arbiter(arbitrating).pid, "the arbiter to run")
    pid = arbiter(arbitrating).pid
    arbitrating.stop()
    assert process_state(pid) in {"", "Z"}
    wait_for(lambda: not one.attached, "the workload to notice")
    with one.working():
        wait_for_steps(one)


def test_a_store_without_an_arbiter(start_store, directory, stepping):
    """Its status has no columns of compute, shares are refused, and steps are free."""
    store = start_store(arbiter=False, redis_url=f"unix://{directory}/away")
    low, high = stepping("low", priority=3), stepping("high")
    with low.working(), high.working():
        wait_for_steps(low)
        wait_for_steps(high)
    assert not low.attached
    assert computes(store, "low") is None
    assert arbiter(store) is None
    assert not store.children()
    with low.session() as session:
        assert not session.supports(messages.COMPUTE)
        with pytest.raises(UnsupportedError, match="--no-arbiter"):
            session.workloads.set_share("low", 50)


def test_only_the_workloads_own_client_joins_the_arbiter(arbitrating, directory, stepping):
    one = stepping("one")
    with PlainWorkload(directory, "other") as other, pytest.raises(WorkloadNotFoundError):
        other.call(messages.JoinCompute(other.session._next(), one.id), messages.ComputeJoined)
    assert computes(arbitrating, "one").gated


class TestAlone:
    """`GPU_MODE=Exclusive`."""

    def test_it_is_refused_beside_others(self, arbitrating, stepping):
        stepping("first")
        stepping("second")
        with pytest.raises(ExclusiveError, match=r"alone asks for cpu alone .* is used by: first, second\. Stop these"):
            stepping("alone", exclusive=True)
        assert {one.name for one in arbitrating.client().session.status().workloads} == {"first", "second"}

    def test_others_are_refused_beside_it(self, arbitrating, stepping):
        alone = stepping("alone", exclusive=True)
        assert computes(arbitrating, "alone").exclusive
        for exclusive in (False, True):
            with pytest.raises(ExclusiveError, match="other may not use cpu: alone has it alone"):
                stepping("other", exclusive=exclusive)
        alone.close()
        wait_for(lambda: not arbitrating.client().session.status().workloads, "it to leave")
        stepping("other")

    def test_it_stays_alone_when_the_store_is_replaced(self, kept, stepping):
        alone = stepping("alone", exclusive=True)
        kept.kill_store()
        wait_for(lambda: [one.name for one in kept.status().workloads] == ["alone"], "it to join again")
        with pytest.raises(ExclusiveError):
            stepping("other")
        with alone.working():
            wait_for_steps(alone)

    @pytest.mark.usefixtures("arbitrating")
    def test_a_start_that_was_faster_than_its_return_gets_no_memory(self, directory):
        """After a restart of the store, one that starts may join before one that has the device for itself."""
        with (
            PlainWorkload(directory, "starts", device="cpu") as starts,
            PlainWorkload(directory, "runs", device="cpu", exclusive=True) as runs,
        ):
            starts.join(starting=True)
            runs.join("resident")
            with pytest.raises(ExclusiveError):
                starts.take_room(1)
