"""Part ``capacity``: engines that run at the same time, and the speed of all of them together."""

from __future__ import annotations

import time

from benchmarks.harness.figures import Figures
from benchmarks.harness.gpu import nvidia_smi
from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child, ChildError, end_all
from benchmarks.scenarios.gpu_engines import SMALL, GpuBench

AT_ONCE = {"stock": 1, "wooly": 4}
"""Engines that load at the same time. Stock engines load one by one, so that their peaks do not add up."""
IMPORT_AHEAD = 4
"""Processes that import vLLM before it is their turn: importing takes longest, and no GPU memory."""
DECODE_TIMEOUT_S = 120.0
"""For one run of one engine. It takes seconds, also while dozens of engines share the GPU."""
RUNS = 3


def capacity(bench: GpuBench) -> Figures:
    """Start stock engines until one fails, then wooly's; let all of a kind decode at the same time."""
    found = Figures()
    deadline = time.monotonic() + bench.budget_s
    for name, at_once in AT_ONCE.items():
        with Node() as node:
            put_capacity(found, name, *start_engines(bench, node, name, at_once, deadline))
    found.numbers["capacity_kv_mib"] = bench.kv_mib
    return found


def put_capacity(found: Figures, name: str, running: list[Child], ended_by: str) -> None:
    """Record the number of engines and their aggregate speed. Raises :class:`ChildError` if none runs."""
    if not running:
        raise ChildError(f"no engine started: {ended_by}")
    rates, running = _decode_together(running)
    bounded = ended_by in ("budget", "max-engines")
    found.numbers[f"replicas_{name}_at_least" if bounded else f"replicas_{name}"] = len(running)
    found.raw[f"capacity_{name}_ended_by"] = ended_by
    found.put(f"aggregate_tok_s_{name}", rates)


def start_engines(
    bench: GpuBench, node: Node, name: str, at_once: int, deadline: float, environment: dict[str, str] | None = None
) -> tuple[list[Child], str]:
    """Start engines until one fails, ``bench.max_engines`` run, or the deadline passes.

    Returns:
        The engines that are ready, and the reason for the end: the error, ``budget`` or ``max-engines``.
    """
    running: list[Child] = []
    importing: list[Child] = []
    starting: list[Child] = []
    made, ended_by = 0, "max-engines"
    few_threads = {"OMP_NUM_THREADS": "1", **(environment or {})}  # dozens of engines share the cores
    while True:
        while made < bench.max_engines and len(importing) < at_once + IMPORT_AHEAD:
            importing.append(
                bench.engine(node, f"{name} {made}", SMALL, bench.kv_mib, environment=few_threads, warm=True)
            )
            made += 1
        while importing and len(starting) < at_once:
            starting.append(importing.pop(0))
            starting[-1].wait("imported")
            starting[-1].tell("start")
        if not starting:
            break
        child = starting.pop(0)
        try:
            child.wait("ready", deadline - time.monotonic())
            running.append(child)
            print(f"  {len(running)} {name}: {nvidia_smi('memory.used')} MiB in use", flush=True)
        except ChildError as error:
            late = time.monotonic() >= deadline
            ended_by = "budget" if late else str(error).partition("\n")[0]
            # Engines that began to start before the failure may still fit: they count if they are ready in time.
            running += [other for other in starting if _becomes_ready(other, deadline)]
            end_all(other for other in (child, *starting, *importing) if other not in running)
            break
    return running, ended_by


def _becomes_ready(child: Child, deadline: float) -> bool:
    try:
        child.wait("ready", deadline - time.monotonic())
    except ChildError:
        return False
    return True


def _decode_together(running: list[Child]) -> tuple[list[float], list[Child]]:
    """Measure tokens per second of all engines together, from the first one's start to the last one's end.

    If an engine fails, the others start over without it.

    Returns:
        The rates of ``RUNS`` runs, and the engines that took part in all of them.
    """
    rates: list[float] = []
    while running and len(rates) < RUNS:
        for child in running:
            child.tell("decode")
        runs, still = [], []
        for child in running:
            try:
                runs.append(child.wait("decode", DECODE_TIMEOUT_S))
                still.append(child)
            except ChildError as error:
                print(f"  {str(error).partition(chr(10))[0]}", flush=True)
        if len(still) < len(running):
            rates, running = [], still
            continue
        lasted = max(run["ended"] for run in runs) - min(run["began"] for run in runs)
        rates.append(sum(run["count"] for run in runs) / lasted)
    if not running:
        raise ChildError("no engine answered")
    return rates, running
