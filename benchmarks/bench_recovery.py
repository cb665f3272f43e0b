"""How long a store that was killed is away, against the number of models that it held.

For 1, 10 and 100 models of 1,000 tensors each, all held by one client: the store is killed, and

* ``kill_to_serving_s``: until a client that connects right after the kill is greeted;
* ``kill_to_attached_s``: until that client has a model's manifest and fds;
* ``kill_to_rejoined_s``: until the client that was there before is a reader of all its models again;
* ``both_killed_to_whole_s``: keeper and store are killed; from the start of the next ones until all models are back
  from the client, digests verified where the store can read the memory.

``python benchmarks/bench_recovery.py`` uses host memory and writes ``results/recovery.json``; ``--gpu`` holds memory of
the first GPU (``--mib`` a model, told apart by what is written there and read back through a new client in the end) and
writes ``results/GPU/recovery.json``. It needs wooly on the path, msgspec and blake3; for a GPU cuda.bindings too.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shared_store
from shared_store.base.digest import digest, digest_at
from shared_store.base.manifest import Blob, Manifest, TensorEntry
from shared_store.client.session import Session
from shared_store.memory import Access, Backend, Mapping, backend_for
from shared_store.runtime import spawn
from shared_store.runtime.fds import OwnedFds

RESULTS = Path(__file__).resolve().parent / "results"
TENSORS = 1000
MIB = 1 << 20


def key_of(number: int) -> str:
    """A model's weight key."""
    return f"{number:064x}"


def bytes_of(number: int, nbytes: int) -> bytes:
    """What a tensor is made of: its number, again and again."""
    return number.to_bytes(8, "little") * (nbytes // 8)


def write(device: str, address: int, data: bytes) -> None:
    """Copy into mapped memory of a device."""
    import ctypes

    if device == "cpu":
        ctypes.memmove(address, data, len(data))
        return
    from cuda.bindings import driver

    (error,) = driver.cuMemcpyHtoD(address, data, len(data))
    if error != driver.CUresult.CUDA_SUCCESS:
        raise SystemExit(f"cuMemcpyHtoD: {error}")


def digest_of(device: str, address: int, nbytes: int) -> bytes:
    """The digest of mapped memory."""
    if device == "cpu":
        return digest_at(address, nbytes)
    from cuda.bindings import driver

    data = bytearray(nbytes)
    (error,) = driver.cuMemcpyDtoH(data, address, nbytes)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise SystemExit(f"cuMemcpyDtoH: {error}")
    return digest(data)


def publish(session: Session, backend: Backend, device: str, number: int, nbytes: int) -> None:
    """Publish a model of :data:`TENSORS` tensors of ``nbytes`` each."""
    key = key_of(number)
    contents = [bytes_of(number * TENSORS + index + 1, nbytes) for index in range(TENSORS)]
    blobs = tuple(Blob(digest(data), nbytes) for data in contents)
    found = session.open(key, name=f"model {number}", engine="bench", device=device, publish=True, timeout_s=60.0)
    if found is not None:
        raise SystemExit(f"{key} is there already")
    planned, fds = session.plan(key, blobs)
    fds.close()
    mappings = []
    for segment in planned.segments:
        with session.fill(key, segment.id) as fd:
            mappings.append(Mapping(backend, backend.import_fd(fd.fileno(), segment.nbytes)))
        mappings[-1].map(Access.WRITE)
    for place, data in zip(planned.places, contents, strict=True):
        write(device, mappings[place.segment].address + place.offset, data)
    for mapping in mappings:
        mapping.close()
    tensors = tuple(
        TensorEntry(f"layers.{index}", "weight", "parameter", index, "uint8", (nbytes,), (1,), 0, index)
        for index in range(TENSORS)
    )
    manifest = Manifest(
        key=key, name=f"model {number}", engine="bench", device=device, blobs=blobs, tensors=tensors, state={}
    )
    _, fds = session.commit(manifest)
    fds.close()


def wait(what: str, condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
    """Until a condition holds, looked at every 20 ms: a look costs the store time, too."""
    deadline = time.perf_counter() + timeout_s
    while not condition():
        if time.perf_counter() > deadline:
            raise SystemExit(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.02)


def kill_both(keeper: int, store: int) -> None:
    """SIGKILL a keeper and its store, neither of which gets to start the other again, and wait until they are gone."""
    watched = [os.pidfd_open(keeper), os.pidfd_open(store)]
    os.kill(keeper, signal.SIGSTOP)
    for pid in (store, keeper):
        os.kill(pid, signal.SIGKILL)
    for pidfd in watched:
        select.select([pidfd], [], [])
        os.close(pidfd)


def attach(directory: Path, device: str, key: str) -> tuple[Session, Any, OwnedFds, float]:
    """A new client of a model, and when it was greeted."""
    session = Session.connect(directory, name="new", autostart=False, timeout_s=60.0)
    greeted = time.perf_counter()
    found = session.open(key, name="", engine="bench", device=device, publish=False, timeout_s=60.0)
    if found is None:
        raise SystemExit("the model was lost")
    return session, *found, greeted


def back(directory: Path, models: int) -> Callable[[], bool]:
    """Whether every model has its reader."""

    def whole() -> bool:
        with Session.connect(directory, autostart=False, timeout_s=60.0) as session:
            found = session.status().models
        return len(found) == models and all(model.readers == 1 for model in found)

    return whole


def measure(device: str, models: int, nbytes: int, rounds: int) -> dict[str, Any]:
    """All figures for a number of models."""
    backend = backend_for(device)
    directory = Path(tempfile.mkdtemp(prefix="wooly-bench-"))
    times: dict[str, list[float]] = {}
    try:
        keeper = spawn.start(directory)
        holder = Session.connect(directory, name="holder", autostart=False)
        for number in range(models):
            publish(holder, backend, device, number, nbytes)
        resident = holder.status().totals.resident_bytes
        for _ in range(rounds):
            pid = holder.store_pid
            started = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            session, _, fds, greeted = attach(directory, device, key_of(models - 1))
            times.setdefault("kill_to_attached_s", []).append(time.perf_counter() - started)
            times.setdefault("kill_to_serving_s", []).append(greeted - started)
            fds.close()
            session.close()
            wait("the holder is back", lambda: holder.alive and holder.store_pid != pid)  # noqa: B023 - used at once
            wait("all models have their reader", back(directory, models))
            times.setdefault("kill_to_rejoined_s", []).append(time.perf_counter() - started)
        for _ in range(max(1, rounds // 2)):
            kill_both(keeper, holder.store_pid)
            started = time.perf_counter()
            keeper = spawn.start(directory)
            wait("all models are back", back(directory, models))
            times.setdefault("both_killed_to_whole_s", []).append(time.perf_counter() - started)
        check(directory, backend, device, models - 1)
        if holder.status().totals.resident_bytes != resident:
            raise SystemExit("not as much memory is held as before")
        holder.shutdown_store()
        holder.close()
        pidfd = os.pidfd_open(keeper)
        select.select([pidfd], [], [])
        os.close(pidfd)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    medians = {name: {"median": statistics.median(values), "all": values} for name, values in times.items()}
    return {"resident_bytes": resident, **medians}


def check(directory: Path, backend: Backend, device: str, number: int) -> None:
    """A new client finds the bytes that were published."""
    session, attached, fds, _ = attach(directory, device, key_of(number))
    mappings = []
    with fds:
        for segment, fd in zip(attached.segments, fds.filenos(), strict=True):
            mappings.append(Mapping(backend, backend.import_fd(fd, segment.nbytes)))
            mappings[-1].map(Access.READ)
    nbytes = 0
    for index, place in enumerate(attached.places[:: TENSORS // 10]):
        expected = bytes_of(number * TENSORS + index * (TENSORS // 10) + 1, nbytes := nbytes or blob_bytes(attached))
        if digest_of(device, mappings[place.segment].address + place.offset, nbytes) != digest(expected):
            raise SystemExit("other bytes than were published")
    for mapping in mappings:
        mapping.close()
    session.close()


def blob_bytes(attached: Any) -> int:
    """The size of each of a model's blobs."""
    from shared_store.base.manifest import decode

    return decode(attached.manifest).blobs[0].nbytes


def first_gpu() -> tuple[str, str]:
    """The first GPU's UUID, with a context on it for this process's copies; and its name."""
    from cuda.bindings import driver

    from shared_store.memory.cuda.driver import visible_gpus

    device = next(iter(visible_gpus()))
    for error, *_ in (
        driver.cuInit(0),
        (retained := driver.cuDevicePrimaryCtxRetain(0)),
        driver.cuCtxSetCurrent(retained[1]),
    ):
        if error != driver.CUresult.CUDA_SUCCESS:
            raise SystemExit(f"no context on the GPU: {error}")
    name = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=True,
    )
    return device, name.stdout.strip()


def versions() -> dict[str, str]:
    """What was measured, and where."""
    here = Path(__file__).resolve().parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    model = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "commit": os.environ.get("WOOLY_COMMIT") or commit.stdout.strip(),
        "cpu": model[0] if model else platform.machine(),
        "cores": str(os.cpu_count()),
        "load_average": str(round(os.getloadavg()[0], 1)),  # others on the machine make all of this slower
        "python": platform.python_version(),
        "wooly": shared_store.__version__,
    }


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="hold memory of the first GPU")
    parser.add_argument("--models", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--mib", type=int, default=4, help="size of a model (default 4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the stores that are started
    device, name = first_gpu() if arguments.gpu else ("cpu", "")
    nbytes = max(8, arguments.mib * MIB // TENSORS // 512 * 512)
    result = {
        "versions": {**versions(), **({"gpu": name} if name else {})},
        "tensors": TENSORS,
        "tensor_bytes": nbytes,
        "recovery": {f"models_{count}": measure(device, count, nbytes, arguments.rounds) for count in arguments.models},
    }
    machine = next((word.lower() for word in name.split() if word[:1] in "HABL" and word[1:2].isdigit()), name)
    target = arguments.results / machine / "recovery.json" if name else arguments.results / "recovery.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target.read_text())


if __name__ == "__main__":
    main()
