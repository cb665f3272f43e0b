"""Part ``mps``: wooly's engines with NVIDIA's Multi-Process Service, and as many without it."""

from __future__ import annotations

import time
from dataclasses import replace

from benchmarks.harness.figures import Figures
from benchmarks.harness.gpu import Mps
from benchmarks.harness.node import Node
from benchmarks.scenarios.capacity import AT_ONCE, put_capacity, start_engines
from benchmarks.scenarios.gpu_engines import GpuBench


def mps(bench: GpuBench) -> Figures:
    """Start engines with the service, then the same number without it, and compare their aggregate speed."""
    found = Figures()
    deadline, at_once = time.monotonic() + bench.budget_s, AT_ONCE["wooly"]
    with Node() as node, Mps(node.scratch) as service:
        running, ended_by = start_engines(bench, node, "wooly_mps", at_once, deadline, service.environment)
        put_capacity(found, "wooly_mps", running, ended_by)
        node.end_all()
        node.stop()  # the service stops after its last client; the store, started by an engine, is a client
    with Node() as node:
        same_number = replace(bench, max_engines=len(running))
        running, ended_by = start_engines(same_number, node, "wooly_without_mps", at_once, deadline)
        put_capacity(found, "wooly_without_mps", running, ended_by)
    with_service, without = (found.numbers[f"aggregate_tok_s_wooly_{kind}"] for kind in ("mps", "without_mps"))
    found.numbers["mps_ratio"] = with_service / without
    return found
