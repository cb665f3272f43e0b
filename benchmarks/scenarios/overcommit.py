"""More engines than memory: swaps, returns, density, a mix of models, and the tokens, on one NVIDIA GPU.

The model is Llama-shaped, random, bf16, 9.08 GB (``python benchmarks model``), made in ``--model`` if missing; further
ones beside it, 9 GB of disk each. Each part runs a store of its own with a budget, and real engines. Its figures are
merged into ``--out``: medians by name, and under ``raw`` the values of each median. Times are in seconds. On a CPU
(``--cpu``) all parts run with tiny models, to try their steps: those figures say nothing about a GPU.

    python benchmarks overcommit --part swap,tokens [--out FILE]
    python benchmarks overcommit --merge FILE... [--out FILE]

swap       An engine with 64 running requests and 16 GiB of KV cache is swapped out between two steps. ``swap_out_*``:
           from the request to the store until the memory is free; ``first``: the first swap of each of ``--firsts``
           engines; ``later``: twelve or more of one. ``swap_in_*``: until the next step is done. Their parts have the
           names of the engine's steps. ``swapped_vram_mib``: what it keeps of the GPU while it has no requests.
           30 GiB of GPU memory, 3 minutes.
tokens     The same engine answers 64 requests five times and is swapped 20 times in each, with both model runners;
           ``*_different``: answers with other tokens than those before. 30 GiB, 3 minutes.
families   Three swaps for tiny engines: dense, mixture of experts, MLA, sliding windows, LoRA, a draft model; on a GPU
           also hybrid, multimodal (texts alone) and fp8 KV cache, on two tensor parallel. 4 minutes.
neighbour  Steps of an engine with 64 requests, alone and while an engine of another model goes out and in without
           pause, ten windows of four seconds each, in turn. 2 models, 60 GiB, 3 minutes.
ttft       Time to first token of a server whose memory is free, over HTTP: ``*_added_s`` is above that of a resident
           one. ``base_awake``: another server has the model on the GPU; ``host``: none has; ``victim``: another one,
           idle, leaves first. ``*_first_added_s``: the first return. 30 GiB, 3 minutes.
deep       The same for a server that was taken off its GPU, and what it keeps, there and of host memory. 4 minutes.
density    Servers of one model (2 GiB of KV cache, without CUDA graphs, for short starts) in four times 13.7 GiB, each
           of which answers in turn, twice. ``*_calculated``: from the measured bytes. 110 GiB of host memory,
           7 minutes.
mix_*      Four models with 16 GiB of KV cache each on 80 GB, with the same Poisson arrivals for each way:
           ``mix_wooly``; stock as ``mix_fits`` (as many as fit, the important first), ``mix_sleep`` (sleep level 1 by a
           script) and ``mix_small_kv`` (all four, 6 GiB of KV cache each). 4 models (36 GB of disk, which should stay
           in the page cache), 90 GiB of host memory, 4 to 5 minutes each.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from support.models import large_llama as llama
from support.models.cache import CACHE
from support.models.families import random_model
from support.servers import ServerError

from benchmarks.harness.arguments import add_gpu_model, parser
from benchmarks.harness.figures import MIB, Figures
from benchmarks.harness.gpu import first_gpu, nvidia_smi
from benchmarks.harness.machine import host, packages, required_gpu_stack, wooly
from benchmarks.harness.parts import run_parts, some_of
from benchmarks.harness.processes import ChildError
from benchmarks.harness.results import RESULTS, gpu_file, join
from benchmarks.scenarios.overcommit_mix import mix_fits, mix_sleep, mix_small_kv, mix_wooly
from benchmarks.scenarios.overcommit_returns import deep, density, ttft
from benchmarks.scenarios.overcommit_setup import ON_CPU, ON_GPU, Setup
from benchmarks.scenarios.overcommit_swaps import families, neighbour, swap, tokens
from shared_store.base.errors import WoolyError

Part = Callable[[Setup], Figures]

PARTS: dict[str, Part] = {
    part.__name__: part
    for part in (
        swap,
        tokens,
        families,
        neighbour,
        ttft,
        deep,
        density,
        mix_wooly,
        mix_fits,
        mix_sleep,
        mix_small_kv,
    )
}
GROUPS = {"mix": [name for name in PARTS if name.startswith("mix_")]}
"""Names of several parts."""


def main() -> None:
    """Run the parts, or join result files."""
    options = parser(__doc__)
    names = [*PARTS, *GROUPS]
    options.add_argument("--part", type=some_of(names), default=[], help=f"of {','.join(names)}; separated by commas")
    options.add_argument(
        "--merge", type=Path, nargs="+", help="run nothing; join these files of one machine into --out"
    )
    add_gpu_model(options)
    options.add_argument("--cpu", action="store_true", help="try the parts with tiny models on this CPU")
    options.add_argument("--firsts", type=int, default=3, help="engines whose first swap is measured (default 3)")
    options.add_argument("--engines", type=int, default=0, help="servers of the part density (default 16; CPU: 3)")
    options.add_argument(
        "--start-budget", type=float, default=330, help="seconds in which density starts servers (default 330)"
    )
    options.add_argument(
        "--rate", type=float, default=0.5, help="requests a second for each model of mix (default 0.5)"
    )
    options.add_argument("--seconds", type=float, default=90, help="seconds of the arrivals of mix (default 90)")
    options.add_argument("--cache", type=Path, default=CACHE, help="directory of tiny models")
    options.add_argument("--out", type=Path, help="result file (default benchmarks/results/GPU/overcommit.json)")
    arguments = options.parse_args()
    if arguments.merge:
        if arguments.out is None:
            options.error("--merge needs --out")
        join(arguments.merge, arguments.out)
        return
    if not arguments.part:
        options.error(f"choose --part of {','.join(names)}")
    for name in [name for name in os.environ if name.startswith(("WOOLY_", "WOOLYAI_", "PRIO", "VLLM_CPU_KVCACHE"))]:
        if name != "WOOLY_COMMIT":
            del os.environ[name]  # the user's settings
    facts = {**host(), **wooly(), **packages("vllm", "torch")} if arguments.cpu else required_gpu_stack()
    usual = RESULTS / "overcommit-cpu.json" if arguments.cpu else gpu_file(facts["gpu"], "overcommit.json")
    setup = Setup(
        device="cpu" if arguments.cpu else first_gpu(),
        total=(1 << 40) if arguments.cpu else int(nvidia_smi("memory.total")) * MIB,
        directory=arguments.cache,
        first=random_model("llama", arguments.cache) if arguments.cpu else arguments.model,
        scale=ON_CPU if arguments.cpu else ON_GPU,
        firsts=arguments.firsts,
        engines=arguments.engines or (3 if arguments.cpu else 16),
        budget_s=arguments.start_budget,
        rate=arguments.rate,
        seconds=arguments.seconds,
    )
    if setup.on_gpu:
        llama.run("make", str(setup.first))
    selected = [part for name in arguments.part for part in GROUPS.get(name, [name])]
    run_parts(
        {name: functools.partial(_run, PARTS[name], setup) for name in selected},
        selected,
        arguments.out or usual,
        facts,
    )


def _run(part: Part, setup: Setup) -> Figures:
    """Run a part; a failure of a server or of the store is the part's."""
    try:
        return part(setup)
    except (ServerError, WoolyError, TimeoutError) as error:
        raise ChildError(str(error)) from error
