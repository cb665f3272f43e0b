"""Part ``load``: stock engines, publishers on a fresh store each, and readers beside the last publisher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from benchmarks.harness.figures import MIB, Figures
from benchmarks.harness.gpu import used_mib
from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child
from benchmarks.scenarios.gpu_engines import (
    SMALL,
    TINY_KV_MIB,
    GpuBench,
    attach_seconds,
    check_attached,
    span_seconds,
    total_seconds,
)


def load(bench: GpuBench) -> Figures:
    """Start all engines one at a time, and measure load time and memory of each."""
    found = Figures()
    with contextlib.ExitStack() as stack:
        # All import vLLM at the same time, which takes longest, and then use the GPU one after the other.
        nodes = [stack.enter_context(Node()) for _ in range(bench.repeats)]
        stock = [bench.engine(node, "stock", SMALL, TINY_KV_MIB) for node in nodes]
        publishers = [bench.engine(node, "publisher", SMALL, TINY_KV_MIB) for node in nodes]
        readers = [bench.engine(nodes[-1], "reader", SMALL, TINY_KV_MIB) for _ in range(bench.repeats)]
        for child in (*stock, *publishers, *readers):
            child.wait("imported")
        ready, grown = [], []
        for child in stock:
            facts, mib = _start(child)
            ready.append(facts)
            grown.append(mib)
            child.end()
        found.put("load_s", [span_seconds(facts["spans"], "load") for facts in ready])
        found.put("vram_one_more_stock_mib", grown)
        published, grown = [], []
        for node, child in zip(nodes, publishers, strict=True):
            facts, mib = _start(child)
            published.append(facts["spans"])
            grown.append(mib)
            if node is not nodes[-1]:
                node.close()
        _readers(found, nodes[-1], [_start(child) for child in _measure_growth(found, nodes[-1], readers)])
        _torch_ipc(found, nodes[-1], facts["sizes"], bench.repeats)
    # Hashing may happen before loading: accounting asks the store about the model first.
    found.put("hash_s", [total_seconds(spans, "hash") for spans in published])
    found.put(
        "publish_s",
        [span_seconds(s, "load") - span_seconds(s, "hash") - span_seconds(s, "inner_load") for s in published],
    )
    found.put("publisher_load_s", [span_seconds(spans, "load") for spans in published])
    found.put("vram_publisher_and_store_mib", grown)
    return found


def _start(child: Child) -> tuple[dict[str, Any], int]:
    """Start an engine that has imported; return its report and the growth of used GPU memory (MiB)."""
    before = used_mib()
    ready = child.ask("start", "ready")
    if child.name == "reader":
        check_attached(child, ready)
    return ready, used_mib() - before


def _measure_growth(found: Figures, node: Node, readers: list[Child]) -> Iterable[Child]:
    """Yield the readers one by one, then record the growth of the store."""
    before = node.status().totals.resident_bytes
    yield from readers
    found.numbers["store_growth_by_readers_mib"] = (node.status().totals.resident_bytes - before) / MIB


def _readers(found: Figures, node: Node, readers: list[tuple[dict[str, Any], int]]) -> None:
    spans = [facts["spans"] for facts, _ in readers]
    found.put("attach_ms", [1e3 * attach_seconds(each) for each in spans])
    found.put("attach_total_ms", [1e3 * span_seconds(each, "load") for each in spans])
    for label in ("open", "map", "build", "bind", "post_process"):
        found.put(f"attach_{label}_ms", [1e3 * span_seconds(each, label) for each in spans])
    found.put("attach_accounting_ms", [1e3 * total_seconds(each, "accounting") for each in spans])
    growth = found.numbers["store_growth_by_readers_mib"] / len(readers)
    found.put("reader_weight_mib", [facts["torch_bytes"] / MIB + growth for facts, _ in readers])
    found.put("reader_device_mib", [facts["device_bytes"] / MIB for facts, _ in readers])
    found.put("vram_one_more_wooly_mib", [mib for _, mib in readers])
    found.numbers["model_mib"] = round(sum(readers[0][0]["sizes"]) / MIB, 1)
    found.numbers["store_resident_mib"] = round(node.status().totals.resident_bytes / MIB, 1)


def _torch_ipc(found: Figures, node: Node, sizes: list[int], repeats: int) -> None:
    """Share tensors of the same number and sizes through torch's CUDA IPC, for comparison."""
    job = {"sizes": sizes, "path": str(node.scratch / "handles.pickle")}
    sender = node.launch("IPC sender", "ipc_sender", job, worker="gpu-worker")
    receivers = [node.launch("IPC receiver", "ipc_receiver", job, worker="gpu-worker") for _ in range(repeats)]
    sender.wait("ready")
    took = []
    for receiver in receivers:
        receiver.wait("imported")
        sender.ask("share", "shared")
        took.append(receiver.ask("open", "ready"))
        receiver.end()
    found.put("torch_ipc_attach_ms", [1e3 * each["attach_s"] for each in took])
    found.numbers["torch_ipc_tensors"] = took[-1]["tensors"]
