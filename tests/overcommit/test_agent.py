"""An agent at a store that a test plays: what it declares, asks for and reports, in which order."""

from __future__ import annotations

import threading

import pytest
from support.holders import STAYS
from support.waiting import wait_until

from shared_store.base.errors import DeclinedError, OutOfMemoryError, TimedOutError
from shared_store.base.workload_settings import WorkloadSettings
from shared_store.base.workload_states import WorkloadState
from shared_store.protocol import messages

from .conftest import NBYTES

LIMIT_S = 10.0


def in_background(function, *args, **kwargs):
    """Call a function in a thread. Returns a function that waits for its result."""
    found = []

    def run():
        try:
            found.append((function(*args, **kwargs), None))
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "it still waits"
        value, error = found[0]
        if error is not None:
            raise error
        return value

    return result


@pytest.fixture
def resident(played, agents):
    """Return a function that makes an agent of a workload that has started."""

    def make(**given):
        agent, holder = agents(**given)
        played.joins(agent.join)
        waits = in_background(agent.take_room, {"cpu": NBYTES}, LIMIT_S)
        played.grant()
        played.reported("returning")
        waits()
        holder.allocate()
        agent.joined_resident()
        played.reported("resident")
        return agent, holder

    return make


@pytest.fixture
def swapped(played, resident):
    """Return a function that makes an agent of a workload that was swapped out."""

    def make(**given):
        agent, holder = resident(**given)
        played.swap_out()
        for state in ("draining", "leaving", "swapped"):
            played.reported(state)
        played.next(messages.Done)
        return agent, holder

    return make


def test_a_start_joins_without_memory_and_takes_it(played, agents):
    agent, holder = agents(settings=WorkloadSettings("chat", 2, None))
    hello, join = played.joins(agent.join, name="chat-2", priority=3)
    assert hello.identity.member_of == join.workload == agent.workload
    assert (hello.identity.name, hello.identity.kind, hello.identity.priority) == ("chat", "vllm", 2)
    assert (join.state, join.starting, join.refusal) == ("swapped", True, "")
    assert join.private == (messages.DeviceBytes("cpu", 0),)
    assert (agent.name, agent.priority, agent.listed) == ("chat-2", 3, True)
    assert not agent.wanted()  # it starts: nothing can return yet
    waits = in_background(agent.take_room, {"cpu": NBYTES}, LIMIT_S)
    wait = played.grant()
    assert (wait.workload, wait.needs) == (agent.workload, (messages.DeviceBytes("cpu", NBYTES),))
    played.reported("returning")
    assert 0 <= waits() < LIMIT_S
    holder.allocate()
    assert agent.state is WorkloadState.RETURNING
    agent.joined_resident()
    report = played.reported("resident")
    assert report.private == (messages.DeviceBytes("cpu", NBYTES + STAYS),)
    assert report.needs == (messages.DeviceBytes("cpu", NBYTES + STAYS),)
    assert report.stays == (messages.DeviceBytes("cpu", STAYS),)
    assert agent.wanted()
    assert agent.state is WorkloadState.RESIDENT


def test_a_swap_frees_the_memory_and_a_request_brings_it_back(played, resident):
    agent, holder = resident()
    played.swap_out(within_s=7.0)
    played.reported("draining")
    played.reported("leaving")
    left = played.reported("swapped")
    assert isinstance(played.next(messages.Done), messages.Done)
    assert (left.private, left.moved, left.steps) == (
        (messages.DeviceBytes("cpu", STAYS),),
        NBYTES,
        (messages.StepTime("copy", 0.1),),
    )
    assert holder.held == 0
    name, active, within_s = holder.calls[0]
    assert (name, active) == ("leave", False)
    assert 0 < within_s <= 7.0
    assert not agent.wanted()
    assert played.grant().needs == (messages.DeviceBytes("cpu", NBYTES),)
    played.reported("returning")
    assert played.reported("resident").private == (messages.DeviceBytes("cpu", NBYTES + STAYS),)
    assert agent.wanted()
    assert holder.intact()


def test_an_active_workload_that_left_with_requests_returns_for_them(played, resident):
    """The engine says so while it leaves."""
    agent, holder = resident()
    holder.busy = True
    holder.stops = {"leaving"}
    played.swap_out(active=True)
    holder.wait_for("leaving")
    assert not agent.wanted()
    holder.go_on("leaving")
    for state in ("draining", "leaving", "swapped"):
        played.reported(state)
    played.next(messages.Done | messages.TakeRoom)
    played.next(messages.Done | messages.TakeRoom)


def test_a_workload_with_requests_declines_and_goes_on(played, resident):
    agent, holder = resident()
    holder.busy = True
    played.swap_out()
    played.reported("draining")
    played.reported("resident")
    answer = played.next(messages.Failed)
    assert (answer.id, answer.code, answer.message) == (1, DeclinedError.code, "it has requests")
    assert agent.wanted()
    assert holder.held == NBYTES


def test_a_mover_that_breaks_declines(played, resident, caplog):
    _, holder = resident()
    holder.leave = lambda **_: 1 / 0
    played.swap_out()
    played.reported("draining")
    played.reported("resident")
    assert "division by zero" in played.next(messages.Failed).message
    assert "could not leave its devices" in caplog.text


@pytest.mark.parametrize("how", ["refusal", "swap", "refuse"])
def test_one_that_must_not_be_swapped_out_declines_untouched(played, resident, how):
    agent, holder = resident(
        **{"refusal": {"refusal": "a reason"}, "swap": {"settings": WorkloadSettings(swap=False)}, "refuse": {}}[how]
    )
    if how == "refuse":
        agent.refuse("a reason")
        assert played.reported("resident").refusal == "a reason"
    played.swap_out()
    answer = played.next(messages.Failed)
    assert answer.message == ("its user does not let it be swapped out" if how == "swap" else "a reason")
    assert not holder.calls
    if how == "refuse":
        agent.refuse("")
        assert played.reported("resident").refusal == ""
        played.swap_out()
        played.reported("draining")


def test_one_that_is_away_is_out_at_once(played, swapped):
    swapped()
    played.peer.send(messages.SwapOut(5, "again"))
    assert played.next(messages.Done).id == 5


def test_the_store_may_bring_it_back(played, swapped):
    agent, holder = swapped()
    played.peer.send(messages.SwapIn(6, "a test"))
    assert played.next(messages.Accepted).id == 6
    played.grant()
    played.reported("returning")
    played.reported("resident")
    assert played.next(messages.Done).id == 6
    assert agent.wanted()
    assert holder.intact()


def test_the_store_may_stop_to_wait_for_that(played, swapped):
    swapped()
    played.peer.send(messages.SwapIn(6, "a test"))
    played.next(messages.Accepted)
    wait = played.next(messages.TakeRoom)
    played.peer.send(messages.Cancel(6))
    assert {type(played.peer.receive()) for _ in range(3)} == {messages.Done, messages.Cancel, messages.ReportWorkload}
    assert wait.id


def test_a_return_without_memory_is_rolled_back_and_tried_again(played, swapped, caplog):
    """Every attempt takes memory anew: the grant ended."""
    agent, holder = swapped()
    holder.failures = [OutOfMemoryError("another process took it"), ZeroDivisionError("a bug")]
    returns = in_background(agent.ensure_resident, LIMIT_S)
    for _ in range(2):
        played.grant()
        played.reported("returning")
        assert played.reported("swapped").private == (messages.DeviceBytes("cpu", STAYS),)
    played.grant()
    played.reported("returning")
    played.reported("resident")
    returns()
    assert holder.intact()
    assert "another process took it" in caplog.text
    assert "a bug" in caplog.text


def test_aborted_requests_end_the_wait_for_memory(played, swapped):
    agent, holder = swapped()
    agent.wanted()
    wait = played.next(messages.TakeRoom)
    agent.unwanted()
    assert played.next(messages.Cancel).id == wait.id
    played.reported("swapped")
    agent.wanted()
    played.peer.send(messages.Failed(wait.id, "cancelled", ""))
    played.grant()
    played.reported("returning")
    played.reported("resident")
    assert holder.intact()


def test_a_grant_that_crosses_the_end_of_the_wait_ends(played, swapped):
    agent, holder = swapped()
    agent.wanted()
    wait = played.next(messages.TakeRoom)
    agent.unwanted()
    played.peer.send(messages.RoomTaken(wait.id))
    message = played.peer.receive()
    if isinstance(message, messages.Cancel):
        message = played.peer.receive()
    assert isinstance(message, messages.ReportWorkload)
    assert message.state == "swapped"
    assert agent.state is WorkloadState.SWAPPED
    assert holder.held == 0


def test_aborted_requests_do_not_end_a_wait_of_others(played, swapped):
    agent, _ = swapped()
    returns = in_background(agent.ensure_resident, LIMIT_S)
    wait = played.next(messages.TakeRoom)
    agent.unwanted()
    assert played.peer.silent(0.1)
    played.peer.send(messages.RoomTaken(wait.id))
    played.reported("returning")
    played.reported("resident")
    returns()


def test_a_start_that_gets_no_memory_says_who_has_it(played, agents):
    agent, _ = agents()
    played.joins(agent.join)
    reasons = []
    waits = in_background(agent.take_room, {"cpu": NBYTES}, 0.5, reasons.append)
    wait = played.next(messages.TakeRoom)
    played.peer.send(messages.Push(1, "room", "chat has 5 GiB"))
    explain = played.next(messages.ExplainWorkload)  # before the wait ends: afterwards nothing waits
    assert explain.name == "engine"
    played.peer.send(messages.Explanation(explain.id, ("chat has 5 GiB", "swap it out")))
    assert played.next(messages.Cancel).id == wait.id
    with pytest.raises(TimedOutError, match=r"no memory was free within 0 s\. chat has 5 GiB; swap it out"):
        waits()
    assert reasons == ["chat has 5 GiB"]
    played.reported("swapped")


def test_a_start_that_is_too_large_fails_at_once(played, agents):
    agent, _ = agents()
    played.joins(agent.join)
    waits = in_background(agent.take_room, {"cpu": NBYTES}, LIMIT_S)
    wait = played.next(messages.TakeRoom)
    played.peer.send(messages.Failed(wait.id, OutOfMemoryError.code, "more than the budget"))
    with pytest.raises(OutOfMemoryError, match="more than the budget"):
        waits()


def test_a_return_in_time_or_a_reason(played, swapped):
    agent, _ = swapped()
    returns = in_background(agent.ensure_resident, 0.2)
    played.next(messages.TakeRoom)
    explain = played.next(messages.ExplainWorkload)
    played.peer.send(messages.Explanation(explain.id, ("chat has it",)))
    with pytest.raises(TimedOutError, match=r"could not return to its devices in time\. chat has it"):
        returns()
    played.next(messages.Cancel)


def test_one_that_sleeps_by_request_stays_away_until_it_is_woken_up(played, resident):
    agent, holder = resident()
    holder._map.madvise(9)  # MADV_REMOVE
    agent.left_by_itself()
    played.reported("draining")
    played.reported("leaving")
    assert played.reported("swapped").private == (messages.DeviceBytes("cpu", STAYS),)
    assert not agent.wanted()
    with pytest.raises(DeclinedError, match="put it to sleep"):
        agent.ensure_resident(1.0)
    played.peer.send(messages.SwapIn(7))
    played.next(messages.Accepted)
    assert played.next(messages.Failed).code == DeclinedError.code
    waits = in_background(agent.take_room, {"cpu": NBYTES}, LIMIT_S)
    played.grant()
    played.reported("returning")
    waits()
    agent.left_by_itself()  # waking up failed
    played.reported("swapped")
    assert agent.asleep
    waits = in_background(agent.take_room, {"cpu": NBYTES}, LIMIT_S)
    played.grant()
    played.reported("returning")
    waits()
    agent.joined_resident()
    played.reported("resident")
    assert agent.wanted()


@pytest.mark.parametrize("step", ["draining", "leaving"])
def test_one_that_falls_asleep_while_it_leaves(played, resident, step):
    agent, holder = resident()
    holder.stops = {step}
    played.swap_out()
    holder.wait_for(step)
    agent.left_by_itself()
    holder.go_on(step)
    for state in ("draining", "leaving", "swapped"):
        played.reported(state)
    assert agent.asleep
    assert not agent.wanted()
    assert played.next(messages.Done).id == 1
    assert played.peer.silent(0.1)


def test_a_workload_that_grows_is_not_swapped_out_meanwhile(played, resident):
    agent, _ = resident()
    waits = in_background(agent.take_room, {"cpu": NBYTES}, LIMIT_S)
    wait = played.next(messages.TakeRoom)
    played.swap_out()
    assert "more memory" in played.next(messages.Failed).message
    played.peer.send(messages.RoomTaken(wait.id))
    waits()
    played.swap_out(number=2)
    assert "more memory" in played.next(messages.Failed).message
    agent.joined_resident()
    played.reported("resident")
    played.swap_out(number=3)
    played.reported("draining")


def test_the_bytes_are_reported_again_when_they_change(played, resident):
    agent, holder = resident()
    holder.nbytes = 2 * NBYTES
    agent.changed()
    assert played.reported("resident").needs == (messages.DeviceBytes("cpu", 2 * NBYTES + STAYS),)


def test_a_request_that_the_store_withdraws_in_time_moves_nothing(played, resident):
    """The agent is busy with a return of bytes; what it has not begun, it does not begin."""
    agent, holder = resident()
    asked, go = threading.Event(), threading.Event()
    bytes_of = holder.holdings

    def holdings():
        asked.set()
        assert go.wait(LIMIT_S)
        return bytes_of()

    holder.holdings = holdings
    agent.changed()
    assert asked.wait(LIMIT_S)
    played.swap_out()
    played.peer.send(messages.Cancel(1))
    assert played.next(messages.Failed).id == 1
    go.set()
    played.reported("resident")
    assert not holder.calls


def test_no_steps_are_made_known_to_a_store_that_lists_no_workloads(played, agents, caplog):
    caplog.set_level("INFO")
    agent, _ = agents()
    joins = in_background(agent.join)
    played.accept(capabilities=())
    joins()
    assert not agent.listed
    assert agent.wanted()
    assert agent.take_room({"cpu": NBYTES}, LIMIT_S) == 0.0
    agent.joined_resident()
    agent.ensure_resident()
    agent.refuse("a reason")
    agent.changed()
    assert played.peer.silent(0.1)
    assert caplog.text.count("does not list workloads") == 1


def test_a_store_that_refuses_changes_nothing(played, agents, caplog):
    agent, _ = agents()
    joins = in_background(agent.join)
    played.accept()
    join = played.next(messages.Join)
    played.peer.send(messages.Failed(join.id, "permission_denied", "not you"))
    joins()
    assert agent.wanted()
    assert "does not list this workload: not you" in caplog.text


def test_the_end_of_an_agent_ends_its_waits(played, swapped):
    agent, _ = swapped()
    returns = in_background(agent.ensure_resident)
    played.next(messages.TakeRoom)
    agent.close()
    with pytest.raises(DeclinedError, match="it ends"):
        returns()
    agent.close()
    wait_until(lambda: not agent._moves._thread.is_alive(), "the agent's thread to end")
