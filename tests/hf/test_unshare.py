"""``unshare`` drops shared memory only when nothing reads it any more."""

from __future__ import annotations

from support.hostmemory import run_child

_PROGRAM = """
import ctypes, threading, time
import torch
from torch import nn
from shared_store.memory import Access, Mapping
from shared_store.memory.fake import FakeBackend
from shared_store.torch.mapping_registry import register
from shared_store.torch.views import bytes_in, storage_of
from wooly_hf.sharing import Stats, stats, unshare

backend = FakeBackend()
segment = backend.create(2 << 20)
mapping = register(Mapping(backend, segment))
mapping.map(Access.WRITE)
module = nn.Module()
module.weight = nn.Parameter(bytes_in(storage_of(mapping)).fill_(7), requires_grad=False)
address, nbytes = mapping.address, mapping.nbytes
del mapping
assert stats(module) == Stats(nbytes, 0, 0, 0), stats(module)
started, result = threading.Event(), []

def kernel():
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        total = sum(ctypes.string_at(address + at, 1)[0] for at in range(0, nbytes, 4096))
        started.set()
    result.append(total)

backend.calls.clear()
backend.launch(kernel)
started.wait()
assert unshare(module) == nbytes
assert int(module.weight.sum()) == 7 * nbytes
assert stats(module) == Stats(0, nbytes, 0, 0), stats(module)
print(result, backend.calls, backend.allocated_bytes)
"""


def test_work_in_flight_ends_before_its_memory_is_unmapped():
    """As a kernel, or the copy that ``unshare`` makes on a GPU. Otherwise the process ends with SIGSEGV."""
    assert run_child(_PROGRAM) == (0, f"{[7 * 512]} {['settle', 'unmap', 'release']} 0")
