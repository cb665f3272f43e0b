"""An agent whose store ends: the next one learns the state, and without one the workload returns by itself."""

from __future__ import annotations

import pytest
from support.holders import STAYS
from support.waiting import wait_until

from shared_store.base.errors import OutOfMemoryError, RequestCancelledError, StoreUnavailableError, TimedOutError
from shared_store.base.workload_states import WorkloadState
from shared_store.overcommit import alone, moves, room
from shared_store.protocol import messages
from shared_store.runtime import device_lock

from .conftest import NBYTES
from .test_agent import LIMIT_S, in_background, resident, swapped

__all__ = ["resident", "swapped"]


pytestmark = pytest.mark.usefixtures("locks")


@pytest.fixture
def impatient(monkeypatch):
    """A workload goes on alone soon."""
    monkeypatch.setattr(room, "ALONE_AFTER_S", 0.3)
    monkeypatch.setattr(moves, "ALONE_EVERY_S", 0.05)


def restart(played, agent):
    """End the store, and start another. Returns the declaration that it gets."""
    joins = agent._record.joins
    played.close()
    played.open()
    hello, join = played.joins()
    assert hello.identity.member_of == join.workload
    wait_until(lambda: agent._record.joins > joins, "the answer to arrive")
    return join


@pytest.mark.parametrize("step", ["draining", "leaving"])
def test_the_next_store_learns_of_one_that_leaves(played, resident, step):
    agent, holder = resident()
    holder.stops = {step}
    played.swap_out()
    holder.wait_for(step)
    join = restart(played, agent)
    assert (join.state, join.starting) == (step, False)
    assert join.private == (messages.DeviceBytes("cpu", NBYTES + STAYS),)
    holder.go_on(step)
    for state in ("leaving", "swapped")[step == "leaving" :]:
        played.reported(state)
    agent.wanted()
    played.grant()
    played.reported("returning")
    played.reported("resident")
    assert holder.intact()


def test_the_next_store_learns_of_one_that_stays(played, resident):
    agent, _ = resident()
    agent.refuse("a reason")
    join = restart(played, agent)
    assert (join.state, join.starting, join.refusal) == ("resident", False, "a reason")
    assert join.needs == (messages.DeviceBytes("cpu", NBYTES + STAYS),)
    assert agent.wanted()
    played.swap_out()
    assert played.next(messages.Failed).message == "a reason"


def test_the_next_store_learns_of_one_that_is_away_and_is_asked_for_memory(played, swapped):
    agent, holder = swapped()
    join = restart(played, agent)
    assert (join.state, join.private) == ("swapped", (messages.DeviceBytes("cpu", STAYS),))
    assert played.peer.silent(0.1)
    agent.wanted()
    played.next(messages.TakeRoom)
    assert restart(played, agent).state == "swapped"
    played.grant()
    played.reported("returning")
    played.reported("resident")
    assert holder.intact()


def test_the_next_store_learns_of_one_that_returns(played, swapped):
    """It counts what the workload still needs: the grant was the lost store's."""
    agent, holder = swapped()
    holder.stops = {"returning"}
    agent.wanted()
    played.grant()
    played.reported("returning")
    holder.wait_for("returning")
    join = restart(played, agent)
    assert join.state == "returning"
    assert join.private == (messages.DeviceBytes("cpu", STAYS),)
    assert join.needs == (messages.DeviceBytes("cpu", NBYTES + STAYS),)
    holder.go_on("returning")
    played.reported("resident")
    assert holder.intact()


def test_the_next_store_learns_of_a_start(played, agents):
    agent, holder = agents()
    played.joins(agent.join)
    waits = in_background(agent.take_room, {"cpu": NBYTES}, LIMIT_S)
    played.next(messages.TakeRoom)
    join = restart(played, agent)
    assert (join.state, join.starting) == ("swapped", True)
    played.grant()
    played.reported("returning")
    waits()
    join = restart(played, agent)
    assert (join.state, join.starting) == ("returning", True)
    assert join.needs == (messages.DeviceBytes("cpu", NBYTES),)
    holder.allocate()
    agent.joined_resident()
    played.reported("resident")
    join = restart(played, agent)
    assert (join.state, join.starting) == ("resident", False)


def test_the_name_stays_when_workloads_join_in_another_order(played, agents):
    agent, _ = agents("chat")
    played.joins(agent.join, name="chat-2")
    played.close()
    played.open()
    _, join = played.joins(name="chat-2")
    assert join.name == "chat-2"


@pytest.mark.usefixtures("impatient")
def test_without_a_store_it_returns_by_itself(played, swapped, caplog):
    agent, holder = swapped()
    played.close()
    agent.wanted()
    agent.ensure_resident(LIMIT_S)
    assert holder.intact()
    assert "returns to its devices by itself: no store has answered" in caplog.text
    played.open()
    _, join = played.joins()
    assert (join.state, join.private) == ("resident", (messages.DeviceBytes("cpu", NBYTES + STAYS),))


@pytest.mark.usefixtures("impatient")
def test_without_work_it_stays_away(played, swapped):
    agent, holder = swapped()
    played.close()
    agent._moves._thread.join(1.0)
    assert (agent.state, holder.held) == (WorkloadState.SWAPPED, 0)


@pytest.mark.usefixtures("impatient")
def test_without_memory_beside_the_reserve_it_says_what_it_waits_for(played, swapped, monkeypatch, caplog):
    monkeypatch.setenv("WOOLY_VRAM_RESERVE", "4096TiB")
    agent, holder = swapped()
    played.close()
    agent.wanted()
    wait_until(lambda: "beside a reserve of" in caplog.text, "a reason")
    assert caplog.text.count("waits to return") == 1
    assert (agent.state, holder.held) == (WorkloadState.SWAPPED, 0)
    monkeypatch.setenv("WOOLY_VRAM_RESERVE", "0")
    agent.ensure_resident(LIMIT_S)
    assert holder.intact()


@pytest.mark.usefixtures("impatient")
def test_only_one_process_at_a_time_returns_by_itself(played, swapped, caplog):
    agent, holder = swapped()
    lock = device_lock.try_lock("cpu", device_lock.RETURNS)
    played.close()
    agent.wanted()
    wait_until(lambda: "another process returns to cpu" in caplog.text, "a reason")
    assert holder.held == 0
    lock.close()
    agent.ensure_resident(LIMIT_S)
    assert holder.intact()


@pytest.mark.usefixtures("impatient")
def test_a_return_by_itself_that_fails_is_tried_again(played, swapped):
    agent, holder = swapped()
    holder.failures = [OutOfMemoryError("full"), StoreUnavailableError("the weights are with the store")]
    played.close()
    agent.ensure_resident(LIMIT_S)
    assert holder.intact()


@pytest.mark.usefixtures("impatient")
def test_a_store_that_comes_back_while_it_waits_alone_is_asked_at_once(played, swapped, monkeypatch, caplog):
    monkeypatch.setenv("WOOLY_VRAM_RESERVE", "4096TiB")
    monkeypatch.setattr(moves, "ALONE_EVERY_S", 3600.0)
    agent, holder = swapped()
    played.close()
    agent.wanted()
    wait_until(lambda: "beside a reserve of" in caplog.text, "a reason")
    played.open()
    _, join = played.joins()
    assert join.state == "swapped"
    played.grant()
    played.reported("returning")
    played.reported("resident")
    assert holder.intact()


@pytest.mark.usefixtures("impatient")
def test_a_store_of_an_earlier_version_is_no_store_for_it(played, swapped):
    agent, holder = swapped()
    played.close()
    played.open()
    played.accept(capabilities=())
    agent.ensure_resident(LIMIT_S)
    assert holder.intact()


@pytest.mark.usefixtures("impatient")
def test_a_start_without_a_store_goes_on(played, agents, caplog):
    agent, holder = agents()
    played.joins(agent.join)
    played.close()
    agent.take_room({"cpu": NBYTES}, LIMIT_S)
    assert "without being granted memory: no store has answered" in caplog.text
    holder.allocate()
    agent.joined_resident()
    played.open()
    _, join = played.joins()
    assert (join.state, join.starting) == ("resident", False)
    assert agent.wanted()


def test_the_time_of_a_start_passes_without_a_store_too(played, agents):
    agent, _ = agents()
    played.joins(agent.join)
    played.close()
    with pytest.raises(TimedOutError, match="no memory was free within 0 s"):
        agent.take_room({"cpu": NBYTES}, 0.1)


def test_the_end_of_an_agent_ends_the_wait_of_a_start(played, agents):
    agent, _ = agents()
    played.joins(agent.join)
    waits = in_background(agent.take_room, {"cpu": NBYTES}, LIMIT_S)
    played.next(messages.TakeRoom)
    agent.close()
    with pytest.raises(RequestCancelledError):
        waits()


def test_unknown_free_memory_is_no_free_memory():
    """On a machine without a GPU, nothing is known of one."""
    with alone.memory({"GPU-00000000-0000-0000-0000-000000000000": 1}) as blocked:
        assert "is unknown" in blocked
