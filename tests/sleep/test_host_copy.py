"""A host copy closes its descriptors, also when it cannot be opened."""

from __future__ import annotations

import gc

import pytest
from support.content import blob, content, key, manifest_of
from support.waiting import open_fds

from shared_store.base.errors import ProtocolError
from shared_store.base.manifest import encode
from shared_store.memory import MemfdBackend
from shared_store.protocol.messages import Attached, BlobPlace, SegmentInfo
from shared_store.runtime.fds import OwnedFds
from shared_store.sleep.host_copy import HostCopy

NBYTES = 2 << 20
MANIFEST = manifest_of(key(1), [blob(content(1, 1000))])


def segment_fds():
    """Return the descriptor of a new segment."""
    backend = MemfdBackend()
    segment = backend.create(NBYTES)
    fd = backend.export(segment)
    backend.release(segment)
    return OwnedFds([fd])


def attached(manifest, *places):
    """Return the store's reply for a model in one segment."""
    return Attached(1, manifest, places, (SegmentInfo(1, NBYTES),))


def test_malformed_manifest_closes_the_descriptors():
    before, fds = open_fds(), segment_fds()
    with pytest.raises(ProtocolError):
        HostCopy(key(1), attached(b"not a manifest", BlobPlace(0, 0)), fds)
    assert open_fds() == before


def test_missing_location_closes_the_descriptors():
    before, fds = open_fds(), segment_fds()
    with pytest.raises(ValueError, match="zip"):
        HostCopy(key(1), attached(encode(MANIFEST)), fds)
    assert open_fds() == before


@pytest.mark.parametrize("end", [HostCopy.close, lambda _: None], ids=["closed", "collected"])
def test_the_end_of_a_host_copy_closes_the_descriptors(end):
    before = open_fds()
    host = HostCopy(key(1), attached(encode(MANIFEST), BlobPlace(0, 0)), segment_fds())
    assert open_fds() == before + 1
    end(host)
    del host
    gc.collect()
    assert open_fds() == before
