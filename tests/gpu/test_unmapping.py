"""A GPU's memory is unmapped when no kernel uses it, and never during a graph capture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.mapping import map_in_turn
from support.stores import StoreProcess

from shared_store.memory.cuda import nvml

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_MAPPED = """
import gc, threading, torch
from torch import nn
from shared_store.base.errors import MemoryBackendError
from shared_store.memory import Access, Mapping, unmapping
from shared_store.memory.cuda.driver import visible_gpus
from shared_store.memory.cuda.vmm import CudaBackend
from shared_store.torch.mapping_registry import register
from shared_store.torch.views import bytes_in, storage_of

N = 256 << 20
SECOND = 2_000_000_000  # cycles, of at most 2 GHz
backend = CudaBackend(next(iter(visible_gpus())))

def mapped():
    segment = backend.create(N)
    with backend.export(segment) as fd:
        mapping = register(Mapping(backend, backend.import_fd(fd.fileno(), N)))
    backend.release(segment)
    mapping.map(Access.WRITE)
    bytes_in(storage_of(mapping)).fill_(7)
    mapping.map(Access.READ)
    return mapping

def run_in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()

def free():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]

torch.zeros(1, device="cuda").sum().item()
"""

_WAYS = {
    "collected": "del mapping, view",
    "collected in another thread": "passed = [mapping, view]; del mapping, view; run_in_thread(passed.clear)",
    "collected in a circle": "circle = [mapping, view]; circle.append(circle); del circle, mapping, view; gc.collect()",
    "closed": "mapping.close()",
    "unmapped": "mapping.unmap()",
    "released": "mapping.release_segment()",
}

_IN_FLIGHT = """
mapping = mapped()
view = bytes_in(storage_of(mapping))
assert int(view.sum(dtype=torch.int64)) == 7 * N  # the kernel is loaded
with torch.cuda.stream(torch.cuda.Stream()):  # which does not block, and which nobody waits for
    torch.cuda._sleep(SECOND)
    result = view.sum(dtype=torch.int64)
    ended = torch.cuda.Event()
    ended.record()
assert not ended.query()
{way}
assert ended.query()
torch.cuda.synchronize()
assert int(result) == 7 * N
print("right")
"""

_UNSHARE = """
from wooly_hf.sharing import unshare
module = nn.Module()
mapping = mapped()
module.weight = nn.Parameter(bytes_in(storage_of(mapping)), requires_grad=False)
del mapping
module.weight.clone()
before = free()
torch.cuda._sleep(SECOND)
assert unshare(module) == N  # the copy is queued behind the second
torch.cuda.synchronize()
found = free()
assert found >= before - (64 << 20), (found, before)  # one copy more, one mapping less
assert int(module.weight.sum(dtype=torch.int64)) == 7 * N
print("right")
"""

_CAPTURE = """
spare, static, graph = mapped(), torch.zeros(1000, device="cuda"), torch.cuda.CUDAGraph()
static += 1
before, total = free(), unmapping.deferred().total
with torch.cuda.graph(graph):
    static += 1
    {during}
    static += 1
{after}
graph.replay()
graph.replay()
torch.cuda.synchronize()
assert static.eq(5).all()
print("right")
"""
_DEFERRED = """
assert unmapping.deferred() == (0, 0, total + 1)
found = free()
assert found >= before + N // 2, (found, before)  # the captured graph takes some
"""
_CAPTURES = {
    "collected": ("del spare; gc.collect(); assert unmapping.deferred().waiting == 1", _DEFERRED),
    "collected in another thread": ("passed = [spare]; del spare; run_in_thread(passed.clear)", _DEFERRED),
    "closed": ("spare.close()", _DEFERRED),
    "unmapping is refused": (
        "refused = []\n    try: spare.unmap()\n    except MemoryBackendError as error: refused.append(error)",
        "assert refused and spare.access is Access.READ; spare.close()",
    ),
}

_BLOCKING_STREAM = """
from cuda.bindings import driver

def call(name, *arguments):
    error, *results = getattr(driver, name)(*arguments)
    assert not error, (name, error)
    return results[0] if results else None

mapping = mapped()
stream = call("cuStreamCreate", 0)  # one that the default stream waits for, and that torch does not know
call("cuStreamBeginCapture", stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
call("cuMemsetD8Async", mapping.address, 1, 1, stream)
mapping.close()
assert unmapping.deferred().waiting == 1
call("cuStreamEndCapture", stream)
unmapping.unmap_deferred()
assert unmapping.deferred().waiting == 0
print("right")
"""


def _run(program: str) -> None:
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-c", _MAPPED + program], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout == "right\n", done.stderr[-3000:]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("way", _WAYS)
def test_a_kernel_ends_before_its_memory_is_unmapped(way: str) -> None:
    """Its result is right; an access to unmapped memory would end the process."""
    _run(_IN_FLIGHT.replace("{way}", _WAYS[way]))


@pytest.mark.usefixtures("gpu")
def test_the_copy_of_unshare_ends_before_its_source_is_unmapped() -> None:
    _run(_UNSHARE)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("moment", _CAPTURES)
def test_a_capture_succeeds_while_memory_is_given_up(moment: str) -> None:
    """The graph replays right, and the memory is free after the capture."""
    during, after = _CAPTURES[moment]
    _run(_CAPTURE.replace("{during}", during).replace("{after}", after))


@pytest.mark.usefixtures("gpu")
def test_a_capture_of_a_blocking_stream_is_seen_by_the_driver() -> None:
    """Without anybody telling of it."""
    _run(_BLOCKING_STREAM)


_FREE = """
import sys
from shared_store.memory.cuda import nvml
(gpu,) = sys.argv[1:]
def differ(one, other, most=256 << 20):
    return abs(one - other) > most
driver = free()
assert not differ(nvml.free_bytes(gpu), driver), (nvml.free_bytes(gpu), driver)
block = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
assert not differ(nvml.free_bytes(gpu), driver - (4 << 30)), (nvml.free_bytes(gpu), free())
assert abs(nvml.memory(gpu).total - torch.cuda.mem_get_info()[1]) < 4 << 30
print("right")
"""


def test_free_memory_of_nvml_is_that_of_the_driver(gpu: str) -> None:
    """Before and after an allocation of 4 GiB."""
    pytest.importorskip("torch")
    command = [sys.executable, "-c", _MAPPED + _FREE, gpu]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "right\n", done.stderr[-3000:]


def test_nvml_needs_no_context(gpu: str) -> None:
    """A process that asks uses no memory of the GPU for it."""
    before = nvml.free_bytes(gpu)
    program = (
        "import sys; from shared_store.memory.cuda import nvml; print(nvml.free_bytes(sys.argv[1])); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, gpu], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert int(child.stdout.readline()) > 0
        assert isinstance(before, int)
        assert nvml.free_bytes(gpu) >= before - (16 << 20)
        child.communicate()


def test_two_processes_map_in_turn(gpu: str, runtime_dir: Path, tmp_path: Path) -> None:
    store = StoreProcess(runtime_dir, redis_url=f"unix://{runtime_dir}/away").start()
    map_in_turn(runtime_dir, gpu, tmp_path / "journal")
    store.clean_up()
