"""The arbiter's process: whose steps may begin, and what it counts."""

from __future__ import annotations

import socket
from time import monotonic_ns

import pytest
from support.clocks import Clock
from support.descriptors import no_leak_in
from support.waiting import wait_until

from shared_store.compute import control
from shared_store.compute.arbiter.peer import Peer
from shared_store.compute.page import make_page, map_page
from shared_store.compute.snapshot import Kind, Permit
from shared_store.runtime.fds import OwnedFd

GPUS = ("cuda:GPU-1", "cuda:GPU-2")


def test_a_less_important_workload_is_held_while_a_more_important_one_has_work(arbiter, gated):
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    low.free()
    high.gate.work(has=True)
    low.held()
    assert high.gate.may_begin()
    high.gate.work(has=False)
    low.free()


def test_a_held_workload_is_told_when_its_steps_may_begin(arbiter, gated):
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    high.gate.work(has=True)
    low.held()
    low.gate.work(has=True)
    low.gate.hold()
    arbiter.until(lambda rows: rows[1].held)
    low.changed.clear()
    high.gate.work(has=False)
    assert low.changed.wait(30)
    assert low.gate.may_begin()


def test_a_hold_that_is_said_too_late_is_answered(arbiter, gated):
    """The workload found that it was held, and said so when that was over already."""
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    for _ in range(10):
        high.gate.work(has=True)
        low.held()
        high.gate.work(has=False)
        wait_until(low.gate.may_begin, "the arbiter to free the workload", 30)
        low.changed.clear()
        low.gate.hold()
        assert low.changed.wait(30)
        low.gate.begin()
        low.gate.end()


def test_a_workload_that_is_held_again_before_it_looked_is_told_again(arbiter, gated):
    """It waits all the time, and says so once: between two looks of its loop its steps might have begun."""
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    high.gate.work(has=True)
    low.held()
    low.gate.work(has=True)
    low.gate.hold()
    for _ in range(5):
        arbiter.look()
        low.changed.clear()
        high.gate.work(has=False)
        assert low.changed.wait(30)
        high.gate.work(has=True)
        low.held()
        low.gate.hold()


def test_a_permit_for_one_step_is_given_again_after_another_permit():
    """The decision repeats it while the step has not begun, whatever it allowed in between."""
    ours, theirs = socket.socketpair()
    with ours, make_page() as page, map_page(page.dup()) as words:
        peer = Peer(control.Add(1, ("cpu",), 1), page.dup(), OwnedFd(theirs.detach()), monotonic_ns())
        for between in (Kind.FREE, Kind.TURN):
            for permit in (Permit(Kind.ONE_STEP, 5.0), Permit(between, 1.0), Permit(Kind.ONE_STEP, 5.0)):
                peer.allow(permit)
            assert peer.may_begin(monotonic_ns())
            peer.allow(Permit(Kind.HELD))
            words[2] += 1  # the step began
            assert not peer.may_begin(monotonic_ns())
            peer.allow(Permit(Kind.FREE))
        peer.close()


def test_workloads_without_a_device_in_common_do_not_hold_each_other(arbiter, gated):
    low, high = gated(1, 3, of=arbiter, devices=GPUS[:1]), gated(2, 0, of=arbiter, devices=GPUS[1:])
    both = gated(3, 4, of=arbiter, devices=GPUS)
    high.gate.work(has=True)
    both.held()
    assert low.gate.may_begin()


def test_an_ungated_workload_is_never_held_and_counts_for_the_others(arbiter, gated):
    high, ungated, low = gated(1, 0, of=arbiter), gated(2, 2, of=arbiter, gated=False), gated(3, 3, of=arbiter)
    high.gate.work(has=True)
    low.held()
    assert ungated.gate.may_begin()
    ungated.gate.work(has=True)
    high.gate.work(has=False)
    arbiter.look()
    assert not low.gate.may_begin()
    assert high.gate.may_begin()


def test_equals_without_shares_run_as_they_like(arbiter, gated):
    first, second = gated(1, 1, of=arbiter), gated(2, 1, of=arbiter)
    for one in (first, second):
        one.gate.work(has=True)
        one.gate.begin()
    arbiter.look()
    assert first.gate.may_begin()
    assert second.gate.may_begin()


def test_one_of_two_equals_with_shares_computes_at_a_time(arbiter, process):
    first, second = process(1, 1, of=arbiter, share=75.0), process(2, 1, of=arbiter, share=25.0)
    for one in (first, second):
        one.work(step_s=0.004)
    arbiter.until(lambda rows: rows[1].device_s + rows[2].device_s > 2)
    for one in (first, second):
        one.rest()
    used = arbiter.rows
    assert 0.55 < used[1].device_s / (used[1].device_s + used[2].device_s) < 0.92
    mine, other = first.times(), second.times()
    overlaps = sum(begun < end and ended > began for begun, ended in mine for began, end in other)
    assert overlaps < (len(mine) + len(other)) / 2  # on a busy machine a process is late between its look and its step


def test_a_changed_priority_acts_on_a_running_workload(arbiter, gated):
    low, high = gated(1, 3, of=arbiter), gated(2, 1, of=arbiter)
    high.gate.work(has=True)
    low.held()
    arbiter.send(control.Change(1, ("cpu",), 0))
    low.free()
    low.gate.work(has=True)
    high.held()


def test_a_workload_that_comes_to_use_another_device_is_held_there(arbiter, gated):
    low, high = gated(1, 3, of=arbiter, devices=GPUS[:1]), gated(2, 0, of=arbiter, devices=GPUS[1:])
    high.gate.work(has=True)
    arbiter.look()
    assert low.gate.may_begin()
    arbiter.send(control.Change(1, GPUS, 3))
    low.held()
    assert high.words[18]


def test_a_changed_share_acts_on_running_workloads(arbiter, gated):
    first, second = gated(1, 1, of=arbiter), gated(2, 1, of=arbiter)
    for one in (first, second):
        one.gate.work(has=True)
        one.gate.begin()
    arbiter.look()
    assert first.gate.may_begin()
    assert second.gate.may_begin()
    arbiter.send(control.Change(1, ("cpu",), 1, 50.0))
    wait_until(lambda: not (first.gate.may_begin() and second.gate.may_begin()), "one of them to be held", 30)


def test_a_held_workload_makes_a_step_after_the_longest_hold(start_arbiter, gated):
    arbiter = start_arbiter(max_hold_s=0.2)
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    high.gate.work(has=True)
    high.gate.begin()
    low.held()
    high.work(step_s=0.02)
    low.work(step_s=0.001)
    low.goes_on(3)
    assert arbiter.until(lambda rows: rows[1].held_s > 0.5)
    low.finish()
    high.finish()


def test_steps_of_a_workload_should_be_short_beside_a_more_important_one(arbiter, gated):
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    assert not low.gate.short
    high.gate.work(has=True)
    wait_until(lambda: low.gate.short, "steps to be short", 30)
    assert not high.gate.short
    high.gate.work(has=False)
    wait_until(lambda: not low.gate.short, "steps to be long again", 30)


def test_a_workload_alone_is_not_asked_to_ring(arbiter, gated):
    alone = gated(1, 3, of=arbiter)
    arbiter.look()
    assert not alone.words[18]
    other = gated(2, 3, of=arbiter)
    wait_until(lambda: alone.words[18], "the workload to be told of the other one", 30)
    other.gate.close()
    wait_until(lambda: not alone.words[18], "the workload to be told that it is alone", 30)


def test_a_workload_that_is_dropped_goes_on_without_an_arbiter(arbiter, gated):
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    high.gate.work(has=True)
    low.held()
    arbiter.send(control.Drop(1))
    assert low.lost.wait(30)
    assert low.gate.may_begin()
    arbiter.send(control.Drop(17))  # it never knew it
    arbiter.until(lambda rows: 2 in rows)


def test_a_workload_that_joins_anew_replaces_itself(arbiter, gated):
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    high.gate.work(has=True)
    low.held()
    low.attach(*arbiter.add(1, 3))
    low.held()
    high.gate.work(has=False)
    low.free()


# What it counts.


def test_device_time_is_that_with_a_step_in_flight(arbiter, gated):
    alone = gated(1, of=arbiter)
    alone.work(step_s=0.02)
    row = arbiter.until(lambda rows: rows[1].device_s > 1)[1]
    assert row.estimated_s == 0
    assert 0.3 < row.used_share <= 1
    alone.finish()
    used = arbiter.report()[1].device_s
    arbiter.look()
    arbiter.look()
    assert arbiter.rows[1].device_s <= used + 0.1


def test_where_steps_overlap_the_time_is_divided_and_estimated(arbiter, gated):
    both = gated(1, 1, of=arbiter), gated(2, 1, of=arbiter)
    began = 0.0
    for one in both:
        one.gate.work(has=True)
        one.gate.begin()
    arbiter.look()
    began = sum(row.device_s for row in arbiter.rows.values())
    for _ in range(3):
        arbiter.look()
    rows = arbiter.rows
    assert rows[1].estimated_s > 0
    assert rows[2].estimated_s > 0
    assert abs((rows[1].device_s + rows[2].device_s - began) - 1.5) < 1.4  # of one device, not of two
    assert max(rows[1].used_share, rows[2].used_share) <= 0.9


def test_what_a_dead_workload_used_is_reported_until_it_is_dropped(arbiter, gated):
    alone = gated(1, of=arbiter)
    alone.gate.begin()
    used = arbiter.until(lambda rows: 1 in rows and rows[1].device_s > 0.5)[1].device_s
    alone.gate.close()
    arbiter.look()
    assert arbiter.rows[1].device_s >= used
    arbiter.send(control.Drop(1))
    arbiter.rows.clear()
    arbiter.look()
    arbiter.look()
    assert 1 not in arbiter.rows


def test_held_time_is_that_of_waiting_for_a_step(arbiter, gated):
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    high.work(step_s=0.02)
    low.held()
    low.gate.work(has=True)
    low.gate.hold()
    row = arbiter.until(lambda rows: rows[1].held_s > 0.6)[1]
    assert row.held
    high.finish()
    low.free()
    low.gate.begin()
    arbiter.look()
    arbiter.look()
    assert not arbiter.rows[1].held


# As a process.


def test_it_ends_with_its_store(arbiter, gated):
    workload = gated(1, of=arbiter)
    arbiter.look()
    assert arbiter.leave() == 0
    assert workload.lost.wait(30)
    assert workload.gate.may_begin()


def test_it_keeps_nothing_of_workloads_that_are_gone(arbiter, gated):
    arbiter.look()
    with no_leak_in(arbiter.pid):
        for number in range(8):
            workload = gated(number, of=arbiter)
            workload.gate.work(has=True)
            if number % 2:
                arbiter.send(control.Drop(number))
            else:
                workload.gate.close()


@pytest.mark.parametrize("shift_s", [86_400, -86_400])
def test_the_wall_clock_does_not_matter(start_arbiter, gated, tmp_path, shift_s):
    clock = Clock(tmp_path)
    arbiter = start_arbiter(env=clock.environment)
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    high.work(step_s=0.02)
    low.held()
    clock.shift(shift_s)
    arbiter.look()
    arbiter.look()
    assert not low.gate.may_begin()
    high.finish()
    low.free()
