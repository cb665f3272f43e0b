"""Counts of swaps, waits and refusals, with names that clients choose."""

from __future__ import annotations

from shared_store.base.status import LATENCY_BOUNDS_S
from shared_store.store.state.overcommit_counts import MAX_NAMES, OvercommitCounts


def names(rows):
    return {row.name: row.count for row in rows}


def test_swaps_count_by_direction_and_steps_by_duration():
    counts = OvercommitCounts()
    counts.swapped("out", 100, {"drain": 0.002, "copy": 0.2})
    counts.swapped("out", 50, {"copy": 1000.0})
    counts.swapped("in", 7, {})
    found = counts.status((0,) * 5)
    assert [(one.direction, one.count, one.bytes) for one in found.swaps] == [("out", 2, 150), ("in", 1, 7)]
    assert names(found.steps) == {"copy": 2, "drain": 1}
    copy = next(one for one in found.steps if one.name == "copy")
    assert copy.total_s == 1000.2
    assert copy.classes[LATENCY_BOUNDS_S.index(0.5)] == copy.classes[-1] == 1
    assert sum(copy.classes) == 2


def test_waits_have_all_priorities():
    counts = OvercommitCounts()
    counts.waited(3, 0.25)
    assert names(counts.status((0, 0, 1, 0, 0)).waits) == {"0": 0, "1": 0, "2": 0, "3": 1, "4": 0}
    assert counts.status((0, 0, 1, 0, 0)).waiting == (0, 0, 1, 0, 0)


def test_the_names_of_clients_are_bounded():
    """Steps and reasons beyond the most that are counted by name count as `other`; texts are made printable."""
    counts = OvercommitCounts()
    for number in range(MAX_NAMES + 5):
        counts.refused(f"reason {number}")
        counts.swapped("out", 0, {f"step {number}": 0.1})
    counts.refused("reason 1")
    found = counts.status((0,) * 5)
    reasons = {one.reason: one.count for one in found.refusals}
    assert len(reasons) == len(found.steps) == MAX_NAMES + 1
    assert (reasons["other"], reasons["reason 1"]) == (5, 2)
    assert names(found.steps)["other"] == 5
    control = OvercommitCounts()
    control.refused("a\x1b[31m" + "x" * 100)
    (refusal,) = control.status((0,) * 5).refusals
    assert refusal.reason.isprintable()
    assert len(refusal.reason) <= 32
