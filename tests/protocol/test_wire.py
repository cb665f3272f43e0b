"""Frames are complete for any fragmentation of the stream, and no fd is lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.waiting import open_fds

from shared_store.base.errors import ConnectionLostError, MessageTooLargeError, ProtocolError
from shared_store.client.channel import Channel
from shared_store.protocol import messages, wire
from shared_store.runtime.fds import OwnedFds


def owned(count):
    """Open some descriptors."""
    return OwnedFds.from_ints(os.dup(0) for _ in range(count))


PAYLOADS = st.lists(st.binary(max_size=300), min_size=1, max_size=8)


def pieces(data, draw):
    """Cut the data at arbitrary positions."""
    cuts = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=8))})
    return [data[begin:end] for begin, end in itertools.pairwise(cuts)]


@given(PAYLOADS, st.data())
def test_frames_are_complete_for_any_fragmentation(payloads, data):
    decoder = wire.Decoder(300)
    stream = b"".join(wire.header(payload, 0) + payload for payload in payloads)
    frames = [frame for piece in pieces(stream, data.draw) for frame in decoder.feed(piece)]
    assert [frame.payload for frame in frames] == payloads
    assert not decoder.in_frame


@given(PAYLOADS, st.data())
def test_a_cut_stream_has_the_frames_before_the_cut(payloads, data):
    decoder = wire.Decoder(300)
    stream = b"".join(wire.header(payload, 0) + payload for payload in payloads)
    cut = data.draw(st.integers(0, len(stream) - 1))
    frames = decoder.feed(stream[:cut])
    ends = [sum(wire.HEADER.size + len(one) for one in payloads[: index + 1]) for index in range(len(payloads))]
    assert len(frames) == sum(end <= cut for end in ends)
    assert decoder.in_frame is (cut not in {0, *ends})


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_a_frame_over_the_limit_is_refused_before_it_arrives(limit, length):
    decoder = wire.Decoder(limit)
    header = struct.pack(">IH", length, 0)
    if length > limit:
        with pytest.raises(MessageTooLargeError, match=f"{length} bytes; at most {limit}"):
            decoder.feed(header)
    else:
        assert [(one.payload, len(one.fds)) for one in decoder.feed(header + bytes(length))] == [(bytes(length), 0)]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.data())
def test_each_frame_gets_its_own_fds_in_order(counts, data):
    """Fds may arrive with any byte of their frame, or earlier."""
    sent = [wire.header(b"%d" % index, count) + b"%d" % index for index, count in enumerate(counts)]
    cuts = [data.draw(st.integers(1, len(one) - 1)) for one in sent]  # a draw may end the example: no fds before it
    before = open_fds()
    decoder = wire.Decoder(100)
    given_to, frames = [], []
    for one, cut, count in zip(sent, cuts, counts, strict=True):
        fds = owned(count)
        given_to.append(list(fds.filenos()))
        frames += decoder.feed(one[:cut], fds)
        frames += decoder.feed(one[cut:])
    assert [list(frame.fds.filenos()) for frame in frames] == given_to
    for frame in frames:
        frame.fds.close()
    assert open_fds() == before


@given(st.binary(max_size=400))
def test_garbage_is_frames_or_an_error(garbage):
    """No other error is raised, and the decoder waits for no frame over the limit."""
    decoder = wire.Decoder(64, max_fds=0)
    try:
        frames = decoder.feed(garbage)
    except ProtocolError:
        return
    consumed = sum(wire.HEADER.size + len(frame.payload) for frame in frames)
    assert len(garbage) - consumed < wire.HEADER.size + 64


@pytest.mark.parametrize(
    ("announced", "sent"), [(1, 0), (0, 1), (3, 2)], ids=["none came", "none announced", "one is missing"]
)
def test_fds_that_do_not_fit_the_frame_are_refused_and_closed(announced, sent):
    """So are the fds of complete frames from the same read."""
    before = open_fds()
    decoder = wire.Decoder(100)
    fds = owned(1 + sent)
    good = wire.header(b"good", 1) + b"good"
    with pytest.raises(ProtocolError, match="fds"):
        decoder.feed(good + wire.header(b"bad", announced) + b"bad", fds)
    decoder.close()
    assert open_fds() == before


def test_more_fds_than_allowed_are_refused_and_closed():
    before = open_fds()
    decoder = wire.Decoder(100, max_fds=0)
    with pytest.raises(ProtocolError, match="at most 0"):
        decoder.feed(b"\0", owned(1))
    decoder.close()
    assert open_fds() == before


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([0, 1, 5, 253, 254, 600])), min_size=1, max_size=4),
    st.sampled_from([4096, 65536]),
)
def test_an_outbox_delivers_through_a_small_socket_buffer(frames, room):
    """Any number of fds with a frame, and a slow reader. No fd remains open at either end."""
    before = open_fds()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        outbox = wire.Outbox()
        for index, (length, count) in enumerate(frames):
            outbox.put(bytes([index]) * (length + 8), owned(count))
        decoder, arrived, done = wire.Decoder(10_000), [], False
        while len(arrived) < len(frames):
            done = done or outbox.send(ours)
            arrived += decoder.feed(*wire.receive(theirs))
        assert done
        assert outbox.pending_bytes == 0
        assert [(len(frame.payload) - 8, len(frame.fds)) for frame in arrived] == frames
        assert [frame.payload[:1] for frame in arrived] == [bytes([index]) for index in range(len(frames))]
        for frame in arrived:
            frame.fds.close()
    assert open_fds() == before


def test_an_outbox_that_is_dropped_closes_its_fds():
    before = open_fds()
    outbox = wire.Outbox()
    outbox.put(b"never sent", owned(300))
    assert open_fds() == before + 300
    outbox.close()
    assert open_fds() == before


def test_a_channel_reports_where_the_stream_ended():
    """Between messages, or within one."""
    for sent, said in ((b"", "closed the connection$"), (b"\0\0", "in the middle of a message$")):
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
        theirs.sendall(sent)
        theirs.close()
        with pytest.raises(ConnectionLostError, match=said):
            channel.receive()
        channel.close()


CLIENT_MESSAGES = st.one_of(
    st.builds(messages.Hello, st.integers(0, 9), st.text(max_size=9), st.text(max_size=9)),
    st.builds(messages.Acquire, st.integers(0, 2**63), st.text(max_size=9)),
    st.builds(
        messages.Open,
        st.integers(0, 2**63),
        st.text(max_size=9),
        st.text(max_size=9),
        st.text(max_size=9),
        st.text(max_size=9),
        st.booleans(),
    ),
    st.builds(messages.Commit, st.integers(0, 2**63), st.text(max_size=9), st.binary(max_size=99)),
    st.builds(messages.GetStatus, st.integers(0, 2**63)),
)


@given(CLIENT_MESSAGES)
def test_messages_round_trip(message):
    assert messages.decode_from_client(messages.encode(message)) == message


@given(CLIENT_MESSAGES)
def test_a_clients_messages_are_not_the_stores(message):
    with pytest.raises(ProtocolError):
        messages.decode_from_store(messages.encode(message))


@given(CLIENT_MESSAGES, st.data())
def test_damaged_messages_are_messages_or_refused(message, data):
    raw = bytearray(messages.encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolError):  # no other error may be raised
        assert isinstance(messages.decode_from_client(bytes(raw)), messages.Message | messages.Unknown)


@given(st.binary(max_size=99))
def test_garbage_is_no_message(garbage):
    for decode in (messages.decode_from_client, messages.decode_from_store):
        with pytest.raises(ProtocolError):
            decode(garbage)


def test_deep_nesting_is_no_message():
    with pytest.raises(ProtocolError):
        messages.decode_from_client(b"\x81\xa4type" + b"\x91" * 100_000)


def test_an_added_field_is_ignored():
    """A newer peer of the same protocol version may add fields."""
    fields = msgspec.msgpack.decode(messages.encode(messages.GetStatus(7)))
    assert messages.decode_from_client(msgspec.msgpack.encode({**fields, "new": 1})) == messages.GetStatus(7)


def test_pending_until_the_last_byte():
    """Pending bytes count every unsent byte, including headers."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    outbox, sent, received = wire.Outbox(), 0, 0
    while outbox.send(ours):
        outbox.put(b"")
        sent += 1
    for _ in range(100):
        outbox.put(b"")
        sent += 1
    while outbox.pending_bytes:
        received += len(theirs.recv(1 << 20))
        outbox.send(ours)
    with contextlib.suppress(BlockingIOError):
        while True:
            received += len(theirs.recv(1 << 20))
    assert received == sent * len(wire.header(b"", 0))
    ours.close()
    theirs.close()
