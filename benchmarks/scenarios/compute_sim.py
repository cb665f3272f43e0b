"""Turns on simulated devices: what the arbiter's decision makes of steps, against other ways to share a device.

    python benchmarks compute_sim [--seconds 60] [--mixes 100] [--jobs 1] [--out FILE]

The arbiter's own decision (``shared_store/compute/decision.py``) in simulated time; ``compute_traces.py`` has the
assumptions. No device, no process. Equal arguments give equal figures.

Ways: ``free``: the driver slices time; ``turns``: one step at a time, in order; ``hold_0``, ``hold_2``: this arbiter
with ``WOOLY_MAX_HOLD`` 0 and 2 s. Steps of 1.73 ms decode, steps of 22.7 ms are long prompts.

stream       a P0 decodes without a pause, a P3 has long prompts: milliseconds between tokens of the P0 (p50, p99), by
             those alone; steps of the P3 each second; what both do together, each in relation to itself alone.
requests     the same with a P0 whose requests use 30% of the device: milliseconds to the first token in addition.
long         the same with steps of the P3 of 181.6 ms: prompts that are not cut into short steps.
shares       two equals with 75% and 25%, by the quantum: most points by which a part differs from its share, over 10 s;
             what both do together; milliseconds between steps of the first (p50, p99, max); decisions each second.
pauses       75% and 25% with pauses after steps, in which nothing is in flight, by ``idle_s``: parts of the device's
             time. Decode beside prompts: the one that decodes pauses. Prompts beside prompts: both do.
equals       two and eight equals, every other one with long prompts, with and without equal shares: milliseconds
             between tokens of those that decode; the least part of a share over 10 s.
mixed        2 to 8 random workloads: time between tokens by that alone, by priority, of the tokens that came.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from support.compute_world import World

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import percentile
from benchmarks.harness.machine import host, stamp, wooly
from benchmarks.harness.results import RESULTS, write
from benchmarks.scenarios.compute_traces import DECODE_S, PREFILL_S, WAYS, Requests, Stream, poisson, work
from shared_store.compute.decision import Settings

WINDOW_S = 10.0
QUANTA = (0.010, 0.020, 0.030, 0.050, 0.100)
IDLES = (0.0005, 0.002, 0.005, 0.010)
PAUSES = (0.0, 0.0005, 0.001, 0.003, 0.005, 0.010)
PAIRS = {
    "decode beside decode": (DECODE_S, DECODE_S),
    "decode beside prompts": (DECODE_S, PREFILL_S),
    "prompts beside decode": (PREFILL_S, DECODE_S),
    "prompts beside prompts": (PREFILL_S, PREFILL_S),
}
PRIORITIES = (0, 0, 1, 2, 2, 3, 3, 4)


def between(world: World, number: int) -> list[float]:
    """Return seconds between ends of steps."""
    return [after - before for before, after in itertools.pairwise(world.works[number].steps)]


def spread(values: Iterable[float], unit: float = 1e-3) -> dict[str, float]:
    """Return the 50th and the 99th percentile, in a unit."""
    ordered = sorted(values)
    return {f"p{percent}": round(percentile(ordered, percent) / unit, 3) for percent in (50, 99)} if ordered else {}


def parts(world: World, seconds: float) -> list[dict[int, float]]:
    """Go on, and return the part of the device's time of each workload in each window. The first second is left out."""
    world.run(1.0)
    found = []
    at = 1.0
    while at + WINDOW_S <= seconds + 1.0:
        before = {number: one.computed_s for number, one in world.works.items()}
        at += WINDOW_S
        world.run(at)
        found.append({number: (one.computed_s - before[number]) / WINDOW_S for number, one in world.works.items()})
    return found


def stream(seconds: float, step_s: float = PREFILL_S) -> dict[str, Any]:
    """Compare a P0 that decodes without a pause beside a P3."""
    found: dict[str, Any] = {"alone": {"between_ms": {"p50": DECODE_S * 1e3, "p99": DECODE_S * 1e3}}}
    for name, (rule, settings) in WAYS.items():
        world = World([work(1, 0, Stream(DECODE_S)), work(2, 3, Stream(step_s))], settings, rule)
        world.run(seconds)
        one, other = (len(world.works[number].steps) / seconds for number in (1, 2))
        gaps = between(world, 1)
        found[name] = {
            "between_ms": spread(gaps),
            "to_alone": spread(gaps, DECODE_S),
            "p3_steps_s": round(other, 2),
            "together": round(one * DECODE_S + other * step_s, 3),
        }
    return found


def requests(seconds: float, step_s: float = PREFILL_S) -> dict[str, Any]:
    """Compare a P0 with requests now and then beside a P3."""
    source = poisson(random.Random(1), 0.3, seconds)
    found: dict[str, Any] = {}
    tokens: dict[str, int] = {}
    for name, (rule, settings) in {"alone": WAYS["free"], **WAYS}.items():
        own = Requests(source.arrivals.copy())
        works = [work(1, 0, own)] + ([work(2, 3, Stream(step_s))] if name != "alone" else [])
        world = World(works, settings, rule)
        own.bind(world, 1)
        world.run(seconds)
        tokens[name] = len(own.between) + len(own.first)
        found[name] = {"first_ms": spread(own.first), "between_ms": spread(own.between)}
        if name != "alone":
            steps = len(world.works[2].steps) / seconds
            found[name]["p3_steps_s"] = round(steps, 2)
            found[name]["together"] = round(tokens[name] / tokens["alone"] + steps * step_s, 3)
    return found


def shared(
    seconds: float, pair: tuple[float, float], settings: Settings, pauses_s: tuple[float, float] = (0.0, 0.0)
) -> dict[str, Any]:
    """Return what two equals with 75% and 25% make of the device."""
    first, second = pair
    works = [
        work(1, 2, Stream(first), share=75, gap_s=pauses_s[0]),
        work(2, 2, Stream(second), share=25, gap_s=pauses_s[1]),
    ]
    world = World(works, settings)
    windows = parts(world, seconds)
    tokens = between(world, 1)
    of_both = [one[1] / (one[1] + one[2]) for one in windows]
    return {
        "points": round(max(abs(part - 0.75) for part in of_both) * 100, 2),
        "first": round(sum(one[1] for one in windows) / len(windows), 3),
        "second": round(sum(one[2] for one in windows) / len(windows), 3),
        "together": round(sum(one[1] + one[2] for one in windows) / len(windows), 3),
        "between_ms": {**spread(tokens), "max": round(max(tokens) * 1e3, 3)},
        "decisions_s": round(world.looks / world.now),
    }


def shares(seconds: float) -> dict[str, Any]:
    """Compare quanta."""
    return {
        f"{quantum * 1e3:g} ms": {
            name: shared(seconds, pair, Settings(quantum_s=quantum)) for name, pair in PAIRS.items()
        }
        for quantum in QUANTA
    }


def pauses(seconds: float) -> dict[str, Any]:
    """Compare times after which a turn ends early: of the one that decodes alone, or of two with long prompts."""
    return {
        f"idle {idle * 1e3:g} ms": {
            f"pause {pause * 1e3:g} ms": {
                "decode beside prompts": shared(
                    seconds, PAIRS["decode beside prompts"], Settings(idle_s=idle), (pause, 0.0)
                ),
                "prompts beside prompts": shared(
                    seconds, PAIRS["prompts beside prompts"], Settings(idle_s=idle), (pause, pause)
                ),
            }
            for pause in PAUSES
        }
        for idle in IDLES
    }


def equals(seconds: float) -> dict[str, Any]:
    """Compare equals with and without shares."""
    found: dict[str, Any] = {}
    for count, (name, share) in itertools.product((2, 8), (("no shares", 0.0), ("equal shares", 1.0))):
        works = [
            work(number, 2, Stream(PREFILL_S if number % 2 else DECODE_S), share=share * 100 / count)
            for number in range(count)
        ]
        world = World(works)
        windows = parts(world, seconds)
        found.setdefault(f"{count} equals", {})[name] = {
            "between_ms": spread(gap for number in range(0, count, 2) for gap in between(world, number)),
            "least_part": round(min(part for one in windows for part in one.values()) * count, 3),
            "together": round(sum(sum(one.values()) for one in windows) / len(windows), 3),
        }
    return found


def mix(seed: int, seconds: float) -> dict[str, dict[int, list[float]]]:
    """Return, for each way, what one random mix makes of the time between tokens by priority."""
    chance = random.Random(seed)
    count = chance.randint(2, 8)
    load = chance.choice((0.2, 0.4, 0.8))
    plan = [(chance.choice(PRIORITIES), chance.random() < 0.3) for _ in range(count)]
    sources = [None if saturated else poisson(chance, load / count, seconds) for _, saturated in plan]
    found: dict[str, dict[int, list[float]]] = {}
    for name, (rule, settings) in WAYS.items():
        own = [Stream(PREFILL_S) if one is None else Requests(one.arrivals.copy()) for one in sources]
        works = [work(number, plan[number][0], one) for number, one in enumerate(own)]
        world = World(works, settings, rule)
        for number, one in enumerate(own):
            if isinstance(one, Requests):
                one.bind(world, number)
        world.run(seconds)
        by_level: dict[int, list[float]] = {}
        for number, one in enumerate(own):
            if isinstance(one, Requests):
                by_level.setdefault(plan[number][0], []).extend(gap / DECODE_S for gap in one.between)
        found[name] = by_level
    return found


def mixes(outcomes: Sequence[Mapping[str, Mapping[int, list[float]]]]) -> dict[str, Any]:
    """Return the figures of all mixes."""
    return {
        name: {
            f"p{level}": spread((gap for one in outcomes for gap in one[name].get(level, ())), 1.0)
            for level in range(5)
        }
        for name in WAYS
    }


def main() -> None:
    """Simulate all scenarios."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=60.0, help="simulated seconds (default 60)")
    options.add_argument("--mixes", type=int, default=100, help="random mixes (default 100)")
    options.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    options.add_argument("--out", type=Path, default=RESULTS / "compute-sim.json")
    arguments = options.parse_args()
    seconds = arguments.seconds
    with multiprocessing.Pool(arguments.jobs) as pool:
        outcomes = pool.map(partial(mix, seconds=seconds), range(arguments.mixes), chunksize=5)
    result = {
        "versions": {**wooly(), **host(), **stamp()},
        "seconds": seconds,
        "mixes": arguments.mixes,
        "stream": stream(seconds),
        "requests": requests(seconds),
        "long": requests(seconds, 8 * PREFILL_S),
        "equals": equals(seconds),
        "mixed": mixes(outcomes),
        "raw": {"shares": shares(seconds), "pauses": pauses(seconds)},
    }
    write(arguments.out, result)
    print(json.dumps(result, indent=1))
