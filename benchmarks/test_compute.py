"""Parts of the benchmark ``compute`` that need no engine: arrivals, aims, comparisons, plots, and synthetic steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.processes import ChildError, wait_until
from benchmarks.report.plot import compute_ways as draw
from benchmarks.scenarios.compute import GROUPS, PARTS
from benchmarks.scenarios.compute_aims import AIMS, Aim, compared, lines
from benchmarks.scenarios.compute_setup import HOLD_0, ON_CPU, PLAIN, WAYS, Setup, arrivals, window
from benchmarks.workers.compute_engine import _covered

SETUP = Setup("cpu", 1 << 40, max(os.sched_getaffinity(0)), Path("/nowhere"), ON_CPU, 2)
PIECES = {"decode": 4, "prefill": 40}


def test_arrivals_are_a_trace_of_the_rate_and_equal_for_equal_seeds() -> None:
    trace = arrivals(50.0, 20.0, seed=1)
    assert trace == arrivals(50.0, 20.0, seed=1) != arrivals(50.0, 20.0, seed=2)
    assert trace == sorted(trace)
    assert 0 < trace[0] < trace[-1] < 20
    assert 850 < len(trace) < 1150


def test_time_with_requests_counts_once_where_they_overlap() -> None:
    assert _covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0


def test_throughput_is_compared_with_time_slicing_as_far_as_both_were_measured() -> None:
    result = {"steps_plain_together": 1.0, "steps_hold_0_together": 0.98, "engines_hold_0_together": 1.0}
    assert compared(result).numbers == {"steps_hold_0_together_of_plain": 0.98}


def test_aims_say_which_figure_misses_its_limit() -> None:
    assert Aim("ratio", most=1.1).line(1.1) == "ratio: 1.1 (at most 1.1)"
    assert Aim("least", least=0.8).line(0.5) == "least: 0.5 (at least 0.8: not met)"
    assert lines({"steps_shares_two_points": 7.0}) == ["steps_shares_two_points: 7 (at most 5: not met)"]
    assert len({aim.figure for aim in AIMS}) == len(AIMS)


def test_groups_have_parts_and_a_cpu_has_none_with_mps() -> None:
    assert set(GROUPS["engines"]) == {f"engines_{way}" for way in WAYS}
    assert set(GROUPS["engines"]) | set(GROUPS["cpu"]) <= set(PARTS)
    with pytest.raises(ChildError, match="needs a GPU"), SETUP.fleet(WAYS["mps"]):
        pass


def test_every_way_that_was_measured_is_drawn() -> None:
    figures = ("p50_ratio", "p99_ratio", "together", "requests_together")
    result: dict[str, Any] = {"versions": {"cpu": "a CPU"}}
    result |= {f"steps_{way}_{figure}": 1.0 for way in ("plain", "hold_0") for figure in figures}
    drawn = draw("cpu", result)
    assert set(drawn) == {"cpu_compute_steps", "cpu_compute_steps_together"}
    assert [label.get_text() for label in drawn["cpu_compute_steps"].axes[0].get_xticklabels()] == [
        "time slicing",
        "wooly",
    ]


def test_a_workload_of_synthetic_steps_is_held_while_a_more_important_one_works() -> None:
    """The processes of a measurement, with a store and its arbiter: windows have steps, and the gate holds."""
    with SETUP.fleet(HOLD_0) as fleet:
        first = fleet.steps("first", "decode", PIECES, priority=0)
        second = fleet.steps("second", "prefill", PIECES, priority=3)
        fleet.start()
        (alone,) = window(1.0, [(second, "load", {})])
        assert alone["count"] > 0
        answered = first.ask("requests", at=0.0, arrivals=[0.0, 0.01], tokens=3)
        assert (len(answered["first"]), len(answered["gaps"]), answered["count"]) == (2, 4, 6)
        assert first.ask("passes", count=100)["pass_s"] > 0
        tokens, _ = window(1.0, [(first, "tokens", {}), (second, "load", {})])
        assert tokens["count"] == len(tokens["gaps"]) > 0

        def held() -> bool:
            row = fleet.row("second").compute
            return row is not None and row.held_s > 0

        wait_until(held, "the arbiter to report that the less important workload was held")


def test_a_workload_without_the_arbiter_is_not_said_to_be_gated() -> None:
    with SETUP.fleet(PLAIN) as fleet:
        tenant = fleet.steps("plain", "decode", PIECES)
        fleet.start()
        assert tenant.ask("calibrate", seconds={"decode": 0.001})["pieces"]["decode"] > 0
        with fleet.node.session() as session:
            assert session.status().workloads == ()
