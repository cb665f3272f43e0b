"""The store itself: attaches by 1, 10 and 100 clients, publishing, its CPU time and memory.

    python benchmarks store [--models 100] [--tensors 1000] [--seconds 10] [--out FILE]

``--models`` models of ``--tensors`` tensors each are resident in host memory, none shared, every tensor of 512 bytes:
the store's work depends on numbers, not on bytes. Runs on a CPU; to the store, a GPU's segments are descriptors like
any others.

publish    from the plan to the reply to the commit, by one publisher, digests computed before; ``cpu_ms``: the store's.
attach     clients open random models: request, manifest, descriptors, all segments mapped (``p50_ms``, ``p99_ms``);
           then they leave. ``attaches_per_s`` of all clients together, ``cpu_s_per_1000``: the store's seconds. Clients
           are threads of at most 4 processes on the store's machine, so a latency contains much work of theirs.
status     a client asks for the snapshot.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from support.content import blob, content, key

from benchmarks.harness.arguments import parser
from benchmarks.harness.device import Device
from benchmarks.harness.figures import percentile, seconds
from benchmarks.harness.machine import host, load_average, stamp, wooly
from benchmarks.harness.node import Node
from benchmarks.harness.published import open_model, publish
from benchmarks.harness.results import RESULTS, write
from benchmarks.harness.store import catalog_ready
from shared_store.client.session import Session

TENSOR_BYTES = 512
PROCESSES = 4
CLIENTS = (1, 10, 100)
STATUS_CALLS = 200


def publish_all(node: Node, models: int, tensors: int) -> dict[str, Any]:
    """Publish all models, and return the figures."""
    device, took = Device(), []
    before = node.usage()
    with node.session("publisher") as session:
        for model in range(models):
            contents = [content(model * tensors + number, TENSOR_BYTES) for number in range(tensors)]
            blobs = [blob(data) for data in contents]
            open_model(session, key(model))
            took.append(seconds(lambda: publish(session, device, key(model), contents, blobs)))  # noqa: B023 - called at once
            session.leave(key(model))
    after = node.usage()
    tenth = max(1, models // 10)
    return {
        "p50_ms": statistics.median(took) * 1e3,
        "first_tenth_p50_ms": statistics.median(took[:tenth]) * 1e3,
        "last_tenth_p50_ms": statistics.median(took[-tenth:]) * 1e3,
        "cpu_ms": (after.cpu_s - before.cpu_s) / models * 1e3,
        "rss_bytes_per_model": (after.rss - before.rss) // models,
    }


def attach_all(node: Node, clients: int, models: int, duration_s: float) -> dict[str, Any]:
    """Attach with ``clients`` at the same time for ``duration_s`` seconds, and return the figures."""
    processes = min(clients, PROCESSES)
    shares = [clients // processes + (number < clients % processes) for number in range(processes)]
    running = [
        node.launch(
            f"clients {number}",
            "clients",
            {"number": number, "clients": share, "models": models, "seconds": duration_s},
        )
        for number, share in enumerate(shares)
    ]
    for process in running:
        process.wait("connected")
    latencies: list[float] = []

    def attach() -> None:
        for process in running:
            process.tell("start")
        for process in running:
            latencies.extend(process.wait("latencies", duration_s + 60)["latencies"])

    before = node.usage()
    took = seconds(attach)
    after = node.usage()
    for process in running:
        process.end()
    latencies.sort()
    return {
        "attaches": len(latencies),
        "attaches_per_s": len(latencies) / took,
        "p50_ms": percentile(latencies, 50) * 1e3,
        "p99_ms": percentile(latencies, 99) * 1e3,
        "cpu_s_per_1000": (after.cpu_s - before.cpu_s) / len(latencies) * 1e3,
        "rss_bytes": after.rss,
    }


def status_ms(session: Session) -> float:
    """Return the median duration of a status call, in milliseconds."""
    return statistics.median(seconds(session.status) for _ in range(STATUS_CALLS)) * 1e3


def measure(models: int, tensors: int, duration_s: float) -> dict[str, Any]:
    """Return all figures of a fresh store."""
    with Node("store-worker") as node:
        node.start()
        with node.session() as session:
            catalog_ready(session)
            empty = node.usage()
            result: dict[str, Any] = {
                "versions": {**stamp(), **host(), **wooly(), "load_average": load_average()},
                "models": models,
                "tensors_per_model": tensors,
                "rss_empty_bytes": empty.rss,
                "publish": publish_all(node, models, tensors),
            }
            result["rss_bytes"] = node.usage().rss
            result["status_ms"] = status_ms(session)
        result["attach"] = {f"clients_{clients}": attach_all(node, clients, models, duration_s) for clients in CLIENTS}
    return result


def main() -> None:
    """Measure, and write the results."""
    options = parser(__doc__)
    options.add_argument("--models", type=int, default=100, help="number of models (default 100)")
    options.add_argument("--tensors", type=int, default=1000, help="tensors of each model (default 1000)")
    options.add_argument(
        "--seconds", type=float, default=10.0, help="duration of attaching, for each number of clients (default 10)"
    )
    options.add_argument(
        "--out", type=Path, default=RESULTS / "store.json", help="result file (default benchmarks/results/store.json)"
    )
    arguments = options.parse_args()
    result = measure(arguments.models, arguments.tensors, arguments.seconds)
    write(arguments.out, result)
    print(json.dumps(result, indent=1))
