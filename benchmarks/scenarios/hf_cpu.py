"""The benchmark ``hf`` on a CPU: memory and load time of processes, by scenario."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from support.models.cache import CACHE

from benchmarks.harness.figures import median_of
from benchmarks.harness.machine import commit, host, packages, today, wooly
from benchmarks.harness.node import Node
from benchmarks.harness.pairs import KINDS
from benchmarks.harness.results import RESULTS, read, write
from benchmarks.models.hf import SCENARIOS, Scenario
from benchmarks.scenarios.hf_processes import COUNTS, fill_page_cache, launch


def run(scenarios: Iterable[str], out: Path | None) -> None:
    """Measure scenarios, and write the results after each."""
    file = out or RESULTS / "cpu-hf.json"
    versions = {"date": today(), **host(), **wooly(), **packages("torch", "transformers", "peft", "safetensors")}
    for scenario in SCENARIOS:
        if scenario.name in scenarios:
            began = time.monotonic()
            found = measure(scenario)
            result = read(file)
            measured = {**result.get("versions", {}).get("measured", {}), scenario.name: commit()}
            write(file, result | {"versions": {**versions, "measured": measured}, scenario.name: found})
            print(f"{scenario.name} ({time.monotonic() - began:.0f} s): {json.dumps(found['ratios'])}", flush=True)


def measure(scenario: Scenario) -> dict[str, Any]:
    """Return the figures of both kinds of processes in a scenario, and their ratios."""
    model = scenario.make(CACHE).resolve()
    fill_page_cache(model)
    found: dict[str, Any] = {"what": scenario.what}
    answers: dict[str, list[Any]] = {}
    for kind in KINDS:
        found[kind], answers[kind] = _measure_kind(scenario, model, kind)
    found["answers_equal"] = answers["stock"] == answers["wooly"]
    found["ratios"] = {
        f"{name}_{count}_ratio": round(found["wooly"][f"{name}_{count}"] / found["stock"][f"{name}_{count}"], 4)
        for name in ("pss", "added")
        for count in COUNTS
        if found["stock"][f"{name}_{count}"] > 0
    }
    for kind in KINDS:
        found["ratios"][f"peak_to_weights_{kind}"] = round(found[kind]["peak_added"] / found[kind]["weight_bytes"], 4)
    found["ratios"]["load_ratio"] = round(found["wooly"]["load_s"]["median"] / found["stock"]["load_s"]["median"], 4)
    return found


def _measure_kind(scenario: Scenario, model: Path, kind: str) -> tuple[dict[str, Any], list[Any]]:
    """Load in one process after the other, measuring at each of ``COUNTS``; return the figures and the answers."""
    found: dict[str, Any] = {}
    loads: list[dict[str, Any]] = []
    with Node() as node:
        processes = [
            launch(node, kind, number, model, dtype=scenario.dtype, adapter=number if scenario.adapters else None)
            for number in range(max(COUNTS))
        ]
        imported = [_total(process.wait("imported")) for process in processes]
        for count, process in enumerate(processes, 1):
            if count == 1:
                process.tell("load")
                found["peak_added"] = _peak_growth(process.pid, process.has_event)
                loads.append(process.wait("loaded"))
            else:
                loads.append(process.ask("load", "loaded"))
            if count in COUNTS:
                parts = [each.ask("memory") for each in processes[:count]]
                total = sum(map(_total, parts))
                if kind == "wooly":
                    total += _store_bytes(node, sum(part["segments"] for part in parts))
                found[f"pss_{count}"] = total
                found[f"added_{count}"] = total - sum(imported[:count])
    seconds = [each["load_s"] for each in loads]
    if kind == "wooly":
        found["publish_s"], *seconds = seconds
    found["load_s"] = median_of(seconds)
    found["weight_bytes"] = loads[0]["weights"]
    return found, [(each["answer"], each["tokens"]) for each in loads]


def _peak_growth(pid: int, done: Callable[[], bool]) -> int:
    """Sample a process's memory until ``done()``; return the maximum minus the first sample, in bytes."""
    first = most = _anonymous_bytes(pid)
    while not done():
        most = max(most, _anonymous_bytes(pid))
        time.sleep(0.001)
    return most - first


def _anonymous_bytes(pid: int) -> int:
    """Return the bytes of a process that no file backs: its anonymous memory, and segments that it has fds of."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    own = next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))
    segments: dict[int, int] = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            if fd.readlink().name.startswith("memfd:wooly"):
                found = fd.stat()
                segments[found.st_ino] = found.st_blocks * 512
    return own + sum(segments.values())


def _total(memory: dict[str, Any]) -> int:
    """Return the sum (bytes) of a process's memory report."""
    return int(memory["allocated"] + memory["segments"] + memory["files"])


def _store_bytes(node: Node, mapped: int) -> int:
    """Return the memory (bytes) of the store's processes, plus resident bytes that no process maps."""
    status = node.status()
    pids = [status.store.pid]
    for pid in pids:  # grows while iterating: descendants are appended
        for task in Path(f"/proc/{pid}/task").iterdir():
            pids += map(int, (task / "children").read_text(encoding="ascii").split())
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines() for pid in pids]
    own = sum(int(line.split()[1]) * 1024 for lines in rollups for line in lines if line.startswith("Pss:"))
    return own + max(0, status.totals.resident_bytes - mapped)
