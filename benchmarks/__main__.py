"""Run a benchmark: ``python benchmarks NAME [OPTIONS]``. Without a name, list the benchmarks.

Works from any directory and with any interpreter that finds wooly. An installed wooly comes before the one in this
repository, so that tests of the built wheel can run benchmarks on it. Python adds this folder to the import path; this
module adds ``tests``, for ``support``, and the repository, for ``benchmarks`` itself.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = {
    "demo": ("benchmarks.scenarios.demo", "two vLLM servers on one copy of a model's weights"),
    "demo-overcommit": ("benchmarks.scenarios.demo_overcommit", "three models in the memory of one and a half"),
    "cpu": ("benchmarks.scenarios.cpu", "vLLM on a CPU: memory, load time, decode speed"),
    "load_path": ("benchmarks.scenarios.load_path", "whole loads of publishers and readers, in their parts"),
    "gpu": ("benchmarks.scenarios.gpu", "vLLM on a GPU: loading, memory, speed, capacity"),
    "digest": ("benchmarks.scenarios.digest", "digests of GPU memory (a part of gpu)"),
    "hf": ("benchmarks.scenarios.hf", "transformers: memory of 1 to 8 processes, load time, speed"),
    "disk": ("benchmarks.scenarios.disk", "saving, restoring and verifying models"),
    "store": ("benchmarks.scenarios.store", "attaches per second, latency, CPU time and memory of the store"),
    "scale": ("benchmarks.scenarios.scale", "cost of requests by the numbers of models, blobs and clients"),
    "activity": ("benchmarks.scenarios.activity", "cost of an engine's activity page, per step and per read"),
    "recovery": ("benchmarks.scenarios.recovery", "time to recover after the store is killed"),
    "compaction": (
        "benchmarks.scenarios.compaction",
        "dead bytes after models are removed, and the cost of compaction",
    ),
    "private": ("benchmarks.scenarios.private", "the steps of a move of private memory, without an engine"),
    "pushes": ("benchmarks.scenarios.pushes", "requests of the store while a client waits, and cancels"),
    "fuzz": ("benchmarks.scenarios.fuzz", "damaged conversations of the protocol, with descriptors"),
    "overcommit_sim": ("benchmarks.scenarios.overcommit_sim", "the overcommit policy on a simulated fleet"),
    "compute_sim": ("benchmarks.scenarios.compute_sim", "turns on simulated devices, against other ways to share one"),
    "overcommit": ("benchmarks.scenarios.overcommit", "swaps, returns, density and a mix of models on a GPU"),
    "compute": (
        "benchmarks.scenarios.compute",
        "workloads that share a device: by priority and share, beside other ways",
    ),
    "canary": ("benchmarks.scenarios.canary", "writes to weights after loading, for all random models"),
    "soak": ("benchmarks.soak.command", "clients that die at random, then an exact count"),
    "parity": ("benchmarks.parity.command", "stock vLLM, publisher and reader compared; writes docs/parity.md"),
    "model": ("support.models.large_llama", "make or fine-tune the GPU benchmark's model"),
    "summary": ("benchmarks.report.summary", "all results in one file"),
    "plot": ("benchmarks.report.plot", "SVG plots of the results"),
}
"""Module and description of each command."""

WORKERS = {
    "engine-worker": "benchmarks.workers.engine",
    "cpu-worker": "benchmarks.workers.cpu",
    "load-path-worker": "benchmarks.workers.load_path",
    "gpu-worker": "benchmarks.workers.gpu",
    "overcommit-worker": "benchmarks.workers.overcommit",
    "compute-engine-worker": "benchmarks.workers.compute_engine",
    "compute-steps-worker": "benchmarks.workers.compute_steps",
    "hf-worker": "benchmarks.workers.hf",
    "disk-worker": "benchmarks.workers.disk",
    "store-worker": "benchmarks.workers.store",
    "scale-worker": "benchmarks.workers.scale",
    "parity-worker": "benchmarks.parity.worker",
    "soak-worker": "benchmarks.soak.worker",
}
"""Module of each process that a benchmark starts; see ``harness/processes.py``."""


def main(arguments: list[str]) -> None:
    """Import the module of a command, and run its ``main`` with the remaining arguments."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: python benchmarks NAME [OPTIONS]\n")
        for command, (_, description) in COMMANDS.items():
            print(f"  {command:<17}{description}")
        print("\npython benchmarks NAME --help describes the options and figures of a benchmark.")
        return
    module = COMMANDS[name][0] if name in COMMANDS else WORKERS.get(name)
    if module is None:
        sys.exit(f"unknown benchmark {name!r}; valid names: {', '.join(COMMANDS)}")
    sys.argv = [f"benchmarks {name}", *arguments[1:]]
    importlib.import_module(module).main()


if __name__ == "__main__":
    sys.path += [str(ROOT / "tests"), str(ROOT)]
    main(sys.argv[1:])
