"""Memory of workloads beside that of models: publications, cached models, shared segments, the reserve, others."""

from __future__ import annotations

import time

import pytest
from support.content import key
from support.devices import DEVICE, Device
from support.plain_workload import MIB, InThread, PlainWorkload
from support.served import ServedStore
from support.waiting import wait_until

import shared_store.memory.cuda.vmm
from shared_store.base.errors import OutOfMemoryError, TimedOutError
from shared_store.base.sizes import format_size
from shared_store.memory.fake import FakeBackend
from shared_store.protocol import messages
from shared_store.runtime.device_lock import GRANTS, try_lock
from shared_store.store.residency import publishers

BUDGET = 100  # MiB
MODEL = [[1, 20 * MIB]]
OTHER = [[2, 20 * MIB]]


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    monkeypatch.setattr(shared_store.memory.cuda.vmm, "CudaBackend", Device)


@pytest.fixture
def served(directory):
    """A store whose device is a GPU for it: clients copy from it, and sleepers leave it."""
    options = {"budget": {DEVICE: BUDGET * MIB}, "vram_reserve": 0, "min_resident_s": 0.0}
    with ServedStore(directory, Device(), **options) as served:
        served.call(lambda: served.parts.devices.add(FakeBackend("cpu")))
        yield served


@pytest.fixture
def workload(served):
    """Return a function that makes a workload, which joins."""
    made = []

    def make(name, needs=60, state="swapped", **options):
        one = PlainWorkload(served.paths.directory, name, device=DEVICE, needs=needs, **options)
        made.append(one)
        one.join(state)
        return one

    yield make
    for one in made:
        one.close()


@pytest.fixture
def member(served, monkeypatch):
    """Return a function that makes a client that belongs to a workload; None: to none."""

    def make(workload=None):
        monkeypatch.setenv("WOOLY_MEMBER_OF", "" if workload is None else workload.id)
        found = served.client(device=DEVICE)
        monkeypatch.delenv("WOOLY_MEMBER_OF")
        return found

    return make


def account(served):
    return served.call(lambda: served.parts.state.accounts.account(DEVICE))


def status(served, name):
    found = served.call(lambda: served.parts.statuses.workload_statuses(time.monotonic()))
    return next(one for one in found if one.name == name)


def evicted(served):
    return [kind for kind, _ in served.events].count("evicted")


def test_a_publisher_that_is_no_workload_takes_memory_from_one_that_is_idle(served, workload, member):
    idle = workload("idle", 90)
    idle.enter()
    assert member().publish(key(1), MODEL) == "granted"
    assert len(idle.asked) == 1
    assert account(served).granted == 0
    assert account(served).segments >= 20 * MIB


def test_a_publication_uses_the_grant_of_its_workload(served, workload, member):
    one = workload("one", 60)
    one.take_room(90)
    member(one).publish(key(1), MODEL)
    found = account(served)
    assert found.granted == 90 * MIB - found.segments
    assert found.free == 10 * MIB  # what was not granted
    assert not one.asked


def test_a_publication_that_is_aborted_uses_no_grant(served, workload, member):
    one = workload("one", 60)
    one.take_room(90)
    client = member(one)
    client.open(key(1))
    client.plan(key(1), MODEL)
    assert account(served).granted < 90 * MIB
    client.abandon(key(1))
    assert account(served).granted == 90 * MIB


def test_a_publisher_that_cannot_have_memory_is_told_who_has_it(workload, member, monkeypatch):
    monkeypatch.setattr(publishers, "PUBLISH_WITHIN_S", 0.5)
    workload("precious", 90, swap=False).enter()
    client = member()
    client.open(key(1))
    with pytest.raises(OutOfMemoryError, match=r"precious \(P0\) has 90.0 MiB: not swappable"):
        client.plan(key(1), MODEL)


def test_a_model_that_never_fits_is_refused_at_once(member):
    client = member()
    client.open(key(1))
    with pytest.raises(OutOfMemoryError, match="of a budget of 100 MiB with a reserve of 0 B: raise --budget"):
        client.plan(key(1), [[1, (BUDGET + 1) * MIB]])


def test_models_that_nobody_reads_are_evicted_before_a_workload_leaves(served, workload, member):
    client = member()
    client.publish(key(1), MODEL)
    client.leave(key(1))
    idle = workload("idle", 40)
    idle.enter()
    workload("other", 50).enter()
    assert evicted(served) == 1
    assert not idle.asked


def test_nothing_is_evicted_for_a_request_that_waits_anyway(served, workload, member):
    client = member()
    client.publish(key(1), MODEL)
    client.leave(key(1))
    workload("precious", 60, swap=False).enter()
    waits = workload("other", 50).entering(timeout_s=0.5)
    wait_until(lambda: status(served, "other").blocked_by, "the wait")
    assert evicted(served) == 0
    with pytest.raises(TimedOutError):
        waits.join()


def test_a_workload_returns_with_the_segments_that_left_with_it(served, workload, member):
    """Its request names private bytes alone: the store adds the weights that are not on the device."""
    one = workload("one", 60)
    reader = member(one)
    one.take_room(80)
    reader.publish(key(1), MODEL)
    one.report("resident")
    assert {memory.device: memory.shared for memory in status(served, "one").memory}[DEVICE] >= 20 * MIB
    assert status(served, "one").models == (key(1),)
    one.leave = lambda *_: reader.sleep()
    segments = reader.segments
    other = workload("other", 90, swap=False)
    other.enter()  # more than is free while the weights are there
    assert account(served).segments == 0
    waits = InThread(lambda: one.take_room(10))
    wait_until(lambda: status(served, "one").blocked_by, "the wait: 10 MiB are free, and the weights need 20")
    needed = 10 * MIB + sum(segment.nbytes for segment in segments)
    assert f"waits for {format_size(needed)}" in one.explain().lines[0]
    other.close()
    waits.join()
    assert reader.wake()[1] == 0  # nothing is private
    found = account(served)
    assert found.granted == 10 * MIB


def test_what_two_read_leaves_with_the_second(workload, member):
    """Weights count as freed once no workload maps them: both leave for a request that needs them."""
    first, second = workload("first", 20, priority=1), workload("second", 20, priority=1)
    readers = [member(first), member(second)]
    for one, reader in zip((first, second), readers, strict=True):
        one.enter(40)
        reader.publish(key(1), MODEL)
        one.leave = lambda *_, reader=reader: reader.sleep()
    third = workload("third", 95)
    assert set(third.enter().preempted) == {"first", "second"}


def test_the_reserve_is_kept_free_by_one_that_is_idle(directory):
    """Another process takes memory; nobody waits. What was idle for long enough leaves."""
    backend = Device()
    backend.capacity = BUDGET * MIB
    options = {"vram_reserve": 30 * MIB, "idle_after_s": 0.0}
    with (
        ServedStore(directory, backend, **options) as served,
        PlainWorkload(directory, "idle", device=DEVICE, needs=60, stays=5) as idle,
    ):
        idle.join(starting=True)
        idle.enter()
        own, foreign = backend.create(60 * MIB), backend.create(30 * MIB)
        served.call(served.parts.swapper.wake)
        wait_until(lambda: idle.asked, "the workload to be asked")
        assert "the reserve is used" in idle.asked[0].reason
        for segment in (own, foreign):
            backend.release(segment)


def test_memory_of_other_processes_is_not_granted(directory):
    backend = Device()
    backend.capacity = BUDGET * MIB
    with (
        ServedStore(directory, backend, vram_reserve=0) as served,
        PlainWorkload(directory, "one", device=DEVICE, needs=60) as one,
    ):
        one.join(starting=True)
        foreign = backend.create(50 * MIB)
        waits = one.entering()
        wait_until(lambda: status(served, "one").blocked_by == ("foreign processes",), "the wait")
        assert account(served).foreign == 50 * MIB
        backend.release(foreign)
        waits.join()


def test_a_grant_in_use_is_not_memory_of_others(directory):
    """While a workload allocates what it was granted, the device's free memory falls, and nothing foreign appears."""
    backend = Device()
    backend.capacity = BUDGET * MIB
    with (
        ServedStore(directory, backend, vram_reserve=0) as served,
        PlainWorkload(directory, "one", device=DEVICE, needs=60) as one,
        PlainWorkload(directory, "two", device=DEVICE, needs=40) as two,
    ):
        one.join(starting=True)
        two.join(starting=True)
        one.take_room()
        allocated = backend.create(60 * MIB)
        two.enter()  # 40 MiB are free beside the grant
        assert account(served).foreign == 0
        one.report("resident")
        assert account(served).free == 0
        backend.release(allocated)


def test_another_store_of_the_node_grants_a_gpu(directory):
    """This one says so, starts its workloads at once, and swaps none; it grants the GPU once the other is gone."""
    other = try_lock(DEVICE, GRANTS)
    with ServedStore(directory, Device(), budget={DEVICE: BUDGET * MIB}) as served:
        with PlainWorkload(directory, "one", device=DEVICE, needs=600) as one:
            one.join(starting=True)
            one.enter()
            assert "another store on this node grants its memory" in account(served).refusal
            assert not served.call(lambda: served.parts.state.accounts.open(DEVICE))
            assert any("another store" in line for line in one.explain().lines)
            other.close()
            served.call(served.parts.authority._tried.clear)
            served.call(served.parts.swapper.wake)
            wait_until(lambda: not account(served).refusal, "the store to take the lock")
            assert try_lock(DEVICE, GRANTS) is None
            one.call(messages.MoveWorkload(one.session._next(), "one", out=True))
        refusals = [kind for kind, _ in served.events if kind.startswith("overcommit")]
        assert refusals == ["overcommit_refused", "overcommit_allowed"]
    try_lock(DEVICE, GRANTS).close()  # the store that ended has it no more
