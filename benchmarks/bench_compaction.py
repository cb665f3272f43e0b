"""Memory that nobody uses after a realistic sequence of models, and what it costs to have it back.

A base model and three fine-tunes of its last two layers of 16, which share the rest with it tensor by tensor, and 20
small models of 300 KB. Then the base, one fine-tune and ten small models are removed, and what ``wooly compact`` calls
runs. ``resident_mib``, ``dead_mib`` and ``padding_mib`` are the status's; the store is a process of its own, which does
not compact by itself here. The rate is that of live bytes moved.

    python benchmarks/bench_compaction.py [--out benchmarks/results/compaction.json]
    python benchmarks/bench_compaction.py --gpu --out benchmarks/results/h100/compaction.json    (needs no torch)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench_gpu
from gpu_processes import nvidia_smi

import shared_store
from shared_store.base.digest import digest
from shared_store.base.manifest import Blob, Manifest, TensorEntry
from shared_store.client.compact import compact
from shared_store.client.session import Session
from shared_store.memory import Access, Backend, Mapping, backend_for
from shared_store.memory.cuda.driver import visible_gpus
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.spawn import start_detached

MIB = 1 << 20
LAYERS, CHANGED, TUNES, SMALL = 16, 2, 3, 20
LAYER = (2 * MIB, MIB, MIB, 2 * MIB, 8 * MIB, 8 * MIB, 8 * MIB, 2048, 2048)  # bytes of a layer's tensors
EMBEDDING = 64 * MIB
Write = Callable[[int, bytes], Any]


def base() -> list[tuple[str, int]]:
    """Seed and bytes of each tensor."""
    layers = [(f"layer {layer}/{part}", nbytes) for layer in range(LAYERS) for part, nbytes in enumerate(LAYER)]
    return [("embedding", EMBEDDING), *layers]


def tuned(number: int) -> list[tuple[str, int]]:
    """The base, with its last layers trained on."""
    kept = 1 + (LAYERS - CHANGED) * len(LAYER)
    return [*base()[:kept], *((f"tune {number} {seed}", nbytes) for seed, nbytes in base()[kept:])]


def small(number: int) -> list[tuple[str, int]]:
    """An adapter's worth."""
    return [(f"small {number}/{part}", 30_000) for part in range(10)]


def publish(session: Session, backend: Backend, write: Write, number: int, model: list[tuple[str, int]]) -> str:
    """Publish a model of random bytes, and leave it; returns its key."""
    key = f"{number:064x}"
    contents = [random.Random(seed).randbytes(nbytes) for seed, nbytes in model]
    blobs = tuple(Blob(digest(data), len(data)) for data in contents)
    session.open(key, name=str(number), engine="bench", device=backend.device, publish=True, timeout_s=60)
    planned, fds = session.plan(key, blobs)
    fds.close()
    for index, segment in enumerate(planned.segments):
        if not segment.promised:
            continue
        with session.fill(key, segment.id) as fd:
            mapping = Mapping(backend, backend.import_fd(fd.fileno(), segment.nbytes))
        mapping.map(Access.WRITE)
        for data, place in zip(contents, planned.places, strict=True):
            if place.new and place.segment == index:
                write(mapping.address + place.offset, data)
        mapping.close()
    tensors = tuple(
        TensorEntry("", str(at), "parameter", at, "uint8", (one.nbytes,), (1,), 0, at) for at, one in enumerate(blobs)
    )
    manifest = Manifest(key=key, name=str(number), engine="bench", device=backend.device, blobs=blobs, tensors=tensors)
    _, fds = session.commit(manifest)
    fds.close()
    session.leave(key)
    return key


def memory(session: Session, device: str) -> dict[str, float]:
    """What the status says of the device."""
    (found,) = [one for one in session.status().devices if one.id == device]
    return {
        "resident_mib": found.resident_bytes / MIB,
        "dead_mib": round(found.dead_bytes / MIB, 1),
        "padding_mib": round(found.padding_bytes / MIB, 1),
    }


@contextmanager
def writing(backend: Backend) -> Iterator[Write]:
    """How bytes get to an address of the device."""
    if backend.ordinal is None:
        yield lambda address, data: ctypes.memmove(address, data, len(data))
        return
    from cuda.bindings import driver

    from shared_store.memory.registry import transfer_for

    def write(address: int, data: bytes) -> None:
        (error,) = driver.cuMemcpyHtoD(address, data, len(data))
        if error:
            raise SystemExit(f"cuMemcpyHtoD: {error.name}")
        transfer.settle()

    with transfer_for(backend) as transfer:
        yield write


def measure(session: Session, backend: Backend, write: Write) -> dict[str, Any]:
    """Run the sequence once."""
    device, result = backend.device, {}
    keys = {"base": publish(session, backend, write, 1, base())}
    keys |= {f"tune {one}": publish(session, backend, write, 10 + one, tuned(one)) for one in range(TUNES)}
    result["large_models"] = memory(session, device)
    keys |= {f"small {one}": publish(session, backend, write, 100 + one, small(one)) for one in range(SMALL)}
    result["all_models"] = memory(session, device)
    for name in ["base", "tune 0", *(f"small {one}" for one in range(0, SMALL, 2))]:
        session.remove(keys[name])
    result["half_removed"] = memory(session, device)
    began = time.perf_counter()
    done = compact(session, device, backend)
    taken = time.perf_counter() - began
    result["compacted"] = memory(session, device)
    result["compaction"] = {
        "segments": done.segments,
        "moved_mib": round(done.moved_bytes / MIB, 1),
        "freed_mib": round(done.freed_bytes / MIB, 1),
        "seconds": round(taken, 3),
        "gbps": round(done.moved_bytes / taken / 1e9, 2),
    }
    return result


def versions(*, gpu: bool) -> dict[str, str]:
    """What was measured, and where."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    where = {"gpu": nvidia_smi("name"), "driver": nvidia_smi("driver_version")} if gpu else {}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": bench_gpu.commit(),
        "cpu": next(line for line in lines if "model name" in line).split(":")[1].strip(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "wooly": shared_store.__version__,
        **where,
    }


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="in the memory of the first GPU")
    parser.add_argument("--out", type=Path, default=bench_gpu.HERE / "results" / "compaction.json")
    arguments = parser.parse_args()
    backend = backend_for(next(iter(visible_gpus())) if arguments.gpu else "cpu")
    with tempfile.TemporaryDirectory(prefix="wooly-") as directory:
        start_detached(ServeOptions(Path(directory), compact_share=1.0))
        with Session.connect(Path(directory), autostart=False) as session, writing(backend) as write:
            try:
                result = {"versions": versions(gpu=arguments.gpu), **measure(session, backend, write)}
            finally:
                session.shutdown_store()
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
