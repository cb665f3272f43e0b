"""How fast the store itself is: attaches with 1, 10 and 100 clients, publishing, its CPU time and memory.

    python benchmarks/bench_store.py [--models 100] [--tensors 1000] [--seconds 10] [--out FILE]

``--models`` models of ``--tensors`` tensors each are resident in host memory, none shared, every tensor of ``TENSOR``
bytes: the store's work goes by numbers, not by bytes. On a CPU; a GPU's segments are fds like others to the store.

publish    from the plan to the reply to the commit, of one publisher, digests made before; ``cpu_ms``: the store's.
attach     clients open models by chance: request, manifest, fds, all segments mapped (``p50_ms``, ``p99_ms``); then
           they leave. ``attaches_per_s`` of all clients together, ``cpu_s_per_1000``: the store's seconds. Clients are
           threads of at most ``PROCESSES`` processes on the store's own machine, so much of a latency is theirs.
status     a client asks for the snapshot.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from store_node import (
    HERE,
    StoreNode,
    blob,
    close_all,
    content,
    fill,
    key,
    manifest,
    mapped,
    open_model,
    versions,
    wait_for_status,
)

from shared_store.client.session import Session
from shared_store.memory import Access

TENSOR = 512
PROCESSES = 4
CLIENTS = (1, 10, 100)


def parts_of(model: int, tensors: int) -> list[tuple[int, int]]:
    """The blobs of a model, which no other has."""
    return [(model * tensors + number, TENSOR) for number in range(tensors)]


def publish_all(node: StoreNode, models: int, tensors: int) -> dict[str, Any]:
    """Make the models resident; what that took."""
    seconds = []
    before = node.usage()
    with node.session("publisher") as session:
        for model in range(models):
            parts = parts_of(model, tensors)
            blobs = [blob(*part) for part in parts]
            whole = manifest(key(model), blobs)
            open_model(session, key(model))
            began = time.perf_counter()
            planned, fds = session.plan(key(model), blobs)
            close_all(fds)
            fill(session, key(model), planned, parts)
            close_all(session.commit(whole)[1])
            seconds.append(time.perf_counter() - began)
            session.leave(key(model))
            content.cache_clear()
            blob.cache_clear()
    after = node.usage()
    tenth = max(1, models // 10)
    return {
        "p50_ms": statistics.median(seconds) * 1e3,
        "first_tenth_p50_ms": statistics.median(seconds[:tenth]) * 1e3,
        "last_tenth_p50_ms": statistics.median(seconds[-tenth:]) * 1e3,
        "cpu_ms": (after.cpu_s - before.cpu_s) / models * 1e3,
        "rss_bytes_per_model": (after.rss - before.rss) // models,
    }


def attach_all(node: StoreNode, clients: int, models: int, seconds: float) -> dict[str, Any]:
    """Attach with so many clients at a time."""
    processes = min(clients, PROCESSES)
    shares = [clients // processes + (number < clients % processes) for number in range(processes)]
    running = []
    for number, share in enumerate(shares):
        arguments = ["client", str(node.directory), str(number), str(share), str(models), str(seconds)]
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    latencies: list[float] = []
    try:
        for process in running:
            line(process)  # all its clients are connected
        before, began = node.usage(), time.perf_counter()
        for process in running:
            tell(process)
        for process in running:
            latencies += json.loads(line(process))
        took, after = time.perf_counter() - began, node.usage()
    finally:
        for process in running:
            process.kill()
            process.communicate()
    latencies.sort()
    return {
        "attaches": len(latencies),
        "attaches_per_s": len(latencies) / took,
        "p50_ms": percentile(latencies, 50) * 1e3,
        "p99_ms": percentile(latencies, 99) * 1e3,
        "cpu_s_per_1000": (after.cpu_s - before.cpu_s) / len(latencies) * 1e3,
        "rss_bytes": after.rss,
    }


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The value that so many percent do not exceed."""
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def line(process: subprocess.Popen[str]) -> str:
    """What a process of clients says next."""
    assert process.stdout is not None
    said = process.stdout.readline()
    if not said:
        raise RuntimeError(f"a process of clients ended with {process.wait()}")
    return said


def tell(process: subprocess.Popen[str]) -> None:
    """Let its clients begin."""
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def client(directory: Path, number: int, clients: int, models: int, seconds: float) -> None:
    """A process of clients: connect, say so, wait for a line, attach for so long, print the latencies in seconds."""
    sessions = [
        Session.connect(directory, name=f"client {number}", autostart=False, timeout_s=30.0) for _ in range(clients)
    ]
    found: list[list[float]] = [[] for _ in sessions]
    print("connected", flush=True)
    sys.stdin.readline()
    deadline = time.perf_counter() + seconds

    def run(index: int) -> None:
        chance = random.Random(f"{number} {index}")
        session = sessions[index]
        while time.perf_counter() < deadline:
            model = key(chance.randrange(models))
            began = time.perf_counter()
            attached = open_model(session, model)
            assert attached is not None
            reply, fds = attached
            with mapped(reply.segments, fds, Access.READ):
                found[index].append(time.perf_counter() - began)
            session.leave(model)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps([latency for one in found for latency in one]), flush=True)


def status_ms(session: Session, repeat: int = 200) -> float:
    """Median time of asking for the snapshot."""
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        session.status()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e3


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["client"]:
        directory, number, clients, models, seconds = sys.argv[2:]
        client(Path(directory), int(number), int(clients), int(models), float(seconds))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of attaching, for each number of clients")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "store.json", help="the file of the results")
    arguments = parser.parse_args()
    with StoreNode() as node:
        with node.session() as session:
            wait_for_status(session, lambda status: status.catalog.state == "ok", "the catalog")
            empty = node.usage()
            result: dict[str, Any] = {
                "versions": versions(),
                "models": arguments.models,
                "tensors_per_model": arguments.tensors,
                "rss_empty_bytes": empty.rss,
                "publish": publish_all(node, arguments.models, arguments.tensors),
            }
            result["rss_bytes"] = node.usage().rss
            result["status_ms"] = status_ms(session)
        result["attach"] = {
            f"clients_{clients}": attach_all(node, clients, arguments.models, arguments.seconds) for clients in CLIENTS
        }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
