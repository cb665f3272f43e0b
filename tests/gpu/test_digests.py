"""Digests on the GPU are those of the ``blake3`` package, for every size, alignment and number of ranges."""

from __future__ import annotations

import random

import pytest

from shared_store.base.digest import digest
from shared_store.base.errors import MemoryBackendError

cupy = pytest.importorskip("cupy", reason="digests on the GPU need CuPy")
numpy = pytest.importorskip("numpy")

from shared_store.memory.cuda.digests import CudaDigests  # noqa: E402 - after the check that CuPy is there


def _gpus() -> int:
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_gpus() == 0, reason="no CUDA device")]

CHUNK = 1024
GROUP = 256 * CHUNK  # bytes of one thread block
POOL = 24 << 20
EDGES = [0, 1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 1087, 1088, 2047, 2048, 2049, 3072, 3073]
TREES = [(CHUNK << k) + off for k in range(2, 15) for off in (-CHUNK, -65, -1, 0, 1, 64, CHUNK, CHUNK + 1)]
GROUPS = [n * GROUP + off for n in (3, 5, 7, 11) for off in (-1, 0, 1, CHUNK)]


class Uploaded:
    """The same random bytes on the host and, from an address that is a multiple of 256, on the GPU."""

    def __init__(self, nbytes: int, seed: int = 0) -> None:
        words = numpy.random.default_rng(seed).integers(0, 1 << 64, -(-nbytes // 8), dtype=numpy.uint64)
        self.host = memoryview(words).cast("B")[:nbytes]
        self.address = cupy.cuda.runtime.malloc(nbytes)
        cupy.cuda.runtime.memcpy(self.address, words.ctypes.data, nbytes, 1)

    def free(self) -> None:
        cupy.cuda.runtime.free(self.address)


@pytest.fixture(scope="module")
def pool():
    uploaded = Uploaded(POOL)
    yield uploaded
    uploaded.free()


@pytest.fixture(scope="module")
def digests():
    return CudaDigests()


def mismatches(digests, uploaded, places):
    """Return the ``(offset, size)`` among ``places`` whose digest from one call differs from the host's."""
    got = digests.digest_many([(uploaded.address + offset, size) for offset, size in places])
    assert len(got) == len(places)
    return [
        (offset, size)
        for (offset, size), value in zip(places, got, strict=True)
        if value != digest(uploaded.host[offset : offset + size])
    ]


@pytest.mark.parametrize("skew", [0, 1, 2, 3, 4, 8, 15])
def test_every_edge_of_blocks_chunks_and_subtrees_at_every_alignment(digests, pool, skew):
    """Borders of 64 B, 1 KiB, powers of two of chunks and thread blocks give the host's digest from any address."""
    assert mismatches(digests, pool, [(skew, size) for size in EDGES + TREES + GROUPS]) == []


def test_one_range_alone(digests, pool):
    """A call with one range, of one group or of several, does not depend on what shares its launch."""
    for size in (0, 1, CHUNK, GROUP, GROUP + 1, 3 * GROUP + 5):
        assert mismatches(digests, pool, [(16, size)]) == []


def test_thousands_of_random_ranges_in_one_call(digests, pool):
    """Thousands of overlapping ranges of random size and alignment come back right and in their order."""
    rng = random.Random(7)
    sizes = [rng.randrange(1 << rng.randrange(1, 19)) for _ in range(4000)]
    sizes += [rng.randrange(1 << 19, 1 << 23) for _ in range(60)]
    rng.shuffle(sizes)
    places = [
        (rng.randrange(POOL - size + 1) // align * align, size) for size in sizes for align in (rng.choice((1, 2, 16)),)
    ]
    assert mismatches(digests, pool, places) == []


def test_no_ranges(digests):
    """Without ranges there is no launch and no error."""
    assert digests.digest_many([]) == []


@pytest.mark.parametrize("start", [0, 1])
def test_one_changed_bit_anywhere_changes_the_digest(digests, start):
    """The first, the last and some middle bytes all count, in every load path of the kernel."""
    uploaded = Uploaded(5 * GROUP + 77)
    size = len(uploaded.host) - start
    try:
        seen = digests.digest_many([(uploaded.address + start, size)])
        for at in (0, 1, 70, CHUNK, 33 * CHUNK + 5, GROUP, size // 2, size - 78, size - 1):
            flipped = numpy.array([uploaded.host[start + at] ^ 0x10], numpy.uint8)
            cupy.cuda.runtime.memcpy(uploaded.address + start + at, flipped.ctypes.data, 1, 1)
            seen += digests.digest_many([(uploaded.address + start, size)])
        assert len(set(seen)) == len(seen)
    finally:
        uploaded.free()


def test_a_tensor_of_several_gib(digests):
    """Offsets over 32 bits are right: 5 GiB and a ragged end, aligned and not."""
    size = (5 << 30) + 12_345
    uploaded = Uploaded(size)
    try:
        assert mismatches(digests, uploaded, [(0, size), (3, size - 3)]) == []
    finally:
        uploaded.free()


def test_the_work_waits_for_its_stream(digests):
    """What was queued on the stream before the call is in the digest."""
    size = 256 << 20
    uploaded = Uploaded(size)
    runtime = cupy.cuda.runtime
    stream = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
    try:
        for _ in range(20):  # keeps the stream busy for some milliseconds before the last write
            runtime.memsetAsync(uploaded.address, 1, size, stream)
        runtime.memsetAsync(uploaded.address, 7, size, stream)
        assert digests.digest_many([(uploaded.address, size)], stream=stream) == [digest(b"\7" * size)]
    finally:
        runtime.streamDestroy(stream)
        uploaded.free()


def test_scratch_memory_is_freed(digests, pool):
    """Two hundred calls that use 1.5 MB each leave free memory unchanged, apart from other users of the GPU."""
    places = [(pool.address, POOL)] * 500
    digests.digest_many(places)
    before, _ = cupy.cuda.runtime.memGetInfo()
    for _ in range(200):
        digests.digest_many(places)
    after, _ = cupy.cuda.runtime.memGetInfo()
    assert before - after < 100 << 20


def test_the_current_device_does_not_change(pool):
    """A caller's choice of device survives a call for another one (or the same, where there is only one)."""
    last = _gpus() - 1
    before = cupy.cuda.runtime.getDevice()
    assert CudaDigests(before).digest_many([(pool.address, 1 << 20)]) == [digest(pool.host[: 1 << 20])]
    CudaDigests(last).digest_many([(0, 0)])
    assert cupy.cuda.runtime.getDevice() == before


def test_a_device_that_is_not_there_is_a_typed_error():
    """CUDA's error is raised as wooly's."""
    with pytest.raises(MemoryBackendError, match="digests on the GPU failed"):
        CudaDigests(_gpus()).digest_many([(0, 0)])
