"""The overcommit policy over time: everybody is served, in turns, on nodes of equals, of P0s, and of a mixture."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.overcommit_world import Arrival, Engine, World

from shared_store.store.residency.policy import Settings, decide

SETTINGS = Settings(idle_after_s=300.0, min_resident_s=2.0, turn_s=5.0)
LONG = 1e6
"""Seconds of work that never end in a test."""


def engines(sizes, priorities, cost_s=0.25):
    return [
        Engine(f"{index}", priority, size, cost_s, cost_s)
        for index, (size, priority) in enumerate(zip(sizes, priorities, strict=True))
    ]


SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=7)


@settings(max_examples=50)
@given(SIZES, st.integers(1, 4), st.floats(0.05, 1.0))
def test_equals_that_never_rest_are_all_served_in_bounded_time(sizes, priority, cost_s):
    """Each waits for at most one turn, and its swaps, of every other; whatever their sizes."""
    there = engines(sizes, [priority] * len(sizes), cost_s)
    world = World(max(*sizes, 6), there, {}, decide, SETTINGS)
    turn = max(SETTINGS.turn_s, 10 * 2 * cost_s)
    bound = len(sizes) * (turn + 4 * cost_s)
    horizon = 12 * bound
    records = world.run([Arrival(0.01 * index, one.name, 1.0, LONG) for index, one in enumerate(there)], horizon)
    waited = [seconds for waits in records.waits.values() for seconds in waits]
    assert max(waited) <= bound
    for engine in there:
        assert records.waits.get(engine.name)
        if engine.asks_since is not None:
            assert horizon - engine.asks_since <= bound


@settings(max_examples=50)
@given(SIZES, st.randoms(use_true_random=False))
def test_on_nodes_of_p0s_every_request_is_served_and_none_is_interrupted(sizes, random):
    """P0s wait for each other's ends of work, and for nothing else."""
    there = engines(sizes, [0] * len(sizes))
    world = World(max(*sizes, 6), there, {}, decide, SETTINGS)
    arrivals = sorted(
        (Arrival(random.uniform(0, 60), random.choice(there).name, 0.1, random.uniform(0.1, 4)) for _ in range(40)),
        key=lambda one: one.at,
    )
    records = world.run(arrivals, 1000.0)
    assert not records.unserved
    assert len(records.stretch) == len(arrivals)


@settings(max_examples=50)
@given(SIZES, st.randoms(use_true_random=False))
def test_all_requests_of_any_mixture_end(sizes, random):
    """No grant beyond the memory (the world checks that), nothing stuck, whatever priorities and models."""
    models = {"m": (random.randint(1, 3), 0.3), "n": (random.randint(1, 3), 0.3)}
    there = [
        Engine(f"{index}", random.randint(0, 4), size, 0.2, 0.2, random.choice(["", "m", "n"]))
        for index, size in enumerate(sizes)
    ]
    world = World(max(sizes) + 3, there, models, decide, SETTINGS)
    arrivals = sorted(
        (Arrival(random.uniform(0, 60), random.choice(there).name, 0.1, random.uniform(0.1, 4)) for _ in range(40)),
        key=lambda one: one.at,
    )
    records = world.run(arrivals, 2000.0)
    assert not records.unserved
    assert len(records.stretch) == len(arrivals)


def test_pressure_is_spread_over_comparable_workloads():
    """A P0 with requests now and then takes from each of four idle ones before it takes from one again."""
    there = [Engine("p0", 0, 4, 0.1, 0.1), *(Engine(name, 2, 4, 0.1, 0.1) for name in "abcd")]
    world = World(16, there, {}, decide, SETTINGS)
    arrivals = [Arrival(0.1 * number, name, 0.01, 0.02) for number, name in enumerate("abcd")]
    for number in range(12):
        again = 40.0 * number + 20
        arrivals += [Arrival(again, "p0", 0.01, 0.02)]
        arrivals += [Arrival(again + 10 + 0.1 * index, name, 0.01, 0.02) for index, name in enumerate("abcd")]
    records = world.run(arrivals, 1000.0)
    assert not records.unserved
    taken = [name for name in records.taken if name != "p0"]
    counts = {name: taken.count(name) for name in "abcd"}
    assert len(taken) >= 12
    assert max(counts.values()) - min(counts.values()) <= 1


def test_lower_priorities_wait_for_higher_ones_alone():
    """A P0 is served at once in place of a busy P3, which goes on where it was interrupted."""
    there = [Engine("high", 0, 4, 0.1, 0.1), Engine("low", 3, 4, 0.1, 0.1)]
    world = World(4, there, {}, decide, SETTINGS)
    records = world.run([Arrival(0.0, "low", 0.1, 10.0), Arrival(3.0, "high", 0.1, 2.0)], 100.0)
    assert records.first[0][0] < 0.5
    assert records.taken == ["low", "high"]
    ((high, _), (low, _)) = records.stretch
    assert high < 2.5
    assert low < 13.5
