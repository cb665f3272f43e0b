"""Part ``dedup``: resident bytes of a model and three fine-tunes of it, published without an engine."""

from __future__ import annotations

from support.models import large_llama as llama

from benchmarks.harness.figures import Figures
from benchmarks.harness.gpu import used_mib
from benchmarks.harness.node import Node
from benchmarks.scenarios.gpu_engines import GpuBench

TUNES = 3


def dedup(bench: GpuBench) -> Figures:
    """Make the fine-tunes, publish all models, and compare resident bytes with the distinct bytes in their files."""
    found = Figures()
    layers = llama.layer_count(bench.model)
    count = max(1, round(layers / 10))
    models = [bench.model]
    for number in range(1, TUNES + 1):
        target = bench.model.with_name(f"{bench.model.name}-tune{number}")
        changed = [str((number * count + offset) % layers) for offset in range(count)]
        llama.run("finetune", str(bench.model), str(target), "--changed", *changed, "--seed", str(number))
        models.append(target)
    with Node("gpu-worker") as node:
        publisher = node.launch("publisher", "plain_publisher", {"device": "cuda"})
        publisher.wait("imported")
        before = used_mib()
        found.put("dedup_publish_s", [publisher.ask(str(model), "published")["seconds"] for model in models])
        resident = node.status().totals.resident_bytes
        publisher.end()
        found.numbers["dedup_vram_mib"] = used_mib() - before
    found.numbers |= {
        "dedup_models": len(models),
        "dedup_layers_changed": count,
        "dedup_layers": layers,
        "dedup_resident_bytes": resident,
        "dedup_expected_bytes": llama.unique_bytes(models),
        "dedup_private_bytes": sum(llama.weight_bytes(model) for model in models),
    }
    return found
