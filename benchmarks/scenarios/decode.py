"""Part ``decode``: decode and prefill speed of two running engines, stock and wooly, in pairs."""

from __future__ import annotations

from benchmarks.harness.figures import Figures
from benchmarks.harness.node import Node
from benchmarks.harness.pairs import KINDS, Runs, put_rates, run_pairs
from benchmarks.scenarios.gpu_engines import BATCH, FULL, FULL_KV_MIB, GpuBench, check_attached


def decode(bench: GpuBench) -> Figures:
    """Measure both engines, and compare their tokens."""
    found = Figures()
    with Node() as node:
        publisher = bench.engine(node, "publisher", FULL, FULL_KV_MIB)  # the model length is part of the key
        engines = {name: bench.engine(node, name, FULL, FULL_KV_MIB, batch=BATCH) for name in KINDS}
        for child in (publisher, *engines.values()):  # one after the other: each sizes itself by free memory
            child.wait("imported")
            ready = child.ask("start", "ready", 400)
            if child is publisher:
                child.end()  # the model remains in the store
            else:
                check_attached(child, ready)

        def measure(word: str) -> Runs:
            return run_pairs(lambda kind: engines[kind].ask(word))

        runs = {word: measure(word) for word in ("decode", "prefill")}
    for measured, by_kind in runs.items():
        put_rates(found, f"{measured}_tok_s", f"{measured}_ratio", by_kind, lambda run: run["ended"] - run["began"])
    answers = {name: [run["tokens"] for kind in KINDS for run in by_kind[kind]] for name, by_kind in runs.items()}
    found.numbers["tokens_equal"] = all(each == same[0] for same in answers.values() for each in same)
    found.numbers["tokens_distinct"] = len({token for answer in answers["decode"][0] for token in answer})
    return found
