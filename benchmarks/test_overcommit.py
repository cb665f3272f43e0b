"""Parts of the benchmark ``overcommit`` that need no engine: joined results, arrivals, the script of ``mix_sleep``."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness.figures import Figures
from benchmarks.harness.results import join, merge, read
from benchmarks.scenarios.overcommit_mix import Script, arrivals
from benchmarks.scenarios.overcommit_setup import ON_CPU, Setup

SETUP = Setup("cpu", 1 << 40, Path("/nowhere"), Path("/nowhere"), ON_CPU, 1, 1, 1.0, 0.5, 60.0)


def test_joined_files_have_the_parts_of_all_and_the_later_one_of_each(tmp_path: Path) -> None:
    first, second, target = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "all.json"
    versions = {"gpu": "one"}
    merge(first, "swap", Figures({"out_s": 1, "old": 2}, {"out_s": [1]}), 3.0, versions)
    merge(first, "deep", Figures({"deep_s": 4}), 3.0, versions)
    merge(second, "swap", Figures({"out_s": 5}, {"out_s": [5]}), 3.0, {**versions, "driver": "newer"})
    join([first, second], target)
    found = read(target)
    assert (found["out_s"], found["deep_s"], found["raw"]) == (5, 4, {"out_s": [5]})
    assert "old" not in found
    assert found["parts"]["swap"]["versions"] == {"gpu": "one", "driver": "newer"}
    assert "versions" not in found["parts"]["deep"]


def test_files_of_different_gpus_are_not_joined(tmp_path: Path) -> None:
    for name in ("one", "other"):
        merge(tmp_path / name, "swap", Figures({"out_s": 1}), 3.0, {"gpu": name})
    with pytest.raises(SystemExit, match="another kind of GPU"):
        join([tmp_path / "one", tmp_path / "other"], tmp_path / "all")


def test_arrivals_are_ordered_equal_for_all_ways_and_of_every_model() -> None:
    trace = arrivals(SETUP)
    assert trace == arrivals(SETUP) != arrivals(SETUP, seed=2)
    assert [one.at for one in trace] == sorted(one.at for one in trace)
    assert {one.model for one in trace} == {0, 1, 2, 3}
    assert len(arrivals(replace(SETUP, rate=1.0))) > len(trace)


def test_script_keeps_what_fits_awake_and_never_puts_one_with_requests_to_sleep() -> None:
    script = Script([0, 1, 2], fit=2, call=lambda model, path: calls.append((model, path)))
    calls: list[tuple[int, str]] = []
    with script.ready(0):
        with script.ready(1), script.ready(0):
            pass
        with script.ready(2):  # 1 has no requests, 0 has
            pass
    assert calls == [(0, "/wake_up"), (1, "/wake_up"), (1, "/sleep?level=1"), (2, "/wake_up")]


def test_script_lets_a_request_wait_until_a_server_has_none() -> None:
    script = Script([0, 1], fit=1, call=lambda _model, _path: None)
    entered = threading.Event()

    def ask() -> None:
        with script.ready(1):
            entered.set()

    with script.ready(0):
        thread = threading.Thread(target=ask)
        thread.start()
        assert not entered.wait(0.05)
    thread.join(10)
    assert entered.is_set()
    assert script.swaps == 1
