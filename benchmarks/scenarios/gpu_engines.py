"""Engines of the benchmark ``gpu``: their settings, how they are started, and durations from their reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.figures import MIB
from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child, ChildError

Spans = dict[str, list[tuple[float, float]]]
"""Start and end of calls, by label (``workers/watch.py``)."""

_COMMON = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "seed": 0,
    "disable_log_stats": True,
    "enable_prefix_caching": False,
}
SMALL = {**_COMMON, "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 2048}
"""Settings without CUDA graphs, for short starts."""
FULL = {**_COMMON, "max_model_len": 2048, "max_num_seqs": 64}
"""Settings with CUDA graphs."""
TINY_KV_MIB, FULL_KV_MIB = 64, 8192
BATCH, SMALL_BATCH = 64, 16


@dataclass
class GpuBench:
    """The model and the options that all parts share.

    Attributes:
        model: Checkpoint directory.
        repeats: Processes of each kind in the part ``load``.
        max_engines: Limit of the part ``capacity``.
        kv_mib: KV cache (MiB) of each engine in the part ``capacity``.
        budget_s: Seconds in which ``capacity`` and ``mps`` start engines.
        weights_mib: Size of the model.
        total_mib: Memory of the GPU.
    """

    model: Path
    repeats: int
    max_engines: int
    kv_mib: int
    budget_s: float
    weights_mib: float
    total_mib: int

    def engine(
        self,
        node: Node,
        name: str,
        settings: dict[str, Any],
        kv_mib: int,
        *,
        environment: dict[str, str] | None = None,
        **job: Any,
    ) -> Child:
        """Start an engine (``workers/engine.py``); it uses wooly unless ``name`` begins with "stock".

        vLLM checks its memory fraction even if the KV cache has a fixed size. The fraction is the size of weights and
        KV cache (at least 1 GiB in addition to the weights), which is less than any engine takes.
        """
        share = (self.weights_mib + max(kv_mib, 1024)) / self.total_mib
        full = {
            "model": str(self.model),
            "load_format": "auto" if name.startswith("stock") else "wooly",
            "gate": True,
            "warm": False,
            "batch": SMALL_BATCH,
            "settings": {**settings, "kv_cache_memory_bytes": kv_mib * MIB, "gpu_memory_utilization": share},
        }
        return node.launch(name, "engine", {**full, **job}, **(environment or {}))


def span_seconds(spans: Spans, label: str) -> float:
    """Return the seconds in calls of one function during loading: vLLM's accounting also makes some before it."""
    began, ended = spans["load"][-1]
    return sum(end - begin for begin, end in spans.get(label, []) if began <= begin and end <= ended)


def total_seconds(spans: Spans, label: str) -> float:
    """Return the seconds in all calls of one function."""
    return sum(end - begin for begin, end in spans.get(label, []))


def attach_seconds(spans: Spans) -> float:
    """Return the seconds from connecting to the store to the last bound parameter, without building the module tree."""
    began, ended = spans["load"][-1]
    connected = next(begin for begin, _ in spans["connect"] if began <= begin)
    bound = next(end for begin, end in spans["bind"] if began <= begin and end <= ended)
    return bound - connected - span_seconds(spans, "build")


def check_attached(child: Child, ready: dict[str, Any]) -> None:
    """Raise :class:`ChildError` if an engine that should attach loaded the checkpoint."""
    if span_seconds(ready["spans"], "inner_load"):
        raise ChildError(f"{child.name} loaded the checkpoint instead of attaching")
