"""Digests of GPU memory: speed for one tensor, for many in one call, and for all tensors of a 9 GB Llama.

Times are of whole :meth:`CudaDigests.digest_many` calls, including launches and copies: medians of ``--repeat`` calls
on random bytes. Needs torch and a GPU with 10 GB of free memory. Prints JSON, which ``python benchmarks gpu --parts
digest`` stores.

``digest_limit_gbps`` is the limit of the integer unit, which executes xors and rotations: 456 of them for each 64-byte
block (7 rounds of 8 mixes of 8, and 8 at the end), 64 lanes per multiprocessor, the GPU's highest clock, and 17
compressions for the 16 blocks of a chunk, because the tree adds one per chunk.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import GIB, MIB, seconds
from shared_store.base.digest import digest

ALIGNMENT = 512


def llama_sizes() -> list[int]:
    """Return the bytes of each tensor: bf16, hidden 4096, 8 KV heads of 128, MLP 6144, 30 layers, 128,256 tokens."""
    hidden, kv, mlp, vocabulary, element = 4096, 1024, 6144, 128_256, 2
    attention = [hidden * hidden, hidden * kv, hidden * kv, hidden * hidden]
    layer = [*attention, *[hidden * mlp] * 3, hidden, hidden]
    return [element * n for n in [vocabulary * hidden, *layer * 30, hidden, vocabulary * hidden]]


def place(address: int, sizes: list[int]) -> list[tuple[int, int]]:
    """Return consecutive ranges of the given sizes, the first at ``address``."""
    ranges = []
    for size in sizes:
        ranges.append((address, size))
        address += -(-size // ALIGNMENT) * ALIGNMENT
    return ranges


def random_bytes(nbytes: int) -> tuple[Any, memoryview]:
    """Allocate device memory of repeated random bytes; return it (uint8), and a copy of its first 64 MiB."""
    import torch

    made = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    block = torch.randint(256, (GIB,), dtype=torch.uint8, device="cuda")
    for at in range(0, nbytes, GIB):
        made[at : at + GIB] = block[: nbytes - at]
    return made, made[: 64 * MIB].cpu().numpy().data


def median_seconds(digests: Any, ranges: list[tuple[int, int]], repeat: int) -> float:
    """Return the median duration of a call, after two for warm-up."""
    durations = [seconds(lambda: digests.digest_many(ranges)) for _ in range(repeat + 2)]
    return statistics.median(durations[2:])


def main() -> None:
    """Measure, and print the figures as JSON."""
    options = parser(__doc__)
    options.add_argument("--repeat", type=int, default=15, help="calls of which the median is taken (default 15)")
    arguments = options.parse_args()

    from shared_store.memory.cuda.digests import CudaDigests
    from shared_store.memory.cuda.driver import Driver

    sizes = llama_sizes()
    memory, first = random_bytes(sum(sizes) + ALIGNMENT * len(sizes))
    address = memory.data_ptr()
    start = time.perf_counter()
    digests = CudaDigests()
    if digests.digest_many([(address, 64 * MIB)]) != [digest(first)]:
        raise SystemExit("the GPU computes another digest than the host; timings would be meaningless")
    first_call = time.perf_counter() - start

    def rate(ranges: list[tuple[int, int]]) -> float:
        return sum(size for _, size in ranges) / median_seconds(digests, ranges, arguments.repeat) / 1e9

    model_s = median_seconds(digests, place(address, sizes), arguments.repeat)
    driver = Driver()
    attributes = driver.bindings.CUdevice_attribute
    multiprocessors = driver.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 0)
    clock_khz = driver.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 0)
    lanes_per_s = multiprocessors * 64 * 1e3 * clock_khz
    limit_gbps = lanes_per_s / 456 * 64 * 16 / 17 / 1e9
    many = place(address, [64 * MIB] * 64)
    result = {
        "digest_gbps": rate(many),
        "digest_gbps_64mib_alone": rate(many[:1]),
        "digest_gbps_1gib_alone": rate(place(address, [GIB])),
        "digest_gbps_1gib_odd_address": rate(place(address + 1, [GIB])),
        "digest_4096_of_8kib_ms": 1e3 * median_seconds(digests, place(address, [8192] * 4096), arguments.repeat),
        "digest_model_ms": 1e3 * model_s,
        "digest_model_bytes": sum(sizes),
        "digest_model_tensors": len(sizes),
        "digest_limit_gbps": limit_gbps,
        "digest_share_of_limit": sum(sizes) / model_s / 1e9 / limit_gbps,
        "digest_first_call_s": first_call,
    }
    print(json.dumps(result))
