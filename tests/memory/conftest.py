"""The backends that the shared suite runs on, and their capabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from support.hostmemory import poke, reach_gpu_memory, reach_host_memory

from shared_store.memory import Access, Mapping, MemfdBackend
from shared_store.memory.fake import FakeBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared_store.memory import Backend


@dataclass(frozen=True)
class Kind:
    """One implementation.

    Attributes:
        make: a new backend.
        host_access: a test can read and write mapped memory (on a GPU, through the driver's copies).
        seals: no process can write sealed memory.
        copy_on_write: a reader can write, and only its own process sees it.
        sized_fds: a descriptor has the size of its memory, before it is mapped.
        fd_backed: a segment that this process created is a descriptor, not a handle of a driver.
    """

    name: str
    make: Callable[[], Backend]
    host_access: bool
    seals: bool
    copy_on_write: bool
    sized_fds: bool = True
    fd_backed: bool = True


def _first_gpu() -> Backend:
    from shared_store.memory.cuda.driver import visible_gpus
    from shared_store.memory.cuda.vmm import CudaBackend

    return CudaBackend(next(iter(visible_gpus())))


KINDS = (
    Kind("memfd", MemfdBackend, host_access=True, seals=True, copy_on_write=True),
    Kind("fake", FakeBackend, host_access=True, seals=True, copy_on_write=True),
)
GPU = Kind("cuda_vmm", _first_gpu, host_access=True, seals=False, copy_on_write=False, sized_fds=False, fd_backed=False)


@pytest.fixture(params=[*KINDS, pytest.param(GPU, marks=pytest.mark.gpu)], ids=lambda kind: kind.name)
def kind(request):
    """One of the backends. The GPU's is skipped without a GPU."""
    if request.param is not GPU:
        yield request.param
        return
    from shared_store.memory.cuda.driver import visible_gpus

    if not visible_gpus():
        pytest.skip("no NVIDIA GPU is visible")
    reach_gpu_memory(0)
    yield request.param
    reach_host_memory()


@pytest.fixture
def capable(kind):
    """Skip on backends that lack a capability."""

    def check(capability):
        if not getattr(kind, capability):
            pytest.skip(f"{kind.name} lacks {capability}")

    return check


@pytest.fixture
def backend(kind):
    return kind.make()


@pytest.fixture
def segment(backend):
    """One segment of 2 MiB, released with the test."""
    made = backend.create(2 << 20)
    yield made
    backend.release(made)


@pytest.fixture
def imported(backend):
    """Make mappings of a segment through a descriptor, as another process does."""
    made = []

    def make(segment, access=None):
        with backend.export(segment) as fd:
            made.append(Mapping(backend, backend.import_fd(fd.fileno(), segment.nbytes)))
        if access is not None:
            made[-1].map(access)
        return made[-1]

    yield make
    for mapping in made:
        mapping.close()


@pytest.fixture
def write(imported):
    """Write bytes at the start of a segment, as its publisher, and unmap it."""

    def put(segment, data):
        mapping = imported(segment, Access.WRITE)
        poke(mapping.address, data)
        mapping.unmap()
        return mapping

    return put
