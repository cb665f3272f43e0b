"""Which mapping contains a tensor, and which of its bytes became private."""

from __future__ import annotations

import gc

import pytest
import torch
from support.mapped import segment_ranges

from shared_store.memory import Access, Mapping, MemfdBackend
from shared_store.torch import mapping_registry
from shared_store.torch.views import bytes_in, part_of, storage_of

PAGE = 4096


def bytes_at(mapping, first, nbytes):
    return bytes_in(part_of(storage_of(mapping), first, nbytes))


@pytest.fixture
def mapping():
    """Four pages of a sealed segment, with bytes in them, mapped for reading."""
    backend = MemfdBackend()
    segment = backend.create(4 * PAGE)
    writable = Mapping(backend, segment)
    writable.map(Access.WRITE)
    bytes_at(writable, 0, 4 * PAGE).fill_(7)
    writable.unmap()
    backend.seal(segment)
    with backend.export(segment) as fd:
        again = mapping_registry.register(Mapping(backend, backend.import_fd(fd.fileno(), 4 * PAGE)))
    again.map(Access.READ)
    return again


def test_written_pages_are_counted_by_the_range_asked_for(mapping):
    """A write to one byte makes its page private; a range counts the part of the page that it covers."""
    tensor = bytes_at(mapping, 0, 4 * PAGE)
    assert tensor.sum() == 7 * 4 * PAGE  # reading brings pages in, and makes none private
    assert mapping_registry.written_bytes(mapping, mapping.address, 4 * PAGE) == 0
    tensor[PAGE + 5] = 1
    tensor[3 * PAGE] = 1
    assert mapping_registry.written_bytes(mapping, mapping.address, 4 * PAGE) == 2 * PAGE
    assert mapping_registry.written_bytes(mapping, mapping.address, PAGE) == 0
    assert mapping_registry.written_bytes(mapping, mapping.address + PAGE, PAGE) == PAGE
    assert mapping_registry.written_bytes(mapping, mapping.address + 100, PAGE) == 100
    assert mapping_registry.written_bytes(mapping, mapping.address + PAGE + 100, 50) == 50
    assert mapping_registry.written_bytes(mapping, mapping.address + 2 * PAGE - 10, 20) == 10
    assert mapping_registry.written_bytes(mapping, mapping.address, 0) == 0
    assert sum(one.private_bytes for one in segment_ranges() if one.start == mapping.address) == 2 * PAGE


def test_the_mapping_of_a_tensor(mapping):
    """Parts, views and detached tensors are in the mapping of their storage; other memory is in none."""
    tensor = bytes_at(mapping, PAGE, 2 * PAGE)
    for it in (tensor, tensor[3:9], tensor.view(2, -1).t(), torch.nn.Parameter(tensor, requires_grad=False)):
        assert mapping_registry.mapping_of(it) is mapping
    for other in (tensor.clone(), torch.empty(0), torch.empty(3, device="meta"), torch.ones(2).to_sparse()):
        assert mapping_registry.mapping_of(other) is None


def test_a_mapping_is_unregistered_when_it_is_collected():
    """The registry keeps no mapping alive."""
    backend = MemfdBackend()
    one = mapping_registry.register(Mapping(backend, backend.create(PAGE)))
    address = one.address
    assert address in {mapping.address for mapping in mapping_registry._mappings}
    del one
    gc.collect()
    assert address not in {mapping.address for mapping in mapping_registry._mappings}
