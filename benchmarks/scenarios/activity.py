"""The activity page: the cost of a step's updates for an engine, and of reading a page for the store.

    python benchmarks activity [--updates 200000] [--rounds 20] [--out FILE]

update     ``begin`` and ``end`` of one step, as an engine calls them: nanoseconds a step, of each round (``median_ns``,
           ``lowest_ns``, ``highest_ns``). ``empty_ns`` is the same loop over two methods that do nothing.
read       the store reads one page for a status.
counters   ``switches``: voluntary context switches of all updates together; ``system_s``: CPU seconds in the kernel. A
           loop without system calls has none of its own. tests/store/test_activity.py proves that there are none.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import parser
from benchmarks.harness.machine import host, load_average, stamp, wooly
from benchmarks.harness.results import RESULTS, write
from shared_store.activity.page import make_page
from shared_store.activity.writer import ActivityWriter


class Empty:
    """Methods that do nothing, with the arguments of a writer's."""

    def begin(self) -> None:
        """Do nothing."""

    def end(self, running: int, waiting: int) -> None:
        """Do nothing."""


def step_ns(writer: ActivityWriter | Empty, updates: int) -> float:
    """Return the nanoseconds of one step's updates, the loop included."""
    begin, end = writer.begin, writer.end
    began = time.perf_counter_ns()
    for number in range(updates):
        begin()
        end(number & 63, number & 7)
    return (time.perf_counter_ns() - began) / updates


def read_ns(read: Callable[[], object], times: int) -> float:
    """Return the nanoseconds of one call, the loop included."""
    began = time.perf_counter_ns()
    for _ in range(times):
        read()
    return (time.perf_counter_ns() - began) / times


def figures(rounds: list[float]) -> dict[str, float]:
    """Return the figures of some rounds, in nanoseconds."""
    return {
        "median_ns": round(statistics.median(rounds), 1),
        "lowest_ns": round(min(rounds), 1),
        "highest_ns": round(max(rounds), 1),
    }


def measure(updates: int, rounds: int) -> dict[str, Any]:
    """Measure in alternating rounds, without garbage collections."""
    page, fd = make_page()
    writer, empty = ActivityWriter(), Empty()
    writer.attach(fd)
    gc.disable()
    step_ns(writer, updates)
    step_ns(empty, updates)
    found: dict[str, list[float]] = {"update": [], "empty": [], "read": []}
    switches = system_s = 0.0
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF)
        found["update"].append(step_ns(writer, updates))
        after = resource.getrusage(resource.RUSAGE_SELF)
        switches += after.ru_nvcsw - before.ru_nvcsw
        system_s += after.ru_stime - before.ru_stime
        found["empty"].append(step_ns(empty, updates))
        found["read"].append(read_ns(page.read, updates // 10))
    gc.enable()
    return {
        "update": figures(found["update"]),
        "empty": figures(found["empty"]),
        "read": figures(found["read"]),
        "counters": {"switches": int(switches), "system_s": round(system_s, 3)},
    }


def main() -> None:
    """Measure, and write the result file."""
    options = parser(__doc__)
    options.add_argument("--updates", type=int, default=200_000, help="steps of a round (default 200000)")
    options.add_argument("--rounds", type=int, default=20, help="rounds (default 20)")
    options.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "activity.json",
        help="result file (default benchmarks/results/activity.json)",
    )
    chosen = options.parse_args()
    load = load_average()
    result = measure(chosen.updates, chosen.rounds)
    write(
        chosen.out,
        {
            "versions": {**stamp(), **host(), **wooly(), "load_average": load},
            "updates": chosen.updates,
            "rounds": chosen.rounds,
            **result,
        },
    )
    print(
        f"a step's updates {result['update']['median_ns']:.0f} ns "
        f"(empty loop {result['empty']['median_ns']:.0f} ns), a read {result['read']['median_ns']:.0f} ns"
    )
