"""transformers with and without wooly: memory of 1, 2, 4 and 8 processes, load time, and speed; on a CPU or a GPU.

On a CPU, five ways to load a model are measured (``models/hf.py``). Of each kind, stock and wooly, eight processes
import first and load one after the other. ``pss_N``: proportional set size of the first N after they loaded, ran once
and read all weights, without libraries; with wooly, plus its store's processes and segments that no process maps.
``added_N``: the same, minus the size before loading. ``load_s``: `from_pretrained`, files in the page cache;
``publish_s``: of the first process with wooly, which digests the checkpoint, loads, and publishes. ``peak_added``: most
memory not backed by files that the first process took while loading, including its segments in the store, sampled about
every millisecond; with wooly, this process publishes.

Stock loading of safetensors without conversion maps the file, so that processes share the page cache. This is the
baseline of ``smollm2_bf16``, where wooly saves little.

    python benchmarks hf [--scenarios smollm2_bf16,...] [--out benchmarks/results/cpu-hf.json]
    python benchmarks hf --gpu [--parts memory,speed] [--model DIR] [--out FILE]

On a GPU, the model is that of the benchmark ``gpu`` (9.08 GB, made if missing), and results are merged into
``results/GPU/hf.json`` after each part:

memory     ``hf_vram_N_*_mib``: GPU memory of N processes with the model, including contexts and the store.
           ``hf_load_s``: stock; ``hf_publish_s``: wooly's first process; ``hf_attach_s``: the others.
speed      two running processes in turn: ``generate``, 8 prompts x 128 tokens.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.arguments import add_gpu_model, parser
from benchmarks.harness.parts import some_of
from benchmarks.models.hf import SCENARIOS
from benchmarks.scenarios import hf_cpu, hf_gpu


def main() -> None:
    """Measure on a CPU or a GPU, and write the results after each scenario or part."""
    options = parser(__doc__)
    scenarios = [each.name for each in SCENARIOS]
    options.add_argument("--gpu", action="store_true", help="measure on the first NVIDIA GPU")
    options.add_argument(
        "--scenarios", type=some_of(scenarios), default=scenarios, help="scenarios on a CPU (default: all)"
    )
    options.add_argument(
        "--parts", type=some_of(hf_gpu.PARTS), default=list(hf_gpu.PARTS), help="parts on a GPU (default: all)"
    )
    add_gpu_model(options)
    options.add_argument("--out", type=Path, help="result file")
    arguments = options.parse_args()
    if arguments.gpu:
        hf_gpu.run(arguments.model.resolve(), arguments.parts, arguments.out)
    else:
        hf_cpu.run(arguments.scenarios, arguments.out)
