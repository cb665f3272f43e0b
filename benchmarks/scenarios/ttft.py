"""Part ``ttft``: from the start of a process to its first token, with a warm compile cache."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.figures import Figures
from benchmarks.harness.node import Node
from benchmarks.harness.pairs import KINDS
from benchmarks.scenarios.gpu_engines import BATCH, FULL, FULL_KV_MIB, GpuBench, check_attached

STARTS = 3
"""Processes of each kind. The first fills the compile cache and the store, and is not counted."""


def ttft(bench: GpuBench) -> Figures:
    """Start fresh processes, stock and wooly in turn."""
    found = Figures()
    took: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with Node() as node:
        for number in range(STARTS):
            for kind in KINDS:
                child = bench.engine(node, kind, FULL, FULL_KV_MIB, batch=BATCH, gate=False)
                imported, ready = child.wait("imported"), child.wait("ready", 400)
                child.end()
                if number:
                    check_attached(child, ready)
                    times = {"first_token": ready["first_token"], "imported": imported["at"]}
                    took[kind].append({key: at - child.spawned for key, at in times.items()})
    for kind, starts in took.items():
        found.put(f"ttft_{kind}_s", [each["first_token"] for each in starts])
        found.put(f"ttft_import_{kind}_s", [each["imported"] for each in starts])
    return found
