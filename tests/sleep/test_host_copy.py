"""A host copy closes its descriptors, also when it cannot be opened, and its bytes are checked when they are copied."""

from __future__ import annotations

import gc
import os

import pytest
from support.content import blob, content, key, manifest_of
from support.waiting import open_fds

from shared_store.base.errors import DigestMismatchError, ProtocolError
from shared_store.base.manifest import encode
from shared_store.memory import MemfdBackend
from shared_store.protocol.messages import Attached, BlobPlace, SegmentInfo
from shared_store.runtime.fds import OwnedFds
from shared_store.sleep.copied_model import CopiedModel
from shared_store.transfer.copier import copier_for
from shared_store.transfer.fill import fill_segment

NBYTES = 2 << 20
CONTENT = content(1, 1000)
MANIFEST = manifest_of(key(1), [blob(CONTENT)])


def segment_fd(data=b""):
    """Return the descriptor of a new segment that begins with `data`."""
    backend = MemfdBackend()
    segment = backend.create(NBYTES)
    fd = backend.export(segment)
    backend.release(segment)
    os.pwrite(fd.fileno(), data, 0)
    return fd


def attached(manifest, *places):
    """Return the store's reply for a model in one segment."""
    return Attached(1, manifest, places, (SegmentInfo(1, NBYTES),))


def host_copy(data):
    """Return a host copy whose only blob has the bytes `data`."""
    return CopiedModel(key(1), attached(encode(MANIFEST), BlobPlace(0, 0)), OwnedFds([segment_fd(data)]))


def test_malformed_manifest_closes_the_descriptors():
    before, fds = open_fds(), OwnedFds([segment_fd()])
    with pytest.raises(ProtocolError):
        CopiedModel(key(1), attached(b"not a manifest", BlobPlace(0, 0)), fds)
    assert open_fds() == before


def test_missing_location_closes_the_descriptors():
    before, fds = open_fds(), OwnedFds([segment_fd()])
    with pytest.raises(ValueError, match="zip"):
        CopiedModel(key(1), attached(encode(MANIFEST)), fds)
    assert open_fds() == before


@pytest.mark.parametrize("end", [CopiedModel.close, lambda _: None], ids=["closed", "collected"])
def test_the_end_of_a_host_copy_closes_the_descriptors(end):
    before = open_fds()
    host = host_copy(CONTENT)
    assert open_fds() == before + 1
    end(host)
    del host
    gc.collect()
    assert open_fds() == before


def copy_back(host):
    """Fill a segment from a host copy, as waking does, and return the bytes of its blob."""
    backend = MemfdBackend()
    with segment_fd() as fd, copier_for(backend) as copier:
        fill_segment(fd, NBYTES, [(MANIFEST.blobs[0], 4096)], host, backend, copier)
        return os.pread(fd.fileno(), len(CONTENT), 4096)


def test_a_blob_is_copied_back():
    host = host_copy(CONTENT)
    assert copy_back(host) == CONTENT
    host.close()


def test_a_changed_host_copy_is_refused():
    """One wrong byte, and nothing stays open."""
    before, host = open_fds(), host_copy(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    with pytest.raises(DigestMismatchError, match=f"the copy of blob {MANIFEST.blobs[0].digest.hex()[:16]}"):
        copy_back(host)
    host.close()
    assert open_fds() == before
