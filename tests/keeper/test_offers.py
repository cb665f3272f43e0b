"""A client offers a model to a store that lost it. Valid offers are accepted, invalid ones change nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os

import pytest
from support.content import blob, content, key, manifest_of
from support.rawclient import RawClient
from support.waiting import open_segments, wait_until

from shared_store.base.manifest import encode
from shared_store.memory import Access, Mapping, MemfdBackend
from shared_store.protocol import messages

DATA = content(1, 100_000)
NBYTES = 2 << 20
SEGMENT = 77


@pytest.fixture
def segment():
    """Make a segment that starts with ``data``, sealed by default. Returns its fd."""
    backend, fds = MemfdBackend(), []

    def make(data=DATA, *, sealed=True, nbytes=NBYTES):
        memory = backend.create(nbytes)
        fds.append(backend.export(memory).detach())
        with contextlib.closing(Mapping(backend, memory)) as mapping:
            mapping.map(Access.WRITE)
            ctypes.memmove(mapping.address, data, len(data))
            mapping.unmap()
            if sealed:
                backend.seal(memory)
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def offer(client, fds, *, number=1, manifest=None, offset=0, nbytes=NBYTES, segments=1):
    """Rejoin, which fails, then offer. Return the store's answer to the offer."""
    ids = tuple(range(SEGMENT, SEGMENT + segments))
    client.send(messages.Rejoin(1, key(number), ids))
    wanted = client.receive()
    data = encode(manifest or manifest_of(key(number), [blob(DATA)]))
    infos = tuple(messages.SegmentInfo(one, nbytes) for one in ids)
    client.send(messages.Offer(2, key(number), data, (messages.BlobPlace(0, offset),), infos, 0, wanted.ticket), fds)
    return client.receive()


@pytest.fixture
def raw(kept):
    """A client that sends arbitrary bytes."""
    with RawClient(kept.paths.socket) as client:
        yield client


def test_valid_offer(kept, raw, segment, actor):
    """The store has the model and its reader, other clients attach, and it survives the next restart."""
    assert isinstance(offer(raw, [segment()]), messages.Done)
    reader = actor()
    assert reader.open(key=key(1), publish=False) == "attached"
    assert reader.digests() == reader.expected() == [blob(DATA).digest.hex()]
    (model,) = kept.status().models
    assert model.readers == 2
    wait_until(lambda: open_segments(kept.pid) == 1, "the keeper to retain the segment")


def other_bytes(raw, segment):
    return offer(raw, [segment(DATA[:-1] + bytes([DATA[-1] ^ 1]))])


def unsealed(raw, segment):
    return offer(raw, [segment(sealed=False)])


def too_small(raw, segment):
    return offer(raw, [segment()], nbytes=2 * NBYTES)


def too_large(raw, segment):
    return offer(raw, [segment(nbytes=2 * NBYTES)])


def no_segment(raw, segment):
    segment()
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        return offer(raw, [null])
    finally:
        os.close(null)


def blob_past_the_end(raw, segment):
    return offer(raw, [segment()], offset=NBYTES - 10)


def manifest_of_another_model(raw, segment):
    return offer(raw, [segment()], manifest=manifest_of(key(2), [blob(DATA)]))


def fewer_fds_than_segments(raw, segment):
    return offer(raw, [segment()], segments=2)


INVALID = {
    other_bytes: "digest_mismatch",
    unsealed: "memory",
    too_small: "memory",
    too_large: "memory",
    no_segment: "memory",
    blob_past_the_end: "offer_refused",
    manifest_of_another_model: "offer_refused",
    fewer_fds_than_segments: "offer_refused",
}


@pytest.mark.parametrize("change", INVALID, ids=lambda change: change.__name__)
def test_invalid_offer(kept, raw, segment, change):
    """It is refused with a code, and the store has no model, no memory and no fd of it."""
    kept.client().session.status()
    before = open_segments(kept.store_pid)
    assert change(raw, segment).code == INVALID[change]
    status = kept.status()
    assert status.models == ()
    assert status.totals.resident_bytes == 0
    wait_until(lambda: open_segments(kept.store_pid) == before, "the store to close the offered segments")


def test_offer_under_the_id_of_a_used_segment(kept, raw, segment):
    """An offer cannot replace the bytes of a segment that another model uses."""
    assert isinstance(offer(raw, [segment()]), messages.Done)
    other = content(2, 100_000)
    with RawClient(kept.paths.socket) as other_client:
        answer = offer(other_client, [segment(other)], number=2, manifest=manifest_of(key(2), [blob(other)]))
    assert answer.code == "digest_mismatch"
    assert [model.key for model in kept.status().models] == [key(1)]


def test_an_offered_segment_whose_blobs_the_store_has_is_not_retained(kept, raw, segment):
    """Another model's copy serves both; the offered one is closed, not left without a reference."""
    assert isinstance(offer(raw, [segment()]), messages.Done)
    before = kept.status().totals.resident_bytes
    with RawClient(kept.paths.socket) as other:
        data = encode(manifest_of(key(2), [blob(DATA)]))
        other.send(messages.Rejoin(1, key(2), (SEGMENT + 1,)))
        infos = (messages.SegmentInfo(SEGMENT + 1, NBYTES),)
        ticket = other.receive().ticket
        other.send(messages.Offer(2, key(2), data, (messages.BlobPlace(0, 0),), infos, 0, ticket), [segment()])
        assert other.receive() == messages.Done(2)
        assert kept.status().totals.resident_bytes == before
        assert {model.key: model.readers for model in kept.status().models} == {key(1): 1, key(2): 1}


def test_fds_without_a_rejoin(raw, segment):
    """Unexpected fds end the connection."""
    data = encode(manifest_of(key(1), [blob(DATA)]))
    infos = (messages.SegmentInfo(SEGMENT, NBYTES),)
    raw.send(messages.Offer(1, key(1), data, (messages.BlobPlace(0, 0),), infos), [segment()])
    assert raw.refusal() == "protocol"


def test_more_fds_than_the_rejoin_named(raw, segment):
    """Too many fds end the connection before the message is decoded."""
    raw.send(messages.Rejoin(1, key(1), (SEGMENT,)))
    raw.receive()
    raw.send(messages.GetStatus(2), [segment()] * 2)
    assert raw.refusal() == "protocol"
