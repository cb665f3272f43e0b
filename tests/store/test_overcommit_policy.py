"""Which workloads leave, and which requests are granted memory: every rule, for any snapshot."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_store.base.workload_states import WorkloadState
from shared_store.store.residency.policy import (
    MIN_RESIDENT_SWAPS,
    TURN_SWAPS,
    DeviceMemory,
    MemoryRequest,
    SegmentView,
    Settings,
    Snapshot,
    WorkloadView,
    decide,
)

NOW = 1000.0
SETTINGS = Settings(idle_after_s=300.0, min_resident_s=2.0, turn_s=5.0)
DEVICES = ("one", "two")
NAMES = ("a", "b", "c", "d", "e")
BYTES = st.fixed_dictionaries({}, optional={device: st.integers(0, 4) for device in DEVICES})
AGES = st.sampled_from([0.0, 0.5, 1.9, 2.0, 3.0, 4.9, 5.0, 8.0, 60.0, 299.0, 300.0, 900.0])
PRIORITIES = st.integers(0, 2)
P0 = st.just(0)
FREE = st.integers(-3, 8)
NOT_USED = st.integers(0, 8)
UP_TO_THREE = st.integers(0, 3)
STATES = st.sampled_from([WorkloadState.RESIDENT] * 5 + list(WorkloadState))


@st.composite
def workloads(draw, names=NAMES, priorities=PRIORITIES):
    made = {}
    for name in names:
        resident = draw(AGES)
        made[name] = WorkloadView(
            name,
            draw(priorities),
            draw(STATES),
            draw(BYTES),
            swappable=draw(st.sampled_from([True] * 5 + [False])),
            running=draw(st.sampled_from([0, 0, 1])),
            waiting=draw(st.sampled_from([0, 0, 0, 2])),
            idle_since=NOW - min(resident, draw(AGES)),
            resident_since=NOW - resident,
            swap_s=draw(st.sampled_from([0.0, 0.0, 0.2, 1.0])),
            taken_at=draw(st.sampled_from([float("-inf"), NOW - 900, NOW - 60, NOW - 10])),
            asked=draw(st.sampled_from([False] * 6 + [True])),
            declined_until=draw(st.sampled_from([float("-inf")] * 6 + [NOW + 1])),
        )
    return made


@st.composite
def requests(draw, number):
    return tuple(
        MemoryRequest(
            f"request {index}",
            draw(st.integers(0, 2)),
            draw(st.fixed_dictionaries({}, optional={device: st.integers(0, 12) for device in DEVICES})),
            draw(st.frozensets(st.integers(0, 2), max_size=1)),
            since=NOW - draw(st.sampled_from([0.0, 1.0, 2.0])),
            start=draw(st.sampled_from([False, False, True])),
        )
        for index in range(draw(number))
    )


@st.composite
def snapshots(draw, number=UP_TO_THREE, priorities=PRIORITIES, free=FREE):
    devices = {device: DeviceMemory(draw(free), draw(st.sampled_from([0, 0, 0, 2]))) for device in DEVICES}
    segments = {
        index: SegmentView(
            draw(st.sampled_from(DEVICES)),
            draw(st.integers(1, 4)),
            draw(st.frozensets(st.sampled_from(NAMES), max_size=3)),
            draw(st.sampled_from([False, False, False, True])),
        )
        for index in range(draw(st.integers(0, 3)))
    }
    return Snapshot(devices, draw(workloads(priorities=priorities)), segments, draw(requests(number)))


ONE = snapshots(number=st.just(1), free=NOT_USED)


@st.composite
def pressed(draw):
    """Equals that became resident a moment ago, and one more for which nothing is free."""
    there = {
        name: replace(
            workload,
            priority=1,
            state=WorkloadState.RESIDENT,
            leaves={"one": draw(st.integers(1, 4))},
            swappable=True,
            resident_since=NOW - draw(st.floats(0, 6)),
            asked=False,
        )
        for name, workload in draw(workloads()).items()
    }
    request = MemoryRequest("new", 1, {"one": draw(st.integers(1, 5))}, since=NOW)
    return Snapshot({"one": DeviceMemory(0)}, there, {}, (request,))


def order(snapshot):
    return sorted(snapshot.requests, key=lambda one: (one.priority, one.since, one.name))


def leaves(workload):
    return workload.asked or workload.state in (WorkloadState.DRAINING, WorkloadState.LEAVING)


def on_their_way(snapshot):
    return {one.name for one in snapshot.workloads.values() if leaves(one)}


def would_do(snapshot, request, gone):
    """Whether a single request fits once some workloads are away."""
    for device, needed in request.needs.items():
        memory = snapshot.devices[device]
        there = memory.free + memory.reclaimable
        there += sum(snapshot.workloads[name].leaves.get(device, 0) for name in gone)
        there += sum(
            segment.nbytes
            for number, segment in snapshot.segments.items()
            if segment.device == device
            and segment.readers
            and segment.readers <= set(gone)
            and not segment.held
            and number not in request.maps
        )
        if needed and there < needed:
            return False
    return True


def eligible(workload, request, now=NOW):
    """The rules of the documentation, in other words than the policy's."""
    if not workload.swappable or workload.state is not WorkloadState.RESIDENT:
        return False
    if workload.asked or workload.declined_until > now or workload.name == request.name:
        return False
    stayed = now - workload.resident_since
    if request.priority < workload.priority:
        return True
    if workload.running == workload.waiting == 0:
        if request.priority == workload.priority == 0:
            return True
        return stayed >= max(SETTINGS.min_resident_s, MIN_RESIDENT_SWAPS * workload.swap_s)
    if request.priority != workload.priority or workload.priority == 0:
        return False
    return stayed >= max(SETTINGS.turn_s, TURN_SWAPS * workload.swap_s)


def victims_of(decision, request):
    return [one.name for one in decision.victims if one.for_request == request.name]


@given(snapshots())
def test_every_request_is_granted_in_full_or_waits_with_a_reason(snapshot):
    """Grants fit together beside each other, whatever else was asked for."""
    decision = decide(snapshot, SETTINGS, NOW)
    granted = [one.name for one in decision.grants]
    waits = [one.name for one in decision.waits]
    assert sorted(granted + waits) == sorted(one.name for one in snapshot.requests)
    by_name = {one.name: one for one in snapshot.requests}
    for device, memory in snapshot.devices.items():
        needed = sum(by_name[name].needs.get(device, 0) for name in granted)
        assert not needed or needed <= memory.free + memory.reclaimable
        reclaimed = sum(one.reclaim.get(device, 0) for one in decision.grants)
        assert needed <= max(0, memory.free) + reclaimed
        assert reclaimed <= memory.reclaimable
    assert all(one.text for one in decision.waits)


@given(snapshots())
def test_only_those_that_may_be_taken_from_leave(snapshot):
    """Not what may not be swapped, leaves already, declined a moment ago, or is protected by its work."""
    decision = decide(snapshot, SETTINGS, NOW)
    by_name = {one.name: one for one in snapshot.requests}
    chosen = [one.name for one in decision.victims]
    assert len(set(chosen)) == len(chosen)
    for victim in decision.victims:
        workload = snapshot.workloads[victim.name]
        if victim.for_request:
            assert eligible(workload, by_name[victim.for_request])
            assert victim.active or workload.running == workload.waiting == 0
        else:
            assert workload.swappable
            assert workload.state is WorkloadState.RESIDENT
            assert not workload.asked
            assert workload.running == workload.waiting == 0
            assert NOW - workload.idle_since >= SETTINGS.idle_after_s
            assert any(snapshot.devices[device].free < 0 for device in workload.leaves)
            assert not victim.active


@given(ONE)
def test_nobody_waits_while_enough_may_be_taken(snapshot):
    """Either workloads leave that suffice, with those on their way, or all that may leave would not do."""
    (request,) = snapshot.requests
    decision = decide(snapshot, SETTINGS, NOW)
    chosen = victims_of(decision, request)
    way = on_their_way(snapshot)
    if would_do(snapshot, request, ()):
        assert decision.grants
        assert not chosen
    elif would_do(snapshot, request, way):
        assert not decision.grants
        assert not chosen
    elif chosen:
        assert not decision.grants
        assert would_do(snapshot, request, {*way, *chosen})
    else:
        may = {one.name for one in snapshot.workloads.values() if eligible(one, request)}
        assert not decision.grants
        assert not would_do(snapshot, request, way | may)


@given(ONE)
def test_no_proper_subset_of_the_victims_would_do(snapshot):
    (request,) = snapshot.requests
    chosen = victims_of(decide(snapshot, SETTINGS, NOW), request)
    way = on_their_way(snapshot)
    for number in range(len(chosen)):
        for fewer in itertools.combinations(chosen, number):
            assert not would_do(snapshot, request, way | set(fewer))


@given(ONE)
def test_no_p0_leaves_while_the_others_would_do(snapshot):
    (request,) = snapshot.requests
    chosen = victims_of(decide(snapshot, SETTINGS, NOW), request)
    if any(snapshot.workloads[name].priority == 0 for name in chosen):
        others = {one.name for one in snapshot.workloads.values() if one.priority and eligible(one, request)}
        assert not would_do(snapshot, request, on_their_way(snapshot) | others)
        assert all(
            snapshot.workloads[name].running == snapshot.workloads[name].waiting == 0
            or snapshot.workloads[name].priority
            for name in chosen
        )


@given(snapshots(number=st.integers(1, 2), priorities=P0))
def test_a_p0_with_work_never_leaves(snapshot):
    for victim in decide(snapshot, SETTINGS, NOW).victims:
        workload = snapshot.workloads[victim.name]
        assert workload.running == workload.waiting == 0


@given(ONE)
def test_no_victim_was_taken_from_later_than_a_comparable_workload_that_would_do(snapshot):
    """Comparable: of equal priority if busy, else idle for times of the same magnitude."""
    (request,) = snapshot.requests
    chosen = victims_of(decide(snapshot, SETTINGS, NOW), request)
    way = on_their_way(snapshot)

    def busy(one):
        return bool(one.running or one.waiting)

    for name in chosen:
        victim = snapshot.workloads[name]
        for other in snapshot.workloads.values():
            if other.name in chosen or not eligible(other, request) or (not other.priority) != (not victim.priority):
                continue
            same_work = busy(other) == busy(victim) and (not busy(victim) or other.priority == victim.priority)
            if (
                same_work
                and (busy(victim) or other.idle_since == victim.idle_since)
                and other.taken_at < victim.taken_at
            ):
                assert not would_do(snapshot, request, way | (set(chosen) - {name}) | {other.name})


@given(snapshots(number=st.integers(1, 3)))
def test_later_requests_change_nothing_for_earlier_ones(snapshot):
    """Neither memory nor victims: a request is decided as if those behind it were not there."""
    whole = decide(snapshot, SETTINGS, NOW)
    first = order(snapshot)[:-1]
    names = {one.name for one in first}
    fewer = decide(replace(snapshot, requests=tuple(first)), SETTINGS, NOW)
    assert [one for one in whole.grants if one.name in names] == list(fewer.grants)
    for request in first:
        assert victims_of(whole, request) == victims_of(fewer, request)


@given(snapshots(number=st.integers(2, 3)))
def test_a_start_never_passes_a_request_for_the_same_device(snapshot):
    decision = decide(snapshot, SETTINGS, NOW)
    granted = {one.name for one in decision.grants}
    served = granted | {one.for_request for one in decision.victims}
    queue = order(snapshot)
    for index, late in enumerate(queue):
        if not late.start or late.name not in served:
            continue
        for early in queue[:index]:
            if early.name not in granted and any(early.needs[d] and late.needs.get(d) for d in early.needs):
                fits = would_do(snapshot, early, on_their_way(snapshot) | {one.name for one in decision.victims})
                later = decision.wake_at is not None or any(
                    one.state is WorkloadState.RETURNING for one in snapshot.workloads.values()
                )
                assert fits or later


@given(snapshots(number=st.just(0), free=NOT_USED))
def test_without_demand_nothing_leaves(snapshot):
    decision = decide(snapshot, SETTINGS, NOW)
    assert not decision.victims
    assert decision.wake_at is None


@given(pressed())
def test_waking_up_brings_victims_and_not_too_late(snapshot):
    """At ``wake_at`` enough may leave, and at no time before, if nothing else happens."""
    (request,) = snapshot.requests
    decision = decide(snapshot, SETTINGS, NOW)
    if decision.victims:
        assert decision.wake_at is None
        return
    assert decision.wake_at > NOW
    assert victims_of(decide(snapshot, SETTINGS, decision.wake_at), request)
    before = decision.wake_at - 1e-6
    assert not victims_of(decide(snapshot, SETTINGS, before), request)


@given(ONE)
def test_a_waiting_workload_is_told_the_names(snapshot):
    """Everything that has memory of the devices that are short is named, and nothing that has none."""
    (request,) = snapshot.requests
    for wait in decide(snapshot, SETTINGS, NOW).waits:
        memory = {
            one.name
            for one in snapshot.workloads.values()
            if any(one.leaves.get(device) for device in request.needs)
            or any(one.name in segment.readers for segment in snapshot.segments.values())
        }
        assert set(wait.blocked_by) <= memory
        assert all(name in wait.text for name in wait.blocked_by[:8])


def resident(name, priority=1, *, nbytes=4, device="one", idle=None, stayed=100.0, **more):
    return WorkloadView(
        name,
        priority,
        WorkloadState.RESIDENT,
        {device: nbytes},
        running=0 if idle is not None else 1,
        idle_since=NOW - (idle or 0.0),
        resident_since=NOW - stayed,
        **more,
    )


def node(*there, needs=4, priority=1, free=0, segments=None, maps=frozenset()):
    return Snapshot(
        {"one": DeviceMemory(free)},
        {one.name: one for one in there},
        segments or {},
        (MemoryRequest("new", priority, {"one": needs}, maps, since=NOW - 1),),
    )


def chosen(snapshot, now=NOW):
    return [one.name for one in decide(snapshot, SETTINGS, now).victims]


def test_the_longest_idle_leaves_first():
    assert chosen(node(resident("short", idle=3), resident("long", idle=90))) == ["long"]


def test_of_comparable_workloads_the_one_taken_from_longest_ago_leaves():
    """Two that were idle for the same time, one of which had to leave before."""
    there = resident("again", idle=400, taken_at=NOW - 450), resident("never", idle=390)
    assert chosen(node(*there)) == ["never"]


def test_idle_workloads_leave_before_busy_ones_and_those_of_lowest_priority_before_others():
    idle, low, lower = resident("idle", 1, idle=5), resident("low", 3), resident("lower", 4)
    assert chosen(node(idle, low, lower, priority=0)) == ["idle"]
    assert chosen(node(low, lower, priority=0)) == ["lower"]


def test_engines_of_one_model_leave_together_if_that_frees_their_weights():
    """Two that read one model free 12 bytes; three with models of others would have to leave for as much."""
    there = [resident(name, idle=idle) for name, idle in (("x", 200), ("y", 190), ("z", 180), ("m", 150), ("n", 140))]
    segments = {1: SegmentView("one", 4, frozenset({"m", "n"}))}
    assert chosen(node(*there, needs=12, segments=segments)) == ["m", "n"]
    assert len(chosen(node(*there, needs=12))) == 3


def test_weights_that_the_request_maps_itself_are_not_counted_as_freed():
    segments = {1: SegmentView("one", 4, frozenset({"m"}))}
    assert chosen(node(resident("m", idle=50), needs=8, segments=segments)) == ["m"]
    assert chosen(node(resident("m", idle=50), needs=8, segments=segments, maps=frozenset({1}))) == []


def test_between_p0_only_work_counts():
    """No least residence, no turn, no idle time."""
    assert chosen(node(resident("just", 0, idle=0.01, stayed=0.02), priority=0)) == ["just"]
    assert chosen(node(resident("busy", 0, stayed=900.0), priority=0)) == []
    assert chosen(node(resident("just", 0, idle=0.01, stayed=0.02), priority=1)) == []
    assert chosen(node(resident("idle", 0, idle=3.0, stayed=3.0), priority=1)) == ["idle"]


def test_equals_take_turns_and_costly_swaps_make_them_longer():
    assert chosen(node(resident("busy", stayed=4.9))) == []
    assert chosen(node(resident("busy", stayed=5.0))) == ["busy"]
    assert chosen(node(resident("busy", stayed=9.0, swap_s=1.0))) == []
    assert chosen(node(resident("busy", stayed=10.0, swap_s=1.0))) == ["busy"]
    assert chosen(node(resident("idle", idle=3.0, stayed=3.0, swap_s=1.0))) == []


def test_used_reserve_is_restored_by_long_idle_workloads_alone():
    there = resident("old", idle=301), resident("young", idle=200)
    snapshot = Snapshot({"one": DeviceMemory(-3)}, {one.name: one for one in there})
    assert chosen(snapshot) == ["old"]
    first = Snapshot({"one": DeviceMemory(-3, reclaimable=5)}, snapshot.workloads)
    assert chosen(first) == []
    assert decide(first, SETTINGS, NOW).reclaim == {"one": 3}


def test_a_request_that_time_serves_keeps_its_place():
    """Of 6 free bytes, 4 are kept for the first, which needs 12 with the busy one's 8."""
    busy = resident("busy", nbytes=8, stayed=4.0)
    first, late = MemoryRequest("first", 1, {"one": 12}, since=1), MemoryRequest("late", 1, {"one": 3}, since=2)
    snapshot = Snapshot({"one": DeviceMemory(6)}, {"busy": busy}, {}, (late, first))
    decision = decide(snapshot, SETTINGS, NOW)
    assert not decision.grants
    assert decision.wake_at == pytest.approx(NOW + 1.0)
    assert {one.name: one.blocked_by for one in decision.waits}["late"][0] == "first"


def test_a_request_that_only_an_end_of_work_serves_is_passed_but_by_no_start():
    busy = resident("busy", 0, nbytes=8)
    first, late = MemoryRequest("first", 1, {"one": 12}, since=1), MemoryRequest("late", 1, {"one": 3}, since=2)
    snapshot = Snapshot({"one": DeviceMemory(6)}, {"busy": busy}, {}, (first, late))
    assert [one.name for one in decide(snapshot, SETTINGS, NOW).grants] == ["late"]
    started = replace(snapshot, requests=(first, replace(late, start=True)))
    assert not decide(started, SETTINGS, NOW).grants


def test_a_request_keeps_its_place_until_a_workload_is_back_but_not_until_one_has_started():
    """A return takes a moment, a start a minute."""
    comes = replace(resident("comes", nbytes=8), state=WorkloadState.RETURNING)
    first, late = MemoryRequest("first", 1, {"one": 12}, since=1), MemoryRequest("late", 1, {"one": 3}, since=2)
    snapshot = Snapshot({"one": DeviceMemory(6)}, {"comes": comes}, {}, (first, late))
    assert not decide(snapshot, SETTINGS, NOW).grants
    starts = replace(snapshot, workloads={"comes": replace(comes, starting=True)})
    assert [one.name for one in decide(starts, SETTINGS, NOW).grants] == ["late"]


def test_text_says_what_is_missing_who_has_it_and_what_would_help():
    fixed = resident("fixed", 3, idle=400, swappable=False, refusal="KV connector")
    snapshot = Snapshot(
        {"one": DeviceMemory(1, budget=20, reserve=4, foreign=3)},
        {"fixed": fixed, "busy": resident("busy", 0)},
        {},
        (MemoryRequest("new", 1, {"one": 17}),),
    )
    (wait,) = decide(snapshot, SETTINGS, NOW).waits
    assert wait.blocked_by == ("busy", "fixed", "foreign processes")
    assert "17 B needed on one, 16 B missing" in wait.text
    assert "busy (P0) has 4 B: busy" in wait.text
    assert "fixed (P3) has 4 B: not swappable (KV connector)" in wait.text
    assert "never fits" in wait.text
