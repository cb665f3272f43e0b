"""Digests on the GPU are those of the ``blake3`` package, for every size, alignment and number of ranges."""

from __future__ import annotations

import random

import pytest

from shared_store.base.digest import digest
from shared_store.base.errors import MemoryBackendError

torch = pytest.importorskip("torch")
numpy = pytest.importorskip("numpy")
pytest.importorskip("cuda.bindings", reason="digests on the GPU need cuda-bindings")

from shared_store.memory.cuda import images, kernels  # noqa: E402 - after the check that cuda-bindings are there
from shared_store.memory.cuda.digests import CudaDigests  # noqa: E402
from shared_store.memory.cuda.driver import Driver  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device")]

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
        self.tensor = torch.from_numpy(words.view(numpy.uint8)).to("cuda")[:nbytes]
        self.address = self.tensor.data_ptr()


@pytest.fixture(scope="module")
def pool():
    return Uploaded(POOL)


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
    seen = digests.digest_many([(uploaded.address + start, size)])
    for at in (0, 1, 70, CHUNK, 33 * CHUNK + 5, GROUP, size // 2, size - 78, size - 1):
        uploaded.tensor[start + at] ^= 0x10
        torch.cuda.synchronize()
        seen += digests.digest_many([(uploaded.address + start, size)])
    assert len(set(seen)) == len(seen)


def test_a_tensor_of_several_gib(digests):
    """Offsets over 32 bits are right: 5 GiB and a ragged end, aligned and not."""
    size = (5 << 30) + 12_345
    assert mismatches(digests, Uploaded(size), [(0, size), (3, size - 3)]) == []


def test_the_work_waits_for_its_stream(digests):
    """What was queued on the stream before the call is in the digest."""
    uploaded = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):  # keeps the stream busy for some milliseconds before the last write
            uploaded.fill_(1)
        uploaded.fill_(7)
    found = digests.digest_many([(uploaded.data_ptr(), uploaded.numel())], stream=stream.cuda_stream)
    assert found == [digest(b"\7" * uploaded.numel())]


def test_scratch_memory_is_freed(digests, pool):
    """Two hundred calls that use 1.5 MB each leave free memory unchanged, apart from other users of the GPU."""
    places = [(pool.address, POOL)] * 500
    digests.digest_many(places)
    before, _ = torch.cuda.mem_get_info()
    for _ in range(200):
        digests.digest_many(places)
    after, _ = torch.cuda.mem_get_info()
    assert before - after < 100 << 20


def test_scratch_memory_goes_with_its_object(pool):
    """Fifty objects, one after another, each with 30 MB of scratch memory, leave free memory unchanged."""
    places = [(pool.address, POOL)] * 10_000
    CudaDigests().digest_many(places)
    before, _ = torch.cuda.mem_get_info()
    for _ in range(50):
        CudaDigests().digest_many(places)
    after, _ = torch.cuda.mem_get_info()
    assert before - after < 100 << 20


def test_the_current_device_does_not_change(pool):
    """A caller's choice of device survives a call for another one (or the same, where there is only one)."""
    last = torch.cuda.device_count() - 1
    before = torch.cuda.current_device()
    assert CudaDigests(before).digest_many([(pool.address, 1 << 20)]) == [digest(pool.host[: 1 << 20])]
    CudaDigests(last).digest_many([(0, 0)])
    assert torch.cuda.current_device() == before


def test_a_device_that_is_not_there_is_a_typed_error():
    """CUDA's error is raised as wooly's."""
    with pytest.raises(MemoryBackendError, match="digests on the GPU failed"):
        CudaDigests(torch.cuda.device_count()).digest_many([(0, 0)])


def test_kernels_are_the_compiled_ones():
    """Machine code of this GPU's architecture is loaded: nothing is compiled."""
    CudaDigests()
    major, minor = torch.cuda.get_device_capability(0)
    loaded = kernels.kernels_of(Driver(), 0).image
    assert loaded == images.suitable(images.TARGETS, (major, minor))[0]
    assert loaded.startswith(f"sm_{major}")


@pytest.mark.parametrize("kept", ["compute_75", None])
def test_a_gpu_without_machine_code_gets_the_same_digests(pool, monkeypatch, caplog, kept):
    """PTX, and without any image CuPy, make kernels with the same digests; the second is logged."""
    stored = images.read(kernels.IMAGES)
    left = {name: image for name, image in stored.images.items() if name == kept}
    monkeypatch.setattr(images, "read", lambda _: images.Images(stored.source, stored.compiler, left))
    monkeypatch.setattr(kernels, "_loaded", {})
    made = CudaDigests()
    assert kernels.kernels_of(Driver(), 0).image == (kept or "cupy")
    assert mismatches(made, pool, [(3, size) for size in EDGES + GROUPS]) == []
    assert ("compiling it" in caplog.text) == (kept is None)
