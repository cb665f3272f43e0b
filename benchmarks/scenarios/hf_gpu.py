"""The benchmark ``hf`` on a GPU: memory of up to eight processes, and speed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from support.models import large_llama as llama

from benchmarks.harness.figures import MIB, Figures
from benchmarks.harness.gpu import used_mib
from benchmarks.harness.machine import packages, required_gpu_stack
from benchmarks.harness.node import Node
from benchmarks.harness.pairs import KINDS, put_rates, run_pairs
from benchmarks.harness.parts import run_parts
from benchmarks.harness.processes import ChildError
from benchmarks.harness.results import gpu_file
from benchmarks.scenarios.hf_processes import COUNTS, fill_page_cache, launch

BATCH, TOKENS = 8, 128
LOAD_TIMEOUT_S = 120


def memory(model: Path) -> Figures:
    """Load in processes of each kind until there are eight or one runs out of memory."""
    found = Figures()
    seconds: dict[str, list[float]] = {}
    answers = []
    for kind in KINDS:
        with Node() as node:
            processes = [launch(node, kind, number, model, device="cuda:0") for number in range(max(COUNTS))]
            for process in processes:
                process.wait("imported")
            idle, seconds[kind] = used_mib(), []
            for count, process in enumerate(processes, 1):
                try:
                    loaded = process.ask("load", "loaded", LOAD_TIMEOUT_S)
                except ChildError as error:
                    if not seconds[kind] or "out of memory" not in str(error):
                        raise
                    found.numbers[f"hf_processes_{kind}"] = len(seconds[kind])
                    break
                seconds[kind].append(loaded["load_s"])
                answers.append((loaded["answer"], loaded["tokens"]))
                if count in COUNTS:
                    found.numbers[f"hf_vram_{count}_{kind}_mib"] = used_mib() - idle
    found.put("hf_load_s", seconds["stock"])
    publish, *attach = seconds["wooly"]
    found.numbers["hf_publish_s"] = round(publish, 4)
    found.put("hf_attach_s", attach)
    found.numbers["hf_answers_equal"] = all(each == answers[0] for each in answers)
    found.numbers["hf_model_mib"] = round(llama.weight_bytes(model) / MIB, 1)
    return found


def speed(model: Path) -> Figures:
    """Generate in two running processes, in pairs."""
    found = Figures()
    with Node() as node:
        publisher, stock, reader = (
            launch(node, kind, number, model, device="cuda:0")
            for number, kind in enumerate(("wooly", "stock", "wooly"))
        )
        for process in (publisher, stock, reader):
            process.wait("imported")
            process.ask("load", "loaded", LOAD_TIMEOUT_S)
            if process is publisher:
                process.end()  # the model remains in the store
        running = {"stock": stock, "wooly": reader}
        runs = run_pairs(lambda kind: running[kind].ask(f"generate {BATCH} {TOKENS}", "generated"))
    put_rates(found, "hf_tok_s", "hf_tok_s_ratio", runs, lambda run: float(run["seconds"]))
    first = runs["stock"][0]["tokens"]
    found.numbers["hf_tokens_equal"] = all(run["tokens"] == first for kind in KINDS for run in runs[kind])
    for kind in KINDS:  # tells a difference between kinds from a kind that is not deterministic
        own = runs[kind][0]["tokens"]
        found.numbers[f"hf_runs_as_the_first_stock_{kind}"] = sum(run["tokens"] == first for run in runs[kind])
        found.numbers[f"hf_runs_as_its_own_first_{kind}"] = sum(run["tokens"] == own for run in runs[kind])
        found.raw[f"hf_first_difference_{kind}"] = [first_difference(run["tokens"], first) for run in runs[kind]]
    return found


def first_difference(tokens: list[list[int]], others: list[list[int]]) -> int | None:
    """Return the first decoding step in which any answers of a batch differ; None if all are equal."""
    steps = zip(zip(*tokens, strict=True), zip(*others, strict=True), strict=True)
    return next((step for step, (found, wanted) in enumerate(steps) if found != wanted), None)


PARTS: dict[str, Callable[[Path], Figures]] = {part.__name__: part for part in (memory, speed)}


def run(model: Path, selected: Iterable[str], out: Path | None) -> None:
    """Run parts, and write the results after each."""
    facts = required_gpu_stack() | packages("transformers")
    llama.run("make", str(model))
    fill_page_cache(model)
    parts = {name: functools.partial(part, model) for name, part in PARTS.items()}
    run_parts(parts, selected, out or gpu_file(facts["gpu"], "hf.json"), facts)
