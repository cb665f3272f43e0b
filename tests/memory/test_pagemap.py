"""Private pages of a copy-on-write mapping are counted by the page map, to the byte at the ends of a range."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from shared_store.memory import Access, Mapping, MemfdBackend, pagemap

PAGE = mmap.PAGESIZE
PAGES = 9


@pytest.fixture
def mapping():
    """Nine pages, read from the segment; the third, fourth and last are written to."""
    backend = MemfdBackend()
    with Mapping(backend, backend.create(PAGES * PAGE)) as mapped:
        mapped.map(Access.READ)
        memory = memory_of(mapped)
        assert sum(memory) == 0  # every page is present, and none is private
        for page in (2, 3, 8):
            memory[page * PAGE + 100] = 1
        del memory
        yield mapped


def memory_of(mapped):
    return memoryview((ctypes.c_char * mapped.nbytes).from_address(mapped.address)).cast("B")


@pytest.mark.parametrize("at_once", [1, 2, 3, 8, 9, 1 << 17])
def test_written_pages_count_however_the_range_is_read(mapping, monkeypatch, at_once):
    """Pages that were only read, and those that were not touched, do not count."""
    monkeypatch.setattr(pagemap, "_PAGES_AT_ONCE", at_once)
    assert pagemap.written_bytes(mapping.address, mapping.nbytes) == 3 * PAGE
    assert mapping.private_bytes() == 3 * PAGE


RANGES = {
    "no bytes": (2 * PAGE, 0, 0),
    "one byte of a private page": (2 * PAGE + 17, 1, 1),
    "one byte of a shared page": (17, 1, 0),
    "the end of one and the start of the next": (3 * PAGE - 10, 30, 30),
    "from a private into a shared page": (4 * PAGE - 5, PAGE, 5),
    "from a shared into a private page": (PAGE, PAGE + 7, 7),
    "the rest from inside of a private page": (3 * PAGE + 1, 6 * PAGE - 1, 2 * PAGE - 1),
}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("at_once", [1, 4, 1 << 17])
def test_pages_count_as_far_as_they_are_in_the_range(mapping, monkeypatch, name, at_once):
    monkeypatch.setattr(pagemap, "_PAGES_AT_ONCE", at_once)
    start, nbytes, private = RANGES[name]
    assert pagemap.written_bytes(mapping.address + start, nbytes) == private


def test_a_new_mapping_of_the_same_range_has_no_private_pages(mapping):
    mapping.unmap()
    mapping.map(Access.READ)
    assert mapping.private_bytes() == 0
