"""Private memory that leaves a device and returns: the steps of a move, without an engine.

A KV cache of ``--cache`` GiB in ranges, in vLLM's layout from 0.29 on: ``--layers`` layers, one after the other, with
pages of 64 KiB. ``--used`` MiB of it, in blocks scattered at random, are saved and restored. On a GPU the copies are in
an arena of pinned memory: the first move gets it, the later ones find it. On ``cpu`` they are swap files.

Every restored byte is compared. Times are medians of the moves after the first, in milliseconds; single values are
kept. Needs torch. Prints JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import GIB, MIB

PAGE = 64 << 10


class Cache:
    """A KV cache in ranges, and the place of its copies."""

    def __init__(self, device: Any, nbytes: int, layers: int) -> None:
        from shared_store.private.ranges import PrivateMemory
        from shared_store.torch.devices import backend_of
        from shared_store.torch.views import bytes_in, storage_of
        from wooly_vllm.residency.host_space import HostSpace
        from wooly_vllm.residency.rows import Rows

        self.device = device
        self.memory = PrivateMemory(backend_of(device))
        self.space = HostSpace(self.memory.backend)
        self.count = nbytes // layers // PAGE
        self.bytes = bytes_in(storage_of(self.memory.allocate(self.count * layers * PAGE)))
        starts = [layer * self.count * PAGE for layer in range(layers)]
        self.rows = [Rows(self.bytes, start, PAGE, PAGE, self.count) for start in starts]
        self.times: defaultdict[str, list[float]] = defaultdict(list)

    def timed(self, step: str, act: Callable[[], Any]) -> Any:
        """Measure a step, including all work that it starts on the device."""
        self.wait()
        began = time.perf_counter()
        result = act()
        self.wait()
        self.times[step].append(1e3 * (time.perf_counter() - began))
        return result

    def wait(self) -> None:
        """Wait for all work on the device."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def move(self, ids: list[int]) -> int:
        """Leave and return once with these blocks; return the bytes that were copied."""
        import torch

        from wooly_vllm.residency import rows as tables

        for table in self.rows:
            table.table()[ids] = torch.randint(1 << 62, (len(ids), PAGE // 8), device=self.device)
        right = [table.table()[ids].clone() for table in self.rows]
        nbytes = len(ids) * PAGE * len(self.rows)
        copy = self.timed("place", lambda: self._place(nbytes))
        self.timed("save", lambda: tables.save(self.rows, ids, copy))
        self.timed("unmap", self.memory.go_away)
        self.timed("create_and_map", self.memory.come_back)
        if not self.memory.backend.zeroed:
            self.timed("zero", lambda: tables.zero(self.rows))
        copy.rewind()
        self.timed("restore", lambda: tables.restore(self.rows, ids, copy))
        if not all(torch.equal(table.table()[ids], it) for table, it in zip(self.rows, right, strict=True)):
            raise SystemExit("blocks returned with other bytes; timings would be meaningless")
        copy.close()
        self.space.free()
        return nbytes

    def _place(self, nbytes: int) -> Any:
        self.space.prepare(nbytes)
        return self.space.copy(nbytes)


def main() -> None:
    """Measure, and print the figures as JSON."""
    options = parser(__doc__)
    options.add_argument("--device", default="cuda", help="torch's device: cuda (default) or cpu")
    options.add_argument("--cache", type=float, default=16, help="GiB of the KV cache (default 16)")
    options.add_argument("--used", type=int, default=880, help="MiB of it that are saved (default 880)")
    options.add_argument("--layers", type=int, default=32, help="layers (default 32)")
    options.add_argument("--repeat", type=int, default=11, help="moves (default 11, the first is shown alone)")
    arguments = options.parse_args()

    import torch

    torch.manual_seed(0)
    cache = Cache(torch.device(arguments.device), int(arguments.cache * GIB), arguments.layers)
    number = max(1, arguments.used * MIB // PAGE // arguments.layers)
    moved = 0
    for _ in range(arguments.repeat):
        moved = cache.move(sorted(torch.randperm(cache.count)[:number].tolist()))
    print(
        json.dumps(
            {
                "device": cache.memory.backend.device,
                "cache_bytes": cache.memory.nbytes,
                "moved_bytes": moved,
                "blocks": number,
                "first_ms": {step: values[0] for step, values in cache.times.items()},
                "median_ms": {step: statistics.median(values[1:]) for step, values in cache.times.items()},
                "all_ms": dict(cache.times),
            }
        )
    )
