"""Which workloads may begin steps: every rule, for any snapshots and any clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_store.compute.decision import Credit, History, Kind, Member, Settings, Snapshot, decide
from shared_store.compute.turns import groups

NOW = 1000.0
CPU = frozenset({"cpu"})
DEVICES = st.frozensets(st.sampled_from(["one", "two", "three"]), min_size=1, max_size=3)
SHARES = st.sampled_from([0.0, 0.0, 0.0, 1.0, 25.0, 75.0, 100.0])
AGES = st.sampled_from([0.0, 0.0, 0.0005, 0.003, 0.029, 0.2, 0.999, 1.0, 2.5, 60.0])
PASSED = st.sampled_from([0.0, 0.001, 0.01, 0.03, 0.2, 0.25, 0.25, 0.6, 2.0, 3600.0, -0.01, -3600.0])
HOLDS = st.sampled_from([0.0, 0.0, 0.1, 2.0])


@st.composite
def members(draw, number, now, before=None):
    """A workload as a page may show it: also what cannot be, as the arbiter does not trust pages."""
    before = before or Member(
        number, draw(st.integers(0, 3)), draw(DEVICES), draw(SHARES), gated=draw(st.sampled_from([True] * 5 + [False]))
    )
    return replace(
        before,
        working=draw(st.booleans()),
        in_flight=draw(st.sampled_from([0, 0, 1, 2])),
        progressed=draw(st.just(before.progressed) | AGES.map(lambda age: now - age)),
        idle_since=draw(st.none() | AGES.map(lambda age: now - age)),
        held_since=draw(st.none() | AGES.map(lambda age: now - age)),
        used_s=before.used_s + draw(AGES),
    )


@st.composite
def stories(draw):
    """Snapshots one after the other, with the decision on each; the last one is to be judged."""
    settings = Settings(max_hold_s=draw(HOLDS))
    now = NOW
    known: dict[int, Member] = {}
    made = None
    story = []
    for _ in range(draw(st.integers(1, 4))):
        for number in range(draw(st.integers(1, 6))):
            known[number] = draw(members(number, now, known.get(number)))
        snapshot = Snapshot(tuple(known.values()), made.history if made else Snapshot(()).history)
        made = decide(snapshot, settings, now)
        story.append((snapshot, made, now))
        now += draw(PASSED)
    return settings, story


def meet(one, other):
    return one is not other and not one.devices.isdisjoint(other.devices)


def able(snapshot, decision):
    return [one for one in snapshot.members if (one.working or one.in_flight) and one.number not in decision.stalled]


def under(snapshot, decision):
    """Numbers of those that a more important one holds, by the words of the rule."""
    held: set[int] = set()
    for one in sorted(snapshot.members, key=lambda one: one.priority):
        if one.gated and any(
            other.priority < one.priority and meet(one, other) and other.number not in held
            for other in able(snapshot, decision)
        ):
            held.add(one.number)
    return held


@given(stories())
def test_the_rules_hold_for_any_story(told):
    settings, story = told
    for snapshot, decision, now in story:
        permits = decision.permits
        assert set(permits) == {one.number for one in snapshot.members}
        held = under(snapshot, decision)
        for one in snapshot.members:
            permit = permits[one.number]
            if not one.gated:
                assert permit.kind is Kind.FREE
            elif one.number in held:
                assert permit.kind is Kind.HELD or (permit.kind is Kind.ONE_STEP and settings.max_hold_s)
            elif permit.kind is not Kind.FREE:
                assert any(
                    other.priority == one.priority and other.gated and meet(one, other) for other in snapshot.members
                ), "held without an equal and without a more important one"
        assert decision.stalled <= {one.number for one in snapshot.members}
        assert decision.wake_at is None or decision.wake_at > now


@given(stories())
def test_p0_is_never_held_without_shares(told):
    _, story = told
    for snapshot, decision, _ in story:
        for one in snapshot.members:
            equals = [other for other in snapshot.members if other.priority == 0]
            if one.priority == 0 and not any(other.share for other in equals):
                assert decision.permits[one.number].kind is Kind.FREE


@given(stories())
def test_equals_with_shares_compute_one_at_a_time(told):
    _, story = told
    for snapshot, decision, _ in story:
        lower = under(snapshot, decision)
        for group in contests(snapshot, decision, lower):
            turns = [one for one in group if decision.permits[one.number].kind is Kind.TURN]
            assert not any(meet(one, other) for one in turns for other in turns)
            assert {decision.permits[one.number].kind for one in group} <= {Kind.TURN, Kind.HELD}
            before = {turn.number for turn in snapshot.history.turns}
            for one in turns:
                if one.number not in before:
                    assert not any(meet(one, other) and other.in_flight for other in group)


@given(stories())
def test_no_turn_is_lost(told):
    """Whoever waits finds each device in use, or reserved for one that waits as well."""
    settings, story = told
    for snapshot, decision, now in story:
        for group in contests(snapshot, decision, under(snapshot, decision)):
            waiting = [
                one for one in group if one.held_since is not None and decision.permits[one.number].kind is Kind.HELD
            ]
            for one in waiting:
                assert any(meet(one, other) for other in group)
            if waiting:
                assert any(one.in_flight or decision.permits[one.number].kind is Kind.TURN for one in group)
                assert decision.wake_at is not None
                assert decision.wake_at <= now + settings.stall_s


@given(stories())
def test_held_workloads_are_looked_after(told):
    settings, story = told
    for snapshot, decision, now in story:
        counted = able(snapshot, decision)
        if any(decision.permits[one.number].kind is not Kind.FREE for one in counted):
            assert decision.wake_at is not None
            assert decision.wake_at <= now + settings.stall_s / 4


@given(stories())
def test_forced_steps_are_not_more_frequent_than_the_hold(told):
    settings, story = told
    last: dict[int, tuple[float, float]] = {}
    for snapshot, decision, now in story:
        for one in snapshot.members:
            permit = decision.permits[one.number]
            if permit.kind is not Kind.ONE_STEP or one.number not in under(snapshot, decision):
                continue
            until, at = last.get(one.number, (None, 0.0))
            if permit.until != until and until is not None and now >= at:
                assert now - at >= settings.max_hold_s
            if permit.until != until:
                last[one.number] = (permit.until, now)


@given(stories())
def test_steps_are_short_beside_and_after_more_important_work(told):
    settings, story = told
    for place, (snapshot, decision, now) in enumerate(story):
        for one in snapshot.members:
            over = [other for other in able(snapshot, decision) if other.priority < one.priority and meet(one, other)]
            if over:
                assert decision.permits[one.number].short
            elif all(when <= now - settings.short_s for _, _, when in story[:place]):
                before = {other.number for other in able(*story[place - 1][:2])} if place else set()
                if not any(other.number in before and meet(one, other) for other in snapshot.members):
                    assert not decision.permits[one.number].short


def contests(snapshot, decision, lower):
    """Groups of equals that take turns."""
    for priority in range(5):
        equals = [
            one
            for one in able(snapshot, decision)
            if one.priority == priority and one.gated and one.number not in lower
        ]
        yield from (group for group in groups(equals) if len(group) > 1 and any(one.share for one in group))


BUSY = Member(1, 0, CPU, working=True, in_flight=1, progressed=NOW)
WAITS = Member(2, 3, CPU, working=True, progressed=NOW, idle_since=NOW, held_since=NOW)


def kinds(decision):
    return {number: permit.kind for number, permit in decision.permits.items()}


def test_a_more_important_workload_that_makes_no_progress_counts_as_without_work():
    now = NOW
    decision = decide(Snapshot((BUSY, WAITS)), Settings(), now)
    while now < NOW + 0.99:
        assert kinds(decision) == {1: Kind.FREE, 2: Kind.HELD}
        assert decision.wake_at is not None
        now = decision.wake_at
        decision = decide(Snapshot((BUSY, WAITS), decision.history), Settings(), now)
    assert now == pytest.approx(NOW + 1)
    assert kinds(decision) == {1: Kind.FREE, 2: Kind.FREE}
    assert decision.stalled == {1}
    assert decision.wake_at is not None
    goes_on = replace(BUSY, progressed=decision.wake_at)
    decision = decide(Snapshot((goes_on, WAITS), decision.history), Settings(), decision.wake_at)
    assert kinds(decision) == {1: Kind.FREE, 2: Kind.HELD}
    assert not decision.stalled


@pytest.mark.parametrize("jump", [-1e6, -1.0, 0.6, 5.0, 1e6])
def test_a_jump_of_the_clock_makes_nobody_stall(jump):
    decision = decide(Snapshot((BUSY, WAITS)), Settings(), NOW)
    decision = decide(Snapshot((BUSY, WAITS), decision.history), Settings(), NOW + jump)
    assert kinds(decision) == {1: Kind.FREE, 2: Kind.HELD}
    assert not decision.stalled
    assert decision.wake_at is not None
    assert NOW + jump < decision.wake_at <= NOW + jump + 0.25


def test_a_workload_that_was_held_is_not_stalled_when_it_may_go_on():
    decision = decide(Snapshot((BUSY, WAITS)), Settings(), NOW)
    for step in range(1, 60):
        now = NOW + step / 4
        decision = decide(Snapshot((replace(BUSY, progressed=now), WAITS), decision.history), Settings(), now)
        assert not decision.stalled
    third = Member(3, 4, CPU, working=True, progressed=NOW, held_since=NOW)
    idle = replace(BUSY, working=False, in_flight=0)
    decision = decide(Snapshot((idle, WAITS, third), decision.history), Settings(), now + 0.1)
    assert kinds(decision) == {1: Kind.FREE, 2: Kind.FREE, 3: Kind.HELD}


def test_a_workload_that_stalled_shows_that_it_goes_on_before_others_are_held_for_it():
    stopped = replace(WAITS, held_since=None)
    third = Member(3, 4, CPU, working=True, progressed=NOW, held_since=NOW)
    history, now = Snapshot(()).history, NOW
    while True:
        decision = decide(Snapshot((stopped, third), history), Settings(), now)
        if decision.stalled:
            break
        history = decision.history
        assert decision.wake_at is not None
        now = decision.wake_at
    for busy in (replace(BUSY, progressed=now), replace(BUSY, working=False, in_flight=0, progressed=now + 0.2)):
        now += 0.2
        decision = decide(Snapshot((busy, stopped, third), decision.history), Settings(), now)
        assert decision.stalled == {2}
    assert kinds(decision) == {1: Kind.FREE, 2: Kind.FREE, 3: Kind.FREE}
    now += 0.2
    decision = decide(Snapshot((replace(stopped, progressed=now), third), decision.history), Settings(), now)
    assert kinds(decision) == {2: Kind.FREE, 3: Kind.HELD}


def test_an_equal_that_stalled_may_begin_one_step_beside_a_turn():
    equals = (
        Member(1, 2, CPU, 50, working=True, progressed=NOW - 2, idle_since=NOW - 2, held_since=NOW - 2),
        Member(2, 2, CPU, 25, working=True, in_flight=1, progressed=NOW),
        Member(3, 2, CPU, 25, working=True, progressed=NOW, held_since=NOW),
    )
    decision = decide(Snapshot(equals), Settings(), NOW)
    assert decision.stalled == {1}
    assert kinds(decision) == {1: Kind.ONE_STEP, 2: Kind.TURN, 3: Kind.HELD}
    again = decide(Snapshot(equals, decision.history), Settings(), NOW + 0.01)
    assert again.permits[1] == decision.permits[1], "the same step"


def test_an_equal_that_is_held_in_the_middle_of_its_work_goes_on():
    """Something of it stays in flight while it waits: nobody may begin beside that, and then it stalled."""
    settings, now = Settings(), NOW + 0.031
    held = Member(1, 2, CPU, 50, working=True, in_flight=1, progressed=NOW)
    other = Member(2, 2, CPU, 50, working=True, progressed=NOW, idle_since=NOW, held_since=NOW)
    history = decide(Snapshot((held, other)), settings, NOW).history
    held = replace(held, used_s=0.05, held_since=now)
    for _ in range(1000):
        decision = decide(Snapshot((held, other), history), settings, now)
        history = decision.history
        kind = decision.permits[1].kind
        if kind is not Kind.HELD:
            break
        now += 0.005
        if decision.permits[2].kind is not Kind.HELD:
            other = replace(other, progressed=now, used_s=other.used_s + 0.005)
    assert kind is Kind.ONE_STEP
    assert now - NOW < 2 * settings.stall_s


def test_idle_equals_wait_for_the_arbiter_where_shares_count():
    busy = Member(1, 2, CPU, working=True, in_flight=1, progressed=NOW)
    idle = Member(2, 2, CPU)
    shared = replace(idle, share=25.0)
    assert kinds(decide(Snapshot((busy, idle)), Settings(), NOW)) == {1: Kind.FREE, 2: Kind.FREE}
    assert kinds(decide(Snapshot((busy, shared)), Settings(), NOW)) == {1: Kind.FREE, 2: Kind.HELD}
    assert kinds(decide(Snapshot((replace(busy, share=25.0), idle)), Settings(), NOW)) == {1: Kind.FREE, 2: Kind.HELD}


def test_one_that_waits_for_several_devices_gets_them_all_at_once():
    both = Member(1, 2, frozenset({"one", "two"}), 10, working=True, progressed=NOW, held_since=NOW - 1)
    one = Member(2, 2, frozenset({"one"}), working=True, in_flight=1, progressed=NOW)
    two = Member(3, 2, frozenset({"two"}), working=True, held_since=NOW, progressed=NOW)
    decision = decide(Snapshot((both, one, two)), Settings(), NOW)
    assert kinds(decision) == {1: Kind.HELD, 2: Kind.HELD, 3: Kind.HELD}
    drained = replace(one, in_flight=0, idle_since=NOW, held_since=NOW, used_s=0.01)
    decision = decide(Snapshot((both, drained, two), decision.history), Settings(), NOW)
    assert kinds(decision) == {1: Kind.TURN, 2: Kind.HELD, 3: Kind.HELD}


def test_a_less_important_workload_does_not_slip_in_while_equals_change_turns():
    leaves = Member(1, 2, CPU, 50, working=True, in_flight=1, progressed=NOW)
    comes = Member(2, 2, CPU, 50, working=True, progressed=NOW, held_since=NOW - 1)
    decision = decide(Snapshot((leaves, comes, replace(WAITS, number=3))), Settings(), NOW)
    assert decision.permits[3].kind is Kind.HELD


def test_a_forced_step_stays_allowed_until_it_begins():
    hold = Settings(max_hold_s=0.5)
    decision = decide(Snapshot((BUSY, WAITS)), hold, NOW)
    assert kinds(decision)[2] is Kind.HELD
    assert decision.wake_at is not None
    decision = decide(Snapshot((replace(BUSY, progressed=NOW + 0.5), WAITS), decision.history), hold, NOW + 0.5)
    allowed = decision.permits[2]
    assert allowed.kind is Kind.ONE_STEP
    decision = decide(Snapshot((replace(BUSY, progressed=NOW + 0.51), WAITS), decision.history), hold, NOW + 0.51)
    assert decision.permits[2] == allowed
    made = replace(WAITS, held_since=NOW + 0.55, progressed=NOW + 0.55)
    busy = replace(BUSY, progressed=NOW + 0.6)
    decision = decide(Snapshot((busy, made), decision.history), hold, NOW + 0.6)
    assert kinds(decision)[2] is Kind.HELD


def test_a_workload_owes_no_more_than_a_second_of_its_devices():
    equals = tuple(Member(number, 2, CPU, 50, working=True, held_since=NOW, progressed=NOW) for number in (1, 2))
    owed = {1: Credit(1000.0, 0.0, joined=True), 2: Credit(0.0, 0.0, joined=True)}
    decision = decide(Snapshot(equals, History(credits=owed)), Settings(), NOW)
    assert decision.history.credits[1].used == pytest.approx(1 / 0.5)
    assert kinds(decision) == {1: Kind.HELD, 2: Kind.TURN}


def test_64_workloads_are_decided_on_one_device():
    crowd = tuple(
        Member(number, number % 5, CPU, 10.0 * (number % 3), working=True, held_since=NOW, progressed=NOW)
        for number in range(64)
    )
    decision = decide(Snapshot(crowd), Settings(), NOW)
    assert sum(kind is Kind.TURN for kind in kinds(decision).values()) == 1
    assert all(decision.permits[one.number].kind is Kind.HELD for one in crowd if one.priority)
