"""Workloads that share a device: times per token, throughput, shares, and the cost of the gate.

On a GPU the model is Llama-shaped, random, bf16, 9.08 GB (``python benchmarks model``), made in ``--model`` if missing.
On a CPU (``--cpu``) the engines have a tiny model, and one core of the machine stands for the device: all workloads run
on it. Figures are merged into ``--out``: medians of windows by name, and under ``raw`` the windows. ``ratio``: beside
the other workload over alone, in neighbouring windows.

    python benchmarks compute --part steps,gate [--out FILE]
    python benchmarks compute --merge FILE... --out FILE

Ways: ``plain``: the driver (on a CPU: the kernel) slices time; ``hold_0``, ``hold_2``: wooly's arbiter, where a held
workload makes no step, or one every 2 s; ``mps``, ``mps_capped``: NVIDIA's Multi-Process Service, without and with a
cap of 25% of the threads for the less important workload, from its start on. A GPU's workloads are held only where
``shared_store/compute/support.py`` has GPUs.

steps         A workload of priority 0 with steps of 1.7 ms beside one of priority 3 with steps of 22 ms, ``plain``,
              ``hold_0`` and ``hold_2`` in turn: steps without pause, and Poisson requests of 32 steps that would keep
              it busy for 30% of the time alone. ``first``, ``second``: what each does by what it does alone;
              ``together``: their sum. ``requests_ttft``: from the arrival to the end of the first step. 9 minutes.
steps_mps     The same with MPS, each way by itself. 7 minutes.
steps_equals  Two and eight equals, without shares (``of_plain``: with the arbiter over without); two with shares of 75
              and 25 percent, also with steps of unlike length; eight with equal shares. ``points``: the largest
              distance from a share in percent points; ``least``: the least part of its share that a workload got, each
              in a window of 10 s. 5 minutes.
gate          Time in the gate by the time of a step, of a workload that is alone. 2 minutes.
engines_WAY   As ``steps``, for two engines of one model: one stream, Poisson requests of 128 tokens and 32 answered
              ones, and a second engine that is full of prompts of 4,000 tokens. Needs 40 GB, 5 minutes for each way.
engines_two   As ``steps_equals``, for two engines without, and two with the arbiter, of 16 requests each. 60 GB, 5
              minutes.
engines_many  The same for ``--engines`` engines without CUDA graphs, with equal shares. 60 GB, 8 minutes.

All times of parts are estimates.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from support.models import large_llama as llama
from support.models.cache import CACHE
from support.models.families import random_model

from benchmarks.harness.arguments import add_gpu_model, parser
from benchmarks.harness.figures import MIB, Figures
from benchmarks.harness.gpu import first_gpu, nvidia_smi
from benchmarks.harness.machine import host, load_average, packages, required_gpu_stack, wooly
from benchmarks.harness.parts import run_parts, some_of
from benchmarks.harness.processes import ChildError
from benchmarks.harness.results import RESULTS, gpu_file, join, merge, read
from benchmarks.scenarios.compute_aims import compared, lines
from benchmarks.scenarios.compute_engines import engines_many, engines_two, important
from benchmarks.scenarios.compute_setup import ON_CPU, ON_GPU, WAYS, Setup
from benchmarks.scenarios.compute_steps import gate, steps, steps_equals, steps_mps
from shared_store.base.errors import WoolyError

Part = Callable[[Setup], Figures]

PARTS: dict[str, Part] = {
    "steps": steps,
    "steps_mps": steps_mps,
    "steps_equals": steps_equals,
    "gate": gate,
    **{f"engines_{way.name}": functools.partial(important, way) for way in WAYS.values()},
    "engines_two": engines_two,
    "engines_many": engines_many,
}
ON_ANY_MACHINE = [name for name in PARTS if "mps" not in name]
GROUPS = {"engines": [f"engines_{name}" for name in WAYS], "cpu": ON_ANY_MACHINE}
"""Names of several parts."""


def main() -> None:
    """Run the parts, or join result files; then compare parts with each other, and print the aims."""
    options = parser(__doc__)
    names = [*PARTS, *GROUPS]
    options.add_argument("--part", type=some_of(names), default=[], help=f"of {','.join(names)}; separated by commas")
    options.add_argument(
        "--merge", type=Path, nargs="+", help="run nothing; join these files of one machine into --out"
    )
    add_gpu_model(options)
    options.add_argument("--cpu", action="store_true", help="on one core of this CPU; without --part: all of `cpu`")
    options.add_argument("--rounds", type=int, help="windows of each kind (default 5; CPU: 3)")
    options.add_argument("--window", type=float, help="seconds of a window with steady load (default 3; CPU: 2)")
    options.add_argument("--requests", type=float, help="seconds of a window with requests (default 15; CPU: 6)")
    options.add_argument("--engines", type=int, default=0, help="of the part engines_many (default 8; CPU: 3)")
    options.add_argument("--cache", type=Path, default=CACHE, help="directory of tiny models")
    options.add_argument("--out", type=Path, help="result file (default benchmarks/results/MACHINE/compute.json)")
    arguments = options.parse_args()
    if arguments.merge:
        if arguments.out is None:
            options.error("--merge needs --out")
        join(arguments.merge, arguments.out)
        _compare(arguments.out, read(arguments.out)["versions"])
        return
    if arguments.cpu and not arguments.part:
        arguments.part = ["cpu"]
    if not arguments.part:
        options.error(f"choose --part of {','.join(names)}")
    for name in [name for name in os.environ if name.startswith(("WOOLY_", "WOOLYAI_", "GPU_MODE", "CUDA_MPS"))]:
        if name != "WOOLY_COMMIT":
            del os.environ[name]  # the user's settings
    facts = {**host(), **wooly(), **packages("vllm", "torch")} if arguments.cpu else required_gpu_stack()
    file = arguments.out or (
        RESULTS / "cpu" / "compute.json" if arguments.cpu else gpu_file(facts["gpu"], "compute.json")
    )
    scale = ON_CPU if arguments.cpu else ON_GPU
    setup = Setup(
        device="cpu" if arguments.cpu else first_gpu(),
        total=(1 << 40) if arguments.cpu else int(nvidia_smi("memory.total")) * MIB,
        core=max(os.sched_getaffinity(0)) if arguments.cpu else None,
        model=random_model("llama", arguments.cache) if arguments.cpu else arguments.model,
        scale=replace(
            scale,
            rounds=arguments.rounds or scale.rounds,
            window_s=arguments.window or scale.window_s,
            requests_s=arguments.requests or scale.requests_s,
        ),
        engines=arguments.engines or (3 if arguments.cpu else 8),
    )
    selected = [part for name in arguments.part for part in GROUPS.get(name, [name])]
    if setup.on_gpu and any(name.startswith("engines") or name == "gate" for name in selected):
        llama.run("make", str(setup.model))
    try:
        run_parts({name: functools.partial(_run, PARTS[name], name, setup) for name in selected}, selected, file, facts)
    finally:
        _compare(file, facts)


def _run(part: Part, name: str, setup: Setup) -> Figures:
    """Run a part, and record what else the machine does; a failure of the store is the part's."""
    before = load_average()
    try:
        found = part(setup)
    except (WoolyError, TimeoutError) as error:
        raise ChildError(str(error)) from error
    found.raw[f"{name}_load_average"] = [round(before, 2), round(load_average(), 2)]
    return found


def _compare(file: Path, facts: dict[str, str]) -> None:
    """Add figures that compare parts, if there are any, and print the aims."""
    began = time.monotonic()
    found = compared(read(file))
    if found.numbers:
        merge(file, "compared", found, time.monotonic() - began, facts)
    print("\n".join(lines(read(file))), flush=True)
