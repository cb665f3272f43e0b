"""Effects that fail: the keeper never loses the only descriptor of bytes that its records refer to."""

from __future__ import annotations

import socket

import pytest
from support.content import blob, content, key, manifest_of

from shared_store.base import manifest as manifests
from shared_store.base.errors import MemoryBackendError
from shared_store.memory.fake import FakeBackend
from shared_store.protocol import keeper_messages, wire
from shared_store.store.assembly import Parts
from shared_store.store.keeper_link.channel import ControlChannel
from shared_store.store.state.effects import Released, Relocated

MIB = 1 << 20
DEVICE = "fake"
OLD, NEW = 1, 2


@pytest.fixture
def keeper():
    """The keeper's end of the connection."""
    ours, theirs = socket.socketpair()
    channel = ControlChannel(theirs)
    yield channel, ours
    channel.close()
    ours.close()


def received(sock):
    """Return the messages that the keeper has received."""
    sock.setblocking(False)
    decoder, found = wire.Decoder(wire.MAX_FROM_STORE), []
    while True:
        try:
            data, fds = wire.receive(sock)
        except BlockingIOError:
            return found
        for frame in decoder.feed(data, fds):
            found.append(keeper_messages.decode_from_store(frame.payload))
            frame.fds.close()


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_failed_record_the_keeper_retains_old_segments(keeper, fails):
    """A model's blobs moved to a new segment whose descriptor cannot be sent: the keeper's record names the old one."""
    channel, sock = keeper
    backend = FakeBackend(DEVICE)
    parts = Parts({DEVICE: backend}, {}, channel=channel)
    manifest = manifest_of(key(1), [blob(content(1, 100))], device=DEVICE)
    for segment in (OLD, NEW):
        parts.devices.put(segment, DEVICE, backend.create(2 * MIB))
        parts.state.segments.take_back(segment, DEVICE, 2 * MIB)
    parts.state.readmit(manifests.encode(manifest), manifest, [(OLD, 0)])
    parts.keeper.note(key(1))
    parts.state.segments.move(manifest.blobs[0].digest, NEW, 0)
    effects = [Relocated(key(1)), Released(OLD)]
    if fails:
        backend.faults.fail_at("export", 1)
        with pytest.raises(MemoryBackendError, match="failed as planned"):
            parts.effects.carry_out(effects)
    else:
        parts.effects.carry_out(effects)
    assert parts.devices.memory(OLD) is None
    sent = received(sock)
    released = [message.segment for message in sent if isinstance(message, keeper_messages.Release)]
    recorded = [message.model.segments for message in sent if isinstance(message, keeper_messages.NoteModel)]
    assert (released, recorded[-1]) == (([], {OLD}) if fails else ([OLD], {NEW}))
    parts.devices.close()
