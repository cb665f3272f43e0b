"""Copies of a device's memory: one suite, run on each of the backends."""

from __future__ import annotations

import random
import threading

import pytest
from support.hostmemory import peek, poke

from shared_store.memory import Access, Mapping
from shared_store.memory.mapping import map_writable
from shared_store.memory.registry import transfer_for
from shared_store.memory.transfer import BUFFER_BYTES, Copy, copy_blobs

MIB = 1 << 20


@pytest.fixture
def mapping(backend, capable):
    """A mapping of 16 MiB for writing."""
    capable("host_access")
    with Mapping(backend, backend.create(16 * MIB)) as mapped:
        mapped.map(Access.WRITE)
        yield mapped


def put(data):
    """Return a function that writes bytes into the buffer of a lane."""

    def fill(view):
        view[:] = data

    return fill


def test_blobs_are_copied_between_mappings(backend, mapping, imported, write, capable):
    """From several sources, to the offsets asked for and to no other bytes."""
    capable("host_access")
    sources, segments = [], [backend.create(2 * MIB) for _ in range(2)]
    poke(mapping.address, b"." * 2000)
    for segment, text in zip(segments, (b"first source", b"second source"), strict=True):
        write(segment, text)
        sources.append(imported(segment))
    copies = [Copy(source=0, start=0, offset=512, nbytes=5), Copy(source=1, start=7, offset=1024, nbytes=6)]
    with transfer_for(backend) as transfer:
        copy_blobs(transfer, sources, mapping, copies)
        transfer.settle()
    assert [source.access for source in sources] == [Access.READ, Access.READ]
    expected = b"first".join([b"." * 512, b"." * (512 - 5)]) + b"source" + b"." * (2000 - 1030)
    assert peek(mapping.address, 2000) == expected
    for segment in segments:
        backend.release(segment)


@pytest.mark.parametrize("nbytes", [1, 4097, BUFFER_BYTES])
def test_a_lane_copies_in_and_out(backend, mapping, nbytes):
    """Three times: a buffer is used again while an earlier copy may be in flight."""
    contents = [random.Random(number).randbytes(nbytes) for number in range(3)]
    found = []
    with transfer_for(backend) as transfer, transfer.lane() as lane:
        for number, data in enumerate(contents):
            lane.copy_in(mapping.address + number * nbytes, nbytes, put(data))
        lane.settle()
        for number in range(3):
            lane.copy_out(mapping.address + number * nbytes, nbytes, lambda view: found.append(bytes(view)))
    assert found == contents
    assert peek(mapping.address, 3 * nbytes) == b"".join(contents)


def test_a_lane_that_ends_well_has_made_its_copies(backend, mapping):
    with transfer_for(backend) as transfer:
        with transfer.lane() as lane:
            lane.copy_in(mapping.address, 5, put(b"bytes"))
        assert peek(mapping.address, 5) == b"bytes"


def test_several_threads_copy_at_a_time(backend, mapping):
    """Each with a lane of its own."""
    data = [random.Random(number).randbytes(MIB) for number in range(8)]
    errors = []

    def copy(number):
        try:
            with transfer.lane() as lane:
                for part in range(number, 8, 4):
                    lane.copy_in(mapping.address + part * MIB, MIB, put(data[part]))
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            errors.append(error)

    with transfer_for(backend) as transfer:
        threads = [threading.Thread(target=copy, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert peek(mapping.address, 8 * MIB) == b"".join(data)


def test_an_error_while_a_buffer_is_filled_is_raised(backend, mapping):
    """And the lane can be used again."""

    def fail(_):
        raise KeyError("cannot read the file")

    with transfer_for(backend) as transfer:
        with pytest.raises(KeyError), transfer.lane() as lane:
            lane.copy_in(mapping.address, 5, fail)
        with transfer.lane() as lane:
            lane.copy_in(mapping.address, 5, put(b"bytes"))
    assert peek(mapping.address, 5) == b"bytes"


def test_a_segment_is_filled_through_its_descriptor(backend, segment, imported, capable):
    """Within a block; the descriptor is closed, and nothing stays mapped for writing."""
    capable("host_access")
    fd = backend.export(segment)
    with map_writable(backend, fd, segment.nbytes) as address:
        assert fd.closed
        poke(address, b"filled")
    backend.seal(segment)
    assert peek(imported(segment, Access.READ).address, 6) == b"filled"
