"""What decisions make of some seconds of simulated steps: who waits for how long, and who computes how much."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compute_world import BELL_S, Work, World

from shared_store.compute.decision import Kind, Settings

DECODE_S, PREFILL_S = 0.00173, 0.0227
STEPS = st.sampled_from([DECODE_S, 0.005, 0.012, PREFILL_S])
SLACK_S = 0.005
"""Bells, switches, and a look that comes late."""


def always(seconds):
    return lambda _: seconds


def work(number, seconds, priority=2, devices=("gpu",), share=0.0, **more):
    return Work(number, priority, devices, always(seconds), share=share, **more)


def bursts(seed, step_s, on_s, off_s):
    """Work that comes and goes."""
    chance = random.Random(seed)
    state = {"until": chance.expovariate(1 / on_s)}

    def step(now):
        if now < state["until"]:
            return step_s
        state["until"] = 0.0
        return None

    def again(now):
        state["until"] = now + chance.expovariate(1 / on_s)
        return now + chance.expovariate(1 / off_s)

    return step, again


def test_p0_never_waits_and_others_make_no_step_meanwhile():
    world = World([work(1, DECODE_S, priority=0), work(2, PREFILL_S, priority=3), work(3, 0.005, priority=4)])
    world.run(5.0)
    first, second, third = (world.works[number] for number in (1, 2, 3))
    assert first.held_s == 0
    assert first.held_since is None
    assert len(second.steps) <= 1
    assert len(third.steps) <= 1
    assert first.computed_s > 4.9


def test_held_workloads_go_on_when_the_important_one_has_no_more_work():
    step, again = bursts(1, DECODE_S, 0.2, 0.2)
    world = World([Work(1, 0, ("gpu",), step), work(2, PREFILL_S, priority=3)])

    def arrive():
        at = again(world.now)
        world.wake(1)
        world.at(at, arrive)

    world.at(0.1, arrive)
    world.run(20.0)
    first, second = world.works[1], world.works[2]
    assert first.held_s == 0
    assert second.computed_s > 0.25 * 20
    assert sum(device.busy_s for device in world.devices.values()) > 0.98 * 20


@given(
    st.lists(st.tuples(st.integers(5, 60), STEPS), min_size=2, max_size=5),
    st.sampled_from([0.02, 0.03, 0.05]),
)
@settings(max_examples=15)
def test_shares_converge_to_their_weights(parts, quantum_s):
    works = [work(number, step_s, share=share) for number, (share, step_s) in enumerate(parts)]
    world = World(works, Settings(quantum_s=quantum_s))
    world.run(10.0)
    before = {one.number: one.computed_s for one in works}
    assert sum(before.values()) > 9.8
    world.run(20.0)
    whole = sum(share for share, _ in parts)
    for one, (share, _) in zip(works, parts, strict=True):
        assert abs((one.computed_s - before[one.number]) / 10 - share / whole) < 0.02


@given(st.lists(STEPS, min_size=2, max_size=8))
@settings(max_examples=15)
def test_waits_among_equals_are_bounded(steps):
    share = 100 / len(steps)
    worst = {"wait": 0.0}

    def check(snapshot, decision, now):
        for member in snapshot.members:
            if member.held_since is not None and decision.permits[member.number].kind is Kind.HELD:
                worst["wait"] = max(worst["wait"], now - member.held_since)

    quantum_s = Settings().quantum_s
    world = World([work(number, step_s, share=share) for number, step_s in enumerate(steps)], check=check)
    world.run(10.0)
    longest = quantum_s + max(steps)
    assert worst["wait"] <= 2 * (len(steps) - 1) * (longest + SLACK_S)
    least = min(one.computed_s for one in world.works.values())
    assert least > 0.9 * 10 / len(steps)


def test_an_idle_share_goes_to_the_others_and_comes_back():
    world = World([work(1, DECODE_S, share=50), work(2, DECODE_S, share=25), work(3, DECODE_S, share=25)])
    absent = world.works[1]
    present = absent.step
    absent.step = lambda _: None
    world.run(10.0)
    assert absent.computed_s == 0
    for number in (2, 3):
        assert world.works[number].computed_s == pytest.approx(5.0, abs=0.2)
    absent.step = present
    world.wake(1)
    world.run(20.0)
    assert absent.computed_s == pytest.approx(5.0, abs=0.2)
    for number in (2, 3):
        assert world.works[number].computed_s == pytest.approx(7.5, abs=0.3)


@pytest.mark.parametrize(("step_s", "pause_s"), [(DECODE_S, 0.003), (PREFILL_S, 0.01), (0.1, 0.02)])
def test_engines_that_pause_between_steps_keep_their_shares(step_s, pause_s):
    world = World([work(1, step_s, share=75, gap_s=pause_s), work(2, step_s, share=25, gap_s=pause_s)])
    world.run(20.0)
    first, second = (world.works[number].computed_s for number in (1, 2))
    assert first / (first + second) == pytest.approx(0.75, abs=0.03)


def test_a_turn_ends_early_when_its_holder_has_nothing_in_flight():
    world = World([work(1, 0.005, share=75, gap_s=0.05), work(2, 0.005, share=25)])
    world.run(10.0)
    assert len(world.works[1].steps) > 0.7 * 10 / 0.055
    assert sum(one.computed_s for one in world.works.values()) > 0.8 * 10


def test_a_changed_share_holds_from_then_on():
    world = World([work(1, DECODE_S, share=50), work(2, PREFILL_S, share=50)])
    world.run(10.0)
    world.works[1].share = 10.0
    before = world.works[1].computed_s
    world.run(20.0)
    assert before == pytest.approx(5.0, abs=0.2)
    assert world.works[1].computed_s - before == pytest.approx(10 * 10 / 60, abs=0.3)


@given(
    st.lists(
        st.tuples(STEPS, st.frozensets(st.sampled_from("abc"), min_size=1), st.integers(5, 30)), min_size=2, max_size=6
    )
)
@settings(max_examples=15)
def test_turns_on_several_devices_are_atomic_and_all_go_on(parts):
    works = [
        work(number, step_s, devices=tuple(sorted(devices)), share=share)
        for number, (step_s, devices, share) in enumerate(parts)
    ]
    busy: dict[str, set[int]] = {}

    def check(snapshot, decision, now):
        del decision
        if now < 0.2:
            return  # What began before the first decision.
        for member in snapshot.members:
            for device in member.devices:
                users = busy.setdefault(device, set())
                (users.add if member.in_flight else users.discard)(member.number)
                assert len(users) <= 1, "two workloads beside each other"

    world = World(works, check=check)
    world.run(10.0)
    for one in works:
        assert len(one.steps) > 2


def test_forced_steps_come_once_per_hold_and_one_at_a_time():
    works = [work(1, DECODE_S, priority=0), *(work(number, PREFILL_S, priority=3) for number in range(2, 6))]
    world = World(works, Settings(max_hold_s=0.5))
    world.run(10.0)
    for one in works[1:]:
        forced = [at for at in one.steps if at > 0.3]
        assert 15 <= len(forced) <= 20
        assert all(after - before > 0.45 for before, after in itertools.pairwise(forced))
    every = sorted(at for one in works[1:] for at in one.steps if at > 0.3)
    assert all(after - before >= PREFILL_S for before, after in itertools.pairwise(every))


@pytest.mark.parametrize("share", [0.0, 50.0])
def test_a_holder_that_is_stopped_is_waited_for_about_a_second(share):
    priority = 2 if share else 0
    world = World([work(1, 0.005, priority=priority, share=share), work(2, 0.005, share=share)])
    first, second = world.works[1], world.works[2]
    world.at(2.0, lambda: setattr(first, "stopped", True))
    world.run(2.0)
    before = len(second.steps)
    world.run(4.0)
    assert 150 < len(second.steps) - before <= 220
    assert world.decision.stalled == {1}
    first.stopped = False
    world.wake(1)
    world.run(4.5)
    assert not world.decision.stalled
    before, other = len(second.steps), len(first.steps)
    world.run(6.5)
    assert len(first.steps) - other > 100  # It owes what it was charged while its step was in flight.
    assert len(second.steps) - before < 300
    if not share:
        assert len(second.steps) == before


@pytest.mark.parametrize("share", [0.0, 50.0])
def test_a_dead_holder_is_not_waited_for(share):
    priority = 2 if share else 0
    world = World([work(1, PREFILL_S, priority=priority, share=share), work(2, 0.005, share=share)])
    world.run(2.0)
    world.leave(1)
    before = len(world.works[2].steps)
    world.run(2.0 + PREFILL_S + 2 * BELL_S + 0.01)
    assert len(world.works[2].steps) > before
    world.run(4.0)
    assert len(world.works[2].steps) - before > 380


def test_a_step_of_three_seconds_costs_others_one_and_is_paid_back():
    world = World([work(1, 3.0, share=50), work(2, 0.005, share=50)])
    world.run(40.0)
    first, second = world.works[1], world.works[2]
    assert second.computed_s > 15
    assert first.computed_s > 9


def test_an_arbiter_that_was_stopped_makes_nobody_stall():
    stalled = []
    works = [work(1, DECODE_S, priority=0), work(2, PREFILL_S, priority=3)]
    world = World(works, check=lambda _, decision, __: stalled.extend(decision.stalled))
    world.run(2.0)
    world.away_until = 5.0
    world.run(8.0)
    assert not stalled
    assert works[0].held_s == 0
    assert len(works[1].steps) <= 1


def test_64_equals_each_get_their_part():
    works = [work(number, DECODE_S if number % 2 else 0.005, share=1) for number in range(64)]
    world = World(works)
    world.run(20.0)
    for one in works:
        assert one.computed_s > 0.8 * 20 / 64


def test_equals_without_shares_are_left_to_the_driver():
    works = [work(number, DECODE_S) for number in range(4)]
    world, alone = World(works), World([work(number, DECODE_S) for number in range(4)], decide=None)
    world.run(5.0)
    alone.run(5.0)
    assert [one.steps for one in world.works.values()] == [one.steps for one in alone.works.values()]
    assert world.looks < 10
