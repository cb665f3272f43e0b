"""Part ``peak``: device memory of one publisher, sampled by another process every 2 ms.

Memory that torch caches after loading does not belong to the model. While it is cached, it counts as publishing's.
"""

from __future__ import annotations

from benchmarks.harness.figures import MIB, Figures
from benchmarks.harness.node import Node
from benchmarks.harness.processes import ChildError
from benchmarks.scenarios.gpu_engines import SMALL, TINY_KV_MIB, GpuBench

INTERVAL_S = 0.002


def peak(bench: GpuBench) -> Figures:
    """Measure the most device memory in use while publishing."""
    found = Figures()
    with Node() as node:
        sampler = node.launch("sampler", "memory_sampler", {"interval_s": INTERVAL_S}, worker="gpu-worker")
        publisher = bench.engine(node, "publisher", SMALL, TINY_KV_MIB)
        publisher.wait("imported")
        sampler.wait("ready")
        ready = publisher.ask("start", "ready")
        samples = sampler.ask("stop", "samples")["samples"]
    began, ended = ready["spans"]["publish"][-1]
    within = [used for at, used in samples if began <= at <= ended]
    if not within:
        raise ChildError("no sample was taken while publishing")
    highest, start = max(within) / MIB, ready["used_before_publish"] / MIB
    cached = ready["cached_before_publish"] / MIB
    found.numbers["publish_peak_over_model_mib"] = round(highest - (start - cached), 1)
    found.numbers["publish_peak_over_start_mib"] = round(highest - start, 1)
    found.raw["publish_peak"] = {"samples": len(within), "seconds": ended - began, "cached_before_mib": cached}
    return found
