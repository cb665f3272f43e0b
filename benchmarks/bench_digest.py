"""How fast the GPU digests its own memory: one tensor alone, many in one call, and all tensors of a Llama of 9 GB.

Times are of :meth:`CudaDigests.digest_many` as a caller sees it, launches and copies included, medians of ``--repeat``
calls on random bytes. Needs CuPy and a GPU with 10 GB free. Prints JSON; ``bench_gpu.py --parts digest`` keeps it.

The limit it compares with is that of the integer unit which does xors and rotations: 456 of them for each 64-byte block
(7 rounds of 8 mixes of 8, and 8 at the end), 64 lanes a multiprocessor, the highest clock the GPU states, and 17
compressions for the 16 blocks of a chunk, since the tree adds one for each chunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import cupy
import numpy as np

from shared_store.base.digest import digest
from shared_store.memory.cuda.digests import CudaDigests

MIB, GIB = 1 << 20, 1 << 30
ALIGNMENT = 512
CLOCK_RATE, MULTIPROCESSORS = 13, 16  # cudaDeviceAttr; the clock is in kHz
HOST_TO_DEVICE = 1  # cudaMemcpyKind


def llama_sizes() -> list[int]:
    """Bytes of each tensor: bf16, hidden 4096, 8 KV heads of 128, MLP 6144, 30 layers, 128,256 tokens, not tied."""
    hidden, kv, mlp, vocabulary, element = 4096, 1024, 6144, 128_256, 2
    attention = [hidden * hidden, hidden * kv, hidden * kv, hidden * hidden]
    layer = [*attention, *[hidden * mlp] * 3, hidden, hidden]
    return [element * n for n in [vocabulary * hidden, *layer * 30, hidden, vocabulary * hidden]]


def place(address: int, sizes: list[int]) -> list[tuple[int, int]]:
    """Ranges of those sizes, one after another from an address."""
    ranges = []
    for size in sizes:
        ranges.append((address, size))
        address += -(-size // ALIGNMENT) * ALIGNMENT
    return ranges


def random_bytes(nbytes: int) -> tuple[int, memoryview]:
    """The address of random device memory, and its first 64 MiB. The same GiB again and again: nothing here looks."""
    words = np.random.default_rng(0).integers(0, 1 << 64, GIB // 8, dtype=np.uint64)
    runtime = cupy.cuda.runtime
    address = runtime.malloc(nbytes)
    for at in range(0, nbytes, GIB):
        runtime.memcpy(address + at, words.ctypes.data, min(GIB, nbytes - at), HOST_TO_DEVICE)
    return address, words.data.cast("B")[: 64 * MIB]


def seconds(digests: CudaDigests, ranges: list[tuple[int, int]], repeat: int) -> float:
    """Median duration of one call, after two that are not counted."""
    durations = []
    for _ in range(repeat + 2):
        start = time.perf_counter()
        digests.digest_many(ranges)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[2:])


def main() -> None:
    """Measure, and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15)
    arguments = parser.parse_args()

    sizes = llama_sizes()
    address, first = random_bytes(sum(sizes) + ALIGNMENT * len(sizes))
    runtime, device = cupy.cuda.runtime, cupy.cuda.runtime.getDevice()
    start = time.perf_counter()
    digests = CudaDigests()
    if digests.digest_many([(address, 64 * MIB)]) != [digest(first)]:
        raise SystemExit("the GPU's digest is not the host's: fix that before any timing")
    first_call = time.perf_counter() - start

    def rate(ranges: list[tuple[int, int]]) -> float:
        return sum(size for _, size in ranges) / seconds(digests, ranges, arguments.repeat) / 1e9

    model_s = seconds(digests, place(address, sizes), arguments.repeat)
    lanes_per_s = (
        runtime.deviceGetAttribute(MULTIPROCESSORS, device) * 64 * 1e3 * runtime.deviceGetAttribute(CLOCK_RATE, device)
    )
    limit_gbps = lanes_per_s / 456 * 64 * 16 / 17 / 1e9
    many = place(address, [64 * MIB] * 64)
    result = {
        "digest_gbps": rate(many),
        "digest_gbps_64mib_alone": rate(many[:1]),
        "digest_gbps_1gib_alone": rate(place(address, [GIB])),
        "digest_gbps_1gib_odd_address": rate(place(address + 1, [GIB])),
        "digest_4096_of_8kib_ms": 1e3 * seconds(digests, place(address, [8192] * 4096), arguments.repeat),
        "digest_model_ms": 1e3 * model_s,
        "digest_model_bytes": sum(sizes),
        "digest_model_tensors": len(sizes),
        "digest_limit_gbps": limit_gbps,
        "digest_share_of_limit": sum(sizes) / model_s / 1e9 / limit_gbps,
        "digest_first_call_s": first_call,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
