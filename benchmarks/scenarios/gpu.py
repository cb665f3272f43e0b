"""vLLM with wooly on one NVIDIA GPU: load time, memory, speed and number of engines, each beside stock vLLM.

The model is Llama-shaped, random, bf16, 9.08 GB (``python benchmarks model``), made in ``--model`` if missing. Every
engine is a process of its own, without vLLM's multiprocessing. Results are merged into ``--out`` after each part:
medians by name, and under ``raw`` the values of each median.

    python benchmarks gpu [--parts digest,load,peak,decode,ttft,capacity,mps,dedup] [--out FILE]

digest     ``python benchmarks digest``: BLAKE3 of GPU memory; ``digest_gbps`` of 64 tensors of 64 MiB in one call.
load       ``load_s``: stock vLLM's loader, files in the page cache. ``publish_s``: additional time to publish (wooly's
           loader, without hashing the checkpoint, ``hash_s``, and without the stock load in it). ``attach_ms``: a fresh
           process, from connecting to the store until all parameters are bound, without building the module tree;
           ``attach_total_ms``: the reader's whole loader, including building and vLLM's post-processing.
           ``torch_ipc_attach_ms``: tensors of the same number and sizes opened through torch's CUDA IPC, not bound.
           ``reader_weight_mib``: memory that loading allocated through torch, plus growth of the store.
           ``vram_one_more_*_mib``: GPU memory of one more engine, KV cache of 64 MiB, no CUDA graphs.
peak       ``publish_peak_over_model_mib``: most device memory in use while publishing, minus the loaded model.
decode     two running engines with CUDA graphs in turn: 64 requests x 128 tokens, and 64 prompts x 512 tokens.
ttft       from the start of the process to the first token, compile cache warm, wooly's weights in the store.
capacity   engines that run at the same time (``--kv-mib`` of KV cache each, no CUDA graphs, for short starts), and the
           tokens/s of all of them together. Stock engines load one after the other, so that peaks do not add up.
mps        wooly's engines with NVIDIA's Multi-Process Service, on machines that have it.
dedup      a model and three fine-tunes of it, each with a tenth of its layers changed, published without an engine.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from support.models import large_llama as llama

from benchmarks.harness.arguments import add_gpu_model, parser
from benchmarks.harness.figures import MIB, Figures
from benchmarks.harness.gpu import nvidia_smi
from benchmarks.harness.machine import required_gpu_stack
from benchmarks.harness.parts import run_parts, some_of
from benchmarks.harness.processes import command
from benchmarks.harness.results import gpu_file
from benchmarks.scenarios.capacity import capacity
from benchmarks.scenarios.decode import decode
from benchmarks.scenarios.dedup import dedup
from benchmarks.scenarios.gpu_engines import GpuBench
from benchmarks.scenarios.load import load
from benchmarks.scenarios.mps import mps
from benchmarks.scenarios.peak import peak
from benchmarks.scenarios.ttft import ttft

DIGEST_TIMEOUT_S = 120


def digest(bench: GpuBench) -> Figures:  # noqa: ARG001 - the signature of all parts
    """Run the benchmark ``digest`` in a process of its own."""
    done = subprocess.run(command("digest"), stdout=subprocess.PIPE, check=True, timeout=DIGEST_TIMEOUT_S)
    return Figures(json.loads(done.stdout))


PARTS: dict[str, Callable[[GpuBench], Figures]] = {
    part.__name__: part for part in (digest, load, peak, decode, ttft, capacity, mps, dedup)
}


def main() -> None:
    """Run the parts, and write the results after each."""
    options = parser(__doc__)
    options.add_argument(
        "--parts", type=some_of(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)} (default: all)"
    )
    add_gpu_model(options)
    options.add_argument("--repeats", type=int, default=3, help="processes of each kind in the part load (default 3)")
    options.add_argument("--max-engines", type=int, default=24, help="limit of the part capacity (default 24)")
    options.add_argument(
        "--kv-mib", type=int, default=2048, help="KV cache of each engine of the part capacity, in MiB (default 2048)"
    )
    options.add_argument(
        "--budget",
        type=float,
        default=420,
        help="seconds in which the parts capacity and mps start engines (default 420)",
    )
    options.add_argument("--out", type=Path, help="result file (default benchmarks/results/GPU/gpu.json)")
    arguments = options.parse_args()
    facts = required_gpu_stack()
    llama.run("make", str(arguments.model))
    bench = GpuBench(
        model=arguments.model,
        repeats=arguments.repeats,
        max_engines=arguments.max_engines,
        kv_mib=arguments.kv_mib,
        budget_s=arguments.budget,
        weights_mib=llama.weight_bytes(arguments.model) / MIB,
        total_mib=int(nvidia_smi("memory.total")),
    )
    parts = {name: functools.partial(part, bench) for name, part in PARTS.items()}
    run_parts(parts, arguments.parts, arguments.out or gpu_file(facts["gpu"], "gpu.json"), facts)
