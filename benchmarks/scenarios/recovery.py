"""Time that clients are without a store after it is killed, by the number of models.

For 1, 10 and 100 models of 1,000 tensors each, all used by one client, the store is killed. Figures:

* ``kill_to_serving_s``: until a client that connects right after the kill is greeted;
* ``kill_to_attached_s``: until that client has a model's manifest and descriptors;
* ``kill_to_rejoined_s``: until the client from before is a reader of all its models again;
* ``both_killed_to_whole_s``: keeper and store are killed; from the start of the next ones until all models are back
  from the client, digests verified if the store can read the memory.

``python benchmarks recovery`` uses host memory and writes ``results/recovery.json``. ``--gpu`` uses memory of the first
GPU (``--mib`` per model, read back through a new client at the end) and writes ``results/GPU/recovery.json``. Needs
wooly, msgspec and blake3; on a GPU also cuda-bindings.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.content import key

from benchmarks.harness.arguments import parser
from benchmarks.harness.device import Device, Gpu
from benchmarks.harness.figures import MIB, median_of
from benchmarks.harness.gpu import nvidia_smi, results_folder
from benchmarks.harness.machine import host, load_average, stamp, wooly
from benchmarks.harness.processes import wait_until
from benchmarks.harness.published import load, open_model, wrong_blobs
from benchmarks.harness.results import RESULTS, write
from benchmarks.harness.store import TemporaryStore, open_pidfds, wait_for_exit
from shared_store.base.digest import digest
from shared_store.base.manifest import decode
from shared_store.client.session import Session

TENSORS = 1000
WAIT_S = 300.0
POLL_S = 0.02
"""Interval of polling. A poll costs the store time, too."""


def contents_of(number: int, nbytes: int) -> list[bytes]:
    """Return the bytes of a model's tensors: each repeats its own number."""
    first = number * TENSORS + 1
    return [tensor.to_bytes(8, "little") * (nbytes // 8) for tensor in range(first, first + TENSORS)]


def kill_both(keeper: int, store: int) -> None:
    """Kill a keeper and its store so that neither restarts the other, and wait until both have exited."""
    pidfds = open_pidfds([keeper, store])
    os.kill(keeper, signal.SIGSTOP)
    for pid in (store, keeper):
        os.kill(pid, signal.SIGKILL)
    if not wait_for_exit(pidfds, WAIT_S):
        raise SystemExit("keeper and store still run after SIGKILL")


def all_rejoined(store: TemporaryStore, models: int) -> Callable[[], bool]:
    """Return a condition: all models are in the store, with one reader each."""

    def met() -> bool:
        with store.session(timeout_s=60.0) as session:
            found = session.status().models
        return len(found) == models and all(model.readers == 1 for model in found)

    return met


def attach_after_kill(store: TemporaryStore, device: Device, model: str, killed: float) -> dict[str, float]:
    """Connect as a new client and open a model; return seconds since the kill, by figure."""
    with store.session("new", timeout_s=60.0) as session:
        greeted = time.perf_counter()
        found = open_model(session, model, device=device.name, publish=False)
        attached = time.perf_counter()
        if found is None:
            raise SystemExit("the store lost the model")
        found[1].close()
    return {"kill_to_attached_s": attached - killed, "kill_to_serving_s": greeted - killed}


def measure(device: Device, models: int, nbytes: int, rounds: int) -> dict[str, Any]:
    """Return all figures for a number of models with tensors of ``nbytes``."""
    times: dict[str, list[float]] = {}

    def record(figures: dict[str, float]) -> None:
        for name, value in figures.items():
            times.setdefault(name, []).append(value)

    with TemporaryStore() as store:
        keeper = store.start()
        with store.session("holder") as holder:
            for number in range(models):
                load(holder, device, key(number), contents_of(number, nbytes))
            resident = holder.status().totals.resident_bytes
            for _ in range(rounds):
                record(_kill_store(store, device, holder, models))
            for _ in range(max(1, rounds // 2)):
                kill_both(keeper, holder.store_pid)
                started = time.perf_counter()
                keeper = store.start()
                wait_until(all_rejoined(store, models), "all models to be back", WAIT_S, POLL_S)
                record({"both_killed_to_whole_s": time.perf_counter() - started})
            check(store, device, models - 1, nbytes)
            if holder.status().totals.resident_bytes != resident:
                raise SystemExit("the resident bytes differ from those before the first kill")
    return {"resident_bytes": resident, **{name: median_of(values) for name, values in times.items()}}


def _kill_store(store: TemporaryStore, device: Device, holder: Session, models: int) -> dict[str, float]:
    """Kill the store, and return seconds until clients are back, by figure."""
    pid = holder.store_pid
    killed = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    found = attach_after_kill(store, device, key(models - 1), killed)
    wait_until(lambda: holder.alive and holder.store_pid != pid, "the client to reconnect", WAIT_S, POLL_S)
    wait_until(all_rejoined(store, models), "all models to have their reader", WAIT_S, POLL_S)
    return {**found, "kill_to_rejoined_s": time.perf_counter() - killed}


def check(store: TemporaryStore, device: Device, number: int, nbytes: int) -> None:
    """Verify as a new client that a model has the bytes that were published. Exits with a message if not."""
    with store.session("new", timeout_s=60.0) as session:
        found = open_model(session, key(number), device=device.name, publish=False)
        if found is None:
            raise SystemExit("the store lost the model")
        attached, fds = found
        expected = [digest(data) for data in contents_of(number, nbytes)]
        wrong = wrong_blobs(device, attached, fds)
        if wrong or [one.digest for one in decode(attached.manifest).blobs] != expected:
            raise SystemExit(f"the model's bytes differ from those that were published, in {len(wrong)} tensors")


def main() -> None:
    """Measure, and write the results."""
    options = parser(__doc__)
    options.add_argument("--gpu", action="store_true", help="use memory of the first NVIDIA GPU")
    options.add_argument(
        "--models", type=int, nargs="+", default=[1, 10, 100], help="numbers of models (default 1 10 100)"
    )
    options.add_argument("--mib", type=int, default=4, help="size of a model, in MiB (default 4)")
    options.add_argument("--rounds", type=int, default=5, help="kills of the store (default 5)")
    options.add_argument(
        "--results", type=Path, default=RESULTS, help="directory of the result file (default benchmarks/results)"
    )
    arguments = options.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for stores that this process starts
    device = Gpu() if arguments.gpu else Device()
    gpu = {"gpu": nvidia_smi("name")} if arguments.gpu else {}
    nbytes = max(8, arguments.mib * MIB // TENSORS // 512 * 512)
    versions = {**stamp(), **host(), "load_average": str(round(load_average(), 1)), **wooly(), **gpu}
    result = {
        "versions": versions,
        "tensors": TENSORS,
        "tensor_bytes": nbytes,
        "recovery": {f"models_{count}": measure(device, count, nbytes, arguments.rounds) for count in arguments.models},
    }
    folder: Path = arguments.results / results_folder(gpu["gpu"]) if gpu else arguments.results
    write(folder / "recovery.json", result)
    print(json.dumps(result, indent=1))
