"""The overcommit policy on a simulated fleet, against other ways to share GPUs.

    python benchmarks overcommit_sim [--gpus 2000] [--seconds 300] [--jobs 1] [--grid 100] [--out FILE]

The store's own policy (``shared_store/store/residency/policy.py``) on GPUs with 4 to 64 workloads each, whose memory is
1.5 to 8 times what there is, with bursty and heavy-tailed requests; ``overcommit_traces.py`` has the assumptions. No
device. Equal arguments give equal figures.

Policies: ``wooly``; ``first_come``: nobody leaves that has work, and requests are served in order; ``lru``: the one
used longest ago leaves, at once, working or not; ``by_hand``: a script puts engines to sleep after 60 s without a
request, and none shares its weights.

ttft_s       from a request to its first token: p50, p90, p99 and max, by priority. Requests that had none in the end
             count with their age.
starved      share of requests that waited more than 60 s.
stretch      mean of the duration of a request by its duration with the GPU to itself.
swaps_min    moves out, for each GPU and minute.
quick        share of returns within 10 s after the engine had left: thrash.
working      share of time in which a GPU's engines work.

``mixed`` has workloads of all priorities, ``all_p0`` P0s alone; ``raw.parts`` the figures of ``mixed`` by the number of
workloads and by kind of requests; ``raw.settings`` those of ``wooly`` by least residence and turn, of the
first ``--grid`` GPUs.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from support.overcommit_world import Records, World

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import percentile
from benchmarks.harness.machine import host, stamp, wooly
from benchmarks.harness.results import RESULTS, write
from benchmarks.scenarios.overcommit_rules import POLICIES
from benchmarks.scenarios.overcommit_traces import COUNTS, engines_of, gpu
from shared_store.store.residency.policy import Settings

STARVED_S = 60.0
STAYS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
TURNS = (2.0, 5.0, 10.0, 20.0, 60.0)


@dataclass(frozen=True)
class Case:
    """One simulated GPU: its seed, the policy, and the policy's settings."""

    seed: int
    policy: str
    settings: Settings


@dataclass(frozen=True)
class Outcome:
    """What happened on one GPU."""

    case: Case
    count: int
    kind: str
    all_p0: bool
    records: Records


def simulate(case: Case, seconds: float) -> Outcome:
    """Simulate one GPU."""
    found = gpu(case.seed, seconds)
    capacity, engines, models = engines_of(found, shared=case.policy != "by_hand")
    world = World(capacity, engines, models, POLICIES[case.policy], case.settings)
    return Outcome(case, found.count, found.kind, found.all_p0, world.run(found.arrivals, seconds))


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return percentiles of seconds."""
    ordered = sorted(values)
    if not ordered:
        return {}
    figures = {f"p{percent}": percentile(ordered, percent) for percent in (50, 90, 99)}
    return {name: round(value, 3) for name, value in {**figures, "max": ordered[-1]}.items()}


def waits(outcomes: Iterable[Outcome], priority: int | None = None) -> list[float]:
    """Return seconds to the first token, or the ages of requests without one; of one priority, or of all."""
    return [
        value
        for outcome in outcomes
        for found in (outcome.records.first, outcome.records.unserved)
        for level, values in found.items()
        if priority in (None, level)
        for value in values
    ]


def figures(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """Return the figures of some GPUs."""
    records = [outcome.records for outcome in outcomes]
    if not (every := waits(outcomes)):
        return {}
    stretched = [(took, alone) for one in records for took, alone in one.stretch]
    swaps = sum(one.swaps for one in records)
    return {
        "requests": len(every),
        "ttft_s": {
            "all": spread(every),
            **{f"p{level}": found for level in range(5) if (found := spread(waits(outcomes, level)))},
        },
        "starved": round(sum(value > STARVED_S for value in every) / len(every), 5),
        "unserved": round(sum(len(ages) for one in records for ages in one.unserved.values()) / len(every), 5),
        "stretch": round(sum(took for took, _ in stretched) / sum(alone for _, alone in stretched), 3),
        "swaps_min": round(swaps / len(records) / seconds * 60, 2),
        "quick": round(sum(one.quick for one in records) / max(1, swaps), 4),
        "working": round(sum(one.stepping_s for one in records) / len(records) / seconds, 4),
    }


def compare(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """Return each policy's figures: of GPUs with all priorities, of those with P0s alone, and parts of the former."""
    mixed: dict[str, list[Outcome]] = {policy: [] for policy in POLICIES}
    p0: dict[str, list[Outcome]] = {policy: [] for policy in POLICIES}
    for outcome in outcomes:
        (p0 if outcome.all_p0 else mixed)[outcome.case.policy].append(outcome)
    parts: dict[str, dict[str, list[Outcome]]] = {
        policy: {
            **{f"{count} workloads": [one for one in own if one.count == count] for count in COUNTS},
            **{kind: [one for one in own if one.kind == kind] for kind in ("bursty", "heavy_tailed")},
        }
        for policy, own in mixed.items()
    }
    return {
        "mixed": {policy: figures(own, seconds) for policy, own in mixed.items()},
        "all_p0": {policy: figures(own, seconds) for policy, own in p0.items()},
        "raw": {
            policy: {name: figures(part, seconds) for name, part in named.items()} for policy, named in parts.items()
        },
    }


def main() -> None:
    """Simulate the fleet under each policy, and ours under several settings."""
    options = parser(__doc__)
    options.add_argument("--gpus", type=int, default=2000, help="GPUs (default 2000)")
    options.add_argument("--seconds", type=float, default=300.0, help="simulated seconds (default 300)")
    options.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    options.add_argument("--grid", type=int, default=100, help="GPUs for the comparison of settings (default 100)")
    options.add_argument("--out", type=Path, default=RESULTS / "overcommit-sim.json")
    arguments = options.parse_args()
    usual = Settings()
    fleet = [Case(seed, policy, usual) for policy in POLICIES for seed in range(arguments.gpus)]
    grid = {
        f"stay {stay:g} s, turn {turn:g} s": [
            Case(seed, "wooly", Settings(min_resident_s=stay, turn_s=turn)) for seed in range(arguments.grid)
        ]
        for stay in STAYS
        for turn in TURNS
    }
    run = partial(simulate, seconds=arguments.seconds)
    with multiprocessing.Pool(arguments.jobs) as pool:
        outcomes = pool.map(run, fleet, chunksize=20)
        by_settings = {name: pool.map(run, cases, chunksize=20) for name, cases in grid.items()}
    found = compare(outcomes, arguments.seconds)
    settings = {
        name: figures([one for one in part if not one.all_p0], arguments.seconds) for name, part in by_settings.items()
    }
    result = {
        "versions": {**wooly(), **host(), **stamp()},
        "gpus": arguments.gpus,
        "seconds": arguments.seconds,
        **found,
        "raw": {"parts": found["raw"], "settings": settings},
    }
    write(arguments.out, result)
    print(json.dumps(result, indent=1))
