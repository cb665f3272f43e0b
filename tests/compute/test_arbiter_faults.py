"""Workloads and arbiters that are killed, stopped, stuck or hostile: the others go on."""

from __future__ import annotations

import os
import random
import socket
import threading
from statistics import median

import msgspec
import pytest
from support.waiting import wait_until

from shared_store.compute import control, layout
from shared_store.compute.page import make_page, map_page
from shared_store.runtime.fds import OwnedFd


def assert_it_arbitrates(arbiter, gated, first=101):
    """It still holds one workload for another, and lets it go on."""
    low, high = gated(first, 3, of=arbiter, devices=("one",)), gated(first + 1, 0, of=arbiter, devices=("one",))
    high.gate.work(has=True)
    low.held()
    high.gate.work(has=False)
    low.free()


# Workloads.


def test_a_workload_that_is_killed_holds_nobody(arbiter, gated, process):
    low, high = gated(1, 3, of=arbiter), process(2, 0, of=arbiter)
    high.work()
    low.held()
    high.kill()
    low.free()


def test_a_turn_ends_with_its_workload(arbiter, process):
    """Steps of a minute: the turn would not end by itself while the first one is in flight."""
    killed, other = process(1, 1, of=arbiter, share=50.0), process(2, 1, of=arbiter, share=50.0)
    killed.work(step_s=60)
    wait_until(lambda: not other.may_begin(), "the other one to be held", 30)
    other.work()
    killed.kill()
    other.goes_on()


def test_a_stopped_workload_holds_nobody_until_it_goes_on(arbiter, gated, process):
    """SIGSTOP closes no socket."""
    low, high = gated(1, 3, of=arbiter), process(2, 0, of=arbiter)
    high.work()
    low.held()
    high.stop()
    low.free()
    assert arbiter.until(lambda rows: rows[2].stalled)
    high.resume()
    low.held()
    arbiter.until(lambda rows: not rows[2].stalled)


def test_a_stopped_workload_loses_its_turn(arbiter, process):
    stopped, other = process(1, 1, of=arbiter, share=50.0), process(2, 1, of=arbiter, share=50.0)
    for one in (stopped, other):
        one.work()
        one.goes_on()
    stopped.stop()
    other.goes_on(20)
    stopped.resume()
    stopped.goes_on()
    other.goes_on()


def test_a_step_that_does_not_end_holds_others_for_a_moment_only(arbiter, process):
    """A step of 3 s of an equal: the other one waits for `stall_s` of it."""
    slow, other = process(1, 1, of=arbiter, share=50.0), process(2, 1, of=arbiter, share=50.0)
    slow.work(step_s=3, steps=1)
    wait_until(lambda: not other.may_begin(), "the other one to be held", 30)
    other.work()
    other.goes_on(1)
    assert arbiter.until(lambda rows: rows[1].stalled or slow.steps())
    assert slow.done()
    other.goes_on()


def test_a_more_important_workload_does_not_wait_for_a_step_that_does_not_end(arbiter, process):
    slow, high = process(1, 3, of=arbiter), process(2, 0, of=arbiter)
    slow.work(step_s=3)
    wait_until(lambda: arbiter.report()[1].device_s > 0, "the step to be seen", 30)
    high.work(steps=5)
    assert high.done()
    assert high.steps() == 5
    assert slow.steps() <= 1


def test_a_workload_that_forks_is_gone_when_it_is_killed(arbiter, gated, process):
    """Its child has inherited the socket, and goes on."""
    low, high = gated(1, 3, of=arbiter), process(2, 0, of=arbiter)
    child = high.fork()
    high.work()
    low.held()
    high.kill()
    low.free()
    os.kill(child, 9)


def test_a_workload_that_never_reads_delays_nobody(arbiter, gated):
    page, bell = arbiter.add(1, 3)
    with page, bell:
        words = map_page(page.dup())
        words[layout.STATE_WORD] = layout.WORKING
        high = gated(2, 0, of=arbiter)
        for number in range(1, 600):  # rings that fill its socket
            words[layout.HELD_SINCE_WORD] = number
            high.gate.work(has=number % 2 == 1)
        low = gated(3, 3, of=arbiter)
        high.gate.work(has=False)
        low.free()
        high.gate.work(has=True)
        low.held()


def test_a_workload_that_rings_without_pause_delays_nobody(arbiter, gated):
    page, bell = arbiter.add(1, 3)
    over = threading.Event()
    with page, socket.socket(fileno=bell.detach()) as ours:

        def ring():
            while not over.is_set():
                ours.send(b"\0" * 512)

        ringing = threading.Thread(target=ring)
        ringing.start()
        for first in (101, 201, 301):
            assert_it_arbitrates(arbiter, gated, first)
            arbiter.look()
        over.set()
        ours.setblocking(False)
        ringing.join(30)
    arbiter.until(lambda rows: 1 in rows)


@pytest.mark.parametrize("seed", range(3))
def test_garbage_in_a_page_harms_nobody(arbiter, gated, seed):
    source = random.Random(seed)
    page, bell = arbiter.add(1, 2)
    low, high = gated(2, 3, of=arbiter), gated(3, 0, of=arbiter)
    own = range(layout.STATE_WORD, layout.HELD_SINCE_WORD + 1)
    odd = [0, 1, layout.FREE, layout.WORKING, 1 << 62, (1 << 64) - 2]
    with page, socket.socket(fileno=bell.detach()) as ours:
        words = map_page(page.dup())
        for _ in range(100):
            for word in own:
                words[word] = source.choice([*odd, source.getrandbits(64)])
            ours.send(b"\0")
        before = arbiter.rows[1]
        for _ in range(3):
            for word in own:
                words[word] = source.choice([*odd, source.getrandbits(64)])
            arbiter.look()
        row = arbiter.rows[1]
        assert 0 <= row.device_s - before.device_s < 60
        assert 0 <= row.held_s - before.held_s < 60
        assert 0 <= row.used_share <= 1
        assert high.gate.may_begin()
        words[:] = memoryview(b"\xff" * layout.SIZE).cast("Q")  # also the words of the arbiter, and the version
        arbiter.look()
        assert_it_arbitrates(arbiter, gated)
    low.free()  # the hostile one is gone


def test_packets_that_are_none_harm_nobody(arbiter, gated):
    page, bell = arbiter.add(1)
    add = control.encode(control.Add(2, ("cpu",), 0))
    with page, bell, OwnedFd(os.open("/dev/null", os.O_RDWR)) as other:
        arbiter.send_bytes(b"\xc1")
        arbiter.send_bytes(msgspec.msgpack.encode({"type": "later", "number": 7}))
        arbiter.send_bytes(add)
        arbiter.send_bytes(add, page.fileno())
        arbiter.send_bytes(add, page.fileno(), bell.fileno(), other.fileno())
        arbiter.send_bytes(add, other.fileno(), bell.fileno())
        arbiter.send_bytes(add, page.fileno(), other.fileno())
        arbiter.send_bytes(control.encode(control.Change(9, ("cpu",), 0)), other.fileno())
        assert_it_arbitrates(arbiter, gated)
        assert 2 not in arbiter.report()


def test_a_workload_whose_page_is_refused_goes_on_without_turns(arbiter, gated):
    ours, theirs = socket.socketpair()
    with theirs, OwnedFd(os.open("/dev/null", os.O_RDWR)) as other:
        arbiter.send(control.Add(1, ("cpu",), 0), other.fileno(), theirs.fileno())
    workload = gated().attach(make_page(), OwnedFd(ours.detach()))
    assert workload.lost.wait(30)
    assert workload.gate.may_begin()


def test_64_workloads_finish_by_priority_and_share(arbiter, gated):
    """Those of a level go on once those above it have made their last step."""
    first = gated(100, 0, of=arbiter)
    first.gate.work(has=True)  # the others start behind it, so that all have work from the beginning
    made = [gated(number, 1 + number % 3, of=arbiter, share=1.5 * (number % 2)) for number in range(64)]
    for one in made:
        one.held()
        one.work(step_s=0.0005, steps=3)
    arbiter.until(lambda rows: all(rows[number].held for number in range(64)))
    first.gate.work(has=False)
    for one in made:
        one.join()
    assert [one.steps for one in made] == [3] * 64
    assert not any(one.losses for one in made)
    ends = [[made[number].ended for number in range(64) if number % 3 == level] for level in range(3)]
    assert median(ends[0]) < median(ends[1]) < median(ends[2])  # a thread that is late for a second does not count


# Arbiters.


def test_workloads_go_on_without_an_arbiter_that_is_killed_and_obey_the_next_one(start_arbiter, gated, process, caplog):
    first = start_arbiter()
    low, high = gated(1, 3, of=first), process(2, 0, of=first)
    low.work()
    high.work(step_s=0.02)
    low.held()
    first.kill()
    low.goes_on()
    high.goes_on()
    assert low.lost.wait(30)
    assert low.losses == 1
    assert not low.gate.attached
    assert [record.message for record in caplog.records if "arbiter is gone" in record.message] == [
        "The arbiter is gone: it has ended. Steps begin without turns until there is another one."
    ]
    second = start_arbiter()
    low.attach(*second.add(1, 3))
    high.attach(*second.add(2, 0))
    low.held()
    high.goes_on()
    before = low.steps
    high.goes_on()
    assert low.steps <= before + 1
    high.rest()
    low.goes_on()


def test_a_stopped_arbiter_holds_nobody_for_long(arbiter, gated):
    low, high = gated(1, 3, of=arbiter), gated(2, 0, of=arbiter)
    high.gate.work(has=True)
    low.held()
    low.work()
    arbiter.until(lambda rows: rows[1].held)
    arbiter.stop()
    assert low.lost.wait(60)
    low.goes_on()
    assert not high.losses
    arbiter.resume()
    arbiter.look()
    assert high.gate.attached


def test_an_arbiter_that_nobody_hears_goes_on(start_arbiter, gated):
    """The store is stopped: the socket is full of reports."""
    arbiter = start_arbiter(unread=1)
    watched = gated(1, of=arbiter)

    def full():
        before, looked = arbiter.unread(), watched.words[layout.LOOKED_WORD]
        wait_until(
            lambda: watched.words[layout.LOOKED_WORD] > looked + 3 * layout.LOOK_S * 1e9, "the arbiter to look", 30
        )
        return before and arbiter.unread() == before

    wait_until(full, "the socket to be full", 60)
    assert_it_arbitrates(arbiter, gated)
    assert arbiter.until(lambda rows: 101 in rows)  # once it is read again
