"""Dead bytes after a realistic sequence of models, and the cost of compacting them.

A base model and three fine-tunes of its last two layers of 16, which share the other layers with it, and 20 small
models of 300 KB. Then the base, one fine-tune and ten small models are removed, and the store is compacted as by
``wooly compact``. ``resident_mib``, ``dead_mib`` and ``padding_mib`` are the status's. The store does not compact by
itself here. The rate is that of live bytes moved.

    python benchmarks compaction [--out benchmarks/results/compaction.json]
    python benchmarks compaction --gpu --out benchmarks/results/h100/compaction.json    (needs no torch)
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from support.content import content, key

from benchmarks.harness import machine
from benchmarks.harness.arguments import parser
from benchmarks.harness.device import Device, Gpu
from benchmarks.harness.figures import MIB
from benchmarks.harness.published import load
from benchmarks.harness.results import RESULTS, write
from benchmarks.harness.store import TemporaryStore
from shared_store.client.compact import compact
from shared_store.client.session import Session
from shared_store.runtime.options import ServeOptions

LAYERS, CHANGED, TUNES, SMALL = 16, 2, 3, 20
LAYER = (2 * MIB, MIB, MIB, 2 * MIB, 8 * MIB, 8 * MIB, 8 * MIB, 2048, 2048)
"""Bytes of a layer's tensors."""
EMBEDDING = 64 * MIB
NEVER = 1.0

Tensors = list[tuple[str, int]]
"""Seed and bytes of each tensor."""


def base() -> Tensors:
    """Return the tensors of the base model."""
    layers = [(f"layer {layer}/{part}", nbytes) for layer in range(LAYERS) for part, nbytes in enumerate(LAYER)]
    return [("embedding", EMBEDDING), *layers]


def tuned(number: int) -> Tensors:
    """Return the base with other tensors in its last layers."""
    unchanged = 1 + (LAYERS - CHANGED) * len(LAYER)
    return [*base()[:unchanged], *((f"tune {number} {seed}", nbytes) for seed, nbytes in base()[unchanged:])]


def small(number: int) -> Tensors:
    """Return a model the size of an adapter."""
    return [(f"small {number}/{part}", 30_000) for part in range(10)]


def add(session: Session, device: Device, number: int, tensors: Tensors) -> str:
    """Publish a model of random bytes, leave it, and return its key."""
    load(session, device, key(number), [content(seed, nbytes) for seed, nbytes in tensors])
    session.leave(key(number))
    return key(number)


def memory(session: Session, device: str) -> dict[str, float]:
    """Return the status of the device."""
    (found,) = [one for one in session.status().devices if one.id == device]
    return {
        "resident_mib": found.resident_bytes / MIB,
        "dead_mib": round(found.dead_bytes / MIB, 1),
        "padding_mib": round(found.padding_bytes / MIB, 1),
    }


def measure(session: Session, device: Device) -> dict[str, Any]:
    """Run the sequence once, and return the figures."""
    result: dict[str, Any] = {}
    keys = {"base": add(session, device, 1, base())}
    keys |= {f"tune {one}": add(session, device, 10 + one, tuned(one)) for one in range(TUNES)}
    result["large_models"] = memory(session, device.name)
    keys |= {f"small {one}": add(session, device, 100 + one, small(one)) for one in range(SMALL)}
    result["all_models"] = memory(session, device.name)
    for name in ["base", "tune 0", *(f"small {one}" for one in range(0, SMALL, 2))]:
        session.remove(keys[name])
    result["half_removed"] = memory(session, device.name)
    began = time.perf_counter()
    done = compact(session, device.name, device.backend)
    taken = time.perf_counter() - began
    result["compacted"] = memory(session, device.name)
    result["compaction"] = {
        "segments": done.segments,
        "moved_mib": round(done.moved_bytes / MIB, 1),
        "freed_mib": round(done.freed_bytes / MIB, 1),
        "seconds": round(taken, 3),
        "gbps": round(done.moved_bytes / taken / 1e9, 2),
    }
    return result


def main() -> None:
    """Measure, and write the results."""
    options = parser(__doc__)
    options.add_argument("--gpu", action="store_true", help="use memory of the first NVIDIA GPU")
    options.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "compaction.json",
        help="result file (default benchmarks/results/compaction.json)",
    )
    arguments = options.parse_args()
    device = Gpu() if arguments.gpu else Device()
    versions = {**machine.stamp(), **machine.host(), **machine.wooly(), **(machine.gpu() if arguments.gpu else {})}
    with TemporaryStore() as store:
        store.start(ServeOptions(store.directory, compact_share=NEVER).to_json())
        with store.session() as session:
            result = {"versions": versions, **measure(session, device)}
    write(arguments.out, result)
    print(json.dumps(result, indent=1))
