"""transformers with and without wooly: memory of 1, 2, 4 and 8 processes, time to load, and speed; on a CPU or a GPU.

On a CPU five ways to load a model are measured (``hf_models.py``). Each kind, stock and wooly, has eight processes
that import first and load one after the other. ``pss_N``: proportional set sizes of the N that have loaded, run once,
and read all weights, libraries left out; with wooly, its store's processes and segments that nobody maps are added.
``added_N``: the same, less what the processes held before they loaded. ``load_s``: `from_pretrained`, files in the page
cache; ``publish_s``: of the first process with wooly, which digests the checkpoint, loads, and publishes.
``peak_added``: the most memory without a file that the first process took while it loaded, its segments in the store
included, sampled every millisecond or so; with wooly it publishes.

Stock loading of safetensors that needs no conversion maps the file, so that its processes share the page cache: that is
the baseline of ``smollm2_bf16``, and there is nothing to win there but what is said.

    python benchmarks/bench_hf.py [--scenarios smollm2_bf16,...] [--out benchmarks/results/cpu-hf.json]
    python benchmarks/bench_hf.py --gpu [--parts memory,speed] [--model DIR] [--out FILE]

On a GPU the model is the one of ``bench_gpu.py`` (9.08 GB, made if nothing is there), and results are merged into
``results/GPU/hf.json`` after each part:

memory     ``hf_vram_N_*_mib``: GPU memory that N processes with the model cost, contexts and the store included.
           ``hf_load_s``: stock; ``hf_publish_s``: wooly's first process; ``hf_attach_s``: the others.
speed      two live processes in turns: ``generate``, 8 prompts x 128 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import bench_gpu
import gpu_model
from bench_gpu import Findings
from checkpoints import CACHE
from gpu_processes import MIB, Child, ChildError, Node, used_mib
from hf_models import SCENARIOS, Scenario

HERE = Path(__file__).resolve().parent
COUNTS = (1, 2, 4, 8)
KINDS = ("stock", "wooly")
BATCH, TOKENS, PAIRS = 8, 128, 5

SCRIPT = HERE / "hf_process.py"


def start(node: Node, kind: str, number: int, model: Path, **job: Any) -> Child:
    """A process that will hold the model."""
    full = {"model": str(model), "wooly": kind == "wooly", "device": "cpu", "dtype": "bfloat16", "adapter": None}
    return node.start(f"{kind} {number}", "model", {**full, **job}, WOOLY_STRICT="1")


def fill_page_cache(model: Path) -> None:
    """Read every file once."""
    for file in model.iterdir():
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


# On a CPU.


def measure(scenario: Scenario) -> dict[str, Any]:
    """Both kinds of processes; the figures of one scenario."""
    model = scenario.make(CACHE).resolve()
    fill_page_cache(model)
    found: dict[str, Any] = {"what": scenario.what}
    answers: dict[str, list[Any]] = {}
    for kind in KINDS:
        found[kind], answers[kind] = chain(scenario, model, kind)
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


def chain(scenario: Scenario, model: Path, kind: str) -> tuple[dict[str, Any], list[Any]]:
    """Processes that load one after the other, measured at every count; and what they answered."""
    found: dict[str, Any] = {}
    loads: list[dict[str, Any]] = []
    with Node(SCRIPT) as node:
        processes = [
            start(node, kind, number, model, dtype=scenario.dtype, adapter=number if scenario.adapters else None)
            for number in range(max(COUNTS))
        ]
        held = [sum_of(process.hear("imported")) for process in processes]
        for count, process in enumerate(processes, 1):
            if count == 1:
                process.tell("load")
                found["peak_added"] = peak_until(process.heard, process.pid)
                loads.append(process.hear("loaded"))
            else:
                loads.append(process.ask("load", "loaded"))
            if count in COUNTS:
                parts = [each.ask("memory") for each in processes[:count]]
                total = sum(map(sum_of, parts))
                if kind == "wooly":
                    total += beside(node, sum(part["segments"] for part in parts))
                found[f"pss_{count}"] = total
                found[f"added_{count}"] = total - sum(held[:count])
    seconds = [each["load_s"] for each in loads]
    if kind == "wooly":
        found["publish_s"], *seconds = seconds
    found["load_s"] = {"median": statistics.median(seconds), "all": seconds}
    found["weight_bytes"] = loads[0]["weights"]
    return found, [(each["answer"], each["tokens"]) for each in loads]


def peak_until(done: Callable[[], bool], pid: int) -> int:
    """The most memory (bytes) that a process held until something is done, over what it held at first."""
    first = most = unfiled(pid)
    while not done():
        most = max(most, unfiled(pid))
        time.sleep(0.001)
    return most - first


def unfiled(pid: int) -> int:
    """Bytes of a process's memory that no file on a disk is behind: its own, and the segments that it has fds of."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    own = next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))
    segments: dict[int, int] = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if fd.readlink().name.startswith("memfd:wooly"):
                found = fd.stat()
                segments[found.st_ino] = found.st_blocks * 512
    return own + sum(segments.values())


def sum_of(memory: dict[str, Any]) -> int:
    """Bytes that a process answers for."""
    return int(memory["allocated"] + memory["segments"] + memory["files"])


def beside(node: Node, mapped: int) -> int:
    """Bytes that sharing costs beside the processes: the store's own, and those of its segments that nobody maps."""
    status = node.status()
    pids = [status.store.pid]
    for pid in pids:  # grows meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            pids += map(int, (task / "children").read_text(encoding="ascii").split())
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines() for pid in pids]
    own = sum(int(line.split()[1]) * 1024 for lines in rollups for line in lines if line.startswith("Pss:"))
    return own + max(0, status.totals.resident_bytes - mapped)


def on_cpu(arguments: argparse.Namespace) -> None:
    """Measure the scenarios that are asked for, writing results after each."""
    out: Path = arguments.out or HERE / "results" / "cpu-hf.json"
    for scenario in SCENARIOS:
        if scenario.name in arguments.scenarios:
            began = time.monotonic()
            found = measure(scenario)
            result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
            measured = {**result.get("versions", {}).get("measured", {}), scenario.name: bench_gpu.commit()}
            result |= {"versions": {**cpu_versions(), "measured": measured}, scenario.name: found}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{scenario.name} ({time.monotonic() - began:.0f} s): {json.dumps(found['ratios'])}", flush=True)


def cpu_versions() -> dict[str, Any]:
    """What was measured, and where."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": next(line for line in lines if "model name" in line).split(":")[1].strip(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("wooly", "torch", "transformers", "peft", "safetensors")},
    }


# On a GPU.


def memory(model: Path) -> Findings:
    """Processes of each kind until there are eight, or until one fails: then that is the limit."""
    found = Findings()
    seconds: dict[str, list[float]] = {}
    answers = []
    for kind in KINDS:
        with Node(SCRIPT) as node:
            processes = [start(node, kind, number, model, device="cuda:0") for number in range(max(COUNTS))]
            for process in processes:
                process.hear("imported")
            idle, seconds[kind] = used_mib(), []
            for count, process in enumerate(processes, 1):
                try:
                    loaded = process.ask("load", "loaded", 120)
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
    found.numbers["hf_model_mib"] = round(gpu_model.weight_bytes(model) / MIB, 1)
    return found


def speed(model: Path) -> Findings:
    """Pairs of runs, stock first in every other pair; ratios are taken within a pair."""
    found = Findings()
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with Node(SCRIPT) as node:
        publisher, stock, reader = (
            start(node, kind, number, model, device="cuda:0") for number, kind in enumerate(("wooly", "stock", "wooly"))
        )
        for process in (publisher, stock, reader):
            process.hear("imported")
            process.ask("load", "loaded", 120)
            if process is publisher:
                process.end()  # the model stays in the store
        living = {"stock": stock, "wooly": reader}
        for pair in range(PAIRS + 1):  # the first one warms up
            for kind in KINDS if pair % 2 else reversed(KINDS):
                run = living[kind].ask(f"generate {BATCH} {TOKENS}", "generated")
                if pair:
                    runs[kind].append(run)
    rates = {kind: [run["count"] / run["seconds"] for run in runs[kind]] for kind in KINDS}
    for kind, values in rates.items():
        found.put(f"hf_tok_s_{kind}", values)
    found.put("hf_tok_s_ratio", [wooly / stock for stock, wooly in zip(rates["stock"], rates["wooly"], strict=True)])
    first = runs["stock"][0]["tokens"]
    found.numbers["hf_tokens_equal"] = all(run["tokens"] == first for kind in KINDS for run in runs[kind])
    for kind in KINDS:  # where tokens differ: whether a kind differs from itself as well
        own = runs[kind][0]["tokens"]
        found.numbers[f"hf_runs_as_the_first_stock_{kind}"] = sum(run["tokens"] == first for run in runs[kind])
        found.numbers[f"hf_runs_as_its_own_first_{kind}"] = sum(run["tokens"] == own for run in runs[kind])
        found.raw[f"hf_first_difference_{kind}"] = [first_difference(run["tokens"], first) for run in runs[kind]]
    return found


def first_difference(tokens: list[list[int]], others: list[list[int]]) -> int | None:
    """The first step of decoding in which any of a batch's answers differ."""
    steps = zip(zip(*tokens, strict=True), zip(*others, strict=True), strict=True)
    return next((step for step, (found, wanted) in enumerate(steps) if found != wanted), None)


PARTS: dict[str, Callable[[Path], Findings]] = {part.__name__: part for part in (memory, speed)}


def on_gpu(arguments: argparse.Namespace) -> None:
    """Measure the parts that are asked for, writing results after each."""
    try:
        facts = bench_gpu.versions() | {"transformers": metadata.version("transformers")}
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"this needs an NVIDIA GPU: {error}") from error
    out = arguments.out or HERE / "results" / bench_gpu.machine(facts["gpu"]) / "hf.json"
    model: Path = arguments.model.resolve()
    # In a process of its own, so that this one has no CUDA context.
    subprocess.run([sys.executable, str(HERE / "gpu_model.py"), "make", str(model)], check=True)
    fill_page_cache(model)
    failed = []
    for part in arguments.parts:
        began = time.monotonic()
        try:
            found = PARTS[part](model)
        except ChildError as error:
            failed.append(part)
            print(f"{part}: failed after {time.monotonic() - began:.0f} s: {error}", flush=True)
            continue
        bench_gpu.merge(out, part, found, time.monotonic() - began, facts)
        print(f"{part} ({time.monotonic() - began:.0f} s): {json.dumps(found.numbers)}", flush=True)
    if failed:
        raise SystemExit(f"without a result: {', '.join(failed)}")


def some_of(names: list[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in names]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(names)}")
        return text.split(",")

    return parse


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scenarios, parts = [each.name for each in SCENARIOS], list(PARTS)
    parser.add_argument("--gpu", action="store_true", help="measure on the first NVIDIA GPU")
    parser.add_argument("--scenarios", type=some_of(scenarios), default=scenarios, help="on a CPU; all by default")
    parser.add_argument("--parts", type=some_of(parts), default=parts, help="on a GPU; all by default")
    parser.add_argument("--model", type=Path, default=Path("/tmp/wooly-bench-model"), help="on a GPU; made if missing")
    parser.add_argument("--out", type=Path, help="the file of the results")
    arguments = parser.parse_args()
    (on_gpu if arguments.gpu else on_cpu)(arguments)


if __name__ == "__main__":
    main()
